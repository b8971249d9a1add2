"""Batch rules beside fixed batches of 64 and 256: steps, samples and CPU seconds to one loss.

Every run goes through all its epochs, and its training loss is looked at four times an epoch, on at
most 2500 samples. The target of a problem is the greatest of the methods' final losses (medians
over the seeds): the lowest loss that every method is known to reach within the budget. CPU seconds
are those of the process on one thread, training alone. The data are not part of the package; of a
folder with fashion_mnist_30k.npz and cifar10_5k.npz what is missing is left out.

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

LOOKS = 4  # at the training loss per epoch, outside of the seconds
LOOKED_AT = 2500  # samples


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


@dataclasses.dataclass
class Look:
    """A run at one moment."""

    steps: int
    samples: int
    cpu_seconds: float
    loss: float


@dataclasses.dataclass
class Run:
    """The looks at one run, its last batch size, and how often that changed."""

    looks: list[Look]
    last_size: int
    changes: int

    def first_at(self, target: float) -> Look | None:
        """The first look at a loss no greater than the target; None if there is none."""
        return next((look for look in self.looks if look.loss <= target), None)


def loss_of(problem: Problem, model: nn.Module) -> float:
    """The training loss at one set of weights."""
    with torch.no_grad():
        return nn.functional.cross_entropy(
            model(problem.x[:LOOKED_AT]), problem.y[:LOOKED_AT]
        ).item()


def train(problem: Problem, rule: BatchRule | None, size: int, seed: int, epochs: int) -> Run:
    """One run."""
    torch.manual_seed(seed)
    model, criterion = problem.make_model(), nn.CrossEntropyLoss()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, batch_rule=rule)
    data = TensorDataset(problem.x, problem.y)
    sampler = AdaptiveBatchSampler(
        data, optimizer, size, seed=seed, min_batch_size=8, max_batch_size=1024
    )
    loader = DataLoader(data, batch_sampler=sampler)
    looks: list[Look] = []
    seconds, steps, samples = 0.0, 0, 0
    start = time.process_time()
    for epoch in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            criterion(model(x), y).backward()
            optimizer.step()
            steps, samples = steps + 1, samples + len(x)
            at_end = samples == (epoch + 1) * len(data)
            if samples * LOOKS // len(data) > (samples - len(x)) * LOOKS // len(data) or at_end:
                seconds += time.process_time() - start
                looks.append(Look(steps, samples, seconds, loss_of(problem, model)))
                start = time.process_time()
    return Run(looks, sampler.batch_size, len(sampler.history))


def listed(values: object) -> str:
    """Numbers with commas between them."""
    return ", ".join(f"{value:.3g}" for value in values)  # type: ignore[attr-defined]


def summary(runs: dict[str, list[Run]], target: float) -> dict[str, dict[str, object]]:
    """For each method, medians over the seeds of what the target took; infinite if not reached."""
    rows: dict[str, dict[str, object]] = {}
    for name, of_seeds in runs.items():
        found = [run.first_at(target) for run in of_seeds]
        never = Look(10**9, 10**9, float("inf"), float("inf"))
        there = [look or never for look in found]
        rows[name] = {
            "reached": sum(look is not None for look in found),
            "final_losses": [run.looks[-1].loss for run in of_seeds],
            **{
                key: float(np.median([getattr(look, key) for look in there]))
                for key in ("steps", "samples", "cpu_seconds")
            },
            "seconds_of_seeds": [look.cpu_seconds for look in there],
            "all_seconds": [run.looks[-1].cpu_seconds for run in of_seeds],
            "last_sizes": [run.last_size for run in of_seeds],
            "changes": [run.changes for run in of_seeds],
        }
    return rows


def main() -> None:
    """Run everything, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3, help="seeds from 0 (default 3)")
    parser.add_argument("--epochs", type=int, default=8, help="budget of a problem (default 8)")
    parser.add_argument("--samples", type=int, help="at most so many of each data set, for a try")
    parser.add_argument("--only", default="", help="part of the names of the data sets to run")
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
    print(
        "| problem, target | batches | reached | steps | samples | CPU s [each seed] "
        "| final losses | last sizes | changes |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    chosen = [p for p in problems(arguments.data, arguments.samples) if arguments.only in p.name]
    train(chosen[0], None, 64, 0, 1)  # the first steps of a process are slow
    for problem in chosen:
        runs: dict[str, list[Run]] = {name: [] for name, _, _ in methods}
        for seed in range(arguments.seeds):
            for name, rule, size in methods:  # in turn, so that a slow minute meets all of them
                runs[name].append(train(problem, rule, size, seed, arguments.epochs))
        target = max(float(np.median([r.looks[-1].loss for r in of])) for of in runs.values())
        for name, row in summary(runs, target).items():
            curves = [[dataclasses.astuple(look) for look in run.looks] for run in runs[name]]
            rows.append(
                {"problem": problem.name, "target": target, "batches": name, **row, "looks": curves}
            )
            print(
                f"| {problem.name}, {target:.3g} | {name} | {row['reached']} of {arguments.seeds} "
                f"| {row['steps']:.0f} | {row['samples']:.0f} | {row['cpu_seconds']:.2f} "
                f"[{listed(row['seconds_of_seeds'])}] | {listed(row['final_losses'])} "
                f"| {listed(row['last_sizes'])} | {listed(row['changes'])} |",
                flush=True,
            )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
