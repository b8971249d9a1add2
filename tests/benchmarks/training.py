"""Training runs on real data: ConjSGD at its defaults beside SGD and AdamW at the rates of a grid.

Every run starts from the same initialisation and sees the same batches; CPU seconds are those of
the process on one thread, training alone. The data are not part of the package; a folder with
fashion_mnist_30k.npz, uci_concrete.npz and tinyshakespeare.txt is asked for, and what it lacks is
left out.

    python tests/benchmarks/training.py --data DIR [--seeds 2] [--out FILE]
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
from step_time import Attention
from torch import nn

from conjopt import ConjSGD

RATES = {"SGD": (0.01, 0.03, 0.1, 0.3), "AdamW": (3e-4, 1e-3, 3e-3, 1e-2)}


@dataclasses.dataclass
class Problem:
    """Data, a model and a budget."""

    name: str
    make_model: Callable[[], nn.Module]
    criterion: nn.Module
    train: tuple[torch.Tensor, torch.Tensor]
    test: tuple[torch.Tensor, torch.Tensor]
    epochs: int
    batch_size: int


def fashion(folder: Path, norm: bool) -> Problem:
    """A third of a Fashion-MNIST subset and a small CNN, with or without batch norm."""
    arrays = np.load(folder / "fashion_mnist_30k.npz")
    x, xt = (torch.tensor(arrays[k]).float().unsqueeze(1) / 255 for k in ("x_train", "x_test"))
    y, yt = (torch.tensor(arrays[k]).long() for k in ("y_train", "y_test"))

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        between = [nn.BatchNorm2d(outputs)] if norm else []
        return [nn.Conv2d(inputs, outputs, 3, padding=1), *between, nn.ReLU(), nn.MaxPool2d(2)]

    def make() -> nn.Module:
        return nn.Sequential(*block(1, 16), *block(16, 32), nn.Flatten(), nn.Linear(32 * 49, 10))

    name = "Fashion-MNIST 10k, CNN" + (" with batch norm" if norm else "")
    return Problem(
        name, make, nn.CrossEntropyLoss(), (x[:10000], y[:10000]), (xt, yt), epochs=4, batch_size=64
    )


def concrete(folder: Path) -> Problem:
    """Regression of standardised targets by an MLP."""
    arrays = np.load(folder / "uci_concrete.npz")
    x, xt = (torch.tensor(arrays[k]).float() for k in ("x_train", "x_test"))
    y, yt = (torch.tensor(arrays[k]).float().reshape(-1, 1) for k in ("y_train", "y_test"))
    x, xt = ((v - x.mean(0)) / x.std(0) for v in (x, xt))
    y, yt = ((v - y.mean()) / y.std() for v in (y, yt))

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)
        )

    return Problem("Concrete, MLP", make, nn.MSELoss(), (x, y), (xt, yt), epochs=60, batch_size=64)


def characters(folder: Path) -> Problem:
    """Next characters by a small transformer."""
    text = (folder / "tinyshakespeare.txt").read_text()
    letters = sorted(set(text))
    numbers = {letter: number for number, letter in enumerate(letters)}
    tokens = torch.tensor([numbers[letter] for letter in text])
    rows = tokens[: len(tokens) // 65 * 65].reshape(-1, 65)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    train, test = rows[:8000], rows[-500:]
    return Problem(
        "Characters, transformer",
        Attention,
        nn.CrossEntropyLoss(),
        (train[:, :-1], train[:, 1:]),
        (test[:, :-1], test[:, 1:]),
        epochs=1,
        batch_size=16,
    )


def problems(folder: Path) -> list[Problem]:
    """Those that the folder has data for."""
    found = []
    if (folder / "uci_concrete.npz").exists():
        found.append(concrete(folder))
    if (folder / "fashion_mnist_30k.npz").exists():
        found += [fashion(folder, norm=False), fashion(folder, norm=True)]
    if (folder / "tinyshakespeare.txt").exists():
        found.append(characters(folder))
    return found


def optimizer(
    name: str, rate: float | None, model: nn.Module, loss: nn.Module
) -> torch.optim.Optimizer:
    """By name; ConjSGD has no rate."""
    if name == "SGD":
        return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    if name == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=rate)
    direction = "sgd" if name.endswith("sgd") else "spectral"
    return ConjSGD(model.parameters(), model=model, loss=loss, direction=direction)


def train(problem: Problem, name: str, rate: float | None, seed: int) -> dict[str, float]:
    """One run: final training and test loss, test accuracy and CPU seconds."""
    torch.manual_seed(seed)
    model = problem.make_model()
    chosen = optimizer(name, rate, model, problem.criterion)
    x, y = problem.train
    batches = torch.Generator().manual_seed(seed)
    start = time.process_time()
    for _ in range(problem.epochs):
        for batch in torch.randperm(len(x), generator=batches).split(problem.batch_size):
            chosen.zero_grad()
            problem.criterion(model(x[batch]), y[batch]).backward()
            chosen.step()
    seconds = time.process_time() - start
    model.eval()
    with torch.no_grad():
        outputs = model(problem.test[0])
        seen = model(x[:5000])
    correct = (outputs.argmax(1) == problem.test[1]).double().mean().item()
    return {
        "train_loss": problem.criterion(seen, y[:5000]).item(),
        "test_loss": problem.criterion(outputs, problem.test[1]).item(),
        "test_accuracy": float("nan") if y.is_floating_point() else correct,
        "cpu_seconds": seconds,
    }


def main() -> None:
    """Run everything, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=2, help="seeds from 0 (default 2)")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    methods: list[tuple[str, float | None]] = [("ConjSGD", None), ("ConjSGD, direction sgd", None)]
    methods += [(name, rate) for name, rates in RATES.items() for rate in rates]
    print("| problem | optimizer | rate | training loss | test loss | test accuracy | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for problem in problems(arguments.data):
        for name, rate in methods:
            runs = [train(problem, name, rate, seed) for seed in range(arguments.seeds)]
            mean = {key: float(np.mean([run[key] for run in runs])) for key in runs[0]}
            finite = {key: value if np.isfinite(value) else None for key, value in mean.items()}
            rows.append({"problem": problem.name, "optimizer": name, "rate": rate, **finite})
            accuracy = "" if np.isnan(mean["test_accuracy"]) else f"{mean['test_accuracy']:.1%}"
            print(
                f"| {problem.name} | {name} | {rate or ''} | {mean['train_loss']:.4f} "
                f"| {mean['test_loss']:.4f} | {accuracy} | {mean['cpu_seconds']:.1f} |",
                flush=True,
            )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "seeds": arguments.seeds, "rows": rows}))


if __name__ == "__main__":
    main()
