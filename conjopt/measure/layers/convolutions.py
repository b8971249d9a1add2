"""Rules for convolutions and transposed convolutions (see rules.py)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from conjopt.measure.layers.pieces import Dense, Outer, through_places
from conjopt.measure.layers.rules import (
    Cotangents,
    Found,
    flat,
    over_places,
    register_rule,
    same_type,
)
from conjopt.measure.layers.uses import Use

__all__ = ["CONVOLUTIONS", "summed"]

_CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSED = (torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d)
CONVOLUTIONS = frozenset((*_CONVOLUTIONS, *_TRANSPOSED))


@register_rule(*_CONVOLUTIONS, *_TRANSPOSED)
def _convolution(use: Use, cotangents: Cotangents) -> Found | None:
    return _convolve(use, cotangents, *_arguments(use))


def _arguments(use: Use) -> tuple[Tensor, Tensor, Tensor | None, tuple[Any, ...]]:
    """Return the input of a convolution, its weight and bias, and the options of its backward."""
    if use.function in _TRANSPOSED:
        x, weight, bias, stride, padding, extra, groups, dilation = use.arguments(
            input=None, weight=None, bias=None, stride=1, padding=0, output_padding=0, groups=1,
            dilation=1,
        )  # fmt: skip
        dims = weight.ndim - 2
        sizes = [_each(value, dims) for value in (stride, padding, dilation)]
        return x, weight, bias, (*sizes, True, _each(extra, dims), groups)
    x, weight, bias, stride, padding, dilation, groups = use.arguments(
        input=None, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    dims = weight.ndim - 2
    if isinstance(padding, str):
        if padding == "same" and use.is_weight(weight):
            total = [
                d * (size - 1)
                for d, size in zip(_each(dilation, dims), weight.shape[2:], strict=True)
            ]
            pads = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            x = F.pad(x, pads)
        padding = 0
    sizes = [_each(value, dims) for value in (stride, padding, dilation)]
    return x, weight, bias, (*sizes, False, [0] * dims, groups)


def summed(use: Use, b: Tensor) -> dict[int, Tensor]:
    """Return the gradients of a convolution's weights, sums over samples, by their `id`.

    Args:
        use: Of a function in `CONVOLUTIONS`, whose input is no weight.
        b: The cotangent of its result.
    """
    x, weight, bias, options = _arguments(use)
    with_bias = use.is_weight(bias)
    if not use.is_weight(weight):
        return {id(bias): b.transpose(0, 1).flatten(1).sum(1)} if with_bias else {}
    b, x = same_type(b, x)
    _, gradient, shift = torch.ops.aten.convolution_backward(
        b, x, weight.detach().to(b.dtype), b.shape[1:2] if with_bias else None, *options,
        [False, True, with_bias],
    )  # fmt: skip
    return {id(weight): gradient, id(bias): shift} if with_bias else {id(weight): gradient}


def _convolve(
    use: Use,
    cotangents: Cotangents,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, ...],
) -> Found | None:
    """Convolutions: the samples become groups of one convolution's weight gradient."""
    (b,) = cotangents
    m = use.samples
    if b is None or use.is_weight(x) or x.ndim != weight.ndim or not use.plain(0):
        return None
    found: Found = []
    if bias is not None and use.is_weight(bias):
        found.append(flat(bias, over_places(b)))
    if use.is_weight(weight):
        *rest, groups = options
        b, x = same_type(b, x)
        pointwise = math.prod(weight.shape[2:]) == 1 and weight.ndim < 5  # a linear layer
        if groups == 1 and not options[3] and (pointwise or _few_places(b, weight)):
            unfolded = _unfold(x, weight, *options[:3])
            return [*found, (weight, Outer(b.flatten(3).mT.unsqueeze(2), unfolded[None, :, None]))]
        if len(b) > 1 and not options[3] and _one_product(b, weight, groups):
            seen = _unfold(x, weight, *options[:3]).unflatten(2, (groups, -1)).transpose(1, 2)
            left = b.flatten(3).unflatten(2, (groups, -1)).mT
            return [*found, (weight, Outer(left, seen[None]))]
        if len(b) == 1 and not options[3] and _narrow(b, weight, groups):
            return [*found, (weight, Dense(_by_rows(x, b[0], weight, options)[None]))]
        wide = b.new_empty(1).expand(m * weight.shape[0], *weight.shape[1:])
        inputs = x.reshape(1, -1, *x.shape[2:])
        gradients = [
            torch.ops.aten.convolution_backward(
                c.reshape(1, -1, *c.shape[2:]),
                inputs,
                wide,
                None,
                *rest,
                m * groups,
                [False, True, False],
            )[1]
            for c in b
        ]
        stacked = torch.stack(gradients) if len(b) > 1 else gradients[0]
        found.append(flat(weight, stacked.reshape(len(b), m, -1)))
    return found


