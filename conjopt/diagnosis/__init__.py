"""Which of the five causes of Thm 2.3 holds a loss up, measured on real data."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from typing import Any

import torch
from torch import nn

from conjopt.diagnosis.causes import Finding, judge, step_of
from conjopt.diagnosis.numbers import measure, risks
from conjopt.diagnosis.reading import read, untouched
from conjopt.losses import potential_of

__all__ = ["Diagnosis", "Finding", "diagnose"]


@dataclasses.dataclass(frozen=True)
class Diagnosis:
    """What holds a loss up, made by `diagnose`; printed, it is a table of all five causes.

    Attributes:
        cause: "data floor", "collapsed structure", "conflicting samples", "gradient energy",
            "batch noise", "none" (the loss is down), or "cannot tell".
        evidence: The number behind it, or why it cannot be told.
        remedy: What to do.
        measurements: All numbers by name, in units of the mean Fenchel-Young loss.
        findings: The five causes, the dominant one first.

    Reference:
        docs/theory.md, Thm 2.3.

    Example:
        >>> from conjopt import Diagnosis
        >>> print(Diagnosis("none", "loss 0.001", "Nothing to do.", {}, ()))
        none: loss 0.001
        Nothing to do.
    """

    cause: str
    evidence: str
    remedy: str
    measurements: dict[str, float]
    findings: tuple[Finding, ...]

    def __str__(self) -> str:
        lines = textwrap.wrap(f"{self.cause}: {self.evidence}", 100)
        lines += textwrap.wrap(self.remedy, 100)
        for finding in self.findings:
            share = "  ?" if math.isnan(finding.share) else f"{finding.share:4.0%}"
            lines.append(f"{finding.cause:<20} {share:>4}  {finding.state:<18} {finding.number}")
        return "\n".join(lines)


def diagnose(
    model: nn.Module,
    loss: nn.Module,
    loader: Any,
    *,
    samples: int = 256,
    optimizer: torch.optim.Optimizer | None = None,
    batch_size: int | None = None,
    limit: int = 10_000,
    seed: int = 0,
) -> Diagnosis:
    """Say which of the five causes holds the loss of a model up, and what to do (Thm 2.3).

    The loss is split into the data floor, the excess that plain descent cannot take away (its
    residuals lie where the structure matrix has no eigenvalues to speak of, for a collapsed
    structure or for conflicting samples), and the excess in reach, which is unfinished descent or
    sustained by the noise of the batches. The greatest part names the cause.

    The model is evaluated in `eval()` mode: batch normalisation with its running statistics, no
    dropout. Afterwards parameters, buffers, modes, `.grad` and random number generators, the
    loader's among them, are what they were. The loader is read once, from its start.

    Args:
        model: Trained, stuck or fresh, by any optimizer. Returns one tensor with samples along
            dimension 0, and computes no sample's output from another sample.
        loss: A criterion that `conjopt.losses.potential_of` recognises.
        loader: A `DataLoader` or another iterable of batches `(inputs, targets)`; inputs are a
            tensor, or a tuple or a dict of the model's arguments. Under augmentation that is drawn
            anew, what was drawn counts: the floor of the data is not seen then.
        samples: How many samples gradients and structure are measured on, drawn from those seen.
            Conflicts are found between these alone. Time and memory grow with them.
        optimizer: The one that trains the model. Without it, or if it is not `torch.optim.SGD`,
            batch noise is told apart from unfinished descent only where no plain step of at most
            `1/hi(GGN)` would be held up by the noise.
        batch_size: Of the training; by default that of the loader.
        limit: How many samples loss and floor are taken from at most, from the start.
        seed: Of what is drawn.

    Returns:
        Cause, evidence, remedy and all measurements.

    Raises:
        TypeError: For a criterion that is not recognised, among them those without a per-sample
            loss, and for batches that are no pairs.
        ValueError: For a loader without samples, a model without trained parameters, numbers out
            of range, and shapes that do not belong together.
        RuntimeError: If per-sample gradients do not exist or cannot be seen.

    Reference:
        docs/theory.md, Thm 2.3, with Thm 1.3, 2.4 and 3.2.

    Example:
        >>> import torch, conjopt
        >>> x, y = torch.tensor([[0.0], [0.0], [1.0], [1.0]]), torch.tensor([0, 1, 0, 1])
        >>> model = torch.nn.Linear(1, 2)
        >>> for parameter in model.parameters():
        ...     _ = torch.nn.init.zeros_(parameter)
        >>> found = conjopt.diagnose(model, torch.nn.CrossEntropyLoss(), [(x, y)])
        >>> found.cause, found.evidence
        ('data floor', 'Ent(Y|X) = 0.693 of a loss of 0.693')
    """
    for name, value in (("samples", samples), ("limit", limit), ("batch_size", batch_size)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"diagnose: {name}={value!r}, expected a whole number of at least 1.")
    view, step = potential_of(loss), step_of(optimizer)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"diagnose: {type(model).__name__} has no parameter that requires gradients; nothing "
            "is trained that could be held up."
        )
    with untouched(model, loader):
        seen = read(model, loader, samples=samples, limit=limit, seed=seed)
        unfit = ~torch.isfinite(seen.outputs).flatten(1).all(1)
        if bool(unfit.any()):
            return _cannot(
                f"the outputs of {int(unfit.sum())} of {len(unfit)} samples are not finite"
            )
        if not bool((view.weights(seen.outputs, seen.targets) > 0).any()):
            return _cannot("the loss ignores every sample seen")
        numbers, means = risks(model, view, seen)
        if not (math.isfinite(numbers.risk) and math.isfinite(numbers.constant)):
            return _cannot(f"the loss is {numbers.risk}", numbers)
        if numbers.risk > 0:
            numbers = measure(model, view, seen, numbers, means, seed)
    if batch_size is None:
        given = getattr(loader, "batch_size", None)
        batch_size = given if isinstance(given, int) else seen.batch_size
    if getattr(loss, "reduction", "mean") == "sum":
        numbers = dataclasses.replace(numbers, scale=numbers.scale * batch_size / numbers.probed)
    cause, findings = judge(numbers, step, batch_size, seen.complete)
    first = findings[0]
    measured = dataclasses.asdict(numbers)
    if cause == "none":
        evidence = f"loss {numbers.risk:.3g}, {numbers.constant:.3g} for the best constant"
        remedy = "The loss is down; nothing holds it up."
    elif cause == "cannot tell":
        evidence, remedy = first.reason, "Do what this asks for, and diagnose again."
    else:
        evidence, remedy = first.number, first.remedy
    return Diagnosis(cause, evidence, remedy, measured, tuple(findings))


def _cannot(reason: str, numbers: Any = None) -> Diagnosis:
    remedy = (
        "Look for the first step at which it happened: lower the learning rate, clip gradients, "
        "and check inputs and targets."
    )
    measured = {} if numbers is None else dataclasses.asdict(numbers)
    return Diagnosis("cannot tell", reason, remedy, measured, ())
