"""A history in sentences, for the terminal and the head of a page."""

from __future__ import annotations

import math

from conjopt.report.digest import COUNTED, Digest, Run
from conjopt.report.panels import label
from conjopt.report.series import Series

__all__ = ["HINT", "counted", "headline", "sentences"]

RUNS = 24  # that get a line of their own
LOSSES = ("loss", "train_loss", "excess_loss", "test_loss")
HINT = (
    "No record holds a number yet. An optimizer records by ConjSGD(..., history=...), and any loop "
    "by history.record(step=..., loss=...)."
)
BAD = {"nan": "NaN", "inf": "infinite", "-inf": "minus infinite"}


def sentences(found: Digest, *, each: bool = True) -> list[str]:
    r"""What a person should know first.

    Args:
        found: of the history.
        each: whether each of several runs gets a sentence, which a table may give as well.

    Returns:
        sentences, at least one.

    Example:
        >>> found = Digest()
        >>> found.add([
        ...     {"step": 1, "loss": 2.0, "data_floor": 0.5, "step_size": 0.1, "limited_by": "edge"},
        ...     {"step": 2, "loss": 1.0, "data_floor": 0.5, "step_size": 0.2, "limited_by": "edge"},
        ... ])
        >>> print(*sentences(found), sep="\n")
        2 records, steps 1 to 2.
        Loss 1 at step 2, 0.5 above the data floor.
        The step size is 0.2, set by edge. Over the records: edge 100 %.
    """
    if not found.records:
        return ["No records yet.", *_of_file(found)]
    runs = found.runs
    count = counted(found.records, "record")
    if len(runs) == 1:
        (run,) = runs
        where = f"{run.x}s {_place(run.first)} to {_place(run.last)}"
        named = f" of {run.name}" if run.name else ""
        return [f"{count}{named}, {where}.", *_of_run(run), *_of_file(found)]
    more = "more than " if found.left_out["run"] else ""
    told = [f"{count} of {more}{len(runs)} runs."]
    if found.of_one_run:
        told = [f"{count} of one run in {len(runs)} parts, as its steps go back."]
    if each:
        told += [f"{run.name or 'unnamed'}: {headline(run)}." for run in runs[:RUNS]]
    if each and len(runs) > RUNS:
        told.append(f"And {len(runs) - RUNS} more runs.")
    for run in runs:
        told += [f"{run.name or 'unnamed'}: {trouble}" for trouble in _skips(run) + _troubles(run)][
            :4
        ]
    return told + _of_file(found)


