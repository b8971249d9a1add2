"""The statements on a model, a loss and a batch: docs/theory.md, section 2 and Thm 3.6."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from conjopt import bounds, measure
from conjopt.measure.replay import compiled_parts
from conjopt.measure.writes import written
from conjopt.optim import step_size
from conjopt.potentials import Squared
from conjopt.testing.measured import MeasuredStatements, Sides, unchecked
from conjopt.testing.perturbed import Example
from conjopt.testing.plain import Plain
from conjopt.testing.report import Statement

__all__ = ["ModelStatements"]

DERIVATIVE = "differences: the gradient is the derivative of the criterion"


class ModelStatements(MeasuredStatements):
    """The statements by name, and those of the theory.

    Args:
        search: makes the examples.
    """

    def first(self) -> list[Statement]:
        """What all others take for granted."""
        return [
            self._statement("a sample's outputs do not depend on the others", self.coupling),
            self._statement(
                "section 0: the criterion is a sum of Fenchel-Young losses", self.criterion
            ),
            self._statement(
                "section 0: the gradient in the outputs is the weighted residual", self.residual
            ),
        ]

    def all(self) -> tuple[list[Statement], dict[str, str]]:
        """The others, and those that cannot be checked here, with the reason."""
        named: dict[str, Callable[[Plain, Example], Sides]] = {
            "accounting: every trainable parameter is in the gradient energy": self.in_energy,
            "accounting: every trainable parameter is in the structure matrix": self.in_structure,
            DERIVATIVE: self.derivative,
            "autograd: the norms of the per-sample gradients": self.norms,
            "autograd: the gradient energy": self.energy,
            "autograd: the structure matrices": self.structure,
            "autograd: the extreme eigenvalues on V": self.on_V,
            "autograd: the batch structure matrix": self.batch_structure,
            "autograd: the curvature along a direction": self.curvature,
            "autograd: the greatest curvature": self.top_curvature,
            "autograd: the gradient noise": self.noise,
            "the probe leaves .grad the same to the bit": self.bits,
            "autograd: the norms by the probe": self.probe,
            "measuring leaves the model as it is": self.untouched,
            "Thm 2.1: the gradient is between the eigenvalues times the residual": self.thm_2_1,
            "Thm 2.2: the losses are within the bounds by their residuals": self.thm_2_2,
            "Thm 2.3: the losses are within the sandwich": self.thm_2_3,
            "Thm 2.3: the means bound the risk": self.means,
            "Thm 2.3: the sandwich is made of autograd's numbers": self.made_of,
            "Thm 2.4: the gradient of the batch is within its bounds": self.thm_2_4,
            "Thm 2.5: the last layer is below the structure matrix": self.thm_2_5,
            "Thm 2.6: the curvature is at most beta times the structure matrix": self.thm_2_6,
            "Thm 3.6: no step of the trust region does more": self.thm_3_6,
            "Thm 3.6: no step of the eigenvalue form does more": self.eigenvalue_form,
        }
        left_out = self._left_out(named)
        kept = [self._statement(n, s) for n, s in named.items() if n not in left_out]
        return kept, left_out

    def _statement(self, name: str, sides: Callable[[Plain, Example], Sides]) -> Statement:
        def of_example(example: Example) -> Sides:
            plain = self.search.at(example)
            with unchecked(), torch.enable_grad():
                return sides(plain, example)

        where = self._whose if name.startswith("accounting") else None
        return Statement(name, of_example, where)

    def _left_out(self, named: dict[str, Any]) -> dict[str, str]:
        plain, left_out = self.search.at(self.search.first), {}
        if plain.potential.smoothness is None:
            for name in named:
                if name.startswith(("Thm 2.6", "Thm 3.6")):
                    left_out[name] = f"as {plain.potential!r} has no smoothness beta"
        tensors = [plain.outputs, *self.model.parameters()]
        other = next((t.dtype for t in tensors if t.dtype != torch.float64), None)
        if other is not None:
            left_out[DERIVATIVE] = f"as differences need float64, and there is {other}"
        elif written(self.model):
            left_out[DERIVATIVE] = (
                "as the forward writes to parameters (an embedding with max_norm does)"
            )
        if self.search.samples < 2:
            left_out["autograd: the gradient noise"] = (
                "as there is one sample, and noise needs two: give two or more"
            )
        if len(plain.rows) != plain.m:
            for name in named:
                if name.startswith(("Thm 2.3", "Thm 2.4")):
                    left_out[name] = (
                        f"as the loss has {len(plain.rows)} terms for {plain.m} samples, and the "
                        "statement is about one term for each"
                    )
        if compiled_parts(self.model):
            for name in named:
                if "probe" in name:
                    left_out[name] = "as a part is compiled, which a probe cannot watch"
        with unchecked():
            try:
                measure.last_layer_bound(self.model, plain.inputs)
            except ValueError as error:
                left_out[next(n for n in named if n.startswith("Thm 2.5"))] = f"as {error}"
        return left_out

    # Section 2.

    def thm_2_1(self, plain: Plain, example: Example) -> Sides:
        """``lo_i ||e_i||^2 <= ||g_i||^2 <= hi_i ||e_i||^2``."""
        lo, hi = measure.extreme_eigenvalues(self._structure(plain, on_V=True))
        e = plain.cotangents.square().sum(1)
        energies = self._norms(plain).square()
        size = (plain.rounding * plain.gradient_sizes.square()).repeat(2)
        return torch.cat([lo * e, energies]), torch.cat([energies, hi * e]), size, "<="

    def thm_2_2(self, plain: Plain, example: Example) -> Sides:
        """``phi_low(||e_i||) <= l_i <= psi(||e_i||)``."""
        lower, upper = plain.potential.loss_bounds(plain.residuals.norm(dim=-1), plain.points)
        return self._between(plain, lower, plain.losses, upper)

    def _between(self, plain: Plain, lower: Tensor, losses: Tensor, upper: Tensor) -> Sides:
        counts = plain.weights > 0
        sides = torch.stack([lower, losses]), torch.stack([losses, upper])
        left, right = (torch.where(counts, side, 0) for side in sides)
        return left, right, plain.loss_rounding.expand_as(left), "<="

    def thm_2_3(self, plain: Plain, example: Example) -> Sides:
        """``phi_low(||g_i|| / sqrt(hi_i)) <= l_i <= psi(||g_i|| / sqrt(lo_i))``."""
        found = self._sandwich(plain)
        return self._between(plain, found.lower, plain.losses, found.upper)

    def means(self, plain: Plain, example: Example) -> Sides:
        """The means of these bounds lie on either side of the criterion's mean loss."""
        found = self._sandwich(plain).mean()
        f, y = plain.outputs, plain.targets
        risk = (plain.value_and_pull[0] - plain.view.offset(f, y)) / plain.view.scale(f, y)
        counts = plain.weights > 0
        size = torch.where(counts, plain.weights * plain.loss_rounding, 0).sum()
        size = size + plain.rounding * plain.view.offset(f, y).abs()
        sides = torch.stack([found.lower, risk, found.losses, risk])
        others = torch.stack([risk, found.upper, risk, found.losses])
        return sides, others, size.expand(4), "<="

    def made_of(self, plain: Plain, example: Example) -> Sides:
        """The sandwich's ``lo``, ``hi``, ``||g_i||`` and ``||e_i||`` are autograd's."""
        found = self._sandwich(plain)
        lo, hi = plain.extremes(plain.on_V)
        e = plain.residuals
        expected = torch.stack(
            [
                lo,
                hi,
                torch.einsum("mk,mkp->mp", e.to(plain.J), plain.J).norm(dim=1),
                e.norm(dim=1),
            ]
        )
        measured = torch.stack([found.lo, found.hi, found.gradient_norms, found.residual_norms])
        counts = plain.weights > 0
        whole = e.abs().sum(1) + plain.points.abs().sum(1)
        A = plain.J_squares
        size = plain.rounding * torch.stack([A, A, A.sqrt() * (1 + whole), 1 + whole])
        return torch.where(counts, measured, 0), torch.where(counts, expected, 0), size, "="

    def thm_2_4(self, plain: Plain, example: Example) -> Sides:
        """``lo(K_B) mean||e||^2 / m <= ||g_B||^2 <= hi(K_B) mean||e||^2 / m``."""
        found = bounds.pl_bound(self.model, plain.loss, plain.inputs, plain.targets)
        scale = plain.view.scale(plain.outputs, plain.targets) * plain.factor / plain.m
        square = (plain.gradients.mean(0) / scale).square().sum()
        sides = torch.stack([found.lower, square, found.gradient_square, square])
        others = torch.stack([square, found.upper, square, found.gradient_square])
        size = plain.rounding * (plain.gradient_sizes / scale).square().sum()
        return sides, others, size.expand(4), "<="

    def thm_2_5(self, plain: Plain, example: Example) -> Sides:
        """The bound of the last layer is at most the least eigenvalue of ``A_i``."""
        bound = measure.last_layer_bound(self.model, plain.inputs)
        return bound, plain.extremes(plain.J)[0], plain.rounding * plain.J_squares, "<="

    def thm_2_6(self, plain: Plain, example: Example) -> Sides:
        """``u^T GGN u`` and ``hi(GGN)`` are at most ``beta hi(K_B) / m``, for a unit vector."""
        assert plain.potential.smoothness is not None
        u = plain.direction(example.direction, example.seed)
        terms = len(plain.H)
        bound = plain.potential.smoothness * self._top_of_batch(plain) / terms
        along = self._curvature(plain, plain.potential, u)
        top = measure.top_curvature(self.model, plain.potential, plain.inputs).value
        size = plain.rounding * plain.J_squares.sum() / terms
        return torch.stack([along, top]), bound.expand(2), size.expand(2), "<="

    # Thm 3.6, on the linearised model; the floor is 0, so changes may be any of each sample.

    def _after(self, plain: Plain, u: Tensor, change: Tensor, tau: float) -> Sides:
        """Risks after a step of the trust region, ahead and back, and what they may be."""
        f = plain.as_terms(plain.outputs.reshape(plain.m, -1))
        y = plain.points.reshape(f.shape)
        risk = plain.potential.loss(y, f).mean()
        a = step_size.trust_region(risk, change, tau, plain.potential.smoothness)
        step = a * plain.as_terms(plain.changes(u)) if bool(a.isfinite()) else torch.zeros_like(f)
        after = torch.stack([plain.potential.loss(y, g).mean() for g in (f + step, f - step)])
        greatest = 1 + f.abs().max() + step.abs().max()
        size = plain.rounding * greatest * (1 if plain.potential.on_simplex else greatest)
        bound = (1 + tau) ** 2 * risk
        return after, bound.expand(2), ((1 + tau) ** 2 * size).expand(2), "<="

    def thm_3_6(self, plain: Plain, example: Example) -> Sides:
        """A step of ``tau sqrt(2 L / beta) / rms||J_i u||`` makes no risk above ``(1+tau)^2 L``."""
        u = plain.direction(example.direction, example.seed)
        by_sample = self._curvature(plain, Squared(), u)  # mean ||J_i u||^2
        change = (by_sample.clamp(min=0) * plain.m / len(plain.H)).sqrt()  # rms over loss terms
        return self._after(plain, u, change, example.tau)

    def eigenvalue_form(self, plain: Plain, example: Example) -> Sides:
        """Nor does one of ``tau sqrt(2 L m / (beta hi(K_B))) / ||u||``."""
        u = plain.direction(example.direction, example.seed)
        change = (self._top_of_batch(plain).clamp(min=0) / len(plain.H)).sqrt() * u.norm()
        return self._after(plain, u, change, example.tau)
