"""Every use of a parameter in a forward, whatever module or function makes it.

A mode sees each call of a torch function while the model runs. Three kinds of tensors are told
apart: parameters and what is computed from parameters alone (tied, transposed, normalised or
masked weights), tensors with a dimension of samples, and constants. A call that brings a
parameter, or what was made of it, together with samples is a *use*; a rule for the function turns
the gradient of its result into per-sample gradients (`conjopt.measure.layers.rules`).
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode_temporarily,
)
from torch.utils._pytree import tree_map

from conjopt.measure.layers.layout import (
    LOST,
    RANGE,
    Samples,
    by_size,
    fits,
    locate,
    plain_name,
    repeated,
    tensors,
)
from conjopt.measure.layers.plan import CONSTANT, SIMPLE, Followed, Found, Plan, tensors_of
from conjopt.measure.layers.use import INTEGERS, LAYOUTS, Use

__all__ = ["Recorder", "Use"]


class Recorder(TorchFunctionMode):
    """Records the uses of parameters while it is active.

    Args:
        parameters: By name; those that require gradients are recorded.
        inputs: Tensors of the model's inputs.
        constants: Finds tensors without samples, such as buffers; called when it matters.
        samples: `m`, the size of the dimension of samples.
        where: Where the samples of the inputs are; by their sizes if `None`.
        plan: Of earlier forwards on inputs of this kind, to follow and to go on writing.

    Attributes:
        uses: The uses so far.
        made: Tensors that were computed from parameters alone.
        bases: By the `id` of a made tensor, the parameters that it may have been made of.
        related: The `id` of all that were made of others, and of what they were made of.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        inputs: Iterable[Tensor],
        constants: Callable[[], Iterable[Tensor]],
        samples: int,
        where: Iterable[Samples | None] | None = None,
        plan: Plan | None = None,
    ) -> None:
        super().__init__()
        self.samples = samples
        self.uses: list[Use] = []
        self.made: list[Tensor] = []
        self.bases: dict[int, list[Tensor]] = {}
        self.related: set[int] = set()
        # Rows that were looked up in a parameter: their numbers, and to tell that they are as then.
        self._looked_up: dict[int, tuple[Tensor, Any, int]] = {}
        complex_ones = [n for n, p in parameters.items() if p.requires_grad and p.is_complex()]
        if complex_ones:
            raise RuntimeError(
                f"Complex parameters are not measured: {', '.join(complex_ones)}. Keep their real "
                "and imaginary parts, and take torch.view_as_complex in the forward."
            )
        self._weights = {id(p): p for p in parameters.values() if p.requires_grad}
        # What a made tensor repeats for each sample, and where.
        self._repeated: dict[int, tuple[Tensor, Samples]] = {}
        # Views whose gradients arrive nowhere else, with their versions.
        self._views: list[tuple[weakref.ref[Tensor], int]] = []
        # Others that are views, and where their gradients arrive once they are written to.
        self._viewed: list[tuple[weakref.ref[Tensor], Use, int, GradientEdge]] = []
        self._places: dict[int, tuple[weakref.ref[Tensor], Samples | None]] = {}
        inputs = list(inputs)
        kept = list(parameters.values())
        self._followed = None if plan is None else Followed(plan, inputs, kept)
        self._find_constants = lambda: (*constants(), *kept)
        self._constants: dict[int, Tensor] | None = None
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
        followed = self._followed
        if followed is None or (step := followed.step(function, args, kwargs)) is None:
            return self._anew(function, args, kwargs)
        given = [] if step.plain else _unique(args, kwargs)
        if not step.plain and len(given) < len(step.found.along):  # two are now the same one
            followed.leave()
            return self._anew(function, args, kwargs)
        weights = [given[i] for i in step.found.weights]
        result = self.call(function, args, kwargs, weights, step.joins)
        result = _apart(result) if weights else result
        results = followed.results(step, result)
        if results is None:
            return self._noted(function, args, kwargs, result, step.joins)
        for tensor, at in zip(results, step.found.places, strict=True):
            self._put(tensor, at)
        if not step.plain:
            self._apply(function, args, kwargs, given, results, step.found)
        return result

    def _anew(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Call a function that is not the next one of the plan."""
        given = _given(args, kwargs)
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
            self._follow_write(target)
            plain = _assigned if assigns else getattr(Tensor, plain_name(function), function)
            args = (before, *args[1:])
            self._note(plain, args, kwargs, weights, [target], _given(args, kwargs))
            self._write_down(function, args, kwargs, result, None)
            return result
        if assigns:
            held = self.where(args[0])
            result = function(*args, **kwargs)
            self._follow_write(args[0])
            self._assign(args[0], args[1], args[2], held)
            self._write_down(function, args, kwargs, result, None)
            return result
        joins = self.joins(function, args, kwargs, weights)
        result = self.call(function, args, kwargs, weights, joins)
        return self._noted(function, args, kwargs, _apart(result) if weights else result, joins)

    def _noted(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        joins: bool,
    ) -> Any:
        """Find out about a call that was made, write it down, and return its result."""
        found: Found | None = None
        if isinstance(result, Tensor | tuple | list) and type(result) is not torch.Size:
            results = [result] if isinstance(result, Tensor) else list(tensors(result))
            given = _given(args, kwargs)
            weights = [tensor for tensor in given if id(tensor) in self._weights]
            found = self._note(function, args, kwargs, weights, results, given)
            if given and result is given[0] and result._base is not None:
                self._follow_write(result)
                self._written(result._base)
                found = None
        elif not tensors_of(result):
            found = Found([])
        self._write_down(function, args, kwargs, result, found, joins)
        return result

    def _write_down(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        found: Found | None,
        joins: bool = False,
    ) -> None:
        if self._followed is not None:
            self._followed.add(function, args, kwargs, result, found, joins, self._is_constant)

    def joins(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
    ) -> bool:
        """Whether a subclass may take over what a call's backward does for weights."""
        return False

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        joins: bool,
    ) -> Any:
        """Call a function; a subclass may take over what its backward does for weights."""
        return function(*args, **kwargs)

    def where(self, tensor: Tensor) -> Samples | None:
        """Return where the samples of a tensor are, `None` if it has none."""
        reference, at = self._places.get(id(tensor), (None, None))
        if at is not None and reference is not None and reference() is tensor:
            return at
        if id(tensor) in self._weights:
            return None
        if reference is not None and reference() is tensor:
            if not tensor.requires_grad or tensor.is_leaf:
                return at
        elif not tensor.requires_grad:
            # Nothing that was seen made it: a custom function, or something kept between calls.
            along = self.samples in tensor.shape[:1] and not self._is_constant(tensor)
            return Samples(0) if along else None
        elif tensor.is_leaf:
            return None
        return by_size(tensor, self.samples) or LOST

    def _is_constant(self, tensor: Tensor) -> bool:
        """Whether the model keeps a tensor."""
        if self._constants is None:
            self._constants = {id(t): t for t in self._find_constants()}
        return id(tensor) in self._constants

    def _put(self, tensor: Tensor, at: Samples | None) -> None:
        self._places[id(tensor)] = (weakref.ref(tensor), at)

    def _make(self, tensor: Tensor, weights: list[Tensor]) -> None:
        """Keep a tensor as made of weights."""
        bases = [b for w in weights for b in self.bases.get(id(w), [w])]
        self.bases[id(tensor)] = list({id(base): base for base in bases}.values())
        self.related.update(map(id, (tensor, *bases)))
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
        given: list[Tensor],
    ) -> Found | None:
        """Find out about a call, and keep it; return what holds for the same call later."""
        if not results or function is Tensor.backward:
            return Found([])
        given = list({id(t): t for t in given}.values())
        live = any(t.requires_grad for t in results)
        numbers = [i for i, t in enumerate(given) if live and _is_in(t, weights)]
        where = {id(t): self.where(t) for t in given}
        if _WITHOUT_SAMPLES.issuperset(where.values()):
            is_range = function is torch.arange and args == (self.samples,)
            places: list[Samples | None] = [RANGE if is_range else None] * len(results)
            found = Found(places, list(where.values()), tuple(numbers), made=bool(numbers))
        else:
            by_id = {id(t): t for t in given}
            places, where, whole, kind = self._remembered(
                function, args, kwargs, by_id, where, results
            )
            along = list(where.values())
            own = [i for i in numbers if along[i] is None]
            repeats = [(i, at) for i in numbers if (at := along[i]) is not None]
            found = Found(places, along, tuple(own), tuple(repeats), False, whole, kind)
        again = not any(id(t) in self._weights for t in results)
        for tensor, at in zip(results, found.places, strict=True):
            if found.made or id(tensor) not in self._weights:
                self._put(tensor, at)
        self._apply(function, args, kwargs, given, results, found)
        return found if again else None

    def looked_up(self, made: Tensor) -> Tensor | None:
        """Return the numbers of the rows of a parameter that a made tensor is, if it is that."""
        index, node, version = self._looked_up.get(id(made), (None, None, -1))
        same = made.grad_fn is node and made._version == version
        return index if same and not made._backward_hooks else None

    def _apply(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: list[Tensor],
        results: list[Tensor],
        found: Found,
    ) -> None:
        """Keep what was found out about parameters in a call."""
        weights = [given[i] for i in found.weights]
        if found.made:
            for tensor in [t for t in results if t.requires_grad]:
                self._make(tensor, weights)
                if function is F.embedding:
                    index, table = _index_and_table(args, kwargs)
                    if table is weights[0] and id(table) not in self.bases:
                        as_then = index, tensor.grad_fn, tensor._version
                        self._looked_up[id(tensor)] = as_then
                if plain_name(function) in _REPEATS and (
                    at := repeated(tensor, args[0], self.samples)
                ):
                    self._repeated[id(tensor)] = args[0], at
            return
        for i, at in found.repeats:
            self._repeat(given[i], at)
        if weights:
            shapes = [t.shape for t in results]
            versions = [(t, t._version) for t in given]
            where = dict(zip(map(id, given), found.along, strict=True))
            places, m = found.places, self.samples
            use = Use(
                function, args, kwargs, weights, [], shapes, places, m, versions, where, found.whole
            )
            use.kind = found.kind
            self.used(use, results)

    def _remembered(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, Tensor],
        where: dict[int, Samples | None],
        results: list[Tensor],
    ) -> tuple[list[Samples | None], dict[int, Samples | None], bool, int | None]:
        """Follow the samples as in an earlier call of this kind, or anew."""
        order = {i: number for number, i in enumerate(given)}
        shapes = tuple([t.shape for t in results])
        try:
            given_as = tuple([self._kind(value, order, where) for value in args])
            named = self._kind(kwargs, order, where) if kwargs else None
            key = (function, self.samples, given_as, named, shapes)
            known = _FOLLOWED.get(key)
        except TypeError:  # an argument that cannot be told from another
            return *self._follow(function, args, kwargs, given, where, results), None
        if known is None:
            places, at, whole = self._follow(function, args, kwargs, given, where, results)
            if len(_FOLLOWED) >= 2**13:
                _FOLLOWED.clear()
            known = _FOLLOWED[key] = places, [at[i] for i in given], whole, next(_KINDS)
        places, along, whole, kind = known
        return places, dict(zip(given, along, strict=True)), whole, kind

    def _kind(self, value: Any, order: dict[int, int], where: dict[int, Samples | None]) -> Any:
        """Return what of an argument decides where samples go, to look it up by."""
        if type(value) in SIMPLE:
            return type(value), value
        if isinstance(value, Tensor):
            i = id(value)
            if i not in order:  # an end of a slice, which decides by its value
                raise TypeError
            repeats = self._repeated[i][1] if i in self._repeated else None
            known = (where[i], i in self._weights, repeats, value.requires_grad)
            return order[i], value.shape, value.dtype, known
        if isinstance(value, (tuple, list)):
            if INTEGERS.issuperset(map(type, value)):
                return tuple, *value
            return tuple([self._kind(item, order, where) for item in value])
        if isinstance(value, dict):
            return tuple([(name, self._kind(item, order, where)) for name, item in value.items()])
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return slice, self._kind(parts, order, where)
        if not isinstance(value, CONSTANT):  # may change, and is not to be held
            raise TypeError
        return type(value), value

    def _follow(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        given: dict[int, Tensor],
        where: dict[int, Samples | None],
        results: list[Tensor],
    ) -> tuple[list[Samples | None], dict[int, Samples | None], bool]:
        """Tell where results and arguments have their samples, and if one cannot be called alone.

        An argument without samples that is as long as there are some may be in step with them,
        like an initial state of zeros; it is if the call does not fit otherwise.
        """
        repeats = {i: self._repeated[i][1] for i in given if i in self._repeated}
        if function in LAYOUTS:
            dims, along = LAYOUTS[function](args, kwargs)
            said = {i: None if dim is None else Samples(dim) for i, dim in dims.items()}
            agree = self.samples == 1 or all(
                where.get(i) in (None, RANGE, at) for i, at in said.items()
            )
            lone = [i for i in said if i in self._weights and i not in repeats]
            whole = any(said[i] is not None for i in lone)
            where = {**where, **said, **dict.fromkeys(lone)}
            said_places: list[Samples | None] = [Samples(d) if agree else LOST for d in along]
            return said_places[: len(results)], where, whole

        def attempt(w: dict[int, Samples | None]) -> tuple[list[Samples | None], bool]:
            look = lambda t: w.get(id(t))  # noqa: E731
            found = locate(function, args, kwargs, look, results, self.samples)
            fit = LOST not in found and fits(
                function, args, kwargs, look, results, found, self.samples
            )
            return found, fit

        if self.samples == 1 or not any(
            where[i] is None and self.samples in t.shape for i, t in given.items()
        ):
            look = lambda t: where.get(id(t))  # noqa: E731
            return locate(function, args, kwargs, look, results, self.samples), where, False
        places, fit = attempt(where)
        if fit:
            return places, where, False
        by_sizes = {i: by_size(t, self.samples) for i, t in given.items() if where[i] is None}
        constant = {
            i: at
            for i, at in by_sizes.items()
            if i not in self._weights
            and (given[i].is_floating_point() or given[i].dtype is torch.bool)
        }
        along_places, fit = attempt(stepping := {**where, **constant, **repeats})
        if fit:
            return along_places, stepping, False
        along_places, fit = attempt({**where, **by_sizes, **constant, **repeats})
        return (along_places if fit else places), where, True

    def _repeat(self, weight: Tensor, at: Samples | None) -> None:
        """Take a made tensor that repeats another for each sample as a use of that one."""
        base, _ = self._repeated.pop(id(weight))
        del self._weights[id(weight)]
        self._put(weight, at)
        if not self.is_used(weight):  # to hold it would lead to its node, and from there back
            self.made = [tensor for tensor in self.made if tensor is not weight]
            del self.bases[id(weight)]
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

    def is_used(self, weight: Tensor) -> bool:
        """Whether gradients of a weight are waited for."""
        return any(_is_in(weight, use.weights) for use in self.uses)

    def used(self, use: Use, results: list[Tensor]) -> None:
        """Keep a use, with where the gradients of its results arrive.

        A subclass that hooks on the results instead must not keep uses: what they hold leads back
        to the hooks, through nodes that Python's collector cannot see.
        """
        use.edges = [get_gradient_edge(t) if t.requires_grad else None for t in results]
        for place, result in enumerate(results):
            base = self.arrival(use, result, len(results)) if result.requires_grad else None
            if base is not None:
                self._viewed.append((weakref.ref(result), use, place, get_gradient_edge(base)))
        self.uses.append(use)

    def arrival(self, use: Use, result: Tensor, several: int) -> Tensor | None:
        """Return what a result is a view of, if its gradient arrives there as well, in some shape.

        That is if it is the same numbers, and nobody else has it. When a view is written to, its
        gradient arrives nowhere else; where it cannot arrive there, writes are refused.

        Args:
            use: Whose result it is.
            result: With its graph.
            several: How many there are: one may have been computed from another.
        """
        base = result._base
        if base is None:
            return None
        whole = base.numel() == result.numel() and base.is_contiguous() and result.is_contiguous()
        given = {id(t) for tensor, _ in use.versions for t in (tensor, tensor._base)}
        if several == 1 and whole and base.grad_fn is not None and id(base) not in given:
            return base
        self._views.append((weakref.ref(result), result._version))
        return None

    def _follow_write(self, tensor: Tensor) -> None:
        """Look for gradients at the bases of views that were written to."""
        base = tensor._base
        if base is None:
            return
        for reference, version in self._views:
            view = reference()
            if view is not None and view._base is base and view._version > version:
                raise RuntimeError(
                    "A result of a layer with parameters is a view of something else and was "
                    "written to, so that its gradient cannot be followed: write to a copy, or out "
                    "of place."
                )
        for reference, use, place, edge in self._viewed:
            if (view := reference()) is not None and view._base is base:
                use.edges[place] = edge


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Take all modes that see calls of torch functions off, and put them on again."""
    modes = _get_current_function_mode_stack()
    with contextlib.ExitStack() as stack:
        for _ in modes:
            stack.enter_context(_pop_mode_temporarily())
        yield


_WRITES: dict[Any, bool] = {}
_FOLLOWED: dict[Any, tuple[list[Samples | None], list[Samples | None], bool, int]] = {}
_KINDS = itertools.count()
_WITHOUT_SAMPLES = frozenset((None, RANGE))
_EMBEDDING = (  # its arguments
    *("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
)
_REPEATS = ("expand", "expand_as", "broadcast_to", "repeat", "tile")


def _given(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict) or (
            isinstance(value, (tuple, list)) and not INTEGERS.issuperset(map(type, value))
        ):
            found.extend(tensors([value]))
    return found


def _index_and_table(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Return what an embedding is given and its table; no table if it does more than look up."""
    given = dict(zip(_EMBEDDING, args, strict=False)) | kwargs
    more = given.get("padding_idx") is not None or given.get("max_norm") is not None
    more = more or given.get("scale_grad_by_freq", False) or given.get("sparse", False)
    return given["input"], None if more else given["weight"]


def _unique(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in _given(args, kwargs)}.values())


def _is_in(value: Tensor, among: list[Tensor]) -> bool:
    return any(value is tensor for tensor in among)


def _apart(result: Any) -> Any:
    """Return results of which none is computed from another: each has a gradient from outside."""
    if type(result) is tuple and torch.is_grad_enabled():
        return tree_map(_alias, result)
    return result


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
