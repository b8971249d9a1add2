"""Time and memory of gradient energy and structure matrices, as ratios to a forward and backward.

Plain steps, probed steps and peers, each on its own copy of a model, take turns of a few steps in
one process on one batch; a probe watches its copy all along. A ratio is taken within each turn, and
its median over the turns is reported with quartiles. Seconds are those of the process's CPU on one
thread, and freed memory stays with the process, as in loss_time.py. Memory is the most that tensors
hold at once in a step beyond parameters and inputs. Peers that are not installed
(`pip install backpack-for-pytorch opacus`) are left out.

    python tests/benchmarks/measuring.py [--turns 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from loss_time import keep_freed_memory
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.measure import EnergyProbe, structure_matrix

IN_A_ROW = 6  # steps of a turn; even, for what is done every second time


class Residual(nn.Module):
    def __init__(self, width: int, into: int, stride: int) -> None:
        super().__init__()
        self.a = nn.Conv2d(width, into, 3, stride, 1, bias=False)
        self.b = nn.Conv2d(into, into, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(8, into), nn.GroupNorm(8, into)])
        plain = stride == 1 and width == into
        self.skip = nn.Identity() if plain else nn.Conv2d(width, into, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[1](self.b(self.norms[0](self.a(x)).relu()))
        return (h + self.skip(x)).relu()


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        qkv = self.qkv(self.norms[0](x)).view(n, t, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv, is_causal=self.causal)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, -1))
        return x + self.mlp(self.norms[1](x))


class ViT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 96, 4, 4)
        self.position = nn.Parameter(0.02 * torch.randn(1, 64, 96))
        self.blocks = nn.Sequential(*[Block(96, 4, False) for _ in range(4)])
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patches(x).flatten(2).mT + self.position
        return self.head(self.blocks(h).mean(1))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int = 512, length: int = 64) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, 96), nn.Embedding(length, 96)
        self.blocks = nn.Sequential(*[Block(96, 4, True) for _ in range(3)])
        self.head = nn.Linear(96, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1]))
        return self.head(self.blocks(h)).mT


def problems() -> dict[str, tuple[nn.Module, Tensor, Tensor]]:
    """Models with the inputs and targets of one batch."""
    torch.manual_seed(0)
    mlp = nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )
    lenet = nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, 10),
    )
    resnet = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.GroupNorm(8, 16),
        nn.ReLU(),
        Residual(16, 16, 1),
        Residual(16, 32, 2),
        Residual(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    tokens = torch.randint(512, (16, 65))
    labels = torch.randint(10, (128,))
    return {
        "MLP 784-512-512-10, batch 128": (mlp, torch.randn(128, 784), labels),
        "LeNet 28x28, batch 128": (lenet, torch.randn(128, 1, 28, 28), labels),
        "residual CNN 32x32, batch 64": (resnet, torch.randn(64, 3, 32, 32), labels[:64]),
        "ViT 32x32, batch 32": (ViT(), torch.randn(32, 3, 32, 32), labels[:32]),
        "LM, 16 x 64 tokens": (LanguageModel(), tokens[:, :-1], tokens[:, 1:]),
    }


def ways(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """What is compared; each runs a step and returns the energy. The first is the unit."""
    criterion = nn.CrossEntropyLoss()

    def step(model: nn.Module = model) -> None:
        model.zero_grad()
        criterion(model(x), y).backward()

    def probed(**options: float) -> Callable[[], Tensor | None]:
        watched = copy.deepcopy(model)
        probe = EnergyProbe(watched, **options)  # type: ignore[arg-type]

        def run() -> Tensor | None:
            step(watched)
            return probe.energy

        return run

    return {
        "plain": step,
        "probe, all rows": probed(),
        "probe, all rows, fused": probed(fused=True),
        "probe, a quarter of the rows": probed(share=0.25),
        "probe, a quarter of the rows, fused": probed(share=0.25, fused=True),
        "probe, a quarter, every second step": probed(share=0.25, every=2),
        **peers(model, x, y),
    }


def peers(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """Per-sample gradient norms by other packages, those that are installed and can."""
    found: dict[str, Callable[[], Tensor | None]] = {}
    sequential = all(not list(child.children()) for child in model.children())
    with contextlib.suppress(ImportError):
        from opacus.grad_sample import GradSampleModuleFastGradientClipping

        wrapped = GradSampleModuleFastGradientClipping(
            copy.deepcopy(model), max_grad_norm=1.0, use_ghost_clipping=True
        )

        def opacus() -> Tensor:
            wrapped.zero_grad()
            nn.functional.cross_entropy(wrapped(x), y).backward()
            return wrapped.get_norm_sample().square().mean()  # it multiplies by the samples

        found["Opacus ghost clipping, norms"] = opacus
    with contextlib.suppress(ImportError):
        from backpack import backpack, extend
        from backpack.extensions import BatchL2Grad

        if sequential and isinstance(model, nn.Sequential):
            extended, criterion = extend(copy.deepcopy(model)), extend(nn.CrossEntropyLoss())

            def back_pack() -> Tensor:
                extended.zero_grad()
                with backpack(BatchL2Grad()):
                    criterion(extended(x), y).backward()
                parts = [p.batch_l2 for p in extended.parameters()]
                return len(x) ** 2 * torch.stack(parts).sum(0).mean()

            found["BackPACK, BatchL2Grad"] = back_pack
    with contextlib.suppress(ImportError):
        from torchjd.autogram import Engine

        twin = copy.deepcopy(model)
        engine = Engine(twin, batch_dim=0)

        def torchjd() -> Tensor:
            losses = nn.functional.cross_entropy(twin(x), y, reduction="none")
            losses = losses.reshape(len(x), -1).mean(1)
            return engine.compute_gramian(losses).diagonal().mean()

        found["TorchJD, Gramian"] = torchjd
    return found


def structures(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Callable[[], Tensor | None]]:
    """Structure matrices of ten outputs, by the layers' factors and by the whole Jacobian."""
    criterion = nn.CrossEntropyLoss()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def step() -> None:
        model.zero_grad()
        criterion(model(x), y).backward()

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, sample.unsqueeze(0)).squeeze(0)

    def jacobian() -> Tensor:
        found = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))(parameters, x)
        flat = [j.flatten(2) for j in found.values()]
        return torch.stack([j @ j.mT for j in flat]).sum(0)

    return {
        "plain": step,
        "structure_matrix": lambda: structure_matrix(model, x),
        "vmap(jacrev), a product for each parameter": jacobian,
    }


