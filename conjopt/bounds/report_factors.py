"""What the gap hangs on, and what the bounds say of it: the numbers of a report (section 4)."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from conjopt.bounds.generalization import generalization_range, uniform_gap_bound
from conjopt.bounds.quantizers import Cells, LogitGrid, TopClass
from conjopt.bounds.report_reading import Part
from conjopt.entropy import (
    attainable_losses,
    coding_rate,
    conditional_entropy,
    kernel_conditional_entropy,
    quantized_feature_entropies,
)
from conjopt.potentials import Potential

__all__ = ["Factor", "ReportedBound", "bounds_of", "factors_of", "maximum_of_clipped"]

MANY = 2000  # samples from which the self-bounding form of Thm 4.3 is the better one
GUARANTEE, DIAGNOSTIC, NONE = "guarantee", "diagnostic", "none"


@dataclasses.dataclass(frozen=True)
class Factor:
    """A number that the generalization gap hangs on, of both sets of samples.

    Attributes:
        group: "information loss", "maximum loss" or "conditional entropy".
        name: What was measured.
        training: Of the training samples; NaN where it is not defined.
        heldout: Of the held-out samples.

    Reference:
        docs/theory.md, Thm 4.1.

    Example:
        >>> from conjopt.bounds import Factor
        >>> Factor("maximum loss", "observed", 1.5, 2.0).heldout
        2.0
    """

    group: str
    name: str
    training: float
    heldout: float


@dataclasses.dataclass(frozen=True)
class ReportedBound:
    """One bound of a report, and whether anything is promised by it.

    Attributes:
        statement: Of docs/theory.md, such as "Thm 4.4".
        of: What is bounded: "loss" or "error rate".
        bounds: The inequality, in symbols.
        value: Its right-hand side; NaN if there is none.
        kind: "guarantee", "diagnostic" or "none".
        why: Why it is that here.

    Reference:
        docs/theory.md, section 4.

    Example:
        >>> from conjopt.bounds import ReportedBound
        >>> ReportedBound("Thm 4.4", "loss", "R <=", 0.2, "guarantee", "held out").value
        0.2
    """

    statement: str
    of: str
    bounds: str
    value: float
    kind: str
    why: str


def maximum_of_clipped(
    potential: Potential, k: int, most: float, target_range: tuple[float, float] | None
) -> float:
    """Return the greatest loss of outputs in `[-most, most]^k`, whatever the target.

    The loss is convex in the output, so it is greatest at a corner of the cube. On the simplex it
    rises with all outputs but that of the class; of other potentials it is a sum over coordinates.

    Args:
        potential: The potential.
        k: Number of outputs.
        most: Greatest magnitude of an output.
        target_range: Least and greatest target, for potentials whose domain has no bounds.

    Returns:
        `gamma`, infinite without a range of targets where one is needed.
    """
    if potential.on_simplex:
        corners = most * (1 - 2 * torch.eye(k, dtype=torch.float64))
        return float(attainable_losses(corners, potential).max())
    ends = torch.tensor([[-most], [most]], dtype=torch.float64)
    least, greatest = (None, None) if target_range is None else target_range
    return k * float(attainable_losses(ends, potential, least=least, greatest=greatest).max())


def factors_of(
    train: Part,
    heldout: Part,
    potential: Potential,
    *,
    step: float,
    samples: int,
    order: Tensor,
    target_range: tuple[float, float] | None,
) -> tuple[Factor, ...]:
    """Measure information loss, maximum loss and conditional entropy on both sets of samples.

    Args:
        train: The training samples.
        heldout: The held-out samples.
        potential: Of the loss.
        step: Side of the cells of outputs.
        samples: Of how many rows kernel estimates are taken.
        order: In which held-out rows are taken for these.
        target_range: Least and greatest target.

    Returns:
        The factors.
    """
    rows = {"training": torch.arange(len(train.outputs)), "held-out": order}
    named: dict[tuple[str, str], list[float]] = {}
    for part in (train, heldout):
        some = rows[part.name]
        if part is train:  # evenly spread
            some = some[torch.linspace(0, len(some) - 1, min(samples, len(some))).long()]
        for key, value in _measured(part, potential, step, some[:samples], target_range).items():
            named.setdefault(key, []).append(value)
    return tuple(Factor(*key, *values) for key, values in named.items())


def _measured(
    part: Part,
    potential: Potential,
    step: float,
    some: Tensor,
    target_range: tuple[float, float] | None,
) -> dict[tuple[str, str], float]:
    y = part.points
    cells = torch.floor(_centred(part.outputs, potential) / step)
    of_inputs = _entropy(y, part.groups, potential, part)
    of_cells = _entropy(y, cells, potential, part)
    kernel = math.nan
    if len(some) > 1:
        kernel = float(
            kernel_conditional_entropy(
                part.outputs[some], part.points[some], potential, form="cross-entropy"
            )
        )
    least, greatest = (None, None) if target_range is None else target_range
    attainable = attainable_losses(part.outputs, potential, least=least, greatest=greatest)
    entropy, filled, rate = math.nan, math.nan, math.nan
    if part.labels is not None:
        found = quantized_feature_entropies(cells, part.labels, quantum=None)
        entropy, filled = float(found.conditional), found.cells / len(cells)
        rate = float(coding_rate(_centred(part.outputs, potential), part.labels))
    lost, most, spread = "information loss", "maximum loss", "conditional entropy"
    return {
        (lost, "Ent(Y|X), equal inputs"): of_inputs,
        (lost, f"Ent(Y|Q), outputs in cells of side {step:g}"): of_cells,
        (lost, "I = Ent(Y|Q) - Ent(Y|X)"): of_cells - of_inputs,
        (lost, "Ent(Y|f), estimated by a kernel"): kernel,
        (most, "observed"): float(part.losses.max()),
        (most, "attainable with these outputs"): float(attainable.max()),
        (spread, f"H(Q|Y), outputs in cells of side {step:g}"): entropy,
        (spread, "pairs of cell and class, per sample"): filled,
        (spread, "coding rate of the outputs given the class"): rate,
    }


def _entropy(y: Tensor, groups: Tensor, potential: Potential, part: Part) -> float:
    return float(conditional_entropy(y, groups, potential, weights=part.weights))


def _centred(outputs: Tensor, potential: Potential) -> Tensor:
    """Take away what changes no loss, as `LogitGrid` does."""
    return outputs - outputs.mean(1, keepdim=True) if potential.on_simplex else outputs


def bounds_of(
    train: Part,
    heldout: Part,
    potential: Potential,
    *,
    certified: str,
    certificate: float,
    maximum: float,
    confidence: float,
    step: float,
    method: str,
    reason: str,
) -> tuple[ReportedBound, ...]:
    """Compute all bounds, and say of each what it promises here.

    Args:
        train: The training samples.
        heldout: The held-out samples.
        potential: Of the loss.
        certified: "loss", "error rate" or "nothing".
        certificate: On the risk of what is certified, or NaN.
        maximum: Greatest loss that was stated, or infinity.
        confidence: `1 - d`.
        step: Side of the cells of outputs.
        method: Of the certificate.
        reason: Why the loss is not certified, or empty.

    Returns:
        The bounds, those of Thm 4.4 first.
    """
    found = []
    if reason:
        found.append(ReportedBound("Thm 4.4", "loss", "R <=", math.nan, NONE, reason))
    if certified != "nothing":
        measured = train.losses if certified == "loss" else train.wrong
        assert measured is not None
        why = (
            f"{method}, {100 * confidence:.4g} % confidence, if these {len(heldout.losses)} "
            "independent samples were used for nothing else, no tuning, no early stopping"
        )
        gap = certificate - float(measured.mean())
        found += [
            ReportedBound("Thm 4.4", certified, "R <=", certificate, GUARANTEE, why),
            ReportedBound(
                "Thm 4.4", certified, "R - Rhat <=", gap, GUARANTEE, "the same, less Rhat"
            ),
        ]
    found += _range(train, potential, maximum)
    kinds = ["loss"] if math.isfinite(maximum) else []
    if train.labels is not None and heldout.labels is not None:
        kinds.append("error rate")
    for of in kinds:
        for part in (train, heldout):
            found.append(_uniform(part, potential, of, maximum, confidence=confidence, step=step))
    return tuple(found)


def _range(train: Part, potential: Potential, maximum: float) -> list[ReportedBound]:
    floor = _entropy(train.points, train.outputs, potential, train)
    at, of = "Thm 4.1", "loss"
    lower = -float(train.losses.max())
    certain = "for every model and sample, with certainty, by the greatest training loss alone"
    found = [ReportedBound(at, of, "R - Rhat >=", lower, GUARANTEE, certain)]
    if math.isinf(maximum):
        why = "the loss has no finite maximum that is known beforehand"
        return [*found, ReportedBound(at, of, "R - Rhat <=", math.inf, NONE, why)]
    ends = generalization_range(train.losses, max_loss=maximum, sample_entropy=floor)
    return [
        *found,
        ReportedBound(
            at,
            of,
            "R - Rhat (a priori) <=",
            ends.upper,
            GUARANTEE,
            f"certain, if no loss exceeds {maximum:.4g}: that less Ent(Y|Z) = {floor:.4g}",
        ),
        ReportedBound(
            at,
            of,
            "R - Rhat (measured) <=",
            ends.measured_upper,
            GUARANTEE,
            f"certain, if no loss exceeds {maximum:.4g}: that less Rhat",
        ),
    ]


def _uniform(
    part: Part,
    potential: Potential,
    of: str,
    maximum: float,
    *,
    confidence: float,
    step: float,
) -> ReportedBound:
    n = len(part.losses)
    symbols = f"R - Rhat {'(training)' if part.name == 'training' else '(held out)'} <="
    why = ""
    if part.labels is None:
        why = "targets are real numbers, each with a cell of its own"
    elif not part.single:
        why = "rows of one sample are not independent, and cells of whole samples too many"
    if why:
        return ReportedBound("Thm 4.3", of, symbols, math.nan, NONE, why)
    assert part.labels is not None
    if of == "loss":
        cells, most = LogitGrid(step, potential)(part.outputs, part.labels), maximum
    elif potential.on_simplex:
        cells, most = TopClass()(part.outputs, part.labels), 1.0
    else:
        pairs = torch.cat([part.outputs > 0, part.labels[:, None]], 1)
        cells, most = Cells(torch.unique(pairs, dim=0, return_inverse=True)[1], 0.0), 1.0
    value = uniform_gap_bound(
        cells,
        max_loss=most,
        confidence=confidence,
        form="self-bounding" if n >= MANY else "empirical",
    )
    where = f"{cells.count} cells, {n} samples" + (
        f", which is too few: no more than the maximum {most:.4g}" if value >= most else ""
    )
    if part.name == "training":
        return ReportedBound(
            "Thm 4.3",
            of,
            symbols,
            value,
            DIAGNOSTIC,
            f"{where}; the encoder was trained on them, so nothing is promised",
        )
    return ReportedBound(
        "Thm 4.3",
        of,
        symbols,
        value,
        GUARANTEE,
        f"{where}; for all heads on these outputs at once, under the conditions of Thm 4.4",
    )
