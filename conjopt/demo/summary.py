"""What the records of the demo's runs say."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

__all__ = ["TARGETS", "Row", "RunSummary", "Spread", "sentences", "summarise", "table"]

TARGETS = (0.1, 0.01)  # training losses whose cost is told
SUBJECT = "ConjSGD"  # compared with all others
MISSING = "—"


@dataclass(frozen=True)
class Spread:
    """A quantity over seeds.

    Attributes:
        mean: over the seeds that have it; None if none has.
        low: the smallest.
        high: the largest.
        count: seeds that have it.
    """

    mean: float | None
    low: float | None
    high: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float | None]) -> Spread:
        """The spread of the values that are not None.

        Example:
            >>> Spread.of([1.0, None, 3.0])
            Spread(mean=2.0, low=1.0, high=3.0, count=2)
        """
        there = [value for value in values if value is not None]
        if not there:
            return cls(None, None, None, 0)
        if any(math.isnan(value) for value in there):
            return cls(math.nan, math.nan, math.nan, len(there))
        return cls(fmean(there), min(there), max(there), len(there))


@dataclass(frozen=True)
class RunSummary:
    """One run.

    Attributes:
        model: its name.
        optimizer: its name.
        seed: of the run.
        train_loss: over all training images, at the end.
        smallest_train_loss: of all evaluations; None if none was finite.
        test_accuracy: at the end, a share.
        test_loss: at the end.
        epochs_to: target to the epoch of the first evaluation at or below it, None if there was
            none.
        cpu_seconds_to: target to the CPU seconds of training until then.
        cpu_seconds: of training, until the end.
    """

    model: str
    optimizer: str
    seed: int
    train_loss: float
    smallest_train_loss: float | None
    test_accuracy: float
    test_loss: float
    epochs_to: dict[float, float | None]
    cpu_seconds_to: dict[float, float | None]
    cpu_seconds: float

    @classmethod
    def of(
        cls, records: Sequence[Mapping[str, Any]], targets: Iterable[float] = TARGETS
    ) -> RunSummary:
        """The summary of one run's records, in order.

        Example:
            >>> run = {"model": "mlp", "optimizer": "SGD", "seed": 0, "test_accuracy": 0.5}
            >>> records = [
            ...     run | {"epoch": e, "cpu_seconds": 2 * e, "train_loss": loss, "test_loss": 1.0}
            ...     for e, loss in enumerate([2.3, 0.05, 0.2])
            ... ]
            >>> summary = RunSummary.of(records)
            >>> summary.epochs_to, summary.smallest_train_loss, summary.rebounded
            ({0.1: 1, 0.01: None}, 0.05, True)
        """
        last = records[-1]
        losses = [record["train_loss"] for record in records]
        first = {
            target: next((r for r in records if r["train_loss"] <= target), None)
            for target in targets
        }
        return cls(
            model=last["model"],
            optimizer=last["optimizer"],
            seed=last["seed"],
            train_loss=last["train_loss"],
            smallest_train_loss=min(filter(math.isfinite, losses), default=None),
            test_accuracy=last["test_accuracy"],
            test_loss=last["test_loss"],
            epochs_to={t: None if r is None else r["epoch"] for t, r in first.items()},
            cpu_seconds_to={t: None if r is None else r["cpu_seconds"] for t, r in first.items()},
            cpu_seconds=last["cpu_seconds"],
        )

    @property
    def rebounded(self) -> bool:
        """Whether the run ended above twice its smallest training loss, or not on a number."""
        if self.smallest_train_loss is None:
            return True
        return not self.train_loss <= 2 * self.smallest_train_loss


@dataclass(frozen=True)
class Row:
    """A model and an optimizer over the seeds; the fields are those of `RunSummary`."""

    model: str
    optimizer: str
    seeds: int
    train_loss: Spread
    smallest_train_loss: Spread
    test_accuracy: Spread
    test_loss: Spread
    epochs_to: dict[float, Spread]
    cpu_seconds_to: dict[float, Spread]
    cpu_seconds: Spread


def summarise(runs: Iterable[RunSummary]) -> list[Row]:
    """A row for each model and optimizer, in order of appearance.

    Args:
        runs: all with the same targets.

    Returns:
        the rows.

    Example:
        >>> summarise([])
        []
    """
    groups: dict[tuple[str, str], list[RunSummary]] = {}
    for run in runs:
        groups.setdefault((run.model, run.optimizer), []).append(run)
    return [
        Row(
            model=model,
            optimizer=optimizer,
            seeds=len(group),
            train_loss=Spread.of(run.train_loss for run in group),
            smallest_train_loss=Spread.of(run.smallest_train_loss for run in group),
            test_accuracy=Spread.of(run.test_accuracy for run in group),
            test_loss=Spread.of(run.test_loss for run in group),
            epochs_to={
                target: Spread.of(run.epochs_to[target] for run in group)
                for target in group[0].epochs_to
            },
            cpu_seconds_to={
                target: Spread.of(run.cpu_seconds_to[target] for run in group)
                for target in group[0].cpu_seconds_to
            },
            cpu_seconds=Spread.of(run.cpu_seconds for run in group),
        )
        for (model, optimizer), group in groups.items()
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as text, 80 columns wide; a block for each model.

    Args:
        rows: as `summarise` gives them.

    Returns:
        lines, without a line end after the last.

    Example:
        >>> table([])
        'No run was finished.'
    """
    if not rows:
        return "No run was finished."
    lines = [
        f"{'':10}{'training loss':>17}{'test':>17}{'epochs to':>18}{'CPU seconds to':>18}",
        f"{'':10}{'end':>8}{'smallest':>9}{'accuracy':>10}{'loss':>7}"
        + "".join(f"{target:>9g}" for target in (*rows[0].epochs_to, *rows[0].cpu_seconds_to)),
    ]
    for row, previous in zip(rows, (None, *rows), strict=False):
        if previous is None or row.model != previous.model:
            lines.append(row.model)
        lines.append(
            f"  {row.optimizer:<8}"
            f"{_cell(row.train_loss, row.seeds):>8}"
            f"{_cell(row.smallest_train_loss, row.seeds):>9}"
            f"{_percent(row.test_accuracy):>10}"
            f"{_cell(row.test_loss, row.seeds):>7}"
            + "".join(f"{_cell(cost, row.seeds, '.1f'):>9}" for cost in row.epochs_to.values())
            + "".join(f"{_cell(cost, row.seeds):>9}" for cost in row.cpu_seconds_to.values())
        )
    if any(row.seeds > 1 for row in rows):
        lines.append("Means over seeds; ±: half the range; 2/3: reached by two seeds of three.")
    return "\n".join(lines)


