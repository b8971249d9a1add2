"""``conjopt report``: a run in sentences, as a page, and as it goes on."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from pathlib import Path

from conjopt.report.digest import Digest, run_file
from conjopt.report.html import page, run_name, write
from conjopt.report.lines import Lines, one_in
from conjopt.report.words import HINT, counted, headline, sentences

__all__ = ["ReportError", "run"]

POLL = 1.0  # seconds from one look at a growing file to the next
UNBROKEN = "\N{NO-BREAK SPACE}"  # of which none is left in text that is printed


class ReportError(Exception):
    """There is nothing to report on, for a reason that the message tells."""


def run(source: Path, *, html: Path | None = None, follow: bool = False) -> int:
    """Print where a run stands, and write its page.

    Args:
        source: a history, or a folder that holds one.
        html: the page to write; None for none.
        follow: whether to go on as the run does, until interrupted: each second in which the file
            grew gives a line and the page anew. A file that was cut or replaced is read anew.

    Returns:
        the exit status 0.

    Raises:
        ReportError: if there is no history, or it cannot be read.
        OSError: if the page or the standard output cannot be written.
        KeyboardInterrupt: what ends following.

    Example:
        >>> import tempfile
        >>> from conjopt.report import History
        >>> folder = Path(tempfile.mkdtemp())
        >>> with History(folder / "history.jsonl") as history:
        ...     history.record(step=1, loss=0.5)
        >>> run(folder, html=folder / "report.html")  # doctest: +ELLIPSIS
        1 record, steps 1 to 1.
        Loss 0.5 at step 1.
        The page is .../report.html.
        0
    """
    try:
        path = run_file(source)
        if html is not None and html.exists() and html.samefile(path):
            raise ReportError(f"--html {html}: is the history itself; give another file")
    except (OSError, ValueError) as error:
        raise _no_report(source, error) from error
    lines, found = _opened(path), Digest()
    try:
        _read(lines, found, growing=follow)
        _write(found, path, html)
        _say(*sentences(found))
        if not any(run.series for run in found.runs):
            _say(HINT)
        if html is not None:
            _say(f"The page is {html}.", width=None)
        if follow:
            _say(f"Following {path}; Ctrl-C ends it.", width=None)
            _follow(lines, found, html)
    finally:
        lines.close()
    return 0


def _follow(lines: Lines, found: Digest, html: Path | None) -> None:
    path = lines.path
    try:
        while True:
            time.sleep(POLL)
            before, run_before = found.records, found.latest
            skipped = run_before.skipped if run_before is not None else 0
            try:
                anew = lines.replaced
                if not anew:
                    _read(lines, found, growing=True)
            except ReportError:  # it was cut, and grew again since the last look
                anew = True
            if anew:
                _say("The file was cut or replaced; reading it anew.")
                lines.close()
                lines, found, before, skipped = _opened(path), Digest(), 0, 0
                _read(lines, found, growing=True)
            if found.records > before and found.latest is not None:
                latest = found.latest
                new = headline(latest, before=skipped if latest is run_before else 0)
                named = f"{latest.name}: " if latest.name else ""
                _say(f"{named}{new}; {counted(found.records - before, 'new record')}")
                _write(found, path, html)
    finally:
        lines.close()


def _opened(path: Path) -> Lines:
    try:
        return Lines(path, every=one_in(path))
    except (OSError, ValueError) as error:
        raise _no_report(path, error) from error


def _read(lines: Lines, found: Digest, *, growing: bool) -> None:
    try:
        for block in lines.blocks(growing=growing):
            found.add(block)
    except (OSError, ValueError) as error:
        raise _no_report(lines.path, error) from error
    found.cut, found.every = lines.cut and not growing, lines.every


def _write(found: Digest, path: Path, html: Path | None) -> None:
    if html is None:
        return
    try:
        write(page(found, run_name(path)), html)
    except OSError as error:
        # The name of a temporary file would tell nobody anything.
        raise OSError(error.errno, error.strerror or str(error), os.fspath(html)) from error


def _no_report(source: Path, error: Exception) -> ReportError:
    if isinstance(error, OSError):
        return ReportError(
            f"{source}: {error.strerror or error}; give a history that conjopt wrote, or a folder "
            "that holds one"
        )
    return ReportError(str(error))


def _say(*told: str, width: int | None = 100) -> None:
    """Print text of records without what a terminal would take for orders."""
    for text in told:
        kept = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
        encoding = sys.stdout.encoding or "utf-8"
        kept = kept.encode(encoding, "replace").decode(encoding)
        if width is not None:
            kept = kept.replace(" %", f"{UNBROKEN}%")  # a number and its % stay on one line
            kept = textwrap.fill(kept, width, break_long_words=False, break_on_hyphens=False)
            kept = kept.replace(UNBROKEN, " ")
        print(kept, flush=True)
