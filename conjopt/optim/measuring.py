"""The measuring step: from the observed batch to the direction of the step and what it promises.

Three ways, by what the direction and the model allow: held-out slopes from two halves, the greatest
curvature of the whole batch, or the change of the outputs alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.measure.curvature import JacobianProduct, relative_step
from conjopt.measure.observation import Batch, Forward
from conjopt.measure.parts import (
    Parts,
    Response,
    Sample,
    curvature_product,
    inner_products,
    respond,
    rows_of,
    split,
)
from conjopt.measure.process_group import Joined, Ranks
from conjopt.measure.replay import Replay
from conjopt.measure.row_replay import Coupled
from conjopt.measure.watch import Watch
from conjopt.optim.blocks import Blocks
from conjopt.optim.directions import Direction, Pending, is_matrix
from conjopt.optim.gate import Gate, write
from conjopt.optim.memory import Memory
from conjopt.optim.other_terms import share_of_other_terms, to_be_looked_at
from conjopt.optim.statistics import Measurement, Statistics

__all__ = ["Found", "along_gradient", "change_only", "couples_samples", "held_out", "measure"]

BY_ROWS = (True, False)  # a half's samples are run alone, or else all of them with masks
# Along the gradient every so many-th sample will do, if these have so many loss terms together.
STRIDES = ((4, 256), (2, 32))
LEAST = 4  # samples, however many terms they have
# Where it is every fourth, later measurements than so many find the greatest curvature in turns.
OFTEN = 20
RHO_BLOCK_MIN = 0.02  # least share of a block's raw slope that its shrinkage leaves


@dataclasses.dataclass(eq=False)
class Trial:
    """What it takes to try a step on the outputs.

    Attributes:
        along: the direction, with the blocks' weights.
        outputs: of the model before the step; empty where memory did not do for them.
        forward: that they are of.
        replay: runs it again.
        mask: (m,) the samples to look at; None for all.
        ranks: whose samples count.
        here: whether those of this rank do.
    """

    along: list[Tensor]
    outputs: list[Tensor | None]
    forward: Forward
    replay: Replay | None
    mask: Tensor | None
    ranks: Ranks
    here: bool = True

    def change(self, batch: Batch, blocks: Blocks, size: Tensor, memory: Memory) -> Tensor:
        """() rms change of the outputs by a step, less what rounding makes of it.

        Args:
            batch: observed while the watch was armed.
            blocks: what is moved.
            size: () of the step.
            memory: there is.

        Returns:
            the change; -1 if memory ran out, on any rank.
        """
        found = memory.attempt(self._try, batch, blocks, size) if self.outputs else None
        if found is None:
            found = [Response.nothing(batch)] * 2
        changed, whole = self.ranks.respond(found, self.here)
        types = [
            output.dtype
            for place, output in enumerate(self.outputs)
            if output is not None and place in self.forward.gradients
        ]
        eps = max((torch.finfo(dtype).eps for dtype in types), default=0.0)
        change = (changed.change - 8 * eps * whole.change).clamp_min(0)
        return torch.where(changed.lost, -1.0, change)

    def _try(self, batch: Batch, blocks: Blocks, size: Tensor) -> list[Response]:
        """The response to the change of the outputs, and to the outputs themselves."""
        assert self.replay is not None
        with torch.no_grad():
            moved = self.replay.run(_moved(blocks, self.along, size))
        kept, changes = {}, {}
        for place, (before, after) in enumerate(zip(self.outputs, moved, strict=True)):
            if before is not None and after is not None and place in self.forward.gradients:
                kept[place], changes[place] = before, after - before
        return [respond(batch, self.forward, by_place, self.mask) for by_place in (changes, kept)]


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
        lost: () whether a rank ran out of memory, so that this is no measurement; None for no.
        trial: for trying the step on the outputs; None where that is not done.
        other_terms: share of the gradient that did not come through the criterion; 0 where nobody
            looked.
    """

    directions: list[Tensor]
    pending: Pending
    measurement: Measurement
    slopes: Tensor | None = None
    shrinkage: Tensor | None = None
    trust_only: bool = False
    lost: Tensor | None = None
    trial: Trial | None = None
    other_terms: float = 0.0

    @property
    def nothing(self) -> bool:
        """On a CPU, whether this is no measurement, on all ranks alike.

        A device is not asked: there the measurement is not finite, which gives up the step.
        """
        return self.lost is not None and self.lost.device.type == "cpu" and bool(self.lost)

    @property
    def finite(self) -> Tensor:
        """() whether all that was measured is finite."""
        values = [
            value
            for field in dataclasses.fields(self.measurement)
            if (value := getattr(self.measurement, field.name)) is not None
        ]
        return torch.stack([torch.isfinite(value) for value in values]).all()

    def keep(self, states: Sequence[Any], gate: Gate) -> None:
        """Write the blocks' running slopes and weights to their states.

        Args:
            states: of the parameters.
            gate: () whether the step is taken.
        """
        if self.slopes is None or self.shrinkage is None:
            return
        for state, slopes, weight in zip(states, self.slopes, self.shrinkage, strict=True):
            state["slopes"] = write(gate, slopes, state.get("slopes", 0.0))
            state["shrinkage"] = write(gate, weight, state.get("shrinkage", 1.0))


