"""The documentation keeps up with the package: names, examples, statement numbers and links.

Whether the pages build is checked by `make docs`.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import conjopt

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "conjopt").rglob("*.py"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

NUMBER = r"\d+\.\d+"
# "Thm 2.6", "Def 1.1 and 1.2", "Thms 3.2, 3.5 and 3.6", "Thm 2.1 to 2.6"; a line may break inside.
CITATION = re.compile(
    rf"\b(Thm|Theorem|Def|Definition)s?\b\.?[\s#]+"
    rf"({NUMBER}(?:(?:,|[\s#]+and\b|,[\s#]+and\b|[\s#]+to\b|-)[\s#]*{NUMBER})*)"
)
HEADING = re.compile(rf"^### (Thm|Def) ({NUMBER})\b", re.MULTILINE)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)(?:\s+\"[^\"]*\")?\)")


# Modules that import a library of an extra; left out where that is not installed.
NEEDS = {"conjopt.report.lightning": "lightning", "conjopt.report.transformers": "transformers"}


def public_names() -> list[str]:
    """The package and every module below it whose path has no part with an underscore in front."""
    names = [
        info.name
        for info in pkgutil.walk_packages(conjopt.__path__, prefix="conjopt.")
        if not any(part.startswith("_") for part in info.name.split("."))
    ]
    return ["conjopt", *names]


NAMES = public_names()
MODULES = [
    importlib.import_module(name)
    for name in NAMES
    if importlib.util.find_spec(NEEDS.get(name, "conjopt"))
]


REFERENCE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
LISTED = set(re.findall(r"^\.\. automodule:: (\S+)", REFERENCE, flags=re.M))


def exported(modules: list[ModuleType]) -> dict[str, object]:
    """Each object that `__all__` names, once, by the first path to it."""
    found: dict[int, tuple[str, object]] = {}
    for module in modules:
        for name in getattr(module, "__all__", []):
            value = getattr(module, name)
            # An alias of types and the like has no docstring of its own.
            if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value):
                found.setdefault(id(value), (f"{module.__name__}.{name}", value))
    return dict(found.values())


# What users import comes from the package, its rooms (packages, and modules directly in it) and
# what the reference lists. Names that the files of one room lend each other need no example.
ROOMS = [
    module
    for module in MODULES
    if hasattr(module, "__path__") or module.__name__.count(".") == 1 or module.__name__ in LISTED
]
OBJECTS = exported(MODULES)
SHOWN = {
    path: value
    for path, value in exported(ROOMS).items()
    if not inspect.ismodule(value)
    # Of an exception the name and the sentence say enough.
    and not (inspect.isclass(value) and issubclass(value, BaseException))
}
CLASSES = {path: value for path, value in OBJECTS.items() if inspect.isclass(value)}


def own_docstring(value: object) -> str:
    """What is written at the object itself, not what a base class passes on."""
    return inspect.cleandoc(getattr(value, "__doc__", None) or "")


def members(cls: type) -> dict[str, object]:
    """Public methods and properties that conjopt, not a library, defines for a class."""
    found: dict[str, object] = {}
    for base in reversed(cls.__mro__):
        if base.__module__.partition(".")[0] != "conjopt":
            continue
        for name, value in vars(base).items():
            function = value.__func__ if isinstance(value, staticmethod | classmethod) else value
            if not name.startswith("_") and (
                inspect.isroutine(function) or isinstance(function, property)
            ):
                found[name] = function
    return found


def citations(text: str) -> set[str]:
    """Statements that a text cites, such as "Thm 3.6"; a range by its ends."""
    return {
        f"{kind[:3] if kind.startswith('Def') else 'Thm'} {number}"
        for kind, numbers in CITATION.findall(text)
        for number in re.findall(NUMBER, numbers)
    }


def slug(heading: str) -> str:
    """The anchor that GitHub and MyST give a heading."""
    kept = re.sub(r"[^\w\- ]", "", heading.strip().lower())
    return kept.replace(" ", "-")


def anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, flags=re.M)}


def relative_links(text: str) -> list[str]:
    """Targets of the links of a page, less those with a scheme and those in code."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    return [link for link in LINK.findall(text) if not re.match(r"[a-z][a-z+.-]*:", link)]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_a_public_module_says_what_it_is(module: ModuleType) -> None:
    assert own_docstring(module), f"{module.__name__} needs a docstring"


