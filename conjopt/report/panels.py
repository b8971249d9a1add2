"""What a report shows: panels of charts, and which quantities of a history go into each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from conjopt.report.digest import Digest, Run
from conjopt.report.series import Series

__all__ = ["Chart", "Line", "Panel", "label", "panels"]

WIDE = 300  # ratio of numbers from which on a logarithmic axis is better
OTHERS = 12  # charts of quantities that no panel knows

LABELS = {
    "loss": "loss of the batch",
    "train_loss": "training loss",
    "test_loss": "test loss",
    "excess_loss": "running mean over the floor",
    "data_floor": "data floor",
    "step_size": "step size",
    "slope": "slope, held out",
    "raw_slope": "slope of the batch",
    "curvature": "curvature along the step",
    "top_curvature": "greatest curvature",
    "correlation": "gradient correlation",
    "batch_size": "batch size",
    "recommended_batch_size": "recommended",
    "noise_scale": "noise scale",
    "lower": "lower bound",
    "upper": "upper bound",
    "gradient_energy": "gradient energy",
    "skipped_steps": "skipped steps",
    "cpu_seconds": "CPU seconds",
    "test_accuracy": "test accuracy",
    "output_change": "output change per unit of step",
    "lr": "lr",
}


def label(key: str) -> str:
    """A quantity in words.

    Example:
        >>> label("data_floor"), label("limits/Polyak cap"), label("my_metric")
        ('data floor', 'Polyak cap', 'my metric')
    """
    for prefix in ("limits/", "conditions/"):
        if key.startswith(prefix):
            return key[len(prefix) :]
    return LABELS.get(key, key.replace("_", " "))


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a chart.

    Attributes:
        name: in the legend.
        series: what is drawn.
        style: a number, the same for what is to look alike; -1 for a faint reference.
        limits: names of what set each point, by code; empty for none.
        group: in the legend, for lines that share a style; "" for the name.
    """

    name: str
    series: Series
    style: int
    limits: tuple[str, ...] = ()
    group: str = ""


