"""Statements on a term of a loss, each on a batch."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from conjopt.potentials import Potential
from conjopt.regularizers import Regularizer
from conjopt.regularizers.queue import Queue
from conjopt.testing.optimizer_contract import Sides, alike, both, comparable
from conjopt.testing.optimizer_runs import numbers
from conjopt.testing.regularizer_batches import KINDS, batch
from conjopt.testing.searching import Apart

__all__ = ["OnTerms", "Traits"]

Statement = Callable[..., Sides]
STEP = 1e-4  # of differences


@dataclasses.dataclass(frozen=True)
class Traits:
    """What a term is to keep beside what all keep; see `check_regularizer`."""

    shift: str | None
    symmetric: bool
    mean: bool
    sign: int | None
    soft_targets: bool
    ignore_index: int | None
    empty: bool


class OnTerms:
    """The statements on one term, each from the parts of a batch.

    Args:
        term: of which copies are looked at.
        potential: of its targets.
        traits: of it.
    """

    def __init__(self, term: nn.Module, potential: Potential, traits: Traits) -> None:
        self.term, self.potential, self.traits = term, potential, traits

    def all(self) -> tuple[dict[str, tuple[Statement, Sequence[str]]], dict[str, str]]:
        """By name, each statement with the kinds of batches it speaks of; and what is left out."""
        random = KINDS[:1]
        named: dict[str, tuple[Statement, Sequence[str]]] = {
            "the value is a finite scalar": (self.scalar, KINDS),
            "the gradient is finite": (self.finite_gradient, KINDS),
            "the gradient is the derivative of the value": (self.derivative, random),
            "value and gradient are finite in float32 and bfloat16": (self.narrow, KINDS),
            "in float32 the value is that of float64": (self.single, random),
            "the order of samples does not matter": (self.order, KINDS),
            "equal calls are equal": (self.deterministic, KINDS),
            "a call does not write to the batch": (self.untouched, KINDS),
            "in evaluation mode a call changes nothing": (self.evaluation, KINDS),
            "exact resume from state_dict": (self.resumed, random),
        }
        further: dict[str, tuple[Statement, Sequence[str], bool, str]] = {
            "without weight there is no value": (
                self.no_weight,
                KINDS,
                self.weighed,
                "as it has no weight that is a number",
            ),
            "the value is proportional to the weight": (
                self.proportional,
                KINDS,
                self.weighed,
                "as it has no weight that is a number",
            ),
            "a shift of the outputs changes nothing": (
                self.shifted,
                ("random", "one class"),
                self.traits.shift is not None,
                "as shift= is None",
            ),
            "classes may change their places": (
                self.permuted,
                KINDS,
                self.traits.symmetric,
                "as symmetric= is False",
            ),
            "a batch twice over has its value": (
                self.doubled,
                KINDS,
                self.traits.mean,
                "as mean= is False",
            ),
            "the value has its sign": (
                self.signed,
                KINDS,
                self.traits.sign is not None,
                "as sign= is None",
            ),
            "probabilities at the vertices are classes": (
                self.vertices,
                KINDS,
                self.traits.soft_targets and self.potential.on_simplex,
                "as soft_targets= is False"
                if self.potential.on_simplex
                else "as targets are no classes",
            ),
            "ignored samples do not count": (
                self.ignored,
                KINDS,
                self.traits.ignore_index is not None,
                "as ignore_index= is None",
            ),
            "an empty batch has the value 0": (
                self.empty,
                KINDS[:1],
                self.traits.empty,
                "as empty= is False",
            ),
        }
        left_out = {}
        for name, (statement, kinds, applies, why) in further.items():
            if applies:
                named[name] = (statement, kinds)
            else:
                left_out[name] = why
        return named, left_out

    @property
    def weighed(self) -> bool:
        """Whether it has a weight to set."""
        weight = getattr(self.term, "weight", None)
        return isinstance(self.term, Regularizer) or (
            isinstance(weight, int | float) and not isinstance(weight, bool)
        )

    # Values.

    def fresh(self, dtype: torch.dtype = torch.float64) -> nn.Module:
        """A copy with an empty queue."""
        term = copy.deepcopy(self.term).to(dtype)
        for part in term.modules():
            if isinstance(part, Queue):
                part.clear()
        return term

    def value(self, f: Tensor, y: Tensor, term: nn.Module | None = None) -> Tensor:
        """Of a call, by a fresh copy."""
        value = (self.fresh() if term is None else term)(f, y)
        if not isinstance(value, Tensor) or value.shape != ():
            a = f"tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else None
            raise Apart(f"a {a or type(value).__name__}", "a scalar tensor of shape ()")
        return value

    def with_gradient(
        self, f: Tensor, y: Tensor, term: nn.Module | None = None
    ) -> tuple[Tensor, Tensor]:
        """Of a call, by a fresh copy: ``()`` and as ``f``, 0 where nothing depends on it."""
        f = f.detach().clone().requires_grad_()
        with torch.enable_grad():
            value = self.value(f, y, term)
        if not value.requires_grad:
            return value.detach(), torch.zeros_like(f)
        (gradient,) = torch.autograd.grad(value, f, allow_unused=True)
        return value.detach(), torch.zeros_like(f) if gradient is None else gradient

    def batch(self, *parts: Any) -> tuple[Tensor, Tensor]:
        """Outputs and targets."""
        return batch(self.potential, *parts)

    # Statements on every term.

    def scalar(self, *parts: Any) -> Sides:
        """Of shape (), and neither NaN nor infinite."""
        return _finite("the value", self.value(*self.batch(*parts)))

    def finite_gradient(self, *parts: Any) -> Sides:
        """No entry of the gradient by the outputs is NaN or infinite."""
        return _finite("the gradient", self.with_gradient(*self.batch(*parts))[1])

    def derivative(self, *parts: Any) -> Sides:
        """Along a random direction, by central differences of two lengths."""
        f, y = self.batch(*parts)
        v = torch.randn(f.shape, generator=torch.Generator().manual_seed(parts[-1])).double()
        expected = (self.with_gradient(f, y)[1] * v).sum()
        by: list[Tensor] = []
        for h in (STEP, STEP / 2):
            with torch.no_grad():
                by.append((self.value(f + h * v, y) - self.value(f - h * v, y)) / (2 * h))
        difference = (4 * by[1] - by[0]) / 3
        size = 1e-6 * (1 + difference.abs()) + 10 * (by[0] - by[1]).abs()
        return expected[None], difference[None], size[None], "="

    def narrow(self, *parts: Any) -> Sides:
        """With outputs, and the term's own tensors, in float32 and in bfloat16."""
        f, y = self.batch(*parts)
        all_sides = []
        for dtype in (torch.float32, torch.bfloat16):
            targets = y.to(dtype) if y.is_floating_point() else y
            value, gradient = self.with_gradient(f.to(dtype), targets, self.fresh(dtype))
            all_sides.append(_finite(f"the value in {dtype}", value))
            all_sides.append(_finite(f"the gradient in {dtype}", gradient))
        return both(*all_sides)

    def single(self, *parts: Any) -> Sides:
        """To 1e-4 of it."""
        f, y = self.batch(*parts)
        targets = y.float() if y.is_floating_point() else y
        found = self.value(f.float(), targets, self.fresh(torch.float32)).double()
        return _close(found.detach(), self.value(f, y).detach(), 1e-4)

    def order(self, *parts: Any) -> Sides:
        """The value of the samples in another order; of random ones the gradient, too."""
        f, y = self.batch(*parts)
        order = torch.randperm(len(f), generator=torch.Generator().manual_seed(parts[-1]))
        order = torch.roll(order, 1)
        value, gradient = self.with_gradient(f, y)
        other, moved = self.with_gradient(f[order], y[order])
        sides = _close(other, value, _accuracy(parts[0]))
        return sides if parts[0] != KINDS[0] else both(sides, _close(moved, gradient[order], 1e-8))

    def deterministic(self, *parts: Any) -> Sides:
        """Two copies with other random numbers around them."""
        f, y = self.batch(*parts)
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append(self.value(f, y).detach()[None])
        return alike(*found)

    def untouched(self, *parts: Any) -> Sides:
        """Neither forward nor backward writes to outputs or targets."""
        f, y = self.batch(*parts)
        f.requires_grad_()
        before, kept = f.detach().clone(), y.clone()
        value = self.value(f, y)
        if value.requires_grad:
            value.backward()
        return both(alike(f.detach().flatten(), before.flatten()), alike(_flat(y), _flat(kept)))

    def evaluation(self, *parts: Any) -> Sides:
        """After two calls, neither the state nor the value of the next has changed."""
        f, y = self.batch(*parts)
        term = self.fresh().eval()
        before = _state(term)
        first = self.with_gradient(f, y, term)[0]
        self.with_gradient(2 * f, y, term)
        again = self.with_gradient(f, y, term)[0]
        return both(alike(again[None], first[None]), alike(_state(term), before))

    def resumed(self, *parts: Any) -> Sides:
        """After two calls, through a file, into a copy that saw another batch."""
        kind, samples, outputs, seed = parts

        def call(term: nn.Module, number: int) -> Tensor:
            return self.with_gradient(*self.batch(kind, samples, outputs, seed + number), term)[0]

        term, again = self.fresh(), self.fresh()
        start = copy.deepcopy(term.state_dict())
        for number in (1, 2):
            call(term, number)
        file = io.BytesIO()
        torch.save(term.state_dict(), file)
        call(again, 5)
        again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        found = torch.stack([call(again, number) for number in (3, 4)])
        expected = torch.stack([call(term, number) for number in (3, 4)])
        again.load_state_dict(start)
        new = self.fresh()
        return both(alike(found, expected), alike(call(again, 3)[None], call(new, 3)[None]))

    # Statements on terms with further traits.

    def no_weight(self, *parts: Any) -> Sides:
        """With weight 0, value and gradient are 0."""
        value, gradient = self.with_gradient(*self.batch(*parts), self._with_weight(0.0))
        found = torch.cat([value[None], gradient.flatten()])
        return alike(found, torch.zeros_like(found))

    def proportional(self, *parts: Any) -> Sides:
        """Three times the weight is three times the value, and of random ones the gradient."""
        f, y = self.batch(*parts)
        one = self.with_gradient(f, y, self._with_weight(0.5))
        three = self.with_gradient(f, y, self._with_weight(1.5))
        sides = _close(three[0], 3 * one[0])
        return sides if parts[0] != KINDS[0] else both(sides, _close(three[1], 3 * one[1]))

    def shifted(self, *parts: Any) -> Sides:
        """By one number for each sample, or by one for all."""
        f, y = self.batch(*parts)
        by = torch.linspace(-2, 3, len(f), dtype=f.dtype).unsqueeze(1)
        by = by if self.traits.shift == "each" else torch.full_like(by, 1.5)
        return _close(self.value(f + by, y).detach(), self.value(f, y).detach())

    def permuted(self, *parts: Any) -> Sides:
        """Outputs and targets under one permutation."""
        f, y = self.batch(*parts)
        k = f.shape[1]
        place = torch.arange(1, k + 1) % k  # of each class: the next one
        moved = torch.empty_like(f)
        moved[:, place] = f
        targets = torch.empty_like(y)
        if y.ndim == 1:
            targets = place[y]
        else:
            targets[:, place] = y
        found = self.value(moved, targets).detach()
        return _close(found, self.value(f, y).detach(), _accuracy(parts[0]))

    def doubled(self, *parts: Any) -> Sides:
        """Each sample twice."""
        f, y = self.batch(*parts)
        twice = self.value(torch.cat([f, f]), torch.cat([y, y])).detach()
        return _close(twice, self.value(f, y).detach(), _accuracy(parts[0]))

    def signed(self, *parts: Any) -> Sides:
        """Not negative, or not positive."""
        assert self.traits.sign is not None
        value = self.traits.sign * self.value(*self.batch(*parts)).detach()[None]
        return value, torch.zeros_like(value), torch.full_like(value, 1e-12), ">="

    def vertices(self, *parts: Any) -> Sides:
        """One-hot probabilities for class indices; for random ones the gradient, too."""
        f, y = self.batch(*parts)
        soft = self.with_gradient(f, one_hot(y, f.shape[1]).to(f))
        hard = self.with_gradient(f, y)
        sides = _close(soft[0], hard[0], _accuracy(parts[0]))
        return sides if parts[0] != KINDS[0] else both(sides, _close(soft[1], hard[1], 1e-8))

    def ignored(self, *parts: Any) -> Sides:
        """Two more of them change nothing, have no gradient, and alone are worth 0."""
        f, y = self.batch(*parts)
        assert self.traits.ignore_index is not None
        more = torch.cat([f, 1 - 3 * f[:1], 2 * f[:1]])
        nothing = torch.full((2,), self.traits.ignore_index)
        value, gradient = self.with_gradient(more, torch.cat([y, nothing]))
        alone, still = self.with_gradient(more[-2:], nothing)
        zeros = torch.cat([gradient[-2:].flatten(), still.flatten(), alone[None]])
        sides = _close(value, self.value(f, y).detach(), _accuracy(parts[0]))
        return both(sides, alike(zeros, torch.zeros_like(zeros)))

    def empty(self, *parts: Any) -> Sides:
        """Value 0, without an error in the backward pass."""
        f, y = self.batch(*parts)
        value, _ = self.with_gradient(f[:0], y[:0])
        return alike(value[None], torch.zeros(1, dtype=value.dtype))

    def _with_weight(self, weight: float) -> nn.Module:
        term = self.fresh()
        term.weight = weight  # type: ignore[assignment]
        return term


def _close(a: Tensor, b: Tensor, relative: float = 1e-9) -> Sides:
    a, b = a.flatten(), b.flatten()
    comparable(a, b)
    size = torch.full_like(b, relative) * (1 + b.abs().max())
    return a, b, size, "="


def _accuracy(kind: str) -> float:
    """Relative; of large outputs what cancels is lost, such as 1 in 1 + f^2."""
    return 1e-4 if kind == "large" else 1e-9


def _finite(what: str, found: Tensor) -> Sides:
    """That no entry is NaN or infinite."""
    bad = found.detach().flatten()
    bad = bad[~bad.isfinite()]
    if len(bad):
        some = f"{len(bad)} of {found.numel()} entries of {what} are like {float(bad[0])}"
        raise Apart(f"{what} is {float(bad[0])}" if found.ndim == 0 else some, "finite numbers")
    nothing = torch.zeros(1)
    return nothing, nothing, nothing, "="


def _flat(y: Tensor) -> Tensor:
    return y.double().flatten()


def _state(term: nn.Module) -> Tensor:
    return torch.cat([torch.zeros(0).double(), *numbers(dict(term.state_dict()))])