@pytest.mark.parametrize("path", OBJECTS)
def test_a_public_name_has_a_docstring(path: str) -> None:
    docstring = own_docstring(OBJECTS[path])
    # A dataclass without a docstring gets its signature as one.
    automatic = docstring.startswith(f"{path.rpartition('.')[2]}(")
    assert docstring, f"{path} needs a docstring"
    assert not automatic, f"{path} needs a docstring"


@pytest.mark.parametrize("path", SHOWN)
def test_a_public_name_shows_an_example(path: str) -> None:
    docstring = own_docstring(SHOWN[path])
    _, heading, example = docstring.partition("\nExample:\n")
    assert heading, f"{path} needs a section `Example:`"
    assert ">>>" in example, f"the example of {path} needs a line that runs (>>>)"


@pytest.mark.parametrize("path", CLASSES)
def test_public_methods_have_docstrings(path: str) -> None:
    cls = CLASSES[path]
    assert inspect.isclass(cls)
    missing = [
        name for name, member in members(cls).items() if not inspect.getdoc(getattr(cls, name))
    ]
    assert not missing, f"{path}: {missing} need docstrings"


def test_the_reference_lists_every_public_name() -> None:
    unknown = LISTED - set(NAMES)
    assert not unknown, f"docs/api.md lists {unknown}, which are no modules"
    listed = exported([module for module in MODULES if module.__name__ in LISTED])
    known = {id(value) for value in listed.values()}
    missing = [
        path
        for path, value in exported(ROOMS).items()
        if id(value) not in known and path != "conjopt.cli.main"  # the command is in the README
    ]
    assert not missing, f"docs/api.md lacks {missing}: add their module"


def test_cited_statements_are_stated() -> None:
    theory = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    stated = {f"{kind} {number}" for kind, number in HEADING.findall(theory)}
    cited = {
        (path.relative_to(ROOT).as_posix(), statement)
        for path in SOURCES
        for statement in citations(path.read_text(encoding="utf-8"))
    }
    assert cited, "the package cites no statement at all: has the way of citing changed?"
    unknown = sorted(where for where in cited if where[1] not in stated)
    assert not unknown, f"docs/theory.md has no heading for {unknown}"


def test_the_table_of_constants_is_right() -> None:
    page = (ROOT / "docs" / "how_it_works.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\|.*\| ([\d.]+)\b[^|]*\| `(\w+)\((\w+)=\)` \|$", page, flags=re.M)
    assert len(rows) > 8, "the table of constants has another form than this test reads"
    for stated, cls, argument in rows:
        owner = getattr(conjopt, cls, None) or getattr(conjopt.optim, cls)
        default = inspect.signature(owner).parameters[argument].default
        # Weight decay depends on the loss.
        assert default == float(stated) or (argument, default) == ("weight_decay", None), (
            f"docs/how_it_works.md: {cls}({argument}={stated}), but the default is {default}"
        )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in relative_links(page.read_text(encoding="utf-8")):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (
            anchor and target.suffix == ".md" and anchor not in anchors(target)
        ):
            broken.append(link)
    assert not broken, f"{page.relative_to(ROOT)}: {broken} lead nowhere"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("see Thm 3.6.", {"Thm 3.6"}),
        ("Def 1.1 and 1.2, Theorem 2.3", {"Def 1.1", "Def 1.2", "Thm 2.3"}),
        ("Thms 3.2, 3.5 and 3.6", {"Thm 3.2", "Thm 3.5", "Thm 3.6"}),
        ("(Thm\n    # 2.1 to 2.4)", {"Thm 2.1", "Thm 2.4"}),
        ("torch 2.6, section 3.1", set()),
    ],
)
def test_citations_are_recognised(text: str, expected: set[str]) -> None:
    assert citations(text) == expected


def test_links_are_recognised() -> None:
    text = '[a](b.md#c) `[x](y)` ![p](plot.png "t") [q](https://a.org)\n```\n[z](w)\n```\n'
    assert relative_links(text) == ["b.md#c", "plot.png"]
