"""The root that every entmax needs: the constant which makes the link sum to 1.

With `e = a - 1` and `g = f - max f` the link is `p_j = x_j^(1/e)`, `x_j = max(0, 1 + e (g_j - s))`,
and `s` solves `sum_j p_j = 1`. Newton's method is applied not to that sum but to its power `e`, the
norm of `x` of order `1/e`: it is convex in `s` and close to linear (exactly so if all `g` are
equal, if one class has all of the mass, and in the limit `e -> 0`). Started at `s = 0`, where the
sum is at least 1, it increases to the root; the bracket `[0, most]` holds it in spite of rounding.
At order 2 a step is the closed form on the current support, and at order 1.5 the last one is.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# Steps where convergence cannot be looked at without waiting for the device. The most that any
# input was found to need is 13, see tests/test_entmax.py.
STEPS = 16


class Solution(NamedTuple):
    """The link `p`, `(..., k)`, with `g`, `(..., k)`, and `s` and `top = max f`, `(..., 1)`."""

    p: Tensor
    g: Tensor
    s: Tensor
    top: Tensor


def solve(f: Tensor, a: float) -> Solution:
    """Find the link of outputs `f`, shape `(..., k)`, at an order `a` in (1, 2]."""
    e = a - 1
    top = f.amax(-1, keepdim=True)
    g, s = f - top, torch.zeros_like(top)
    most = -math.expm1(-e * math.log(f.shape[-1])) / e  # the root if all outputs are equal
    look = f.device.type == "cpu" and not torch.compiler.is_compiling()
    enough = 2 * torch.finfo(f.dtype).eps
    for _ in range(4 * STEPS if look else STEPS):
        step = _newton(g, s, e)
        s = (s + step).clamp(0, most)
        if look and not bool((step.abs() > enough * (1 + s)).any()):
            break
    if e in (0.5, 1):
        # Measured from the edge of the support, small probabilities keep their digits.
        edge = s - 1 / e
        x = torch.sub(g, edge).mul_(e).clamp_(min=0)
        edge = edge + _last(x, e)
        x = torch.sub(g, edge).mul_(e).clamp_(min=0)
        return Solution(x.mul_(x) if e == 0.5 else x, g, edge + 1 / e, top)
    return Solution(_general(g, s, e)[0], g, s, top)


def _base(g: Tensor, s: Tensor, e: float) -> Tensor:
    return torch.sub(g, s).mul_(e).clamp_(min=-1).add_(1)


def _general(g: Tensor, s: Tensor, e: float) -> tuple[Tensor, Tensor]:
    """Return `x^(1/e)` and `x - 1`, whose logarithm keeps its digits for small `e`."""
    below = torch.sub(g, s).mul_(e).clamp_(min=-1)
    return below.log1p().div_(e).exp_(), below


def _newton(g: Tensor, s: Tensor, e: float) -> Tensor:
    """Return the step `(N^e - 1)/e N^(1 - e) / W`, `N = sum p` and `W = sum p / x`."""
    if e == 1:
        x = torch.sub(g, s).add_(1).clamp_(min=0)
        return (x.sum(-1, keepdim=True) - 1) / x.sign_().sum(-1, keepdim=True)
    if e == 0.5:
        x = _base(g, s, e)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return 2 * (norm - 1) * norm / x.sum(-1, keepdim=True)
    p, x = _general(g, s, e)
    total = p.sum(-1, keepdim=True)
    weight = p.div_(x.add_(1).clamp_(min=torch.finfo(p.dtype).tiny)).sum(-1, keepdim=True)
    return torch.expm1(e * total.log()) / e * total ** (1 - e) / weight


def _last(x: Tensor, e: float) -> Tensor:
    """Return the step to the root of `sum x^(1/e) = 1` on the support, orders 1.5 and 2.

    Overwrites `x`.
    """
    total = x.sum(-1, keepdim=True)
    excess = total - 1 if e == 1 else x.square().sum(-1, keepdim=True) - 1
    count = x.sign_().sum(-1, keepdim=True)
    if e == 1:
        return excess / count
    return 2 * excess / (total + (total.square() - count * excess).clamp(min=0).sqrt())


def power(y: Tensor, exponent: float) -> Tensor:
    """Return `y^exponent` for `y >= 0`, by cheaper functions where there are any."""
    if exponent == 1:
        return y.clone()
    if exponent == 2:
        return y * y
    if exponent == 0.5:
        return y.sqrt()
    if exponent == 1.5:
        return y.sqrt() * y
    return y**exponent


def tsallis_log(y: Tensor, a: float) -> Tensor:
    """Return `(y^(a - 1) - 1) / (a - 1)`, the logarithm in the limit of order 1."""
    e = a - 1
    if e == 1:
        return y - 1
    if e == 0.5:
        return 2 * (y.sqrt() - 1)
    positive = y > 0
    return torch.where(positive, torch.expm1(e * torch.where(positive, y, 1).log()), -1) / e
