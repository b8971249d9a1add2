"""Pictures of the ledgers of whole runs, for convergence.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from conjopt.bounds import ConvergenceLedger

# Okabe and Ito's colours, told apart with any kind of colour vision.
ORANGE, BLUE, GREEN, PINK = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
WINDOW = 15  # steps of the running medians


def draw(ledgers: Mapping[str, ConvergenceLedger], path: Path, title: str) -> None:
    """Draw a column for each mode: risk, steps, bound, out-of-batch changes, eigenvalues."""
    figure = Figure(figsize=(11.5, 13.0), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(5, len(ledgers), squeeze=False, sharey="row")
    for column, (mode, ledger) in zip(axes.T, ledgers.items(), strict=True):
        risk(column[0], ledger)
        step_sizes(column[1], ledger)
        gradients(column[2], ledger)
        out_of_batch(column[3], ledger)
        eigenvalues(column[4], ledger)
        column[0].set_title(mode, fontsize=13, fontweight="bold")
        column[-1].set_xlabel("recorded step", fontsize=11)
        for axis in column:
            axis.grid(color="0.9", linewidth=0.8)
            axis.set_axisbelow(True)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=10)
    names = (
        "risk of the set",
        "step sizes",
        r"$\Vert g_t\Vert^2$, means so far",
        r"out-of-batch changes",
        "structure matrices, 16 samples",
    )
    for axis, name in zip(axes[:, 0], names, strict=True):
        axis.set_ylabel(name, fontsize=11)
    if min(ledger.steps[-1].risk_after for ledger in ledgers.values()) < 0.05:
        axes[0, 0].set_yscale("symlog", linthresh=1e-2)
        axes[0, 0].set_ylim(bottom=-1e-3)
    for row in axes:
        row[-1].legend(fontsize=9.5, framealpha=0.85, loc="best")
    figure.suptitle(f"Thm 3.1 along whole runs: {title}", fontsize=14)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    image.quantize(64).save(path, optimize=True)  # a third of the size


def running_median(values: np.ndarray) -> np.ndarray:
    """Medians over `WINDOW` steps, of what there is at the ends."""
    half = WINDOW // 2
    return np.array(
        [np.nanmedian(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]
    )


def column_of(ledger: ConvergenceLedger, name: str) -> np.ndarray:
    """An attribute of all records."""
    return ledger.vector(name).numpy()


def risk(axis: Axes, ledger: ConvergenceLedger) -> None:
    """The risk before each step, and the floor."""
    axis.plot(column_of(ledger, "risk"), color=BLUE, linewidth=1.8, label="$R$")
    axis.axhline(ledger.floor, color="0.35", linestyle="--", linewidth=1.3, label="floor $R_*$")


def step_sizes(axis: Axes, ledger: ConvergenceLedger) -> None:
    """`a_t` with the best and the greatest one that (C1) allows."""
    a, edge = column_of(ledger, "step_size"), column_of(ledger, "edge")
    limit = np.where(edge > 0, a / np.where(edge > 0, edge, 1), np.nan)  # 2 / L_t
    axis.fill_between(
        range(len(a)), limit / 2, limit, color=GREEN, alpha=0.25, linewidth=0,
        label="$1/L_t$ to $2/L_t$",
    )  # fmt: skip
    axis.plot(
        running_median(limit), color=GREEN, linewidth=1.4, linestyle="--", label="$2/L_t$, median"
    )
    axis.plot(np.where(a > 0, a, np.nan), color=ORANGE, linewidth=1.3, label="$a_t$")
    axis.set_yscale("log")
    shown = np.concatenate([a[a > 0], limit[np.isfinite(limit)]])
    if len(shown):
        axis.set_ylim(*np.quantile(shown, (0.002, 0.998)) * (0.5, 2))


def gradients(axis: Axes, ledger: ConvergenceLedger) -> None:
    """The weighted mean of the squares so far, and its bound so far while (C1) held."""
    squares = column_of(ledger, "gradient_square")
    left, slope = column_of(ledger, "left"), column_of(ledger, "slope")
    noise, first = column_of(ledger, "out_of_batch"), ledger.steps[0].risk
    axis.plot(squares, color="0.75", linewidth=0.8, label="each")
    good = left > 0
    # The steps beyond (C1) gained nothing: what they lost is added to the right side.
    weight = np.cumsum(np.where(good, left / np.where(slope > 0, slope, np.inf), 0.0))
    lost = np.cumsum(np.where(good, 0.0, -left))
    mass = np.where(weight > 0, weight, math.nan)
    axis.plot(
        np.cumsum(np.where(good, left, 0)) / mass, color=BLUE, linewidth=1.8, label="weighted mean"
    )
    bound = (first - ledger.floor + np.cumsum(noise) + lost) / mass
    style = "-" if good.all() else "--"
    axis.plot(bound, color=ORANGE, linewidth=1.8, linestyle=style, label="its bound")
    axis.set_yscale("log")


def out_of_batch(axis: Axes, ledger: ConvergenceLedger) -> None:
    """`M_t`, and how much all of them have added up to."""
    change = column_of(ledger, "out_change")
    axis.plot(change, color="0.75", linewidth=0.8, label="$M_t$")
    axis.plot(running_median(change), color=PINK, linewidth=1.6, label="$M_t$, median")
    noise = np.cumsum(column_of(ledger, "out_of_batch")) / np.arange(1, len(change) + 1)
    axis.plot(noise, color=BLUE, linewidth=1.6, label=r"mean of $\frac{n-m}{n}M_t$ so far")
    axis.set_yscale("symlog", linthresh=1e-3)


def eigenvalues(axis: Axes, ledger: ConvergenceLedger) -> None:
    """The extremes at the probes."""
    number, low, high = zip(*ledger.probes, strict=True)
    axis.plot(number, high, color=ORANGE, marker="v", markersize=4, linewidth=1.4, label="hi")
    axis.plot(number, low, color=BLUE, marker="^", markersize=4, linewidth=1.4, label="lo")
    axis.set_yscale("log")
