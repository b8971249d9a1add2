"""The source files that are mutated."""

from __future__ import annotations

import hashlib
from functools import lru_cache

from forks import ROOT

PACKAGES = ("potentials", "entropy", "measure", "bounds", "optim", "regularizers")


@lru_cache
def sources(package: str) -> tuple[str, ...]:
    """The modules of a package, as paths from the root of the checkout."""
    paths = sorted((ROOT / "conjopt" / package).rglob("*.py"))
    return tuple(str(path.relative_to(ROOT)) for path in paths)


@lru_cache
def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def digest(*parts: object) -> str:
    return hashlib.sha1("\n".join(map(str, parts)).encode()).hexdigest()