def sentences(runs: Sequence[RunSummary], rows: Sequence[Row]) -> list[str]:
    """What the runs say of `ConjSGD` beside the others, and of every run's end.

    Args:
        runs: the finished ones.
        rows: theirs, from `summarise`.

    Returns:
        sentences; none where there is nothing to compare.

    Example:
        >>> sentences([], [])
        []
    """
    return [*_races(runs), *_accuracies(rows), *_rebounds(runs)]


def _races(runs: Sequence[RunSummary]) -> list[str]:
    pairs: dict[tuple[str, int], dict[str, RunSummary]] = {}
    for run in runs:
        pairs.setdefault((run.model, run.seed), {})[run.optimizer] = run
    everyone = {run.optimizer for run in runs}
    whole = [pair for pair in pairs.values() if set(pair) == everyone and SUBJECT in pair]
    if not whole or len(everyone) < 2:
        return []
    target = min(whole[0][SUBJECT].epochs_to)
    won = sum(
        _or_inf(pair[SUBJECT].epochs_to[target])
        < min(_or_inf(pair[name].epochs_to[target]) for name in pair if name != SUBJECT)
        for pair in whole
    )
    rivals = [name for name in whole[0] if name != SUBJECT]
    return [
        f"{SUBJECT} reached a training loss of {target:g} in fewer epochs than "
        f"{_and(rivals)} on {won} of {len(whole)} model-seed pairs."
    ]


def _accuracies(rows: Sequence[Row]) -> list[str]:
    found = []
    for mine in rows:
        others = [row for row in rows if row.model == mine.model and row.optimizer != SUBJECT]
        if mine.optimizer != SUBJECT or not others or {r.seeds for r in others} != {mine.seeds}:
            continue
        best = max(others, key=lambda row: row.test_accuracy.mean or 0.0)
        ours, theirs = (100 * (row.test_accuracy.mean or 0.0) for row in (mine, best))
        found.append(
            f"{mine.model}: test accuracy {ours:.2f} % against {theirs:.2f} % by {best.optimizer}, "
            f"the better of the others: {ours - theirs:+.2f} points."
        )
    return found


def _rebounds(runs: Sequence[RunSummary]) -> list[str]:
    if not runs:
        return []
    rebounded = [run for run in runs if run.rebounded]
    if not rebounded:
        return [f"None of {len(runs)} runs ended above twice its smallest training loss."]
    named = "; ".join(
        f"{run.optimizer} on {run.model}, seed {run.seed} ({_number(run.train_loss)} after "
        f"{_number(run.smallest_train_loss)})"
        for run in rebounded
    )
    count = f"{len(rebounded)} of {len(runs)}"
    return [f"{count} runs ended above twice their smallest training loss: {named}."]


def _cell(spread: Spread, seeds: int, form: str = "") -> str:
    if spread.mean is None:
        return MISSING
    text = f"{spread.mean:{form}}" if form else _number(spread.mean)
    return text if spread.count == seeds else f"{text} {spread.count}/{seeds}"


def _percent(spread: Spread) -> str:
    if spread.mean is None or spread.low is None or spread.high is None:
        return MISSING
    text = f"{100 * spread.mean:.1f}"
    return text if spread.count == 1 else f"{text} ±{50 * (spread.high - spread.low):.1f}"


def _number(value: float | None) -> str:
    return MISSING if value is None else f"{value:#.2g}".rstrip(".")


def _or_inf(value: float | None) -> float:
    return math.inf if value is None else value


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
