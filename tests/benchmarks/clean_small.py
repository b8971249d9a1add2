"""Where each regularizer gains and loses against tuned weight decay, on few clean samples.

Every method has four values of its setting; each seed takes that of least validation loss. With
"+ decay" the term's weight is chosen, beside a weight decay of 0.5. The seeds are paired: split,
initialisation and batches are the same for all methods. An MLP with layers of 128 and 64, AdamW at
2e-3 with a cosine schedule, 500 steps of at most 64 samples. Fashion-MNIST (14 x 14) and CIFAR-10
(16 x 16) are in the table if a folder with fashion_mnist_30k.npz and cifar10_5k.npz is given.

    python tests/benchmarks/clean_small.py [--data DIR] [--seeds 5] [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

DECAYS = (0.15, 0.5, 1.5, 5.0)
TERMS = {
    "ConditionalEntropy": (ConditionalEntropy, (0.1, 0.3, 1.0, 3.0)),
    "OutputCodingRate": (OutputCodingRate, (0.01, 0.03, 0.1, 0.3)),
    "WithinClassScatter": (WithinClassScatter, (0.003, 0.01, 0.03, 0.1)),
    "AttainableLoss": (AttainableLoss, (0.001, 0.003, 0.01, 0.03)),
    "PredictiveEntropy, maximize": (
        lambda weight: PredictiveEntropy(weight, maximize=True),
        (0.03, 0.1, 0.3, 1.0),
    ),
}
BATCH = 64


@dataclasses.dataclass
class Problem:
    """All samples, and how many of them train and validate; the others test."""

    name: str
    x: Tensor
    y: Tensor
    train: int
    valid: int


def problems(folder: Path | None) -> list[Problem]:
    """The data sets; those of a folder if there is one."""
    found = []
    for name, load, train, valid in (
        ("digits, 100", load_digits, 100, 400),
        ("digits, 300", load_digits, 300, 400),
        ("breast cancer, 100", load_breast_cancer, 100, 100),
        ("wine, 50", load_wine, 50, 40),
    ):
        x, y = load(return_X_y=True)
        found.append(Problem(name, torch.tensor(x).float(), torch.tensor(y), train, valid))
    for file, name, train, count in (
        ("fashion_mnist_30k.npz", "Fashion-MNIST, 1000", 1000, 6000),
        ("cifar10_5k.npz", "CIFAR-10, 2000", 2000, None),
    ):
        if folder and (folder / file).exists():
            arrays = np.load(folder / file)
            x = torch.tensor(np.concatenate([arrays["x_train"], arrays["x_test"]])[:count]).float()
            y = torch.tensor(np.concatenate([arrays["y_train"], arrays["y_test"]])[:count]).long()
            if x.ndim == 3:
                x = x.unsqueeze(1)
            elif x.shape[-1] == 3:
                x = x.permute(0, 3, 1, 2)
            x = F.avg_pool2d(x, 2).flatten(1)
            found.append(Problem(name, x, y, train, 500))
    return found


def run(
    problem: Problem, term: nn.Module | None, decay: float, seed: int, steps: int
) -> dict[str, float]:
    """Train one network; its validation loss, and accuracy and loss of the test."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(problem.y), generator=generator)
    n = problem.train
    x, y = problem.x[order], problem.y[order]
    # Tables have columns of different units, pictures one unit for all pixels.
    scale = x[:n].std(0) if x.shape[1] < 40 else x[:n].std()
    x = (x - x[:n].mean(0)) / scale
    torch.manual_seed(seed)
    classes = int(problem.y.max()) + 1
    model = nn.Sequential(
        nn.Sequential(nn.Linear(x.shape[1], 128), nn.ReLU()),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU()),
        nn.Linear(64, classes),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=decay, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    size = min(BATCH, n)
    batches: list[Tensor] = []
    for _ in range(steps):
        if not batches:
            batches = list(torch.randperm(n, generator=generator).split(size)[: n // size])
        batch = batches.pop()
        outputs = model(x[batch])
        loss = F.cross_entropy(outputs, y[batch])
        if term is not None:
            loss = loss + term(outputs, y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        _, valid, test = model(x).split([n, problem.valid, len(y) - n - problem.valid])
    _, of_valid, of_test = y.split([len(part) for part in (x[:n], valid, test)])
    return {
        "valid": float(F.cross_entropy(valid, of_valid)),
        "accuracy": 100 * float((test.argmax(1) == of_test).float().mean()),
        "loss": float(F.cross_entropy(test, of_test)),
    }


def best(runs: list[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """The measures at the value of least validation loss, and the value."""
    value, measured = min(runs, key=lambda pair: pair[1]["valid"])
    return measured | {"value": value}


def compare(problem: Problem, seeds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    """All methods on one data set: for each seed the measures at its chosen value."""
    chosen: dict[str, list[dict[str, float]]] = {"nothing": [], "weight decay": []}
    for seed in range(seeds):
        chosen["nothing"].append(best([(0.0, run(problem, None, 0.0, seed, steps))]))
        decays = [(decay, run(problem, None, decay, seed, steps)) for decay in DECAYS]
        chosen["weight decay"].append(best(decays))
        for name, (make, values) in TERMS.items():
            for label, decay in ((name, 0.0), (f"{name} + decay", 0.5)):
                runs = [(v, run(problem, make(v), decay, seed, steps)) for v in values]
                chosen.setdefault(label, []).append(best(runs))
    return chosen


def against_decay(rows: list[dict[str, float]], decay: list[dict[str, float]]) -> str:
    """A cell of the table: paired differences of accuracy, in points, and of the loss, in %."""
    points = np.array([a["accuracy"] - b["accuracy"] for a, b in zip(rows, decay, strict=True)])
    percent = np.array(
        [100 * (a["loss"] / b["loss"] - 1) for a, b in zip(rows, decay, strict=True)]
    )
    cell = []
    for values, better, digits in ((points, 1, 1), (percent, -1, 0)):
        mean, error = values.mean(), values.std(ddof=1) / len(values) ** 0.5
        mark = "" if abs(mean) <= 2 * error else ("▲" if mean * better > 0 else "▼")
        cell.append(f"{mean:+.{digits}f} ± {error:.{digits}f}{mark}")
    return " / ".join(cell)


def main() -> None:
    """Compare, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="a folder with Fashion-MNIST and CIFAR-10")
    parser.add_argument("--only", default="", help="data sets whose names have this in them")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, help="a JSON file for all measures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        "Against tuned weight decay: accuracy in points / loss in %, mean ± standard error of the"
    )
    print("paired differences; ▲ better and ▼ worse by more than two standard errors.\n")
    table = {}
    for problem in problems(arguments.data):
        if arguments.only not in problem.name:
            continue
        chosen = compare(problem, arguments.seeds, arguments.steps)
        table[problem.name] = chosen
        print(f"| {problem.name} | accuracy | loss | against tuned weight decay | chosen |")
        print("|---|---|---|---|---|")
        for name, rows in chosen.items():
            accuracy, loss = (np.mean([row[key] for row in rows]) for key in ("accuracy", "loss"))
            cell = "" if name == "weight decay" else against_decay(rows, chosen["weight decay"])
            values = ", ".join(f"{row['value']:g}" for row in rows)
            print(f"| {name} | {accuracy:.1f} | {loss:.3f} | {cell} | {values} |", flush=True)
        print()
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": table}))


if __name__ == "__main__":
    main()
