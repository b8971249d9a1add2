"""The calls of a forward as they were, to follow the next one by.

Forwards of one model on inputs of one kind make the same calls, as a rule. So what was found out
about each (where samples are, and which parameters are used) is written down. In the next forward
a call is compared with the one that was there before: the same function, given the same constants,
parameters, and results of the same earlier calls, which have their shapes. Then all that was found
out holds again. From the first call that is another, the calls are looked at anew.
"""

from __future__ import annotations

import enum
import numbers
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from conjopt.measure.layers.layout import Samples, tensors

__all__ = ["CONSTANT", "SIMPLE", "Followed", "Found", "Plan", "Step", "tensors_of"]

SIMPLE = frozenset((int, float, bool, str, type(None), torch.dtype, torch.device))
CONSTANT = (numbers.Number, bytes, enum.Enum, type, type(...), torch.layout, torch.memory_format)
_CHANGES = 16  # after so many a plan grows no more
Kind = tuple[torch.Size, torch.dtype, bool]


class Found(NamedTuple):
    """What was found out about a call.

    Attributes:
        places: Where the samples of each tensor that it returned are.
        along: Where those of each tensor that it was given are.
        weights: Which of these are weights that it uses, or that it makes something of.
        repeats: Which of these repeat a weight for each sample, and where.
        made: Whether it makes something of weights alone.
        whole: Whether it cannot be called for a sample alone.
        kind: See `Use`.
    """

    places: list[Samples | None]
    along: Sequence[Samples | None] = ()
    weights: tuple[int, ...] = ()
    repeats: tuple[tuple[int, Samples], ...] = ()
    made: bool = False
    whole: bool = False
    kind: int | None = None


class _Result(NamedTuple):
    """A tensor argument that is an input or what an earlier call returned, by its number.

    Calls that are the same so far returned tensors of the same shapes and types.
    """

    number: int


class _Kept(NamedTuple):
    """A tensor argument that the model keeps; a parameter can be frozen or cast in between."""

    tensor: weakref.ref[Tensor]
    kind: Kind


class _Items(NamedTuple):
    """A tuple, a list, or a slice, as a tuple."""

    type: type
    items: tuple[Any, ...]


class Step(NamedTuple):
    """A call, and what was found out about it.

    Attributes:
        function: What was called.
        args: What it was given, tensors described.
        kwargs: The same by name.
        type: Of what it returned.
        results: Shapes, types, and whether they require gradients, of the tensors in that.
        found: What was found out.
        joins: See `Recorder.joins`.
        plain: Whether it has nothing to do with weights.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    type: type
    results: tuple[Kind, ...]
    found: Found
    joins: bool
    plain: bool


class Plan:
    """The calls of earlier forwards up to where they differ, or cannot be told.

    Attributes:
        steps: The calls.
        inputs: Shapes and types of the inputs, and whether they require gradients.
        kept: The `id` of each parameter.

    Example:
        >>> from conjopt.measure.layers.uses import Recorder
        >>> layer, x, plan = torch.nn.Linear(2, 3), torch.ones(5, 2), Plan()
        >>> for _ in range(2):  # the second follows the first
        ...     with Recorder(dict(layer.named_parameters()), [x], list, 5, plan=plan):
        ...         y = layer(x).relu()
        >>> [step.function.__name__ for step in plan.steps]
        ['linear', 'relu']
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.inputs: list[Kind] | None = None
        self.kept: list[int] | None = None
        self._changes = 0

    @property
    def grows(self) -> bool:
        """Whether calls may still be added at the end."""
        return self._changes < _CHANGES

    def close(self) -> None:
        """Add no more calls: what follows cannot be told from the calls."""
        self._changes = _CHANGES

    def begin(self, inputs: list[Kind], kept: list[int]) -> None:
        """Begin a forward, which has nothing to follow where it has other inputs or parameters."""
        if self.inputs != inputs or self.kept != kept:
            if self.steps:
                self.change(0)
            self.inputs, self.kept = inputs, kept

    def change(self, at: int) -> None:
        """Forget the calls from one on, which was another this time."""
        del self.steps[at:]
        self._changes += 1


