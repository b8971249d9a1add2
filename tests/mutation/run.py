"""Mutation testing: change one place of the source, and see whether a test fails.

    python tests/mutation/run.py [PACKAGE ...] [--count N] [--processes N] [--again] [--report]

Each mutant is imported in a process of its own, which runs the tests that reach the changed line
until one fails. The results are in a session of cosmic-ray for each package (`cr-report` and
`cr-html` read it), so that a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import TestOutcome, WorkerOutcome, WorkItem, WorkResult
from forks import FOLDER, ROOT, each, import_ahead, pytest_options, steady_hypothesis, time_limit
from mutants import Mutant, draw
from reach import Reach, update
from texts import PACKAGES, digest, text

PAGE = ROOT / "docs" / "mutation.md"
REST = 60  # seconds for what is not a test: imports, collection
NOT_KILLED = ("survived", "error")


class Mutated(MetaPathFinder):
    """Import one module from a changed source."""

    def __init__(self, path: str, source: str):
        parts = Path(path).with_suffix("").parts
        self.package = parts[-1] == "__init__"
        self.name = ".".join(parts[:-1] if self.package else parts)
        self.file = str(ROOT / path)
        self.code = compile(source, self.file, "exec", dont_inherit=True)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        code = self.code

        class Loader(SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return code

        return importlib.util.spec_from_file_location(
            name,
            self.file,
            loader=Loader(name, self.file),
            submodule_search_locations=[str(Path(self.file).parent)] if self.package else None,
        )


class Chosen:
    """A pytest plugin that runs the chosen tests in their order, each within a time."""

    def __init__(self, tests: list[tuple[str, float]]):
        self.seconds = dict(tests)
        self.failed: list[str] = []
        self.ran = 0

    def pytest_collection(self) -> None:
        steady_hypothesis()

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in self.seconds if name in found]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.ran += 1
        time_limit(20 + 5 * self.seconds[nodeid])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        time_limit(REST)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)

    pytest_collectreport = pytest_runtest_logreport


def run_tests(tests: list[tuple[str, float]], folder: Path, stop: bool = True) -> dict[str, Any]:
    """Run tests in this process: those of three files first, as many files take long to collect."""
    import pytest

    files = list(dict.fromkeys(name.partition("::")[0] for name, _ in tests))
    ran, failed, codes = 0, [], set()
    for part in (files[:3], files[3:]):
        if not part:
            continue
        plugin = Chosen([test for test in tests if test[0].partition("::")[0] in part])
        time_limit(REST)
        options = pytest_options(folder) + ["-x"] * stop
        codes.add(int(pytest.main([*options, *part], plugins=[plugin])))
        ran, failed = ran + plugin.ran, failed + plugin.failed
        if failed and stop:
            break
    return {"codes": sorted(codes), "ran": ran, "failed": failed}


def try_mutant(mutant: Mutant, tests: list[tuple[str, float]], folder: Path) -> dict[str, Any]:
    """What the forked process of a mutant does."""
    finder = Mutated(mutant.path, mutant.source())
    sys.meta_path.insert(0, finder)
    time_limit(REST)
    try:
        importlib.import_module(finder.name)
    except Exception as error:
        return {"codes": [], "ran": 0, "failed": [f"import: {error!r}"]}
    return run_tests(tests, folder)


def judge(found: dict[str, Any], count: int) -> str:
    """Killed (by a failure, its time or a crash), survived, or an error that says nothing."""
    if "ended" in found:
        return found["ended"]
    if found["failed"]:
        return "killed"
    # All the tests ran and passed; else one of the map is not there any more.
    return "survived" if found["codes"] in ([0], []) and found["ran"] == count else "error"


def results_of(package: str) -> dict[str, dict[str, Any]]:
    session = FOLDER / f"{package}.sqlite"
    if not session.exists():
        return {}
    with use_db(session) as database:
        pairs = database.completed_work_items
    return {item.job_id: json.loads(result.output) for item, result in pairs}


def as_result(mutant: Mutant, found: dict[str, Any]) -> WorkResult:
    outcomes = {"survived": TestOutcome.SURVIVED, "error": TestOutcome.INCOMPETENT}
    failed = found["how"] == "error"
    return WorkResult(
        worker_outcome=WorkerOutcome.EXCEPTION if failed else WorkerOutcome.NORMAL,
        test_outcome=outcomes.get(found["how"], TestOutcome.KILLED),
        output=json.dumps(found),
        diff=f"{mutant.path}:{mutant.line}\n- {mutant.before}\n+ {mutant.after}",
    )


def prepare(package: str, mutants: list[Mutant], again: bool) -> list[Mutant]:
    """Write the session of these mutants with the results that still hold; return the others."""
    kept, old, known = {}, results_of(package), explained()
    for mutant in mutants:
        found = old.get(mutant.key)
        if found is None or found["source"] != digest(text(mutant.path)):
            continue
        retry = again and known.get(mutant.key) != "equivalent"
        if found["how"] not in ("error", "survived") or (found["how"] == "survived" and not retry):
            kept[mutant.key] = found
    session = FOLDER / f"{package}.sqlite"
    new = session.with_suffix(".new")
    new.unlink(missing_ok=True)
    with use_db(new) as database:
        database.add_work_items([WorkItem.single(m.key, m.spec) for m in mutants])
        for mutant in mutants:
            if mutant.key in kept:
                database.set_result(mutant.key, as_result(mutant, kept[mutant.key]))
    os.replace(new, session)
    return [mutant for mutant in mutants if mutant.key not in kept]


def run(package: str, mutants: list[Mutant], reach: Reach, args: argparse.Namespace) -> None:
    """Try the mutants, and keep each result as it comes."""
    import_ahead()
    by_key = {mutant.key: mutant for mutant in mutants}
    tests = {m.key: reach.chosen(m.path, m.line, args.seconds) for m in mutants}
    start, number = time.monotonic(), 0

    def done(key: str, found: dict[str, Any]) -> None:
        nonlocal number
        mutant, number = by_key[key], number + 1
        found["how"] = judge(found, len(tests[key]))
        found |= {"source": digest(text(mutant.path)), "tests": len(tests[key])}
        with use_db(FOLDER / f"{package}.sqlite") as database:
            database.set_result(key, as_result(mutant, found))
        if found["how"] not in NOT_KILLED:
            shutil.rmtree(FOLDER / "runs" / key)
        print(
            f"{time.monotonic() - start:6.0f} s {number:4}/{len(mutants)} {key} {found['how']:8} "
            f"{mutant.path}:{mutant.line}: {mutant.after.partition(chr(10))[0]}",
            flush=True,
        )

    each([(k, lambda at, m=m: try_mutant(m, tests[m.key], at)) for k, m in by_key.items()],
         args.processes, done)  # fmt: skip


def check(results: list[dict[str, Any]], reach: Reach) -> list[str]:
    """Those of the tests that killed which fail without a mutant too: they say nothing."""
    names = {name for found in results for name in found.get("failed", ()) if name in reach.seconds}
    tests = sorted((name, reach.seconds[name]) for name in names)
    ended: list[dict[str, Any]] = []
    each(
        [("check", lambda at: run_tests(tests, at, stop=False))],
        1,
        lambda _, found: ended.append(found),
    )
    if ended[0].get("ran") != len(tests):
        raise SystemExit(f"the tests without a mutant: {ended[0]}; see {FOLDER}/runs/check")
    return ended[0]["failed"]


def explained() -> dict[str, str]:
    """The survivors of docs/mutation.md, and whether they are equivalent to the code."""
    page = PAGE.read_text(encoding="utf-8") if PAGE.exists() else ""
    return dict(re.findall(r"^\| `([0-9a-f]{8})` \| (equivalent|left) \|", page, re.MULTILINE))


def table(mutants: list[Mutant], results: dict[str, dict[str, Any]]) -> int:
    """Print the results; the number of packages below nine tenths and survivors not explained."""
    known, bad = explained(), 0
    print(
        "\n| package | mutants | killed | by time | equivalent | left | killed, % | of others, % |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for package in dict.fromkeys(m.package for m in mutants):
        keys = [m.key for m in mutants if m.package == package and m.key in results]
        hows = {key: results[key]["how"] for key in keys if results[key]["how"] != "error"}
        survived = [key for key, how in hows.items() if how == "survived"]
        same = sum(known.get(key) == "equivalent" for key in survived)
        killed = len(hows) - len(survived)
        share = 100 * killed / max(1, len(hows) - same)
        bad += share < 90
        print(
            f"| `{package}` | {len(hows)} | {killed} | {list(hows.values()).count('timeout')} "
            f"| {same} | {len(survived) - same} | {100 * killed / max(1, len(hows)):.0f} "
            f"| {share:.0f} |"
        )
    for mutant in mutants:
        found = results.get(mutant.key, {"how": "not run"})
        if found["how"] not in (*NOT_KILLED, "not run"):
            continue
        bad += mutant.key not in known
        print(f"\n{mutant.key}: {found['how']}, {found.get('ran')} of {found.get('tests')} tests")
        print(f"{mutant.path}:{mutant.line} in {mutant.spec.definition_name}")
        print(f"  - {mutant.before}\n  + {mutant.after}")
        print(f"  docs/mutation.md: {known.get(mutant.key, 'NOT EXPLAINED')}")
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packages", nargs="*", default=list(PACKAGES), metavar="PACKAGE")
    parser.add_argument("--count", type=int, default=40, help="mutants of each package")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120, help="of tests for each mutant")
    parser.add_argument("--again", action="store_true", help="survivors again, if not equivalent")
    parser.add_argument("--report", action="store_true", help="only show what there is")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", CI="1")  # hypothesis keeps no database there
    FOLDER.mkdir(exist_ok=True)
    if not args.report:
        update(args.processes)
    reach = Reach()
    mutants, bad, results = [], 0, {}
    for package in args.packages:
        drawn = draw(package, args.count)
        mutants += drawn
        if not args.report:
            left = prepare(package, drawn, args.again)
            print(f"{package}: {len(drawn)} mutants, {len(left)} to try", flush=True)
            run(package, left, reach, args)
        results |= results_of(package)
    if not args.report:
        for name in check([results[m.key] for m in mutants], reach):
            bad += 1
            print("fails without a mutant, so that what it killed is not known:", name)
    raise SystemExit(min(1, bad + table(mutants, results)))


if __name__ == "__main__":
    main()
