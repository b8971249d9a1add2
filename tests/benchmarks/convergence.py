"""Thm 3.1 along whole runs: both sides, the bound, the conditions, and what the ledger costs.

A small network on each of scikit-learn's digits and subsets of Fashion-MNIST and CIFAR-10 is
trained in three ways: ConjSGD at its defaults, with direction="sgd" at its defaults, and in theorem
mode (direction="sgd", momentum=0, step_rule="smoothness"). A ledger with the whole training set
records the steps. Tables are printed, a picture of each data set goes to --out. With --cost,
seconds per step with a ledger or `status()` are compared with those without. The data are not part
of the package; of a folder with fashion_mnist_30k.npz and cifar10_5k.npz what is missing is left
out.

    python tests/benchmarks/convergence.py --data DIR --out DIR [--every 1] [--cost] [--no-runs]
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convergence_plots import draw
from sklearn.datasets import load_digits
from torch import nn

from conjopt import ConjSGD
from conjopt.bounds import ConvergenceLedger, LedgerStep

BATCH = 64
PROBE_EVERY = 20  # recorded steps
CHUNK = 256  # samples at once; the CPU's float64 convolutions are fastest on few
MODES: dict[str, dict[str, Any]] = {
    "default (spectral)": {},
    'direction="sgd"': {"direction": "sgd"},
    "theorem mode": {"direction": "sgd", "momentum": 0.0, "step_rule": "smoothness"},
}


@dataclasses.dataclass
class Problem:
    """Training data and a model; `short` is part of the picture's name."""

    name: str
    short: str
    make_model: Callable[[], nn.Module]
    x: torch.Tensor
    y: torch.Tensor
    epochs: int


