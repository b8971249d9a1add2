"""Running means of what is measured, on the device, in the letters of docs/theory.md."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from conjopt.optim.gate import Gate, choose

__all__ = ["Measurement", "Statistics"]

BRAKE = ("slow", "slow_weight", "spread", "start", "lowest", "lowest_at", "braked_at", "brake")

MEANS = ("slope", "raw_slope", "curvature", "log_top", "correlation", "mean_square", "noise")
WEIGHTS = tuple(f"{name}_weight" for name in MEANS)  # counts for their bias corrections
SLOW = {"log_top": 0.95}  # decays of those that are to remember longer
SCALARS = (
    "weight",
    *MEANS,
    *WEIGHTS,
    "change",
    "gain",
    "length",
    "top",
    "loss",
    "edge",
    "cap",
    "reach",
    "share",
    "steps",
    "skipped",
    "below",
    "lowered",
    *BRAKE,
)
SAVED = {*SCALARS, "measured"}  # the keys of a state


@dataclasses.dataclass(eq=False)
class Measurement:
    """What one measuring step found; all () and in per-sample Fenchel-Young units.

    Attributes:
        change: ``V = rms ||J_i u||``.
        slope: unbiased ``<G, u>``; None where there is no second half to take it from.
        raw_slope: ``<g, u>``.
        curvature: ``u^T GGN u``.
        length: ``||u||``, of a direction along the gradient.
        top: ``hi(GGN_B)`` of the batch, from below.
        correlation: ``<g1, g2> / ||g||^2`` of two halves, an estimate of ``rho_m`` (Thm 3.2).
        mean_square: estimate of ``||G||^2``; None where there are no halves.
        noise: estimate of ``S^2``.
    """

    change: Tensor
    slope: Tensor | None = None
    raw_slope: Tensor | None = None
    curvature: Tensor | None = None
    length: Tensor | None = None
    top: Tensor | None = None
    correlation: Tensor | None = None
    mean_square: Tensor | None = None
    noise: Tensor | None = None

    @property
    def gain(self) -> Tensor | None:
        """() ``V / ||u||``, finite also where nothing moves."""
        if self.length is None:
            return None
        return self.change / self.length.clamp_min(torch.finfo(self.length.dtype).tiny)

    @property
    def log_top(self) -> Tensor | None:
        """() its logarithm, finite also at 0."""
        return (
            None if self.top is None else self.top.clamp_min(torch.finfo(self.top.dtype).tiny).log()
        )


class Statistics:
    """The memory of a step rule: running means, corrected for their start at zero by one count.

    Args:
        decay: of the running means, over measuring steps, and of the loss, over all steps.
        device: of the tensors.
        dtype: of the tensors.

    Attributes:
        loss: () running mean of the loss over the floor, starting at the first loss.
        weight: () count of measurements for the bias correction, 1 in the limit.
        steps: () steps taken.
        skipped: () steps given up for a value that was not finite.
        reach: () largest step that was tried on the outputs and held; infinite for no limit.
        share: () of the step that is tried next.
        change: () upper envelope of ``V``.
        gain: () upper envelope of ``V / ||u||``.
        length: () ``||u||`` of the step at hand, if the step rule asks for it.
        top: () upper envelope of ``hi(GGN_B)``.
        brake: () factor of the step, below 1 where the loss does not fall (`conjopt.optim.brake`).

    Example:
        >>> statistics = Statistics(0.9)
        >>> statistics.see_loss(torch.tensor(2.0), None)
        >>> statistics.see_loss(torch.tensor(1.0), None)
        >>> statistics.loss
        tensor(1.9000)
        >>> found = Measurement(change=torch.tensor(3.0), slope=torch.tensor(4.0))
        >>> statistics.see(found, None)
        >>> statistics.mean("slope")
        tensor(4.)
    """

    def __init__(
        self,
        decay: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.decay = decay
        self.measured = 0  # how often, on the host; what was found is on the device
        for name in SCALARS:
            setattr(self, name, torch.zeros((), device=device, dtype=dtype))
        self.loss.fill_(torch.nan)
        self.reach.fill_(torch.inf)
        self.share.fill_(1)
        self.brake.fill_(1)
        self.lowest.fill_(torch.nan)

    def __setattr__(self, name: str, value: Any) -> None:
        """Write a tensor into the memory of the one before, where captured steps look for it."""
        before = self.__dict__.get(name)
        if isinstance(before, Tensor):
            before.copy_(value)
        else:
            super().__setattr__(name, value)

    loss: Tensor
    weight: Tensor
    steps: Tensor
    skipped: Tensor
    change: Tensor
    edge: Tensor
    cap: Tensor
    reach: Tensor
    share: Tensor
    below: Tensor
    lowered: Tensor
    gain: Tensor
    length: Tensor
    top: Tensor
    slow: Tensor
    slow_weight: Tensor
    spread: Tensor
    start: Tensor
    lowest: Tensor
    lowest_at: Tensor
    braked_at: Tensor
    brake: Tensor

    def see_loss(self, loss: Tensor, gate: Gate) -> None:
        """Take the loss of a batch into the running mean.

        Args:
            loss: () over the floor.
            gate: () whether to; None for yes.
        """
        new = torch.where(self.loss.isnan(), loss, self.loss.lerp(loss, 1 - self.decay))
        self.loss = choose(gate, new, self.loss)

    def see(self, found: Measurement, gate: Gate) -> None:
        """Take a measurement into the running means, and into the upper envelope of ``V``.

        Args:
            found: the measurement.
            gate: () whether to; None for yes.
        """
        share = 1 - self.decay
        for name in MEANS:
            value = found.log_top if name == "log_top" else getattr(found, name)
            if value is not None:
                slow = 1 - SLOW[name] if name in SLOW else share
                self._lerp(name, value, slow, gate)
                self._lerp(f"{name}_weight", torch.ones_like(self.weight), slow, gate)
        first = self.weight == 0
        self._lerp("weight", torch.ones_like(self.weight), share, gate)
        seen = {"change": found.change, "gain": found.gain, "top": found.top}
        for name, value in seen.items():
            if value is not None:
                old, value = getattr(self, name), value.to(self.weight)
                envelope = torch.maximum(value, old.lerp(value, share))
                envelope = torch.where(first, value, envelope)
                setattr(self, name, choose(gate, envelope, old))
        self.measured += 1

    def _lerp(self, name: str, value: Tensor, share: float, gate: Gate) -> None:
        mean = getattr(self, name)
        setattr(self, name, choose(gate, mean.lerp(value.to(mean), share), mean))

    def count(self, gate: Gate) -> None:
        """Count a step as taken or skipped.

        Args:
            gate: () which of the two; None for taken.
        """
        self.steps = choose(gate, self.steps + 1, self.steps)
        if gate is not None:
            self.skipped = torch.where(gate, self.skipped, self.skipped + 1)

    def restart(self, gate: Gate) -> None:
        """Forget the measurements, of which there were none of slopes and curvature.

        Args:
            gate: () whether to; None for yes.
        """
        for name in ("weight", *MEANS, *WEIGHTS):
            value = getattr(self, name)
            setattr(self, name, choose(gate, torch.zeros_like(value), value))

    def mean(self, name: str) -> Tensor:
        """() a running mean, corrected for its start; NaN before the first measurement.

        Args:
            name: "slope", "raw_slope", "curvature", "log_top", "correlation", "mean_square" or
                "noise".
        """
        mean: Tensor = getattr(self, name)
        weight: Tensor = getattr(self, f"{name}_weight")
        return mean / weight

    def state_dict(self) -> dict[str, Any]:
        """All of it, for an exact resume."""
        return {name: getattr(self, name).clone() for name in SCALARS} | {"measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave.

        Args:
            state: of the same version; tensors are moved to the device.

        Raises:
            KeyError: if something is missing; nothing is loaded then.
        """
        loaded = {name: state[name] for name in SCALARS}
        self.measured = int(state["measured"])
        for name, value in loaded.items():
            setattr(self, name, value.clone().to(getattr(self, name)))
