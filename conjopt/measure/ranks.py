"""Gradient noise from the ranks of a process group: each has the gradient of its own samples."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from conjopt.measure.noise import GradientNoise, checked_sizes, solved

__all__ = ["noise_from_ranks"]


def noise_from_ranks(
    gradients: Mapping[str, Tensor] | Iterable[Tensor],
    size: int,
    group: Any = None,
    *,
    population: int | None = None,
) -> GradientNoise:
    """Estimate `||G||^2` and `S^2` from the mean gradients of the ranks of a process group.

    These are the estimates of `noise_from_parts` for the parts that the ranks hold, of any sizes,
    without the inner products of all pairs: with `g_B = sum_j h_j g_j / m`, every rank adds its
    `h_j ||g_j - g_B||^2` and `h_j <g_j, m g_B - h_j g_j>`. The gradients are reduced once, in one
    tensor; the sizes and the two sums take a collective of a few numbers each. All ranks of the
    group call it, and all have the result. Waits for the device, once, for the sizes.

    `DistributedDataParallel` averages `.grad` over the ranks during the backward pass: pass the
    gradients of a backward under its `no_sync()`, or of `torch.autograd.grad` on the module in it.

    Args:
        gradients: Of this rank's mean loss, one tensor for each trained parameter, in the same
            order on all ranks or by name; zeros where a parameter was not used.
        size: Number of samples that they are a mean over.
        group: Of `torch.distributed`; all processes if `None`.
        population: `n` for draws without replacement, `None` for draws with replacement.

    Returns:
        The estimates, for the batch of all ranks; float32 or wider.

    Raises:
        RuntimeError: If `torch.distributed` is not initialised.
        TypeError: If something among the gradients is no tensor.
        ValueError: On all ranks, if there are fewer than two, if one has no samples or gradients of
            another size, or if there are more samples than the population has. On a process that
            is not in the group.

    Reference:
        docs/theory.md, Estimators of energy and noise.

    Example:
        >>> import torch
        >>> from conjopt.measure import noise_from_ranks
        >>> model = torch.nn.Linear(2, 1)
        >>> model(torch.ones(4, 2)).mean().backward()
        >>> noise_from_ranks([p.grad for p in model.parameters()], size=4)
        Traceback (most recent call last):
        ...
        RuntimeError: noise_from_ranks: torch.distributed is not initialised. Call ...
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "noise_from_ranks: torch.distributed is not initialised. Call "
            "torch.distributed.init_process_group first, or use noise_from_parts for parts of a "
            "batch in one process."
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"noise_from_ranks: process {dist.get_rank()} is not in the group {group!r}; call it "
            "on the processes of the group only."
        )
    flat = _flat(gradients)
    sizes = _checked_ranks(flat, size, group, population)
    m = sum(sizes)
    mean = flat * (size / m)
    dist.all_reduce(mean, group=group)
    apart = torch.dot(flat - mean, flat - mean) * size  # h_j ||g_j - g_B||^2
    pairs = torch.dot(flat, mean * m - flat * size) * size  # h_j sum_{l != j} h_l <g_j, g_l>
    sums = torch.stack([apart, pairs])
    dist.all_reduce(sums, group=group)
    return solved(
        sums[1] / (m**2 - sum(h**2 for h in sizes)), sums[0] / (len(sizes) - 1), m, population
    )


def _flat(gradients: Mapping[str, Tensor] | Iterable[Tensor]) -> Tensor:
    """Join gradients in one tensor, in float32 or wider."""
    if isinstance(gradients, Mapping):
        gradients = [gradients[name] for name in sorted(gradients)]
    found = list(gradients)
    for number, gradient in enumerate(found):
        if not isinstance(gradient, Tensor):
            raise TypeError(
                f"noise_from_ranks: gradient {number} is {type(gradient).__name__}, expected a "
                "tensor; pass zeros for a parameter that was not used."
            )
    if not found:
        raise TypeError("noise_from_ranks: got no gradients, expected one for each parameter.")
    dtype = torch.float32
    for gradient in found:
        dtype = torch.promote_types(dtype, gradient.dtype)
    return torch.cat([gradient.detach().flatten().to(dtype) for gradient in found])


def _checked_ranks(flat: Tensor, size: int, group: Any, population: int | None) -> list[int]:
    """Tell all ranks the sizes of all, so that all of them refuse what one cannot take."""
    mine = torch.tensor([size, flat.numel()], device=flat.device)
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    sizes, numbers = zip(*torch.stack(every).tolist(), strict=True)
    if len(set(numbers)) > 1:
        raise ValueError(
            f"noise_from_ranks: the ranks have gradients of {list(numbers)} numbers, expected as "
            "many; pass those of all trained parameters, zeros where one was not used."
        )
    return checked_sizes("noise_from_ranks", len(sizes), sizes, population)
