"""Plain SGD untuned: ConjSGD(direction="sgd") against SGD at the best rate of a grid, on real data.

Every run of a seed starts from the same initialisation and sees the same batches. The training
loss is taken at forty points of the run. The target of a problem and seed is the least loss that
any rate of the grid has reached at three quarters of the budget; the number told is how many steps
a run needs to it, over those of the best rate. Runs are written to a file as they end, and those
that it holds are not run again.

    python tests/benchmarks/plain_sgd.py --data DIR [--seeds 3] [--out FILE] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn import datasets
from step_time import Attention
from torch import Tensor, nn

from conjopt import ConjSGD
from conjopt.losses import EntmaxLoss, SparsemaxLoss

RATES = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
POINTS = 40
LATE = 0.75  # of the budget


@dataclasses.dataclass
class Problem:
    """Data, a model and a budget."""

    name: str
    make_model: Callable[[], nn.Module]
    criterion: nn.Module
    x: Tensor
    y: Tensor
    steps: int
    batch_size: int
    rates: tuple[float, ...] = RATES


def dense(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    """A plain network of linear layers."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(widths):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.LSTM(8, 32, batch_first=True), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[0][:, -1])


class Residual(nn.Module):
    """Residual blocks of two linear layers, without normalisation."""

    def __init__(self, inputs: int, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.blocks = nn.ModuleList(dense(width, width, width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        for block in self.blocks:
            h = h + block(h)
        return self.last(h)


def convolutions(channels: int, size: int, norm: bool = False, widths=(16, 32)) -> nn.Module:
    """Two convolutions with pooling and a linear head."""
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Conv2d(channels, width, 3, padding=1))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, size = width, size // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * size * size, 10))


def standard(values: Tensor) -> Tensor:
    """Zero mean, unit variance."""
    return (values - values.mean(0)) / values.std(0).clamp_min(1e-6)


def tabular(folder: Path, name: str, most: int) -> tuple[Tensor, Tensor]:
    """Standardised regression data."""
    arrays = np.load(folder / f"uci_{name}.npz")
    x = torch.tensor(arrays["x_train"]).float()[:most]
    y = torch.tensor(arrays["y_train"]).float().reshape(-1, 1)[:most]
    return standard(x), standard(y)


def problems(folder: Path) -> list[Problem]:
    """All of them."""
    entropy = nn.CrossEntropyLoss()
    digits = datasets.load_digits()
    x = torch.tensor(digits.data).float() / 16
    y = torch.tensor(digits.target)
    chance = torch.Generator().manual_seed(0)
    wrong = torch.rand(len(y), generator=chance) < 0.25
    noisy = torch.where(wrong, torch.randint(0, 10, y.shape, generator=chance), y)
    cancer = datasets.load_breast_cancer()
    cancer_x = standard(torch.tensor(cancer.data).float())
    cancer_y = torch.tensor(cancer.target).float().unsqueeze(1)
    diabetes = datasets.load_diabetes()
    counts_x = standard(torch.tensor(diabetes.data).float())
    counts_y = torch.tensor(diabetes.target).float().unsqueeze(1)

    def mlp() -> nn.Module:
        return dense(64, 64, 64, 10)

    found = [
        Problem("digits MLP", mlp, entropy, x, y, 1000, 32),
        Problem("digits MLP, 25 % wrong labels", mlp, entropy, x, noisy, 1000, 32),
        Problem(
            "digits MLP, smoothed labels", mlp, nn.CrossEntropyLoss(label_smoothing=0.1), x, y,
            1000, 32,
        ),
        Problem("digits MLP, batches of 4", mlp, entropy, x, y, 2000, 4),
        Problem("digits MLP, inputs times 100", mlp, entropy, 100 * x, y, 1000, 32),
        Problem(
            "digits MLP, inputs times 0.01", mlp, entropy, x / 100, y, 1000, 32,
            tuple(10 * rate for rate in RATES),
        ),
        Problem("digits MLP, sparsemax", mlp, SparsemaxLoss(), x, y, 1000, 32),
        Problem(
            "digits CNN", lambda: convolutions(1, 8), entropy, x.reshape(-1, 1, 8, 8), y, 500, 64
        ),
        Problem(
            "digits, 10 plain layers", lambda: dense(64, *[64] * 10, 10), entropy, x, y, 1000, 32
        ),
        Problem(
            "digits, 8 tanh layers", lambda: dense(64, *[64] * 8, 10, activation=nn.Tanh), entropy,
            x, y, 1000, 32,
        ),
        Problem(
            "digits, 6 residual blocks", lambda: Residual(64, 64, 6, 10), entropy, x, y, 800, 32
        ),
        Problem(
            "breast cancer, logistic", lambda: dense(30, 32, 1), nn.BCEWithLogitsLoss(),
            cancer_x, cancer_y, 600, 16,
        ),
        Problem(
            "diabetes, Poisson counts", lambda: dense(10, 32, 1), nn.PoissonNLLLoss(),
            counts_x, counts_y, 800, 16, tuple(rate / 1000 for rate in RATES),
        ),
    ]  # fmt: skip
    for name, most, steps in (
        ("concrete", 1000, 1500),
        ("airfoil", 1400, 1500),
        ("protein", 5000, 1500),
    ):
        if (folder / f"uci_{name}.npz").exists():
            tx, ty = tabular(folder, name, most)
            inputs = tx.shape[1]
            found.append(
                Problem(
                    f"{name}, tanh MLP",
                    lambda inputs=inputs: dense(inputs, 64, 64, 1, activation=nn.Tanh),
                    nn.MSELoss(), tx, ty, steps, 64,
                )
            )  # fmt: skip
    if (folder / "fashion_mnist_30k.npz").exists():
        arrays = np.load(folder / "fashion_mnist_30k.npz")
        fx = torch.tensor(arrays["x_train"][:6000]).float().unsqueeze(1) / 255
        fy = torch.tensor(arrays["y_train"][:6000]).long()
        found += [
            Problem("Fashion CNN", lambda: convolutions(1, 28), entropy, fx, fy, 400, 64),
            Problem(
                "Fashion CNN, batch norm", lambda: convolutions(1, 28, norm=True), entropy, fx, fy,
                400, 64,
            ),
        ]  # fmt: skip
    if (folder / "cifar10_5k.npz").exists():
        arrays = np.load(folder / "cifar10_5k.npz")
        cx = torch.tensor(arrays["x_train"]).float().permute(0, 3, 1, 2) / 255 - 0.5
        cy = torch.tensor(arrays["y_train"]).long()
        found.append(Problem("CIFAR CNN", lambda: convolutions(3, 32), entropy, cx, cy, 400, 64))
    if (folder / "tinyshakespeare.txt").exists():
        text = (folder / "tinyshakespeare.txt").read_text()
        numbers = {letter: number for number, letter in enumerate(sorted(set(text)))}
        tokens = torch.tensor([numbers[letter] for letter in text])
        rows = tokens[: len(tokens) // 65 * 65].reshape(-1, 65)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][:6000]
        found.append(
            Problem(
                "characters, transformer", Attention, entropy, rows[:, :-1], rows[:, 1:], 375, 16
            )
        )
    return found


def unseen(folder: Path) -> list[Problem]:
    """Problems that the rule was not looked at on before its constants were fixed."""
    entropy = nn.CrossEntropyLoss()
    digits, wine = datasets.load_digits(), datasets.load_wine()
    x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
    wine_x, wine_y = standard(torch.tensor(wine.data).float()), torch.tensor(wine.target)

    def normalised() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(),
            nn.Linear(128, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10),
        )  # fmt: skip

    found = [
        Problem("wine, MLP", lambda: dense(13, 32, 32, 3), entropy, wine_x, wine_y, 400, 16),
        Problem("digits LSTM", Recurrent, entropy, x.reshape(-1, 8, 8), y, 600, 32),
        Problem("digits, layer norm and GELU", normalised, entropy, x, y, 600, 64),
        Problem(
            "digits MLP, 1.5-entmax, batches of 128", lambda: dense(64, 64, 64, 10),
            EntmaxLoss(1.5), x, y, 500, 128,
        ),
    ]  # fmt: skip
    if (folder / "uci_airfoil.npz").exists():
        tx, ty = tabular(folder, "airfoil", 1400)
        found.append(
            Problem(
                "airfoil, ReLU MLP, batches of 8", lambda: dense(tx.shape[1], 128, 1),
                nn.MSELoss(), tx, ty, 1500, 8,
            )
        )  # fmt: skip
    return found


Make = Callable[[nn.Module, nn.Module], torch.optim.Optimizer]


def run(problem: Problem, make: Make, seed: int) -> dict:
    """The losses along one run, from the start on, and its CPU seconds."""
    torch.manual_seed(seed)
    model = problem.make_model()
    optimizer = make(model, problem.criterion)
    order = torch.Generator().manual_seed(seed)
    seen = torch.randperm(len(problem.x), generator=torch.Generator().manual_seed(1))[:1500]
    losses = [loss_of(problem, model, seen)]
    batches: list[Tensor] = []
    seconds = 0.0
    for step in range(1, problem.steps + 1):
        if not batches:
            shuffled = torch.randperm(len(problem.x), generator=order)
            batches = [b for b in shuffled.split(problem.batch_size) if len(b) > 1]
        batch = batches.pop()
        start = time.process_time()
        optimizer.zero_grad()
        problem.criterion(model(problem.x[batch]), problem.y[batch]).backward()
        optimizer.step()
        seconds += time.process_time() - start
        if step * POINTS // problem.steps > (step - 1) * POINTS // problem.steps:
            losses.append(loss_of(problem, model, seen))
            if not math.isfinite(losses[-1]):
                losses += [math.inf] * (POINTS + 1 - len(losses))
                break
    return {"losses": losses, "seconds": seconds}


@torch.no_grad()
def loss_of(problem: Problem, model: nn.Module, seen: Tensor) -> float:
    """The loss of some training samples."""
    mode = model.training
    model.eval()
    total = 0.0
    for part in seen.split(500):
        total += float(problem.criterion(model(problem.x[part]), problem.y[part])) * len(part)
    model.train(mode)
    value = total / len(seen)
    return value if math.isfinite(value) else math.inf


def conj_sgd(model: nn.Module, loss: nn.Module) -> torch.optim.Optimizer:
    """As shipped."""
    return ConjSGD(model.parameters(), model=model, loss=loss, direction="sgd")


def sgd(rate: float) -> Make:
    """torch's, with momentum."""
    return lambda model, loss: torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)


METHODS: dict[str, Make] = {"ConjSGD": conj_sgd}


def first(losses: list[float], target: float) -> float:
    """The first point that is at the target, infinite if none is."""
    return next((float(i) for i, loss in enumerate(losses) if loss <= target), math.inf)


def judge(problem: Problem, seeds: int, runs: dict, method: str) -> dict:
    """A problem's row: ratio to the best rate, and whether the run ended above its start."""
    late, name = round(LATE * POINTS), problem.name
    ratios, finals, grid, worst, above = [], [], [], 0.0, 0
    for seed in range(seeds):
        tuned = [runs[name, f"SGD {rate:g}", seed]["losses"] for rate in problem.rates]
        target = min(losses[late] for losses in tuned)
        mine = runs[name, method, seed]["losses"]
        best = min(first(losses, target) for losses in tuned)
        ratios.append(first(mine, target) / max(best, 1))
        finals.append(mine[-1])
        grid.append(min(losses[-1] for losses in tuned))
        least = min(min(mine), *(min(losses) for losses in tuned))
        worst = max(worst, (max(mine) - least) / max(mine[0] - least, 1e-12))
        above += mine[-1] > mine[0]
    return {
        "problem": name, "ratios": ratios, "finals": finals, "grid": grid, "worst": worst,
        "above": above,
    }  # fmt: skip


def main() -> None:
    """Run everything, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--seeds", type=int, default=3, help="seeds from 0 (default 3)")
    parser.add_argument("--out", type=Path, default=Path("plain_sgd.jsonl"), help="file of runs")
    parser.add_argument("--only", nargs="*", help="names of problems")
    parser.add_argument("--unseen", action="store_true", help="the problems kept for the end")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = (unseen if arguments.unseen else problems)(arguments.data)
    chosen = [p for p in chosen if not arguments.only or p.name in arguments.only]
    report(chosen, arguments.seeds, arguments.out, METHODS)


def report(chosen: list[Problem], seeds: int, out: Path, methods: dict[str, Make]) -> None:
    """Run what the file lacks, with the rates of each grid, and print a table for each method."""
    runs = {}
    if out.exists():
        for line in out.read_text().splitlines():
            row = json.loads(line)
            runs[row["problem"], row["method"], row["seed"]] = row
    for problem in chosen:
        grid = {f"SGD {rate:g}": sgd(rate) for rate in problem.rates}
        for method, make in {**grid, **methods}.items():
            for seed in range(seeds):
                key = problem.name, method, seed
                if key not in runs:
                    row = dict(zip(("problem", "method", "seed"), key, strict=True))
                    runs[key] = row | run(problem, make, seed)
                    with out.open("a") as file:
                        file.write(json.dumps(runs[key]) + "\n")
    for method in methods:
        print(f"\n{method}: steps to the late target over those of the best rate\n")
        print(
            "| problem | median ratio | each seed | final loss | best rate's | greatest / first |"
        )
        print("|---|---|---|---|---|---|")
        rows = [judge(problem, seeds, runs, method) for problem in chosen]
        for row in rows:
            each = ", ".join(f"{ratio:.2f}" for ratio in row["ratios"])
            print(
                f"| {row['problem']} | {np.median(row['ratios']):.2f} | {each} "
                f"| {np.median(row['finals']):.4g} | {np.median(row['grid']):.4g} "
                f"| {row['worst']:.3g} |"
            )
        within = sum(np.median(row["ratios"]) <= 1.1 for row in rows)
        above = sum(row["above"] for row in rows)
        print(f"\nwithin 1.1: {within} of {len(rows)}; ended above their start: {above}")


if __name__ == "__main__":
    main()
