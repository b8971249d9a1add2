"""Running a stored forward again in chunks of its samples, where memory does not do for all."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from conjopt.measure.observation import Batch, Forward
from conjopt.measure.replay import Pull, Replay

__all__ = ["ChunkedReplay", "ran_out_of_memory", "run_in_chunks"]

# How other allocators than that of CUDA say it, which has an error of its own.
SIGNS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory could not be had, on a device or on the host.

    Args:
        error: any.

    Example:
        >>> ran_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
        True
        >>> ran_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
        False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


@dataclasses.dataclass(eq=False)
class ChunkedReplay(Replay):
    """A replay whose samples run chunk by chunk, so that activations are held of one at a time.

    The same function to rounding, if samples do not see one another and nothing random is drawn.
    Inputs that have the samples along dimension 0 are cut; others go to every chunk as they are.

    Attributes:
        samples: along dimension 0 of inputs and outputs.
        chunks: how many.

    Example:
        >>> model, inputs = torch.nn.Linear(2, 3), torch.randn(5, 2)
        >>> replay = Replay(model, (inputs,), {}, Replay.random_state(model))
        >>> (whole,) = replay.run({})
        >>> (again,) = ChunkedReplay(**vars(replay), samples=5, chunks=2).run({})
        >>> torch.allclose(again, whole)
        True
    """

    samples: int = 1
    chunks: int = 1

    def run(self, parameters: Mapping[str, Tensor], *, copy: bool = True) -> list[Tensor | None]:
        """The output's leaves, None for those that have no samples along dimension 0.

        Args:
            parameters: see `Replay.run`.
            copy: see `Replay.run`.
        """
        ran = [(rows, self.part(rows).run(parameters, copy=copy)) for rows in self.rows()]
        sizes = [rows.stop - rows.start for rows, _ in ran]
        return [_joined(leaves, sizes) for leaves in zip(*(found for _, found in ran), strict=True)]

    def pull(
        self, cotangents: Mapping[int, Tensor], parameters: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Vector-Jacobian product ``J^T w``, the sum of those of the chunks.

        Args:
            cotangents: see `Replay.pull`.
            parameters: see `Replay.pull`.
        """
        total: list[Tensor] | None = None
        for rows in self.rows():
            own = {place: cotangent[rows] for place, cotangent in cotangents.items()}
            part = self.part(rows).pull(own, parameters)
            total = part if total is None else list(torch._foreach_add(total, part))
        assert total is not None
        return total

    def adjoint(self, parameters: Mapping[str, Tensor]) -> Pull:
        """See `Replay.adjoint`; the chunks run anew for each, as memory does for one at a time.

        Args:
            parameters: see `Replay.pull`.
        """
        return lambda cotangents: self.pull(cotangents, parameters)

    def rows(self) -> Iterator[slice]:
        """The samples of each chunk."""
        size = -(-self.samples // self.chunks)
        for start in range(0, self.samples, size):
            yield slice(start, min(start + size, self.samples))

    def part(self, rows: slice) -> Replay:
        """A replay of some samples.

        Args:
            rows: which.
        """

        def cut(leaf: Any) -> Any:
            ours = isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0] == self.samples
            return leaf[rows] if ours else leaf

        args, kwargs = tree_map(cut, (self.args, self.kwargs))
        return Replay(self.model, args, kwargs, self.random, self.paused, self.buffers)


def run_in_chunks(batch: Batch, chunks: int) -> bool:
    """Let those forwards of a batch run again in chunks that come out the same so.

    They do not where samples see one another, or random numbers are drawn (dropout): such forwards
    are left as they are. Waits for a device.

    Args:
        batch: observed while the watch was armed.
        chunks: at most; no more than samples.

    Returns:
        whether all of them can.
    """
    all_can = True
    for forward in batch.forwards:
        replay, samples = forward.replay, forward.batch_size
        if replay is None or samples is None or samples < 2:
            continue
        parts = {field.name: getattr(replay, field.name) for field in dataclasses.fields(Replay)}
        chunked = ChunkedReplay(**parts, samples=samples, chunks=min(chunks, samples))
        if _comes_out_the_same(chunked, forward, batch):
            forward.replay = chunked
        else:
            all_can = False
    return all_can


def _comes_out_the_same(chunked: ChunkedReplay, forward: Forward, batch: Batch) -> bool:
    """Whether the last chunk does; the first would, where a single layer draws random numbers."""
    seen = {
        o.place: o.outputs
        for o in batch.observations
        if o.forward is forward and o.place is not None and o.outputs is not None
    }
    *_, rows = chunked.rows()
    with torch.no_grad():
        found = chunked.part(rows).run({})
        if not seen:  # the criterion was given others: compare with a chunk of another size
            end = chunked.samples
            other = slice(end - 1 if rows.stop - rows.start > 1 else end - 2, end)
            least = max(rows.start, other.start)
            again = chunked.part(other).run({})
            pairs = [
                (found[place], again[place], least - rows.start, least - other.start)
                for place in forward.gradients
            ]
        else:
            pairs = [(found[p], t[rows], 0, 0) for p, t in seen.items()]
    return all(_close(a, b, i, j) for a, b, i, j in pairs)


def _close(left: Tensor | None, right: Tensor | None, i: int, j: int) -> bool:
    if left is None or right is None or not left.ndim or not right.ndim:
        return False
    left, right = left[i:], right[j:]
    if left.shape != right.shape:
        return False
    # Matrix products of other shapes round otherwise.
    tolerance = max(torch.finfo(t.dtype).eps for t in (left, right)) ** 0.5
    return bool((left - right).abs().max() <= tolerance * right.abs().max())


def _joined(leaves: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    whole = [
        leaf
        for leaf, size in zip(leaves, sizes, strict=True)
        if leaf is not None and leaf.ndim and leaf.shape[0] == size
    ]
    return torch.cat(whole) if len(whole) == len(sizes) else None
