"""The mutants of a package: cosmic-ray finds them, a fixed seed draws from them.

One mutant is drawn from each place in the source, so that a place with many operators counts no
more than one with few. An arithmetic operator becomes another one and never a shift or a bitwise
one: those fail on floats wherever a test comes by, and say nothing of the test.
"""

from __future__ import annotations

import ast
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from attrs import define
from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from cosmic_ray.work_item import MutationSpec
from texts import PACKAGES, digest, sources, text

Span = tuple[tuple[int, int], tuple[int, int]]
TYPING_ONLY = {"final", "overload"}
TEXT_METHODS = {"__repr__", "__str__"}
BITWISE = {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"}


@define(frozen=True)
class Mutant:
    """A change of one place; `key` names it as long as its function and its line stay."""

    key: str
    package: str
    spec: MutationSpec
    before: str
    after: str

    @property
    def path(self) -> str:
        return str(self.spec.module_path)

    @property
    def line(self) -> int:
        return self.spec.start_pos[0]

    def source(self) -> str:
        return mutated(self.spec) or ""


def mutated(spec: MutationSpec) -> str | None:
    """The module with the change, or None where Python refuses it or warns of it."""
    operator = get_operator(spec.operator_name)(**spec.operator_args)
    changed = mutate_code(text(str(spec.module_path)), operator, spec.occurrence)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            compile(changed, "mutant", "exec", dont_inherit=True)
        except SyntaxError:
            return None
    return changed


def _name(node: ast.expr) -> str:
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _left_out(tree: ast.Module) -> Iterator[ast.AST]:
    """Annotations and what serves them, texts of errors and warnings, methods that return text."""
    for node in ast.walk(tree):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            yield node.annotation
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield from (d for d in node.decorator_list if _name(d) in TYPING_ONLY)
        if isinstance(node, ast.FunctionDef):
            if node.returns is not None:
                yield node.returns
            if node.name in TEXT_METHODS:
                yield node
        if isinstance(node, ast.If) and _name(node.test).lstrip("_") == "TYPE_CHECKING":
            yield node
        warns = isinstance(node, ast.Call) and _name(node) == "warn"
        if isinstance(node, ast.Raise) or warns:
            yield from (n for n in ast.walk(node) if isinstance(n, ast.JoinedStr))


@lru_cache
def _spans(path: str) -> list[Span]:
    """The left out places of a module, `((line, column), (line, column))` in characters."""
    lines = text(path).splitlines()

    def place(line: int, bytes_before: int) -> tuple[int, int]:
        return line, len(lines[line - 1].encode()[:bytes_before].decode())

    return [
        (place(n.lineno, n.col_offset), place(n.end_lineno, n.end_col_offset))
        for n in _left_out(ast.parse(text(path)))
    ]


def _is_left_out(spec: MutationSpec) -> bool:
    name, _, change = spec.operator_name.partition("/")[2].partition("_")
    if name == "ReplaceBinaryOperator":
        old, new = change.split("_")
        if new in BITWISE and old not in BITWISE:
            return True
    start, end = spec.start_pos, spec.end_pos
    if name == "RemoveDecorator":  # whose place begins with the @ and ends in the next line
        start, end = (start[0], start[1] + 1), (start[0], start[1] + 1)
    return any(a <= start and end <= b for a, b in _spans(str(spec.module_path)))


def every_spec(package: str) -> list[MutationSpec]:
    """All that cosmic-ray would change in a package, less what is left out."""
    with tempfile.TemporaryDirectory() as folder, use_db(f"{folder}/all.sqlite") as database:
        init([Path(path) for path in sources(package)], database, {})
        specs = [item.mutations[0] for item in database.work_items]
    return [spec for spec in specs if not _is_left_out(spec)]


def _operations(source: str) -> Counter[type]:
    binary = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.BinOp | ast.AugAssign))
    return Counter(type(n.op) for n in binary)


def _mutant(package: str, spec: MutationSpec) -> Mutant | None:
    changed = mutated(spec)
    path = str(spec.module_path)
    if changed is None:
        return None
    binary = "ReplaceBinaryOperator" in spec.operator_name
    if binary and _operations(changed) == _operations(text(path)):
        return None  # the * or / between parameters, which cosmic-ray takes for an operator
    old, new = text(path).splitlines(), changed.splitlines()
    first = spec.start_pos[0] - 1
    # From the place on to the first line after it that both have.
    last = max(spec.end_pos[0], first + 1)
    before = "\n".join(old[first:last])
    after = "\n".join(new[first : last + len(new) - len(old)])
    twin = [line for line in old[:first] if line == old[first]]
    key = digest(path, spec.definition_name, before, after, len(twin))[:8]
    return Mutant(key, package, spec, before.strip(), after.strip())


def draw(package: str, count: int, seed: int = 0) -> list[Mutant]:
    """The first `count` mutants in an order that depends on nothing but the lines and the seed.

    More of them begin with the same ones, and an edit of the source moves only its own lines.
    """

    def rank(spec: MutationSpec) -> str:
        line = text(str(spec.module_path)).splitlines()[spec.start_pos[0] - 1]
        column = spec.start_pos[1] - (len(line) - len(line.lstrip()))
        return digest(seed, spec.module_path, spec.definition_name, line.strip(), column)

    def place(spec: MutationSpec) -> tuple[str, Span]:
        return str(spec.module_path), (spec.start_pos, spec.end_pos)

    specs = sorted(every_spec(package), key=lambda s: (*place(s), s.operator_name, s.occurrence))
    places = [list(group) for _, group in groupby(specs, place)]
    places.sort(key=lambda group: (rank(group[0]), place(group[0])))
    found: list[Mutant] = []
    for group in places:
        if len(found) >= count:
            break
        group.sort(key=lambda s: digest(seed, rank(s), s.operator_name, s.occurrence))
        mutants = (_mutant(package, spec) for spec in group)
        found += [mutant for mutant in mutants if mutant is not None][:1]
    return found


def places(package: str) -> int:
    """How many places a package has to draw from."""
    return len({(s.module_path, s.start_pos, s.end_pos) for s in every_spec(package)})


if __name__ == "__main__":
    for name in PACKAGES:
        print(f"{name:13} {places(name):6} places {len(every_spec(name)):6} mutants")
