"""A brake for steps whose loss does not fall: the last line of a rule without held-out slopes.

Along the gradient itself no measurement tells a step that jumps across a valley from one that makes
progress: both have large, agreeing gradients. The losses of the batches to come tell (Thm 3.1: what
the steps spend beyond the decrease of the risk is their noise). The factor `Statistics.brake` of
the step falls where their slow mean rises, or finds no new least value for a while, and recovers
with each new least value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from conjopt.optim.gate import Gate, choose
from conjopt.optim.statistics import BRAKE, Statistics

__all__ = ["judge", "watch_loss"]

DECAY = 0.97  # of the slow mean, over steps
RISE = 1.1  # of the slow mean over its least value that counts as a rise
ERRORS = 2.0  # and by so many standard errors of the slow mean
PATIENCE = 50.0  # steps without a new least value
HORIZON = 0.05  # or this share of the run so far, if it is longer
LATENCY = 50.0  # steps until a brake shows in the slow mean
DOWN, UP, LEAST = 0.6, 1.1, 0.02


def watch_loss(statistics: Statistics, loss: Tensor, gate: Gate) -> None:
    """Take the loss of a batch into the slow mean and its spread.

    Args:
        statistics: written to.
        loss: () over the floor.
        gate: () whether the step is taken.
    """
    new = {
        "slow": statistics.slow.lerp(loss, 1 - DECAY),
        "slow_weight": statistics.slow_weight.lerp(torch.ones_like(loss), 1 - DECAY),
    }
    off = loss - new["slow"] / new["slow_weight"]
    new["spread"] = statistics.spread.lerp(off * off, 1 - DECAY)
    for name, value in new.items():
        setattr(statistics, name, choose(gate, value, getattr(statistics, name)))


def judge(statistics: Statistics, gate: Gate, settled: int) -> None:
    """Set the brake by what the slow mean has done.

    Args:
        statistics: written to.
        gate: () whether the step is taken.
        settled: steps after which the slow mean tells something.
    """
    now, mean = statistics.steps, statistics.slow / statistics.slow_weight
    error = ERRORS * (statistics.spread * ((1 - DECAY) / (1 + DECAY))).sqrt()
    start = torch.where(statistics.lowest.isnan(), mean, statistics.start)
    best = ~(mean >= statistics.lowest)
    rises = mean > torch.minimum(RISE * statistics.lowest, start) + error
    rises = rises & (now - statistics.braked_at >= LATENCY) & ~best & (now >= settled)
    waited = now - statistics.lowest_at > torch.clamp(HORIZON * now, min=PATIENCE)
    less = rises | (waited & ~best)
    one = torch.ones_like(mean)  # in its precision, which bare numbers would not have
    factor = torch.where(less, DOWN * one, torch.where(best, UP * one, one))
    new = {
        "start": start,
        "lowest": torch.where(best, mean, statistics.lowest),
        "lowest_at": torch.where(best | less, now, statistics.lowest_at),
        "braked_at": torch.where(rises, now, statistics.braked_at),
        "brake": (statistics.brake * factor).clamp(LEAST, 1),
    }
    assert {*new, "slow", "slow_weight", "spread"} == {*BRAKE}
    for name, value in new.items():
        setattr(statistics, name, choose(gate, value, getattr(statistics, name)))