def seconds(run: Callable[[], object], runs: int = 1) -> float:
    """CPU seconds of a run, a mean over some in a row."""
    start = time.process_time()
    for _ in range(runs):
        run()
    return (time.process_time() - start) / runs


def peak_bytes(model: nn.Module, run: Callable[[], object]) -> int:
    """The most bytes held at once in a run, beyond those before it, the gradients of old gone."""
    model.zero_grad()
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = least = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            least = min(least, held)  # what is freed at first was there before
            peak = max(peak, held - least)
    return peak


def compare(turns: int) -> list[dict[str, object]]:
    """All problems, all ways; a row for each."""
    table = []
    for problem, (model, x, y) in problems().items():
        table += rows_of(problem, model, ways(model, x, y), turns)
    for problem, samples in (("MLP", 16), ("LeNet", 64), ("residual", 16), ("ViT", 8)):
        name, (model, x, y) = next(p for p in problems().items() if p[0].startswith(problem))
        label = f"{name.split(', batch')[0]}, {samples} samples"
        table += rows_of(label, model, structures(model, x[:samples], y[:samples]), turns)
    return table


def rows_of(
    problem: str, model: nn.Module, runs: dict[str, Callable[[], Tensor | None]], turns: int
) -> list[dict[str, object]]:
    """Compare the ways of one problem; those that agree with the first of them that measures."""
    for name, run in list(runs.items()):
        try:
            seconds(run), seconds(run)
        except Exception as error:  # a peer that cannot
            print(f"{problem}: {name} fails: {str(error).splitlines()[0][:100]}")
            del runs[name]
    found = {name: run() for name, run in runs.items() if "quarter" not in name}
    exact = next(value for value in found.values() if value is not None)
    for name, value in found.items():
        if value is not None and not value.allclose(
            exact, rtol=1e-3, atol=1e-3 * float(exact.abs().max())
        ):
            print(f"{problem}: {name} disagrees")
    times = np.array([[seconds(run, IN_A_ROW) for run in runs.values()] for _ in range(turns)])
    memory = [max(peak_bytes(model, run) for _ in range(2)) for run in runs.values()]
    table = []
    for i, name in enumerate(runs):
        low, middle, high = np.quantile(times[:, i] / times[:, 0], [0.25, 0.5, 0.75])
        table.append(
            {
                "problem": problem,
                "way": name,
                "milliseconds": 1e3 * float(np.median(times[:, i])),
                "ratio": float(middle),
                "ratio_quartiles": [float(low), float(high)],
                "memory_ratio": memory[i] / memory[0],
            }
        )
    return table


def main() -> None:
    """Compare, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table = compare(arguments.turns)
    print("| problem | way | ms | time ratio | memory ratio |")
    print("|---|---|---|---|---|")
    for row in table:
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['problem']} | {row['way']} | {row['milliseconds']:.1f} "
            f"| {row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['memory_ratio']:.2f} |"
        )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": table}))


if __name__ == "__main__":
    main()
