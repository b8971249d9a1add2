"""Hooks on several gradients at once, which a measurement's own gradients may not reach."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

__all__ = ["without_multi_grad_hooks"]


@contextlib.contextmanager
def without_multi_grad_hooks(parameters: Iterable[Tensor]) -> Iterator[None]:
    """A context in which hooks of `register_multi_grad_hook` on parameters are off.

    They only look, and fail under `torch.autograd.grad`; hooks on single gradients stay.

    Args:
        parameters: that may have such hooks.

    Example:
        >>> import torch
        >>> from torch.autograd.graph import register_multi_grad_hook
        >>> weight = torch.ones(2, requires_grad=True)
        >>> _ = register_multi_grad_hook([weight], print)
        >>> with without_multi_grad_hooks([weight]):
        ...     torch.autograd.grad(3 * weight.sum(), weight)
        (tensor([3., 3.]),)
        >>> (3 * weight.sum()).backward()
        [tensor([3., 3.])]
    """
    kept: list[tuple[dict[int, Any], dict[int, Any]]] = []
    for parameter in parameters:
        hooks = parameter._backward_hooks
        if hooks and any(map(_looks_at_several, hooks.values())):
            kept.append((hooks, dict(hooks)))
            for number, hook in kept[-1][1].items():
                if _looks_at_several(hook):
                    del hooks[number]
    try:
        yield
    finally:
        for hooks, all_of_them in kept:  # in their order
            hooks.clear()
            hooks.update(all_of_them)


def _looks_at_several(hook: Any) -> bool:
    return getattr(hook, "__globals__", {}).get("__name__") == "torch.autograd.graph"
