"""The rows of past batches, for terms that need more of them than a batch has."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.regularizers.rows import Rows

__all__ = ["Queue"]


class Queue(nn.Module):
    """The last rows of past training calls, without gradients; part of `state_dict`.

    Its buffers are made at the first push, when the shapes are known.

    Args:
        size: Number of rows to keep; rows that did not count are among them.

    Raises:
        ValueError: If later rows have another shape or kind of targets than those kept.

    Example:
        >>> from conjopt.regularizers.queue import Queue
        >>> queue = Queue(512)
        >>> len(queue)
        0
    """

    rows: Tensor | None
    mass: Tensor | None
    targets: Tensor | None

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.clear()

    def __len__(self) -> int:
        """The number of rows kept, whether they count or not; at most `size`."""
        return 0 if self.rows is None else len(self.rows)

    def clear(self) -> None:
        """Forget all rows."""
        for name in ("rows", "mass", "targets"):
            self.register_buffer(name, None)

    def joined(self, fresh: Rows) -> Rows:
        """The rows of this step, first, and those kept."""
        if self.rows is None or self.mass is None or self.targets is None:
            return fresh
        if self.rows.device != fresh.rows.device:  # after a checkpoint from elsewhere
            self.to(fresh.rows.device)
        kinds = [(t.shape[1:], t.is_floating_point()) for t in (self.rows, self.targets)]
        if kinds != [(t.shape[1:], t.is_floating_point()) for t in (fresh.rows, fresh.targets)]:
            raise ValueError(
                f"The queue holds rows of shape {tuple(self.rows.shape)} with targets of shape "
                f"{tuple(self.targets.shape)} and type {self.targets.dtype}; now came rows of "
                f"shape {tuple(fresh.rows.shape)} with targets of shape "
                f"{tuple(fresh.targets.shape)} and type {fresh.targets.dtype}. Call queue.clear() "
                "where the kind changes, or use a term for each kind."
            )
        return dataclasses.replace(
            fresh,
            rows=torch.cat([fresh.rows, self.rows.to(fresh.rows)]),
            mass=torch.cat([fresh.mass, self.mass.to(fresh.mass)]),
            targets=torch.cat([fresh.targets, self.targets.to(fresh.targets)]),
        )

    def push(self, batch: Rows) -> None:
        """Keep the rows of this step, which come first; the oldest rows leave."""
        if self.rows is None:
            self._allocate(batch)
        for name in ("rows", "mass", "targets"):
            old, new = getattr(self, name), getattr(batch, name)[: batch.fresh].detach()
            old.copy_(torch.cat([new[: self.size].to(old), old])[: self.size])

    @torch._disable_dynamo  # which imports the compiler no earlier than torch does
    def _allocate(self, batch: Rows) -> None:
        for name in ("rows", "mass", "targets"):
            like: Tensor = getattr(batch, name)
            self.register_buffer(name, like.new_zeros(self.size, *like.shape[1:]))  # mass 0

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"size={self.size}"

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("rows", "mass", "targets"):
            kept, own = state.get(prefix + name), getattr(self, name)
            if kept is None or own is None or own.shape != kept.shape:
                self.register_buffer(name, None if kept is None else torch.empty_like(kept))
        super()._load_from_state_dict(state, prefix, *args)
