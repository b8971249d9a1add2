"""Whether the gradients came through the criterion, by which rules along them measure.

Loss, curvature, change and brake of such a rule are those of the watched criterion. Further terms
of the loss are in the gradient, and so in the direction, but not in what holds its steps. Only the
Polyak step without momentum is safe: a greater gradient makes it shorter.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor, nn

from conjopt.measure.observation import Batch, Forward, Observation
from conjopt.measure.parts import inner_products
from conjopt.measure.watch import Watch
from conjopt.optim.blocks import Blocks
from conjopt.optim.user_frame import levels_to_the_user

__all__ = ["MOST", "share_of_other_terms", "to_be_looked_at", "warn"]

LOOKS = (0, 20)  # measurements before those that look: at the start, and where a run is under way
MOST = 0.1  # share of the gradient's norm that need not be the criterion's
SAME = 0.05  # relative difference of outputs that is rounding, in whatever precision


def to_be_looked_at(measured: int) -> bool:
    """Whether a measurement is one of those that look; each costs one more training step.

    Args:
        measured: measurements before it.

    Example:
        >>> [number for number in range(100) if to_be_looked_at(number)]
        [0, 20]
    """
    return measured in LOOKS


def share_of_other_terms(watch: Watch, batch: Batch, blocks: Blocks) -> float:
    """The part of ``||g||`` that did not come through the criterion; waits for a device.

    What clipping makes of the criterion's gradient, by norm or by value, is no other part.

    Args:
        watch: of the loop, in one process.
        batch: observed while the watch was armed.
        blocks: what is moved, none of them sharded; their ``.grad`` counts.

    Returns:
        in [0, 1]; 0 where the model cannot be run again as it ran, so that nothing can be said.

    Example:
        >>> model, criterion = nn.Linear(2, 3), nn.MSELoss()
        >>> watch = Watch(model, criterion, dict(model.named_parameters()))
        >>> watch.armed = True
        >>> outputs = model(torch.ones(4, 2))
        >>> (criterion(outputs, torch.zeros(4, 3)) + outputs.sum()).backward()
        >>> group = {"params": list(model.parameters())}
        >>> names = {id(p): name for name, p in model.named_parameters()}
        >>> blocks = Blocks.of([group], {p: {} for p in model.parameters()}, names)
        >>> share_of_other_terms(watch, watch.batch(), blocks) > MOST
        True
    """
    total: list[Tensor] | None = None
    for forward in batch.forwards:
        cotangents: dict[int, Tensor] = {}
        for o in batch.observations:
            if o.forward is not forward:
                continue
            if forward.replay is None or o.outputs is None:
                return 0.0
            sent = o.kappa / batch.weight * _cotangent(watch.criterion, o)
            for place, part in o.pull_back(sent, forward.outputs).items():
                cotangents[place] = cotangents[place] + part if place in cotangents else part
        assert forward.replay is not None
        pulled = forward.replay.pull(cotangents, blocks.by_name)
        total = pulled if total is None else list(torch._foreach_add(total, pulled))
    assert total is not None
    gradients = [p.grad for p in blocks.parameters if p.grad is not None]
    changed = watch.changed_since_backward(batch.marks)
    share = float(_unlike(gradients, total, changed))
    if share > MOST and not all(_runs_again(forward) for forward in batch.forwards):
        return 0.0
    return share


def warn(share: float, rule: str) -> None:
    """Say that a rule along the gradient does not see all of the loss.

    Args:
        share: of the gradient's norm that did not come through the criterion.
        rule: its name.

    Example:
        >>> with warnings.catch_warnings(record=True) as said:
        ...     warnings.simplefilter("always")
        ...     warn(0.5, "edge")
        >>> str(said[0].message)[:49]
        'ConjSGD: 50 % of the gradient (by its norm) did n'
    """
    warnings.warn(
        f"ConjSGD: {100 * share:.0f} % of the gradient (by its norm) did not come through the "
        "criterion: the loss has further terms, or gradients were changed by other means than "
        f'clipping. direction="sgd" with step_rule="{rule}" goes by the criterion alone: steps may '
        "be too long for the rest, and diverge. Put the further terms into the criterion, or use "
        'direction="spectral", or step_rule="polyak" with momentum=0.',
        RuntimeWarning,
        stacklevel=levels_to_the_user(),
    )


def _cotangent(criterion: nn.Module, observation: Observation) -> Tensor:
    """The criterion's gradient by the tensor that it was given, in its shape."""
    assert observation.outputs is not None
    outputs = observation.outputs
    if outputs.dtype in (torch.float16, torch.bfloat16):  # for which a CPU may have no loss
        outputs = outputs.float()
    plain = getattr(criterion, "_orig_mod", criterion)
    with torch.enable_grad():
        leaf = outputs.detach().clone().requires_grad_()
        # Not by a call, which the hooks of other watches would see.
        value = plain.forward(leaf, observation.targets)
        (cotangent,) = torch.autograd.grad(value, leaf)
    return cotangent


def _unlike(gradients: list[Tensor], explained: list[Tensor], changed: bool) -> Tensor:
    """() share of the norm of gradients that others do not explain by a factor.

    If gradients were changed, a factor for each tensor may explain them as well (clipping by norm),
    or one factor and a bound on the entries (clipping by value).
    """
    along, square = inner_products(gradients, explained), inner_products(explained, explained)
    tiny = torch.finfo(along.dtype).tiny
    factors = [(along.sum() / square.sum().clamp_min(tiny)).expand_as(along)]
    bounds: list[Tensor | None] = [None]
    if changed:
        factors.append(along / square.clamp_min(tiny))
        most = torch.stack([g.abs().max() for g in gradients]).max()
        free = torch._foreach_mul(explained, [(g.abs() < most).to(g.dtype) for g in gradients])
        along, square = inner_products(gradients, free).sum(), inner_products(free, free).sum()
        huge = torch.finfo(along.dtype).max  # where every entry is clipped, their signs are left
        factors.append(torch.where(square > 0, along / square, huge).expand(len(gradients)))
        bounds += [None, most]
    rests = []
    for by, bound in zip(factors, bounds, strict=True):
        parts = [(t * f).to(t.dtype) for t, f in zip(explained, by.clamp_min(0), strict=True)]
        if bound is not None:
            parts = [part.clamp(-bound, bound) for part in parts]
        rest = torch._foreach_sub(gradients, parts)
        rests.append(inner_products(rest, rest).sum())
    whole = inner_products(gradients, gradients).sum().clamp_min(tiny)
    return (functools.reduce(torch.minimum, rests) / whole).sqrt()


def _runs_again(forward: Forward) -> bool:
    """Whether a forward gives the outputs that it gave; not if it draws from Python's `random`."""
    assert forward.replay is not None
    with torch.no_grad():
        leaves = forward.replay.run({})
    for place in forward.gradients:
        found, expected = leaves[place], forward.outputs[place]
        if found is None or found.shape != expected.shape:
            return False
        apart = torch.linalg.vector_norm((found - expected).double())
        if not apart <= SAME * torch.linalg.vector_norm(expected.double()):
            return False
    return True
