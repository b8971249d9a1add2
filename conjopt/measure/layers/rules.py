"""Rules: from the gradient of what a function returned to per-sample gradients of its parameters.

A rule is called with a `Use` and the cotangents of the tensors that the function returned, each
`(k, *shape)` or `None`, and returns the use's weights with what it gives them (`pieces.py`), or
`None` where it has no answer. `register_rule` adds one for a function of your own; functions
without a rule go through one vector-Jacobian product per sample (`by_sample.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conjopt.measure.curvature import switched_off
from conjopt.measure.layers.by_sample import by_sample
from conjopt.measure.layers.layout import LOST, MIXED, Samples
from conjopt.measure.layers.pieces import Dense, Lookup, Outer, Piece
from conjopt.measure.layers.uses import LAYOUTS, Use

__all__ = ["Cotangents", "Found", "Rule", "pieces_of", "register_rule"]

Found = list[tuple[Tensor, Piece]]  # weights with what this use gives
Cotangents = Sequence[Tensor | None]
Rule = Callable[[Use, Cotangents], Found | None]

_RULES: dict[Any, Rule] = {}
_BY_SHAPES: set[Any] = set()  # functions with rules of this package


def register_rule(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for functions, as a decorator.

    Args:
        functions: torch functions or methods as a `torch.overrides.TorchFunctionMode` sees them.

    Returns:
        A decorator that returns the rule.

    Example:
        >>> import torch
        >>> from conjopt.measure import gradient_energy
        >>> from conjopt.measure.layers import Dense, register_rule
        >>> def scaled(x, weight):
        ...     if torch.overrides.has_torch_function((x, weight)):  # the mode wants to see it
        ...         return torch.overrides.handle_torch_function(scaled, (x, weight), x, weight)
        ...     return x * weight
        >>> @register_rule(scaled)
        ... def rule(use, cotangents):
        ...     x, weight = use.args
        ...     gradients = cotangents[0] * x  # (k, m, d)
        ...     return [(weight, Dense(gradients[:, :, None, None]))]
        >>> class Scale(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight = torch.nn.Parameter(torch.zeros(2))
        ...     def forward(self, x):
        ...         return scaled(x, self.weight)
        >>> x, y = torch.tensor([[1.0, 2.0]]), torch.tensor([0])
        >>> gradient_energy(Scale(), torch.nn.CrossEntropyLoss(), x, y)  # (1/4) (1^2 + 2^2)
        tensor(1.2500)
    """

    def register(rule: Rule) -> Rule:
        # Not its own `__module__`, which `functools.wraps` copies.
        module = getattr(rule, "__globals__", {}).get("__name__", "")
        own = module.startswith(__name__.rpartition(".")[0])
        for function in functions:
            _RULES[function] = rule
            (_BY_SHAPES.add if own else _BY_SHAPES.discard)(function)
        return rule

    return register


def pieces_of(use: Use, cotangents: Cotangents) -> Found:
    """Apply the rule of the function that was called, or the general way.

    Args:
        use: A use of parameters.
        cotangents: For each tensor that the function returned, `(k, *shape)` or `None`.

    Raises:
        RuntimeError: If an argument was written to since, or samples are coupled.
    """
    for tensor, version in use.versions:
        if tensor._version != version:
            raise RuntimeError(
                f"An argument of {getattr(use.function, '__name__', use.function)} was written to "
                "after the call: per-sample gradients need it as it was. Write to a copy."
            )
    if LOST in use.where.values():
        raise RuntimeError(MIXED.format(getattr(use.function, "__name__", use.function)))
    general = use.whole or any(weight.is_complex() for weight in use.weights)
    rule = None if general else _RULES.get(use.function)
    found = None if rule is None else rule(use, cotangents)
    return by_sample(use, cotangents) if found is None else found


def by_shapes(use: Use) -> bool:
    """Whether what is done for a use depends on shapes and options alone.

    Rules of others may depend on anything; several calls are made of those that have none.
    """
    return use.function in _BY_SHAPES and not use.whole and use.function not in LAYOUTS


