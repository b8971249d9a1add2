"""Giving up a step on a device without asking the device whether it should be."""

from __future__ import annotations

import torch
from torch import Tensor

from conjopt.measure.shards import is_sharded

__all__ = ["Gate", "choose", "write"]

Gate = Tensor | None  # () whether the step is taken; None where that is known already


def choose(gate: Gate, new: Tensor, old: Tensor | float) -> Tensor:
    """The new value if the step is taken, else the old one.

    Args:
        gate: () boolean on the device, or None for a step that is taken.
        new: what the step would write.
        old: what stays otherwise.

    Example:
        >>> choose(torch.tensor(False), torch.tensor([torch.nan]), 0.0)
        tensor([0.])
    """
    return new if gate is None else torch.where(gate, new, old)


def write(gate: Gate, new: Tensor, old: Tensor | float) -> Tensor:
    """`choose` what a state is to hold; on a device in the memory of the old value.

    A step that was captured in a CUDA graph goes on reading and writing that memory.

    Args:
        gate: () boolean on the device, or None for a step that is taken.
        new: what the step would write.
        old: what stays otherwise; a number where there is none yet.

    Returns:
        what to hold.

    Example:
        >>> old = torch.zeros(1)
        >>> write(torch.tensor(True), torch.ones(1), old) is old
        True
    """
    held = isinstance(old, Tensor) and old.dtype == new.dtype and not is_sharded(old)
    if gate is None or not held:
        return choose(gate, new, old)
    assert isinstance(old, Tensor)
    return torch.where(gate, new, old, out=old)
