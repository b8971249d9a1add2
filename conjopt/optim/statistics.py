"""Running means of what is measured, on the device, in the letters of docs/theory.md."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from conjopt.optim.gate import Gate, choose

__all__ = ["Measurement", "Statistics"]

MEANS = ("slope", "raw_slope", "curvature", "log_ratio", "mean_square", "noise")
SCALARS = (
    "weight",
    *MEANS,
    "change",
    "loss",
    "edge",
    "cap",
    "reach",
    "share",
    "steps",
    "skipped",
    "below",
    "lowered",
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
        log_ratio: ``log(g^T GGN g / ||g||^2)``, of a direction that is measured along g.
        mean_square: estimate of ``||G||^2``; None where there are no halves.
        noise: estimate of ``S^2``.
    """

    change: Tensor
    slope: Tensor | None = None
    raw_slope: Tensor | None = None
    curvature: Tensor | None = None
    log_ratio: Tensor | None = None
    mean_square: Tensor | None = None
    noise: Tensor | None = None


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
            value = getattr(found, name)
            if value is not None:
                mean = getattr(self, name)
                setattr(self, name, choose(gate, mean.lerp(value.to(mean), share), mean))
        first = self.weight == 0
        weight = self.weight.lerp(torch.ones_like(self.weight), share)
        self.weight = choose(gate, weight, self.weight)
        change = found.change.to(self.change)
        envelope = torch.maximum(change, self.change.lerp(change, share))
        envelope = torch.where(first, change, envelope)
        self.change = choose(gate, envelope, self.change)
        self.measured += 1

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
        for name in ("weight", *MEANS):
            value = getattr(self, name)
            setattr(self, name, choose(gate, torch.zeros_like(value), value))

    def mean(self, name: str) -> Tensor:
        """() a running mean, corrected for its start; NaN before the first measurement.

        Args:
            name: "slope", "raw_slope", "curvature", "log_ratio", "mean_square" or "noise".
        """
        mean: Tensor = getattr(self, name)
        return mean / self.weight

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
