"""Per-sample gradients of any function: one vector-Jacobian product per sample."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from conjopt.measure.layers.layout import LOST, MIXED, RANGE, tensors
from conjopt.measure.layers.pieces import BUDGET, Dense, Piece
from conjopt.measure.layers.uses import Use

__all__ = ["by_sample"]


class _DoesNotFit(Exception):
    """A call for one sample returned another shape than its part of the result."""


def by_sample(
    use: Use, cotangents: Sequence[Tensor | None], *, nested: bool = False
) -> list[tuple[Tensor, Piece]]:
    """Vector-Jacobian products of one sample at a time, vectorised where torch can.

    Args:
        use: The call.
        cotangents: For each tensor that it returned, `(k, *shape)` or `None`.
        nested: Whether to vectorise over the cotangents, too, within the samples. Nested, not every
            function is vectorised rightly (prelu is not, in torch 2.13): only for those that are.

    Returns:
        The weights with the gradients themselves.

    Raises:
        RuntimeError: If a result has no dimension of samples.
    """
    leaves, spec = tree_flatten((use.args, use.kwargs))
    live = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
    for i in live:
        if use.places[i] in (None, LOST):
            name = getattr(use.function, "__name__", use.function)
            raise RuntimeError(MIXED.format(f"the result of {name}"))
    attends = getattr(use.function, "__name__", "") == "scaled_dot_product_attention"
    if attends and use.argument(4, "dropout_p", 0.0):
        raise RuntimeError(
            "Attention drops out, and that cannot be repeated: call model.eval() first, or set "
            "its dropout to 0."
        )
    if use.whole:
        return _masked(use, leaves, spec, cotangents)
    moving: list[int] = []
    slices: list[Tensor] = []
    for place, leaf in enumerate(leaves):
        at = use.at(leaf)
        if at is not None and at is not RANGE:
            moving.append(place)
            slices.append(at.split(leaf.detach(), use.samples))
    pulled: list[Tensor] = []
    for i in live:
        cotangent, at = cotangents[i], use.places[i]
        assert cotangent is not None
        assert at is not None
        pulled.append(at.split(cotangent, use.samples, 1).transpose(0, 1))  # (m, k, ...)

    def run(weights: list[Tensor], sample: list[Tensor]) -> list[Tensor]:
        new = list(leaves)
        for place, value in zip(moving, sample, strict=True):
            new[place] = value
        for place, leaf in enumerate(leaves):
            for weight, value in zip(use.weights, weights, strict=True):
                if leaf is weight:
                    new[place] = value
        args, kwargs = tree_unflatten(new, spec)
        found = list(tensors([use.function(*args, **kwargs)]))
        for i, piece in zip(live, pulled, strict=True):
            if found[i].shape != piece.shape[2:]:
                raise _DoesNotFit
        return [found[i] for i in live]

    weights = [weight.detach() for weight in use.weights]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            gradients = _vectorised(run, weights, slices, pulled, nested)
    except _DoesNotFit:
        return _masked(use, leaves, spec, cotangents)
    except (RuntimeError, NotImplementedError, ValueError):
        try:
            gradients = _looped(run, weights, slices, pulled)
        except (_DoesNotFit, RuntimeError, ValueError):
            return _masked(use, leaves, spec, cotangents)
    found: list[tuple[Tensor, Piece]] = []
    for weight, gradient in zip(use.weights, gradients, strict=True):
        flat = gradient.transpose(0, 1).flatten(2)  # (k, m, P)
        found.append((weight, Dense(flat[:, :, None, None])))
    return found


def _vectorised(
    run: Any, weights: list[Tensor], slices: list[Tensor], pulled: list[Tensor], nested: bool
) -> list[Tensor]:
    def one(sample: list[Tensor], cotangent: list[Tensor]) -> tuple[Tensor, ...]:
        vjp: Any = torch.func.vjp(lambda *w: run(list(w), sample), *weights)
        _, pull = vjp
        if nested and k > 1:
            return tuple(torch.func.vmap(pull)(cotangent))
        columns = [pull([c[j] for c in cotangent]) for j in range(k)]
        return tuple(torch.stack(column) for column in zip(*columns, strict=True))

    k = pulled[0].shape[1]
    size = max(1, BUDGET // max(1, k * sum(weight.numel() for weight in weights)))
    return list(torch.func.vmap(one, chunk_size=size)(slices, pulled))


def _looped(
    run: Any, weights: list[Tensor], slices: list[Tensor], pulled: list[Tensor]
) -> list[Tensor]:
    m, k = pulled[0].shape[0], pulled[0].shape[1]
    gradients = [weight.new_zeros(m, k, *weight.shape) for weight in weights]
    with torch.enable_grad():
        for i in range(m):
            leaves = [weight.detach().requires_grad_() for weight in weights]
            results = run(leaves, [piece[i] for piece in slices])
            for c in range(k):
                cotangent = [p[i, c] for p in pulled]
                found = torch.autograd.grad(
                    results, leaves, cotangent, retain_graph=True, allow_unused=True
                )
                for gradient, value in zip(gradients, found, strict=True):
                    if value is not None:
                        gradient[i, c] = value
    return gradients


def _masked(
    use: Use, leaves: list[Any], spec: Any, cotangents: Sequence[Tensor | None]
) -> list[tuple[Tensor, Piece]]:
    """Call the function as it was called, and pull back the cotangents of a sample at a time."""
    with torch.enable_grad():
        weights = [weight.detach().requires_grad_() for weight in use.weights]
        by_id = {id(weight): new for weight, new in zip(use.weights, weights, strict=True)}
        new = [
            by_id.get(id(leaf), leaf.detach()) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        args, kwargs = tree_unflatten(new, spec)
        results = list(tensors([use.function(*args, **kwargs)]))
    live = [
        (results[i], c, at)
        for i, (c, at) in enumerate(zip(cotangents, use.places, strict=True))
        if c is not None and at is not None and results[i].requires_grad
    ]
    k = next(len(c) for c in cotangents if c is not None)
    rows = range(use.samples) if use.rows is None else use.rows
    gradients = [weight.new_zeros(k, len(rows), *weight.shape) for weight in weights]
    for row, i in enumerate(rows):
        for j in range(k):
            masked = [torch.zeros_like(result) for result, _, _ in live]
            for mask, (_, c, at) in zip(masked, live, strict=True):
                at.one(mask, use.samples, i).copy_(at.one(c[j], use.samples, i))
            found = torch.autograd.grad(
                [result for result, _, _ in live],
                weights,
                masked,
                retain_graph=True,
                allow_unused=True,
            )
            for gradient, value in zip(gradients, found, strict=True):
                if value is not None:
                    gradient[j, row] = value
    return [
        (weight, Dense(gradient.flatten(2)[:, :, None, None]))
        for weight, gradient in zip(use.weights, gradients, strict=True)
    ]
