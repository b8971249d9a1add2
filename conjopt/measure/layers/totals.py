"""Inner products of gradients, added up over the parameters of a model.

Two ways lead to those of one parameter: through its factors (`pieces.py`), and through the
gradients themselves, its columns of the Jacobian. The second takes more arithmetic, and one product
serves all parameters that go this way. Where there is little arithmetic, calls are what takes time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from conjopt.measure.layers.pieces import SLAB, Outer, Piece, batch_gram, joined, sample_gram, slabs

__all__ = ["FEW", "GramTotal"]

# Multiplications that take about as long as the calls that the factors need.
FEW = 2**17


class GramTotal:
    """The sum of parameters' inner products, within each sample or across the batch.

    A parameter of `P` entries takes `P k^2 m` multiplications through its gradients within the
    samples, and `P (k m)^2` across the batch; up to `FEW` of them, it goes this way.

    Args:
        across: Whether across the batch, `(m, k, m, k)`, or within each sample, `(m, k, k)`.
        samples: `m`.
        cotangents: `k`.
        dtype: Of the result.
        device: Of the result.

    Example:
        >>> from conjopt.measure.layers import Dense
        >>> total = GramTotal(False, 2, 1, torch.float32, "cpu")
        >>> total.add([Dense(torch.tensor([[[[[3.0, 4.0]]], [[[1.0, 0.0]]]]]))])  # (1, 2, 1, 1, 2)
        >>> total.result().flatten()
        tensor([25.,  1.])
    """

    def __init__(
        self,
        across: bool,
        samples: int,
        cotangents: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self.across, self.dtype, self.device = across, dtype, device
        m, k = samples, cotangents
        self._shape = (m, k, m, k) if across else (m, k, k)
        self._pairs = (k * m) ** 2 if across else k * k * m
        self._total: Tensor | None = None
        self._beside: list[Tensor] = []  # (k, m, entries)
        self._entries = 0

    def add(self, pieces: Sequence[Piece]) -> None:
        """Add the inner products of a parameter's gradients.

        Args:
            pieces: What the uses of the parameter give; their sum is the gradient.
        """
        k, m, g, q, p = pieces[0].sizes
        if self._pairs * g * q * p > FEW:
            self._add(batch_gram(pieces) if self.across else sample_gram(pieces))
            return
        self._beside.append(_gradients(joined(pieces)))
        self._entries += k * m * g * q * p
        if self._entries > SLAB:
            self._multiply()

    def result(self) -> Tensor:
        """Return the sum, zeros if nothing was added."""
        self._multiply()
        if self._total is None:
            return torch.zeros(self._shape, dtype=self.dtype, device=self.device)
        return self._total

    def _multiply(self) -> None:
        if not self._beside:
            return
        x = torch.cat(self._beside, 2) if len(self._beside) > 1 else self._beside[0]
        x = x.transpose(0, 1)  # (m, k, entries)
        if self.across:
            x = x.flatten(0, 1)
        self._beside, self._entries = [], 0
        self._add((x @ x.mT).reshape(self._shape))

    def _add(self, products: Tensor) -> None:
        self._total = products if self._total is None else self._total.add_(products)


def _gradients(pieces: Sequence[Piece]) -> Tensor:
    """Return the gradients of a parameter, `(k, m, entries)`."""
    if len(pieces) == 1 and isinstance(piece := pieces[0], Outer) and piece.left.shape[3] == 1:
        return (piece.left.mT * piece.right).flatten(2)
    (slab,) = slabs(pieces)
    return slab.flatten(2)
