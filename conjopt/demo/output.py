"""The folder that the demo writes, in such a way that it never holds parts of two runs."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from conjopt.report import History, plot_runs, write_html
from conjopt.report.history import Value, plain

__all__ = ["DemoError", "Output"]

METRICS, SUMMARY, PLOT, PAGE = "metrics.jsonl", "summary.json", "plot.png", "report.html"
# What tells the demo's records from those of another history.
KEYS = {"model", "optimizer", "seed", "epoch", "train_loss"}


class DemoError(Exception):
    """The demo cannot start, for a reason that the message tells."""


class Output:
    """Where the demo records, a folder or nowhere.

    An earlier demo's files are removed at the start, all four; anything else is left alone.

    Args:
        folder: made if it is not there; None keeps the records in memory only.

    Attributes:
        replaced: whether an earlier demo's files were removed.

    Raises:
        DemoError: if the folder cannot be written, or if it holds files of the demo's names that
            the demo did not write.

    Example:
        >>> output = Output(None)
        >>> output.history.record(step=1)
        >>> output.write_summary({"runs": []})
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.replaced = False
        if folder is None:
            self.history = History()
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.replaced = _clear(folder)
            self.history = History(folder / METRICS)
        except OSError as error:
            raise DemoError(
                f"--out {folder}: {error.strerror or error}; give a folder that can be written"
            ) from error

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json``, whole or not at all.

        Args:
            summary: mappings, sequences, dataclasses and scalars.

        Raises:
            OSError: if it cannot be written.
        """
        if self.folder is None:
            return
        path = self.folder / SUMMARY
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            text = json.dumps(_jsonable(summary), indent=2, allow_nan=False, ensure_ascii=False)
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def write_plot(self, targets: Sequence[float]) -> None:
        """Write ``plot.png``, whole or not at all; nothing if there is no record.

        Args:
            targets: training losses to mark.

        Raises:
            OSError: if it cannot be written.
        """
        if self.folder is not None and (records := self.history.records):
            plot_runs(records, self.folder / PLOT, targets=targets)

    def write_page(self) -> None:
        """Write ``report.html``, whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        if self.folder is not None:
            write_html(self.history, self.folder / PAGE, title="conjopt demo")


def _clear(folder: Path) -> bool:
    """Remove an earlier demo's files; whether there were any."""
    there = [name for name in (METRICS, SUMMARY, PLOT, PAGE) if os.path.lexists(folder / name)]
    if there and not _is_demo(folder / METRICS):
        raise DemoError(
            f"--out {folder}: holds {', '.join(there)}, which this command did not write; give "
            "another folder, or move what is there"
        )
    for name in there:
        (folder / name).unlink()
    return bool(there)


def _is_demo(path: Path) -> bool:
    try:
        records = History.read(path)
    except (OSError, ValueError):
        return False
    return all(record.keys() >= KEYS for record in records)


def _jsonable(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {
            f"{key:g}" if isinstance(key, float) else str(key): _jsonable(item)
            for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    scalar: Value = value
    return plain(scalar)
