"""The command ``conjopt``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import conjopt

__all__ = ["main"]

FAILED = 1  # a file or the standard output could not be written
USAGE = 2  # wrong arguments, an extra that is not installed, a folder that cannot be used
INTERRUPTED = 130  # 128 + SIGINT
BROKEN_PIPE = 141  # 128 + SIGPIPE, as for any command that `head` cuts off

DEMO = """\
Train an MLP and a small CNN on scikit-learn's bundled digits by ConjSGD at its defaults, by
SGD(momentum 0.9, lr 0.1) and by AdamW(lr 3e-3), from the same initialisations and on the same
batches, and print what each of them reached and at what cost.
"""

DEMO_EPILOG = """\
exit status: 0 done; 1 a file or the standard output could not be written; 2 wrong usage, a missing
extra or an unusable --out; 130 interrupted (Ctrl-C); 141 the reader of the standard output went
away; 143 terminated. Whatever ends the command, metrics.jsonl holds what was recorded until then.
"""


REPORT = """\
Say in a few sentences where a run stands: its loss, its step size and what limits it, steps that
were skipped, conditions that fail, and numbers that are not finite. RUN is a history that
ConjSGD(..., history=...) or conjopt.report.History wrote, or a folder that holds history.jsonl,
metrics.jsonl or one other *.jsonl.
"""

REPORT_EPILOG = """\
exit status: 0 done; 1 the page or the standard output could not be written; 2 wrong usage, or RUN
is no history; 130 interrupted (Ctrl-C, as ends --follow); 141 the reader of the standard output
went away. A page appears whole or not at all.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments after the command's name; those of the process if None.

    Returns:
        the exit status: 0 done, 1 output could not be written, 2 wrong usage, a missing extra, an
        unusable folder or no history, 130 interrupted, 141 the reader of the standard output went
        away, 143 terminated.

    Example:
        >>> main(["demo", "--epochs", "0"])
        2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        _drop_stdout()
        return BROKEN_PIPE
    except KeyboardInterrupt:
        return INTERRUPTED
    except OSError as error:
        _drop_stdout()
        return _complain(f"{error.filename or 'standard output'}: {error.strerror}", FAILED)
    return status


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError(
            "expected a folder, got nothing; use . for the current one"
        )
    return Path(text)


def _file(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("expected a file, got nothing; use report.html, say")
    return Path(text)


def _run(arguments: list[str]) -> int:
    try:
        options = _parser().parse_args(arguments)
    except SystemExit as end:  # after --help and --version too
        return int(end.code or 0)
    # Imported here, so that --help answers at once.
    if options.command == "report":
        from conjopt.report.command import ReportError, run

        try:
            return run(options.run, html=options.html, follow=options.follow)
        except ReportError as error:
            return _complain(str(error), USAGE)
    from conjopt.demo.command import DemoError
    from conjopt.demo.command import run as run_demo

    try:
        return run_demo(
            out=options.out,
            quick=options.quick,
            seeds=options.seeds,
            epochs=options.epochs,
            command=shlex.join(["conjopt", *arguments]),
        )
    except DemoError as error:
        return _complain(str(error), USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conjopt",
        description="An SGD wrapper for PyTorch that sets its own step size, and says why.",
    )
    parser.add_argument("--version", action="version", version=f"conjopt {conjopt.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="train on real digits beside SGD and AdamW; a few minutes",
        description=DEMO,
        epilog=DEMO_EPILOG,
    )
    demo.add_argument(
        "--out",
        metavar="DIR",
        type=_folder,
        help="write metrics.jsonl, summary.json, plot.png and report.html there, in place of an "
        "earlier demo's; without it nothing is written",
    )
    demo.add_argument("--quick", action="store_true", help="less of it, within a minute")
    demo.add_argument("--seeds", metavar="N", type=_count, help="seeds 0 to N-1 (3; quick: 1)")
    demo.add_argument("--epochs", metavar="N", type=_count, help="epochs of a run (30; quick: 10)")
    report = commands.add_parser(
        "report",
        help="say where a recorded run stands, and write a page of it",
        description=REPORT,
        epilog=REPORT_EPILOG,
    )
    report.add_argument("run", metavar="RUN", type=_folder, help="a history, or its folder")
    report.add_argument(
        "--html",
        metavar="FILE",
        type=_file,
        help="write a page of charts there, in place of what is there; it needs no network",
    )
    report.add_argument(
        "--follow",
        action="store_true",
        help="go on as the run does: a line and the page anew each second in which it recorded, "
        "until Ctrl-C",
    )
    return parser


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return count


def _complain(message: str, status: int) -> int:
    print(f"conjopt: error: {message}", file=sys.stderr)
    return status


def _drop_stdout() -> None:
    """Send what is still buffered nowhere, or the interpreter would try and fail at its end."""
    with contextlib.suppress(OSError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
