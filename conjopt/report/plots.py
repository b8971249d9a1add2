"""Pictures of recorded runs."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_runs", "save"]

# Okabe and Ito's colours, told apart with any kind of colour vision; the darker ones first.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINE_STYLES = ("-", "--", "-.", ":")

Runs = dict[Any, list[Mapping[str, Any]]]  # the records of each seed, in order


def plot_runs(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    targets: Iterable[float] = (),
    rule_of: str = "ConjSGD",
) -> None:
    """Draw training losses against epochs and CPU seconds, and step sizes, a row per model.

    Every seed is a thin line. A thick one is the median over the seeds of loss, seconds and step
    size at each epoch that all of them recorded. The file appears whole or not at all.

    Args:
        records: dicts with ``model``, ``optimizer``, ``seed``, ``epoch``, ``cpu_seconds``,
            ``train_loss`` and ``step_size`` (None before the first step), as `conjopt demo` and
            `History.read` give them.
        path: the picture; its suffix chooses the format.
        targets: training losses to mark by horizontal lines.
        rule_of: the optimizer whose step size is drawn.

    Raises:
        ImportError: if matplotlib is missing; it names the extra to install.
        ValueError: if there is no record.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "plot.svg"
        >>> run = {"model": "mlp", "optimizer": "ConjSGD", "seed": 0}
        >>> plot_runs(
        ...     [
        ...         run | {"epoch": 0.0, "cpu_seconds": 0.0, "train_loss": 2.3, "step_size": None},
        ...         run | {"epoch": 0.5, "cpu_seconds": 0.1, "train_loss": 0.4, "step_size": 0.2},
        ...     ],
        ...     path,
        ... )
        >>> path.read_text()[:5]
        '<?xml'
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'plot_runs needs matplotlib ({error}): pip install "conjopt[plot]"'
        ) from error

    groups = _group(records)
    if not groups:
        raise ValueError("plot_runs: no records to draw; record at least one of each run")
    targets = tuple(targets)
    optimizers = list(dict.fromkeys(name for of_model in groups.values() for name in of_model))
    figure = Figure(figsize=(13.0, 3.6 * len(groups) + 0.7), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(groups), 3, squeeze=False)
    for row, (model, of_model) in zip(axes, groups.items(), strict=True):
        for optimizer, runs in of_model.items():
            index = optimizers.index(optimizer)
            style = (COLOURS[index % len(COLOURS)], LINE_STYLES[index % len(LINE_STYLES)])
            _draw(row[0], runs, "epoch", "train_loss", style)
            _draw(row[1], runs, "cpu_seconds", "train_loss", style)
            if optimizer == rule_of:
                _draw(row[2], runs, "epoch", "step_size", style)
        for axis in row[:2]:
            _dress(axis, f"{model}: training loss")
        _dress(row[2], f"{model}: step size of {rule_of}")
        row[0].set_xlabel("epochs")
        row[1].set_xlabel("CPU seconds of training")
        row[2].set_xlabel("epochs")
        for axis in row[:2]:
            for target in targets:
                axis.axhline(target, color="0.55", linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
        if rule_of not in of_model:
            row[2].text(0.5, 0.5, f"no {rule_of} run", transform=row[2].transAxes, ha="center")
    handles = [
        axes[0][0].plot([], [], color=colour, linestyle=line, linewidth=2.4)[0]
        for colour, line in (
            (COLOURS[i % len(COLOURS)], LINE_STYLES[i % len(LINE_STYLES)])
            for i in range(len(optimizers))
        )
    ]
    figure.legend(
        handles,
        optimizers,
        loc="outside upper center",
        ncols=len(optimizers),
        frameon=False,
        fontsize=11,
        handlelength=3.2,
        title="thin: each seed, thick: median over seeds",
        title_fontsize=9,
    )
    save(figure, Path(path))


def _group(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Runs]]:
    """Records by model, optimizer and seed; what was appended by another command is another run."""
    groups: dict[str, dict[str, Runs]] = {}
    for record in records:
        runs = groups.setdefault(record["model"], {}).setdefault(record["optimizer"], {})
        runs.setdefault((record.get("run"), record["seed"]), []).append(record)
    return groups


def _draw(axis: Axes, runs: Runs, x: str, y: str, style: tuple[str, str]) -> None:
    colour, line = style
    for records in runs.values():
        xs = [record[x] for record in records]
        ys = [_loggable(record[y]) for record in records]
        axis.plot(xs, ys, color=colour, linewidth=0.8, alpha=0.4, zorder=2)
    by_epoch = [{record["epoch"]: record for record in records} for records in runs.values()]
    common = [epoch for epoch in by_epoch[0] if all(epoch in other for other in by_epoch)]
    middle = [
        (
            median(records[epoch][x] for records in by_epoch),
            # A loss that is no number ranks as the largest, not wherever sorting leaves it.
            _loggable(median(_or_inf(records[epoch][y]) for records in by_epoch)),
        )
        for epoch in common
    ]
    if middle:
        axis.plot(*zip(*middle, strict=True), color=colour, linestyle=line, linewidth=2.4, zorder=3)


def _loggable(value: float | None) -> float:
    """The value, or NaN (a gap in the line) where a logarithmic axis has no place for it."""
    return value if value is not None and math.isfinite(value) and value > 0 else math.nan


def _or_inf(value: float | None) -> float:
    return math.inf if value is None or math.isnan(value) else value


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_yscale("log")
    axis.grid(which="major", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=9)


def save(figure: Any, path: Path) -> None:
    """Write a figure, whole or not at all.

    Args:
        figure: Of matplotlib.
        path: The file; its suffix chooses the format.

    Raises:
        OSError: If it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format=path.suffix[1:] or "png")
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
