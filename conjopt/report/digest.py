"""What is to be shown of a history, made in one pass over its records."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conjopt.report.history import History
from conjopt.report.lines import Lines, Value, one_in
from conjopt.report.series import POINTS, Numbers, Series

__all__ = ["CONDITION_STATES", "LABELS", "Digest", "Run", "digest", "run_file"]

LABELS = ("run", "name", "model", "optimizer", "seed")  # what tells runs in one history apart
FILES = ("history.jsonl", "metrics.jsonl")  # looked for in a folder, in this order
CONDITION_STATES = ("unknown", "holds", "fails")
MOST = 1e15  # of a step; what is more is none
BLOCK = 4096  # records that are taken in at once
PARTS = 20  # times that the steps of a run go back before it is taken as it comes
NONE = (None,) * len(LABELS)
NUMBERS = {float, int, bool}
SERIES = 1000  # of all runs together; more are counted and left out
COUNTED = 10_000  # of what is left out, at most

Record = dict[str, Value]


@dataclasses.dataclass
class Condition:
    """How one of C1 to C4 stands.

    Attributes:
        state: the last one.
        since: the step from which it has been so.
        failed: records at which it failed.
    """

    state: str
    since: float
    failed: int = 0


@dataclasses.dataclass
class Run:
    """One run of a history.

    Attributes:
        name: its labels, or "" where there are none.
        style: its name without seed and number, for runs that are to look alike.
        x: "step", or "epoch" where no steps were recorded, or "record" where no epochs either.
        records: how many.
        first: the least step.
        last: the greatest one.
        latest: the last value of each quantity, of the first ones that it has.
        series: quantity to its numbers.
        limits: in the order of their codes, what set the step, to how often.
        conditions: C1 to C4.
        taken: place of the last record of a step that an optimizer took, and how many were
            skipped until then; None before any.
    """

    name: str
    style: str
    x: str = "record"
    records: int = 0
    first: float = 0.0
    last: float = 0.0
    latest: Record = dataclasses.field(default_factory=dict)
    series: dict[str, Series] = dataclasses.field(default_factory=dict)
    limits: dict[str, int] = dataclasses.field(default_factory=dict)
    conditions: dict[str, Condition] = dataclasses.field(default_factory=dict)
    taken: tuple[float, int] | None = None
    # Of each number which record had it last, and the step and the epoch of that; apart for those
    # that an optimizer wrote (True) and those of a loop, which may count from 0 where the other
    # counts from 1.
    held: dict[tuple[bool, str], tuple[int, float, float]] = dataclasses.field(default_factory=dict)
    # The greatest step of each of the two, and what to add to their steps: these may begin anew in
    # each epoch.
    most: dict[bool, float] = dataclasses.field(default_factory=dict)
    ahead: dict[bool, float] = dataclasses.field(default_factory=dict)
    at: float = 0.0  # where the last record was drawn

    @property
    def skipped(self) -> int:
        """Steps that were skipped."""
        value = self.value("skipped_steps")
        return int(value) if isinstance(value, int | float) and 0 < value < MOST else 0

    @property
    def skipped_since(self) -> int:
        """Steps that were skipped since the last record of one that was taken."""
        return max(self.skipped - (0 if self.taken is None else self.taken[1]), 0)

    def value(self, *names: str) -> Any:
        """The last value of the first of these names that has one; else None.

        Args:
            names: of quantities.
        """
        return next((v for n in names if (v := self.latest.get(n)) is not None), None)


class Digest:
    """Takes in records as they come, in memory that does not grow with them.

    Args:
        points: to keep of each series, at most.

    Attributes:
        records: how many came.
        runs: in order of appearance.
        cut: whether the file ends in the middle of a line.
        every: one in so many records of the file came.
        left_out: series, and runs, that there were too many of, up to `COUNTED` of each.
        latest: the run of the last record.

    Example:
        >>> found = Digest()
        >>> found.add([{"step": step, "loss": 1 / step} for step in range(1, 4)])
        >>> (run,) = found.runs
        >>> run.last, run.series["loss"].y.tolist()
        (3.0, [1.0, 0.5, 0.3333333333333333])
    """

    def __init__(self, points: int = POINTS) -> None:
        self.points = points
        self.records = 0
        self.cut = False
        self.every = 1
        self.left_out: dict[str, set[tuple[Any, ...]]] = {"series": set(), "run": set()}
        self.latest: Run | None = None
        self._runs: dict[tuple[Any, ...], list[Run]] = {}
        self._series = 0

    @property
    def runs(self) -> list[Run]:
        """All runs, a part of one where its steps went back among them."""
        return [run for parts in self._runs.values() for run in parts]

    @property
    def of_one_run(self) -> bool:
        """Whether all runs are parts of one, whose steps went back."""
        return len(self._runs) == 1

    def add(self, records: Sequence[Record]) -> None:
        """Take in records.

        Args:
            records: in order.
        """
        self.records += len(records)
        keys = set(itertools.chain.from_iterable(set(map(tuple, records))))
        groups: Iterable[tuple[tuple[Any, ...], Iterable[Record]]] = [(NONE, records)]
        if not keys.isdisjoint(LABELS):
            groups = itertools.groupby(records, _labels)
        for labels, group in groups:
            if labels not in self._runs and len(self._runs) * len(LABELS) > SERIES:
                self._leave_out("run", labels)
                continue
            parts = self._runs.setdefault(labels, [_run(labels, 1)])
            of_run = list(group)
            placing = _placing(of_run, parts[-1])
            start = 0
            for place, own, ahead in _backs(of_run, placing, parts[-1]):
                if ahead is None and len(parts) == PARTS:
                    continue
                piece = slice(start, place)
                self._add(parts[-1], of_run[piece], placing[piece])
                start = place
                if ahead is None:
                    parts.append(_part(labels, parts))
                    continue
                run = parts[-1]
                run.ahead[own] = run.ahead.get(own, 0.0) + ahead
                run.held = {key: at for key, at in run.held.items() if key[0] != own}
                run.most.pop(own, None)
            self._add(parts[-1], of_run[start:], placing[slice(start, None)])
            self.latest = parts[-1]

    def _add(self, run: Run, records: list[Record], placing: _Placing) -> None:
        if not records:
            return
        x = _places(placing, run)
        run.first = min(float(x.min()), run.first if run.records else np.inf)
        run.last = max(float(x.max()), run.last if run.records else -np.inf)
        run.records += len(records)
        run.at = float(x[-1])
        for own in (True, False):
            steps = placing.steps[placing.own == own]
            if np.isfinite(steps).any():
                run.most[own] = max(float(np.nanmax(steps)), run.most.get(own, -np.inf))
        columns = _columns(records)
        code = self._limits(run, columns["limited_by"]) if "limited_by" in columns else None
        if code is not None and "skipped_steps" in columns:
            _see_taken(run, columns["limited_by"], columns["skipped_steps"], x)
        for key, column in columns.items():
            if key in run.latest or len(run.latest) < SERIES:
                last = next((value for value in reversed(column) if value is not None), None)
                run.latest[key] = run.latest.get(key) if last is None else last
            if key == "step" or key == "limited_by" or key in LABELS:
                continue
            if key.startswith("conditions/"):
                self._condition(run, key, column, x)
                continue
            kinds = set(map(type, column))
            if not kinds <= NUMBERS | {type(None)}:  # text, or a text among numbers
                if kinds.isdisjoint(NUMBERS):
                    continue
                column = [value if type(value) in NUMBERS else None for value in column]
            numbers = _numbers(column)
            there = ~np.isnan(numbers)
            if not there.all():
                there = np.array([value is not None for value in column])
            if there.any() and (series := self._of(run, key)) is not None:
                with_it = code if key == "step_size" else None
                series.add(x[there], numbers[there], None if with_it is None else with_it[there])
                if key != "epoch":
                    _hold(run, key, there, placing)

    def _leave_out(self, thing: str, which: tuple[Any, ...]) -> None:
        if len(self.left_out[thing]) < COUNTED:
            self.left_out[thing].add(which)

    def _of(self, run: Run, key: str) -> Series | None:
        if key not in run.series:
            if self._series >= SERIES:
                self._leave_out("series", (id(run), key))
                return None
            self._series += 1
            run.series[key] = Series(self.points)
        return run.series[key]

    def _limits(self, run: Run, column: Sequence[Value]) -> Numbers:
        names = [name if isinstance(name, str) else None for name in column]
        for name, count in collections.Counter(names).items():
            if name is not None and name != "nothing measured":
                run.limits[name] = run.limits.get(name, 0) + count
        codes: dict[str | None, float] = {n: float(code) for code, n in enumerate(run.limits)}
        return np.array([codes.get(name, -1.0) for name in names])

    def _condition(self, run: Run, key: str, column: Sequence[Value], x: Numbers) -> None:
        there = np.array([isinstance(state, str) for state in column])
        if not there.any():
            return
        number = {state: float(code) for code, state in enumerate(CONDITION_STATES)}
        codes = np.array([number.get(str(state), 0.0) for state in column])[there]
        x = x[there]
        if (series := self._of(run, key)) is not None:
            series.add(x, codes)
        changes = np.flatnonzero(np.diff(codes))
        last = CONDITION_STATES[int(codes[-1])]
        held = run.conditions.get(key)
        since = float(x[changes[-1] + 1]) if changes.size else float(x[0])
        if held is not None and held.state == last and not changes.size:
            since = held.since
        failed = int((codes == number["fails"]).sum()) + (held.failed if held else 0)
        run.conditions[key] = Condition(last, since, failed)


def digest(
    source: History | str | os.PathLike[str] | Iterable[Record], *, points: int = POINTS
) -> Digest:
    """What is to be shown of a history.

    Args:
        source: a `History`, of a file with all that the file holds; the path of a history or of a
            folder that holds one, see `run_file`; or records.
        points: to keep of each series, at most.

    Raises:
        TypeError: if the source is of another kind, or one of the records is.
        ValueError: see `History.read` and `run_file`.
        OSError: if it cannot be read.

    Example:
        >>> history = History()
        >>> history.record(step=1, loss=0.5)
        >>> digest(history).records
        1
    """
    found = Digest(points)
    if isinstance(source, History):
        if source.path is None:
            found.add(source.records)
            return found
        source = source.path
    if isinstance(source, str | os.PathLike):
        path = run_file(source)
        found.every = one_in(path)
        with Lines(path, every=found.every) as lines:
            for block in lines.blocks():
                found.add(block)
            found.cut = lines.cut
        return found
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        hint = "; give one record as a list of one" if isinstance(source, Mapping) else ""
        raise TypeError(
            f"got a {type(source).__name__} as history, expected a conjopt.report.History, the "
            f"path of one, or a list of records, each a dict{hint}"
        )
    records = iter(source)
    while some := [_record(one) for one in itertools.islice(records, BLOCK)]:
        found.add(some)
    return found


def _record(one: object) -> Record:
    if isinstance(one, Mapping) and all(isinstance(key, str) for key in one):
        return dict(one)
    what, hint = f"a {type(one).__name__}", ""
    if isinstance(one, Mapping):
        what = f"one with the key {next(key for key in one if not isinstance(key, str))!r}"
    elif isinstance(one, str | os.PathLike | History):
        hint = "; give one history, not a list of them"
    raise TypeError(
        f"got a list of records with {what} in it, expected dicts whose keys are strings{hint}"
    )


def run_file(path: str | os.PathLike[str]) -> Path:
    """The history that a path leads to.

    Args:
        path: a file, or a folder with ``history.jsonl`` or ``metrics.jsonl`` or one other
            ``*.jsonl``.

    Raises:
        ValueError: if a folder has none of them, or several others, or if the path is empty.
        OSError: if there is nothing at the path.

    Example:
        >>> import tempfile
        >>> folder = Path(tempfile.mkdtemp())
        >>> History(folder / "my run.jsonl").close()
        >>> run_file(folder).name
        'my run.jsonl'
    """
    if not os.fspath(path):
        raise ValueError("got an empty path; give a history, or a folder that holds one")
    path = Path(path)
    if not path.is_dir():
        path.stat()  # says so if there is nothing
        return path
    for name in FILES:
        if (path / name).is_file():
            return path / name
    others = sorted(path.glob("*.jsonl"))
    if len(others) == 1:
        return others[0]
    if not others:
        raise ValueError(
            f"{path} holds no history: expected {' or '.join(FILES)}; give the file that a History "
            "wrote, or a folder that holds one"
        )
    names = ", ".join(other.name for other in others[:5])
    raise ValueError(f"{path} holds {len(others)} files of that kind ({names}); give one of them")


def _labels(record: Record) -> tuple[Any, ...]:
    labels = tuple(map(record.get, LABELS))
    # Numbers and text; whatever else a file that was changed may hold is told apart by its text.
    return tuple(v if type(v) in (str, int, float, bool, type(None)) else str(v) for v in labels)


def _run(labels: tuple[Any, ...], part: int) -> Run:
    pairs = [(k, v) for k, v in zip(LABELS, labels, strict=True) if v is not None]
    words = {k: f"seed {v}" if k == "seed" else str(v) for k, v in pairs}
    again = [f"part {part}"] if part > 1 else []
    style = [word for key, word in words.items() if key not in ("seed", "run")]
    return Run(", ".join([*words.values(), *again]), ", ".join(style or [*words.values(), *again]))


def _part(labels: tuple[Any, ...], parts: list[Run]) -> Run:
    """A run whose steps go back, with the codes of the limits that the part before has."""
    part = _run(labels, len(parts) + 1)
    part.limits = dict.fromkeys(parts[-1].limits, 0)
    if not parts[0].name:
        parts[0].name = parts[0].style = "part 1"
    return part


def _columns(records: list[Record]) -> dict[str, Sequence[Value]]:
    """Key to the values of all records; None where one lacks it."""
    keys = list(dict.fromkeys(map(tuple, records)))
    if len(keys) == 1:  # the usual case, and then faster
        return {key: list(map(operator.itemgetter(key), records)) for key in keys[0]}
    every = dict.fromkeys(itertools.chain.from_iterable(keys))
    return {key: [record.get(key) for record in records] for key in every}


def _numbers(column: Sequence[Value]) -> Numbers:
    """As floats; NaN for what is none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        numbers = np.array(column, dtype=float)
        if numbers.ndim == 1:  # lists in a file that was changed make it more
            return numbers
    return np.array([_number(value) for value in column], dtype=float)


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, int | float) else np.nan
    except OverflowError:  # a whole number that no float can hold
        return np.inf if isinstance(value, int) and value > 0 else -np.inf


