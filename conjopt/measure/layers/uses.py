"""Every use of a parameter in a forward, whatever module or function makes it.

A mode sees each call of a torch function while the model runs. Three kinds of tensors are told
apart: parameters and what is computed from parameters alone (tied, transposed, normalised or
masked weights), tensors with a dimension of samples, and constants. A call that brings a
parameter, or what was made of it, together with samples is a *use*; a rule for the function turns
the gradient of its result into per-sample gradients (`conjopt.measure.layers.rules`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from conjopt.measure.layers.layout import (
    LOST,
    RANGE,
    Samples,
    fits,
    locate,
    plain_name,
    tensors,
)

__all__ = ["Recorder", "Use"]

Layout = Callable[[tuple[Any, ...], dict[str, Any]], tuple[dict[int, int | None], Sequence[int]]]
LAYOUTS: dict[Any, Layout] = {}  # of functions that say themselves where they keep samples


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
        stride: Only every so many samples are wanted; set where `whole`.

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
    stride: int = 1

    @property
    def constants(self) -> frozenset[int]:
        """The `id` of those arguments that have no dimension of samples."""
        return frozenset(i for i, at in self.where.items() if at in (None, RANGE))

    def argument(self, place: int, name: str, default: Any = None) -> Any:
        """Return an argument that may have been given by place or by name."""
        return self.args[place] if place < len(self.args) else self.kwargs.get(name, default)

    def is_weight(self, value: Any) -> bool:
        """Whether an argument is one of the weights."""
        return any(value is weight for weight in self.weights)

    def at(self, tensor: Any) -> Samples | None:
        """Return where the samples of an argument are, `None` if it has none."""
        return self.where.get(id(tensor))

    def plain(self, place: int) -> bool:
        """Whether dimension 0 of a result holds the samples and nothing else."""
        return self.places[place] == Samples(0) and self.shapes[place][0] == self.samples

    def every(
        self, stride: int, cotangents: Sequence[Tensor | None]
    ) -> tuple[Use, list[Tensor | None]]:
        """Return the use of every so many samples, and its cotangents, `(*shape)` each."""
        if stride == 1:
            return self, list(cotangents)
        if self.whole:
            return dataclasses.replace(self, stride=stride), list(cotangents)
        where: dict[int, Samples | None] = {}

        def part(value: Any) -> Any:
            if isinstance(value, tuple | list):
                return type(value)(part(item) for item in value)
            at = self.at(value)
            if not isinstance(value, Tensor) or at in (None, LOST):
                return value
            fewer = at.every(value, self.samples, stride)
            where[id(fewer)] = at
            return fewer

        fewer = dataclasses.replace(
            self,
            args=part(self.args),
            kwargs={name: part(value) for name, value in self.kwargs.items()},
            shapes=[
                at.every(torch.empty(shape, device="meta"), self.samples, stride).shape
                if at and at.dim >= 0
                else shape
                for shape, at in zip(self.shapes, self.places, strict=True)
            ],
            samples=-(-self.samples // stride),
            versions=[],
            where=where,
        )
        return fewer, [
            None if c is None else at.every(c, self.samples, stride) if at and at.dim >= 0 else c
            for c, at in zip(cotangents, self.places, strict=True)
        ]


class Recorder(TorchFunctionMode):
    """Records the uses of parameters while it is active.

    Args:
        parameters: By name; those that require gradients are recorded.
        inputs: Tensors of the model's inputs.
        constants: Tensors without samples, such as buffers.
        samples: `m`, the size of the dimension of samples.
        where: Where the samples of the inputs are; by their sizes if `None`.

    Attributes:
        uses: The uses so far.
        made: Tensors that were computed from parameters alone.
        bases: By the `id` of a made tensor, the parameters that it may have been made of.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        constants: Iterable[Tensor],
        samples: int,
        where: Iterable[Samples | None] | None = None,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.uses: list[Use] = []
        self.made: list[Tensor] = []
        self.bases: dict[int, list[Tensor]] = {}
        self._weights = {id(p): p for p in parameters.values() if p.requires_grad}
        self._repeated: dict[int, Tensor] = {}  # what a made tensor repeats for each sample
        self._places: dict[int, tuple[weakref.ref[Tensor], Samples | None]] = {}
        inputs = list(inputs)
        for tensor in (*constants, *(p for p in parameters.values() if not p.requires_grad)):
            self._put(tensor, None)
        for tensor, at in zip(inputs, where or [by_size(t, samples) for t in inputs], strict=True):
            self._put(tensor, at)

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function and record it."""
        kwargs = kwargs or {}
        if self.samples == 0:
            return function(*args, **kwargs)
        given = list(tensors((args, kwargs)))
        weights = [tensor for tensor in given if id(tensor) in self._weights]
        assigns = function is Tensor.__setitem__
        if weights and (assigns or _writes(function)) and torch.is_grad_enabled():
            target, before = args[0], args[0].clone()
            if id(target) in self._weights:
                self._make(before, [target])
                weights = [before if weight is target else weight for weight in weights]
                del self._weights[id(target)]
            else:
                self._put(before, self.where(target))
            result = function(*args, **kwargs)
            plain = _assigned if assigns else getattr(Tensor, plain_name(function), function)
            self._note(plain, (before, *args[1:]), kwargs, weights, [target])
            return result
        held = self.where(args[0]) if assigns else None
        result = function(*args, **kwargs)
        if weights and type(result) is tuple and torch.is_grad_enabled():
            # One may be computed from another: gradients have to arrive at each from outside.
            result = tree_map(_alias, result)
        if assigns:
            self._assign(args[0], args[1], args[2], held)
        elif isinstance(result, Tensor | tuple | list):
            self._note(function, args, kwargs, weights, list(tensors([result])))
            if given and result is given[0] and result._base is not None:
                self._written(result._base)
        return result

    def where(self, tensor: Tensor) -> Samples | None:
        """Return where the samples of a tensor are, `None` if it has none."""
        if id(tensor) in self._weights:
            return None
        reference, at = self._places.get(id(tensor), (None, None))
        if reference is not None and reference() is tensor:
            if at is not None or not tensor.requires_grad or tensor.is_leaf:
                return at
        elif not tensor.requires_grad:
            # Nothing that was seen made it: a custom function, or something kept between calls.
            return Samples(0) if self.samples in tensor.shape[:1] else None
        elif tensor.is_leaf:
            return None
        return by_size(tensor, self.samples) or LOST

    def _put(self, tensor: Tensor, at: Samples | None) -> None:
        self._places[id(tensor)] = (weakref.ref(tensor), at)

    def _make(self, tensor: Tensor, weights: list[Tensor]) -> None:
        """Keep a tensor as made of weights."""
        bases = [b for w in weights for b in self.bases.get(id(w), [w])]
        self.bases[id(tensor)] = list({id(base): base for base in bases}.values())
        if id(tensor) not in self._weights:
            self._weights[id(tensor)] = tensor
            self.made.append(tensor)

    def _written(self, tensor: Tensor) -> None:
        """Take note that samples may have been written to some part of a tensor."""
        if id(tensor) not in self._weights and self.where(tensor) is None:
            at = by_size(tensor, self.samples)
            self._put(tensor, at if tuple(tensor.shape).count(self.samples) == 1 else LOST)

    def _assign(self, target: Tensor, index: Any, value: Any, held: Samples | None) -> None:
        """Take note of samples that are assigned to a part of a tensor."""
        if not isinstance(value, Tensor) or (at := self.where(value)) is None:
            return
        fitting = []
        for dim, size in enumerate(target.shape):
            here = Samples(dim) if held is None else held
            if size % self.samples or (held is not None and dim):
                continue
            view = lambda t, here=here: here if t is target else self.where(t)  # noqa: E731
            found = locate(Tensor.__getitem__, (target, index), {}, view, [target], self.samples)
            after = target.detach()[index].ndim - value.ndim
            if found[0] is not LOST and found[0] == Samples(at.dim + after, at.outer):
                fitting.append(here)
        self._put(target, fitting[0] if len(fitting) == 1 and at is not LOST else LOST)

    def _note(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        results: list[Tensor],
    ) -> None:
        if not results or function is Tensor.backward:
            return
        live = [t for t in results if t.requires_grad]
        if not weights or not live:
            for tensor, at in zip(
                results,
                locate(function, args, kwargs, self.where, results, self.samples),
                strict=True,
            ):
                if id(tensor) not in self._weights:
                    is_range = function is torch.arange and args == (self.samples,)
                    self._put(tensor, RANGE if is_range else at)
            return
        given = {id(t): t for t in tensors((args, kwargs)) if id(t) not in self._weights}
        where = {i: self.where(t) for i, t in given.items()}
        if all(at in (None, RANGE) for at in where.values()):
            for tensor in live:
                self._make(tensor, weights)
                if plain_name(function) in _REPEATS and _repeats(tensor, args[0], self.samples):
                    self._repeated[id(tensor)] = args[0]
            return
        self._use(function, args, kwargs, weights, results, where)

    def _use(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        results: list[Tensor],
        where: dict[int, Samples | None],
    ) -> None:
        weights = list({id(weight): weight for weight in weights}.values())
        places: list[Samples | None]
        whole = False
        if function in LAYOUTS:
            dims, along = LAYOUTS[function](args, kwargs)
            said = {i: None if dim is None else Samples(dim) for i, dim in dims.items()}
            agree = self.samples == 1 or all(
                where.get(i) in (None, RANGE, at) for i, at in said.items()
            )
            where = {**where, **{i: at for i, at in said.items() if i not in self._weights}}
            for weight in [w for w in weights if said.get(id(w)) is not None]:
                if id(weight) in self._repeated:
                    self._repeat(weight, said[id(weight)])
                    where[id(weight)] = said[id(weight)]
                    weights = [w for w in weights if w is not weight]
                else:
                    whole = True
            places = [LOST] * len(results)
            if agree:
                places[:] = [Samples(dim) for dim in along[: len(results)]]
        else:
            look = lambda t: where.get(id(t))  # noqa: E731
            places = locate(function, args, kwargs, look, results, self.samples)
            others = [t for t in tensors((args, kwargs)) if where.get(id(t)) is None]
            if self.samples > 1 and any(self.samples in t.shape for t in others):
                fit = lambda w: fits(  # noqa: E731
                    function, args, kwargs, lambda t: w.get(id(t)), results, places, self.samples
                )
                if not fit(where):
                    more = {id(t): by_size(t, self.samples) for t in others}
                    again = [w for w in weights if id(w) in self._repeated]
                    more = {i: at for i, at in more.items() if i not in self._weights}
                    more |= {id(w): by_size(w, self.samples) for w in again}
                    whole = not fit({**where, **more})
                    where = where if whole else {**where, **more}
                    for weight in () if whole else again:
                        self._repeat(weight, where[id(weight)])
                        weights = [w for w in weights if w is not weight]
        for tensor, at in zip(results, places, strict=True):
            self._put(tensor, at)
        if not weights:
            return
        use = Use(
            function,
            args,
            kwargs,
            weights,
            [],
            [t.shape for t in results],
            places,
            self.samples,
            [(t, t._version) for t in tensors((args, kwargs))],
            where,
            whole,
        )
        self.used(use, results)

    def _repeat(self, weight: Tensor, at: Samples | None) -> None:
        """Take a made tensor that repeats another for each sample as a use of that one."""
        base = self._repeated.pop(id(weight))
        del self._weights[id(weight)]
        self._put(weight, at)
        use = Use(
            Tensor.expand,
            (base, *weight.shape),
            {},
            [base],
            [],
            [weight.shape],
            [at],
            self.samples,
            [(base, base._version)],
            {},
        )
        self.used(use, [weight])

    def used(self, use: Use, results: list[Tensor]) -> None:
        """Keep a use, with where the gradients of its results arrive.

        A subclass that hooks on the results instead must not keep uses: what they hold leads back
        to the hooks, through nodes that Python's collector cannot see.
        """
        use.edges = [get_gradient_edge(t) if t.requires_grad else None for t in results]
        self.uses.append(use)


_WRITES: dict[Any, bool] = {}
_REPEATS = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def by_size(tensor: Tensor, samples: int) -> Samples | None:
    """Guess where samples are: the first or the second dimension, if as long as there are."""
    sizes = tuple(tensor.shape[:2])
    return Samples(sizes.index(samples)) if samples in sizes else None


def _repeats(tensor: Tensor, base: Tensor, samples: int) -> bool:
    """Whether a tensor repeats another along one dimension, as often as there are samples."""
    at, full = by_size(tensor, samples), (1,) * (tensor.ndim - base.ndim) + tuple(base.shape)
    if at is None or full[at.dim] != 1:
        return False
    return all(
        a == b or i == at.dim or b == 1
        for i, (a, b) in enumerate(zip(tensor.shape, full, strict=True))
    )


def _alias(value: Any) -> Any:
    return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value


def _assigned(target: Tensor, index: Any, value: Any) -> Tensor:
    """Assign to a part, without writing."""
    result = target.clone()
    result[index] = value
    return result


def _writes(function: Callable[..., Any]) -> bool:
    known = _WRITES.get(function)
    if known is None:
        name = getattr(function, "__name__", "")
        known = (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
        known = known and name not in ("__index__", "__int__", "__invert__", "requires_grad_")
        _WRITES[function] = known
    return known
