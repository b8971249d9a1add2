"""The guarantees of a potential: docs/theory.md, sections 0 and 1, and Thm 2.2."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from conjopt.potentials import Potential
from conjopt.testing.report import Report, Statement, UnfitExample, refuse_counts, run
from conjopt.testing.strategies import outputs, targets

__all__ = ["check_potential"]

SMALLEST = 1e-3  # of the sizes of outputs
EPS = torch.finfo(torch.float64).eps
Sides = tuple[Tensor, Tensor, Tensor, str]


def check_potential(
    potential: Potential,
    *,
    k: int | None = None,
    largest: float = 30.0,
    targets: st.SearchStrategy[Tensor] | None = None,
    max_examples: int = 100,
) -> Report:
    """Check that a potential keeps what the theory takes for granted.

    In float64, to rounding: the loss is its definition, at least zero, and zero at the link
    (Fenchel-Young); no ``<y, f> - Phi*(f)`` is above ``Phi(y)``, which is attained at the link
    (conjugacy); the link is the gradient of the conjugate, and its derivative the Hessian product;
    residuals lie in the tangent space, and the Hessian is positive semidefinite; the link is
    ``beta``-Lipschitz; the loss is within the bounds by its residual (Thm 2.2); the generalized
    entropy is at least zero (Def 1.1), and what the risk has over it is the loss of the mean target
    (Thm 1.3).

    Args:
        potential: yours or one of this package.
        k: number of outputs; None for 1 to 12.
        largest: of the sizes of outputs, which are 1e-3, 1, 30, 300 and this one, as far as that.
        targets: a strategy of (2, k) targets in its domain, given with k; None for links of other
            outputs, and vertices and mixtures on the simplex.
        max_examples: drawn for each statement.

    Returns:
        a report of the statements that hold.

    Raises:
        TypeError: if it is no `Potential`, a number none, or ``targets`` no strategy.
        ValueError: if targets are given without k or drawn in another shape or type, a count is
            below 1, or ``largest`` below 1e-3 or infinite.
        ViolationError: listing every statement that does not hold, with both sides and the smallest
            counterexample found.

    Reference:
        docs/theory.md, section 0, Def 1.1, Thm 1.3 and 2.2.

    Example:
        >>> from conjopt.potentials import Softmax
        >>> report = check_potential(Softmax(), max_examples=20)
        >>> len(report.statements), dict(report.left_out)
        (12, {})
    """
    if not isinstance(potential, Potential):
        raise TypeError(
            f"check_potential: got a {type(potential).__name__}, expected a "
            "conjopt.potentials.Potential with value(y) and conjugate(f)"
        )
    refuse_counts("check_potential", max_examples=max_examples, **({} if k is None else {"k": k}))
    if not isinstance(largest, int | float) or isinstance(largest, bool):
        raise TypeError(f"check_potential: got largest={largest!r}, expected a number")
    if not SMALLEST <= largest < math.inf:
        raise ValueError(
            f"check_potential: got largest={largest}, expected a number from {SMALLEST}, the "
            "smallest of the sizes of outputs"
        )
    if targets is not None and not isinstance(targets, st.SearchStrategy):
        raise TypeError(
            f"check_potential: got targets of type {type(targets).__name__}, expected a strategy "
            "of hypothesis: for one tensor, hypothesis.strategies.just(tensor)"
        )
    if targets is not None and k is None:
        raise ValueError("check_potential: targets= needs k=, the number of outputs they are for")
    checked = _Statements(potential)
    statements, left_out = checked.all()
    return run(
        repr(potential),
        statements,
        _instances(potential, k, largest, targets),
        ("y", "f", "v"),
        max_examples=max_examples,
        left_out=left_out,
    )


@st.composite
def _instances(
    draw: st.DrawFn,
    potential: Potential,
    k: int | None,
    largest: float,
    given: st.SearchStrategy[Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A target, outputs, and a direction in which these change."""
    f = draw(outputs(k=k, largest=largest))
    y = draw(targets(potential, f) if given is None else given)
    if given is not None:
        _refuse_unfit(y, f)
    return y, f, draw(outputs(k=f.shape[-1], largest=1.0))


def _refuse_unfit(y: Any, f: Tensor) -> None:
    wanted = f"expected a float64 tensor of the shape {tuple(f.shape)}, the second number by k="
    if not isinstance(y, Tensor):
        raise UnfitExample(f"check_potential: targets= drew a {type(y).__name__}, {wanted}")
    if y.shape != f.shape or y.dtype != f.dtype:
        raise UnfitExample(
            f"check_potential: targets= drew the shape {tuple(y.shape)} in {y.dtype}, {wanted}"
        )