class Followed:
    """One forward that goes along a plan.

    Args:
        plan: Of earlier ones.
        inputs: Tensors of this one's inputs.
        kept: Parameters of the model.
    """

    def __init__(self, plan: Plan, inputs: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
        plan.begin(list(map(_kind, inputs)), list(map(id, kept)))
        self._plan: Plan | None = plan
        self._at = 0
        self._tensors = [weakref.ref(tensor) for tensor in inputs]  # inputs, then results
        self._numbers: dict[int, int] | None = None  # of these, by `id`; of use where plans grow

    def step(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Step | None:
        """Return the step that a call is, if it is the next one."""
        if self._plan is None:
            return None
        steps = self._plan.steps
        if self._at == len(steps):
            return None
        step = steps[self._at]
        if (
            step.function == function
            and len(args) == len(step.args)
            and all(map(self._same, args, step.args))
            and (not kwargs or list(kwargs) == list(step.kwargs))  # in this order, too
            and (not kwargs or all(self._same(kwargs[n], k) for n, k in step.kwargs.items()))
        ):
            return step
        self.leave()
        return None

    def results(self, step: Step, result: Any) -> list[Tensor] | None:
        """Return the tensors that a step's call returned, if they are as they were."""
        if type(result) is step.type:
            found = [result] if isinstance(result, Tensor) else tensors_of(result)
            if len(found) == len(step.results) and all(map(_is_as, found, step.results)):
                self._went(found)
                return found
        self.leave()
        return None

    def leave(self) -> None:
        """Forget the next step, which is another this time."""
        if self._plan is not None:
            self._plan.change(self._at)

    def add(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        result: Any,
        found: Found | None,
        joins: bool,
        keeps: Callable[[Tensor], bool],
    ) -> None:
        """Write a call down that was not in the plan.

        Args:
            function: What was called.
            args: What it was given.
            kwargs: The same by name.
            result: What it returned.
            found: What was found out about it; `None` ends the plan.
            joins: See `Recorder.joins`.
            keeps: Tells whether the model keeps a tensor.
        """
        if self._plan is None or not self._plan.grows:
            self._plan = None
            return
        if self._numbers is None:
            self._numbers = {}
            self._number(self._tensors, 0)
        results = tensors_of(result)
        try:
            if found is None:
                raise TypeError
            step = Step(
                function,
                tuple([self._described(value, keeps) for value in args]),
                {name: self._described(value, keeps) for name, value in kwargs.items()},
                type(result),
                tuple(map(_kind, results)),
                found,
                joins,
                not found.weights and not found.repeats,
            )
        except TypeError:
            self._plan.close()
            self._plan = None
            return
        self._plan.steps.append(step)
        self._went(results)

    def _went(self, results: list[Tensor]) -> None:
        self._at += 1
        references = [weakref.ref(tensor) for tensor in results]
        if self._numbers is not None:
            self._number(references, len(self._tensors))
        self._tensors += references

    def _number(self, references: list[weakref.ref[Tensor]], start: int) -> None:
        assert self._numbers is not None
        for number, reference in enumerate(references, start):
            if (tensor := reference()) is not None:
                self._numbers[id(tensor)] = number

    def _same(self, value: Any, known: Any) -> bool:
        """Whether an argument is the one that was described."""
        kind: Any = type(known)
        if kind is _Result:
            return value is self._tensors[known.number]() is not None
        if kind is _Kept:
            return value is known.tensor() is not None and _is_as(value, known.kind)
        if kind is _Items:
            if type(value) is not known.type:
                return False
            items = (value.start, value.stop, value.step) if known.type is slice else value
            return len(items) == len(known.items) and all(map(self._same, items, known.items))
        return value is known or (type(value) is kind and bool(value == known))

    def _described(self, value: Any, keeps: Callable[[Tensor], bool]) -> Any:
        """Describe an argument, to know it again."""
        if isinstance(value, Tensor):
            assert self._numbers is not None
            number = self._numbers.get(id(value), -1)
            if number >= 0 and self._tensors[number]() is value:
                return _Result(number)
            if not keeps(value):
                raise TypeError
            return _Kept(weakref.ref(value), _kind(value))
        if type(value) in SIMPLE:
            return value
        if isinstance(value, slice):
            value = slice, (value.start, value.stop, value.step)
            if tensors_of(value[1]):  # an end that decides by its value
                raise TypeError
        elif isinstance(value, tuple | list):
            value = type(value), value
        elif isinstance(value, CONSTANT):
            return value
        else:  # may change, and is not to be held
            raise TypeError
        return _Items(value[0], tuple([self._described(item, keeps) for item in value[1]]))


def tensors_of(value: Any) -> list[Tensor]:
    """Return the tensors in nested tuples, lists and dicts."""
    return list(tensors([value]))


def _kind(tensor: Tensor) -> Kind:
    return tensor.shape, tensor.dtype, tensor.requires_grad


def _is_as(tensor: Tensor, kind: Kind) -> bool:
    shape, dtype, requires_grad = kind
    return tensor.shape == shape and tensor.dtype is dtype and tensor.requires_grad is requires_grad
