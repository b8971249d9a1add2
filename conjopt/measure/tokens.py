"""Norms of the gradients of single tokens: what a loss at one place of a sequence gives.

Through attention or recurrence a token's gradient passes through other places, so each place has a
cotangent of its own: the gradient of the loss in the outputs, with all other places set to zero.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.modules.loss import _Loss

from conjopt.losses import potential_of
from conjopt.losses.reading import ClassTargets
from conjopt.measure.layers.pieces import Dense, Lookup, Outer, Piece, squared_norms
from conjopt.measure.layers.tape import Tape
from conjopt.measure.structure import bytes_by_cotangent

__all__ = ["dimension_within_tokens", "token_squares"]

_MEMORY = 2**28  # bytes that the gradients of the layers may take


def token_squares(
    tape: Tape,
    outputs: Tensor,
    cotangent: Tensor,
    within: int | None,
    rows: Tensor | None = None,
    *,
    memory: float = _MEMORY,
) -> Tensor:
    """Return the squared norms of what goes through each token of each sample.

    Args:
        tape: A forward of the model.
        outputs: What it returned, samples along dimension 0.
        cotangent: The gradient of the loss in the outputs.
        within: The dimension of the outputs that belongs to one token, see
            `dimension_within_tokens`.
        rows: Numbers of the samples wanted; all if `None`.
        memory: Bytes that the gradients of the layers may take, as estimated; those of one place
            of all samples are always taken.

    Returns:
        Shape `(m, d1, ...)`, the outputs' without the dimension `within`.
    """
    if within is None:
        cotangent, within = cotangent.unsqueeze(-1), cotangent.ndim
    last = cotangent.movedim(within, -1)
    by_token = last.flatten(1, -2) if last.ndim > 2 else last.unsqueeze(1)  # (m, T, k)
    m, places = len(outputs) if rows is None else len(rows), by_token.shape[1]
    total = by_token.new_zeros(m, places)
    step = max(1, int(memory // bytes_by_cotangent(tape))) if outputs.numel() else 1
    for start in range(0, places if outputs.numel() else 0, step):
        stop = min(start + step, places)
        only = by_token.new_zeros(stop - start, *by_token.shape)
        for j, place in enumerate(range(start, stop)):
            only[j, :, place] = by_token[:, place]
        masked = only.reshape(-1, *last.shape).movedim(-1, within + 1).reshape(-1, *outputs.shape)
        for _, pieces in tape.pull([outputs], [[one] for one in masked]):
            chosen = pieces if rows is None else [piece.select(rows) for piece in pieces]
            for j in range(stop - start):
                total[:, start + j] += squared_norms([_of_one(piece, j) for piece in chosen])
    return total.reshape(m, *last.shape[1:-1])


def dimension_within_tokens(loss: Any, outputs: Tensor, targets: Any) -> int | None:
    """Return the dimension of the outputs that belongs to one token.

    A criterion of class numbers, and one on the simplex with targets of probabilities, has torch's
    layout: classes along dimension 1. With other targets of the outputs' shape it is the last
    dimension, or none in outputs `(m, T)`.

    Args:
        loss: A criterion.
        outputs: That it is called with, samples along dimension 0.
        targets: That it is called with.

    Raises:
        ValueError: If the shapes do not tell.
    """
    shape = tuple(outputs.shape)
    loss = getattr(loss, "_orig_mod", loss)
    try:
        on_classes = isinstance(potential_of(loss), ClassTargets)
    except (TypeError, ValueError):
        on_classes = None
    given = tuple(targets.shape) if isinstance(targets, Tensor) else None
    if on_classes and len(shape) > 1:
        return 1
    if on_classes is None and given != shape and len(shape) > 1:
        fits = {d for d in (1, len(shape) - 1) if given == shape[:d] + shape[d + 1 :]}
        if 1 in fits and isinstance(loss, _Loss):
            return 1
        if len(fits) == 1:
            return fits.pop()
    elif not on_classes and given == shape:
        return len(shape) - 1 if len(shape) > 2 else None
    raise ValueError(
        f"unit='token': it cannot be told what a token is in outputs of shape {shape} with targets "
        f"of shape {given} for {loss!r}. Expected outputs (m, C, d1, ...) with class numbers "
        "(m, d1, ...), or outputs (m, T, k) or (m, T) with targets of the same shape; use a "
        "criterion that conjopt.losses.potential_of recognises where these look alike."
    )


def _of_one(piece: Piece, j: int) -> Piece:
    """Return the gradients for one cotangent."""
    if isinstance(piece, Outer):
        left, right = (s[j : j + 1] if len(s) > 1 else s for s in (piece.left, piece.right))
        return Outer(left, right)
    if isinstance(piece, Lookup):
        return Lookup(piece.index, piece.right[j : j + 1], piece.size)
    if isinstance(piece, Dense):
        return Dense(piece.gradients[j : j + 1])
    return Dense(piece.slab(0, piece.sizes[3])[j : j + 1])
