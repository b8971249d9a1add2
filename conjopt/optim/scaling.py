"""What `torch.amp.GradScaler` did to the gradients before the step."""

from __future__ import annotations

import sys
from types import FrameType

from torch.amp.grad_scaler import GradScaler

__all__ = ["unscaled_by"]

DEPTH = 12  # wrappers that may lie between the scaler and the optimizer: schedulers', hooks'


def unscaled_by() -> float:
    """The factor that gradients were divided by, by a scaler that calls for the step; 1 without.

    A scaler divides the gradients by its scale before it lets the optimizer step, and says so
    nowhere; the loss that was watched still has the scale. Clipping may come after, so the
    gradients do not tell. What called for the step is asked therefore.

    Example:
        >>> unscaled_by()
        1.0
    """
    frame: FrameType | None = sys._getframe(1)
    for _ in range(DEPTH):
        if frame is None:
            break
        if frame.f_code.co_name == "_maybe_opt_step":
            scaler = frame.f_locals.get("self")
            if isinstance(scaler, GradScaler):
                return float(scaler.get_scale())
        frame = frame.f_back
    return 1.0
