"""Structure matrices of small models beside the whole Jacobian by vmap(jacrev), on a grid of sizes.

Both take turns in one process, in random order; a turn is as many calls as take some milliseconds,
and a ratio is taken within each. The Jacobian is written in four ways: multiplied at once or
parameter by parameter, with torch's choice of attention or the plain one, which vmap has rules for;
the fastest in the median counts. Seconds are those of the process's CPU on one thread. The first
call, which checks the model, is not timed.

With --between, narrow convolutions, whose gradients have few useful factors, and transformers of
sizes drawn at random, of more than 2^18 entries of the Jacobian.

    python tests/benchmarks/small_structures.py [--turns 15] [--only NAME | --between N]
        [--out FILE]
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import random
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from loss_time import keep_freed_memory
from measuring import peak_bytes
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from conjopt.measure import structure_matrix
from conjopt.measure.dense import Shortcut

OUTPUTS, SAMPLES = (1, 10, 50), (1, 8, 64, 512)
MOST = 5e6  # elements of a Jacobian that is still formed


class Tokens(nn.Module):
    """A residual block on sequences: layer norm and two linear layers."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.head = nn.Linear(width, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.b(torch.relu(self.a(self.norm(x))))).mean(1))


class Transformer(nn.Module):
    """One encoder layer on embedded words."""

    def __init__(self, width: int, k: int) -> None:
        super().__init__()
        self.words = nn.Embedding(20, width)
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.words(x)).mean(1))


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with tanh between them."""
    pairs = itertools.pairwise(widths)
    layers = [layer for pair in pairs for layer in (nn.Linear(*pair), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def convolutional(channels: int, k: int, kernel: int = 3) -> nn.Sequential:
    """Two convolutions, pooled."""
    around = kernel // 2
    return nn.Sequential(
        *(nn.Conv2d(1, channels, kernel, padding=around), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, kernel, padding=around), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * channels, k)),
    )


def models(k: int) -> dict[str, tuple[nn.Module, Callable[[int], Tensor]]]:
    """Models of `k` outputs, and draws of so many samples."""
    return {
        "linear, 4 inputs": (nn.Linear(4, k), lambda m: torch.randn(m, 4)),
        "MLP 8-16": (mlp(8, 16, k), lambda m: torch.randn(m, 8)),
        "MLP 32-32-32": (mlp(32, 32, 32, k), lambda m: torch.randn(m, 32)),
        "MLP 16, six layers": (mlp(*[16] * 7, k), lambda m: torch.randn(m, 16)),
        "MLP 64-256-256": (mlp(64, 256, 256, k), lambda m: torch.randn(m, 64)),
        "CNN 4-8, 8x8": (convolutional(4, k), lambda m: torch.randn(m, 1, 8, 8)),
        "CNN 16-32, 8x8": (convolutional(16, k), lambda m: torch.randn(m, 1, 8, 8)),
        "8 tokens, width 16": (Tokens(16, k), lambda m: torch.randn(m, 8, 16)),
        "transformer, width 16": (Transformer(16, k), lambda m: torch.randint(20, (m, 8))),
    }


def jacobians(model: nn.Module, x: Tensor) -> dict[str, Callable[[], Tensor]]:
    """The ways to write `J J^T` with the whole Jacobian."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def outputs(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, sample.unsqueeze(0)).squeeze(0)

    jacobian = torch.func.vmap(torch.func.jacrev(outputs), (None, 0))

    def at_once() -> Tensor:
        J = torch.cat([j.flatten(2) for j in jacobian(parameters, x).values()], 2)
        return J @ J.mT

    def by_parameter() -> Tensor:
        parts = [j.flatten(2) for j in jacobian(parameters, x).values()]
        total = parts[0] @ parts[0].mT
        for part in parts[1:]:
            total += part @ part.mT
        return total

    def plain(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def with_plain_attention() -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return run()

        return with_plain_attention

    found = {"at once": at_once, "by parameter": by_parameter}
    if isinstance(model, Transformer):
        found |= {f"{name}, plain attention": plain(run) for name, run in found.items()}
    return found


def seconds(run: Callable[[], object], calls: int) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def rows(turns: int, only: str) -> Iterator[dict[str, object]]:
    """Compare on every model and size."""
    order = random.Random(0)
    for name in models(1):
        for k in OUTPUTS if only in name else ():
            torch.manual_seed(0)
            model, draw = models(k)[name]
            for m in SAMPLES:
                if m * k * sum(p.numel() for p in model.parameters()) <= MOST:
                    yield compared(name, model, draw(m), k, turns, order)


def between(number: int, turns: int) -> Iterator[dict[str, object]]:
    """Compare on narrow convolutions and transformers of other sizes, three to one."""
    order, sizes = random.Random(0), random.Random(1)
    while number:
        torch.manual_seed(0)
        k, m = sizes.randint(2, 20), round(2 ** sizes.uniform(5, 10))
        if sizes.random() < 0.75:
            channels, kernel, side = (
                sizes.randint(2, 12),
                sizes.choice((1, 3, 5)),
                sizes.choice((8, 16)),
            )
            model, x = convolutional(channels, k, kernel), torch.randn(m, 1, side, side)
            name = f"CNN {channels}-{2 * channels}, {kernel}x{kernel}, on {side}x{side}"
        else:
            width = sizes.choice((16, 32, 64))
            model, x = Transformer(width, k), torch.randint(20, (m, 8))
            name = f"transformer, width {width}"
        if 2**18 < m * k * sum(p.numel() for p in model.parameters()) < 2**25:
            number -= 1
            yield compared(name, model, x, k, turns, order)


def compared(
    name: str, model: nn.Module, x: Tensor, k: int, turns: int, order: random.Random
) -> dict[str, object]:
    """Compare on one model and batch."""
    runs = {"ours": lambda: structure_matrix(model, x), **jacobians(model, x)}
    first = runs["ours"]()
    for way, run in runs.items():
        if not torch.allclose(run(), first, rtol=1e-3, atol=1e-3 * float(first.max())):
            print(f"{name}, k = {k}, m = {len(x)}: {way} disagrees")
    calls = max(1, int(5e-3 / seconds(runs["ours"], 3)))
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(turns):
        for way in order.sample(list(runs), len(runs)):
            times[way].append(seconds(runs[way], calls))
    best = min((way for way in runs if way != "ours"), key=lambda w: np.median(times[w]))
    ratios = np.array(times["ours"]) / np.array(times[best])
    return {
        "model": name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "outputs": k,
        "samples": len(x),
        "whole": Shortcut("structure_matrix", model, x).like is not None,
        "milliseconds": 1e3 * float(np.median(times["ours"])),
        "jacrev": best,
        "jacrev_milliseconds": 1e3 * float(np.median(times[best])),
        "ratio": float(np.median(ratios)),
        "ratio_quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
        "memory_ratio": peak_bytes(model, runs["ours"]) / peak_bytes(model, runs[best]),
    }


def main() -> None:
    """Compare, print tables, and write the rows as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--only", default="", help="models with this in their name")
    parser.add_argument("--between", type=int, default=0, help="so many other sizes instead")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
    if arguments.between:
        table = list(between(arguments.between, arguments.turns))
        print("| model | k | m | parameters | time, memory |\n|---|---|---|---|---|")
        for row in table:
            size = f"{row['outputs']} | {row['samples']} | {row['parameters']:,}"
            print(f"| {row['model']} | {size} | {cell(row)} |")
        for key in ("ratio", "memory_ratio"):
            values = np.quantile([row[key] for row in table], [0, 0.25, 0.5, 0.75, 0.9, 1])
            print(f"{key}: least, quartiles, 90 %, greatest: {np.round(values, 2)}")
    else:
        table = list(rows(arguments.turns, arguments.only))
        show(table)
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": table}))


def show(table: list[dict[str, object]]) -> None:
    """Print a line for each model and number of outputs."""
    print("| model | k | parameters |" + "".join(f" m = {m} |" for m in SAMPLES))
    print("|---|---|---|" + "---|" * len(SAMPLES))
    for name, k in dict.fromkeys((row["model"], row["outputs"]) for row in table):
        line = {row["samples"]: row for row in table if (row["model"], row["outputs"]) == (name, k)}
        size = next(iter(line.values()))["parameters"]
        cells = [cell(line[m]) if m in line else "" for m in SAMPLES]
        print(f"| {name} | {k} | {size:,} | " + " | ".join(cells) + " |")


def cell(row: dict[str, object]) -> str:
    """A ratio with its quartiles and that of memory, and whether it took the whole Jacobian."""
    low, high = row["ratio_quartiles"]
    mark = "" if row["whole"] else "*"
    return f"{row['ratio']:.2f}{mark} [{low:.2f}, {high:.2f}] {row['memory_ratio']:.2f}"


if __name__ == "__main__":
    main()