@dataclasses.dataclass
class _Placing:
    """What places records: steps, or epochs where there are none.

    Attributes:
        name: of what the numbers are.
        steps: (n,) NaN for none.
        epochs: (n,) NaN for none.
        own: (n,) whether an optimizer wrote the record.
    """

    name: str
    steps: Numbers
    epochs: Numbers
    own: NDArray[np.bool_]

    def __getitem__(self, piece: slice) -> _Placing:
        return _Placing(self.name, self.steps[piece], self.epochs[piece], self.own[piece])


def _placing(records: list[Record], run: Run) -> _Placing:
    every: dict[str, Numbers] = {}
    for name in ("step", "epoch"):
        every[name] = _numbers([record.get(name) for record in records])
        every[name][np.abs(every[name]) > MOST] = np.nan
    by_epoch = run.x != "step" and not np.isfinite(every["step"]).any()
    name = "epoch" if by_epoch and np.isfinite(every["epoch"]).any() else "step"
    own = np.array(["limited_by" in record for record in records], dtype=bool)
    return _Placing(name, every[name], every["epoch"], own)


def _see_taken(run: Run, limits: Sequence[Value], skipped: Sequence[Value], x: Numbers) -> None:
    """Find the last step that was taken: of one that was skipped there is nothing that limits."""
    for place in range(len(x) - 1, -1, -1):
        count = skipped[place]
        if isinstance(limits[place], str) and isinstance(count, int):
            run.taken = float(x[place]), count
            return


