"""The gradients of two disjoint parts of the observed batch, from what an ordinary loop leaves.

The parts are the even and the odd samples of one forward, or the first and the other forwards if
several were accumulated. ``.grad`` holds their weighted sum, so one more backward pass gives both.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conjopt.measure.observation import Batch, Forward, Observation, sum_of
from conjopt.measure.replay import Pull, Replay
from conjopt.measure.row_replay import RowReplay, of_rows
from conjopt.measure.shards import local, sum_over_shards

__all__ = [
    "Parts",
    "Response",
    "Sample",
    "curvature_product",
    "inner_products",
    "of_parts",
    "respond",
    "rows_of",
    "split",
]


@dataclasses.dataclass(eq=False)
class Sample:
    """Samples of a forward that are measured for the whole batch.

    Attributes:
        replay: runs them.
        pull: their vector-Jacobian products, by one graph.
        mask: (m,) which they are.
        stride: how many samples one of them stands for.
    """

    replay: Replay
    pull: Pull
    mask: Tensor
    stride: int


@dataclasses.dataclass(eq=False)
class Parts:
    """Mean gradients ``g1`` and ``g2`` of two parts of a batch; ``g = w1 g1 + w2 g2``.

    Attributes:
        first: g1, a tensor per parameter, per-sample Fenchel-Young units.
        second: g2.
        sizes: samples in each part.
        forward: a forward that holds samples of the second part.
        replay: runs it again, or these samples of it alone.
        mask: (m,) which of its samples belong to the second part; None for all.
        here: whether it does; one of another process may.
        sample: the first part's samples, which ran alone; None unless `split` is to keep them.
    """

    first: list[Tensor]
    second: list[Tensor]
    sizes: tuple[int, int] | tuple[Tensor, Tensor]
    forward: Forward
    replay: Replay
    mask: Tensor | None
    here: bool = True
    sample: Sample | None = None

    @property
    def noise(self) -> tuple[Tensor, Tensor]:
        """() estimates of ``||G||^2`` and ``S^2``, those of `noise_from_halves`."""
        apart = torch._foreach_sub(self.first, self.second)
        distance, (h1, h2) = inner_products(apart, apart).sum(), self.sizes
        return inner_products(self.first, self.second).sum(), distance / (1 / h1 + 1 / h2)


@dataclasses.dataclass(eq=False)
class Response:
    """What a step along ``u`` does to the outputs of a batch, to first order.

    Attributes:
        curvature: () ``q = mean_i (J_i u)^T H_i (J_i u)`` (Thm 2.6).
        change: () ``V = rms_i ||J_i u||`` on the tangent space (Thm 3.6).
        weight: () ``sum kappa c`` of the samples; NaN if a rank could not measure its own.
    """

    curvature: Tensor
    change: Tensor
    weight: Tensor

    @property
    def lost(self) -> Tensor:
        """() whether a rank ran out of memory and sent `nothing`."""
        return self.weight.isnan()

    @classmethod
    def nothing(cls, batch: Batch) -> Response:
        """What stands for the response of a rank that ran out of memory.

        Args:
            batch: whose type it has, as all ranks have to send the same.
        """
        types = [_wide(o.outputs).dtype for o in batch.observations if o.outputs is not None]
        dtype = functools.reduce(torch.promote_types, types, batch.weight.dtype)
        nan = torch.full_like(batch.weight, torch.nan, dtype=dtype)
        return cls(nan, nan, nan)


def split(
    batch: Batch,
    parameters: Mapping[str, Tensor],
    gradients: Sequence[Tensor],
    *,
    changed: bool,
    by_rows: bool = False,
    stride: int = 2,
    keep: bool = False,
) -> Parts | None:
    """Gradients of two parts of the batch.

    Args:
        batch: observed while the watch was armed.
        parameters: by name, the model's own.
        gradients: g in their order, ``.grad`` over `Batch.weight`.
        changed: whether ``.grad`` was written to since the backward pass, by clipping say. Then
            what the parts explain of it by a factor, ``r (G1 + G2)``, is split between them and
            the rest is left in both. Otherwise what did not come through the model's outputs, such
            as a penalty on weights, is left in the second.
        by_rows: run a part's samples alone where one forward has both, at half the cost.
        stride: of one forward, every so many-th sample is of the first part.
        keep: the first part's graph, in `Parts.sample`, where it ran alone.

    Returns:
        None if the batch has no two parts: a single sample, or outputs whose samples are not along
        dimension 0.

    Raises:
        Coupled: with ``by_rows``, if the samples alone are other than among the others.
    """
    forwards = batch.forwards
    size = forwards[0].batch_size
    replay = forwards[-1].replay
    assert replay is not None
    replays: list[RowReplay | None] = [None, None]
    pulls: list[tuple[list[Forward], Tensor | None]]
    if len(forwards) > 1:
        sizes = [forward.batch_size or 1 for forward in forwards]
        counts = (sizes[0], sum(sizes[1:]))
        mask = None
        pulls = [(forwards[:1], None), (forwards[1:], None)]
    elif size is None or size < 2 or not _rows_are_of_samples(batch, size):
        return None
    else:
        own = torch.arange(size) % stride == 0  # on the CPU, for their numbers
        counts = (int(own.sum()), int((~own).sum()))
        mask = ~own.to(batch.weight.device)
        pulls = [(forwards, ~mask), (forwards, mask)]
        if by_rows:
            rows = [part.nonzero().flatten().to(mask.device) for part in (own, ~own)]
            seen = {place: forwards[0].outputs[place] for place in forwards[0].gradients}
            replays[0] = of_rows(replay, rows[0], size, seen)
            replays[1] = replay = of_rows(replay, rows[1], size)

    # Each by itself: one less the other would be rounding where a part has no weight.
    first_share, second_share = (_weight(batch, *pull) / batch.weight for pull in pulls)
    sample = None
    if keep and mask is not None and replays[0] is not None:
        pull = replays[0].adjoint(parameters)
        # Not compared any more: along a direction it may be run elsewhere.
        alone = dataclasses.replace(replays[0], expected={})
        sample = Sample(alone, pull, ~mask, stride)
    first = _pull(*pulls[0], replays[0], parameters, batch.weight, sample)
    second = _pull(*pulls[1], replays[1], parameters, batch.weight) if changed else None
    g1, g2 = of_parts(gradients, first, second, (first_share, second_share))
    return Parts(g1, g2, counts, forwards[-1], replay, mask, sample=sample)


def of_parts(
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor] | None,
    shares: tuple[Tensor, Tensor],
) -> tuple[list[Tensor], list[Tensor]]:
    """``g1`` and ``g2`` from what came to ``g`` through each part of a batch.

    Args:
        gradients: g.
        first: ``w1 g1``.
        second: ``w2 g2``, where g was changed since; None where it is the rest of g.
        shares: () ``w1`` and ``w2``.
    """
    if second is not None:
        total = torch._foreach_add(list(first), list(second))
        along = inner_products(gradients, total).sum()
        factor = along / inner_products(total, total).sum().clamp_min(_tiny(along))
        rest = torch._foreach_sub(list(gradients), [factor * t for t in total])
        g1, g2 = (
            [
                _over(factor * p, share, factor * t) + r
                for p, t, r in zip(part, total, rest, strict=True)
            ]
            for part, share in zip((first, second), shares, strict=True)
        )
    else:
        g2 = [_over(g - f, shares[1], g) for g, f in zip(gradients, first, strict=True)]
        g1 = [_over(f, shares[0], g) for g, f in zip(gradients, first, strict=True)]
    return g1, g2


def respond(
    batch: Batch, forward: Forward, changes: Mapping[int, Tensor], mask: Tensor | None
) -> Response:
    """Curvature and rms change of the outputs that the criterion saw.

    Args:
        batch: observed while the watch was armed.
        forward: one of its forwards.
        changes: ``J u`` by place among the output's leaves.
        mask: (m,) the samples to look at; None for all.
    """
    if mask is not None:
        changes = {place: change * _along_rows(mask, change) for place, change in changes.items()}
    reading = batch.potential_of
    curvatures, squares, weights = [], [], []
    for o in batch.observations:
        if o.forward is not forward or o.outputs is None:
            continue
        at, moved = (_wide(reading.rows(t)) for t in (o.outputs, o.push(changes)))
        rows = reading.weights(o.outputs, o.targets).to(at.dtype)
        factor = o.kappa * o.scale
        tangent = reading.potential.tangent_projection(moved)
        bent = reading.potential.hessian_product(at, moved)
        curvatures.append(factor * (rows * (moved * bent).sum(-1)).sum())
        squares.append(factor * (rows * tangent.square().sum(-1)).sum())
        weights.append(factor)
    weight = sum_of(weights) if mask is None else _weight(batch, [forward], mask)
    total = torch.where(weight > 0, weight, 1.0)
    change = (sum_of(squares) / total).clamp_min(0).sqrt()
    return Response(sum_of(curvatures) / total, change, weight)


def curvature_product(
    batch: Batch,
    forward: Forward,
    changes: Mapping[int, Tensor],
    pull: Pull,
    total: Tensor,
) -> list[Tensor]:
    """``GGN_B u`` from ``J u``: the outputs' Hessians, then one vector-Jacobian product (Thm 2.6).

    Args:
        batch: observed while the watch was armed.
        forward: one of its forwards, whose samples are B.
        changes: ``J u`` by place among the output's leaves; 0 for samples that are not of B.
        pull: vector-Jacobian products of these samples.
        total: () ``sum kappa c`` of B, of which these samples may be a part.

    Returns:
        a tensor in the shape of each parameter, per-sample Fenchel-Young units.
    """
    reading = batch.potential_of
    cotangents: dict[int, Tensor] = {}
    for o in batch.observations:
        if o.forward is not forward or o.outputs is None:
            continue
        at, moved = (_wide(reading.rows(t)) for t in (o.outputs, o.push(changes)))
        rows = reading.weights(o.outputs, o.targets).to(at.dtype).unsqueeze(-1)
        bent = o.kappa * o.scale / total * rows * reading.potential.hessian_product(at, moved)
        with torch.enable_grad():
            like = torch.zeros_like(o.outputs, requires_grad=True)
            rearranged = reading.rows(like)
            (cotangent,) = torch.autograd.grad(rearranged, like, bent.to(rearranged.dtype))
        for place, part in o.pull_back(cotangent, changes).items():
            cotangents[place] = cotangents[place] + part if place in cotangents else part
    return pull(cotangents)


def inner_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """(blocks,) inner products of tensors, pair by pair.

    Args:
        left: a non-empty list of tensors.
        right: as many, in the same shapes.
    """
    products = [
        torch.dot(_wide(local(a)).flatten(), _wide(local(b)).flatten())
        for a, b in zip(left, right, strict=True)
    ]
    widest = functools.reduce(torch.promote_types, (product.dtype for product in products))
    return sum_over_shards(torch.stack([product.to(widest) for product in products]), left)


def _rows_are_of_samples(batch: Batch, size: int) -> bool:
    """Whether dimension 0 of the outputs counts samples, not the classes of a single one."""
    rows = [
        batch.potential_of.rows(o.outputs).shape[0]
        for o in batch.observations
        if o.place is not None and o.outputs is not None
    ]
    return all(number % size == 0 for number in rows)


def _pull(
    forwards: Sequence[Forward],
    mask: Tensor | None,
    replay: Replay | None,
    parameters: Mapping[str, Tensor],
    weight: Tensor,
    sample: Sample | None = None,
) -> list[Tensor]:
    """The part of g that came through some samples of some forwards, or of a replay of them."""
    total: list[Tensor] | None = None
    for forward in forwards:
        runs = forward.replay if replay is None else replay
        assert runs is not None
        cotangents = {
            place: gradient if mask is None else gradient * _along_rows(mask, gradient)
            for place, gradient in forward.gradients.items()
        }
        pulled = runs.pull(cotangents, parameters) if sample is None else sample.pull(cotangents)
        total = pulled if total is None else list(torch._foreach_add(total, pulled))
    assert total is not None
    return list(torch._foreach_div(total, weight))


def _weight(batch: Batch, forwards: Sequence[Forward], mask: Tensor | None) -> Tensor:
    """() ``sum kappa c`` over some forwards, of some of their samples."""
    parts = []
    for o in batch.observations:
        if any(o.forward is forward for forward in forwards):
            factor = o.kappa * o.scale
            parts.append(factor if mask is None else factor * _share(batch, o, mask))
    return sum_of(parts)


def _share(batch: Batch, o: Observation, mask: Tensor) -> Tensor:
    """() the weight in the criterion's mean of the rows that some samples made."""
    assert o.outputs is not None
    weights = batch.potential_of.weights(o.outputs, o.targets)
    return (weights * rows_of(batch, o, mask, weights.numel())).sum()


