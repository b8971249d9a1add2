"""Per-sample gradients of one parameter in factors, and the inner products between them.

For `k` cotangents of the outputs (one, for the gradient of a loss) and `m` samples, a use of a
parameter gives `k m` gradients. They stay in the form in which a layer makes them, and only their
inner products are formed: never a `(k, m, P)` tensor of a whole model. A parameter's coordinates
are arranged as `g` matrices with `q` rows and `p` columns.
"""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "Dense",
    "Lookup",
    "Outer",
    "Piece",
    "batch_gram",
    "cast",
    "joined",
    "lengths",
    "norms_and_sum",
    "products",
    "sample_gram",
    "slabs",
    "squared_norms",
    "sum_of",
]

BUDGET = 2**25  # elements of an intermediate result
SLAB = 2**18  # elements of one that is better small, to stay in a cache
PART = 2**20  # the same, where there are several calls for each


class Piece(abc.ABC):
    """The gradients that one use of a parameter gives, `k m` of them.

    Example:
        >>> from conjopt.measure.layers import Dense, Piece
        >>> piece: Piece = Dense(torch.ones(1, 2, 1, 1, 3))  # one cotangent, two samples
        >>> piece.sizes
        (1, 2, 1, 1, 3)
    """

    @property
    @abc.abstractmethod
    def sizes(self) -> tuple[int, int, int, int, int]:
        """`k, m, g, q, p`."""

    @abc.abstractmethod
    def slab(self, start: int, stop: int) -> Tensor:
        """Return a range of the matrices' rows, `(k, m, g, stop - start, p)`."""

    @abc.abstractmethod
    def select(self, rows: Tensor) -> Piece:
        """Return the gradients of some samples, given by their numbers."""


@dataclasses.dataclass(frozen=True)
class Dense(Piece):
    """The gradients themselves.

    Attributes:
        gradients: `(k, m, g, q, p)`, or with several dimensions in the place of the last.

    Example:
        >>> from conjopt.measure.layers import Dense
        >>> Dense(torch.ones(1, 2, 1, 4, 3)).slab(0, 2).shape
        torch.Size([1, 2, 1, 2, 3])
    """

    gradients: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """`k, m, g, q, p`."""
        k, m, g, q, *p = self.gradients.shape
        return k, m, g, q, math.prod(p)

    def slab(self, start: int, stop: int) -> Tensor:
        """Return a range of the matrices' rows."""
        return self.gradients[:, :, :, start:stop].flatten(4)

    def select(self, rows: Tensor) -> Dense:
        """Return the gradients of some samples."""
        return Dense(self.gradients[:, rows])


@dataclasses.dataclass(frozen=True)
class Outer(Piece):
    """Sums of outer products, `sum_t left[t] right[t]^T` for each group.

    Attributes:
        left: `(k or 1, m, g, t, q)`.
        right: `(k or 1, m, g, t, p)`.

    Example:
        >>> from conjopt.measure.layers import Outer
        >>> left, right = torch.ones(1, 2, 1, 5, 4), torch.ones(1, 2, 1, 5, 3)
        >>> Outer(left, right).slab(0, 4)[0, 0, 0]  # 5 places, summed
        tensor([[5., 5., 5.],
                [5., 5., 5.],
                [5., 5., 5.],
                [5., 5., 5.]])
    """

    left: Tensor
    right: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """`k, m, g, q, p`."""
        k = max(self.left.shape[0], self.right.shape[0])
        return k, self.left.shape[1], self.left.shape[2], self.left.shape[-1], self.right.shape[-1]

    def slab(self, start: int, stop: int) -> Tensor:
        """Return a range of the matrices' rows."""
        left, k = self.left[..., start:stop], len(self.left)
        if k > 1 == len(self.right):  # one product for all cotangents
            rows = left.permute(1, 2, 0, 4, 3).flatten(2, 3)  # (m, g, k q, t)
            return (rows @ self.right[0]).unflatten(2, (k, -1)).permute(2, 0, 1, 3, 4)
        return left.mT @ self.right

    def select(self, rows: Tensor) -> Outer:
        """Return the gradients of some samples."""
        return Outer(self.left[:, rows], self.right[:, rows])


