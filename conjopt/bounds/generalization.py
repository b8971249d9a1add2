"""How far the risk can be from the mean loss of a sample (docs/theory.md, Thm 4.1 to 4.3)."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.bounds.quantizers import Cells
from conjopt.bounds.reading import Array, check_range, miss_probability, read_losses
from conjopt.bounds.tables import absolute_sum, deviation, read_cells, read_law

__all__ = [
    "GeneralizationRange",
    "generalization_range",
    "total_variation_gap",
    "uniform_gap_bound",
]


@dataclasses.dataclass(frozen=True)
class GeneralizationRange:
    """Where `R - Rhat` lies, made by `generalization_range` (Thm 4.1).

    Attributes:
        lower: `Ent_q(Y|Z) - max_i l_i`.
        upper: `gamma - Ent_qhat(Y|Z)`.
        measured_lower: `Ent_q(Y|Z) - Rhat`, sharper, once the losses are known.
        measured_upper: `gamma - Rhat`, sharper, once the losses are known.

    Reference:
        docs/theory.md, Thm 4.1.

    Example:
        >>> from conjopt.bounds import GeneralizationRange
        >>> GeneralizationRange(-1.0, 2.0, -0.5, 1.5).upper
        2.0
    """

    lower: float
    upper: float
    measured_lower: float
    measured_upper: float


def generalization_range(
    losses: Tensor | ArrayLike,
    *,
    max_loss: float,
    sample_entropy: float = 0.0,
    entropy: float = 0.0,
) -> GeneralizationRange:
    """Bound the gap `R - Rhat` by maximum losses and conditional entropies (Thm 4.1).

    *Certain, and wide*: nothing random is left, and the model may be trained on the sample. Each
    conditional entropy is `Ent(Y|X) + I(T)`, so information loss, maximum loss and conditional
    entropy narrow the range. It says what can be promised before the losses are seen.

    Args:
        losses: Of the sample, `(n,)`, Fenchel-Young losses of a model whose output is a function
            of `Z`.
        max_loss: `gamma`, which no loss on the support of the law can exceed.
        sample_entropy: `Ent_qhat(Y|Z)`, of the sample (`conjopt.entropy.conditional_entropy`), or
            anything below it.
        entropy: `Ent_q(Y|Z)`, of the law, or anything below it, such as 0 if it is unknown.

    Returns:
        Both ends, before and after the losses are known.

    Raises:
        ValueError: For losses out of `[0, max_loss]`; negative entropies; a mean loss below
            `sample_entropy` by more than rounding, which Thm 1.3 excludes for functions of `Z`.

    Reference:
        docs/theory.md, Thm 4.1.

    Example:
        >>> from conjopt.bounds import generalization_range
        >>> from conjopt.entropy import conditional_entropy
        >>> from conjopt.potentials import Softmax
        >>> y, z = [0, 1, 1, 1], [0, 0, 1, 1]
        >>> entropy = float(conditional_entropy(y, z, Softmax()))
        >>> found = generalization_range(
        ...     [0.7, 0.7, 0.1, 0.1], max_loss=2.0, sample_entropy=entropy
        ... )
        >>> round(found.lower, 4), round(found.upper, 4), round(found.measured_upper, 4)
        (-0.7, 1.6534, 1.6)
    """
    name = "generalization_range"
    values = read_losses(name, losses, 0.0, max_loss)
    for what, value in (("sample_entropy", sample_entropy), ("entropy", entropy)):
        if not 0 <= value <= max_loss:
            raise ValueError(
                f"{name}: {what}={value}, expected a number from 0 to max_loss={max_loss}: an "
                "entropy is nonnegative, and at most the risk of any model"
            )
    risk = float(values.mean())
    # Losses may have been computed in float32.
    if risk < sample_entropy - 1e-5 * (1 + sample_entropy):
        raise ValueError(
            f"{name}: the mean loss {risk:.6g} is below sample_entropy={sample_entropy:.6g}, which "
            "no function of Z attains (Thm 1.3): take losses at one theta in eval() mode, as "
            "Fenchel-Young losses, and groups of equal Z"
        )
    return GeneralizationRange(
        entropy - float(values.max()), max_loss - sample_entropy, entropy - risk, max_loss - risk
    )


def total_variation_gap(
    probabilities: Tensor | ArrayLike,
    frequencies: Tensor | ArrayLike,
    *,
    max_loss: float,
    min_loss: float = 0.0,
) -> float:
    """Return the greatest `|R - Rhat|` over all losses that are tables over cells (Thm 4.2).

    *An equality*: some table with entries `min_loss` and `max_loss` attains it.

    Args:
        probabilities: `q`, of the cells, `(C,)`, with sum 1.
        frequencies: `qhat`, of the same cells in the sample, `(C,)`, with sum 1.
        max_loss: `gamma`, the greatest entry of a table.
        min_loss: `g0`, the least entry.

    Returns:
        `(gamma - g0) / 2 sum_c |q_c - qhat_c|`.

    Raises:
        ValueError: For numbers that are no two laws of the same cells, or an empty range.

    Reference:
        docs/theory.md, Thm 4.2.

    Example:
        >>> from conjopt.bounds import total_variation_gap
        >>> total_variation_gap([0.5, 0.25, 0.25], [0.75, 0.25, 0.0], max_loss=2.0)
        0.5
    """
    name = "total_variation_gap"
    check_range(name, min_loss, max_loss)
    q = read_law(f"{name}: probabilities", probabilities)
    qhat = read_law(f"{name}: frequencies", frequencies)
    if len(q) != len(qhat):
        raise ValueError(
            f"{name}: {len(q)} probabilities and {len(qhat)} frequencies, expected one of each for "
            "every cell; cells that the sample does not hold have frequency 0"
        )
    return (max_loss - min_loss) / 2 * float(np.abs(q - qhat).sum())


def uniform_gap_bound(
    cells: Cells | Tensor | ArrayLike,
    *,
    max_loss: float,
    min_loss: float = 0.0,
    confidence: float = 0.95,
    form: Literal["empirical", "self-bounding", "population"] = "empirical",
    samples: int | None = None,
) -> float:
    """Bound `R - Rhat` at once for all losses that are tables over cells (Thm 4.3).

    *A guarantee* if encoder, cells, form and range were fixed before the sample was drawn; then it
    holds for every head, trained on the sample or not. *For an encoder trained on the same sample
    it is a diagnostic*: nothing is promised, and `heldout_certificate` is what certifies. It says
    something only for `n` well above the number of cells.

    - `"empirical"` needs the sample alone: the Rademacher complexity of all tables, and bounded
      differences.
    - `"self-bounding"` is another way to the same, better from a few thousand samples on unless
      the cells are nearly as many as the samples. Choose beforehand.
    - `"population"` takes the probabilities of the cells, and bounds `|R - Rhat|`. The mean
      deviation of each cell is computed exactly; it is at most `sqrt(q (1 - q) / n)`.

    Args:
        cells: The cell of `(Z, Y)` of each sample, whole numbers `(n,)`, or what a quantizer
            returns, whose Lipschitz term is added. For `"population"`, probabilities `(C,)`.
        max_loss: `gamma`, which no loss can exceed.
        min_loss: `g0`, which no loss can fall below.
        confidence: `1 - d`.
        form: Which of the bounds.
        samples: `n`, for `"population"`.

    Returns:
        The bound, at most `max_loss - min_loss`.

    Raises:
        ValueError: For cells that are not whole numbers (or no law, for `"population"`), an empty
            range, a confidence not between 0 and 1, an unknown form, `samples` missing for
            `"population"` or given for others.
        TypeError: For cells that are real numbers: quantize them first.

    Reference:
        docs/theory.md, Thm 4.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import uniform_gap_bound
        >>> cells = torch.arange(10_000) % 10
        >>> round(uniform_gap_bound(cells, max_loss=1.0), 4)
        0.0524
        >>> round(uniform_gap_bound(cells, max_loss=1.0, form="self-bounding"), 4)
        0.0435
        >>> law = torch.full((10,), 0.1, dtype=torch.float64)
        >>> round(uniform_gap_bound(law, max_loss=1.0, form="population", samples=10_000), 4)
        0.0242
    """
    name = "uniform_gap_bound"
    check_range(name, min_loss, max_loss)
    d, width = miss_probability(name, confidence), max_loss - min_loss
    forms = ("empirical", "self-bounding", "population")
    if form not in forms:
        raise ValueError(f"{name}: form={form!r}, expected one of {', '.join(map(repr, forms))}")
    if (form == "population") == (samples is None):
        raise ValueError(
            f"{name}: samples={samples} with form={form!r}: pass the number of samples with "
            "'population', whose cells are probabilities, and only there"
        )
    slack = 0.0
    if isinstance(cells, Cells):
        slack, cells = cells.slack, cells.labels
    if samples is not None:
        if samples < 1:
            raise ValueError(f"{name}: samples={samples}, expected at least 1")
        share = _population(read_law(f"{name}: cells", cells), samples, d)
    elif form == "empirical":
        share = _empirical(read_cells(name, cells), d)
    else:
        share = _self_bounding(read_cells(name, cells), d)
    return min(width * share + slack, width)


def _population(q: Array, n: int, d: float) -> float:
    """`[sum_c E|q_c - qhat_c| + sqrt(2 log(1/d) / n)] / 2`."""
    return (float(deviation(q, n).sum()) + math.sqrt(2 * math.log(1 / d) / n)) / 2


def _empirical(counts: Array, d: float) -> float:
    """`Zs / n + 2 sqrt(log(2/d) / (2 n))`, `Zs = sum_c a(n_c)`."""
    n = float(counts.sum())
    return float(absolute_sum(counts).sum()) / n + 2 * math.sqrt(math.log(2 / d) / (2 * n))


def _self_bounding(counts: Array, d: float) -> float:
    """`Zs / n + sqrt(w / (2 n)) + (w + sqrt(w^2 + 2 w Zs)) / n`, `w = log(2/d)`."""
    n, w = float(counts.sum()), math.log(2 / d)
    Zs = float(absolute_sum(counts).sum())
    return Zs / n + math.sqrt(w / (2 * n)) + (w + math.sqrt(w**2 + 2 * w * Zs)) / n