def counted(number: int, thing: str) -> str:
    """How many of a thing.

    Example:
        >>> counted(1, "record"), counted(2000, "record")
        ('1 record', '2,000 records')
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def headline(run: Run, *, before: int | None = None) -> str:
    """Where a run stands, in one clause.

    Args:
        run: of a digest.
        before: steps that were skipped when it was last told of; None for the first time.

    Example:
        >>> found = Digest()
        >>> found.add([{"step": 3, "loss": 0.25, "step_size": 0.1, "limited_by": "edge"}])
        >>> headline(found.runs[0])
        'loss 0.25, step size 0.1 (edge), step 3'
    """
    parts = []
    if run.skipped:
        new = 0 if before is None else run.skipped - before
        parts.append(f"{counted(run.skipped, 'step')} skipped" + (f" ({new:,} new)" * (new > 0)))
    if (key := _first(run, *LOSSES)) is not None:
        series = run.series[key]
        name = "loss" if key == "loss" else label(key)
        parts.append(f"{name} {_told(series)}")
        if not _is_finite(series) and series.y.size:
            place = _place(float(series.x[-1]))
            parts.append(f"last finite {series.y[-1]:.4g} at {run.x} {place}")
    if (key := _first(run, "step_size")) is not None and not run.skipped_since:
        by = run.value("limited_by")
        parts.append(f"step size {_told(run.series[key])}" + (f" ({by})" if by else ""))
    if (key := _first(run, "test_accuracy")) is not None:
        parts.append(f"test accuracy {_told(run.series[key])}")
    return ", ".join([*parts, f"{run.x} {_place(run.last)}"])


def _of_run(run: Run) -> list[str]:
    told = []
    if (key := _first(run, *LOSSES)) is not None:
        told.append(_of_loss(run, key))
    told += _skips(run)
    if (key := _first(run, "step_size")) is not None:
        by = run.value("limited_by")
        set_by = f", set by {by}" if by and by != "nothing measured" else ""
        is_ = "was" if run.skipped_since else "is"
        told.append(f"The step size {is_} {_told(run.series[key])}{set_by}.")
        if total := sum(run.limits.values()):
            limits = [pair for pair in run.limits.items() if pair[1]]
            ordered = sorted(limits, key=lambda pair: -pair[1])
            shares = ", ".join(f"{name} {_share(n, total)}" for name, n in ordered)
            told[-1] += f" Over the records: {shares}."
    return told + _troubles(run)


def _of_loss(run: Run, key: str) -> str:
    series = run.series[key]
    name = "Loss" if key == "loss" else label(key).capitalize()
    assert series.last is not None  # a series has one number at least
    x, value = series.last
    at = f"at {run.x} {_place(x)}"
    if not _is_finite(series):
        if not series.y.size:
            return f"{name} is {_told(series)} {at}, and was never finite."
        place = _place(float(series.x[-1]))
        return (
            f"{name} is {_told(series)} {at}. The last finite one was {series.y[-1]:.4g} at "
            f"{run.x} {place}."
        )
    above, of_floor = "", run.series.get("data_floor")
    floor = of_floor.last[1] if of_floor is not None and of_floor.last is not None else 0.0
    if key == "loss" and floor and math.isfinite(floor):
        side = "above" if value >= floor else "below"
        above = f", {abs(value - floor):.4g} {side} the data floor"
    return f"{name} {_told(series)} {at}{above}."


def _skips(run: Run) -> list[str]:
    if not run.skipped:
        return []
    was = "was" if run.skipped == 1 else "were"
    since = ""
    if run.skipped_since and run.taken is not None:
        count = "all" if run.skipped_since == run.skipped else f"{run.skipped_since:,} of them"
        since = f", {count} since {run.x} {_place(run.taken[0])}"
    return [f"{counted(run.skipped, 'step')} {was} skipped{since}: something was not finite."]


def _troubles(run: Run) -> list[str]:
    told = []
    unknown = [label(k) for k, c in run.conditions.items() if c.state == "unknown"]
    failing = [(label(k), c) for k, c in run.conditions.items() if c.state == "fails"]
    told += [f"{name} fails since {run.x} {_place(c.since)}." for name, c in failing]
    told += [
        f"{label(k)} failed in {counted(c.failed, 'record')}, and {c.state} since {run.x} "
        f"{_place(c.since)}."
        for k, c in run.conditions.items()
        if c.failed and c.state == "holds"
    ]
    if run.conditions and not failing:
        which = f"; unknown: {', '.join(sorted(unknown))}" if unknown else ""
        told.append(f"No condition of Thm 3.1 fails now{which}.")
    told += [
        f"{label(key).capitalize()} was {BAD[kind]} in {counted(count, 'record')}, "
        f"first at {run.x} {_place(float(series.bad_places(kind)[0]))}."
        for key, series in run.series.items()
        for kind, count in series.bad.items()
        # An infinite limit or noise scale is an answer: nothing limits, or no signal was seen.
        if not (kind == "inf" and (key.startswith("limits/") or key in ("noise_scale", "upper")))
    ]
    return told


def _of_file(found: Digest) -> list[str]:
    told = []
    if found.every > 1:
        told.append(
            f"The file is large, so one in {found.every} of its records was read: counts are of "
            "these, and a spike of a single record may be missing."
        )
    if found.cut:
        told.append(
            "The file ends in the middle of a line: it was cut by a crash, or is being written. "
            "Everything before that line was read."
        )
    for thing, which in found.left_out.items():
        if which:
            count = f"{len(which):,}" + " or more" * (len(which) == COUNTED)
            things = thing if thing == "series" or len(which) == 1 else f"{thing}s"
            were = "was" if len(which) == 1 else "were"
            told.append(f"{count} {things} {were} left out: there are too many of them.")
    return told


def _first(run: Run, *names: str) -> str | None:
    """The first of these quantities that the run has numbers of."""
    return next((name for name in names if name in run.series), None)


def _is_finite(series: Series) -> bool:
    return series.last is not None and math.isfinite(series.last[1])


def _told(series: Series) -> str:
    """The last number of a series."""
    assert series.last is not None
    value = series.last[1]
    return f"{value:.4g}" if math.isfinite(value) else BAD[str(value)]


def _share(part: int, of: int) -> str:
    """A part of a whole, of which neither 0 % nor 100 % is said unless it is so."""
    percent = 100 * part / of
    if 0 < percent < 1:
        return "under 1 %"
    return "over 99 %" if 99 < percent < 100 else f"{percent:.0f} %"


def _place(x: float) -> str:
    return f"{x:,.0f}" if x == round(x) else f"{x:.4g}"
