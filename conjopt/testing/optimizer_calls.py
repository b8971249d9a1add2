"""A few plain steps of an optimizer, before statements on it are looked at."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from conjopt.testing.optimizer_runs import CRITERIA, MakeOptimizer, Run, Setting

__all__ = ["stepped"]

STEPS = 2
HINTS = {  # what torch says, and what to do
    "a leaf Variable that requires grad": "decorate step with @torch.no_grad()",
    "a view of a leaf Variable that requires grad": "decorate step with @torch.no_grad()",
    "does not support dense gradients": "gradients are dense here, so that an optimizer of sparse "
    "gradients alone cannot be checked",
}


def stepped(make_optimizer: MakeOptimizer) -> Optimizer:
    """One that took some steps on each model and loss, for its kind.

    What fails here would fail every statement.

    Args:
        make_optimizer: of a model and a loss.

    Raises:
        TypeError: see `conjopt.testing.optimizer_runs.made`.
        ValueError: see there; one that returns the same optimizer again is refused, too.
        RuntimeError: if a step raises.
    """
    optimizer: Any = None
    for model in ("linear", "deep"):
        for loss in CRITERIA:
            optimizer = _stepped(Setting(model, loss, 1.0, 2, 0, 0), make_optimizer)
    return optimizer


def _stepped(setting: Setting, make_optimizer: MakeOptimizer) -> Optimizer:
    run = Run(setting, make_optimizer)
    try:
        for step in range(STEPS):
            run.step(step)
    except Exception as error:
        raise RuntimeError(
            f"check_optimizer: step {step + 1} of {type(run.optimizer).__name__}, on a "
            f"{setting.model} model in torch.float64 with {setting.loss}, raised "
            f"{type(error).__name__}: {error}; {_remedy(setting, make_optimizer, error)}"
        ) from error
    return run.optimizer


def _remedy(setting: Setting, make_optimizer: MakeOptimizer, error: Exception) -> str:
    for words, remedy in HINTS.items():
        if words in str(error):
            return remedy
    if _steps_with_closure(setting, make_optimizer):
        return (
            "it does with a closure; one that needs it declares step(self, closure), without a "
            "default"
        )
    return "a plain step, after zero_grad and backward, is to work"


def _steps_with_closure(setting: Setting, make_optimizer: MakeOptimizer) -> bool:
    try:
        run = Run(setting, make_optimizer)
        run.needs_closure = True
        run.steps(0, STEPS)
    except Exception:
        return False
    return True
