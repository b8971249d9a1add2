"""What a report on unseen samples reads of a loader: losses of its samples, and their inputs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

from conjopt.bounds.reading import SHOWN, read_losses
from conjopt.diagnosis.reading import batches, digest, joined, untouched
from conjopt.losses.reading import ClassTargets, PotentialOf
from conjopt.potentials import Logistic

__all__ = [
    "NAME",
    "Part",
    "check_targets",
    "greatest_output",
    "limited",
    "read_part",
    "refuse_shared_dataset",
    "refuse_shared_inputs",
]

NAME = "generalization_report"
ROUNDED = 1e-9  # relative; a mean of float64 losses is above their maximum by less


@dataclasses.dataclass(frozen=True)
class Part:
    """The training or the held-out samples, in float64 on the CPU.

    Rows are the pairs of an output and a target that count: a sample has one, or one for each
    token or pixel.

    Attributes:
        name: "training" or "held-out".
        losses: Mean Fenchel-Young loss of the rows of each sample, `(n,)`.
        criterion: What the criterion returns for all samples at once.
        outputs: Of each row, `(R, k)`.
        points: Targets of each row, `(R, k)`.
        labels: Number of the target of each row, `(R,)`, where there are finitely many, or `None`.
        wrong: Share of the rows of each sample whose predicted label is wrong, `(n,)`, or `None`.
        groups: Equal for rows of equal inputs, at the same place of the sample, `(R,)`.
        weights: Of the rows, 1 over the number of rows of the sample, `(R,)`.
        digests: One for each sample, equal for equal inputs.
        ignored: How many samples the criterion ignores; they are in none of the above but the last.
        dtype: In which the model returned the outputs.
    """

    name: str
    losses: Tensor
    criterion: float
    outputs: Tensor
    points: Tensor
    labels: Tensor | None
    wrong: Tensor | None
    groups: Tensor
    weights: Tensor
    digests: list[bytes]
    ignored: int
    dtype: torch.dtype

    @property
    def single(self) -> bool:
        """Whether each sample has one row."""
        return len(self.outputs) == len(self.losses)


def read_part(model: nn.Module, view: PotentialOf, loader: Any, name: str) -> Part:
    """Run the model in `eval()` mode on all samples of a loader, without a trace.

    Args:
        model: The model.
        view: Of the criterion.
        loader: Of batches `(inputs, targets)`.
        name: "training" or "held-out".

    Returns:
        What was read.

    Raises:
        TypeError: For batches that are no pairs of inputs and targets.
        ValueError: For no samples, shapes that do not fit, outputs or losses that are not finite.
    """
    caller = f"{NAME}, {name} samples"
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    digests: list[bytes] = []
    with untouched(model, loader):
        for _, f, y, of_inputs in batches(model, loader, caller):
            outputs.append(f.detach())
            targets.append(y.to(f.device))
            digests += [digest(of_inputs, i) for i in range(len(f))]
    f, y = joined(outputs, targets, caller)
    _refuse(caller, "outputs", torch.isfinite(f).flatten(1).all(1))
    _check_classes(caller, view, f, y)
    try:
        weights, points = view.weights(f, y).cpu().double(), view.points(f, y).cpu().double()
        scale, offset = float(view.scale(f, y)), float(view.offset(f, y))
    except ValueError as error:
        raise ValueError(f"{caller}: outputs and targets do not fit: {error}") from error
    rows = view.rows(f).cpu().double()
    _check_points(caller, view, points, weights)
    by_row = torch.where(weights > 0, view.potential.loss(points, rows), 0)
    criterion = scale * float(weights @ by_row) + offset
    n, counts = len(f), weights > 0
    if not isinstance(view, ClassTargets):  # one row for each sample, of all its elements
        rows, points = rows.reshape(n, -1), points.reshape(n, -1)
        by_row, counts = view.potential.loss(points, rows), torch.ones(n, dtype=torch.bool)
    places = len(rows) // n
    sample = torch.arange(n).repeat_interleave(places)
    _refuse(caller, "losses", torch.isfinite(by_row).reshape(n, places).all(1))
    number = torch.bincount(sample[counts], minlength=n)
    kept = number > 0
    if not bool(kept.any()):
        raise ValueError(f"{caller}: the criterion ignores all {n} samples: pass some that count")
    weight = (1 / number.clamp(min=1).double())[sample]

    def mean(values: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add_(0, sample, weight * values)[kept]

    hard = None
    if isinstance(view, ClassTargets) and not y.is_floating_point():
        hard = y.reshape(-1).cpu().long()[counts]
    labels, wrong = _labels(view, points[counts], rows[counts], hard)
    errors = None
    if wrong is not None:
        by_row_wrong = torch.zeros(len(rows), dtype=torch.float64)
        by_row_wrong[counts] = wrong.double()
        errors = mean(by_row_wrong).clamp(max=1)  # up to rounding it is
    numbers: dict[bytes, int] = {}
    group = torch.tensor([numbers.setdefault(d, len(numbers)) for d in digests])
    of_row = group[sample] * places + torch.arange(places).repeat(n)
    return Part(
        name=name,
        losses=mean(torch.where(counts, by_row, 0)),
        criterion=criterion,
        outputs=rows[counts],
        points=points[counts],
        labels=labels,
        wrong=errors,
        groups=of_row[counts],
        weights=weight[counts],
        digests=digests,
        ignored=int((~kept).sum()),
        dtype=f.dtype,
    )


def _check_classes(caller: str, view: PotentialOf, f: Tensor, y: Tensor) -> None:
    """Refuse class indices that do not exist; on a GPU, using one ends the process."""
    if not isinstance(view, ClassTargets) or y.is_floating_point() or f.ndim < 2:
        return
    k, ignored = f.shape[1], view.criterion.ignore_index
    bad = y[((y < 0) | (y >= k)) & (y != ignored)]
    if len(bad):
        raise ValueError(
            f"{caller}: {len(bad)} of {y.numel()} targets, such as {int(bad[0])}, are no class "
            f"indices below {k}, the number of outputs: number the classes from 0"
        )


def _check_points(caller: str, view: PotentialOf, points: Tensor, weights: Tensor) -> None:
    outside = (weights > 0) & ~view.potential.contains(points)
    if bool(outside.any()):
        raise ValueError(
            f"{caller}: {int(outside.sum())} of {len(points)} targets are not in the domain of "
            f"{view.potential!r}, expected {view.potential.domain}"
        )


def _labels(
    view: PotentialOf, points: Tensor, rows: Tensor, hard: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Number the targets, and tell which predictions are wrong; `None` if targets are real."""
    whole = bool(((points == 0) | (points == 1)).all())
    if view.potential.on_simplex and (whole or hard is not None):
        labels = points.argmax(1) if hard is None else hard
        return labels, rows.argmax(1) != labels
    if isinstance(view.potential, Logistic) and whole:
        labels = torch.unique(points, dim=0, return_inverse=True)[1]
        return labels, ((rows > 0).double() != points).any(1)
    return None, None


