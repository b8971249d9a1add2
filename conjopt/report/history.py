"""Records of a run as JSON lines that survive a crash."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import weakref
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

from conjopt.report.lines import (
    BLOCK,
    HEADER,
    NON_FINITE,
    Lines,
    Value,
    check_header,
    is_object,
    plain,
)

__all__ = ["History", "Value", "plain"]


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
            Also if the path is empty.
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
        if path is not None and not os.fspath(path):
            raise ValueError(
                "got an empty path for a history; give a file, such as run/history.jsonl, or None"
            )
        self.path = None if path is None else Path(path)
        self._records: list[dict[str, Value]] = []  # those of a file are in the file alone
        self._closed = False
        self._file: FileIO | None = None
        self._start: int | None = None  # bytes of the file that were there before; None of a pipe
        if self.path is not None:
            if self.path.is_dir():
                why = f"{os.strerror(errno.EISDIR)}; give a file, such as history.jsonl in it"
                raise IsADirectoryError(errno.EISDIR, why, os.fspath(self.path))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that a failed write leaves nothing behind to be written at closing.
            self._file = FileIO(self.path, "ab")
            try:
                self._prepare()
            except BaseException:
                self._file.close()
                raise
            # One that nobody closes, such as an optimizer's, is closed with what held it.
            weakref.finalize(self, self._file.close)

    @property
    def records(self) -> list[dict[str, Value]]:
        """The records made through this object, in order, without those it found in the file.

        Those of a file are read back from it, as memory does not grow with a run; a pipe or a
        device gives none back.

        Raises:
            OSError: if the file cannot be read any more.

        Example:
            >>> history = History()
            >>> history.record(step=1, loss=0.5)
            >>> history.records
            [{'step': 1, 'loss': 0.5}]
        """
        if self._file is None:
            return [dict(record) for record in self._records]
        if self.path is None or self._start is None:
            return []
        with Lines(self.path, self._start) as lines:
            return [record for block in lines.blocks() for record in block]

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
        else:
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
        return list(History.iterate(path))

    @staticmethod
    def iterate(path: str | os.PathLike[str]) -> Iterator[dict[str, Value]]:
        """The records of a file one by one, in memory that does not grow with it.

        Args:
            path: see `read`, as for what is raised.

        Example:
            >>> import tempfile
            >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
            >>> with History(path) as history:
            ...     for step in range(1000):
            ...         history.record(step=step)
            >>> sum(record["step"] for record in History.iterate(path))
            499500
        """
        with Lines(path) as lines:
            for block in lines.blocks():
                yield from block

    def _prepare(self) -> None:
        """Write the header, or make sure that the file is one to append to."""
        assert self.path is not None
        assert self._file is not None
        if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            self._write(HEADER)  # a pipe or a device: nothing to read back
            return
        self._start = self._end_of_whole_lines()
        os.ftruncate(self._file.fileno(), self._start)
        if not self._start:
            self._write(HEADER)
            self._start = len(HEADER)

    def _end_of_whole_lines(self) -> int:
        """Bytes of the lines there are, to which a whole last one without its end is made one.

        Memory does not grow with the file.
        """
        assert self.path is not None
        with self.path.open("rb") as file:
            first = file.read(BLOCK)
            if len(first) < len(HEADER) and HEADER.startswith(first):
                return 0
            check_header(first.partition(b"\n")[0], self.path)
            size = end = file.seek(0, os.SEEK_END)
            last = b""
            while end and b"\n" not in last:
                start = max(end - BLOCK, 0)
                file.seek(start)
                last = file.read(end - start) + last
                end = start
        last = last.rpartition(b"\n")[2]
        if is_object(last):
            self._write(b"\n")
            return size + 1
        return size - len(last)

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
