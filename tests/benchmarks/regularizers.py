"""What the regularizers add to a step, as share of forward and backward at batch 128.

A CNN of CIFAR's size and an MLP, for 10, 100 and 1000 classes. The plain step and all terms take
turns in one process; a share is the time of the term, forward and backward to the outputs, over
that of the plain step of the same turn. Medians over the turns with quartiles. Seconds are those of
the process's CPU on one thread, and freed memory stays with the process.

    python tests/benchmarks/regularizers.py [--turns 21] [--batch 128] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from loss_time import keep_freed_memory
from torch import Tensor, nn

from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

TERMS = [
    ConditionalEntropy(),
    OutputCodingRate(),
    WithinClassScatter(),
    AttainableLoss(),
    PredictiveEntropy(),
]


def network(name: str, classes: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network and the shape of its inputs."""
    if name == "MLP":
        return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, classes)), (784,)
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * 16, classes)), (3, 32, 32)


def step_seconds(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """CPU seconds of forward and backward with the loss alone."""
    model.zero_grad()
    start = time.process_time()
    nn.functional.cross_entropy(model(x), y).backward()
    return time.process_time() - start


def term_seconds(term: nn.Module, outputs: Tensor, y: Tensor) -> float:
    """CPU seconds of a term and its gradient in the outputs."""
    outputs.grad = None
    start = time.process_time()
    term(outputs, y).backward()
    return time.process_time() - start


def compare(name: str, classes: int, batch: int, turns: int) -> list[dict[str, object]]:
    """All terms on one network; a row for each."""
    torch.manual_seed(0)
    model, shape = network(name, classes)
    x, y = torch.randn(batch, *shape), torch.randint(classes, (batch,))
    outputs = model(x).detach().requires_grad_()
    times = np.array(
        [
            [step_seconds(model, x, y), *(term_seconds(term, outputs, y) for term in TERMS)]
            for _ in range(turns + 2)
        ][2:]
    )
    rows = []
    for term, of_term in zip(TERMS, times[:, 1:].T, strict=True):
        low, middle, high = np.quantile(100 * of_term / times[:, 0], [0.25, 0.5, 0.75])
        rows.append(
            {
                "network": name,
                "classes": classes,
                "term": type(term).__name__,
                "step_milliseconds": 1e3 * float(np.median(times[:, 0])),
                "milliseconds": 1e3 * float(np.median(of_term)),
                "percent": float(middle),
                "percent_quartiles": [float(low), float(high)],
            }
        )
    return rows


def main() -> None:
    """Compare, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table = []
    print("| network | classes | term | ms | % of a step |")
    print("|---|---|---|---|---|")
    for name in ("CNN", "MLP"):
        for classes in (10, 100, 1000):
            for row in compare(name, classes, arguments.batch, arguments.turns):
                low, high = row["percent_quartiles"]
                print(
                    f"| {name}, {row['step_milliseconds']:.1f} ms | {classes} | {row['term']} "
                    f"| {row['milliseconds']:.2f} | {row['percent']:.2f} [{low:.2f}, {high:.2f}] |",
                    flush=True,
                )
                table.append(row)
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": table}))


if __name__ == "__main__":
    main()