def measure(
    watch: Watch,
    batch: Batch,
    joined: Joined,
    blocks: Blocks,
    direction: Direction,
    product: JacobianProduct,
    statistics: Statistics,
    trust_only: bool,
    products: int,
    sampled: bool,
    memory: Memory,
) -> Found | None:
    """Measure in the way that direction, model and batch allow.

    Args:
        watch: of the loop.
        batch: observed while the watch was armed.
        joined: what it is with those of other ranks.
        blocks: what is moved, with ``g`` of the whole batch.
        direction: makes ``u``.
        product: ``J u``.
        statistics: so far.
        trust_only: whether they lack slopes and curvature.
        products: curvature products to find ``hi(GGN_B)`` by, along the gradient.
        sampled: whether some samples of a large batch will do there.
        memory: there is.

    Returns:
        None for a single sample, the last of an epoch say, after better batches.
    """
    ranks, coupled = watch.ranks, couples_samples(watch.model)
    if blocks.sharded:
        return change_only(batch, blocks, direction, ranks, memory)
    if not coupled:
        memory.fit(batch)
    if not direction.held_out:
        found = along_gradient(
            watch,
            batch,
            joined,
            blocks,
            direction,
            product,
            products,
            sampled,
            statistics.measured,
            memory,
        )
        at_risk = products or any(group["momentum"] for group in blocks.groups)
        if at_risk and not ranks.several and to_be_looked_at(statistics.measured):
            found.other_terms = share_of_other_terms(watch, batch, blocks)
        return found
    if coupled:
        return change_only(batch, blocks, direction, ranks, memory)
    parts = _parts(watch, batch, joined, blocks)
    if parts is not None:
        return held_out(batch, parts, blocks, direction, product, statistics.decay, ranks, memory)
    if statistics.measured and not trust_only:
        return None
    return change_only(batch, blocks, direction, ranks, memory)


def _parts(
    watch: Watch, batch: Batch, joined: Joined, blocks: Blocks, stride: int | None = None
) -> Parts | None:
    """The two halves: of the ranks, or of the samples of a single one.

    With a stride, the first of them is every so many-th sample, and is kept for more.
    """
    changed, parameters = watch.changed_since_backward(batch.marks), blocks.by_name
    if watch.ranks.several:
        local = watch.take_local()
        return watch.ranks.parts(
            batch, joined, parameters, blocks.gradients, local, changed=changed
        )
    for by_rows in BY_ROWS:
        with contextlib.suppress(Coupled):
            return split(
                batch,
                parameters,
                blocks.gradients,
                changed=changed,
                by_rows=by_rows,
                stride=stride if stride and by_rows else 2,
                keep=stride is not None,
            )
    return None


def held_out(
    batch: Batch,
    parts: Parts,
    blocks: Blocks,
    direction: Direction,
    product: JacobianProduct,
    decay: float,
    ranks: Ranks,
    memory: Memory,
) -> Found:
    """A direction from the second half, and its slope on the first (Thm 3.2).

    Args:
        batch: observed while the watch was armed.
        parts: its two halves.
        blocks: what is moved.
        direction: makes ``u``.
        product: ``J u``.
        decay: of the blocks' running slopes.
        ranks: that share the step.
        memory: there is.
    """
    u, pending = direction.propose(parts.second, blocks.gradients, blocks.states, blocks.groups)
    raw, held = inner_products(blocks.gradients, u), inner_products(parts.first, u)
    now = torch.stack([raw, held], 1)
    before = torch.stack([state.get("slopes", now[i] * 0) for i, state in enumerate(blocks.states)])
    slopes = before.to(now).lerp(now, 1 - decay)  # both start at zero, which cancels in their ratio
    rho = slopes[:, 1] / slopes[:, 0].clamp_min(torch.finfo(slopes.dtype).tiny)
    rho = rho.clamp(RHO_BLOCK_MIN, 1)
    matrix = torch.tensor([is_matrix(t) for t in u], device=rho.device)
    shrinkage = torch.where(matrix, rho.sqrt(), rho)
    weights = shrinkage * torch.tensor(blocks.ratios, dtype=rho.dtype, device=rho.device)
    along = [tensor * weight for tensor, weight in zip(u, weights, strict=True)]
    seen = _respond, product, batch, parts.forward, parts.replay, blocks, along, parts.mask
    outputs, own = memory.together(ranks, *seen) or ([], Response.nothing(batch))
    (response,) = ranks.respond([own], parts.here)
    mean_square, noise = parts.noise
    measurement = Measurement(
        change=response.change,
        slope=(weights * held).sum(),
        raw_slope=(weights * raw).sum(),
        curvature=response.curvature,
        mean_square=mean_square,
        noise=noise,
    )
    trial = Trial(along, outputs, parts.forward, parts.replay, parts.mask, ranks, parts.here)
    return Found(u, pending, measurement, slopes, shrinkage, lost=response.lost, trial=trial)


