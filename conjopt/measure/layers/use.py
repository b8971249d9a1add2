"""One call of a function with parameters and samples, as it was made in a forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from conjopt.measure.layers.layout import LOST, RANGE, Samples

__all__ = ["INTEGERS", "LAYOUTS", "Use"]

Layout = Callable[[tuple[Any, ...], dict[str, Any]], tuple[dict[int, int | None], Sequence[int]]]
LAYOUTS: dict[Any, Layout] = {}  # of functions that say themselves where they keep samples
INTEGERS = frozenset((int,))


@dataclasses.dataclass(eq=False)
class Use:
    """One call of a function with a parameter, or what was made of one, and samples.

    Attributes:
        function: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        weights: The tensors among them that per-sample gradients are wanted of.
        edges: Of each tensor it returned, where its gradient arrives; `None` where none does.
        shapes: Their shapes.
        places: Where the samples of each are.
        samples: `m`.
        versions: Of the tensor arguments, to notice writes.
        where: By the `id` of an argument, where its samples are.
        whole: Whether it cannot be called for a sample alone.
        rows: The samples that are wanted, of a `whole` one; all if `None`.
        statistics: What a group normalisation kept for its own backward, `(m, groups)` each: means
            and inverse standard deviations.
        kind: The same for calls with the same shapes and options, where samples are in the same
            places; `None` if that cannot be told.

    Example:
        >>> from conjopt.measure.layers.tape import Tape
        >>> tape = Tape(torch.nn.Linear(2, 3), torch.ones(5, 2))
        >>> (use,) = tape.uses
        >>> use.function.__name__, use.samples, [weight.shape for weight in use.weights]
        ('linear', 5, [torch.Size([3, 2]), torch.Size([3])])
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: list[Tensor]
    edges: list[GradientEdge | None]
    shapes: list[torch.Size]
    places: list[Samples | None]
    samples: int
    versions: list[tuple[Tensor, int]]
    where: dict[int, Samples | None]
    whole: bool = False
    rows: range | None = None
    statistics: tuple[Tensor, Tensor] | None = None
    kind: int | None = None

    @property
    def constants(self) -> frozenset[int]:
        """The `id` of those arguments that have no dimension of samples."""
        return frozenset(i for i, at in self.where.items() if at in (None, RANGE))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that may have been given by place or by name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def arguments(self, **defaults: Any) -> list[Any]:
        """Return all arguments of a function, given their names and defaults in its order."""
        given = list(self.args)
        for name in list(defaults)[len(given) :]:
            given.append(self.kwargs.get(name, defaults[name]))
        return given

    def is_weight(self, value: Any) -> bool:
        """Whether an argument is one of the weights."""
        for weight in self.weights:  # noqa: SIM110 (this runs between kernels)
            if value is weight:
                return True
        return False

    def at(self, tensor: Any) -> Samples | None:
        """Return where the samples of an argument are, `None` if it has none."""
        return self.where.get(id(tensor))

    def plain(self, place: int) -> bool:
        """Whether dimension 0 of a result holds the samples and nothing else."""
        return self.places[place] == Samples(0) and self.shapes[place][0] == self.samples

    def take(
        self, rows: slice, cotangents: Sequence[Tensor | None]
    ) -> tuple[Use, list[Tensor | None]]:
        """Return the use of a range of samples, and its cotangents, `(*shape)` each.

        Where a call cannot be made for some samples alone, it stays whole, and says which count.
        """
        few = len(range(self.samples)[rows])
        if few == self.samples:
            return self, list(cotangents)
        if self.whole:
            return dataclasses.replace(self, rows=range(self.samples)[rows]), list(cotangents)
        where: dict[int, Samples | None] = {}
        kept, m = self.statistics, self.samples
        fewer = Use(
            self.function,
            self._part(self.args, rows, where),
            self._part(self.kwargs, rows, where) if self.kwargs else self.kwargs,
            self.weights,
            self.edges,
            [
                shape if at is None else at.shape(shape, m, few)
                for shape, at in zip(self.shapes, self.places, strict=True)
            ],
            self.places,
            few,
            self.versions,
            where,
            statistics=kept and (kept[0][rows], kept[1][rows]),
        )
        return fewer, [
            c if c is None or at is None or at.dim < 0 else at.take(c, m, rows)
            for c, at in zip(cotangents, self.places, strict=True)
        ]

    def _part(self, value: Any, rows: slice, where: dict[int, Samples | None]) -> Any:
        """Take samples of an argument, and note where they are."""
        at = self.where.get(id(value))
        if at is not None and at is not LOST:
            fewer = at.take(value, self.samples, rows)
            where[id(fewer)] = at
            return fewer
        if isinstance(value, (tuple, list)) and not INTEGERS.issuperset(map(type, value)):
            return type(value)([self._part(item, rows, where) for item in value])
        if isinstance(value, dict):
            return {name: self._part(item, rows, where) for name, item in value.items()}
        return value
