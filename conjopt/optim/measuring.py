"""The measuring step: from the observed batch to the direction of the step and what it promises.

Three ways, by what the direction and the model allow: held-out slopes from two halves, the
curvature along the gradient of the whole batch, or the change of the outputs alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.measure.curvature import JacobianProduct, relative_step
from conjopt.measure.noise import noise_from_halves
from conjopt.measure.observation import Batch, Forward
from conjopt.measure.parts import Parts, inner_products, respond
from conjopt.optim.directions import Direction, Pending, is_matrix
from conjopt.optim.gate import Gate, choose
from conjopt.optim.statistics import Measurement

__all__ = ["Found", "along_gradient", "change_only", "couples_samples", "held_out"]

RHO_BLOCK_MIN = 0.02  # least share of a block's raw slope that its shrinkage leaves


@dataclasses.dataclass(eq=False)
class Found:
    """What a measuring step found.

    Attributes:
        directions: ``u`` of the step, before the blocks are weighed.
        pending: the state of the direction to commit.
        measurement: the scalars.
        slopes: (blocks, 2) running raw and held-out slopes of each block; None without halves.
        shrinkage: (blocks,) the weights ``w`` of the blocks that follow; None to leave them.
        trust_only: whether slopes and curvature could not be measured.
    """

    directions: list[Tensor]
    pending: Pending
    measurement: Measurement
    slopes: Tensor | None = None
    shrinkage: Tensor | None = None
    trust_only: bool = False

    @property
    def finite(self) -> Tensor:
        """() whether all that was measured is finite."""
        values = [
            value
            for field in dataclasses.fields(self.measurement)
            if (value := getattr(self.measurement, field.name)) is not None
        ]
        return torch.isfinite(torch.stack(values)).all()

    def keep(self, states: Sequence[Any], gate: Gate) -> None:
        """Write the blocks' running slopes and weights to their states.

        Args:
            states: of the parameters.
            gate: () whether the step is taken.
        """
        if self.slopes is None or self.shrinkage is None:
            return
        for state, slopes, weight in zip(states, self.slopes, self.shrinkage, strict=True):
            state["slopes"] = choose(gate, slopes, state.get("slopes", 0.0))
            state["shrinkage"] = choose(gate, weight, state.get("shrinkage", 1.0))


def held_out(
    batch: Batch,
    parts: Parts,
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    states: Sequence[Any],
    groups: Sequence[dict[str, Any]],
    ratios: Sequence[float],
    product: JacobianProduct,
    decay: float,
) -> Found:
    """A direction from the second half, and its slope on the first (Thm 3.2).

    Args:
        batch: observed while the watch was armed.
        parts: its two halves.
        parameters: by name, those that are moved.
        gradients: ``g`` of the whole batch, in their order.
        direction: makes ``u``.
        states: of the parameters.
        groups: of the parameters.
        ratios: each block's ``lr`` over the greatest.
        product: ``J u``.
        decay: of the blocks' running slopes.
    """
    u, pending = direction.propose(parts.second, gradients, states, groups)
    raw, held = inner_products(gradients, u), inner_products(parts.first, u)
    now = torch.stack([raw, held], 1)
    before = torch.stack([state.get("slopes", now[i] * 0) for i, state in enumerate(states)])
    slopes = before.lerp(now, 1 - decay)  # both start at zero, which cancels in their ratio
    rho = slopes[:, 1] / slopes[:, 0].clamp_min(torch.finfo(slopes.dtype).tiny)
    rho = rho.clamp(RHO_BLOCK_MIN, 1)
    matrix = torch.tensor([is_matrix(t) for t in u], device=rho.device)
    shrinkage = torch.where(matrix, rho.sqrt(), rho)
    weights = shrinkage * torch.tensor(ratios, dtype=rho.dtype, device=rho.device)
    along = {
        name: tensor * weight for name, tensor, weight in zip(parameters, u, weights, strict=True)
    }
    changes = _changes(product, parts.forward, parameters, along)
    response = respond(batch, parts.forward, changes, parts.mask)
    apart = torch._foreach_sub(parts.first, parts.second)
    noise = noise_from_halves(
        inner_products(parts.first, parts.second).sum(),
        inner_products(apart, apart).sum(),
        parts.sizes,
    )
    measurement = Measurement(
        change=response.change,
        slope=(weights * held).sum(),
        raw_slope=(weights * raw).sum(),
        curvature=response.curvature,
        mean_square=noise.mean_square,
        noise=noise.noise,
    )
    return Found(u, pending, measurement, slopes, shrinkage)


def along_gradient(
    batch: Batch,
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    states: Sequence[Any],
    groups: Sequence[dict[str, Any]],
    ratios: Sequence[float],
    product: JacobianProduct,
) -> Found:
    """The curvature along the gradient of the whole batch.

    Args:
        batch: observed while the watch was armed.
        parameters: by name, those that are moved.
        gradients: ``g`` of the whole batch, in their order.
        direction: makes ``u``.
        states: of the parameters.
        groups: of the parameters.
        ratios: each block's ``lr`` over the greatest.
        product: ``J g``.
    """
    u, pending = direction.propose(gradients, gradients, states, groups)
    along = [g if r == 1 else g * r for g, r in zip(gradients, ratios, strict=True)]
    forward = batch.forwards[-1]
    changes = _changes(product, forward, parameters, dict(zip(parameters, along, strict=True)))
    response = respond(batch, forward, changes, None)
    squared = inner_products(gradients, along).sum()
    info = torch.finfo(squared.dtype)
    ratio = (response.curvature / squared.clamp_min(info.tiny)).clamp(info.tiny, info.max)
    measurement = Measurement(
        change=response.change,
        raw_slope=squared,
        curvature=response.curvature,
        log_ratio=ratio.log(),
    )
    return Found(u, pending, measurement)


def change_only(
    batch: Batch,
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    direction: Direction,
    states: Sequence[Any],
    groups: Sequence[dict[str, Any]],
    weights: Sequence[Tensor | float],
) -> Found:
    """The change of the outputs along the direction, by a difference of two forwards.

    For models whose samples are coupled (batch norm in train mode) and single samples.

    Args:
        batch: observed while the watch was armed.
        parameters: by name, those that are moved.
        gradients: ``g`` of the whole batch, in their order.
        direction: makes ``u``.
        states: of the parameters.
        groups: of the parameters.
        weights: of the blocks.
    """
    u, pending = direction.propose(gradients, gradients, states, groups)
    along = [t * w for t, w in zip(u, weights, strict=True)]
    forward = batch.forwards[-1]
    assert forward.replay is not None
    at = [parameter.detach() for parameter in parameters.values()]
    step = relative_step(at, along, power=1 / 2)
    with torch.no_grad():
        here = forward.replay.run({})
        there = forward.replay.run(
            {n: p - step * t for n, p, t in zip(parameters, at, along, strict=True)}
        )
    unit = torch.where(step > 0, step, 1.0)
    changes = {
        place: (h - t) / unit
        for place, (h, t) in enumerate(zip(here, there, strict=True))
        if h is not None and t is not None and place in forward.gradients
    }
    response = respond(batch, forward, changes, None)
    raw = inner_products(gradients, along).sum()
    measurement = Measurement(change=response.change, raw_slope=raw)
    return Found(u, pending, measurement, trust_only=True)


def couples_samples(model: nn.Module) -> bool:
    """Whether a module of the model computes statistics over the batch (batch norm in train mode).

    Args:
        model: looked through in the mode it is in.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> couples_samples(model), couples_samples(model.eval())
        (True, False)
    """
    return any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        and (module.training or module.running_mean is None)
        for module in model.modules()
    )


def _changes(
    product: JacobianProduct,
    forward: Forward,
    parameters: Mapping[str, Tensor],
    along: Mapping[str, Tensor],
) -> dict[int, Tensor]:
    assert forward.replay is not None
    _, changes = product(forward.replay.run, parameters, along)
    return {
        place: change
        for place, change in enumerate(changes)
        if change is not None and place in forward.gradients
    }
