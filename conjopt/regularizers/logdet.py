"""Logarithms of determinants of `I + A` by Cholesky, for positive semidefinite `A`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["half_logdet"]


class _HalfLogdet(torch.autograd.Function):
    """`sum weights log diag L` of `L L^T = A`; the gradient takes one inverse of the factor."""

    @staticmethod
    def forward(matrices: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        factor = torch.linalg.cholesky_ex(matrices).L
        return (weights * factor.diagonal(dim1=-2, dim2=-1).log()).sum(), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*inputs, output[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Any) -> tuple[Tensor, None]:
        matrices, weights, factor = ctx.saved_tensors
        if torch.is_grad_enabled():  # for derivatives of the gradient
            inverse = torch.linalg.inv(matrices)
        else:
            inverse = torch.cholesky_inverse(factor)
        return gradient / 2 * weights.unsqueeze(-1) * inverse, None


def half_logdet(matrices: Tensor, weights: Tensor, trace: Tensor) -> Tensor:
    """The weighted sum of `1/2 logdet(I + A)` over matrices or their diagonal blocks.

    Args:
        matrices: `A`, positive semidefinite, `(..., n, n)`.
        weights: `(..., n)` of the rows, constant on each diagonal block of `A`, without gradient.
        trace: `(..., n)` traces of the rows' blocks. Where rounding relative to them would swallow
            the `I`, and the factorisation might fail, more than 1 is added.

    Returns:
        `()`.
    """
    ones = (4 * torch.finfo(trace.dtype).eps * trace).clamp(min=1)
    value: Tensor = _HalfLogdet.apply(matrices + torch.diag_embed(ones), weights)[0]
    return value