def cnn(channels: int, side: int) -> nn.Module:
    """Patches, another convolution and a linear layer: cheap in float64, too."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 8, 4, stride=4), nn.ReLU()),
        *(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU()),
        nn.Flatten(),
        nn.Linear(16 * (side // 4) ** 2, 10),
    )


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        *(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()), nn.Linear(64, 10)
    )


def problems(folder: Path) -> list[Problem]:
    """Digits, and those that the folder has data for."""
    pixels, digits = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels).float() / 16, torch.tensor(digits)
    found = [Problem("digits, MLP", "digits", mlp, x, y, epochs=20)]
    if (path := folder / "fashion_mnist_30k.npz").exists():
        arrays = np.load(path)
        x = torch.tensor(arrays["x_train"][:2000]).float().unsqueeze(1) / 255
        y = torch.tensor(arrays["y_train"][:2000]).long()
        found.append(Problem("Fashion-MNIST 2k, CNN", "fashion", lambda: cnn(1, 28), x, y, 16))
    if (path := folder / "cifar10_5k.npz").exists():
        arrays = np.load(path)
        x = torch.tensor(arrays["x_train"][:2000]).float().permute(0, 3, 1, 2).contiguous() / 255
        y = torch.tensor(arrays["y_train"][:2000]).long()
        found.append(Problem("CIFAR-10 2k, CNN", "cifar10", lambda: cnn(3, 32), x, y, 8))
    return found


def train(problem: Problem, options: dict[str, Any], every: int) -> ConvergenceLedger:
    """One run of full batches; its ledger."""
    torch.manual_seed(0)
    model, criterion = problem.make_model(), nn.CrossEntropyLoss()
    ledger = ConvergenceLedger(
        model, criterion, problem.x, problem.y, whole=True, floor=0.0, chunk=CHUNK
    )
    optimizer = ConjSGD(
        model.parameters(),
        model=model,
        loss=criterion,
        ledger=ledger,
        ledger_every=every,
        **options,
    )
    batches = torch.Generator().manual_seed(0)
    taken = 0
    for _ in range(problem.epochs):
        order = torch.randperm(len(problem.x), generator=batches)
        for batch in order[: len(order) // BATCH * BATCH].split(BATCH):
            if taken % (every * PROBE_EVERY) == 0:
                ledger.probe_eigenvalues(16)
            optimizer.zero_grad()
            criterion(model(problem.x[batch]), problem.y[batch]).backward()
            optimizer.step()
            taken += 1
    ledger.probe_eigenvalues(16)
    return ledger


def within(step: LedgerStep) -> bool:
    """Whether (C1) holds at a step, beyond rounding."""
    return step.descent > 0 and step.edge + step.edge_error < 1


def worst_case(steps: list[LedgerStep], floor: float) -> float:
    """The bound from the least `a` and the greatest `a L_t` and `M_t` of all, as one had to assume.

    `[(R_0 - R_*) / T + (1 - m/n) M] / ((m/n) a (1 - a L / 2))`, at least the mean of `||g_t||^2`,
    also for other directions: the ledger's `a` is the one with `<g_t, u_t> = ||g_t||^2`.
    """
    if not all(map(within, steps)):
        return math.inf
    a, edge = min(step.step_size for step in steps), max(max(step.edge for step in steps), 0.0)
    most, share = max(0.0, *(step.out_change for step in steps)), steps[0].share
    decrease = (steps[0].risk - floor) / len(steps)
    return (decrease + (1 - share) * most) / (share * a * (1 - edge))


def over_good_steps(ledger: ConvergenceLedger) -> float:
    """The bound on the weighted mean of `||g_t||^2` over the steps within (C1), over that mean.

    By the identity it is `[R_0 - R_* + sum ((n-m)/n) M_t + what the other steps lost] / sum w`,
    sums over all steps but for the last, which is over those within (C1).
    """
    gained = math.fsum(max(step.left, 0.0) for step in ledger.steps)
    lost = math.fsum(max(-step.left, 0.0) for step in ledger.steps)
    noise = math.fsum(step.out_of_batch for step in ledger.steps)
    return (ledger.steps[0].risk - ledger.floor + noise + lost) / gained


def report(name: str, mode: str, ledger: ConvergenceLedger) -> list[str]:
    """A row on the bound, and lines on the conditions."""
    steps = [step for step in ledger.steps if not step.rests]
    bound, left, right = ledger.bound(), ledger.left(), ledger.right()
    squares = [step.gradient_square for step in steps]
    mean = math.fsum(squares) / len(squares)
    uphill = sum(not step.descent > 0 for step in steps)
    inside = sum(map(within, steps))
    letter = sum(step.descent > 0 and step.edge <= 0.25 for step in steps)
    print(
        f"| {name} | {mode} | {len(steps)} | {steps[0].risk:.3f} -> {steps[-1].risk_after:.3g} "
        f"| {left:.9g} | {right:.9g} | {abs(left - right):.1e} | {mean:.3g} "
        f"| {over_good_steps(ledger):.3g} | {times(bound.mean_bound, mean)} "
        f"| {times(worst_case(steps, ledger.floor), mean)} | {inside / len(steps):.1%} "
        f"| {uphill / len(steps):.1%} | {letter / len(steps):.1%} |",
        flush=True,
    )
    start = math.fsum(squares[:10]) / len(squares[:10])
    lines = [str(condition) for condition in ledger.conditions(energy_target=start / 10)]
    promise = ledger.promise(len(steps))
    lines.append(
        f"promise of as many steps more: {promise.bound:.3g} (L {promise.curvature:.3g}, "
        f"M {promise.out_change:.3g}); mean of the last tenth {last_tenth(squares):.3g}"
    )
    negative = sum(step.curvature < 0 for step in steps)
    helped = sum(step.out_change < 0 for step in steps)
    lines.append(
        f"L_t below 0 at {negative / len(steps):.1%}, M_t below 0 at {helped / len(steps):.1%} of "
        f"the steps; sum of (n-m)/n M_t is {math.fsum(s.out_of_batch for s in steps):.4g}"
    )
    return [f"{name}, {mode}: {line}" for line in lines]


def last_tenth(values: list[float]) -> float:
    """Their mean."""
    last = values[-max(1, len(values) // 10) :]
    return math.fsum(last) / len(last)


def times(bound: float, value: float) -> str:
    """How many times the value the bound is."""
    return f"{bound / value:.3g}" if math.isfinite(bound / value) else "none"


def turns(problem: Problem, name: str) -> Iterator[float]:
    """Seconds per step of each of 25 steps, after as many for warming up."""
    torch.manual_seed(0)
    model, criterion = problem.make_model(), nn.CrossEntropyLoss()
    kind, _, often = name.partition(" every ")
    every = int(often or 1)
    ledger = None
    if kind == "ledger":
        ledger = ConvergenceLedger(model, criterion, problem.x, problem.y, whole=True, chunk=CHUNK)
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, ledger=ledger, ledger_every=every
    )
    batches = torch.Generator().manual_seed(0)
    while True:
        chosen = [torch.randperm(len(problem.x), generator=batches)[:BATCH] for _ in range(25)]
        start = time.process_time()
        for number, batch in enumerate(chosen):
            optimizer.zero_grad()
            criterion(model(problem.x[batch]), problem.y[batch]).backward()
            optimizer.step()
            if kind == "status()" and number % every == 0:
                optimizer.status()
        yield (time.process_time() - start) / 25


def cost(problem: Problem, count: int) -> None:
    """Print what ledger and status add to a step, in turns."""
    names = (
        "neither",
        "ledger every 25",
        "ledger every 1",
        "status() every 25",
        "status() every 1",
    )
    ways = {name: turns(problem, name) for name in names}
    for way in ways.values():
        next(way)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(count):
        for name, way in ways.items():
            seconds[name].append(next(way))
    for name in names:
        ratios = [s / plain for s, plain in zip(seconds[name], seconds["neither"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        print(
            f"| {problem.name}, n = {len(problem.x)} | {name} "
            f"| {statistics.median(seconds[name]) * 1e3:.2f} "
            f"| {middle:.2f} [{low:.2f}, {high:.2f}] |",
            flush=True,
        )


def main() -> None:
    """Run everything, print tables, draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the data sets")
    parser.add_argument("--out", type=Path, help="folder for the pictures; none are drawn without")
    parser.add_argument("--every", type=int, default=1, help="steps between records (default 1)")
    parser.add_argument("--only", default="", help="part of the names of the data sets to run")
    parser.add_argument("--no-runs", action="store_true", help="the cost alone")
    parser.add_argument("--cost", action="store_true", help="measure the cost, too")
    parser.add_argument("--turns", type=int, default=9, help="of the cost, 25 steps (default 9)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [p for p in problems(arguments.data) if arguments.only in p.name]
    if not arguments.no_runs:
        lines: list[str] = []
        print(
            "| problem | mode | records | risk | left | right | difference | mean g^2 "
            "| weighted bound / mean | bound / mean | worst case / mean | within C1 | uphill "
            "| a L_t <= 1/2 |"
        )
        print("|" + "---|" * 14)
        for problem in chosen:
            ledgers = {}
            for mode, options in MODES.items():
                ledgers[mode] = train(problem, options, arguments.every)
                lines += report(problem.name, mode, ledgers[mode])
            if arguments.out:
                draw(ledgers, arguments.out / f"convergence_{problem.short}.png", problem.name)
        print("\n" + "\n".join(lines))
    if arguments.cost:
        print("\n| problem | with | ms a step | ratio |\n|---|---|---|---|")
        for problem in chosen[:2]:
            cost(problem, arguments.turns)


if __name__ == "__main__":
    main()
