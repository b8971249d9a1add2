"""Groups of equal rows, found by their hashes and compared word by word."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from conjopt.entropy.laws import blocks
from conjopt.entropy.reading import Sample

Array = np.ndarray[Any, Any]


def group_rows(sample: Sample, name: str, quantum: float | None = None) -> tuple[Tensor, Tensor]:
    """Number equal rows: the group of each row, `(n,)`, and the first row of each group."""
    sample.check_finite(name)
    rows = sample.arrays[name]
    rows = rows.unsqueeze(1) if rows.ndim == 1 else rows
    n, width = len(rows), rows[0].numel()

    def words(index: slice | Tensor) -> Array:
        return _words(rows[index].flatten(1), quantum)

    hashes = [_hash_rows(words(slice(lo, hi))) for lo, hi in blocks(0, n, width)]
    group, first = _number(np.concatenate(hashes))
    # Rows of equal hash are a group only if they are equal.
    repeated = np.flatnonzero(first[group] != np.arange(n))
    torn = [group[:0]]
    for lo, hi in blocks(0, len(repeated), width):
        part = repeated[lo:hi]
        same = words(torch.from_numpy(part)) == words(torch.from_numpy(first[group[part]]))
        torn.append(group[part[~same.all(1)]])
    collided = np.unique(np.concatenate(torn))
    if len(collided):
        members = np.flatnonzero(np.isin(group, collided))
        exact = words(torch.from_numpy(members))
        keys = exact.view(np.dtype((np.void, exact.shape[1] * exact.itemsize)))
        group[members] = len(first) + _number(keys.ravel())[0]
        group, first = _number(group)
    return torch.from_numpy(group), torch.from_numpy(first)


def _number(keys: Array) -> tuple[Array, Array]:
    """Number equal keys: the number of each, and where each number occurs first."""
    _, first, number = np.unique(keys, return_index=True, return_inverse=True)
    return number, first


def _words(rows: Tensor, quantum: float | None) -> Array:
    """Return rows as 64-bit words that are equal if and only if the rows are, `(r, w)`."""
    if quantum is not None:
        rows = (rows.double() / quantum).round()
        if not bool(torch.isfinite(rows).all()):
            raise ValueError(f"quantum={quantum}: inputs over it overflow; pass a greater one.")
    if rows.is_floating_point():
        rows = rows + 0.0  # -0.0 becomes 0.0
    raw = rows.contiguous().view(torch.uint8).numpy()
    size = raw.shape[1]
    if size and size % 8 == 0:
        return raw.view(np.uint64)
    words = np.zeros((len(raw), size // 8 + 1), dtype=np.uint64)
    words.view(np.uint8)[:, :size] = raw
    return words


def _hash_rows(words: Array) -> Array:
    """Return 64-bit hashes of rows, `(r, w) -> (r,)`: SplitMix64 of each word, summed."""
    place = np.arange(1, words.shape[1] + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = words + place
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z.sum(1, dtype=np.uint64)
