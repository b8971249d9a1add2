"""Running the model again on some of the samples alone, where it treats each by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.measure.chunks import ran_out_of_memory
from conjopt.measure.replay import Replay

__all__ = ["Coupled", "RowReplay", "of_rows"]


class Coupled(Exception):
    """Some samples alone do not give the outputs that they gave among the others."""


@dataclasses.dataclass(eq=False)
class RowReplay(Replay):
    """A forward of some samples, in the place of that of the batch: the others' outputs are zero.

    Attributes:
        rows: (h,) the samples' numbers.
        size: m, samples of the batch.
        expected: by place among the output's leaves, what the batch gave, to compare with.

    Raises:
        Coupled: on running, if the outputs are not the expected ones, to two thirds of the digits,
            or the samples do not run by themselves.
    """

    rows: Tensor = dataclasses.field(default_factory=lambda: torch.empty(0))
    size: int = 0
    expected: Mapping[int, Tensor] = dataclasses.field(default_factory=dict)

    def run(self, parameters: Mapping[str, Tensor], *, copy: bool = True) -> list[Tensor | None]:
        """See `Replay.run`; every leaf has the rows of the whole batch."""
        try:
            leaves = super().run(parameters, copy=copy)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            # What is known to run may still lack a forward derivative, say.
            if not self.expected or ran_out_of_memory(error):
                raise
            raise Coupled(f"the samples do not run by themselves: {error}") from error
        spread = [None if leaf is None else self._spread(leaf) for leaf in leaves]
        for place, whole in self.expected.items():
            found = spread[place]
            if (
                found is None
                or found.shape != whole.shape
                or not _close(found[self.rows], whole[self.rows])
            ):
                raise Coupled(f"output {place} of the samples is another than in the batch")
        return spread

    def _spread(self, leaf: Tensor) -> Tensor:
        if leaf.ndim == 0 or leaf.shape[0] != len(self.rows):
            raise Coupled(f"an output of shape {tuple(leaf.shape)} has no row for each sample")
        return leaf.new_zeros(self.size, *leaf.shape[1:]).index_copy(0, self.rows, leaf)


def of_rows(
    replay: Replay, rows: Tensor, size: int, expected: Mapping[int, Tensor] | None = None
) -> RowReplay:
    """The replay on some samples; every input with m rows is taken to have one for each.

    Args:
        replay: of the batch.
        rows: (h,) numbers of samples.
        size: m.
        expected: by place, outputs of the batch that those of the samples are to agree with.

    Raises:
        Coupled: if no input has m rows, a dropout layer draws for the whole batch, or memory does
            for chunks of it only.

    Example:
        >>> model, x = nn.Linear(2, 1), torch.ones(4, 2)
        >>> replay = Replay(model, (x,), {}, Replay.random_state(model))
        >>> (some,) = of_rows(replay, torch.tensor([1, 3]), 4).run({})
        >>> (some == model(x)).flatten()
        tensor([False,  True, False,  True])
    """
    if type(replay) is not Replay:
        raise Coupled("the samples run in chunks already")
    dropouts = (m for m in replay.model.modules() if isinstance(m, nn.modules.dropout._DropoutNd))
    if any(m.training and m.p > 0 for m in dropouts):
        raise Coupled("dropout draws for the whole batch")
    inputs = (replay.args, replay.kwargs)
    if not any(_has_rows(leaf, size) for leaf in tree_leaves(inputs)):
        raise Coupled(f"no input has {size} rows")
    args, kwargs = tree_map(lambda leaf: leaf[rows] if _has_rows(leaf, size) else leaf, inputs)
    return RowReplay(
        replay.model,
        args,
        kwargs,
        replay.random,
        replay.paused,
        replay.buffers,
        rows,
        size,
        {} if expected is None else expected,
    )


def _has_rows(leaf: object, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == size


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether they agree in the mean to two thirds of the digits; waits for a device."""
    digits = max(torch.finfo(t.dtype).eps for t in (found, expected)) ** (2 / 3)
    apart = torch.linalg.vector_norm((found.detach() - expected).double())
    return bool(apart <= digits * torch.linalg.vector_norm(expected.double()))