def along_gradient(
    watch: Watch,
    batch: Batch,
    joined: Joined,
    blocks: Blocks,
    direction: Direction,
    product: JacobianProduct,
    products: int,
    sampled: bool,
    measured: int,
    memory: Memory,
) -> Found:
    """The greatest curvature of the batch, its halves' correlation, and what ``u`` does to it.

    Args:
        watch: of the loop.
        batch: observed while the watch was armed.
        joined: what it is with those of other ranks.
        blocks: what is moved.
        direction: makes ``u``.
        product: ``J u``.
        products: curvature products to find ``hi(GGN_B)`` by; 0 leaves it.
        sampled: whether some samples of a large batch will do, and of a very large one every second
            measurement for ``hi(GGN_B)``.
        measured: measurements before.
        memory: there is.
    """
    gradients = blocks.gradients
    u, pending = direction.propose(gradients, gradients, blocks.states, blocks.groups)
    along = [t if r == 1 else t * r for t, r in zip(u, blocks.ratios, strict=True)]
    forward, parts, coupled = batch.forwards[-1], None, couples_samples(watch.model)
    if not coupled:
        stride = _stride(batch) if sampled else None
        parts = _parts(watch, batch, joined, blocks, stride)
    sample = None if parts is None else parts.sample
    replay, mask = (forward.replay, None) if sample is None else (sample.replay, sample.mask)
    seen = _respond, product, batch, forward, replay, blocks, along, mask
    _, own = memory.together(watch.ranks, *seen) or ([], Response.nothing(batch))
    (response,) = watch.ranks.respond([own])
    lost = response.lost
    measurement = Measurement(
        change=response.change,
        raw_slope=inner_products(gradients, along).sum(),
        curvature=response.curvature,
        length=inner_products(along, along).sum().sqrt(),
    )
    in_turns = sample is not None and sample.stride == STRIDES[0][0] and measured >= OFTEN
    if products and not (in_turns and measured % 2):
        total = response.weight
        measurement.top, too = _top(
            batch, forward, sample, blocks, product, products, total, watch.ranks, memory
        )
        lost = lost | too
    if parts is not None:
        inner, noise = parts.noise
        measurement.mean_square, measurement.noise = inner, noise
        square = inner_products(gradients, gradients).sum()
        tiny = torch.finfo(square.dtype).tiny
        measurement.correlation = (inner / square.clamp_min(tiny)).clamp(-1, 1)
    elif not coupled:  # a single sample, which says nothing of another
        measurement.correlation = torch.zeros_like(response.change)
    return Found(u, pending, measurement, lost=lost)


def _stride(batch: Batch) -> int | None:
    """How many samples one of them may stand for in a measurement; None where all are needed.

    Few terms find too great a curvature, and near zero loss that of the one or two with most of it.
    """
    size = batch.forwards[-1].batch_size
    if size is None or len(batch.forwards) > 1:
        return None
    counted = [
        (o, batch.potential_of.weights(o.outputs, o.targets) != 0)
        for o in batch.observations
        if o.outputs is not None
    ]
    if any(o.place is not None and w.numel() % size for o, w in counted):
        return None
    terms = sum(int(w.sum()) for _, w in counted)
    for stride, least in STRIDES:
        if terms >= stride * least and size >= stride * LEAST:
            # The samples that are measured may be those that do not count.
            mask = torch.arange(size, device=batch.weight.device) % stride == 0
            own = [w & rows_of(batch, o, mask, w.numel()) for o, w in counted]
            if sum(int(w.sum()) for w in own) >= least:
                return stride
    return None