def places(use: Use, tensor: Tensor, at: Samples | None, lead: int = 0) -> Tensor | None:
    """Arrange a tensor as `(*lead, m, t, channels)`: samples, places, and its last dimension."""
    if at is None or at is LOST or at.dim >= tensor.ndim - lead - 1:
        return None
    if at == (0, 1) and tensor.shape[lead] == use.samples and tensor.ndim - lead < 4:
        return tensor if tensor.ndim - lead == 3 else tensor.unsqueeze(-2)
    return at.split(tensor, use.samples, lead).flatten(lead + 1, -2)


def flat(weight: Tensor, gradients: Tensor) -> tuple[Tensor, Piece]:
    """Pair a weight with its gradients `(k, m, *shape)`."""
    return weight, Dense(gradients.reshape(*gradients.shape[:2], 1, 1, -1))


def same_type(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in the wider type; under autocast they may differ."""
    wide = torch.promote_types(left.dtype, right.dtype)
    return left.to(wide), right.to(wide)


def over_places(b: Tensor) -> Tensor:
    """Sum `(k, m, channels, *places)` over the places."""
    return b.sum(tuple(range(3, b.ndim))) if b.ndim > 3 else b


@register_rule(F.linear)
def _linear(use: Use, cotangents: Cotangents) -> Found | None:
    x, weight, bias = use.arguments(input=None, weight=None, bias=None)
    (b,) = cotangents
    at = use.at(x)
    if use.is_weight(x) or b is None or at != use.places[0]:
        return None
    left, right = places(use, b, at, 1), places(use, x, at)  # (k, m, t, q), (m, t, p)
    if left is None or right is None:
        return None
    found: Found = []
    if use.is_weight(weight):
        wide, right = same_type(left, right)
        found.append((weight, Outer(wide.unsqueeze(2), right[None, :, None])))
    if bias is not None and use.is_weight(bias):
        found.append(flat(bias, left.sum(2) if left.shape[2] > 1 else left))
    return found


@register_rule(torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm)
def _matmul(use: Use, cotangents: Cotangents) -> Found | None:
    x, weight = use.argument(0, "input"), use.argument(1, "other")
    (b,) = cotangents
    if b is None or use.is_weight(x) or not use.is_weight(weight) or weight.ndim != 2:
        return None
    at = use.at(x)
    if x.ndim < 2 or at != use.places[0]:
        return None
    left, right = places(use, x, at), places(use, b, at, 1)
    if left is None or right is None:
        return None
    left, right = same_type(left, right)
    return [(weight, Outer(left[None, :, None], right.unsqueeze(2)))]


@register_rule(F.embedding)
def _embedding(use: Use, cotangents: Cotangents) -> Found | None:
    index, weight = use.argument(0, "input"), use.argument(1, "weight")
    padding, scaled = use.argument(2, "padding_idx"), use.argument(5, "scale_grad_by_freq", False)
    (b,) = cotangents
    if scaled:
        raise RuntimeError(
            "An embedding has scale_grad_by_freq=True, which divides by the counts of the whole "
            "batch: there are no per-sample gradients. Set it to False."
        )
    at = use.at(index)
    if b is None or at != use.places[0]:
        return None
    right, rows = places(use, b, at, 1), places(use, index.unsqueeze(-1), at)
    if right is None or rows is None:
        return None
    rows = rows.squeeze(-1)
    if padding is not None:
        right = right * (rows != padding % weight.shape[0]).unsqueeze(-1)
    return [(weight, Lookup(rows, right, weight.shape[0]))]


_ADDS = (torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__)
_SUBTRACTS = (torch.sub, Tensor.sub, Tensor.__sub__, torch.subtract, Tensor.subtract)
_MULTIPLIES = (torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, torch.multiply)


@register_rule(*_ADDS, *_SUBTRACTS, *_MULTIPLIES)
def _elementwise(use: Use, cotangents: Cotangents) -> Found | None:
    a, other = use.argument(0, "input"), use.argument(1, "other")
    (b,) = cotangents
    if b is None or use.kwargs.get("alpha", 1) != 1 or len(use.weights) != 1:
        return None
    weight = use.weights[0]
    x = other if a is weight else a
    if not isinstance(x, Tensor) or not use.plain(0) or use.is_weight(x):
        return None
    if weight.ndim == b.ndim - 1 and weight.shape[0] != 1:
        return None
    if use.function in _MULTIPLIES:
        b = b * x
    elif use.function in _SUBTRACTS and other is weight:
        b = -b
    return [flat(weight, _reduced(b, weight.shape, 0))]


@register_rule(Tensor.expand, Tensor.expand_as, torch.broadcast_to, Tensor.broadcast_to)
def _expand(use: Use, cotangents: Cotangents) -> Found | None:
    (b,), weight, at = cotangents, use.args[0], use.places[0]
    if b is None or at is None or at is LOST:
        return None
    return [flat(weight, _reduced(b, weight.shape, at.dim))]


def _reduced(b: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Sum cotangents over the dimensions that a weight was broadcast along, but for samples'."""
    full = (1,) * (b.ndim - 1 - len(shape)) + shape
    summed = [i + 1 for i, size in enumerate(full) if size == 1 and i != dim]
    return (b.sum(summed, keepdim=True) if summed else b).movedim(dim + 1, 1)


@register_rule(F.layer_norm)
def _layer_norm(use: Use, cotangents: Cotangents) -> Found | None:
    x, shape, weight, bias, eps = use.arguments(
        input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
    )
    return _affine(
        use, cotangents, weight, bias, lambda: F.layer_norm(x, shape, eps=eps), len(shape)
    )


@register_rule(F.rms_norm)
def _rms_norm(use: Use, cotangents: Cotangents) -> Found | None:
    x, shape, weight, eps = use.arguments(input=None, normalized_shape=None, weight=None, eps=None)
    return _affine(use, cotangents, weight, None, lambda: F.rms_norm(x, shape, eps=eps), len(shape))


def _affine(
    use: Use,
    cotangents: Cotangents,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[], Tensor],
    trailing: int,
) -> Found | None:
    """Scale and shift of the last dimensions."""
    (b,), at = cotangents, use.places[0]
    if b is None or at is None or at.dim >= b.ndim - 1 - trailing:
        return None
    by_place = places(use, b.flatten(-trailing), at, 1)
    found: Found = []
    if by_place is None:
        return None
    if weight is not None and use.is_weight(weight):
        with torch.no_grad():
            x = places(use, normalised().flatten(-trailing), at)
        assert x is not None  # shaped like the result
        found.append(flat(weight, (by_place * x).sum(2)))
    if bias is not None and use.is_weight(bias):
        found.append(flat(bias, by_place.sum(2)))
    return found


