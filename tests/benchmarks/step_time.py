"""Time of a training step, as a ratio to torch.optim.SGD's, and memory of the optimizer's state.

All optimizers take turns in short blocks of steps in one process, on copies of one model and on the
same batches; a ratio is taken within each turn, and its median over the turns is reported with
quartiles. Seconds are those of the process's CPU on one thread.

    python tests/benchmarks/step_time.py [--turns 15] [--out FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from conjopt import ConjSGD

BLOCK = 50  # steps of a turn, two of which measure; only every second looks for a curvature


class Attention(nn.Module):
    """A small causal transformer over characters, classes at dimension 1 of its output."""

    def __init__(self, width: int = 64, length: int = 64, vocabulary: int = 65) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.zeros(length, width))
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(width, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(length))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens) + self.position
        return self.head(self.body(hidden, mask=self.mask, is_causal=True)).mT


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 64, 10),
    )


def problems() -> dict[str, tuple[nn.Module, torch.Tensor, torch.Tensor]]:
    """Models with the inputs and targets of one batch."""
    torch.manual_seed(0)
    tokens = torch.randint(65, (16, 65))
    return {
        "MLP 64-128-128-10, batch 64": (mlp(), torch.rand(64, 64), torch.randint(10, (64,))),
        "CNN 32x32, batch 64": (cnn(), torch.rand(64, 3, 32, 32), torch.randint(10, (64,))),
        "transformer, 16 x 64 tokens": (Attention(), tokens[:, :-1], tokens[:, 1:]),
    }


def optimizers() -> dict[str, Callable[[nn.Module, nn.Module], list[torch.optim.Optimizer]]]:
    """What is compared; the first is the unit."""

    def muon(model: nn.Module, criterion: nn.Module) -> list[torch.optim.Optimizer]:
        # torch's takes matrices only; the rest goes to AdamW, as its documentation says.
        matrices = [p for p in model.parameters() if p.ndim == 2]
        rest = [p for p in model.parameters() if p.ndim != 2]
        return [torch.optim.Muon(matrices, lr=1e-4), torch.optim.AdamW(rest, lr=1e-4)]

    return {
        "SGD, momentum": lambda m, c: [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9)],
        "AdamW": lambda m, c: [torch.optim.AdamW(m.parameters(), lr=1e-4)],
        "Muon (matrices) + AdamW": muon,
        "ConjSGD, constant step": lambda m, c: [
            ConjSGD(m.parameters(), model=m, loss=c, step_rule="constant", lr=1e-4)
        ],
        "ConjSGD": lambda m, c: [ConjSGD(m.parameters(), model=m, loss=c)],
        "ConjSGD, direction sgd": lambda m, c: [
            ConjSGD(m.parameters(), model=m, loss=c, direction="sgd")
        ],
    }


class Run:
    """One optimizer on its own copy of a model."""

    def __init__(self, make: Callable, model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
        self.model, self.criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
        self.optimizers = make(self.model, self.criterion)
        self.x, self.y = x, y

    def steps(self, number: int) -> float:
        """CPU seconds per step over some steps."""
        start = time.process_time()
        for _ in range(number):
            self.model.zero_grad()
            self.criterion(self.model(self.x), self.y).backward()
            for optimizer in self.optimizers:
                optimizer.step()
        return (time.process_time() - start) / number

    def state_bytes(self) -> int:
        """Memory of the optimizers' states."""
        return sum(
            value.numel() * value.element_size()
            for optimizer in self.optimizers
            for state in optimizer.state.values()
            for value in state.values()
            if isinstance(value, torch.Tensor)
        )


def compare(turns: int) -> list[dict[str, object]]:
    """All problems, all optimizers, in turns; a row for each pair."""
    rows = []
    for problem, (model, x, y) in problems().items():
        runs = {name: Run(make, model, x, y) for name, make in optimizers().items()}
        for run in runs.values():
            run.steps(25)  # the warm-up of ConjSGD, whose steps all measure
        times = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                times[name].append(run.steps(BLOCK))
        unit, *_ = times
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        for name, run in runs.items():
            low, middle, high = np.quantile(np.divide(times[name], times[unit]), [0.25, 0.5, 0.75])
            rows.append(
                {
                    "problem": problem,
                    "optimizer": name,
                    "milliseconds": 1e3 * float(np.median(times[name])),
                    "ratio": float(middle),
                    "ratio_quartiles": [float(low), float(high)],
                    "state_over_parameters": run.state_bytes() / size,
                }
            )
    return rows


def overheads(turns: int) -> list[dict[str, object]]:
    """Each direction under its rule, over itself with a constant step; both at rate 0.

    The same weights then, and the same work: those that train end up with other weights, and a
    forward takes a few per cent more or less by how many activations are zero.
    """
    rows = []
    for problem, (model, x, y) in problems().items():
        for direction in ("spectral", "sgd"):
            kinds = {"constant": {"step_rule": "constant"}, "edge": {}}

            def make(m: nn.Module, c: nn.Module, **how: object) -> list[torch.optim.Optimizer]:
                return [ConjSGD(m.parameters(), model=m, loss=c, lr=0.0, **how)]

            runs = {
                kind: Run(partial(make, direction=direction, **how), model, x, y)
                for kind, how in kinds.items()
            }
            for run in runs.values():
                run.steps(25)
            times = {kind: [] for kind in runs}
            for turn in range(turns):
                for kind in list(runs) if turn % 2 else list(runs)[::-1]:
                    times[kind].append(runs[kind].steps(BLOCK))
            ratios = np.divide(times["edge"], times["constant"])
            low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75])
            rows.append(
                {
                    "problem": problem,
                    "direction": direction,
                    "milliseconds": 1e3 * float(np.median(times["constant"])),
                    "overhead": float(middle) - 1,
                    "overhead_quartiles": [float(low) - 1, float(high) - 1],
                }
            )
    return rows


def main() -> None:
    """Compare, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="blocks of 50 steps (default 15)")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(arguments.turns)
    print("| problem | optimizer | ms a step | ratio to SGD | state / parameters |")
    print("|---|---|---|---|---|")
    for row in rows:
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['problem']} | {row['optimizer']} | {row['milliseconds']:.2f} "
            f"| {row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['state_over_parameters']:.2f} |"
        )
    extra = overheads(arguments.turns)
    print("\n| problem | direction | ms a constant step | its rule on top |")
    print("|---|---|---|---|")
    for row in extra:
        low, high = row["overhead_quartiles"]
        print(
            f"| {row['problem']} | {row['direction']} | {row['milliseconds']:.2f} "
            f"| {row['overhead']:+.1%} [{low:+.1%}, {high:+.1%}] |"
        )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(
            json.dumps({**about, "turns": arguments.turns, "rows": rows, "overheads": extra})
        )


if __name__ == "__main__":
    main()
