"""Cells of (output, target) for Thm 4.3, and what the loss may vary within one."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.grouping import group_rows
from conjopt.entropy.reading import Sample, as_tensor
from conjopt.potentials import Logistic, Potential, Softmax

__all__ = ["Cells", "LogitGrid", "TopClass"]


@dataclasses.dataclass(frozen=True)
class Cells:
    """The cell of each sample, made by a quantizer.

    Attributes:
        labels: Number of the cell of each sample, `(n,)`, on the CPU. The numbers depend on the
            sample, the partition does not.
        slack: The most that the loss varies within a cell: `Lip eps`, with `eps` the diameter of
            the cells; 0 if the loss is a table over cells.

    Reference:
        docs/theory.md, Thm 4.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import Cells
        >>> Cells(torch.tensor([0, 1, 0]), slack=0.5).count
        2
    """

    labels: Tensor
    slack: float

    @property
    def count(self) -> int:
        """How many cells the sample occupies."""
        return len(np.unique(self.labels.numpy()))


class LogitGrid:
    """Cells of equal targets and outputs in the same cube of a grid (Thm 4.3).

    For potentials on the simplex, outputs are centred over classes first, which does not change
    the loss. It is a guarantee's partition only if the step was chosen before the sample was seen.

    Two outputs of a cell differ by less than `step` in each coordinate. The residual `e` is the
    derivative of the loss, so the loss varies by at most `sup <e, f - f'>`:

    - on the simplex `||e|| <= sqrt 2` and the diameter is `step sqrt k`; but also, as `sum e = 0`
      and `sum |e| <= 2`, the loss varies by at most the range of `f - f'`, which is below
      `2 step`. The lesser counts: `2 step` for `k >= 2`.
    - for logistic losses, `sum |e| <= k`: at most `k step`.
    - for others by `lipschitz`, with respect to the Euclidean norm: `lipschitz step sqrt k`.

    Args:
        step: The side of a cube, in units of the outputs.
        potential: Of the loss; cross-entropy by default.
        lipschitz: A Lipschitz constant of the loss in the outputs. Needed where the potential has
            none: squared and Poisson losses, whose residuals are not bounded.

    Raises:
        ValueError: For a step that is not positive, or a potential without a Lipschitz constant.

    Reference:
        docs/theory.md, Thm 4.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import LogitGrid
        >>> logits = torch.tensor([[2.2, 0.0], [3.3, 0.9], [0.0, 2.2], [2.2, 0.0]])
        >>> cells = LogitGrid(0.5)(logits, torch.tensor([0, 0, 1, 1]))
        >>> cells.count, bool(cells.labels[0] == cells.labels[1])
        (3, True)
        >>> cells.slack
        1.0
    """

    def __init__(
        self, step: float, potential: Potential | None = None, lipschitz: float | None = None
    ) -> None:
        potential = Softmax() if potential is None else potential
        if not 0 < step < math.inf:
            raise ValueError(f"LogitGrid: step={step}, expected a positive number")
        if lipschitz is None and not (potential.on_simplex or isinstance(potential, Logistic)):
            raise ValueError(
                f"LogitGrid: {potential!r} has no Lipschitz constant, as its residuals are not "
                "bounded: clip outputs and targets, and pass lipschitz= that holds there"
            )
        if lipschitz is not None and not 0 <= lipschitz < math.inf:
            raise ValueError(f"LogitGrid: lipschitz={lipschitz}, expected a finite number >= 0")
        self.step, self.potential, self.lipschitz = float(step), potential, lipschitz

    def slack(self, k: int) -> float:
        """Return the most that the loss varies within a cell, for `k` outputs."""
        if self.lipschitz is not None:
            return self.lipschitz * self.step * math.sqrt(k)
        if self.potential.on_simplex:
            return 2 * self.step if k > 1 else 0.0
        return k * self.step

    def __call__(self, logits: Tensor | ArrayLike, targets: Tensor | ArrayLike) -> Cells:
        """Return the cell of each sample.

        Args:
            logits: Outputs, `(n, k)`.
            targets: Class numbers `(n,)`, or points of the potential's domain `(n, k)`, of which
                only equal ones share a cell.

        Returns:
            The cells, with the Lipschitz term.

        Raises:
            ValueError: For outputs and targets that do not belong together, or are not finite.
        """
        f = _outputs("LogitGrid", logits)
        if self.potential.on_simplex:
            f = f - f.mean(1, keepdim=True)
        cubes = torch.floor(f / self.step)
        if bool((cubes.abs() >= 2**53).any()):
            raise ValueError(
                f"LogitGrid: step={self.step} is below the rounding error of logits of up to "
                f"{float(f.abs().max()):.3g}: pass a greater step"
            )
        return Cells(_joint(cubes, targets), self.slack(f.shape[1]))


class TopClass:
    """Cells of equal targets and equal predicted classes, over which 0/1 losses are a table.

    There are `k^2` of them, whatever the outputs. With a loss of 0 for a right class and 1 for a
    wrong one, nothing is lost by quantizing; cross-entropy is no table over these cells.

    Reference:
        docs/theory.md, Thm 4.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import TopClass
        >>> logits = torch.tensor([[2.0, 0.0], [3.0, 1.0], [0.0, 2.0]])
        >>> TopClass()(logits, torch.tensor([0, 0, 0])).labels
        tensor([0, 0, 1])
    """

    def __call__(self, logits: Tensor | ArrayLike, targets: Tensor | ArrayLike) -> Cells:
        """Return the cell of each sample.

        Args:
            logits: Outputs, `(n, k)`.
            targets: Class numbers, `(n,)`.

        Returns:
            The cells, with slack 0.

        Raises:
            ValueError: For outputs and targets that do not belong together, or are not finite.
        """
        top = _outputs("TopClass", logits).argmax(1, keepdim=True)
        return Cells(_joint(top.double(), targets), 0.0)


def _outputs(name: str, logits: Tensor | ArrayLike) -> Tensor:
    f = as_tensor(f"{name}: logits", logits)
    if f.ndim != 2 or f.shape[1] == 0:
        raise ValueError(f"{name}: logits of shape {tuple(f.shape)}, expected (n, k)")
    bad = ~torch.isfinite(f).all(1)
    if bool(bad.any()):
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(f)} rows of logits are not finite, the first is "
            f"row {int(bad.nonzero()[0])}: no cell holds them"
        )
    return f.double()


def _joint(rows: Tensor, targets: Tensor | ArrayLike) -> Tensor:
    """Number equal pairs of a row and a target."""
    sample = Sample(None, targets=targets, outputs=rows)
    of_target, _ = group_rows(sample, "targets")
    sample.arrays["outputs"] = torch.cat([rows, of_target.double()[:, None]], 1)
    return group_rows(sample, "outputs")[0]
