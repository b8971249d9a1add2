"""The lines of a history file: what each may hold, and how they are read as the file grows."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeAlias

__all__ = [
    "BLOCK",
    "HEADER",
    "NON_FINITE",
    "Lines",
    "Value",
    "check_header",
    "is_object",
    "one_in",
    "plain",
]

# A quoted union: Python 3.10 evaluates an alias even under postponed annotations.
Value: TypeAlias = "float | int | str | bool | None"

SCHEMA = "conjopt.history"
VERSION = 1
HEADER = json.dumps({"schema": SCHEMA, "version": VERSION}).encode() + b"\n"

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
NAMES = (b'nan"', b'inf"')  # in every line that has one of them

BLOCK = 1 << 20  # bytes that are read at once
LARGE = 200_000_000  # bytes that are read in a few seconds
LONGEST = 1 << 24  # bytes of a line; a history has none that long, and other files may


class Lines:
    r"""Reads a history file from its start, and on from there as often as it has grown.

    Memory does not grow with the file.

    Args:
        path: a regular file that `History` wrote.
        start: bytes to leave out, up to the end of some line; 0 for none.
        every: of the records of a block one in so many is parsed, and the last; see `one_in`.

    Attributes:
        every: as given.
        cut: whether the file ends in the middle of a line, as a crash leaves it, or, while the run
            goes on, a write that is under way.

    Raises:
        ValueError: if it is no regular file. While reading, if it is of another schema or version,
            or if a line other than a cut last one is no JSON object.
        OSError: if it cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_bytes(HEADER + b'{"step": 1}\n{"step": 2, "lo')
        >>> with Lines(path) as lines:
        ...     print(list(lines.blocks()), lines.cut)
        ...     with path.open("ab") as file:
        ...         _ = file.write(b'ss": "nan"}\n')
        ...     print(list(lines.blocks()), lines.cut)
        [[{'step': 1}]] True
        [[{'step': 2, 'loss': nan}]] False
    """

    def __init__(self, path: str | os.PathLike[str], start: int = 0, every: int = 1) -> None:
        self.path, self.every = Path(path), every
        # Asked before it is opened, as opening a pipe waits for its writer.
        if not stat.S_ISREG(os.stat(self.path).st_mode):
            kind = "a folder" if self.path.is_dir() else "no regular file"
            raise ValueError(f"{self.path} is {kind}; give the file that a History wrote")
        self._file: BinaryIO = self.path.open("rb")
        self._file.seek(start)
        self._number = int(start > 0)  # lines that were parsed, the header included
        self._rest = b""  # what was read of the line to come

    @property
    def cut(self) -> bool:
        """Whether the file, as far as it was read, ends within a line."""
        return bool(self._rest)

    @property
    def replaced(self) -> bool:
        """Whether the file was made shorter, or another stands in its place: read it anew."""
        mine = os.fstat(self._file.fileno())
        try:
            now = os.stat(self.path)
        except FileNotFoundError:
            return False  # between two files, perhaps
        another = (now.st_dev, now.st_ino) != (mine.st_dev, mine.st_ino)
        return another or mine.st_size < self._file.tell()

    def blocks(self, *, growing: bool = False) -> Iterator[list[dict[str, Value]]]:
        """The records since the last call, in lists of bounded size.

        Args:
            growing: whether a last line without its end is left for the next call even where it is
                a whole object.
        """
        while block := self._file.read(BLOCK):
            whole, end, rest = block.rpartition(b"\n")
            if not end:
                self._rest += block
                if not self._number and len(self._rest) > len(HEADER) + BLOCK:
                    check_header(self._rest, self.path)
                if len(self._rest) > LONGEST:
                    raise ValueError(
                        f"{self.path}, line {self._number + 1}: is longer than {LONGEST} bytes, "
                        "which no record is; the file was changed after it was written"
                    )
                continue
            lines = (self._rest + whole).split(b"\n")
            self._rest = rest
            if records := self._parse(lines):
                yield records
        # A file that ends within the header was cut before its first record.
        if not self._number and not HEADER.startswith(self._rest):
            check_header(self._rest, self.path)
        if not growing and self._number and is_object(self._rest):
            yield self._parse([self._rest])
            self._rest = b""

    def _parse(self, lines: list[bytes]) -> list[dict[str, Value]]:
        first = self._number
        if not first:
            check_header(lines[0], self.path)
            lines = lines[1:]
            first = 1
        self._number = first + len(lines)
        numbers: Sequence[int] = range(first + 1, self._number + 1)
        if self.every > 1 and lines:
            lines = [*lines[: -1 : self.every], lines[-1]]
            numbers = [*numbers[: -1 : self.every], numbers[-1]]
        try:
            # In one call, which takes half of the time of one for each line.
            joined = b"[" + b",".join(lines) + b"]"
            records = json.loads(joined)
        except (ValueError, RecursionError):
            records = []
        if len(records) != len(lines) or not all(type(record) is dict for record in records):
            records = [self._one(line, number) for line, number in zip(lines, numbers, strict=True)]
        if any(name in joined for name in NAMES):
            for record in records:
                for key, value in record.items():
                    if type(value) is str and value in NON_FINITE:
                        record[key] = NON_FINITE[value]
        return records

    def _one(self, line: bytes, number: int) -> dict[str, Value]:
        if not is_object(line):
            raise ValueError(
                f"{self.path}, line {number}: expected one JSON object, got {line[:60]!r}; "
                "the file was changed after it was written"
            )
        record: dict[str, Value] = json.loads(line)
        return record

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Lines:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def one_in(path: str | os.PathLike[str]) -> int:
    """How many records of a file to take one of, so that reading it takes seconds.

    Args:
        path: of a history.

    Returns:
        1 up to 200 MB, which are some 200,000 records of a `ConjSGD` or 2,000,000 of a short loop.

    Raises:
        OSError: if there is nothing at the path.

    Example:
        >>> one_in(os.devnull)
        1
    """
    return 1 + os.stat(path).st_size // LARGE


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


def is_object(line: bytes) -> bool:
    """Whether a line is one JSON object.

    Example:
        >>> is_object(b'{"step": 1}'), is_object(b'{"step": 1')
        (True, False)
    """
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def check_header(line: bytes, path: str | os.PathLike[str]) -> None:
    """Refuse a file whose first line is not that of this schema and version.

    Raises:
        ValueError: if it is another.
    """
    header = json.loads(line) if is_object(line) else {}
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