@dataclasses.dataclass(frozen=True)
class Chart:
    """Lines over one pair of axes, or the bands of conditions.

    Attributes:
        title: what the y axis is of.
        lines: drawn in order.
        log: whether the y axis is logarithmic.
        x: what the x axis is of.
        bands: whether the lines are states to be drawn as bands, a row each.
        notes: sentences on what could not be drawn.
    """

    title: str
    lines: tuple[Line, ...]
    log: bool
    x: str
    bands: bool = False
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Panel:
    """A part of the report.

    Attributes:
        name: short, for anchors.
        title: its heading.
        text: what it shows, and which statement that is from.
        charts: at least one.
    """

    name: str
    title: str
    text: str
    charts: tuple[Chart, ...]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which quantities go into a chart; with several runs each gets a chart of its own."""

    title: str
    keys: tuple[str, ...]
    log: bool | None = True  # None for what the numbers ask for
    alone: tuple[str, ...] = ()  # of these there has to be one


# Name, title, sentences for the quantities that are there ("" for any), charts.
PLANS: tuple[tuple[str, str, dict[str, str], tuple[_Plan, ...]], ...] = (
    (
        "loss",
        "Loss and data floor",
        {
            "": "How far the training has come, in the units of the criterion.",
            "data_floor": "The data do not let the loss fall below the floor (Thm 1.3).",
            "excess_loss": "The running mean is per sample and counted from the floor: it is what "
            "the step size goes by.",
        },
        (
            _Plan(
                "loss",
                ("loss", "train_loss", "test_loss", "excess_loss", "data_floor"),
                alone=("loss", "train_loss", "test_loss", "excess_loss"),
            ),
        ),
    ),
    (
        "step",
        "Step size and what limits it",
        {
            "": "How far a step goes along its direction.",
            "limits": "It is the least of its limits, times lr: the edge step, slope over "
            "curvature (Thm 3.2); the Polyak cap, loss over slope (Thm 3.5); the trust region, "
            "which bounds the change of the outputs (Thm 3.6). Marks show which limit set the "
            "step, faint lines the limits themselves.",
        },
        (_Plan("step size", ("step_size",)),),
    ),
    (
        "curvature",
        "Slope and curvature",
        {
            "": "How steep the loss is along the step, and how fast that changes (Thm 2.6, "
            "Thm 3.2).",
            "slope": "The held-out slope is on samples that the direction was not made from: far "
            "below the batch's own, steps follow noise.",
        },
        (
            _Plan("slope", ("slope", "raw_slope")),
            _Plan("curvature", ("curvature", "top_curvature")),
        ),
    ),
    (
        "correlation",
        "Gradient correlation and batch size",
        {
            "correlation": "The correlation is the share of the slope that is no noise (Thm 3.2): "
            "near 0 the batches pull apart.",
            "batch_size": "Samples in a batch.",
            "noise_scale": "The noise scale is the batch size at which signal and noise are equal "
            "(Thm 3.3); batches far below it are mostly noise.",
        },
        (
            _Plan("gradient correlation", ("correlation",), log=False),
            _Plan(
                "samples",
                ("batch_size", "recommended_batch_size", "noise_scale"),
                alone=("batch_size", "recommended_batch_size"),
            ),
        ),
    ),
    (
        "sandwich",
        "The sandwich: energy, lo and hi",
        {
            "": "The gradient energy bounds the risk from below by way of hi, and from above by "
            "way of lo (Thm 2.3): small gradients mean a small risk where lo stays away from 0.",
            "lo": "lo and hi are the extreme eigenvalues of the structure matrices.",
        },
        (
            _Plan("loss between its bounds", ("upper", "risk", "lower"), alone=("upper", "lower")),
            _Plan("eigenvalues", ("hi", "lo")),
            _Plan("gradient energy", ("gradient_energy",)),
        ),
    ),
)
CONDITIONS = (
    "conditions",
    "Conditions of convergence",
    "Thm 3.1 promises small gradients where four conditions hold: C1 the step is below twice the "
    "inverse curvature, C2 the noise of the batch size is below the aim, C3 the eigenvalues are "
    "bounded, C4 the loss is a finite distance above its floor.",
)
OTHER = (
    "other",
    "Also recorded",
    "Other numbers of the records, as they are.",
)


def panels(found: Digest) -> list[Panel]:
    """The panels of a history, without those that it has no data for.

    Args:
        found: of the history.

    Returns:
        panels, none of them empty.

    Example:
        >>> found = Digest()
        >>> found.add([{"step": 1, "loss": 0.5, "mine": 3.0}])
        >>> [(panel.title, [chart.title for chart in panel.charts]) for panel in panels(found)]
        [('Loss and data floor', ['loss']), ('Also recorded', ['mine'])]
    """
    made = []
    styles = {style: i for i, style in enumerate(dict.fromkeys(run.style for run in found.runs))}
    there = {key for run in found.runs for key in run.series}
    if found.of_one_run and any(key.startswith("limits/") for key in there):
        there.add("limits")
    for name, title, texts, plans in PLANS:
        charts = [
            chart for plan in plans for chart in _charts(plan, found.runs, styles, found.of_one_run)
        ]
        if charts:
            text = " ".join(t for key, t in texts.items() if not key or key in there)
            made.append(Panel(name, title, text, tuple(charts)))
    if bands := _bands(found.runs):
        made.append(Panel(*CONDITIONS, bands))
    known = {key for plans in PLANS for plan in plans[3] for key in plan.keys}
    every = dict.fromkeys(key for run in found.runs for key in run.series)
    known.add("epoch")  # another name of the step
    rest = [k for k in every if k not in known and not k.startswith(("limits/", "conditions/"))]
    constant = {key: value for key in rest if (value := _constant(key, found.runs)) is not None}
    rest = [key for key in rest if key not in constant]
    others = [
        chart
        for key in rest[:OTHERS]
        for chart in _charts(_Plan(label(key), (key,), log=None), found.runs, styles)
    ]
    if others:
        more = f" {len(rest) - OTHERS} more were left out." if len(rest) > OTHERS else ""
        same = ", ".join(f"{label(key)} {value:.4g}" for key, value in constant.items())
        more += f" The same throughout: {same}." if same else ""
        made.append(Panel(*OTHER[:2], OTHER[2] + more, tuple(others)))
    return made


def _constant(key: str, runs: list[Run]) -> float | None:
    """The value of a quantity that is the same in all records of all runs."""
    of_key = [run.series[key] for run in runs if key in run.series]
    y = np.concatenate([series.y for series in of_key])
    if any(series.bad for series in of_key) or sum(series.count for series in of_key) < 2:
        return None
    return float(y[0]) if (y == y[0]).all() else None


def _charts(plan: _Plan, runs: list[Run], styles: dict[str, int], one: bool = False) -> list[Chart]:
    if len(runs) == 1:
        (run,) = runs
        alone = plan.alone or plan.keys
        if not any(key in run.series for key in alone):
            return []
        lines = []
        if plan.keys == ("step_size",):
            lines = _limits(run, run.limits)
        lines += [
            Line(
                label(key),
                run.series[key],
                number,
                tuple(run.limits) if key == "step_size" else (),
            )
            for number, key in enumerate(plan.keys)
            if key in run.series
        ]
        return [_chart(plan.title, lines, plan.log, run.x)]
    made = []
    for key in plan.keys:
        of_key = [
            Line(
                run.name or "unnamed",
                run.series[key],
                styles[run.style],
                tuple(run.limits) if key == "step_size" and one else (),
                group=run.style or "unnamed",
            )
            for run in runs
            if key in run.series
        ]
        if of_key and key == "step_size" and one:
            of_key = [line for run in runs for line in _limits(run, runs[-1].limits)] + of_key
        if of_key and (key not in ("data_floor",) or any(line.series.y.any() for line in of_key)):
            made.append(_chart(label(key), of_key, plan.log, runs[0].x))
    return made


def _limits(run: Run, names: Iterable[str]) -> list[Line]:
    """Faint lines, in the colours of the marks."""
    order = {name: i for i, name in enumerate(names)}
    return [
        Line(label(key), series, -1 - order.get(label(key), len(order)))
        for key, series in run.series.items()
        if key.startswith("limits/")
    ]


def _chart(title: str, lines: list[Line], log: bool | None, x: str) -> Chart:
    """With a logarithmic axis where that shows most of the numbers, and only what it can show."""
    values = [line.series.y for line in lines if line.style >= 0]
    every = np.concatenate(values) if values else np.empty(0)
    positive = every > 0
    if log is None:
        log = bool(every.size and positive.all() and every.max() / WIDE > every.min())
    log = log and bool(positive.any()) and bool(positive.mean() >= 0.5)
    if not log:
        return Chart(title, tuple(lines), False, x)
    kept, notes = [], []
    for line in lines:
        y = line.series.y
        if y.size and not (y > 0).any():
            what = f"is {y[0]:.3g} throughout" if (y == y[0]).all() else "is nowhere positive"
            if line.style >= 0:
                notes.append(f"{line.name} {what}: below a logarithmic axis")
        else:
            kept.append(line)
    return Chart(title, tuple(kept), True, x, notes=tuple(notes))


def _bands(runs: list[Run]) -> tuple[Chart, ...]:
    made = []
    for run in runs:
        lines = [
            Line(label(key), series, number)
            for number, (key, series) in enumerate(sorted(run.series.items()))
            if key.startswith("conditions/")
        ]
        if lines:
            made.append(Chart(run.name or "conditions", tuple(lines), False, run.x, bands=True))
    return tuple(made[:OTHERS])