def _few_places(b: Tensor, weight: Tensor) -> bool:
    """Whether inner products through places are cheaper than through coordinates."""
    places, q = math.prod(b.shape[3:]), weight.shape[0]
    p = weight.numel() // q
    if len(b) > 1:
        return weight.ndim < 5 and through_places(len(b), places, q, p)
    return weight.ndim < 5 and places * (q + p) < 0.6 * q * p


def _one_product(b: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether one matrix product for all cotangents is faster than a convolution for each.

    On a CPU it is not where convolutions have fast kernels: many places, channels by eights.
    """
    blocked = weight.shape[1] % 8 == 0 and (weight.shape[0] // groups) % 8 == 0
    many = math.prod(b.shape[3:]) >= 128 and math.prod(weight.shape[2:]) > 1
    return weight.ndim < 5 and (b.is_cuda or not (blocked and many))


def _narrow(b: Tensor, weight: Tensor, groups: int) -> bool:
    """Whether a CPU has no fast kernel for a convolution with each sample as a group."""
    blocked = weight.shape[1] % 8 == 0 and (weight.shape[0] // groups) % 8 == 0
    return weight.ndim < 5 and not b.is_cuda and not blocked


def _by_rows(x: Tensor, b: Tensor, weight: Tensor, options: tuple[Any, ...]) -> Tensor:
    """Return weight gradients, `(m, groups, q, *p)`, by a matrix product for each kernel's row.

    Only the columns of the kernel are unfolded. What a row of it sees is then one contiguous range,
    as long as rows that are a stride apart lie next to each other.
    """
    stride, padding, dilation, _, _, groups = options
    if weight.ndim == 3:
        x, b, shape = x.unsqueeze(2), b.unsqueeze(2), (1, *weight.shape[2:])
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    else:
        shape = tuple(weight.shape[2:])
    (high, wide), (down, _), (step, side) = b.shape[2:], stride, dilation
    blocks = high + (shape[0] - 1) * step // down
    below = blocks * down - x.shape[2] - padding[0]  # negative where rows are left over
    span = (wide - 1) * stride[1] + (shape[1] - 1) * side + 1
    right = span - x.shape[3] - padding[1]
    around = padding[1], right, padding[0], below
    padded = F.pad(x, around) if any(around) else x
    m, channels, _, _ = padded.shape
    _, by_channel, by_row, by_column = padded.stride()
    seen = padded.as_strided(
        (m, channels, shape[1], down, blocks, wide),
        (
            padded.stride(0), by_channel, side * by_column,
            by_row, down * by_row, stride[1] * by_column,
        ),
    ).contiguous()  # fmt: skip
    seen = seen.unflatten(1, (groups, -1)).flatten(5)  # (m, g, c, columns, stride, places)
    left = b.flatten(2).unflatten(1, (groups, -1)).mT  # (m, g, places, q)
    rows = []
    for i in range(shape[0]):
        block, place = divmod(i * step, down)
        part = seen[..., place, block * wide : (block + high) * wide].flatten(2, 3)
        rows.append(part @ left)  # (m, g, c columns, q)
    found = torch.stack(rows, 3).unflatten(2, (-1, shape[1]))  # (m, g, c, columns, rows, q)
    return found.permute(0, 1, 5, 2, 4, 3)


def _unfold(
    x: Tensor, weight: Tensor, stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    """Return what the kernel sees at each place, `(m, places, p)`, in one or two dimensions.

    As `F.unfold`, but in one copy for all samples.
    """
    kernel = list(weight.shape[2:])
    if weight.ndim == 3:
        x, kernel = x.unsqueeze(2), [1, *kernel]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    high, wide = (
        (x.shape[2 + i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )
    by_sample, by_channel, by_row, by_column = x.stride()
    seen = x.as_strided(
        (*x.shape[:2], *kernel, high, wide),
        (
            by_sample, by_channel, dilation[0] * by_row, dilation[1] * by_column,
            stride[0] * by_row, stride[1] * by_column,
        ),
    )  # fmt: skip
    return seen.reshape(len(x), -1, high * wide).mT


def _each(value: Any, dims: int) -> list[int]:
    return [value] * dims if isinstance(value, int) else list(value) * (dims // len(value))