def _top(
    batch: Batch,
    forward: Forward,
    sample: Sample | None,
    blocks: Blocks,
    product: JacobianProduct,
    products: int,
    total: Tensor,
    ranks: Ranks,
    memory: Memory,
) -> tuple[Tensor, Tensor]:
    """() ``hi(GGN_B)`` from below, by the power method from the gradient; whether it was lost.

    Where learning rates differ between groups, of the matrix in the metric in which the step is a
    gradient step. Of a sample, with the quotient ``v^T GGN v / v^T v`` in place of the last
    product's length, which is about as great without a backward pass.
    """
    replay, mask, pull = forward.replay, None, None
    if sample is not None:
        replay, mask, pull = sample.replay, sample.mask, sample.pull

    def bend(moved: list[Tensor]) -> list[Tensor]:
        nonlocal pull
        _, changes = _changes(product, forward, replay, blocks, moved)
        if pull is None:  # one graph for all products
            assert replay is not None
            pull = replay.adjoint(blocks.by_name)
        return curvature_product(batch, forward, changes, pull, total)

    roots = [ratio**0.5 for ratio in blocks.ratios]
    vector = [g * root for g, root in zip(blocks.gradients, roots, strict=True)]
    top = inner_products(vector, vector).sum().sqrt()
    lost = torch.zeros_like(top)
    for number in range(products):
        unit = [v / top.clamp_min(torch.finfo(top.dtype).tiny).to(v.dtype) for v in vector]
        moved = [v * root for v, root in zip(unit, roots, strict=True)]
        if sample is not None and number == products - 1:
            _, response = _respond(product, batch, forward, replay, blocks, moved, mask)
            top = response.curvature
            break
        own = memory.together(ranks, bend, moved)
        failed = torch.full_like(top, float(own is None))
        sent = [torch.zeros_like(v) for v in vector] if own is None else own
        *bent, failed = ranks.sum([*sent, failed])
        lost = lost + failed
        vector = [h * root for h, root in zip(bent, roots, strict=True)]
        top = inner_products(vector, vector).sum().sqrt()
    return torch.where(lost > 0, torch.nan, top), lost > 0


def change_only(
    batch: Batch, blocks: Blocks, direction: Direction, ranks: Ranks, memory: Memory
) -> Found:
    """The change of the outputs along the direction, by a difference of two forwards.

    For models whose samples are coupled (batch norm in train mode) or whose parameters are sharded,
    and for single samples.

    Args:
        batch: observed while the watch was armed.
        blocks: what is moved.
        direction: makes ``u``.
        ranks: that share the step.
        memory: there is.
    """
    gradients = blocks.gradients
    u, pending = direction.propose(gradients, gradients, blocks.states, blocks.groups)
    along = [t * w for t, w in zip(u, blocks.weights, strict=True)]
    forward = batch.forwards[-1]
    seen = memory.together(ranks, _respond_by_difference, batch, forward, blocks, along)
    here, own = seen or ([], Response.nothing(batch))
    (response,) = ranks.respond([own])
    raw = inner_products(gradients, along).sum()
    measurement = Measurement(change=response.change, raw_slope=raw)
    trial = Trial(along, here, forward, forward.replay, None, ranks)
    return Found(u, pending, measurement, trust_only=True, lost=response.lost, trial=trial)


def _respond_by_difference(
    batch: Batch, forward: Forward, blocks: Blocks, along: Sequence[Tensor]
) -> tuple[list[Tensor | None], Response]:
    """The outputs, and the response to their change along the direction."""
    assert forward.replay is not None
    step = relative_step([p.detach() for p in blocks.parameters], along, power=1 / 2)
    with torch.no_grad():
        here = forward.replay.run({})
        there = forward.replay.run(_moved(blocks, along, step))
    unit = torch.where(step > 0, step, 1.0)
    changes = {
        place: (h - t) / unit
        for place, (h, t) in enumerate(zip(here, there, strict=True))
        if h is not None and t is not None and place in forward.gradients
    }
    return here, respond(batch, forward, changes, None)


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
    replay: Replay | None,
    blocks: Blocks,
    along: Sequence[Tensor],
) -> tuple[list[Tensor | None], dict[int, Tensor]]:
    assert replay is not None
    direction = dict(zip(blocks.names, along, strict=True))
    outputs, changes = product(replay.run, blocks.by_name, direction)
    seen = {
        place: change
        for place, change in enumerate(changes)
        if change is not None and place in forward.gradients
    }
    return outputs, seen


def _respond(
    product: JacobianProduct,
    batch: Batch,
    forward: Forward,
    replay: Replay | None,
    blocks: Blocks,
    along: Sequence[Tensor],
    mask: Tensor | None,
) -> tuple[list[Tensor | None], Response]:
    """The outputs, and the response to their change along the direction."""
    outputs, changes = _changes(product, forward, replay, blocks, along)
    return outputs, respond(batch, forward, changes, mask)


def _moved(blocks: Blocks, along: Sequence[Tensor], size: Tensor) -> dict[str, Tensor]:
    """The parameters after a step."""
    return {
        name: parameter.detach() - size.to(parameter.dtype) * u.to(parameter.dtype)
        for name, parameter, u in zip(blocks.names, blocks.parameters, along, strict=True)
    }
