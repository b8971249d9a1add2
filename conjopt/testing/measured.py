"""What is measured of a model against plain autograd, for `conjopt.testing.check_model`.

The functions are looked up in `conjopt.measure` and `conjopt.bounds` when they are called.
Thus what is changed in them, a layer rule of one's own above all, is what is checked.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from conjopt import bounds, measure
from conjopt.measure.comparing import CHECKING
from conjopt.testing.perturbed import Example, Search
from conjopt.testing.plain import Plain

__all__ = ["MeasuredStatements", "Sides", "unchecked"]

Sides = tuple[Tensor, Tensor, Tensor, str]


class MeasuredStatements:
    """The statements about measurements, each from an example and what autograd says of it.

    Args:
        search: makes the examples.
    """

    def __init__(self, search: Search) -> None:
        self.search = search
        self.model: nn.Module = search.model

    # Section 0.

    def coupling(self, plain: Plain, example: Example) -> Sides:
        """Each sample alone has the outputs that it has in the batch."""
        f = plain.outputs.reshape(plain.m, -1)
        size = plain.rounding * (1 + f.abs().max())
        return f, plain.outputs_alone, size.expand_as(f), "="

    def criterion(self, plain: Plain, example: Example) -> Sides:
        """The criterion is ``scale * sum_r weights_r * l_r + offset``."""
        value, f, y = plain.value_and_pull[0], plain.outputs, plain.targets
        scale, offset = plain.view.scale(f, y), plain.view.offset(f, y)
        counts = plain.weights > 0
        whole = scale * torch.where(counts, plain.weights * plain.losses, 0).sum() + offset
        size = scale * torch.where(counts, plain.weights * plain.loss_rounding, 0).sum()
        return value, whole, size + plain.rounding * offset.abs(), "="

    def residual(self, plain: Plain, example: Example) -> Sides:
        """Autograd's gradient in the outputs is ``scale * weights_r * e_r``."""
        pulled = plain.view.rows(plain.value_and_pull[1])
        weights = (plain.view.scale(plain.outputs, plain.targets) * plain.weights).unsqueeze(1)
        expected = torch.where(weights > 0, weights * plain.residuals, 0)
        size = plain.rounding * weights * (1 + plain.points.abs() + plain.rows.abs())
        larger = plain.rounding * weights * plain.residuals.abs()
        return pulled, expected, size + larger, "="

    # Accounting of parameters: only one is trained at a time.

    def _looked_at(self, example: Example) -> list[str]:
        return self.search.names if example.parameter is None else [example.parameter]

    def _whose(self, place: int, example: Example) -> str:
        names = self._looked_at(example)
        elements = self._elements
        return f"'{names[place // elements]}'"

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
        """With one parameter trained, ``||g_i||^2`` is what autograd says of it."""
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
        """With one parameter trained, ``A_i`` is ``J_i J_i^T`` in it."""
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
            K = measure.batch_structure_matrix(self.model, plain.inputs, potential=plain.potential)
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
        """``||g_i||`` is that of one backward pass for each sample."""
        norms = plain.gradients.norm(dim=1)
        return self._norms(plain), norms, plain.rounding * plain.gradient_sizes, "="

    def energy(self, plain: Plain, example: Example) -> Sides:
        """``E`` is the mean of ``||g_i||^2``."""
        found = measure.gradient_energy(self.model, plain.loss, plain.inputs, plain.targets)
        size = plain.rounding * plain.gradient_sizes.square().mean()
        return found.detach(), plain.gradients.square().sum(1).mean(), size, "="

    def structure(self, plain: Plain, example: Example) -> Sides:
        """``A_i`` is ``J_i J_i^T``."""
        A = plain.J @ plain.J.mT
        size = (plain.rounding * plain.J_squares)[:, None, None].expand_as(A)
        return self._structure(plain, on_V=False), A, size, "="

    def on_V(self, plain: Plain, example: Example) -> Sides:
        """``lo_i`` and ``hi_i`` are those of ``Q^T J_i J_i^T Q``."""
        found = torch.stack(measure.extreme_eigenvalues(self._structure(plain, on_V=True)))
        expected = torch.stack(plain.extremes(plain.on_V))
        return found, expected, (plain.rounding * plain.J_squares).expand_as(found), "="

    def batch_structure(self, plain: Plain, example: Example) -> Sides:
        """``K_B`` has the blocks ``J_i J_j^T``."""
        J = plain.J.flatten(0, 1)
        K = J @ J.T
        found = measure.batch_structure_matrix(self.model, plain.inputs)
        return found, K, (plain.rounding * plain.J_squares.sum()).expand_as(K), "="

    def curvature(self, plain: Plain, example: Example) -> Sides:
        """``u^T GGN u`` is ``mean_r (J_r u)^T H_r (J_r u)``."""
        u = plain.direction(example.direction, example.seed)
        Ju = plain.as_terms(plain.changes(u))  # (R, k)
        expected = torch.einsum("rk,rkl,rl->r", Ju, plain.H, Ju).mean()
        size = plain.rounding * (plain.J_squares.sum() / len(Ju)) * (1 + plain.H.abs().max())
        return self._curvature(plain, plain.potential, u), expected, size, "="

    def top_curvature(self, plain: Plain, example: Example) -> Sides:
        """``hi(GGN)`` is that of the dense matrix."""
        steps = min(sum(plain.sizes), plain.J[..., 0].numel()) + 1
        found = measure.top_curvature(self.model, plain.potential, plain.inputs, steps=steps)
        size = plain.J_squares.sum() / len(plain.H) * (1 + plain.H.abs().max())
        # Lanczos finds a double eigenvalue late, so that is all that rounding leaves to be exact.
        return found.value, plain.top_of_gauss_newton, plain.rounding * size, "="

    def noise(self, plain: Plain, example: Example) -> Sides:
        """The estimates are ``mean_{i != j} <g_i, g_j>`` and the sample variance of ``g_i``."""
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

    def derivative(self, plain: Plain, example: Example) -> Sides:
        """The gradient of the criterion, along a direction, is what differences say of it."""
        u = plain.direction(example.direction, example.seed)
        # Next to the example: parameters that are zeros put inputs of ReLU right at its kink.
        apart = 1e-3 * plain.direction("random", example.seed + 1)
        slope, differences, size = plain.slopes(u, apart)
        off = (slope - differences).abs() - size
        if not bool(off.isfinite().all()):  # out of the domain of the model or the loss
            return slope.new_zeros(()), slope.new_zeros(()), slope.new_zeros(()), "="
        best = int(off.argmin())
        return slope, differences[best], size[best], "="

    # The probe in a training loop.

    def _trained(self, plain: Plain, *, probe: bool) -> tuple[Tensor, Tensor | None]:
        """``.grad`` by an ordinary forward and backward, and the norms that the probe saw."""
        buffers = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        watching = measure.EnergyProbe(self.model) if probe else None
        inputs = plain.inputs
        args = (
            inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        )
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
        """An ordinary backward pass leaves the same ``.grad`` with a probe and without."""
        alone, _ = self._trained(plain, probe=False)
        watched, _ = self._trained(plain, probe=True)
        return watched, alone, torch.zeros_like(alone), "="

    def probe(self, plain: Plain, example: Example) -> Sides:
        """The probe's norms are those of one backward pass for each sample."""
        _, found = self._trained(plain, probe=True)
        of_mean = plain.m / plain.factor  # the probe takes what is differentiated as a mean
        norms = of_mean * plain.gradients.norm(dim=1)
        found = torch.zeros_like(norms) if found is None else found  # nothing was differentiated
        return found, norms, plain.rounding * of_mean * plain.gradient_sizes, "="

    def untouched(self, plain: Plain, example: Example) -> Sides:
        """Parameters, buffers, ``.grad``, modes, hooks and random numbers stay as they are."""
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


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Without the check at the first use: it would raise for what the statements are to name."""
    token = CHECKING.set(True)
    try:
        yield
    finally:
        CHECKING.reset(token)
