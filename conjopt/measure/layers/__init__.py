"""Per-sample gradients of every parameter, in factors, and rules of your own for functions.

`register_rule` teaches the measurements a function: how the gradient of what it returned becomes
per-sample gradients of its parameters, as a `Dense`, `Outer` or `Lookup` piece.
"""

from __future__ import annotations

from conjopt.measure.layers import convolutions  # noqa: F401 (registers its rules)
from conjopt.measure.layers.pieces import Dense, Lookup, Outer, Piece
from conjopt.measure.layers.rules import register_rule
from conjopt.measure.layers.uses import Use

__all__ = ["Dense", "Lookup", "Outer", "Piece", "Use", "register_rule"]
