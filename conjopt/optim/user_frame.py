"""Where in the user's code a warning belongs."""

from __future__ import annotations

import sys

__all__ = ["levels_to_the_user"]


def levels_to_the_user() -> int:
    """How many frames above the caller the user's own line is, past torch's wrappers of `step`.

    Example:
        >>> levels_to_the_user() > 0
        True
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("conjopt.optim", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    return level
