"""Inner products of all pairs of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["gram", "inner_products"]


class _Gram(torch.autograd.Function):
    """`X X^T`, whose gradient takes one product where autograd's takes two."""

    @staticmethod
    def forward(rows: Tensor) -> Tensor:
        return rows @ rows.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return (gradient + gradient.T) @ ctx.saved_tensors[0]


def gram(rows: Tensor) -> Tensor:
    """The inner products of all rows, `(R, d) -> (R, R)`."""
    product: Tensor = _Gram.apply(rows)
    return product


def inner_products(rows: Tensor, fresh: int) -> tuple[Tensor, Tensor]:
    """Those of the first rows with all, `(fresh, R)`, and the squared norms of all, `(R,)`."""
    if fresh == len(rows):
        products = gram(rows)
        return products, products.diagonal()
    return rows[:fresh] @ rows.T, rows.square().sum(1)
