"""The rows of all processes as one batch, under DistributedDataParallel."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.nn import functional as F

from conjopt.regularizers.rows import Rows

__all__ = ["gathered", "with_gradient_times"]


@torch._disable_dynamo  # which imports the compiler no earlier than torch does
def gathered(own: Rows, group: Any) -> Rows:
    """The rows of all ranks in their order; a collective.

    Every rank gets the same value from them, and the gradient of its own rows times the number of
    ranks, so that the mean over ranks that DistributedDataParallel takes is the gradient of the
    joined batch. On the CPU the ranks may have different numbers of rows.

    Args:
        own: the rows of this rank.
        group: of `torch.distributed`.
    """
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    if size == 1:
        return own
    count = most = len(own.rows)
    if own.rows.device.type == "cpu":  # elsewhere, reading the numbers would wait for the device
        counts = [torch.zeros((), dtype=torch.int64) for _ in range(size)]
        dist.all_gather(counts, torch.tensor(count), group=group)
        most = int(torch.stack(counts).max())
    short = most - count  # rows of mass 0 in their place
    own = dataclasses.replace(
        own,
        rows=F.pad(own.rows, (0, 0, 0, short)),
        mass=F.pad(own.mass, (0, short)),
        targets=F.pad(own.targets, (0, 0) * (own.targets.ndim - 1) + (0, short)),
    )
    # As one message, in the rows' dtype: classes are exact in it up to 2^24.
    columns = [t.reshape(most, -1).to(own.rows.dtype) for t in (own.rows, own.mass, own.targets)]
    sent = torch.cat([t.detach() for t in columns], 1)
    received = [torch.empty_like(sent) for _ in range(size)]
    dist.all_gather(received, sent, group=group)
    rows, mass, targets = torch.cat(received).split([t.shape[1] for t in columns], 1)
    pieces = list(rows.split(most))
    pieces[rank] = with_gradient_times(own.rows, size)
    return dataclasses.replace(
        own,
        rows=torch.cat(pieces),
        mass=mass.squeeze(1),
        targets=targets.reshape(-1, *own.targets.shape[1:]).to(own.targets.dtype),
        fresh=most * size,
    )


def with_gradient_times(tensor: Tensor, factor: float | Tensor) -> Tensor:
    """The same values, bit for bit, with a gradient `factor` times as large."""
    still = tensor.detach()
    return still + factor * (tensor - still)