class _Statements:
    """The statements on one potential, each from targets, outputs and a direction."""

    def __init__(self, potential: Potential) -> None:
        self.of = potential

    def all(self) -> tuple[list[Statement], dict[str, str]]:
        named: dict[str, Any] = {
            "the loss is its definition": self.definition,
            "the loss is not negative": self.non_negative,
            "the loss vanishes at the link": self.at_the_link,
            "conjugacy: <y, f> - Phi*(f) is at most Phi(y)": self.conjugate,
            "the link is the gradient of the conjugate": self.link,
            "the Hessian product is the derivative of the link": self.hessian,
            "the Hessian is positive semidefinite": self.convex,
            "residuals lie in the tangent space": self.tangent,
            "the link is beta-Lipschitz": self.lipschitz,
            "Thm 2.2: the loss is within the bounds by its residual": self.bounds,
            "Def 1.1: the generalized entropy is not negative": self.entropy,
            "Thm 1.3: the risk is the entropy and the loss of the mean": self.decomposition,
        }
        left_out = {}
        if self.of.smoothness is None:
            del named["the link is beta-Lipschitz"]
            left_out["the link is beta-Lipschitz"] = "as smoothness is None"
        return [Statement(name, sides) for name, sides in named.items()], left_out

    def size(self, y: Tensor, f: Tensor) -> Tensor:
        """Of what a loss adds up."""
        terms = self.of.value(y).abs() + self.of.conjugate(f).abs() + (y * f).abs().sum(-1)
        return 64 * EPS * f.shape[-1] * (1 + terms)

    def definition(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        whole = self.of.value(y) + self.of.conjugate(f) - (y * f).sum(-1)
        return self.of.loss(y, f), whole, self.size(y, f), "="

    def non_negative(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        loss = self.of.loss(y, f)
        return loss, torch.zeros_like(loss), self.size(y, f), ">="

    def at_the_link(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        link = self.of.link(f)
        loss = self.of.loss(link, f)
        return loss, torch.zeros_like(loss), self.size(link, f), "="

    def conjugate(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        return (y * f).sum(-1) - self.of.conjugate(f), self.of.value(y), self.size(y, f), "<="

    def link(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        link = self.of.link(f)
        gradient = torch.func.grad(lambda at: self.of.conjugate(at).sum())(f)
        size = 64 * EPS * (1 + f.abs().max() + link.abs().max())
        return link, gradient, size.expand_as(link), "="

    def hessian(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        product = self.of.hessian_product(f, v)
        rows = [torch.func.jacrev(self.of.link)(at) @ u for at, u in zip(f, v, strict=True)]
        size = 64 * EPS * f.shape[-1] * (1 + f.abs().max() + self.of.link(f).abs().max())
        return product, torch.stack(rows), size.expand_as(product), "="

    def convex(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        form = (v * self.of.hessian_product(f, v)).sum(-1)
        size = 64 * EPS * f.shape[-1] * (1 + self.of.link(f).abs().amax(-1))
        return form, torch.zeros_like(form), size, ">="

    def tangent(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        residual = self.of.link(f) - y
        size = 64 * EPS * f.shape[-1] * (1 + y.abs().max() + residual.abs().max())
        return self.of.tangent_projection(residual), residual, size.expand_as(residual), "="

    def lipschitz(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        assert self.of.smoothness is not None
        change = (self.of.link(f + v) - self.of.link(f)).norm(dim=-1)
        size = 64 * EPS * (1 + f.norm(dim=-1) + self.of.link(f).norm(dim=-1))
        return change, self.of.smoothness * v.norm(dim=-1), size, "<="

    def bounds(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        loss, residual = self.of.loss(y, f), (self.of.link(f) - y).norm(dim=-1)
        bounds = self.of.loss_bounds(residual, y)
        # Next to 1 a residual is rounded relative to exp(loss).
        size = self.size(y, f) + 1e-9 * (1 + loss) + 64 * EPS * loss.clamp(max=700).exp()
        outside = torch.maximum(bounds.lower - loss, loss - bounds.upper)
        return outside, torch.zeros_like(loss), size, "<="

    def entropy(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        entropy = self.of.value(y).mean(0) - self.of.value(y.mean(0))
        return entropy, torch.zeros_like(entropy), self.size(y, f).max(), ">="

    def decomposition(self, y: Tensor, f: Tensor, v: Tensor) -> Sides:
        mean, one = y.mean(0, keepdim=True), f[:1]
        risk = self.of.loss(y, one.expand_as(f)).mean(0)
        entropy = self.of.value(y).mean(0) - self.of.value(mean)[0]
        return risk, entropy + self.of.loss(mean, one)[0], self.size(y, f).max(), "="
