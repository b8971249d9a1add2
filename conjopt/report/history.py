"""Records of a run as JSON lines that survive a crash."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

__all__ = ["History", "Value", "plain"]

# A quoted union: Python 3.10 evaluates an alias even under postponed annotations.
Value: TypeAlias = "float | int | str | bool | None"

SCHEMA = "conjopt.history"
VERSION = 1
HEADER = json.dumps({"schema": SCHEMA, "version": VERSION}).encode() + b"\n"

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class History:
    """Append-only records of a run, one JSON object on a line, on disk as soon as recorded.

    JSON has no NaN and no infinities: they are written as the strings ``"nan"``, ``"inf"`` and
    ``"-inf"`` and read back as floats, so these three strings are refused as values. The first
    line of a file names the schema and its version. A file that a crash cut in the middle of its
    last line is read up to that line, and appended to after the fragment is dropped.

    Args:
        path: the file, appended to if it is there already; its folder is made. None keeps the
            records in memory only.

    Raises:
        ValueError: if the file is there but is no history of this version. It is left untouched.
        OSError: if the file cannot be opened or written.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "run" / "metrics.jsonl"
        >>> with History(path) as history:
        ...     history.record(step=1, loss=2.5)
        ...     history.record(step=2, loss=float("inf"))
        >>> print(path.read_text(), end="")
        {"schema": "conjopt.history", "version": 1}
        {"step": 1, "loss": 2.5}
        {"step": 2, "loss": "inf"}
        >>> History.read(path)
        [{'step': 1, 'loss': 2.5}, {'step': 2, 'loss': inf}]
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._records: list[dict[str, Value]] = []
        self._closed = False
        self._file: FileIO | None = None
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a failed write leaves nothing behind to be written at closing.
            self._file = FileIO(self.path, "ab")
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise

    @property
    def records(self) -> list[dict[str, Value]]:
        """The records made through this object, in order, without those it found in the file.

        Example:
            >>> history = History()
            >>> history.record(step=1, loss=0.5)
            >>> history.records
            [{'step': 1, 'loss': 0.5}]
        """
        return [dict(record) for record in self._records]

    def record(self, /, **values: Any) -> None:
        """Append one record, and flush it.

        Args:
            values: numbers, strings, booleans, None, or tensors, arrays and numpy scalars of no
                dimension, which become numbers.

        Raises:
            TypeError: if a value is of another kind. Nothing is recorded then.
            ValueError: if a value is one of the strings that stand for non-finite numbers, or if
                the history is closed.
            OSError: if the line cannot be written (a full disk, for one). The file then ends with
                the last whole record.

        Example:
            >>> import torch
            >>> history = History()
            >>> history.record(loss=torch.tensor(0.5), rule="edge", accuracy=None)
            >>> history.record(gradient=torch.zeros(3))
            Traceback (most recent call last):
                ...
            TypeError: history value 'gradient': expected a number, a string, a bool, None or a
            tensor of no dimension, got a Tensor of shape (3,); record a number made of it, such as
            its norm
        """
        if self._closed:
            raise ValueError("the history is closed; open another one on the same path to append")
        record = {key: _scalar(key, value) for key, value in values.items()}
        if self._file is not None:
            line = json.dumps({key: plain(value) for key, value in record.items()}, allow_nan=False)
            self._write(line.encode() + b"\n")
        self._records.append(record)

    def close(self) -> None:
        """Close the file; closing twice is harmless.

        Example:
            >>> history = History()
            >>> history.close()
            >>> history.record(step=1)
            Traceback (most recent call last):
                ...
            ValueError: the history is closed; open another one on the same path to append
        """
        self._closed = True
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> History:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @staticmethod
    def read(path: str | os.PathLike[str]) -> list[dict[str, Value]]:
        """The records of a file, in order.

        Args:
            path: a file that `History` wrote. A last line without its end is dropped unless it is
                whole, as a crash may have cut it.

        Returns:
            one dict per record, non-finite numbers as floats.

        Raises:
            ValueError: if the file is of another schema or version, or if a line other than a cut
                last one is no JSON object.
            OSError: if the file cannot be read.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
            >>> with History(path) as history:
            ...     history.record(step=1)
            ...     history.record(step=2)
            >>> _ = path.write_bytes(path.read_bytes()[:-4])
            >>> History.read(path)
            [{'step': 1}]
        """
        content = Path(path).read_bytes()
        if HEADER.startswith(content):
            return []  # cut before the first record
        lines = content.split(b"\n")
        _check_header(lines[0], path)
        last = lines.pop()
        records = [_parse(line, number, path) for number, line in enumerate(lines[1:], start=2)]
        if _is_object(last):
            records.append(_parse(last, len(lines) + 1, path))
        return records

    def _prepare(self) -> None:
        """Write the header, or make sure that the file is one to append to."""
        assert self.path is not None
        assert self._file is not None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._write(HEADER)  # a pipe or a device: nothing to read back
            return
        content = self.path.read_bytes()
        if HEADER.startswith(content) and content != HEADER:
            os.ftruncate(self._file.fileno(), 0)
            self._write(HEADER)
            return
        _check_header(content.split(b"\n", 1)[0], self.path)
        whole, _, last = content.rpartition(b"\n")
        if _is_object(last):
            self._write(b"\n")
        elif last:
            os.ftruncate(self._file.fileno(), len(whole) + 1)

    def _write(self, line: bytes) -> None:
        assert self._file is not None
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            if written:
                with contextlib.suppress(OSError):
                    size = os.fstat(self._file.fileno()).st_size
                    os.ftruncate(self._file.fileno(), size - written)
            raise


def plain(value: Value) -> Value:
    """A value as JSON can hold it: non-finite floats become strings.

    Args:
        value: a number, a string, a bool or None.

    Returns:
        ``"nan"``, ``"inf"`` or ``"-inf"`` for these floats, else the value.

    Example:
        >>> plain(0.5), plain(float("-inf"))
        (0.5, '-inf')
    """
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _scalar(key: str, value: object) -> Value:
    """The Python scalar that a recorded value is."""
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, str):
        if value in NON_FINITE:
            raise ValueError(
                f"history value {key!r}: the string {value!r} stands for a number in a history; "
                f"pass float({value!r}) or another string"
            )
        return str(value)
    shape = getattr(value, "shape", None)
    what = type(value).__name__ + (f" of shape {tuple(shape)}" if shape else "")
    raise TypeError(
        f"history value {key!r}: expected a number, a string, a bool, None or a tensor of no "
        f"dimension, got a {what}; record a number made of it, such as its norm"
    )


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _check_header(line: bytes, path: str | os.PathLike[str]) -> None:
    header = json.loads(line) if _is_object(line) else {}
    if header.get("schema") != SCHEMA:
        raise ValueError(
            f"{os.fspath(path)} is no history: its first line should be {HEADER.decode().strip()}; "
            "give the path of a file that conjopt wrote, or of a new one"
        )
    if header.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)} is a history of version {header.get('version')!r}, and this "
            f"conjopt knows version {VERSION}; use the conjopt that wrote it, or a newer one"
        )


def _parse(line: bytes, number: int, path: str | os.PathLike[str]) -> dict[str, Value]:
    if not _is_object(line):
        raise ValueError(
            f"{os.fspath(path)}, line {number}: expected one JSON object, got {line[:60]!r}; "
            "the file was changed after it was written"
        )
    record: dict[str, Value] = json.loads(line)
    return {
        key: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for key, value in record.items()
    }
