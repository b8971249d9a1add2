"""The statements on a model, a loss and a batch: docs/theory.md, section 2 and Thm 3.6.

One side of each is what `conjopt.measure` and `conjopt.bounds` say, looked up when it is asked for;
the other is plain autograd. Thus what is changed in them, a layer rule of one's own above all, is
what is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conjopt import bounds, measure
from conjopt.measure.comparing import CHECKING
from conjopt.optim import step_size
from conjopt.potentials import Squared
from conjopt.testing.perturbed import Example, Search
from conjopt.testing.plain import Plain
from conjopt.testing.report import Statement

__all__ = ["ModelStatements"]

Sides = tuple[Tensor, Tensor, Tensor, str]


class ModelStatements:
    """The statements, each from an example.

    Args:
        search: makes the examples.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.model: nn.Module = search.model

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
            with _unchecked(), torch.enable_grad():
                return sides(plain, example)

        where = self._whose if name.startswith("accounting") else None
        return Statement(name, of_example, where)

    def _whose(self, place: int, example: Example) -> str:
        names = self._looked_at(example)
        elements = self._elements
        return f"'{names[place // elements]}'"

    def _left_out(self, named: dict[str, Any]) -> dict[str, str]:
        plain, left_out = self.search.at(self.search.first), {}
        if plain.potential.smoothness is None:
            for name in named:
                if name.startswith(("Thm 2.6", "Thm 3.6")):
                    left_out[name] = f"as {plain.potential!r} has no smoothness beta"
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
        with _unchecked():
            try:
                measure.last_layer_bound(self.model, plain.inputs)
            except ValueError as error:
                left_out[next(n for n in named if n.startswith("Thm 2.5"))] = f"as {error}"
        return left_out

    # Section 0.

    def coupling(self, plain: Plain, example: Example) -> Sides:
        f = plain.outputs.reshape(plain.m, -1)
        size = plain.rounding * (1 + f.abs().max())
        return f, plain.outputs_alone, size.expand_as(f), "="

    def criterion(self, plain: Plain, example: Example) -> Sides:
        value, f, y = plain.value_and_pull[0], plain.outputs, plain.targets
        scale, offset = plain.view.scale(f, y), plain.view.offset(f, y)
        counts = plain.weights > 0
        whole = scale * torch.where(counts, plain.weights * plain.losses, 0).sum() + offset
        size = scale * torch.where(counts, plain.weights * plain.loss_rounding, 0).sum()
        return value, whole, size + plain.rounding * offset.abs(), "="

    def residual(self, plain: Plain, example: Example) -> Sides:
        pulled = plain.view.rows(plain.value_and_pull[1])
        weights = (plain.view.scale(plain.outputs, plain.targets) * plain.weights).unsqueeze(1)
        expected = torch.where(weights > 0, weights * plain.residuals, 0)
        size = plain.rounding * weights * (1 + plain.points.abs() + plain.rows.abs())
        larger = plain.rounding * weights * plain.residuals.abs()
        return pulled, expected, size + larger, "="

    # Accounting of parameters: only one is trained at a time.

    def _looked_at(self, example: Example) -> list[str]:
        return plain_names(self.search) if example.parameter is None else [example.parameter]

    @contextlib.contextmanager
    def _only(self, name: str) -> Iterator[None]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for other, parameter in self.model.named_parameters():
            parameter.requires_grad_(other == name)
        try:
            yield
        finally:
            for parameter in self.model.parameters():
                parameter.requires_grad_(any(parameter is one for one in trained))

    def in_energy(self, plain: Plain, example: Example) -> Sides:
        found, expected, names = [], [], self._looked_at(example)
        for name in names:
            expected.append(plain.gradients[:, plain.part(name)].square().sum(1))
            with self._only(name):
                norms = measure.per_sample_gradient_norms(
                    self.model, plain.loss, plain.inputs, plain.targets
                )
            found.append(norms.square())
        self._elements = plain.m
        size = plain.rounding * plain.gradient_sizes.square()
        return torch.stack(found), torch.stack(expected), size.expand(len(names), -1), "="

    def in_structure(self, plain: Plain, example: Example) -> Sides:
        found, expected, names = [], [], self._looked_at(example)
        for name in names:
            J = plain.J[:, :, plain.part(name)]
            expected.append(J @ J.mT)
            with self._only(name):
                found.append(measure.structure_matrix(self.model, plain.inputs))
        self._elements = found[0].numel()
        size = (plain.rounding * plain.J_squares)[:, None, None].expand_as(found[0])
        return torch.stack(found), torch.stack(expected), size.expand(len(names), -1, -1, -1), "="

    # What is measured, once for each example: statements see the same ones.

    def _once(self, plain: Plain, name: str, make: Callable[[], Any]) -> Any:
        if name not in plain.measured:
            plain.measured[name] = make()
        return plain.measured[name]

    def _norms(self, plain: Plain) -> Tensor:
        def norms() -> Tensor:
            return measure.per_sample_gradient_norms(
                self.model, plain.loss, plain.inputs, plain.targets
            ).detach()

        return self._once(plain, "norms", norms)

    def _structure(self, plain: Plain, *, on_V: bool) -> Tensor:
        potential = plain.potential if on_V else None
        return self._once(
            plain,
            f"structure, on V: {on_V}",
            lambda: measure.structure_matrix(self.model, plain.inputs, potential=potential),
        )

    def _top_of_batch(self, plain: Plain) -> Tensor:
        def top() -> Tensor:
            K = measure.batch_structure_matrix(
                self.model, plain.inputs, potential=plain.potential
            )
            return measure.extreme_eigenvalues(K)[1]

        return self._once(plain, "top of batch", top)

    def _sandwich(self, plain: Plain) -> bounds.RiskSandwich:
        return self._once(
            plain,
            "sandwich",
            lambda: bounds.risk_sandwich(self.model, plain.loss, plain.inputs, plain.targets),
        )

    def _curvature(self, plain: Plain, potential: Any, u: Tensor) -> Tensor:
        return measure.curvature_along(self.model, potential, plain.inputs, plain.by_name(u))

    def norms(self, plain: Plain, example: Example) -> Sides:
        norms = plain.gradients.norm(dim=1)
        return self._norms(plain), norms, plain.rounding * plain.gradient_sizes, "="

    def energy(self, plain: Plain, example: Example) -> Sides:
        found = measure.gradient_energy(self.model, plain.loss, plain.inputs, plain.targets)
        size = plain.rounding * plain.gradient_sizes.square().mean()
        return found.detach(), plain.gradients.square().sum(1).mean(), size, "="

    def structure(self, plain: Plain, example: Example) -> Sides:
        A = plain.J @ plain.J.mT
        size = (plain.rounding * plain.J_squares)[:, None, None].expand_as(A)
        return self._structure(plain, on_V=False), A, size, "="

    def on_V(self, plain: Plain, example: Example) -> Sides:
        found = torch.stack(measure.extreme_eigenvalues(self._structure(plain, on_V=True)))
        expected = torch.stack(plain.extremes(plain.on_V))
        return found, expected, (plain.rounding * plain.J_squares).expand_as(found), "="

    def batch_structure(self, plain: Plain, example: Example) -> Sides:
        J = plain.J.flatten(0, 1)
        K = J @ J.T
        found = measure.batch_structure_matrix(self.model, plain.inputs)
        return found, K, (plain.rounding * plain.J_squares.sum()).expand_as(K), "="

    def curvature(self, plain: Plain, example: Example) -> Sides:
        u = plain.direction(example.direction, example.seed)
        Ju = plain.as_terms(plain.changes(u))  # (R, k)
        expected = torch.einsum("rk,rkl,rl->r", Ju, plain.H, Ju).mean()
        size = plain.rounding * (plain.J_squares.sum() / len(Ju)) * (1 + plain.H.abs().max())
        return self._curvature(plain, plain.potential, u), expected, size, "="

    def top_curvature(self, plain: Plain, example: Example) -> Sides:
        steps = min(sum(plain.sizes), plain.J[..., 0].numel()) + 1
        found = measure.top_curvature(self.model, plain.potential, plain.inputs, steps=steps)
        size = plain.J_squares.sum() / len(plain.H) * (1 + plain.H.abs().max())
        # Lanczos finds a double eigenvalue late, so that is all that rounding leaves to be exact.
        return found.value, plain.top_of_gauss_newton, plain.rounding * size, "="

    def noise(self, plain: Plain, example: Example) -> Sides:
        g, m = plain.gradients, plain.m
        if m < 2:
            return g.new_zeros(2), g.new_zeros(2), g.new_zeros(2), "="
        found = measure.gradient_noise(self.model, plain.loss, plain.inputs, plain.targets)
        pairs = g @ g.T
        mean_square = (pairs.sum() - pairs.trace()) / (m * (m - 1))
        noise = (g - g.mean(0)).square().sum() / (m - 1)
        size = plain.rounding * plain.gradient_sizes.square().sum()
        sides = torch.stack([found.mean_square, found.noise]), torch.stack([mean_square, noise])
        return *sides, size.expand(2), "="

    # The probe in a training loop.

    def _trained(self, plain: Plain, *, probe: bool) -> tuple[Tensor, Tensor | None]:
        """``.grad`` by an ordinary forward and backward, and the norms that the probe saw."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        watching = measure.EnergyProbe(self.model) if probe else None
        inputs = plain.inputs
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        try:
            value = plain.loss(self.model(*args, **kwargs), plain.targets)
            if value.requires_grad:
                value.backward()
            found = [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in self.model.parameters()
                if p.requires_grad
            ]
        finally:
            if watching is not None:
                watching.remove()
            for parameter in self.model.parameters():
                parameter.grad = None
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])
        return torch.cat(found), None if watching is None else watching.norms

    def bits(self, plain: Plain, example: Example) -> Sides:
        alone, _ = self._trained(plain, probe=False)
        watched, _ = self._trained(plain, probe=True)
        return watched, alone, torch.zeros_like(alone), "="

    def probe(self, plain: Plain, example: Example) -> Sides:
        _, found = self._trained(plain, probe=True)
        of_mean = plain.m / plain.factor  # the probe takes what is differentiated as a mean
        norms = of_mean * plain.gradients.norm(dim=1)
        found = torch.zeros_like(norms) if found is None else found  # nothing was differentiated
        return found, norms, plain.rounding * of_mean * plain.gradient_sizes, "="

    def untouched(self, plain: Plain, example: Example) -> Sides:
        before, hooks = self._state(), self._hooks()
        plain.measured.clear()
        self._norms(plain)
        self._structure(plain, on_V=True)
        self._top_of_batch(plain)
        self._curvature(plain, plain.potential, plain.direction("random", example.seed))
        after = self._state()
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        changed += [hooks != self._hooks()]
        found = torch.tensor(changed, dtype=torch.float64)
        return found, torch.zeros_like(found), torch.zeros_like(found), "="

    def _state(self) -> list[Tensor]:
        tensors = [*self.model.parameters(), *self.model.buffers()]
        flags = [p.requires_grad for p in self.model.parameters()]
        flags += [p.grad is not None for p in self.model.parameters()]
        flags += [module.training for module in self.model.modules()]
        kept = [tensor.detach().clone() for tensor in tensors]
        return [*kept, torch.tensor(flags), torch.get_rng_state()]

    def _hooks(self) -> list[int]:
        names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return [len(getattr(m, name)) for m in self.model.modules() for name in names]

    # Section 2.

    def thm_2_1(self, plain: Plain, example: Example) -> Sides:
        lo, hi = measure.extreme_eigenvalues(self._structure(plain, on_V=True))
        e = plain.cotangents.square().sum(1)
        energies = self._norms(plain).square()
        size = (plain.rounding * plain.gradient_sizes.square()).repeat(2)
        return torch.cat([lo * e, energies]), torch.cat([energies, hi * e]), size, "<="

    def thm_2_2(self, plain: Plain, example: Example) -> Sides:
        lower, upper = plain.potential.loss_bounds(plain.residuals.norm(dim=-1), plain.points)
        return self._between(plain, lower, plain.losses, upper)

    def _between(self, plain: Plain, lower: Tensor, losses: Tensor, upper: Tensor) -> Sides:
        counts = plain.weights > 0
        sides = torch.stack([lower, losses]), torch.stack([losses, upper])
        left, right = (torch.where(counts, side, 0) for side in sides)
        return left, right, plain.loss_rounding.expand_as(left), "<="

    def thm_2_3(self, plain: Plain, example: Example) -> Sides:
        found = self._sandwich(plain)
        return self._between(plain, found.lower, plain.losses, found.upper)

    def means(self, plain: Plain, example: Example) -> Sides:
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
        found = self._sandwich(plain)
        lo, hi = plain.extremes(plain.on_V)
        e = plain.residuals
        expected = torch.stack([
            lo,
            hi,
            torch.einsum("mk,mkp->mp", e.to(plain.J), plain.J).norm(dim=1),
            e.norm(dim=1),
        ])
        measured = torch.stack([found.lo, found.hi, found.gradient_norms, found.residual_norms])
        counts = plain.weights > 0
        whole = e.abs().sum(1) + plain.points.abs().sum(1)
        A = plain.J_squares
        size = plain.rounding * torch.stack([A, A, A.sqrt() * (1 + whole), 1 + whole])
        return torch.where(counts, measured, 0), torch.where(counts, expected, 0), size, "="

    def thm_2_4(self, plain: Plain, example: Example) -> Sides:
        found = bounds.pl_bound(self.model, plain.loss, plain.inputs, plain.targets)
        scale = plain.view.scale(plain.outputs, plain.targets) * plain.factor / plain.m
        square = (plain.gradients.mean(0) / scale).square().sum()
        sides = torch.stack([found.lower, square, found.gradient_square, square])
        others = torch.stack([square, found.upper, square, found.gradient_square])
        size = plain.rounding * (plain.gradient_sizes / scale).square().sum()
        return sides, others, size.expand(4), "<="

    def thm_2_5(self, plain: Plain, example: Example) -> Sides:
        bound = measure.last_layer_bound(self.model, plain.inputs)
        return bound, plain.extremes(plain.J)[0], plain.rounding * plain.J_squares, "<="

    def thm_2_6(self, plain: Plain, example: Example) -> Sides:
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
        u = plain.direction(example.direction, example.seed)
        by_sample = self._curvature(plain, Squared(), u)  # mean ||J_i u||^2
        change = (by_sample.clamp(min=0) * plain.m / len(plain.H)).sqrt()  # rms over loss terms
        return self._after(plain, u, change, example.tau)

    def eigenvalue_form(self, plain: Plain, example: Example) -> Sides:
        u = plain.direction(example.direction, example.seed)
        change = (self._top_of_batch(plain).clamp(min=0) / len(plain.H)).sqrt() * u.norm()
        return self._after(plain, u, change, example.tau)


def plain_names(search: Search) -> list[str]:
    """Names of the trained parameters."""
    return search.names


@contextlib.contextmanager
def _unchecked() -> Iterator[None]:
    """Without the check at the first use: it would raise for what the statements are to name."""
    token = CHECKING.set(True)
    try:
        yield
    finally:
        CHECKING.reset(token)
