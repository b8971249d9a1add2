"""Batch rules beside fixed batches of 64 and 256: steps, samples and CPU seconds to one loss.

The target of a problem is the loss that fixed batches of 64 end with on the first seed. Every run
goes until it is there, or for twice the budget of epochs. CPU seconds are those of the process on
one thread, training alone. The data are not part of the package; of a folder with
fashion_mnist_30k.npz and cifar10_5k.npz what is missing is left out.

    python tests/benchmarks/batch_size.py --data DIR [--seeds 3] [--epochs 8] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conjopt import AdaptiveBatchSampler, ConjSGD
from conjopt.optim import BatchRule, Correlation, WorkOptimal

MEASURE_EVERY = 2  # looks at the training loss per epoch, outside of the seconds


@dataclasses.dataclass
class Problem:
    """Training data and a model."""

    name: str
    make_model: Callable[[], nn.Module]
    x: torch.Tensor
    y: torch.Tensor


def cnn(channels: int, side: int) -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 10),
    )


def problems(folder: Path, most: int | None) -> list[Problem]:
    """Digits, and those that the folder has data for."""
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels).float().reshape(-1, 1, 8, 8) / 16, torch.tensor(digits)
    found = [Problem("digits, CNN", lambda: cnn(1, 8), x, y)]
    if (path := folder / "fashion_mnist_30k.npz").exists():
        arrays = np.load(path)
        x = torch.tensor(arrays["x_train"][:10000]).float().unsqueeze(1) / 255
        y = torch.tensor(arrays["y_train"][:10000]).long()
        found.append(Problem("Fashion-MNIST 10k, CNN", lambda: cnn(1, 28), x, y))
    if (path := folder / "cifar10_5k.npz").exists():
        arrays = np.load(path)
        x = torch.tensor(arrays["x_train"]).float().permute(0, 3, 1, 2).contiguous() / 255
        y = torch.tensor(arrays["y_train"]).long()
        found.append(Problem("CIFAR-10 5k, CNN", lambda: cnn(3, 32), x, y))
    return [dataclasses.replace(p, x=p.x[:most], y=p.y[:most]) for p in found]


def loss_of(problem: Problem, model: nn.Module) -> float:
    """The training loss at one set of weights."""
    with torch.no_grad():
        losses = [
            nn.functional.cross_entropy(model(x), y, reduction="sum").item()
            for x, y in zip(problem.x.split(1000), problem.y.split(1000), strict=True)
        ]
    return sum(losses) / len(problem.x)


def train(
    problem: Problem,
    rule: BatchRule | None,
    size: int,
    seed: int,
    epochs: int,
    target: float | None,
) -> dict[str, float | bool]:
    """One run, until its training loss is at the target or its epochs are over."""
    torch.manual_seed(seed)
    model, criterion = problem.make_model(), nn.CrossEntropyLoss()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, batch_rule=rule)
    data = TensorDataset(problem.x, problem.y)
    sampler = AdaptiveBatchSampler(
        data, optimizer, size, seed=seed, min_batch_size=8, max_batch_size=1024
    )
    loader = DataLoader(data, batch_sampler=sampler)
    seconds, steps, samples, loss = 0.0, 0, 0, float("inf")
    seen, reached = 0, False
    start = time.process_time()
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            steps, samples = steps + 1, samples + len(x)
            looks = samples * MEASURE_EVERY // len(data)
            if looks > seen:
                seen, seconds = looks, seconds + time.process_time() - start
                loss = loss_of(problem, model)
                reached = target is not None and loss <= target
                start = time.process_time()
                if reached:
                    break
        if reached:
            break
    return {
        "reached": reached,
        "loss": loss,
        "steps": steps,
        "samples": samples,
        "cpu_seconds": seconds,
        "last_size": sampler.batch_size,
        "changes": len(sampler.history),
    }


def main() -> None:
    """Run everything, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3, help="seeds from 0 (default 3)")
    parser.add_argument("--epochs", type=int, default=8, help="budget of a problem (default 8)")
    parser.add_argument("--samples", type=int, help="at most so many of each data set, for a try")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    methods: list[tuple[str, BatchRule | None, int]] = [
        ("fixed 64", None, 64),
        ("fixed 256", None, 256),
        ("correlation 0.5 from 64", Correlation(0.5), 64),
        ("correlation 0.2 from 64", Correlation(0.2), 64),
        ("work from 64", WorkOptimal(), 64),
    ]
    rows = []
    print("| problem | batches | seed | reached | steps | samples | CPU s | last size | changes |")
    print("|---|---|---|---|---|---|---|---|---|")
    for problem in problems(arguments.data, arguments.samples):
        target = float(train(problem, None, 64, 0, arguments.epochs, None)["loss"])
        for seed in range(arguments.seeds):
            for name, rule, size in methods:  # in turn, so that a slow minute meets all of them
                run = train(problem, rule, size, seed, 2 * arguments.epochs, target)
                rows.append({"problem": problem.name, "batches": name, "seed": seed, **run})
                print(
                    f"| {problem.name} | {name} | {seed} | {'yes' if run['reached'] else 'no'} "
                    f"({run['loss']:.3g} for {target:.3g}) | {run['steps']} | {run['samples']} "
                    f"| {run['cpu_seconds']:.2f} | {run['last_size']} | {run['changes']} |",
                    flush=True,
                )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
