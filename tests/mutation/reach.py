"""Which tests reach which line, and how long each takes.

Each file of tests runs once under coverage with the test's name as the context. The results lie in
`.mutation/reach`, one file for each, and are measured again when the tests or the source change.
"""

from __future__ import annotations

import ast
import json
import re
import time
from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Any

from forks import FOLDER, ROOT, each, import_ahead, pytest_options, steady_hypothesis
from texts import PACKAGES, digest, sources, text

FOLDERS = ("tests", "tests/guarantees", "tests/regularizers", "tests/torch_features")
# Left out: tests of commands, pages and examples, which run other processes or all there is; tests
# of several processes, which would not see a mutant; and what takes too long for what it adds.
LEFT_OUT = {
    "test_cli", "test_demo", "test_docs", "test_examples", "test_import", "test_graph_capture",
    "test_accelerate", "test_compile", "test_copies", "test_distributed_checkpoint",
    "test_distributed_compile", "test_distributed_data_parallel", "test_distributed_grad_scaler",
    "test_fully_shard", "test_gpu", "test_lightning",
    "test_out_of_memory_on_a_rank", "test_soak", "test_tensorboard", "test_transformers",
}  # fmt: skip
OF_PROCESSES = {"two", "three"}  # fixtures
PLACE = FOLDER / "reach"


def units() -> dict[str, list[str]]:
    """The files of each part: one file of tests, or the docstrings of a package."""
    found = {f"docstrings_{p}": list(sources(p)) for p in PACKAGES}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).glob("test_*.py")):
            if path.stem not in LEFT_OUT:
                found[path.stem] = [str(path.relative_to(ROOT))]
    return found


class Recorder:
    """A pytest plugin that names the test to coverage, and keeps times and failures."""

    def __init__(self, coverage: Any):
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.bad: set[str] = set()

    def pytest_collection(self) -> None:
        steady_hypothesis()  # after conftest.py, which loads a profile of its own

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        items[:] = [i for i in items if not OF_PROCESSES & set(getattr(i, "fixturenames", ()))]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)
        self.start = time.process_time()  # others may use the machine

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.outcome != "passed":
            self.bad.add(report.nodeid)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] = round(time.process_time() - self.start, 4)
        self.coverage.switch_context("")


def record(names: list[str], folder: Path) -> dict[str, Any]:
    """Run the tests of some files in this process."""
    import coverage
    import pytest

    measured = coverage.Coverage(
        data_file=None, config_file=False, source=[f"conjopt/{name}" for name in PACKAGES]
    )
    recorder = Recorder(measured)
    measured.start()
    code = pytest.main([*pytest_options(folder), *names], plugins=[recorder])
    measured.stop()
    if code not in (0, 1, 5):
        raise RuntimeError(f"pytest ended with {code}")
    data = measured.get_data()
    lines = {
        str(Path(file).relative_to(ROOT)): {
            line: [n for n in tests if n and n not in recorder.bad]
            for line, tests in data.contexts_by_lineno(file).items()
        }
        for file in data.measured_files()
    }
    seconds = {k: v for k, v in recorder.seconds.items() if k not in recorder.bad}
    return {"seconds": seconds, "lines": lines, "bad": sorted(recorder.bad)}


def state(names: list[str]) -> str:
    return digest(*(text(name) for name in names), *(text(p) for q in PACKAGES for p in sources(q)))


def update(processes: int) -> None:
    """Measure what has changed since the last time."""
    PLACE.mkdir(parents=True, exist_ok=True)
    todo = {}
    for name, files in units().items():
        file = PLACE / f"{name}.json"
        if not file.exists() or json.loads(file.read_text())["state"] != state(files):
            todo[name] = files
    if not todo:
        return
    print(f"the tests that reach each line: {len(todo)} files to run", flush=True)
    import_ahead()

    def done(name: str, found: dict[str, Any]) -> None:
        if "ended" in found:
            raise SystemExit(f"{name}: {found['ended']}; see {FOLDER}/runs/{name}")
        found["state"] = state(todo[name])
        (PLACE / f"{name}.json").write_text(json.dumps(found))
        bad = f", {len(found['bad'])} skipped or failed" if found["bad"] else ""
        print(f"  {name}: {len(found['seconds'])} tests{bad}", flush=True)

    each([(n, lambda at, files=f: record(files, at)) for n, f in todo.items()], processes, done)


