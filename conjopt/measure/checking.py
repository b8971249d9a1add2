"""Whether a model can be measured, and whether what is measured is what autograd says.

The reference is plain: one sample at a time through the model, and one vector-Jacobian product
with respect to the parameters for each cotangent.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from conjopt.measure.comparing import CHECKING, Check
from conjopt.measure.layers.tape import as_arguments

__all__ = ["MeasurementError", "first_use_check", "self_check"]


class MeasurementError(RuntimeError):
    """The model, the criterion and the batch cannot be measured; the message lists every reason."""


def self_check(model: nn.Module, loss: Any, inputs: Any, targets: Any) -> None:
    """Compare what is measured with plain autograd, and list everything that is wrong.

    For two samples, the first and the last: the outputs of a sample alone are those in the batch,
    its gradient's norm is what `conjopt.measure.per_sample_gradient_norms` says, the inner products
    of its gradients for two cotangents and its structure matrix (up to 32 outputs) are what the
    engine says, and the gradient of the batch is made of the gradients of its samples. This takes
    as long as about fifteen training steps and waits for the device: call it once, not in a
    training step.

    The model runs in the mode it is in. Its buffers, gradients and mode and the random number
    generators stay as they are.

    Args:
        model: The module.
        loss: The criterion, called with outputs and targets.
        inputs: Of the model, `m` samples along dimension 0: a tensor, or a tuple or a dict of its
            arguments. Every tensor whose dimension 0 has the size `m` is taken apart by samples,
            but for a mask of shape `(m, m)` if that is what the model needs.
        targets: Of the criterion.

    Raises:
        MeasurementError: With every problem found: tensors on different devices, values that are
            not finite, random numbers such as dropout, several outputs or outputs without samples
            along dimension 0, samples coupled by the model (batch statistics) or by the criterion,
            parameters that cannot be seen, and measurements that are off, with the names of the
            parameters.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.measure import self_check
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Dropout(0.5))
        >>> inputs, targets = torch.ones(4, 2), torch.tensor([0, 1, 2, 0])
        >>> self_check(model.eval(), torch.nn.CrossEntropyLoss(), inputs, targets)
        >>> self_check(model.train(), torch.nn.CrossEntropyLoss(), inputs, targets)
        Traceback (most recent call last):
        ...
        conjopt.measure.checking.MeasurementError: Sequential cannot be measured as it is:
        - Two runs differ: '1' (Dropout) draws random numbers. Call model.eval() first, ...
    """
    _raise(model, Check(model, loss, inputs, targets).problems())


def first_use_check(
    model: nn.Module, inputs: Any, loss: Any = None, targets: Any = None, *, name: str = ""
) -> None:
    """Run `self_check` once for a model and a kind of inputs.

    A model counts as checked for inputs of the same shapes (but for the number of samples), types
    and devices, in the same mode, with the same parameters trained, and with or without a
    criterion. Its successes are remembered as long as the model lives; a failure is found again.
    Where the model draws random numbers, its samples cannot be repeated one at a time: then
    nothing is compared, and that is no failure here. Within a check nothing is checked.

    Args:
        model: The module.
        inputs: Of the model.
        loss: The criterion, or `None` where what is measured has none.
        targets: Of the criterion.
        name: Of the function that is used, for the message.

    Raises:
        MeasurementError: If there are problems, as `self_check` lists them.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.measure.checking import first_use_check
        >>> model = torch.nn.Linear(2, 3)
        >>> first_use_check(model, torch.ones(4, 2))
        >>> first_use_check(model, torch.ones(8, 2))  # nothing to do
    """
    if CHECKING.get():
        return
    try:
        passed = _PASSED.setdefault(model, set())
    except TypeError:  # a module that cannot be hashed or referred to weakly
        passed = set()
    kind = _kind(model, inputs, loss)
    if kind in passed:
        return
    check = Check(model, loss, inputs, targets, allow_random=True)
    _raise(model, check.problems(), name)
    passed.add(kind)


_PASSED: weakref.WeakKeyDictionary[nn.Module, set[Hashable]] = weakref.WeakKeyDictionary()


def _kind(model: nn.Module, inputs: Any, loss: Any) -> Hashable:
    leaves, names = tree_flatten(as_arguments(inputs))
    kinds = [
        (tuple(leaf.shape[1:]), leaf.dtype, leaf.device)
        if isinstance(leaf, Tensor)
        else (type(leaf), leaf if isinstance(leaf, bool | str) else None)  # what may choose a way
        for leaf in leaves
    ]
    trained = tuple(parameter.requires_grad for parameter in model.parameters())
    mode = tuple(module.training for module in model.modules())
    return tuple(kinds), str(names), trained, mode, None if loss is None else type(loss)


def _raise(model: nn.Module, problems: list[str], name: str = "") -> None:
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        subject = f"{name}: {type(model).__name__}" if name else type(model).__name__
        raise MeasurementError(f"{subject} cannot be measured as it is:\n{listed}")