def _refuse(caller: str, what: str, fine: Tensor) -> None:
    if bool(fine.all()):
        return
    bad = (~fine).nonzero().flatten().tolist()
    listed = ", ".join(map(str, bad[:SHOWN])) + (", ..." if len(bad) > SHOWN else "")
    raise ValueError(
        f"{caller}: the {what} of {len(bad)} of {len(fine)} samples, [{listed}], are not finite: "
        "a sample must not be left out for that; check its inputs and the parameters"
    )


def refuse_shared_dataset(train: Any, heldout: Any) -> None:
    """Refuse loaders that read the same entries of the same data set, where that can be seen.

    Args:
        train: Loader of the training samples.
        heldout: Loader of the held-out samples.

    Raises:
        ValueError: With the number of shared entries.
    """
    (of_train, first), (of_heldout, second) = _entries(train), _entries(heldout)
    if of_train is None or of_train is not of_heldout:
        return
    shared = first & second
    if shared:
        raise ValueError(
            f"{NAME}: the loaders share {len(shared)} of the {len(second)} held-out entries of one "
            f"{type(of_train).__name__}, such as {sorted(shared)[:SHOWN]}: a sample that was "
            "trained on certifies nothing; split the data set into disjoint Subsets"
        )


def _entries(loader: Any) -> tuple[Any, set[int]]:
    """Return the data set below all `Subset`s and the entries that are read, if known."""
    dataset: Any = getattr(loader, "dataset", None)
    batch_sampler = getattr(loader, "batch_sampler", None)
    sampler = getattr(batch_sampler, "sampler", getattr(loader, "sampler", None))
    own = batch_sampler is not None and type(batch_sampler) is not BatchSampler
    if own or not hasattr(dataset, "__len__"):
        return None, set()
    if isinstance(sampler, SubsetRandomSampler):
        entries = [int(i) for i in sampler.indices]
    elif isinstance(sampler, SequentialSampler | RandomSampler):
        entries = list(range(len(dataset)))
    else:
        return None, set()
    while isinstance(dataset, Subset):
        entries = [int(dataset.indices[i]) for i in entries]
        dataset = dataset.dataset
    return dataset, {i % len(dataset) for i in entries} if entries else set()