@dataclasses.dataclass(frozen=True)
class Lookup(Piece):
    """Gradients of a table whose rows are looked up: `sum_t onehot(index[t]) right[t]^T`.

    Attributes:
        index: `(m, t)`, rows of the table.
        right: `(k, m, t, p)`.
        size: Number of rows of the table.

    Example:
        >>> from conjopt.measure.layers import Lookup
        >>> piece = Lookup(torch.tensor([[2, 0, 2]]), torch.ones(1, 1, 3, 2), 4)
        >>> piece.slab(0, 4)[0, 0, 0]
        tensor([[1., 1.],
                [0., 0.],
                [2., 2.],
                [0., 0.]])
    """

    index: Tensor
    right: Tensor
    size: int

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """`k, m, g, q, p`."""
        return self.right.shape[0], self.right.shape[1], 1, self.size, self.right.shape[-1]

    def slab(self, start: int, stop: int) -> Tensor:
        """Return a range of the rows of the table."""
        k, m, _, p = self.right.shape
        place = self.index - start
        place = torch.where((place >= 0) & (place < stop - start), place, stop - start)
        found = self.right.new_zeros(k, m, stop - start + 1, p)
        found.scatter_add_(2, place.unsqueeze(-1).expand(k, -1, -1, p), self.right)
        return found[:, :, :-1].unsqueeze(2)

    def select(self, rows: Tensor) -> Lookup:
        """Return the gradients of some samples."""
        return Lookup(self.index[rows], self.right[:, rows], self.size)


