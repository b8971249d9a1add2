"""The floor that the data set under a risk, and the excess over it (Thm 1.3)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.grouping import group_rows
from conjopt.entropy.laws import blocks
from conjopt.entropy.reading import Sample, one_for_each_group, read_outputs, read_targets
from conjopt.potentials import Potential


def data_floor(
    inputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike,
    potential: Potential,
    *,
    weights: Tensor | ArrayLike | None = None,
    label_smoothing: float = 0.0,
    num_classes: int | None = None,
    quantum: float | None = None,
) -> Tensor:
    """Return the least training risk `Ent(Y|X)` of any function of the inputs.

    It is positive where equal inputs have different targets, and 0 otherwise. No model whose
    output depends on `x` alone has a smaller mean loss over these data at one fixed `theta`. It
    does not bind a loss averaged while `theta` moves (the running loss of an epoch), nor batch
    normalization in training mode, dropout, or augmentation that is drawn anew for each copy;
    evaluate in `eval()` mode. Augmentation that is drawn once and kept is part of the inputs.

    The unit is the mean Fenchel-Young loss of a sample, that of `conjopt.losses`. For hard targets
    it is torch's cross-entropy. For soft or smoothed targets torch's cross-entropy is greater by
    the mean entropy of the targets (`offset` of `conjopt.losses.potential_of`), so is its floor.
    Multiply by `2/k` for `MSELoss`, and by `1/k` for `BCEWithLogitsLoss` at 0/1 targets. For class
    weights `w` give `weights=w[targets]`, and ignored rows weight 0.
    `ConjSGD(data_floor=)` takes the criterion's units.

    Args:
        inputs: Inputs `(n, ...)`, finite, of any real dtype. Equal rows are found exactly, in time
            that grows as `n log n` and without a second copy of the inputs.
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        potential: The potential `Phi`.
        weights: Weights of the samples, `(n,)`, see `generalized_entropy`.
        label_smoothing: Share `s` in `[0, 1]` of the uniform distribution mixed into the targets,
            `(1 - s) y + s / k`; for potentials on the simplex.
        num_classes: Number `k` of classes that class indices are drawn from, needed for
            smoothing; None for the greatest index plus 1.
        quantum: A positive step: inputs are rounded to its multiples first, so that near
            duplicates meet. The result is then the floor of functions of the rounded input.

    Returns:
        Shape `()`, float64 on the CPU.

    Raises:
        TypeError: As `generalized_entropy`.
        ValueError: As `generalized_entropy`, and for inputs that are not finite, a class index
            that is not below `num_classes`, a smoothing outside of `[0, 1]` or for a potential that
            is not on the simplex, and a quantum that is not positive or is too small.

    Reference:
        docs/theory.md, Thm 1.3.

    Example:
        >>> import torch
        >>> from conjopt.entropy import data_floor
        >>> from conjopt.potentials import Softmax
        >>> inputs = torch.tensor([[0.0, 1.0], [0.0, 1.0], [2.0, 3.0], [2.0, 3.1]])
        >>> data_floor(inputs, torch.tensor([0, 1, 1, 0]), Softmax())
        tensor(0.3466, dtype=torch.float64)
        >>> data_floor(inputs, torch.tensor([0, 1, 1, 0]), Softmax(), quantum=0.5)
        tensor(0.6931, dtype=torch.float64)
    """
    if quantum is not None and not (math.isfinite(quantum) and quantum > 0):
        raise ValueError(f"quantum={quantum}: expected a positive number, or None.")
    sample = Sample(weights, targets=targets, inputs=inputs)
    smoothed = read_targets(sample, potential, ("num_classes", num_classes), label_smoothing)
    return smoothed.entropy(group_rows(sample, "inputs", quantum)[0])


@dataclass(frozen=True)
class RiskDecomposition:
    """A risk as the floor that the data set and the excess that the outputs add to it (Thm 1.3).

    Attributes:
        risk: `E l(Y, f)`, the mean loss, `()`.
        floor: `Ent(Y|Z)`, the least risk of outputs that are a function of the group, `()`.
        excess: `E l(ybar_Z, f(Z)) >= 0`, the loss against the mean target of each group, `()`.
            It is 0 if the link of the output is that mean everywhere; `risk = floor + excess`.

    Reference:
        docs/theory.md, Thm 1.3.

    Example:
        >>> import torch
        >>> from conjopt.entropy import risk_decomposition
        >>> from conjopt.potentials import Squared
        >>> outputs, targets = torch.tensor([3.0, 3.0]), torch.tensor([1.0, 3.0])
        >>> parts = risk_decomposition(outputs, targets, torch.tensor([0, 0]), Squared())
        >>> print(f"{parts.risk:.1f} = {parts.floor:.1f} + {parts.excess:.1f}")
        1.0 = 0.5 + 0.5
    """

    risk: Tensor
    floor: Tensor
    excess: Tensor


def risk_decomposition(
    outputs: Tensor | ArrayLike,
    targets: Tensor | ArrayLike,
    groups: Tensor | ArrayLike,
    potential: Potential,
    *,
    weights: Tensor | ArrayLike | None = None,
    label_smoothing: float = 0.0,
) -> RiskDecomposition:
    """Split the risk of outputs `f(Z)` into the floor of the data and what the outputs add.

    Outputs must be a function of the group: those of one fixed `theta` in `eval()` mode, with
    equal inputs in one group. Within a group they may differ by rounding in their dtype (64 times
    its `eps`, relative to the greatest output), as they do between batches of different sizes; the
    first of a group then stands for all of it.

    Args:
        outputs: Outputs `f` (logits, natural parameters), floating, `(n, k)`, where `-inf` masks a
            class; potentials that are
            not on the simplex also take `(n,)` and more dimensions, as for targets.
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        groups: Values of `Z`, labels `(n,)` or rows `(n, ...)`, see `conditional_entropy`.
        potential: The potential `Phi`.
        weights: Weights of the samples, `(n,)`, see `generalized_entropy`.
        label_smoothing: Mixed into the targets, see `data_floor`.

    Returns:
        The risk and its two parts, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `generalized_entropy`, and for outputs that are not floating.
        ValueError: As `conditional_entropy`, for outputs that are not finite or whose shape does
            not fit the targets, and for outputs that differ within a group.

    Reference:
        docs/theory.md, Thm 1.3.

    Example:
        >>> import torch
        >>> from conjopt.entropy import risk_decomposition
        >>> from conjopt.potentials import Softmax
        >>> outputs = torch.tensor([[0.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
        >>> parts = risk_decomposition(outputs, [0, 1, 0], [7, 7, 9], Softmax())
        >>> print(f"{parts.risk:.4f} = {parts.floor:.4f} + {parts.excess:.4f}")
        0.5044 = 0.4621 + 0.0423
    """
    sample = Sample(weights, targets=targets, groups=groups, outputs=outputs)
    count = ("outputs", read_outputs(sample, potential).shape[1])
    points = read_targets(sample, potential, count, label_smoothing)
    group, first = group_rows(sample, "groups")
    f = one_for_each_group(sample, group, first)
    law = points.law(group)

    def risk(rows: Callable[[int, int], Tensor], of_row: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for lo, hi in blocks(0, len(weight), points.k):
            losses = potential.loss(rows(lo, hi), f(of_row[lo:hi]))
            total += losses.clamp(min=0) @ weight[lo:hi]
        return total / points.weight.sum()

    return RiskDecomposition(
        risk=risk(law.rows, law.group, law.weight),
        floor=law.entropy() / points.weight.sum(),
        excess=risk(law.means, torch.arange(len(law.total)), law.total),
    )