def rows_of(batch: Batch, o: Observation, mask: Tensor, number: int) -> Tensor:
    """Which of an observation's rows some samples made.

    Args:
        batch: observed while the watch was armed.
        o: one of its observations.
        mask: (m,) the samples.
        number: of the rows; a multiple of m where the outputs are the model's own.

    Returns:
        (number,) booleans.
    """
    if o.place is not None:
        return mask.repeat_interleave(number // mask.numel())
    # Which rows were made from these samples: those that a change of them reaches.
    assert o.pull is not None
    probe = {
        place: _probe(product) * _along_rows(mask, product) for place, product in o.pull[1].items()
    }
    return (batch.potential_of.rows(o.push(probe)) != 0).any(-1)


def _probe(like: Tensor) -> Tensor:
    """Numbers without a pattern, none of them zero, in the shape of a tensor."""
    ramp = torch.arange(like.numel(), device=like.device, dtype=torch.float32)
    return (2 + torch.cos(ramp * ramp)).reshape(like.shape).to(like.dtype)


def _along_rows(mask: Tensor, like: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (like.ndim - 1))


def _over(part: Tensor, share: Tensor, otherwise: Tensor) -> Tensor:
    """A part over its share of the weight, or the other tensor where it has none."""
    return torch.where(share > 0, part / torch.where(share > 0, share, 1.0), otherwise)


def _wide(tensor: Tensor) -> Tensor:
    """At least float32, as half precision has no room for squares."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _tiny(like: Tensor) -> float:
    return torch.finfo(like.dtype).tiny