def lengths(tensor: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """Return Euclidean norms along dimensions, in float32 or wider: squares overflow in float16.

    Args:
        tensor: Of any floating-point type.
        dim: The dimensions.
    """
    return torch.linalg.vector_norm(tensor, dim=dim, dtype=_wide(tensor))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def squared_norms(pieces: Sequence[Piece]) -> Tensor:
    """Return the squared norms of a parameter's gradients for one cotangent, `(m,)`.

    Args:
        pieces: What the uses of the parameter give, with `k = 1`; their sum is the gradient.
    """
    merged = joined(pieces)
    piece = merged[0]
    if len(merged) == 1 and isinstance(piece, Dense):
        each = piece.gradients[0]  # not flattened, which would copy what a convolution gives
        return lengths(each, tuple(range(1, each.ndim))).square()
    if len(merged) != 1 or not isinstance(piece, Outer):
        return sample_gram(list(map(cast, merged)))[:, 0, 0]
    left, right = piece.left[0], piece.right[0]  # (m, g, t, q), (m, g, t, p)
    t, q, p = left.shape[2], left.shape[3], right.shape[3]
    if t == 1:
        by_group = [lengths(side.flatten(0, 2), 1) for side in (left, right)]
        squares = (by_group[0] * by_group[1]).square()
        return squares if left.shape[1] == 1 else squares.unflatten(0, left.shape[:2]).sum(1)
    if t * (q + p) <= 1.2 * q * p:  # about where it pays on a CPU
        left, right = left.to(_wide(left)), right.to(_wide(right))
        if left.shape[1] == 1:
            left, right = left.squeeze(1), right.squeeze(1)
        products = (left @ left.mT) * (right @ right.mT)
        return products.sum(tuple(range(1, products.ndim)))
    norms = [lengths(slab[0].flatten(1), 1) for slab in slabs(merged)]
    return norms[0].square() if len(norms) == 1 else torch.stack(norms).square().sum(0)


def cast(piece: Piece, dtype: torch.dtype | None = None) -> Piece:
    """Return a piece in another floating-point type.

    Args:
        piece: Gradients.
        dtype: The type; float32 or wider if `None`.
    """
    fields: Any = piece
    changed = {
        field.name: value.to(_wide(value) if dtype is None else dtype)
        for field in dataclasses.fields(fields)
        if isinstance(value := getattr(piece, field.name), Tensor) and value.is_floating_point()
    }
    same = all(value is getattr(piece, name) for name, value in changed.items())
    return piece if same else dataclasses.replace(fields, **changed)


def sum_of(piece: Piece) -> Tensor:
    """Return the sum over samples of gradients for one cotangent, `(g, q, p)`.

    Args:
        piece: With `k = 1`.
    """
    if isinstance(piece, Outer):
        left, right = (
            side[0].transpose(0, 1).flatten(1, 2) for side in (piece.left, piece.right)
        )  # (g, m t, coordinates)
        return left.mT @ right
    if isinstance(piece, Dense):
        return piece.gradients[0].sum(0).flatten(2)
    return piece.slab(0, piece.sizes[3])[0].sum(0)


def norms_and_sum(piece: Piece) -> tuple[Tensor, Tensor]:
    """Return `squared_norms` and `sum_of`, at less than the cost of both.

    Args:
        piece: With `k = 1`.
    """
    _, m, g, q, p = piece.sizes
    if not isinstance(piece, Outer) or m == 0:
        return squared_norms([piece]), sum_of(piece)
    left, right = piece.left[0], piece.right[0]  # (m, g, t, q), (m, g, t, p)
    t = left.shape[2]
    if t == 1 or t * t * (q + p) < 16 * q * p:  # about where it pays on a CPU
        return squared_norms([piece]), sum_of(piece)
    few = math.ceil(m / math.ceil(m * g * q * p / SLAB))
    norms, total = [], left.new_zeros(g, q, p)
    for start in range(0, m, few):
        slab = left[start : start + few].mT @ right[start : start + few]
        norms.append(lengths(slab.flatten(1), 1))
        total += slab.sum(0)
    return torch.cat(norms).square(), total


def sample_gram(pieces: Sequence[Piece]) -> Tensor:
    """Return the inner products of a parameter's gradients within each sample, `(m, k, k)`.

    Args:
        pieces: What the uses of the parameter give; their sum is the gradient.
    """
    merged = joined(pieces)
    if len(merged) == 1 and isinstance(merged[0], Outer):
        return _outer_gram(merged[0])
    if len(merged) == 1 and isinstance(merged[0], Lookup):
        return _lookup_gram(merged[0])
    if {type(piece) for piece in merged} == {Outer, Lookup} and merged[0].sizes[0] == 1:
        table, dense = sorted(merged, key=lambda piece: isinstance(piece, Outer))
        assert isinstance(table, Lookup)
        assert isinstance(dense, Outer)
        return _lookup_gram(table) + _outer_gram(dense) + 2 * _cross(table, dense)
    total: Tensor | int = 0
    for slab in slabs(merged):
        x = slab.flatten(2).transpose(0, 1)  # (m, k, coordinates)
        total = total + products(x)
    assert isinstance(total, Tensor)
    return total


def batch_gram(pieces: Sequence[Piece]) -> Tensor:
    """Return the inner products of all of a parameter's gradients, `(m, k, m, k)`.

    Args:
        pieces: What the uses of the parameter give; their sum is the gradient.
    """
    merged = joined(pieces)
    k, m, *_ = merged[0].sizes
    if len(merged) == 1 and isinstance(merged[0], Outer) and merged[0].left.shape[3] == 1:
        left, right = (
            side.squeeze(3).permute(2, 1, 0, 3).flatten(1, 2)  # (g, m k or m, coordinates)
            for side in (merged[0].left, merged[0].right)
        )
        grams = []
        for side, cotangents in (
            (left, merged[0].left.shape[0]),
            (right, merged[0].right.shape[0]),
        ):
            gram = (side @ side.mT).reshape(-1, m, cotangents, m, cotangents)
            grams.append(gram)
        return (grams[0] * grams[1]).sum(0)
    total: Tensor | int = 0
    for slab in slabs(merged):
        x = slab.flatten(2).transpose(0, 1).flatten(0, 1)  # (m k, coordinates)
        total = total + x @ x.T
    assert isinstance(total, Tensor)
    return total.reshape(m, k, m, k)


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Join pieces of one kind: sums of outer products by their places, dense ones by addition.

    Args:
        pieces: What the uses of a parameter give.
    """
    if len(pieces) == 1:
        return list(pieces)
    outers = [piece for piece in pieces if isinstance(piece, Outer)]
    tables = [piece for piece in pieces if isinstance(piece, Lookup)]
    dense = [piece for piece in pieces if isinstance(piece, Dense)]
    merged: list[Piece] = []
    if len(outers) > 1:
        sides = []
        for parts in ([piece.left for piece in outers], [piece.right for piece in outers]):
            k = max(part.shape[0] for part in parts)
            sides.append(torch.cat([part.expand(k, -1, -1, -1, -1) for part in parts], 3))
        outers = [Outer(*sides)]
    if len(tables) > 1:
        index = torch.cat([piece.index for piece in tables], 1)
        tables = [Lookup(index, torch.cat([piece.right for piece in tables], 2), tables[0].size)]
    if len(dense) > 1:
        shape = dense[0].gradients.shape
        dense = [Dense(torch.stack([p.gradients.reshape(shape) for p in dense]).sum(0))]
    merged += outers
    merged += tables
    merged += dense
    return merged


def slabs(pieces: Sequence[Piece]) -> Iterator[Tensor]:
    """Yield the gradients in ranges of their coordinates, `(k, m, g, rows, p)`, within budget.

    Args:
        pieces: Of different kinds; their sum is the gradient.
    """
    k, m, g, q, p = pieces[0].sizes
    if all(isinstance(piece, Dense) for piece in pieces):
        yield pieces[0].slab(0, q)
        return
    for piece in pieces:  # dense ones may arrange their coordinates in another way
        if isinstance(piece, Dense) and piece.sizes[2:] != (g, q, p):
            pieces = [
                Dense(other.gradients.reshape(k, m, g, q, p)) if other is piece else other
                for other in pieces
            ]
    rows = max(1, BUDGET // max(1, k * m * g * p))
    for start in range(0, q, rows):
        stop = min(start + rows, q)
        total = pieces[0].slab(start, stop)
        for piece in pieces[1:]:
            total = total + piece.slab(start, stop)
        yield total


def through_places(k: int, t: int, q: int, p: int) -> bool:
    """Whether `k` sums of `t` outer products are better multiplied place by place.

    Args:
        k: Number of cotangents.
        t: Number of places.
        q: Size of the side that differs between cotangents.
        p: Size of the other side.
    """
    return t * t * (p + k * q) + k * k * t * q < k * q * p * (t + k)


def _outer_gram(piece: Outer) -> Tensor:
    """Inner products within samples; through places or coordinates, whichever is cheaper."""
    left, right = piece.left, piece.right
    if left.shape[3] == 1:
        grams = []
        for side in (left, right):
            x = side.squeeze(3).permute(1, 2, 0, 3)  # (m, g, k or 1, coordinates)
            grams.append(products(x))
        return (grams[0] * grams[1]).sum(1)
    if left.shape[0] < right.shape[0]:
        left, right = right, left
    (k, m, g, t, q), p = left.shape, right.shape[4]
    places = len(right) == 1 and through_places(k, t, q, p)
    if places and (g > 1 or left.stride(3) > 1):
        moved = (right[0] @ right[0].mT @ left).transpose(0, 1).flatten(2)  # (m, k, g t q)
        return moved @ left.transpose(0, 1).flatten(2).mT
    size = m * g * max(k * q * t, t * p, 0 if places else k * q * p)
    number = math.ceil(size / PART) if left.device.type == "cpu" else 1
    few = math.ceil(m / max(1, min(m, number)))
    parts = [slice(i, i + few) for i in range(0, m, few)]
    grams = [_gram_by_rows(left[:, part], right[:, part], places) for part in parts]
    return grams[0] if len(grams) == 1 else torch.cat(grams)


def _gram_by_rows(left: Tensor, right: Tensor, places: bool) -> Tensor:
    """Inner products within samples, with one product for all cotangents if possible."""
    (k, m, g, _, q), p = left.shape, right.shape[4]
    if g > 1 or len(right) > 1 or k * m * q * p > BUDGET:
        total: Tensor | int = 0
        for slab in slabs([Outer(left, right)]):
            total = total + products(slab.flatten(2).transpose(0, 1))
        assert isinstance(total, Tensor)
        return total
    seen = right[0, :, 0]  # (m, t, p)
    rows = left[:, :, 0].permute(1, 0, 3, 2).flatten(1, 2)  # (m, k q, t)
    if places:
        moved = rows @ (seen @ seen.mT)
        return products(moved.reshape(m, k, -1), rows.reshape(m, k, -1))
    if -p % 8 <= p // 3 and p <= k * q and seen.device.type == "cpu":  # kernels go by eights
        seen = F.pad(seen.mT, (0, 0, 0, -p % 8)).mT
    return products((rows @ seen).reshape(m, k, -1))


def products(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Return `x y^T`, `(m, ..., k, k)`; without `y`, of `x` with itself.

    Kernels of CPUs for float32 are slow at a few rows less than a multiple of eight: there a part
    of the samples after the other is filled up. For one row they have none.

    Args:
        x: `(m, ..., k, entries)`.
        y: Of the same shape.
    """
    k, few = x.shape[-2], -x.shape[-2] % 8
    if k == 1:
        if y is None:
            return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        return (x * y).sum(-1, keepdim=True)
    slow = k > 12 and 0 < few < 4 and x.dtype == torch.float32 and x.device.type == "cpu"
    if not slow or x.numel() <= SLAB:
        return x @ (x if y is None else y).mT
    found = []
    for i in range(0, len(x), size := max(1, SLAB // x[0].numel())):
        part = F.pad(x[i : i + size], (0, 0, 0, few))
        other = part if y is None else F.pad(y[i : i + size], (0, 0, 0, few))
        found.append((part @ other.mT)[..., :k, :k])
    return torch.cat(found)


def _lookup_gram(piece: Lookup) -> Tensor:
    """Inner products within samples: places count together where they look up the same row."""
    same = (piece.index.unsqueeze(2) == piece.index.unsqueeze(1)).to(piece.right.dtype)
    moved = (same @ piece.right).transpose(0, 1).flatten(2)
    return products(moved, piece.right.transpose(0, 1).flatten(2))


def _cross(table: Lookup, dense: Outer) -> Tensor:
    """Inner products, for one cotangent, of a table's gradients with a matrix' of that shape."""
    left, right = dense.left[0, :, 0], dense.right[0, :, 0]  # (m, s, q), (m, s, p)
    picked = left.gather(2, table.index.unsqueeze(1).expand(-1, left.shape[1], -1))  # (m, s, t)
    return (picked * (right @ table.right[0].mT)).sum((1, 2)).reshape(-1, 1, 1)
