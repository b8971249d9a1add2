"""The free lower bound on the structure matrix, from the last layer alone (Thm 2.5)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from conjopt.measure.layers import Use
from conjopt.measure.layers.rules import places
from conjopt.measure.layers.tape import Tape, as_arguments
from conjopt.measure.replay import Replay

__all__ = ["empty_output", "is_empty", "last_layer_bound"]

# Functions that rearrange a tensor and change none of its numbers.
_REARRANGES = re.compile(
    "(T|Transpose|Permute|View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Clone|Alias|ToCopy)"
    r"Backward\d*"
)


def last_layer_bound(
    model: nn.Module, inputs: Any, *, head: nn.Module | str | None = None
) -> Tensor:
    """Return a lower bound on every eigenvalue of `A_i` that the last layer alone gives.

    For `f = W h + b` it is `||h_i||^2 + 1`, and for outputs per token the least eigenvalue of
    `H_i H_i^T + 1 1^T`. Without a bias, or with one that is frozen, computed or used elsewhere
    too, the `1` is missing. It holds on `V` as well.

    Args:
        model: Returns one floating-point tensor, samples along dimension 0.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        head: The last layer, an `nn.Linear` of the model or its name; `None` for the linear layer
            that is used last.

    Returns:
        Shape `(m,)`, at most the least eigenvalues of `structure_matrix`, in its units.

    Raises:
        ValueError: If there is no such bound: the message says which of its conditions fails. The
            head is an `nn.Linear` whose weight is trained, enters as it is, and is used once;
            what it returns are the outputs, transposed or reshaped at most. Also if the model does
            not return one tensor with samples along dimension 0.

    Reference:
        docs/theory.md, Thm 2.5.

    Example:
        >>> from conjopt.measure import last_layer_bound
        >>> last_layer_bound(nn.Linear(2, 5), torch.tensor([[3.0, 4.0]]))
        tensor([26.])
    """
    if is_empty(inputs):
        return empty_output(model, inputs).new_zeros(0)
    tape = Tape(model, inputs)
    use, bias = _last_layer(getattr(model, "_orig_mod", model), tape, tape.only_output(), head)
    with torch.no_grad():
        h = _features(use)
        _, tokens, d = h.shape
        if tokens == 1:
            return h.square().sum((1, 2)) + int(bias)
        if tokens > d + bias:
            return h.new_zeros(len(h))  # H H^T + 1 1^T is singular
        lo = torch.linalg.eigvalsh(h.double() @ h.double().mT + int(bias))[:, 0]
        return lo.clamp(min=0).to(h.dtype)


def _last_layer(
    model: nn.Module, tape: Tape, output: Tensor, head: nn.Module | str | None
) -> tuple[Use, bool]:
    """Find the call that made the outputs, and whether its bias counts; or say what is wrong."""
    named = dict(model.named_modules())
    if isinstance(head, str):
        if head not in named:
            raise ValueError(f"last_layer_bound: {type(model).__name__} has no module {head!r}")
        head = named[head]
    chain = [get_gradient_edge(output)] if output.requires_grad else []
    while chain and _REARRANGES.fullmatch(chain[-1].node.name()):
        node, place = chain[-1].node.next_functions[0]
        if node is None:
            break
        chain.append(GradientEdge(node, place))
    uses = [use for use in tape.uses if use.function is F.linear and use.edges[0] in chain]
    if head is None:
        owners = {
            id(module._parameters.get("weight")): module
            for module in named.values()
            if isinstance(module, nn.Linear)
        }
        if not uses:
            raise _void(
                "the outputs are not what an nn.Linear with a trained weight returned; something "
                "comes after it, or its weight is frozen"
            )
        if id(uses[0].argument(1, "weight")) not in owners:
            raise _void("the weight of the layer that made the outputs is computed from others")
        head = owners[id(uses[0].argument(1, "weight"))]
    name = next((name for name, module in named.items() if module is head), None)
    if name is None:
        raise ValueError(f"last_layer_bound: the head {head} is no module of the model")
    label = repr(name) if name else "the model"
    if not isinstance(head, nn.Linear):
        raise _void(f"{label} is a {type(head).__name__}, no nn.Linear")
    weight = head._parameters.get("weight")
    if weight is None:
        raise _void(f"the weight of {label} is computed: parametrized, normalised or pruned")
    if not weight.requires_grad:
        raise _void(f"the weight of {label} is frozen")
    use = next((use for use in uses if use.argument(1, "weight") is weight), None)
    number = _times_used(output, weight)
    if number > 1:
        raise _void(
            f"the weight of {label} is used {number} times: tied, or the layer called again"
        )
    if use is None:
        raise _void(f"the outputs are not what {label} returned; something comes after it")
    bias = head._parameters.get("bias")
    counts = bias is not None and use.argument(2, "bias") is bias and _times_used(output, bias) == 1
    return use, counts


def _times_used(output: Tensor, parameter: Tensor) -> int:
    """Count the edges of the graph that lead to a parameter."""
    number, seen, stack = 0, set(), [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for following, _ in node.next_functions:
            number += getattr(following, "variable", None) is parameter
            stack.append(following)
    return number


def _features(use: Use) -> Tensor:
    """Return what the layer was given, `(m, t, d)`."""
    x = use.argument(0, "input")
    h = places(use, x, use.where.get(id(x)))
    if h is None:
        raise _void("the samples cannot be told apart in what it is given")
    return h.to(torch.promote_types(h.dtype, torch.float32))


def _void(reason: str) -> ValueError:
    return ValueError(f"last_layer_bound: the last layer alone gives no bound: {reason}")


def empty_output(model: nn.Module, inputs: Any) -> Tensor:
    """Return what a model returns for no samples."""
    args, kwargs = as_arguments(inputs)
    with torch.no_grad():
        outputs = Replay(model, args, kwargs, Replay.random_state(model)).run({})
    (output,) = [output for output in outputs if output is not None]
    return output


def is_empty(inputs: Any) -> bool:
    """Whether the first tensor among the inputs that has dimensions has no samples in them."""
    leaves = tree_leaves(as_arguments(inputs))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), None)
    return first is not None and len(first) == 0
