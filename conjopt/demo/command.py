"""``conjopt demo``: all the runs, one after the other, and what is left when they are cut short."""

from __future__ import annotations

import importlib
import platform
import signal
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import conjopt
from conjopt.demo.data import MODELS, load_split
from conjopt.demo.output import PAGE, DemoError, Output
from conjopt.demo.summary import TARGETS, RunSummary, sentences, summarise, table
from conjopt.demo.training import BATCH_SIZE, OPTIMIZERS, Record, steps_per_epoch, train

__all__ = ["DemoError", "run"]

SEEDS, EPOCHS = 3, 30
QUICK_SEEDS, QUICK_EPOCHS = 1, 10
LABELS = {
    "ConjSGD": "ConjSGD at its defaults",
    "SGD": "SGD(momentum 0.9, lr 0.1)",
    "AdamW": "AdamW(lr 3e-3)",
}


class _Stop(Exception):
    """What ended the runs early: the exit status, and a clause that says why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@dataclass
class _Progress:
    """The runs so far."""

    finished: list[RunSummary] = field(default_factory=list)
    stop: _Stop | None = None


def run(
    *,
    out: Path | None = None,
    quick: bool = False,
    seeds: int | None = None,
    epochs: int | None = None,
    command: str = "conjopt demo",
) -> int:
    """Train everything, print the table, and write the files.

    Ctrl-C and SIGTERM end it before the next step, and a second one at once; a full disk ends it
    too. The runs that were finished by then are summarised.

    Args:
        out: folder for metrics.jsonl, summary.json, plot.png and report.html; None writes nothing.
        quick: one seed and fewer epochs, where these are not given.
        seeds: how many, from 0.
        epochs: of each run.
        command: the command line, for summary.json.

    Returns:
        the exit status: 0, or 1 if a file could not be written, 130 or 143 if interrupted.

    Raises:
        DemoError: if an extra is missing or the folder cannot be used. Nothing was trained then.
        OSError: if the standard output cannot be written; the files are written before.

    Example:
        >>> run(seeds=1, epochs=1)  # doctest: +ELLIPSIS
        Digits: 1437 training and 360 test images, pixels between 0 and 1; batches of 64.
        ...
        0
    """
    seeds = seeds or (QUICK_SEEDS if quick else SEEDS)
    epochs = epochs or (QUICK_EPOCHS if quick else EPOCHS)
    _require("sklearn", "tqdm", *(["matplotlib"] if out else []))
    output = Output(out)
    with output.history:
        _announce(output, quick, seeds, epochs)
        progress = _train_all(output, seeds, epochs)
    rows = summarise(progress.finished)
    found = sentences(progress.finished, rows)
    planned = len(MODELS) * len(OPTIMIZERS) * seeds
    stop = progress.stop
    try:
        output.write_summary(
            {
                "schema": "conjopt.demo",
                "version": 1,
                "command": command,
                "quick": quick,
                "interrupted": stop.why if stop else None,
                "runs_planned": planned,
                "runs_finished": len(progress.finished),
                "settings": {
                    "seeds": list(range(seeds)),
                    "epochs": epochs,
                    "batch_size": BATCH_SIZE,
                    "optimizers": LABELS,
                    "targets": TARGETS,
                },
                "environment": _environment(),
                "table": rows,
                "findings": found,
                "runs": progress.finished,
            }
        )
        output.write_plot(TARGETS)
        output.write_page()
    except OSError as error:
        stop = stop or _cannot_write(output, error)
    _say("", table(rows))
    if found:
        _say("", *map(_wrapped, found))
    if stop:
        _say("", f"{stop.why}; {len(progress.finished)} of {planned} runs were finished.")
    if out:
        page = out / PAGE
        shown = f" Open {page} in a browser." if page.is_file() else ""
        _say("", f"The records are in {out}.{shown}")
    return stop.status if stop else 0


def _require(*modules: str) -> None:
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise DemoError(
                f'the demo needs {module} ({error}): pip install "conjopt[demo]"'
            ) from error


def _announce(output: Output, quick: bool, seeds: int, epochs: int) -> None:
    split = load_split(0)
    _say(
        f"Digits: {len(split.train_targets)} training and {len(split.test_targets)} test images, "
        f"pixels between 0 and 1; batches of {BATCH_SIZE}.",
        f"{', '.join(LABELS.values())}.",
        f"Seeds: {', '.join(map(str, range(seeds)))}; {epochs} epochs; "
        "the same batches for all three; one thread.",
    )
    if quick:
        _say(f"This is the quick demo; without --quick: {SEEDS} seeds, {EPOCHS} epochs.")
    if output.replaced:
        _say(f"The earlier demo in {output.folder} was removed.")


def _train_all(output: Output, seeds: int, epochs: int) -> _Progress:
    from tqdm import tqdm

    progress = _Progress()
    runs = [
        (model, optimizer, seed)
        for model in MODELS
        for seed in range(seeds)
        for optimizer in OPTIMIZERS
    ]
    total = len(runs) * epochs * steps_per_epoch(load_split(0))
    # disable=None: no bar where the standard error is no terminal.
    with _one_thread(), _stopping() as check, tqdm(total=total, unit="step", disable=None) as bar:
        try:
            for model, optimizer, seed in runs:
                records: list[Record] = []

                def record(values: Record, records: list[Record] = records) -> None:
                    records.append(values)
                    bar.set_postfix_str(f"loss {values['train_loss']:.2g}", refresh=False)
                    try:
                        output.history.record(**values)
                    except OSError as error:
                        raise _cannot_write(output, error) from error

                def step() -> None:
                    check()
                    bar.update()

                bar.set_description(f"{model}, seed {seed}, {optimizer}")
                train(
                    model,
                    optimizer,
                    seed,
                    split=load_split(seed),
                    epochs=epochs,
                    on_record=record,
                    on_step=step,
                )
                progress.finished.append(RunSummary.of(records))
            check()
        except _Stop as stop:
            progress.stop = stop
    return progress


@contextmanager
def _one_thread() -> Iterator[None]:
    """These networks are too small for more, whose waiting would count as CPU seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _stopping() -> Iterator[Any]:
    """Within, the first SIGINT or SIGTERM waits for a call of what this gives, which raises.

    So no record, no file and no backward pass is cut in the middle. A second signal acts at once.
    A signal that is ignored (a job of nohup, say) stays so. Outside of the main thread, which alone
    gets signals, there is nothing to do.
    """
    caught: list[int] = []
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        restore()

    def check() -> None:
        if caught:
            name = signal.Signals(caught[0]).name
            raise _Stop(128 + caught[0], f"Interrupted by {name}")

    in_main = threading.current_thread() is threading.main_thread()
    try:
        for number in (signal.SIGINT, signal.SIGTERM) if in_main else ():
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, catch)
        yield check
    finally:
        restore()


def _cannot_write(output: Output, error: OSError) -> _Stop:
    return _Stop(1, f"Cannot write to {output.folder}: {error.strerror or error}")


def _environment() -> dict[str, Any]:
    return {
        "conjopt": conjopt.__version__,
        "torch": torch.__version__,
        "scikit-learn": version("scikit-learn"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": 1,
    }


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, width=80)


def _say(*lines: str) -> None:
    print(*lines, sep="\n", flush=True)
