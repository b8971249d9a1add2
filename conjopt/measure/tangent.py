"""Bases of the tangent space of a loss's potential, in the outputs of one sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from conjopt.potentials import Potential

__all__ = ["basis_like", "tangent_basis"]

_BASES: dict[Any, Tensor] = {}  # small ones, kept for the next call


def tangent_basis(
    shape: Sequence[int],
    potential: Potential | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return an orthonormal basis of the tangent space `V` of one sample's outputs.

    Args:
        shape: Of the outputs of one sample, `k` numbers; on the simplex the classes come first.
        potential: Of the loss; without one, and off the simplex, `V` is all of `R^k`.
        device: Of the result.

    Returns:
        Shape `(d, k)`, in float64. On the simplex, `d = (C - 1) T` for `C` classes at `T` places:
        contrasts of each class with the ones before it, and within a contrast the places in order.

    Raises:
        ValueError: If a potential on the simplex finds no dimension of classes.

    Example:
        >>> from conjopt.measure.tangent import tangent_basis
        >>> from conjopt.potentials import Softmax
        >>> tangent_basis((2,), Softmax())
        tensor([[ 0.7071, -0.7071]], dtype=torch.float64)
    """
    options: Any = {"dtype": torch.float64, "device": device}
    if potential is None or not potential.on_simplex:
        return torch.eye(math.prod(shape), **options)
    if not shape:
        raise ValueError(
            f"the outputs have no dimension of classes, which {potential!r} needs: expected "
            "(N, C) or (N, C, d1, ...)"
        )
    classes, places = shape[0], math.prod(shape[1:])
    number = torch.arange(classes, **options)
    rank = number[1:].unsqueeze(1)  # of the contrast: so many classes come before its own
    contrasts = ((number < rank).to(rank) - rank * (number == rank)) / (rank * (rank + 1)).sqrt()
    return torch.kron(contrasts, torch.eye(places, **options))


def basis_like(outputs: Tensor, potential: Potential | None) -> Tensor:
    """Return the basis in the type and on the device of outputs.

    Args:
        outputs: With the samples along dimension 0.
        potential: See `tangent_basis`.

    Returns:
        Shape `(d, k)`; not to be written to.

    Raises:
        ValueError: See `tangent_basis`.

    Example:
        >>> basis_like(torch.empty(5, 2), None)
        tensor([[1., 0.],
                [0., 1.]])
    """
    on_simplex = potential is not None and potential.on_simplex
    key = on_simplex, outputs.shape[1:], outputs.dtype, outputs.device
    if (basis := _BASES.get(key)) is None:
        basis = tangent_basis(outputs.shape[1:], potential, device=outputs.device)
        basis = basis.to(outputs.dtype)
        if basis.numel() <= 2**12 and not torch.is_inference_mode_enabled():
            if len(_BASES) >= 64:
                _BASES.clear()
            _BASES[key] = basis
    return basis
