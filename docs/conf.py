"""Configuration of the Sphinx documentation, built by `make docs` without a network."""

import re
from pathlib import Path

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"

project = "conjopt"
author = "The conjopt developers"
copyright = "The conjopt developers"
# Read from the file, as Python 3.10 has no TOML reader and an installed version can be stale.
release = re.search(r'^version = "(.+)"', PYPROJECT.read_text(encoding="utf-8"), re.M)[1]
version = release

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
]
exclude_patterns = ["_build"]

# Docstrings write code names between single backticks.
default_role = "code"

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
# Attributes as fields of their class: those of named tuples are listed as members already.
napoleon_use_ivar = True

myst_enable_extensions = ["dollarmath"]
# Headings get the anchors that GitHub gives them, so that links work in both places.
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"conjopt {release}"
