"""A history as a figure of matplotlib."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from conjopt.report.digest import CONDITION_STATES, Digest, digest
from conjopt.report.history import History
from conjopt.report.panels import Chart, Line, panels
from conjopt.report.plots import COLOURS
from conjopt.report.svg import BAD

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

LINE_STYLES = ("-", (0, (6, 2)), ":", "-.", (0, (10, 3)))
MARKERS = "osD^v<>P*X"
LARGEST = 1e140  # far beyond it the margins of matplotlib's axes overflow
MARKS = 40  # of a line, for what set each point
BAD_MARKERS = {"nan": "x", "inf": "^", "-inf": "v"}
STATE_COLOURS = {"unknown": "0.6", "holds": "#0072B2", "fails": "#D55E00"}


def plot(
    history: History | str | os.PathLike[str] | Iterable[dict[str, Any]],
    *,
    title: str | None = None,
) -> Figure:
    """Draw a history: what it holds of losses, steps and their limits, slopes, and conditions.

    Each series is thinned to 2,000 points that keep its spikes, so a million records are drawn as
    fast as they are read. What is no finite number is marked at the edge.

    Args:
        history: a `History`, with all that its file holds; the path of a history, or of a folder
            with one; or records.
        title: over the figure; None for none.

    Returns:
        a figure with no window; ``figure.savefig("run.png")`` writes it.

    Raises:
        ImportError: if matplotlib is missing; it names the extra to install.
        TypeError: if the history is of another kind, or one of the records is.
        ValueError: if the history is of another schema or version, or damaged.
        OSError: if it cannot be read.

    Example:
        >>> history = History()
        >>> for step in range(1, 100):
        ...     history.record(step=step, loss=1 / step, step_size=0.1)
        >>> [axes.get_title(loc="left") for axes in plot(history).axes]
        ['loss', 'step size']
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'plot needs matplotlib ({error}): pip install "conjopt[plot]"'
        ) from error
    found = digest(history)
    charts = [chart for panel in panels(found) for chart in panel.charts]
    columns = min(len(charts), 3) or 1
    rows = math.ceil(len(charts) / columns) or 1
    figure = Figure(figsize=(4.8 * columns, 3.3 * rows), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    if not charts:
        axis = figure.subplots()
        axis.set_axis_off()
        axis.text(0.5, 0.5, _empty(found), ha="center", va="center")
        return figure
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axis, chart in zip(grid, charts, strict=False):
        _bands(axis, chart) if chart.bands else _lines(axis, chart)
        axis.set_title(_text(chart.title), loc="left", fontsize=10)
        axis.set_xlabel(chart.x, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(which="both", labelsize=8)
    for axis in grid[len(charts) :]:
        axis.remove()
    if title is not None:
        figure.suptitle(_text(title))
    return figure


def _empty(found: Digest) -> str:
    if found.records:
        return f"The {found.records:,} records hold no numbers to draw."
    return "The history has no records yet."


def _text(text: str) -> str:
    """Names as they are, where matplotlib would read a pair of dollars as mathematics."""
    return text.replace("$", r"\$")


def _lines(axis: Axes, chart: Chart) -> None:
    if chart.log:
        axis.set_yscale("log")
    seen = set()
    for line in chart.lines:
        x, y, code = line.series.x, line.series.y, line.series.code
        if chart.log:
            x, y, code = x[y > 0], y[y > 0], code[y > 0]
            y = np.maximum(y, 1 / LARGEST)
        y = np.clip(y, -LARGEST, LARGEST)
        name = _text(line.group or line.name)
        told = "_nolegend_" if name in seen else name
        seen.add(name)
        style: dict[str, Any]
        if line.style < 0:
            limit = -1 - line.style
            style = {"color": COLOURS[limit % len(COLOURS)], "linewidth": 0.9, "alpha": 0.5}
            style |= {"linestyle": LINE_STYLES[1 + limit % 4]}
        else:
            style = {"color": COLOURS[(line.style + 1) % len(COLOURS)], "linewidth": 1.4}
            style |= {"linestyle": LINE_STYLES[line.style % len(LINE_STYLES)]}
        if line.limits:
            style |= {"color": "0.35", "linewidth": 0.9}
        gaps = line.series.gaps(x)  # matplotlib's lines end at a NaN
        axis.plot(
            np.insert(x, gaps, x[gaps]),
            np.insert(y, gaps, np.nan),
            label=told,
            **style,
        )
        alone = line.series.alone(x)
        alone = alone[:: max(1, math.ceil(alone.size / MARKS))]
        if alone.size:  # no line goes through them
            axis.plot(x[alone], y[alone], ".", color=style["color"], label="_nolegend_")
        for limit, by in enumerate(line.limits):
            mine = np.flatnonzero(code == limit)
            mine = mine[:: max(1, math.ceil(mine.size / MARKS))]
            if mine.size:
                told = f"set by {_text(by)}"
                shown = "_nolegend_" if told in seen else told
                seen.add(told)
                colour, marker = COLOURS[limit % len(COLOURS)], MARKERS[limit % len(MARKERS)]
                axis.plot(
                    x[mine],
                    y[mine],
                    linestyle="",
                    marker=marker,
                    markersize=4,
                    color=colour,
                    label=shown,
                )
    _bad(axis, chart.lines)
    if not any(line.series.y.size for line in chart.lines):
        axis.set_yticks([])  # there is no number to read off
    axis.grid(which="major", color="0.9", linewidth=0.8)
    axis.set_axisbelow(True)
    if len(axis.get_legend_handles_labels()[1]) > 1:
        axis.legend(fontsize=7, frameon=False)


def _bad(axis: Axes, lines: Iterable[Line]) -> None:
    """Marks at the edges where a value is no finite number."""
    for kind, marker in BAD_MARKERS.items():
        x = np.concatenate([line.series.bad_places(kind) for line in lines])
        if x.size:
            height = np.full(x.size, 0.02 if kind == "-inf" else 0.98)
            axis.plot(
                x,
                height,
                transform=axis.get_xaxis_transform(),
                linestyle="",
                marker=marker,
                markersize=5,
                color="black",
                label=BAD[kind],
            )


def _bands(axis: Axes, chart: Chart) -> None:
    last = max(float(line.series.x[-1]) for line in chart.lines)
    for row, line in enumerate(chart.lines):
        x, y = line.series.x, line.series.y
        starts = np.flatnonzero(np.diff(y, prepend=-1.0))
        ends = np.append(x[starts[1:]], last)
        for code, state in enumerate(CONDITION_STATES):
            mine = y[starts] == code
            width = {"unknown": 0.08, "holds": 0.35, "fails": 0.75}[state]
            bars = [(a, b - a) for a, b in zip(x[starts][mine], ends[mine], strict=True)]
            # With an edge, so that one step among many is seen.
            axis.broken_barh(
                bars,
                (row - width / 2, width),
                color=STATE_COLOURS[state],
                linewidth=1,
                label=state if row == 0 else "_nolegend_",
            )
    axis.set_yticks(range(len(chart.lines)), [_text(line.name) for line in chart.lines])
    axis.invert_yaxis()
    axis.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
