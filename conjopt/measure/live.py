"""A forward that is recorded, and measured while its ordinary backward passes by."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from conjopt.measure.layers.convolutions import CONVOLUTIONS, summed
from conjopt.measure.layers.layout import Samples
from conjopt.measure.layers.pieces import (
    SLAB,
    Dense,
    Piece,
    lengths,
    norms_and_sum,
    squared_norms,
    sum_of,
)
from conjopt.measure.layers.plan import Plan
from conjopt.measure.layers.program import Lists, again
from conjopt.measure.layers.rules import by_shapes, pieces_of
from conjopt.measure.layers.tape import constants_of, through
from conjopt.measure.layers.uses import Recorder, Use

__all__ = ["Live"]

# They keep what they were given for the backward, so that it cannot run twice unless told to.
_PLAIN = frozenset((Tensor, nn.Parameter))
_KEEPING = CONVOLUTIONS | {F.linear}
LITTLE, MANY = 2**16, 64  # bytes of gradients whose norms can wait, and how many may


class Live(Recorder):
    """Records one forward, and measures in its backward.

    Args:
        model: That runs.
        inputs: Tensors of its inputs.
        places: Where their samples are.
        samples: `m`.
        stride: One of so many samples is measured: every so-many-th, or, where fused, the first
            ones, whose gradients add to those of the others.
        fused: Whether gradients of weights may be sums of per-sample ones.
        store: Called with the norms and the number of the backward when one is over.
        plan: Of earlier forwards on inputs of this kind.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: list[Tensor],
        places: list[Samples | None],
        samples: int,
        stride: int,
        fused: bool,
        store: Callable[[Tensor, int], None],
        plan: Plan,
    ) -> None:
        parameters = dict(model.named_parameters())
        super().__init__(parameters, inputs, partial(constants_of, model), samples, places, plan)
        self._stride, self._store, self._fused = min(stride, samples), store, fused
        self._rows = -(-samples // self._stride)
        self._counts: dict[int, int] = {}
        self._kept: dict[int, list[Piece]] = {}
        self._little: list[Tensor] = []
        self._squares: list[Tensor] = []
        self._task = -1
        self._joints: dict[int, _Joint] = {}  # by the result

    def joins(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
    ) -> bool:
        """Whether the gradients of a call's weights can be sums of per-sample ones."""
        if not (weights and self._fused and function in _KEEPING):
            return False
        x, known = args[0] if args else kwargs["input"], {id(weight) for weight in weights}
        few = function is F.linear and x.ndim < 3
        return not (few or id(x) in known or self.where(x) is None or known & self._repeated.keys())

    def call(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        weights: list[Tensor],
        joins: bool,
    ) -> Any:
        """Call a function; where its weights' gradients are to be sums, without gradients of them.

        Under checkpointing nothing is taken over: what is recomputed has to be the same again.
        """
        if (
            not joins
            or not torch.is_grad_enabled()
            or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
            # By another probe, which is to see the weights, too.
            or any(isinstance(m, Recorder) for m in _get_current_function_mode_stack())
        ):
            return function(*args, **kwargs)
        known = {id(weight) for weight in weights}
        bare = [a.detach() if id(a) in known else a for a in args]
        named = {name: a.detach() if id(a) in known else a for name, a in kwargs.items()}
        joint = _Joint(self, function, args, kwargs, list({id(w): w for w in weights}.values()))
        result = function(*bare, **named)
        # A linear layer on sequences returns a view, and to join that would copy its gradient.
        whole = result if result._base is None else result._base
        if whole.numel() != result.numel() or not (
            whole.is_contiguous() and result.is_contiguous()
        ):
            whole = result = result.clone()
        joined = _Join.apply(joint, whole, *joint.weights)
        result = joined if whole is result else joined.view(result.shape)
        self._joints[id(result)] = joint
        return result

    def is_used(self, weight: Tensor) -> bool:
        """Whether gradients of a weight are waited for."""
        return id(weight) in self._counts

    def used(self, use: Use, results: list[Tensor]) -> None:
        """Hook on a use's results, to measure when their gradients arrive."""
        for weight in use.weights:
            self._counts[id(weight)] = self._counts.get(id(weight), 0) + 1
        joint = self._joints.pop(id(results[0]), None)
        if joint is not None:
            joint.use = use
            return
        held = [use]
        live = [t for t in results if t.requires_grad]
        places = [i for i, t in enumerate(results) if t.requires_grad]
        if len(live) == 1:
            (place,), (result,) = places, live
            base = self.arrival(use, result, len(results))
            result = result if base is None else base
            node, number = result.grad_fn, result.output_nr
            assert node is not None
            use.statistics = _statistics(use, node)
            # After all hooks of the tensor, which may change its gradient.
            node.register_prehook(lambda gradients: self._arrived(held, place, gradients[number]))
            return
        handles: list[RemovableHandle] = []

        for result in live:
            self.arrival(use, result, len(results))

        def arrived(gradients: Sequence[Tensor | None]) -> None:
            self._all_arrived(held, places, gradients)
            if not keeps_graph():
                handles.pop().remove()  # these hooks and their nodes hold each other

        handles.append(torch.autograd.graph.register_multi_grad_hook(live, arrived))

    def joined(self, use: Use, gradient: Tensor) -> dict[int, Tensor]:
        """Measure, and return the sums of the per-sample gradients by the `id` of the weight."""
        sums: dict[int, Tensor] = {}
        self._measure(use, [gradient.reshape(use.shapes[0])], sums)
        return sums

    def _arrived(self, held: list[Use], place: int, gradient: Tensor | None) -> None:
        if gradient is not None and held:  # else the node itself says that its graph is gone
            shape = held[0].shapes[place]
            gradient = gradient if gradient.shape == shape else gradient.reshape(shape)
            self._all_arrived(held, (place,), (gradient,))

    def _all_arrived(
        self, held: list[Use], places: Sequence[int], gradients: Sequence[Tensor | None]
    ) -> None:
        (use,) = held
        if use.function in _KEEPING and not keeps_graph():
            held.clear()
        cotangents: list[Tensor | None] = [None] * len(use.shapes)
        for place, gradient in zip(places, gradients, strict=True):
            grown = gradient is not None and gradient.requires_grad  # with create_graph
            cotangents[place] = gradient.detach() if gradient is not None and grown else gradient
        self._measure(use, cotangents)

    def _measure(
        self,
        use: Use,
        cotangents: Sequence[Tensor | None],
        sums: dict[int, Tensor] | None = None,
    ) -> None:
        if not self._squares and not self._kept and not self._little:
            self._task = torch._C._current_graph_task_id()
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        with torch.no_grad():
            if all(map(self._alone, use.weights)):
                squares, little, found = self._norms(use, cotangents, sums is not None)
                self._squares += squares
                self._little += little
                if len(self._little) >= MANY:
                    self._count_little()
                if sums is not None and len(found) == len(use.weights):
                    sums |= dict(zip(map(id, use.weights), found, strict=True))
                return
            parts: list[Tensor] = []
            for rows in self._ranges(use):
                part, mine = use.take(rows, cotangents)
                for weight, piece in pieces_of(part, _leading(mine)):
                    if not self._alone(weight):
                        self._keep(weight, piece)
                    else:
                        parts.append(squared_norms([piece]))
                    if sums is not None:
                        _add(sums, weight, sum_of(piece))
            if sums is not None:
                self._add_unmeasured(sums, use, cotangents)
            self._squares += parts

    def _norms(self, use: Use, cotangents: Sequence[Tensor | None], summing: bool) -> Lists:
        """Return what `_norms_by_rules` does, for a known kind of use without the rules."""
        inputs = [t for t, version in use.versions if t._version == version]
        unchanged = len(inputs) == len(use.versions)  # else the rules refuse
        inputs += use.statistics or ()
        inputs += [t for t in cotangents if t is not None]
        key = self._key(use, inputs, cotangents, summing) if unchanged else None
        if key is None:
            return self._norms_by_rules(use, cotangents, summing)
        return again(key, inputs, lambda: self._norms_by_rules(use, cotangents, summing))

    def _key(
        self,
        use: Use,
        inputs: list[Tensor],
        cotangents: Sequence[Tensor | None],
        summing: bool,
    ) -> Any:
        """Return all that decides what is done for a use; `None` if that cannot be told."""
        if use.kind is None or not by_shapes(use):
            return None
        if not _PLAIN.issuperset(map(type, inputs)):
            return None
        kinds = [(t.dtype, t.device, t.stride()) for t in inputs if t.layout is torch.strided]
        if len(kinds) < len(inputs):
            return None
        missing = None if len(cotangents) == 1 else tuple([c is None for c in cotangents])
        autocast = torch._C._is_any_autocast_enabled()
        return use.kind, self._stride, self._fused, summing, autocast, missing, *kinds

    def _norms_by_rules(
        self, use: Use, cotangents: Sequence[Tensor | None], summing: bool
    ) -> Lists:
        """Return squared norms, small gradients whose norms are taken later, and sums.

        The sums over samples are those of each weight, where they are asked for.
        """
        parts: list[Tensor] = []
        little: list[Tensor] = []
        sums: dict[int, Tensor] = {}
        ranges = self._ranges(use)
        for rows in ranges:
            part, mine = use.take(rows, cotangents)
            squares: Tensor | None = None
            for weight, piece in pieces_of(part, _leading(mine)):
                if summing:
                    own, total = norms_and_sum(piece)
                    _add(sums, weight, total)
                elif len(ranges) == 1 and isinstance(piece, Dense) and _is_little(piece, mine):
                    little.append(piece.gradients[0].flatten(1))
                    continue
                else:
                    own = squared_norms([piece])
                squares = own if squares is None else squares + own
            if squares is not None:
                parts.append(squares)
        if summing:
            self._add_unmeasured(sums, use, cotangents)
        found = [sums[id(weight)] for weight in use.weights if id(weight) in sums]
        return parts if len(parts) < 2 else [torch.cat(parts)], little, found

    def _count_little(self) -> None:
        by_kind: dict[torch.dtype, list[Tensor]] = {}
        for gradients in self._little:
            by_kind.setdefault(gradients.dtype, []).append(gradients)
        self._little = []
        for same in by_kind.values():
            self._squares.append(lengths(torch.cat(same, 1), 1).square())

    def _add_unmeasured(
        self, sums: dict[int, Tensor], use: Use, cotangents: Sequence[Tensor | None]
    ) -> None:
        """Add the weights' gradients by the samples that are not measured, without norms."""
        if self._rows == self.samples:
            return
        part, mine = use.take(slice(self._rows, None), cotangents)
        if use.function in CONVOLUTIONS and use.plain(0) and not use.whole:
            (b,) = mine
            found = {} if b is None else summed(part, b)
        else:
            found = {id(weight): sum_of(piece) for weight, piece in pieces_of(part, _leading(mine))}
        for weight in use.weights:
            if id(weight) in found:
                _add(sums, weight, found[id(weight)])

    def _ranges(self, use: Use) -> list[slice]:
        """Return ranges of the samples to measure at a time, to hold few gradients at once."""
        rows, step = self._rows, 1 if self._fused else self._stride
        few = rows
        if use.function in CONVOLUTIONS and not use.whole and all(map(self._alone, use.weights)):
            few = max(1, SLAB // max(1, *(weight.numel() for weight in use.weights)))
            few = math.ceil(rows / math.ceil(rows / few))  # equal parts
        ends = [*range(0, rows, few), rows]
        return [
            slice(start * step, min(stop * step, self.samples), step)
            for start, stop in itertools.pairwise(ends)
        ]

    def _alone(self, weight: Tensor) -> bool:
        """Whether no other use adds to a weight's gradients."""
        return self._counts[id(weight)] == 1 and id(weight) not in self.related

    def _keep(self, weight: Tensor, piece: Piece) -> None:
        if id(weight) not in self.bases:
            self._kept.setdefault(id(weight), []).append(piece)
            return
        with torch.enable_grad():
            found = list(through(weight, self, piece))
        for base, dense in found:
            self._kept.setdefault(id(base), []).append(dense)

    def _finish(self) -> None:
        with torch.no_grad():
            for pieces in self._kept.values():
                self._squares.append(squared_norms(pieces))
            self._count_little()
            squares, self._squares, self._kept = self._squares, [], {}
            if squares:
                total = torch.stack(squares).sum(0)
                self._store(self.samples * total.sqrt(), self._task)


def _leading(cotangents: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return cotangents as those of one direction, `(1, *shape)`."""
    return [None if c is None else c[None] for c in cotangents]


def _add(sums: dict[int, Tensor], weight: Tensor, gradient: Tensor) -> None:
    """Add to the sum of a weight's gradients."""
    gradient = gradient.reshape(weight.shape)
    before = sums.get(id(weight))
    sums[id(weight)] = gradient if before is None else before + gradient


def _is_little(piece: Dense, cotangents: Sequence[Tensor | None]) -> bool:
    """Whether gradients are small, and no part of what may be written to within the backward."""
    storage = piece.gradients.untyped_storage()
    return storage.nbytes() <= LITTLE and all(
        c is None or c.untyped_storage().data_ptr() != storage.data_ptr() for c in cotangents
    )


def _statistics(use: Use, node: Any) -> tuple[Tensor, Tensor] | None:
    """Return the means and inverse deviations that a group normalisation keeps for its backward."""
    if use.function is not F.group_norm or node.name() != "NativeGroupNormBackward0":
        return None
    return node._saved_result1.detach(), node._saved_result2.detach()


@dataclasses.dataclass
class _Joint:
    """A call whose weights' gradients are sums of per-sample ones, until its backward."""

    live: Live
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    weights: list[Tensor]
    use: Use | None = None

    def gradients(self, gradient: Tensor) -> list[Tensor]:
        """Return the weights' gradients, and measure."""
        if self.use is not None:
            found = self.live.joined(self.use, gradient)
            if all(id(weight) in found for weight in self.weights):
                return [found[id(weight)].to(weight.dtype) for weight in self.weights]
        with torch.enable_grad():
            bare = {id(w): w.detach().requires_grad_() for w in self.weights}
            args, kwargs = tree_map(lambda a: bare.get(id(a), a), (self.args, self.kwargs))
            result = self.function(*args, **kwargs)
            gradient = gradient.reshape(result.shape)
            return list(torch.autograd.grad(result, list(bare.values()), gradient))


class _Join(torch.autograd.Function):
    """Hands a result on, and gives the weights that made it their gradients."""

    @staticmethod
    def forward(ctx: Any, joint: _Joint, result: Tensor, *weights: Tensor) -> Tensor:
        ctx.joint = joint
        ctx.mark_dirty(result)  # else what follows could not write to it
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        joint = ctx.joint
        if joint is None:
            raise RuntimeError(
                "A backward ran twice through what the probe measured: give the first "
                "retain_graph=True."
            )
        if not keeps_graph():
            ctx.joint = None
        return None, gradient, *joint.gradients(gradient)


def keeps_graph() -> bool:
    """Whether the backward that runs may be run again."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if ask is None else bool(ask())
