"""What a batch says by plain autograd (docs/theory.md, section 0): the other side of a check.

Every sample goes through the model alone, with one backward pass for each of its outputs; nothing
of `conjopt.measure` computes here but the replay of the model on copies of its buffers.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.losses.reading import PotentialOf
from conjopt.measure.comparing import _eps, _rows_of
from conjopt.measure.layers.layout import Samples
from conjopt.measure.layers.tape import as_arguments
from conjopt.measure.replay import Replay
from conjopt.potentials import Potential

__all__ = ["Plain", "taken"]

STEPS = (1e-4, 1e-5, 1e-6, 1e-7)  # of differences; the last tells of the one before


def taken(inputs: Any, places: list[Samples | None], samples: int, rows: list[int]) -> Any:
    """Some samples of inputs.

    Args:
        inputs: of a model.
        places: where samples are in each of their tensors.
        samples: how many there are.
        rows: which to take.
    """
    leaves, spec = tree_flatten(inputs)
    at = iter(places)
    return tree_unflatten(
        [_rows_of(x, next(at), samples, rows) if isinstance(x, Tensor) else x for x in leaves],
        spec,
    )


class Plain:
    """A model, a loss and a batch in dense matrices, each made when it is first asked for.

    Args:
        model: returns one tensor, samples along dimension 0.
        loss: the criterion.
        inputs: of the model.
        targets: of the criterion.
        places: where samples are in each tensor of the inputs.
        samples: m.

    Attributes:
        view: the criterion as Fenchel-Young losses.
        potential: of it.
        names: of the trained parameters.
        sizes: their numbers of elements.
        measured: what statements share of what was measured here, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        inputs: Any,
        targets: Tensor,
        places: list[Samples | None],
        samples: int,
    ) -> None:
        self.model, self.loss, self.inputs, self.targets = model, loss, inputs, targets
        self.view: PotentialOf = potential_of(loss)
        self.potential: Potential = self.view.potential
        self.m = samples
        self._places = places
        self.measured: dict[str, Any] = {}
        trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.names, self.sizes = list(trained), [p.numel() for p in trained.values()]

    def run(self, inputs: Any) -> Tensor:
        """What the model returns, with its graph, on copies of its buffers."""
        args, kwargs = as_arguments(inputs)
        (output,) = Replay(self.model, args, kwargs, Replay.random_state(self.model)).run({})
        assert output is not None
        return output

    @functools.cached_property
    def outputs(self) -> Tensor:
        """Of the batch, (m, ...)."""
        with torch.no_grad():
            return self.run(self.inputs).detach()

    @functools.cached_property
    def eps(self) -> float:
        """The coarsest rounding."""
        return _eps([self.outputs, *self.model.parameters()])

    @property
    def rounding(self) -> float:
        """Relative: the arithmetic of a network cancels where it is not seen, hence the power."""
        return 64 * self.eps**0.75

    @functools.cached_property
    def factor(self) -> int:
        """Of a sample's part of the gradient, so that the gradient of a mean is the mean."""
        return 1 if getattr(self.loss, "reduction", "mean") == "sum" else self.m

    @functools.cached_property
    def value_and_pull(self) -> tuple[Tensor, Tensor]:
        """The loss, (), and its gradient in the outputs, (m, ...)."""
        with torch.enable_grad():
            leaf = self.outputs.clone().requires_grad_()
            value = self.loss(leaf, self.targets)
            (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient.detach()

    @functools.cached_property
    def cotangents(self) -> Tensor:
        """Residuals as the criterion weighs them, (m, K)."""
        return self.factor * self.value_and_pull[1].reshape(self.m, -1)

    @functools.cached_property
    def sizes_of_cotangents(self) -> Tensor:
        """Of what they are differences of, (m, 1); a link is off by the rounding of outputs."""
        scale = self.view.scale(self.outputs, self.targets)
        largest = 1 + self.rows.abs().amax(-1, keepdim=True)
        links = largest * self.potential.link(self.rows).abs()
        each = (self.points.abs() + links).sum(-1) * self.weights
        return self.factor * scale * each.reshape(self.m, -1).sum(1, keepdim=True)

    @functools.cached_property
    def _alone(self) -> tuple[Tensor, Tensor, Tensor]:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        outputs, gradients, jacobians = [], [], []
        for row in range(self.m):
            with torch.enable_grad():
                f = self.run(taken(self.inputs, self._places, self.m, [row])).reshape(-1)
                outputs.append(f.detach())
                if not f.requires_grad:  # no output depends on a parameter
                    zeros = f.new_zeros(len(f), sum(self.sizes))
                    gradients.append(zeros[0])
                    jacobians.append(zeros)
                    continue

                def pulled(cotangent: Tensor, f: Tensor = f) -> Tensor:
                    found = torch.autograd.grad(
                        f, parameters, cotangent, retain_graph=True, materialize_grads=True
                    )
                    return torch.cat([g.flatten().to(f.dtype) for g in found])

                gradients.append(pulled(self.cotangents[row].to(f.dtype)))
                units = torch.eye(len(f), dtype=f.dtype, device=f.device)
                jacobians.append(torch.stack([pulled(unit) for unit in units]))
        return torch.stack(outputs), torch.stack(gradients), torch.stack(jacobians)

    @property
    def outputs_alone(self) -> Tensor:
        """Of each sample alone, (m, K)."""
        return self._alone[0]

    @property
    def gradients(self) -> Tensor:
        """``g_i``, by one backward pass for each sample, (m, P)."""
        return self._alone[1]

    @property
    def J(self) -> Tensor:
        """Jacobians, (m, K, P)."""
        return self._alone[2]

    def part(self, name: str) -> slice:
        """Where a parameter is among all P numbers."""
        start = sum(self.sizes[: self.names.index(name)])
        return slice(start, start + self.sizes[self.names.index(name)])

    @functools.cached_property
    def J_squares(self) -> Tensor:
        """``||J_i||^2``, (m,): structure matrices are rounded relative to these."""
        return self.J.square().sum((1, 2))

    @functools.cached_property
    def gradient_sizes(self) -> Tensor:
        """Of what per-sample gradients are added up of, (m,)."""
        whole = self.cotangents.norm(dim=1) + self.sizes_of_cotangents[:, 0]
        return self.J_squares.sqrt() * whole

    @functools.cached_property
    def on_V(self) -> Tensor:
        """Jacobians in an orthonormal basis of V, (m, d, P)."""
        if not self.potential.on_simplex:
            return self.J
        k = self.outputs.shape[1]
        places = self.J.shape[1] // k
        ones = torch.cat([self.J.new_ones(k, 1), torch.eye(k)[:, : k - 1].to(self.J)], 1)
        Q = torch.linalg.qr(ones)[0][:, 1:].contiguous()
        return torch.kron(Q, torch.eye(places).to(self.J)).T @ self.J

    def extremes(self, J: Tensor) -> tuple[Tensor, Tensor]:
        """Least and greatest eigenvalue of ``J J^T``, for (..., d, P)."""
        d, P = J.shape[-2:]
        if d == 0 or P == 0:
            return J.new_zeros(J.shape[:-2]), J.new_zeros(J.shape[:-2])
        values = torch.linalg.svdvals(J).square()
        least = values[..., -1] if d <= P else torch.zeros_like(values[..., -1])
        return least, values[..., 0]

    @functools.cached_property
    def rows(self) -> Tensor:
        """Outputs by loss terms, (R, k)."""
        return self.view.rows(self.outputs)

    @functools.cached_property
    def points(self) -> Tensor:
        """Targets by loss terms, (R, k)."""
        return self.view.points(self.outputs, self.targets)

    @functools.cached_property
    def weights(self) -> Tensor:
        """Of the loss terms, (R,), with the sum 1."""
        return self.view.weights(self.outputs, self.targets)

    @functools.cached_property
    def losses(self) -> Tensor:
        """Of the loss terms, (R,)."""
        return self.potential.loss(self.points, self.rows)

    @functools.cached_property
    def residuals(self) -> Tensor:
        """``yhat - y``, (R, k)."""
        return self.potential.link(self.rows) - self.points

    @functools.cached_property
    def loss_rounding(self) -> Tensor:
        """Of the losses, (R,): of their terms, and next to 1 relative to exp(loss)."""
        terms = self.potential.value(self.points).abs() + self.potential.conjugate(self.rows).abs()
        terms = terms + (self.points * self.rows).abs().sum(-1)
        largest = math.log(torch.finfo(terms.dtype).max) / 2
        exponential = self.losses.clamp(max=largest).exp()
        return self.rounding * (1 + terms) + 1e4 * self.eps * exponential

    def as_terms(self, v: Tensor) -> Tensor:
        """(m, K) changes of the outputs by the terms of the plain Fenchel-Young loss, (R, k)."""
        plain = potential_of(FenchelYoungLoss(self.potential))
        return plain.rows(v.reshape(self.outputs.shape))

    @functools.cached_property
    def H(self) -> Tensor:
        """Output Hessians, (R, k, k), by autograd of the link."""
        f = self.as_terms(self.outputs.reshape(self.m, -1))
        return torch.stack([torch.func.jacrev(self.potential.link)(row) for row in f])

    def changes(self, u: Tensor) -> Tensor:
        """``J_i u``, (m, K)."""
        return self.J @ u

    @functools.cached_property
    def top_of_gauss_newton(self) -> Tensor:
        """``hi(GGN)``, (), from the dense matrix in the outputs."""
        values, vectors = torch.linalg.eigh((self.H + self.H.mT) / 2)
        roots = vectors * values.clamp(min=0).sqrt().unsqueeze(1) @ vectors.mT  # (R, k, k)
        number = torch.arange(self.J[..., 0].numel(), device=self.J.device)
        by_term = self.J.flatten(0, 1)[self.as_terms(number)]  # (R, k, P)
        return self.extremes((roots @ by_term).flatten(0, 1))[1] / len(by_term)

    def direction(self, kind: str, seed: int) -> Tensor:
        """A unit vector, (P,).

        Args:
            kind: "random"; "gradient"; "top", along which the outputs on V change most; "residual",
                along which they change by the residuals as nearly as they can.
            seed: of the random one.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(sum(self.sizes), generator=generator, dtype=torch.float64).to(self.J)
        J = self.on_V.flatten(0, 1)
        u = drawn
        if kind == "gradient":
            u = self.gradients.mean(0)
        elif kind == "top" and len(J):
            u = torch.linalg.svd(J, full_matrices=False)[2][0]
        elif kind == "residual":
            u = torch.linalg.pinv(self.J.flatten(0, 1)) @ self.cotangents.flatten().to(self.J)
        u = torch.where(u.norm() > 0, u, drawn)
        return u / u.norm()

    def slopes(self, u: Tensor, apart: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The slope of the criterion along a direction, by autograd and by central differences.

        Args:
            u: the direction, (P,).
            apart: where it is taken, as a change of the parameters, (P,).

        Returns:
            autograd's, (); differences at several step sizes, (s,); how far each may be off, (s,):
            by rounding, where the sides disagree (a kink is there), and where a smaller step does.
        """
        parameters = dict(self.model.named_parameters())
        args, kwargs = as_arguments(self.inputs)
        replay = Replay(self.model, args, kwargs, Replay.random_state(self.model))

        def value(change: Tensor) -> Tensor:
            moved = {n: parameters[n] + part for n, part in self.by_name(change).items()}
            (output,) = replay.run(moved)
            assert output is not None
            return self.loss(output, self.targets)

        with torch.enable_grad():
            at = apart.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(value(at), at)
        with torch.no_grad():
            here = value(apart)
            ahead, back = (
                torch.stack([value(apart + sign * h * u) for h in STEPS]) for sign in (1, -1)
            )
        h = ahead.new_tensor(STEPS)
        central = (ahead - back) / (2 * h)
        kink = (ahead + back - 2 * here).abs() / h
        unsteady = (central[:-1] - central[1:]).abs()
        terms = self.view.scale(self.outputs, self.targets) * self.weights * self.loss_rounding
        rounding = torch.where(self.weights > 0, terms, 0).sum() + self.rounding * here.abs()
        size = (rounding / h + kink)[:-1] + unsteady
        return gradient @ u, central[:-1], size

    def by_name(self, u: Tensor) -> dict[str, Tensor]:
        """A direction as `conjopt.measure.curvature_along` takes it."""
        parameters = dict(self.model.named_parameters())
        parts = u.split(self.sizes)
        return {
            name: part.view_as(parameters[name]).to(parameters[name].dtype)
            for name, part in zip(self.names, parts, strict=True)
        }