def refuse_shared_inputs(train: Part, heldout: Part) -> None:
    """Refuse held-out samples whose inputs are those of training samples.

    Args:
        train: The training samples.
        heldout: The held-out samples.

    Raises:
        ValueError: With the number of shared samples.
    """
    known = set(train.digests)
    shared = [i for i, found in enumerate(heldout.digests) if found in known]
    if shared:
        listed = ", ".join(map(str, shared[:SHOWN])) + (", ..." if len(shared) > SHOWN else "")
        raise ValueError(
            f"{NAME}: {len(shared)} of {len(heldout.digests)} held-out samples, [{listed}], have "
            "inputs equal to those of training samples: a sample that was trained on certifies "
            "nothing; take them out. Only if inputs are discrete, so that independent draws are "
            "equal now and then, pass equal_inputs=True"
        )


def greatest_output(parts: tuple[Part, Part], most: float) -> float:
    """Refuse outputs beyond what they are said to be clipped to.

    Args:
        parts: Training and held-out samples.
        most: What the outputs are said to be clipped to.

    Returns:
        The same, or the nearest number of the outputs' dtype, if that is greater.

    Raises:
        ValueError: With the number of outputs beyond it.
    """
    limit = max(most, *(float(torch.tensor(most, dtype=part.dtype)) for part in parts))
    for part in parts:
        beyond = part.outputs.abs() > limit
        if bool(beyond.any()):
            raise ValueError(
                f"{NAME}: {int(beyond.any(1).sum())} of {len(beyond)} {part.name} outputs are "
                f"beyond max_output={most}, up to {float(part.outputs.abs().max()):.6g}: let the "
                f"model clip them, for example by a last nn.Hardtanh({-most}, {most})"
            )
    return limit


def check_targets(parts: tuple[Part, Part], least: float, greatest: float) -> None:
    """Refuse targets outside of their stated range."""
    for part in parts:
        beyond = ((part.points < least) | (part.points > greatest)).any(1)
        if bool(beyond.any()):
            raise ValueError(
                f"{NAME}: {int(beyond.sum())} of {len(beyond)} {part.name} targets are outside of "
                f"target_range=({least}, {greatest}): state a range that holds for all samples, "
                "seen or not"
            )


def limited(part: Part, maximum: float) -> Part:
    """Refuse losses above the stated maximum; those above by rounding are put at it.

    Args:
        part: Training or held-out samples.
        maximum: `gamma`, or infinity.

    Returns:
        The samples.

    Raises:
        ValueError: With the number of losses above, and which.
    """
    if math.isinf(maximum):
        return part
    near = part.losses <= maximum * (1 + ROUNDED)
    losses = torch.where(near, part.losses.clamp(max=maximum), part.losses)
    try:
        read_losses(f"{NAME}, {part.name} samples", losses, 0.0, maximum)
    except ValueError as error:
        raise ValueError(
            f"{error}. Nothing is clipped here: clip the model's outputs and pass max_output"
        ) from None
    return dataclasses.replace(part, losses=losses)