class Reach:
    """The tests of a line, in the order in which they are tried."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.width: dict[str, int] = defaultdict(int)  # the lines a test reaches
        for name in units():
            if not (PLACE / f"{name}.json").exists():
                continue
            found = json.loads((PLACE / f"{name}.json").read_text())
            self.seconds |= found["seconds"]
            for path, of_file in found["lines"].items():
                for line, tests in of_file.items():
                    self.lines[path][int(line)].update(tests)
                    for test in tests:
                        self.width[test] += 1

    def _between(self, path: str, first: int, last: int) -> set[str]:
        """What runs in functions: the rest runs on import, in whichever test comes first."""
        of_file, bodies = self.lines.get(path, {}), _bodies(path)
        return set().union(
            *(tests for n, tests in of_file.items() if first <= n <= last and n in bodies)
        )

    def of_line(self, path: str, line: int) -> set[str]:
        """The tests that run the statement; what encloses it where that runs on import."""
        for first, last in _around(path, line):
            if found := self._between(path, first, last):
                return found
        if found := self._between(path, 1, 10**6):
            return found
        folder = re.match("[^/]*/[^/]*/", path)[0]  # the package, as for constants
        return set().union(
            *(self._between(p, 1, 10**6) for p in self.lines if p.startswith(folder))
        )

    def chosen(self, path: str, line: int, limit: float) -> list[tuple[str, float]]:
        """As many tests as `limit` seconds allow, files of narrow tests first.

        Half of the time goes to the three narrowest files, the rest to the fastest tests of all.
        """
        fastest = sorted(self.of_line(path, line), key=lambda t: (self.seconds[t], t))
        by_file: dict[str, list[str]] = defaultdict(list)
        for test in fastest:
            by_file[test.partition("::")[0]].append(test)
        width = {f: sum(self.width[t] for t in tests) / len(tests) for f, tests in by_file.items()}
        files = sorted(by_file, key=width.__getitem__)
        chosen: set[str] = set()
        narrow = [t for t in fastest if t.partition("::")[0] in files[:3]]
        for tests, until in ((narrow, limit / 2), (fastest, 0.0)):
            for test in tests:
                if test in chosen:
                    continue
                if limit - self.seconds[test] < until and chosen:
                    break
                limit -= self.seconds[test]
                chosen.add(test)
        return [(t, self.seconds[t]) for f in files for t in by_file[f] if t in chosen]


@lru_cache
def _bodies(path: str) -> set[int]:
    """The lines of the bodies of functions."""
    functions = (n for n in ast.walk(ast.parse(text(path))) if isinstance(n, ast.FunctionDef))
    return {n for f in functions for n in range(f.body[0].lineno, (f.end_lineno or 0) + 1)}


@lru_cache
def _statements(path: str) -> list[tuple[int, int, int]]:
    """First and last line of the statements, and the last one that is theirs alone."""
    found = []
    for node in ast.walk(ast.parse(text(path))):
        if not isinstance(node, ast.stmt):
            continue
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        body = getattr(node, "body", None)
        own = body[0].lineno - 1 if body else node.end_lineno
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own = node.end_lineno  # whose head runs on import: what runs in the body counts
        found.append((first, node.end_lineno, own))
    return found


def _around(path: str, line: int) -> list[tuple[int, int]]:
    """The statements around a line, innermost first: the lines whose tests count."""
    around = [s for s in _statements(path) if s[0] <= line <= s[1]]
    around.sort(key=lambda s: s[1] - s[0])
    return [(first, max(own, line)) for first, _, own in around]
