"""The code of the documentation, for tests that run it."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def snippet(page, heading):
    """The Python code under a heading of a page, joined."""
    text = (DOCS / page).read_text(encoding="utf-8")
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S).group(1)
    found = re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)
    assert found, f"docs/{page} has no code under {heading!r}"
    return "\n".join(found)
