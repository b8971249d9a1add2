"""Processes that begin with the libraries imported, and conjopt not yet."""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / ".mutation"
MEMORY = 8 * 2**30  # bytes; a mutant that asks for more fails
TIMERS = {signal.SIGALRM, signal.SIGPROF}
# What the tests import and does not import conjopt.
AHEAD = (
    "torch", "torch._dynamo", "pytest", "hypothesis.extra.numpy", "scipy.stats", "scipy.optimize",
    "scipy.integrate", "scipy.special", "scipy.linalg", "sklearn.linear_model", "entmax",
    "matplotlib.pyplot", "coverage",
)  # fmt: skip


def import_ahead() -> None:
    """Once here, rather than in each process."""
    for name in AHEAD:
        importlib.import_module(name)


def fork(work: Callable[[Path], Any], name: str) -> int:
    """Call `work(folder)` in a process of its own, and write what it returns to the folder."""
    folder = FOLDER / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        out = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream, file in ((0, os.open(os.devnull, os.O_RDONLY)), (1, out), (2, out)):
            os.dup2(file, stream)
        os.chdir(ROOT)
        sys.path.insert(0, str(ROOT))  # this checkout, wherever the package is installed from
        (folder / "result.json").write_text(json.dumps(work(folder)))
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
    finally:
        os._exit(0)


def result(name: str, status: int) -> dict[str, Any]:
    """What a process wrote; `ended` says how it ended if it wrote nothing."""
    file = FOLDER / "runs" / name / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    if not os.WIFSIGNALED(status):
        return {"ended": "error"}
    return {"ended": "timeout" if os.WTERMSIG(status) in TIMERS else "crash"}


def time_limit(seconds: float) -> None:
    """End this process after so many seconds of its own, or ten times as many of the clock."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.alarm(int(10 * seconds))


def each(
    tasks: list[tuple[str, Callable[[Path], Any]]],
    processes: int,
    done: Callable[[str, dict[str, Any]], None],
) -> None:
    """Run named tasks, some at a time; `done(name, result)` as each ends."""
    waiting, alive = list(tasks), {}
    try:
        while waiting or alive:
            while waiting and len(alive) < processes:
                name, work = waiting.pop(0)
                alive[fork(work, name)] = name
            pid, status = os.wait()
            done(alive[pid], result(alive.pop(pid), status))
    finally:
        for pid in alive:  # where the run was stopped
            os.killpg(pid, signal.SIGKILL)


def pytest_options(folder: Path) -> list[str]:
    return [
        *("-q", "--tb=short", "-p", "no:cacheprovider", f"--basetemp={folder}/tmp"),
        *("-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"),
    ]


def steady_hypothesis() -> None:
    """The same examples in each run; no shrinking, as the first failure is enough."""
    from hypothesis import Phase, settings

    phases = [Phase.explicit, Phase.generate]
    settings.register_profile(
        "mutation", deadline=None, derandomize=True, database=None, phases=phases
    )
    settings.load_profile("mutation")