@register_rule(F.group_norm)
def _group_norm(use: Use, cotangents: Cotangents) -> Found | None:
    x, groups, weight, bias, eps = use.arguments(
        input=None, num_groups=None, weight=None, bias=None, eps=1e-5
    )
    if use.statistics is not None:
        return _by_statistics(use, cotangents, x, weight, bias)
    return _by_channel(use, cotangents, weight, bias, lambda: F.group_norm(x, groups, eps=eps))


def _by_statistics(
    use: Use, cotangents: Cotangents, x: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Found | None:
    """Scale and shift of a group normalisation, without normalising again."""
    (b,), kept = cotangents, use.statistics
    if b is None or kept is None or not use.plain(0):
        return None
    mean, inverse = (t.unsqueeze(-1) for t in kept)  # (m, groups, 1)
    shift = over_places(b).reshape(len(b), *kept[0].shape, -1)  # channels by groups
    found: Found = []
    if weight is not None and use.is_weight(weight):
        scale = over_places(b * x).reshape(shift.shape)
        found.append(flat(weight, (scale - mean * shift) * inverse))
    if bias is not None and use.is_weight(bias):
        found.append(flat(bias, shift))
    return found


@register_rule(F.instance_norm)
def _instance_norm(use: Use, cotangents: Cotangents) -> Found | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats")
    x, mean, var, weight, bias, own = (use.argument(i, name) for i, name in enumerate(names))
    own, eps = True if own is None else own, use.argument(7, "eps", 1e-5)

    def normalised() -> Tensor:
        if own:
            return F.instance_norm(x, eps=eps)
        return F.instance_norm(x, mean, var, use_input_stats=False, eps=eps)

    return _by_channel(use, cotangents, weight, bias, normalised)


@register_rule(F.batch_norm, torch.batch_norm)
def _batch_norm(use: Use, cotangents: Cotangents) -> Found | None:
    names = ("input", "running_mean", "running_var", "weight", "bias", "training")
    x, mean, var, weight, bias, training = (use.argument(i, name) for i, name in enumerate(names))
    eps = use.argument(7, "eps", 1e-5)
    if training:
        raise RuntimeError(
            "The model has batch normalisation in training mode, which couples the samples of a "
            "batch: there are no per-sample gradients. Call model.eval() first, or use group or "
            "layer normalisation."
        )
    normalised = lambda: F.batch_norm(x, mean, var, eps=eps)  # noqa: E731
    return _by_channel(use, cotangents, weight, bias, normalised)


@register_rule(F.prelu)
def _prelu(use: Use, cotangents: Cotangents) -> Found | None:
    (x, weight), (b,) = (use.argument(0, "input"), use.argument(1, "weight")), cotangents
    if b is None or b.ndim < 3 or not use.plain(0):
        return None
    by_channel = over_places(b * x.clamp(max=0))
    return [flat(weight, by_channel if weight.numel() > 1 else by_channel.sum(-1))]


def _by_channel(
    use: Use,
    cotangents: Cotangents,
    weight: Tensor | None,
    bias: Tensor | None,
    normalised: Callable[[], Tensor],
) -> Found | None:
    """Scale and shift of dimension 1, samples along dimension 0."""
    (b,) = cotangents
    if b is None or not use.plain(0):
        return None
    found: Found = []
    if weight is not None and use.is_weight(weight):
        with torch.no_grad():
            x = normalised()
        found.append(flat(weight, over_places(b * x)))
    if bias is not None and use.is_weight(bias):
        found.append(flat(bias, over_places(b)))
    return found


@register_rule(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
def _recurrent(use: Use, cotangents: Cotangents) -> Found | None:
    dropout, training = use.args[5], use.args[6]
    if dropout and training:
        raise RuntimeError(
            "A recurrent network drops out between its layers, and that cannot be repeated: call "
            "model.eval() first, or set its dropout to 0."
        )
    with switched_off(torch.backends.mkldnn), switched_off(torch.backends.cudnn):
        return by_sample(use, cotangents, nested=True)


def _recurrent_layout(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[int, int | None], Sequence[int]]:
    if not isinstance(args[2], tuple | list):
        raise RuntimeError(
            "A recurrent network was given a packed sequence, whose samples are interleaved: "
            "per-sample gradients need a padded batch."
        )
    states = args[1] if isinstance(args[1], tuple | list) else (args[1],)
    along = 0 if args[8] else 1
    return {id(args[0]): along, **{id(state): 1 for state in states}}, (along, 1, 1)


@register_rule(F.multi_head_attention_forward)
def _attention(use: Use, cotangents: Cotangents) -> Found | None:
    training, dropout = use.kwargs.get("training", True), use.args[10]
    if training and dropout:
        raise RuntimeError(
            "Attention drops out, and that cannot be repeated: call model.eval() first, or set "
            "its dropout to 0."
        )
    with sdpa_kernel(SDPBackend.MATH):  # the only one that is vectorised over samples
        return by_sample(use, cotangents, nested=True)


def _attention_layout(
    args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[int, int | None], Sequence[int]]:
    dims: dict[int, int | None] = {id(tensor): 1 for tensor in args[:3]}
    padding, mask = kwargs.get("key_padding_mask"), kwargs.get("attn_mask")
    if padding is not None:
        dims[id(padding)] = 0
    if mask is not None:
        dims[id(mask)] = 0 if mask.ndim == 3 else None
    return dims, (1, 0)


LAYOUTS[F.multi_head_attention_forward] = _attention_layout
LAYOUTS.update(
    dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent_layout)
)
