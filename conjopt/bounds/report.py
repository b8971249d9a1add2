"""Gap, certificate, the three factors and all bounds of a trained model in one report."""

from __future__ import annotations

import dataclasses
import math
import os
import textwrap
from pathlib import Path
from typing import Any

import torch
from torch import nn

from conjopt.bounds.heldout import FIXED, Method, heldout_certificate
from conjopt.bounds.reading import miss_probability
from conjopt.bounds.report_factors import (
    Factor,
    ReportedBound,
    bounds_of,
    factors_of,
    maximum_of_clipped,
)
from conjopt.bounds.report_reading import (
    NAME,
    Part,
    check_targets,
    greatest_output,
    limited,
    read_part,
    refuse_shared_dataset,
    refuse_shared_inputs,
)
from conjopt.losses import potential_of

__all__ = ["GeneralizationReport", "generalization_report"]

CLASSES_ONLY = "targets are no labels, so there is no error rate to certify in its place"


@dataclasses.dataclass(frozen=True)
class GeneralizationReport:
    """What training and held-out samples say of a model, made by `generalization_report`.

    Printed, it is a table. Losses are Fenchel-Young losses of a sample.

    Attributes:
        samples: Number of training and of held-out samples that count.
        confidence: `1 - d` of the certificate, and of Thm 4.3.
        training_risk: Mean loss `Rhat` of the training samples.
        heldout_risk: Mean loss of the held-out samples.
        training_criterion: What the criterion returns for all training samples at once, in its own
            units, with its weights and label smoothing.
        heldout_criterion: The same for the held-out samples.
        training_error: Share of wrong labels, NaN for targets that are no labels.
        heldout_error: The same for the held-out samples.
        certified: What the certificate is of: "loss", "error rate" or "nothing".
        certificate: Upper bound on its risk, NaN for "nothing".
        maximum: `gamma`, the greatest loss that was stated or follows from `max_output`; infinite
            if there is none.
        reason: Why the loss is not certified, or empty.
        factors: Information loss, maximum loss and conditional entropy.
        bounds: All bounds, each a guarantee here, a diagnostic, or none.

    Reference:
        docs/theory.md, section 4.

    Example:
        >>> from conjopt.bounds import GeneralizationReport
        >>> print(GeneralizationReport(
        ...     samples=(8, 4), confidence=0.95, training_risk=0.2, heldout_risk=0.3,
        ...     training_criterion=0.2, heldout_criterion=0.3, training_error=0.0,
        ...     heldout_error=0.25, certified="nothing", certificate=float("nan"),
        ...     maximum=float("inf"), reason="no maximum", factors=(), bounds=(),
        ... ))
        8 training and 4 held-out samples
                                                     training   held out        gap
        loss                                           0.2000     0.3000     0.1000
        error rate                                     0.0000     0.2500     0.2500
        nothing is certified: no maximum
    """

    samples: tuple[int, int]
    confidence: float
    training_risk: float
    heldout_risk: float
    training_criterion: float
    heldout_criterion: float
    training_error: float
    heldout_error: float
    certified: str
    certificate: float
    maximum: float
    reason: str
    factors: tuple[Factor, ...]
    bounds: tuple[ReportedBound, ...]

    @property
    def gap(self) -> float:
        """Held-out risk less training risk."""
        return self.heldout_risk - self.training_risk

    def to_dict(self) -> dict[str, Any]:
        """Return all numbers, and the gap, as plain lists, strings and floats.

        Returns:
            A dict, with factors and bounds as lists of dicts.
        """
        found = dataclasses.asdict(self)
        found["samples"] = list(self.samples)
        found["factors"], found["bounds"] = list(found["factors"]), list(found["bounds"])
        return found | {"gap": self.gap}

    def __str__(self) -> str:
        first, second = self.samples
        lines = [
            f"{first:,} training and {second:,} held-out samples",
            f"{'':44} {'training':>10} {'held out':>10} {'gap':>10}",
        ]

        def row(name: str, training: float, heldout: float) -> str:
            return f"{name:44} {_number(training)} {_number(heldout)}"

        for name, training, heldout in self._measured():
            lines.append(f"{row(name, training, heldout)} {_number(heldout - training)}")
        if self.certified == "nothing":
            lines += textwrap.wrap(f"nothing is certified: {self.reason}", 100)
        else:
            lines.append(
                f"with {100 * self.confidence:.4g} % confidence the {self.certified} of new "
                f"samples is at most {self.certificate:.4f}"
            )
        group = ""
        for factor in self.factors:
            if factor.group != group:
                group = factor.group
                lines.append(group)
            lines.append(row(f"  {factor.name}", factor.training, factor.heldout))
        if self.bounds:
            lines.append("bounds")
        for bound in self.bounds:
            head = (
                f"  {bound.statement}  {bound.of:10}  {bound.bounds:22} {_number(bound.value)}"
                f"  {bound.kind}"
            )
            lines += [head, *(f"      {line}" for line in textwrap.wrap(bound.why, 88))]
        return "\n".join(line.rstrip() for line in lines)

    def _measured(self) -> list[tuple[str, float, float]]:
        rows = [("loss", self.training_risk, self.heldout_risk)]
        own = (self.training_criterion, self.heldout_criterion)
        if not all(map(_close, own, rows[0][1:])):
            rows.append(("criterion, in its own units", *own))
        if not math.isnan(self.training_error):
            rows.append(("error rate", self.training_error, self.heldout_error))
        return rows

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draw risks and certificate, the bounds on the gap, and the factors.

        Args:
            path: Where to write the picture; its suffix chooses the format.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: If matplotlib is missing; it names the extra to install.
            OSError: If the file cannot be written.
        """
        from conjopt.bounds.report_plot import draw

        figure = draw(self)
        if path is not None:
            from conjopt.report.plots import save

            save(figure, Path(path))
        return figure


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-9)


def _number(value: float) -> str:
    return f"{'-':>10}" if math.isnan(value) else f"{value:10.4f}"


def generalization_report(
    model: nn.Module,
    loss: nn.Module,
    train: Any,
    heldout: Any,
    *,
    confidence: float = 0.95,
    max_loss: float | None = None,
    max_output: float | None = None,
    target_range: tuple[float, float] | None = None,
    method: Method = "betting",
    step: float = 0.5,
    samples: int = 2048,
    equal_inputs: bool = False,
    seed: int = 0,
) -> GeneralizationReport:
    """Measure the generalization gap, certify the risk, and say what the gap hangs on (section 4).

    The certificate (Thm 4.4) is *a guarantee* if the held-out samples are independent draws that
    were used for nothing else: no tuning, no early stopping, no choice between models. It is of

    - the loss, if its maximum `gamma` is known beforehand: `max_loss`, or the greatest loss of a
      model that clips its outputs to `[-max_output, max_output]`. Nothing is clipped here, and a
      sample that contradicts either is refused. The maximum of a sample is never taken for it;
    - the error rate, by `method="kl"`, if no maximum is known and targets are labels, since a
      cross-entropy of unlimited outputs may have any mean, whatever finitely many samples say;
    - nothing otherwise.

    Thm 4.3 over cells of outputs is *a diagnostic* for the training samples, on which the encoder
    was trained, and a guarantee for all heads at once on the held-out ones. Thm 4.1 is certain, and
    wide. Each bound holds by itself at the stated confidence, not all of them together.

    Losses are Fenchel-Young losses of a sample, without class or element weights: cross-entropy in
    torch's units, *half* the squared distance for `MSELoss`, the mean over the tokens or pixels
    that count for class targets of more than one dimension. What the criterion ignores, or gives
    the weight 0, does not count. The value of the criterion itself is reported beside them.

    The model is evaluated in `eval()` mode. Afterwards parameters, buffers, modes, `.grad` and
    random number generators, the loaders' among them, are what they were. Each loader is read once
    to its end, outputs are kept in float64 on the CPU.

    Args:
        model: Trained. Returns one tensor with samples along dimension 0.
        loss: A criterion that `conjopt.losses.potential_of` recognises.
        train: A `DataLoader` or another iterable of batches `(inputs, targets)`: what the model was
            trained on.
        heldout: Another one, of samples that were used for nothing else.
        confidence: `1 - d`.
        max_loss: `gamma`, which no loss can exceed, known beforehand.
        max_output: What the model clips its outputs to, for example by `nn.Hardtanh` at its end.
            `gamma` is then derived, unless `max_loss` is given as well.
        target_range: Least and greatest target, for squared and Poisson losses.
        method: Of the certificate of a loss, see `heldout_certificate`. Choose it beforehand.
        step: Side of the cells of outputs in Thm 4.3 and in quantized entropies. Choose it
            beforehand.
        samples: Of how many rows kernel estimates are taken.
        equal_inputs: Whether held-out inputs may be equal to training inputs, as independent draws
            of discrete inputs are.
        seed: Of the one order in which held-out losses are bet on, whatever that of the loader.

    Returns:
        The report; print it, `.plot()` it, or take `.to_dict()`.

    Raises:
        TypeError: For a criterion that is not recognised, and for batches that are no pairs.
        ValueError: For held-out samples that are training samples (the same entries of one data
            set, or equal inputs), losses above the maximum, outputs above theirs, outputs or
            losses that are not finite, a confidence not between 0 and 1, loaders without samples,
            and outputs and targets that do not fit.

    Reference:
        docs/theory.md, Thm 4.1, 4.3 and 4.4.

    Example:
        >>> import torch
        >>> from conjopt.bounds import generalization_report
        >>> generator = torch.Generator().manual_seed(0)
        >>> x = torch.randn(600, 2, generator=generator)
        >>> y = (x[:, 0] > 0).long()
        >>> linear = torch.nn.Linear(2, 2)
        >>> _ = torch.nn.init.eye_(linear.weight), torch.nn.init.zeros_(linear.bias)
        >>> model = torch.nn.Sequential(linear, torch.nn.Hardtanh(-2, 2))
        >>> report = generalization_report(
        ...     model, torch.nn.CrossEntropyLoss(), [(x[:200], y[:200])], [(x[200:], y[200:])],
        ...     max_output=2.0,
        ... )
        >>> report.certified, round(report.maximum, 4)  # log(1 + exp(4))
        ('loss', 4.0181)
        >>> report.heldout_risk < report.certificate < report.heldout_risk + 0.15
        True
    """
    miss_probability(NAME, confidence)
    if method not in FIXED:
        raise ValueError(
            f"{NAME}: method={method!r}, expected one of {', '.join(map(repr, FIXED))}"
        )
    for what, value in (("max_loss", max_loss), ("max_output", max_output), ("step", step)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{NAME}: {what}={value}, expected a positive number")
    view = potential_of(loss)
    potential = view.potential
    if target_range is not None:
        least, greatest = target_range
        if potential.on_simplex or not -math.inf < least < greatest < math.inf:
            raise ValueError(
                f"{NAME}: target_range={target_range} with {potential!r} losses, expected two "
                "finite numbers, the least first, and none for class losses"
            )
    if samples < 2:
        raise ValueError(f"{NAME}: samples={samples}, expected at least 2")
    refuse_shared_dataset(train, heldout)
    if train is heldout:
        raise ValueError(f"{NAME}: train and heldout are one object: pass samples held out")
    parts = (read_part(model, view, train, "training"), read_part(model, view, heldout, "held-out"))
    first, second = parts
    if not equal_inputs:
        refuse_shared_inputs(first, second)
    if target_range is not None:
        check_targets(parts, *target_range)
    maximum = math.inf if max_loss is None else float(max_loss)
    if max_output is not None:
        limit = greatest_output(parts, max_output)
        derived = maximum_of_clipped(potential, first.outputs.shape[1], limit, target_range)
        maximum = derived if max_loss is None else maximum
    first, second = (limited(part, maximum) for part in parts)
    reason = ""
    if math.isinf(maximum):
        reason = (
            f"outputs are not limited, so {potential!r} losses have no maximum known beforehand, "
            "and no finite sample bounds their mean: pass max_loss, or clip the model's outputs "
            "and pass max_output"
        )
        if max_output is not None:
            reason = f"{potential!r} losses have no maximum without a target_range: pass it"
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(second.losses), generator=generator)
    certified, certificate, by = "nothing", math.nan, method
    if not reason:
        certified, values, limit = "loss", second.losses, maximum
    elif second.wrong is not None and first.wrong is not None:
        certified, values, limit, by = "error rate", second.wrong, 1.0, "kl"
    else:
        reason = f"{reason}; {CLASSES_ONLY}"
    if certified != "nothing":
        certificate = heldout_certificate(
            values[order], max_loss=limit, confidence=confidence, method=by
        )
    rows = order if second.single else torch.randperm(len(second.outputs), generator=generator)
    return GeneralizationReport(
        samples=(len(first.losses), len(second.losses)),
        confidence=confidence,
        training_risk=float(first.losses.mean()),
        heldout_risk=float(second.losses.mean()),
        training_criterion=first.criterion,
        heldout_criterion=second.criterion,
        training_error=_error(first),
        heldout_error=_error(second),
        certified=certified,
        certificate=certificate,
        maximum=maximum,
        reason=reason,
        factors=factors_of(
            first,
            second,
            potential,
            step=step,
            samples=samples,
            order=rows,
            target_range=target_range,
        ),
        bounds=bounds_of(
            first,
            second,
            potential,
            certified=certified,
            certificate=certificate,
            maximum=maximum,
            confidence=confidence,
            step=step,
            method=by,
            reason=reason,
        ),
    )


def _error(part: Part) -> float:
    return math.nan if part.wrong is None else float(part.wrong.mean())
