"""Which cause holds a loss up, from the numbers: thresholds, states and what to do (Thm 2.3)."""

from __future__ import annotations

import dataclasses
import math

import torch

from conjopt.diagnosis.numbers import HIDDEN, Numbers

__all__ = ["COLLAPSED", "NEAR", "NOISY", "PART", "STUCK", "Finding", "Step", "judge", "step_of"]

NEAR = 0.02
"""Share of `Ent(Y)` below which a loss counts as down."""
COLLAPSED = 1e-3
"""Own share of the sensitivity below which the samples count as told apart by nothing."""
STUCK = 0.8
"""Share of the excess that has to be out of reach to name what keeps it there. With less, descent
goes on, and moves the structure matrix with it."""
NOISY = 0.25
"""Share of the excess in reach that the noise has to sustain to count as what holds it up."""
PART = 0.25
"""Share of the loss from which a cause that is not the first is reported as a part of it."""

CANNOT = "cannot tell"
CAUSES = (
    "data floor",
    "collapsed structure",
    "conflicting samples",
    "gradient energy",
    "batch noise",
)
HOLDS, PARTLY, NOT, UNKNOWN = "holds up the loss", "a part of it", "does not", "cannot tell"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One cause of Thm 2.3 and what was found of it.

    Attributes:
        cause: Its name.
        share: Share of the loss that lies with it, of 1; NaN where that is not known.
        number: What was measured, in words, with the threshold.
        state: "holds up the loss", "a part of it", "does not" or "cannot tell".
        reason: Why it cannot be told, or empty.
        remedy: What to do about it.

    Reference:
        docs/theory.md, Thm 2.3.

    Example:
        >>> from conjopt.diagnosis import Finding
        >>> Finding("data floor", 0.9, "floor 0.9 of a loss of 1", "holds up the loss").share
        0.9
    """

    cause: str
    share: float
    number: str
    state: str
    reason: str = ""
    remedy: str = ""


@dataclasses.dataclass(frozen=True)
class Step:
    """The step of plain SGD on the criterion's gradient, or why it is not known.

    Attributes:
        size: `lr / (1 - momentum)`, or `None`.
        reason: Why there is none.
    """

    size: float | None
    reason: str = ""


def step_of(optimizer: torch.optim.Optimizer | None) -> Step:
    """Read the step of an optimizer; of several parameter groups the greatest.

    Args:
        optimizer: Any, or `None`.

    Returns:
        The step of `torch.optim.SGD`, and no size for anything else.

    Raises:
        TypeError: If it is no optimizer.
    """
    if optimizer is None:
        return Step(None, "its step is not known: pass optimizer=")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"diagnose: optimizer is a {type(optimizer).__name__}, expected a torch.optim."
            "Optimizer or None."
        )
    if not isinstance(optimizer, torch.optim.SGD):
        name = type(optimizer).__name__
        return Step(None, f"the steps of {name} are no multiples of the gradient")
    sizes = []
    for group in optimizer.param_groups:
        momentum = float(group["momentum"])
        heavy = (1 - float(group["dampening"])) / (1 - momentum) if 0 < momentum < 1 else 1.0
        sizes.append(float(group["lr"]) * heavy)
    return Step(max(sizes))


def judge(numbers: Numbers, step: Step, batch_size: int, whole: bool) -> tuple[str, list[Finding]]:
    """Name the cause, and say what was found of all five, the dominant first.

    Args:
        numbers: What was measured.
        step: Of the optimizer.
        batch_size: Of the training.
        whole: Whether all samples of the loader were seen.

    Returns:
        The cause, and the findings.
    """
    risk = numbers.risk
    floor = numbers.floor / risk if risk > 0 else 0.0
    hidden = (1 - floor) * numbers.hidden if risk > 0 else 0.0
    visible = 1 - floor - hidden if risk > 0 else 0.0
    sustained, noisy, unsure = _noise(numbers, step, batch_size, whole)
    structure = "collapsed structure" if numbers.own < COLLAPSED else "conflicting samples"
    reach = "batch noise" if noisy else "gradient energy"
    shares = {
        **dict.fromkeys(CAUSES, 0.0),
        "data floor": floor,
        structure: hidden,
        reach: visible,
    }
    unknown: dict[str, str] = {}
    if math.isnan(numbers.own) and hidden > 0:
        why = "it takes two samples with residuals to tell these two apart"
        unknown |= dict.fromkeys(("collapsed structure", "conflicting samples"), why)
    if unsure and visible > 0:
        unknown["batch noise"] = unsure
        if visible >= PART:
            unknown["gradient energy"] = unsure
    between = numbers.hidden < STUCK <= numbers.hidden + numbers.unresolved
    if floor > 0.5:
        cause = "data floor"
    elif between:
        cause = CANNOT
        why = (
            f"between {numbers.hidden:.0%} and {numbers.hidden + numbers.unresolved:.0%} of the "
            "squared residuals are out of reach; products alone do not tell more with so many "
            "outputs for each sample"
        )
        unknown |= dict.fromkeys(CAUSES[1:], why)
    else:
        cause = structure if numbers.hidden >= STUCK else reach
    if cause in unknown:
        cause = CANNOT
    if risk <= NEAR * numbers.constant or risk == 0:
        cause, unknown = "none", {}
    findings = []
    for name, (number, remedy) in _texts(numbers, sustained, batch_size).items():
        state = HOLDS if name == cause else PARTLY if shares[name] >= PART else NOT
        if cause == "none":
            state = NOT
        if name in unknown and state != HOLDS:
            findings.append(Finding(name, math.nan, number, UNKNOWN, unknown[name], remedy))
        else:
            findings.append(Finding(name, shares[name], number, state, "", remedy))
    first = UNKNOWN if cause == CANNOT else HOLDS
    order = [first, *(state for state in (HOLDS, PARTLY, UNKNOWN, NOT) if state != first)]
    findings.sort(key=lambda finding: order.index(finding.state))
    return cause, findings


def noise_floor(numbers: Numbers, size: float, batch_size: int, whole: bool) -> float:
    """Return the excess that plain SGD of a small step hovers at: `a S^2 / (4 m)`.

    At rest, the covariance `C` of the parameters solves `H C + C H = a Cov(g_B)`, whose trace is
    `2 tr(H C) = a S^2 / m`, and the excess is `tr(H C) / 2`.

    Args:
        numbers: With `S^2`.
        size: `a`, on the gradient of the mean Fenchel-Young loss.
        batch_size: `m`.
        whole: Whether the number of samples is known.
    """
    n = numbers.samples
    m = min(batch_size, n) if whole else batch_size
    rest = (n - m) / (n - 1) if whole and n > 1 else 1.0  # Thm 3.2, without replacement
    return size * max(0.0, numbers.noise) * rest / (4 * m)


def _noise(numbers: Numbers, step: Step, batch_size: int, whole: bool) -> tuple[float, bool, str]:
    """Return the noise floor, whether it explains the excess in reach, and why that is unsure."""
    if math.isnan(numbers.noise):
        return math.nan, False, "one sample has no noise: it takes two"
    if step.size is not None:
        size = step.size * numbers.scale
        floor = noise_floor(numbers, size, batch_size, whole)
        return floor, floor > 0 and floor >= NOISY * numbers.visible, ""
    if not numbers.curvature > 0:
        return math.nan, False, ""
    longest = 1 / numbers.curvature
    floor = noise_floor(numbers, longest, batch_size, whole)
    if floor <= NOISY * numbers.visible:
        return floor, False, ""
    per = noise_floor(numbers, 1.0, batch_size, whole)
    critical = NOISY * numbers.visible / per / numbers.scale
    return (
        floor,
        False,
        (
            f"{step.reason}; a step of plain SGD, lr / (1 - momentum), above {critical:.2g} holds "
            "the loss up by its noise, and a shorter one does not"
        ),
    )


def _texts(numbers: Numbers, noise: float, batch_size: int) -> dict[str, tuple[str, str]]:
    """Return numbers with thresholds, and remedies, in words."""
    n = numbers
    few = n.parameters < n.probed * n.dimensions
    capacity = f"{n.parameters} parameters for {n.probed} x {n.dimensions} outputs probed"
    steps = 2 * n.curvature * n.excess / n.gradient if n.gradient > 0 else math.inf
    return {
        "data floor": (
            f"Ent(Y|X) = {n.floor:.3g} of a loss of {n.risk:.3g}",
            "No function of these inputs does better: look for equal inputs with different "
            "targets and correct or drop them, add inputs that tell them apart, or stop here.",
        ),
        "collapsed structure": (
            f"own share of the sensitivity {n.own:.2g} (collapsed below {COLLAPSED:g})",
            "Changes of the parameters move all outputs alike: use fewer layers, skip "
            "connections, ReLU-like activations, normalisation layers, another initialisation, "
            "and inputs of mean 0 and variance 1; more steps will not do.",
        ),
        "conflicting samples": (
            f"{n.hidden:.0%} of the squared residuals where eigenvalues of K are below "
            f"{HIDDEN:g} hi/m",
            (f"There are {capacity}: use a wider network. " if few else "")
            + "Samples that the network hardly tells apart want different things: look for near "
            "copies with contradicting targets and correct them, or add inputs and capacity that "
            "separate them.",
        ),
        "gradient energy": (
            f"energy {n.energy:.3g}, ||g||^2 {n.gradient:.3g}: 1/{steps:.3g} of the excess at "
            "the best plain step",
            "Nothing but unfinished descent: keep training, or take larger steps.",
        ),
        "batch noise": (
            f"noise sustains {noise:.3g} of an excess in reach of {n.visible:.3g} at batch size "
            f"{batch_size} (from {NOISY:.0%} on)",
            "Steps are too long for the noise of such batches: use larger batches, lower the "
            "learning rate, or average the weights.",
        ),
    }
