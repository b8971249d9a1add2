"""Batches of outputs and targets for terms of a loss, degenerate ones among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from conjopt.potentials import Logistic, Poisson, Potential

__all__ = ["KINDS", "NAMES", "batch", "batches", "one_of_each"]

NAMES = ("kind", "samples", "outputs", "seed")
KINDS = ("random", "one class", "equal outputs", "large", "small", "zero", "equal classes")
SCALES = {"large": 1e6, "small": 1e-6}


def one_of_each(kinds: Sequence[str], k: int | None) -> list[tuple[Any, ...]]:
    """The smallest batch of two samples of each kind, in the order of `NAMES`.

    Args:
        kinds: of `KINDS`.
        k: number of outputs; None for 2.
    """
    return [(kind, 2, 2 if k is None else k, 0) for kind in kinds]


@st.composite
def batches(draw: st.DrawFn, kinds: Sequence[str], k: int | None) -> tuple[Any, ...]:
    """What `batch` makes a batch from, in the order of `NAMES`.

    Args:
        draw: given by hypothesis.
        kinds: of `KINDS`.
        k: number of outputs; None for 2 to 4.
    """
    return (
        draw(st.sampled_from(list(kinds))),
        draw(st.integers(1, 8)),
        draw(st.integers(2, 4)) if k is None else k,
        draw(st.integers(0, 1000)),
    )


def batch(
    potential: Potential, kind: str, samples: int, outputs: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Outputs ``(samples, outputs)`` in float64, and targets in the domain of a potential.

    Args:
        potential: whose targets are class indices if it is on the simplex.
        kind: of `KINDS`.
        samples: how many.
        outputs: how many.
        seed: of random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    f = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    labels = torch.randint(outputs, (samples,), generator=generator)
    noise = torch.randn(samples, outputs, generator=generator, dtype=torch.float64)
    f = SCALES.get(kind, 1.0) * f
    if kind == "one class":
        labels, noise = labels[:1].expand(samples).clone(), noise[:1].expand(samples, -1).clone()
    if kind == "equal outputs":
        f = f[:1].expand(samples, -1).clone()
    if kind == "equal classes":
        f = f[:, :1].expand(-1, outputs).clone()
    if kind == "zero":  # what a head that starts at zero gives
        f = torch.zeros_like(f)
    if potential.on_simplex:
        return f, labels
    if isinstance(potential, Logistic):
        return f, (noise > 0).double()
    if isinstance(potential, Poisson):
        return f, one_hot(labels, outputs).double() + (noise > 1).double()
    return f, potential.link(noise).detach()