def _places(placing: _Placing, run: Run) -> Numbers:
    """Where to draw records: at their steps, or where those before them are."""
    known = np.isfinite(placing.steps)
    if known.any():
        run.x = placing.name
    elif run.x == "record":
        return np.arange(run.records, run.records + len(known), dtype=float)
    steps = placing.steps
    if run.ahead:
        ahead = [run.ahead.get(own, 0.0) for own in (False, True)]
        steps = steps + np.where(placing.own, ahead[True], ahead[False])
    if known.all():
        return steps
    before = run.at if run.records else float(steps[known][0])
    latest = np.maximum.accumulate(np.where(known, np.arange(len(steps)), -1))
    return np.where(latest < 0, before, steps[latest])


def _hold(run: Run, key: str, there: NDArray[np.bool_], placing: _Placing) -> None:
    """Keep where a number was last."""
    places = np.flatnonzero(there & np.isfinite(placing.steps))
    own = placing.own[places]
    for kind in (True, False):
        if (of_kind := places[own == kind]).size:
            last = int(of_kind[-1])
            number = run.records - len(there) + last
            run.held[kind, key] = number, float(placing.steps[last]), float(placing.epochs[last])


def _backs(
    records: list[Record], placing: _Placing, run: Run
) -> list[tuple[int, bool, float | None]]:
    """Where a number is of an earlier step than the last time that it was recorded.

    Numbers that are recorded apart may well be of an earlier step than the record before, as those
    of a test that took its time.

    Returns:
        the place of the first record after it; whether an optimizer wrote that; and what to add to
        the steps from there on, as they begin anew in a later epoch, or None where they do in a run
        that was started again on the same file.
    """
    steps = placing.steps
    # Place and writer to the place before, negative for one before these records, and whether the
    # epoch is a later one than there.
    found: dict[tuple[int, bool], tuple[int, bool]] = {}
    for own in (True, False):
        places = np.flatnonzero((placing.own == own) & np.isfinite(steps))
        if not (np.diff(steps[places], prepend=run.most.get(own, -np.inf)) < 0).any():
            continue  # the usual case
        for key, column in _columns([records[place] for place in places]).items():
            if key in ("step", "epoch") or key in LABELS:
                continue
            of = places[[type(value) in NUMBERS for value in column]]
            number, step, epoch = run.held.get((own, key), (0, -np.inf, np.nan))
            numbers = np.concatenate([[number - run.records], of])
            of_key = np.concatenate([[step], steps[of]])
            epochs = np.concatenate([[epoch], placing.epochs[of]])
            for i in np.flatnonzero(np.diff(of_key) < 0).tolist():
                anew = bool(epochs[i + 1] > epochs[i] and of_key[i + 1] >= 0)
                one = (int(numbers[i]), anew)
                found[int(of[i]), own] = max(found.get((int(of[i]), own), one), one)
    backs: list[tuple[int, bool, float | None]] = []
    since = {True: -np.inf, False: -np.inf}
    for (place, own), (before, anew) in sorted(found.items()):
        if before < since[own]:
            continue  # another number that goes back in its turn, after the same place
        ahead = None
        if anew:  # counted from 0 or from 1
            stretch = slice(int(max(since[own], 0)), place)
            passed = steps[stretch][placing.own[stretch] == own]
            if since[own] < 0:
                passed = np.append(passed, run.most.get(own, -np.inf))
            ahead = float(np.nanmax(passed)) + float(steps[place] <= 0)
        backs.append((place, own, ahead))
        for kind in (own,) if anew else (True, False):
            since[kind] = place
    return backs
