"""Strategies of hypothesis for what the theory speaks of."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

__all__ = ["outputs", "potentials", "targets"]

ROWS = 2  # of every drawn tensor


def potentials(*, smooth: bool = False) -> st.SearchStrategy[Potential]:
    """Potentials of this package.

    Args:
        smooth: only those whose link has a Lipschitz constant.

    Example:
        >>> from hypothesis import given
        >>> @given(potentials(smooth=True))
        ... def test(potential):
        ...     assert potential.smoothness is not None
        >>> test()
    """
    orders = st.floats(1.01, 2.0, exclude_min=True).map(lambda a: Entmax(round(a, 2)))
    fixed: list[Potential] = [Softmax(), Sparsemax(), Squared(), Logistic()]
    if not smooth:
        fixed.append(Poisson())
    return st.one_of(st.sampled_from(fixed), orders)


@st.composite
def outputs(draw: st.DrawFn, *, k: int | None = None, largest: float = 300.0) -> Tensor:
    """Outputs ``f``, (2, k) in float64: equal, small, large, or one far above the others.

    Args:
        draw: given by hypothesis.
        k: number of outputs; None for 1 to 12.
        largest: of their sizes.

    Example:
        >>> from hypothesis import given
        >>> @given(outputs(k=3))
        ... def test(f):
        ...     assert f.shape == (2, 3)
        >>> test()
    """
    width = draw(st.integers(1, 12)) if k is None else k
    scale = draw(st.sampled_from([s for s in (1.0, 1e-3, 30.0, 300.0) if s <= largest]))
    unit = st.floats(-1, 1, width=32)
    rows = draw(st.lists(unit, min_size=ROWS * width, max_size=ROWS * width))
    return scale * torch.tensor(rows, dtype=torch.float64).reshape(ROWS, width)


@st.composite
def targets(draw: st.DrawFn, potential: Potential, f: Tensor) -> Tensor:
    """Targets ``y`` in the domain of a potential, in the shape of outputs.

    Vertices, mixtures and zeros for potentials on the simplex; the link of other outputs for all,
    which is in the domain of every potential.

    Args:
        draw: given by hypothesis.
        potential: any.
        f: outputs (..., k).

    Example:
        >>> from hypothesis import given
        >>> @given(targets(Softmax(), torch.zeros(2, 3, dtype=torch.float64)))
        ... def test(y):
        ...     assert bool((y.sum(-1) - 1).abs().max() < 1e-12)
        >>> test()
    """
    k = f.shape[-1]
    kinds = ["link", "near"] + (["vertex", "mixture"] if potential.on_simplex else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "vertex":
        classes = draw(st.lists(st.integers(0, k - 1), min_size=len(f), max_size=len(f)))
        return torch.nn.functional.one_hot(torch.tensor(classes), k).to(f)
    if kind == "mixture":
        parts = st.lists(st.integers(0, 4), min_size=f.numel(), max_size=f.numel())
        mass = torch.tensor(draw(parts), dtype=f.dtype).reshape(f.shape)
        mass[..., 0] += 1
        return mass / mass.sum(-1, keepdim=True)
    if kind == "near":
        return potential.link(f + 1e-2)
    return potential.link(draw(outputs(k=k, largest=1.0)))
