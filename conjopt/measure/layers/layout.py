"""Where the samples are in a tensor, followed from the inputs through each call.

A size alone does not tell: there may be as many places, channels or classes as samples. So each
call is told where the samples of its arguments are, and finds out where those of its results are:
reshapes and joins by arithmetic; calls in which one size says it all by that size; any other by a
run without data for one sample more, to see which size grows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

__all__ = [
    "LOST",
    "MIXED",
    "RANGE",
    "Samples",
    "Where",
    "by_size",
    "fits",
    "locate",
    "plain_name",
    "repeated",
    "tensors",
]


class Samples(NamedTuple):
    """The dimension that holds the samples: `outer` places, samples, and further places joined.

    Attributes:
        dim: The dimension, -1 if samples were mixed or cannot be told apart any more.
        outer: Number of places in front of the samples within it.
    """

    dim: int
    outer: int = 1

    def split(self, tensor: Tensor, samples: int, lead: int = 0) -> Tensor:
        """Return `(*lead, m, ...)`, where dimension `dim` keeps the places, at least one."""
        dim = self.dim + lead
        inner = tensor.shape[dim] // (self.outer * samples)
        if self == (0, 1):
            return tensor.unflatten(dim, (samples, inner))
        parts = tensor.unflatten(dim, (self.outer, samples, inner)).movedim(dim + 1, lead)
        return parts.flatten(dim + 1, dim + 2)

    def shape(self, shape: torch.Size, samples: int, few: int) -> torch.Size:
        """Return the shape of that range, of so few samples."""
        if self.dim < 0:
            return shape
        sizes = list(shape)
        sizes[self.dim] = sizes[self.dim] // samples * few
        return torch.Size(sizes)

    def one(self, tensor: Tensor, samples: int, number: int) -> Tensor:
        """Return a view of one sample."""
        inner = tensor.shape[self.dim] // (self.outer * samples)
        parts = tensor.unflatten(self.dim, (self.outer, samples, inner))
        return parts.select(self.dim + 1, number)

    def take(self, tensor: Tensor, samples: int, rows: slice) -> Tensor:
        """Return a range of the samples, arranged as before."""
        if self == (0, 1) and tensor.shape[0] == samples:
            return tensor[rows]
        inner = tensor.shape[self.dim] // (self.outer * samples)
        if self.outer == inner == 1:
            return tensor[(slice(None),) * self.dim + (rows,)]
        parts = tensor.unflatten(self.dim, (self.outer, samples, inner))
        kept = parts[(slice(None),) * (self.dim + 1) + (rows,)]
        return kept.flatten(self.dim, self.dim + 2)


LOST = Samples(-1)
RANGE = Samples(-1, 0)  # the numbers of the samples themselves, `arange(m)`: no samples, but
MIXED = (
    "In front of {}, samples meet each other (batch normalisation in training mode, a mean over "
    "the batch), or are arranged in a way that cannot be followed: there are no per-sample "
    "gradients. Call model.eval() first, or let the model keep samples apart."
)
Where = Callable[[Tensor], Samples | None]


def locate(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    results: Sequence[Tensor],
    samples: int,
) -> list[Samples | None]:
    """Return where the samples of each result are; `None` if it has none.

    Args:
        function: What was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        where: Where the samples of an argument are.
        results: The tensors that it returned.
        samples: `m`.
    """
    given = [(t, at) for t in tensors((args, kwargs)) if (at := where(t)) not in (None, RANGE)]
    name = plain_name(function)
    if not given or name.startswith("new_"):
        return [None] * len(results)
    held = [(t, at) for t, at in given if at is not LOST]
    if not held or any(at is LOST and t.requires_grad for t, at in given):
        return [LOST] * len(results)
    if samples == 1:  # all there is belongs to the one sample
        return [Samples(0) if result.ndim else LOST for result in results]
    tensor, at = held[0]
    if name == "__getitem__":
        return [_indexed(args[0], args[1], where, samples)]
    if name in _SPECIAL:
        return _SPECIAL[name](args, kwargs, held, results, samples)
    if any(_mixes(name, args, kwargs, t, a) for t, a in held):
        return [LOST] * len(results)
    size = tensor.shape[at.dim]
    if (
        all(size not in t.shape for t in tensors((args, kwargs)) if where(t) is None)
        and all(t.shape[a.dim] == size and a.outer == at.outer for t, a in held)
        and all(_count(t, size) == 1 for t in (*(t for t, _ in held), *results))
    ):
        return [Samples(tuple(result.shape).index(size), at.outer) for result in results]
    return _probe(function, args, kwargs, where, held, results, samples)


def _count(tensor: Tensor, size: int) -> int:
    return tuple(tensor.shape).count(size)


def _probe(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    held: list[tuple[Tensor, Samples]],
    results: Sequence[Tensor],
    samples: int,
) -> list[Samples | None]:
    """Call the function on tensors without data, of one sample more."""

    def grown(leaf: Any) -> Any:
        return _grown(leaf, where(leaf), samples) if isinstance(leaf, Tensor) else leaf

    tensor, at = held[0]
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = function(*tree_map(grown, args), **tree_map(grown, kwargs))
    except Exception:  # no such kernel, or sizes that are written out: only what stays is known
        if plain_name(function).strip("_") not in _KEEPS:
            return [LOST] * len(results)
        return [at if r.shape == tensor.shape else LOST for r in results]
    found: list[Samples | None] = []
    for before, after in zip(results, tensors([other]), strict=False):
        changed = [
            i for i, (a, b) in enumerate(zip(before.shape, after.shape, strict=False)) if a != b
        ]
        if before.ndim != after.ndim or len(changed) != 1:
            found.append(LOST)
            continue
        size = before.shape[changed[0]]
        if size == samples:
            found.append(Samples(changed[0]))
        elif size == tensor.shape[at.dim]:
            found.append(Samples(changed[0], at.outer))
        else:
            found.append(LOST)
    return found + [LOST] * (len(results) - len(found))


Held = list[tuple[Tensor, Samples]]


def _reshaped(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    (tensor, at), (result, *_) = held[0], results
    front = math.prod(tensor.shape[: at.dim]) * at.outer  # places in front of the samples
    before = 1
    for dim, size in enumerate(result.shape):
        if before > front or front % before:
            break
        if size % (front // before * samples) == 0 and size:
            return [Samples(dim, front // before)]
        before *= size
    return [LOST]


def _expanded(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    (tensor, at), (result, *_) = held[0], results
    dim = at.dim + result.ndim - tensor.ndim
    # Repeated as a whole, the copies come in front.
    return [Samples(dim, at.outer * (result.shape[dim] // tensor.shape[at.dim]))]


def _interleaved(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    (tensor, at), (result, *_) = held[0], results
    each = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    same = isinstance(each, int) and result.ndim == tensor.ndim and tensor.ndim > 1
    return [at if same else LOST]


def _joined(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    parts = list(tensors([kwargs.get("tensors", args[0] if args else ())]))
    along = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    (_, at), (result, *_) = held[0], results
    along %= result.ndim
    if along != at.dim:
        return [at if all(other == at for _, other in held) else LOST]
    whole = all(a.dim == along and t.shape[along] == a.outer * samples for t, a in held)
    whole = whole and len(parts) == len(held)
    return [Samples(along, sum(a.outer for _, a in held)) if whole else LOST]


def _stacked(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    along = kwargs.get("dim", args[1] if len(args) > 1 else 0) % results[0].ndim
    at = held[0][1]
    same = all(other == at for _, other in held)
    return [Samples(at.dim + (along <= at.dim), at.outer) if same else LOST]


def _pieces(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    tensor, at = held[0]
    along = kwargs.get("dim", args[2] if len(args) > 2 else 0) % tensor.ndim
    if along != at.dim:
        return [at] * len(results)
    if tensor.shape[along] != at.outer * samples or any(r.shape[along] % samples for r in results):
        return [LOST] * len(results)
    return [Samples(along, result.shape[along] // samples) for result in results]


def _unbound(args: Any, kwargs: Any, held: Held, results: Any, samples: int) -> list[Any]:
    tensor, at = held[0]
    along = kwargs.get("dim", args[1] if len(args) > 1 else 0) % tensor.ndim
    lost = along == at.dim
    return [LOST if lost else Samples(at.dim - (along < at.dim), at.outer)] * len(results)


def _indexed(tensor: Tensor, given: Any, where: Where, samples: int) -> Samples:
    index = list(given) if isinstance(given, tuple) else [given]
    if any(item is Ellipsis for item in index):
        place = next(i for i, item in enumerate(index) if item is Ellipsis)
        rest = sum(item is not None for item in index) - 1
        index[place : place + 1] = [slice(None)] * (tensor.ndim - rest)
    at = where(tensor)
    outer = 1 if at is None else at.outer
    taken = [i for i, item in enumerate(index) if item is not None]
    if at is not None and at.dim < len(taken):
        place, size = taken[at.dim], tensor.shape[at.dim]
        item = index[place]
        if isinstance(item, slice):
            start, stop, step = item.indices(size)
            if (start, stop, step) != (0, size, 1):  # some of the copies that were joined
                whole = size == outer * samples and step == 1 and start < stop
                if not whole or start % samples or (stop - start) % samples:
                    return LOST
                outer = (stop - start) // samples
            index[place] = slice(None)
        elif isinstance(item, Tensor):
            if where(item) is not RANGE or size != samples:
                return LOST
            index[place] = RANGE

    def grown(leaf: Any, by: int) -> Any:
        if leaf is RANGE:
            return torch.empty(samples + by, dtype=torch.long, device="meta")
        return _grown(leaf, where(leaf), samples, by) if isinstance(leaf, Tensor) else leaf

    try:
        few, more = (
            grown(tensor, by)[tuple(grown(item, by) for item in index)].shape for by in (0, 1)
        )
    except Exception:  # a mask: how many places it leaves depends on the data
        return LOST
    changed = [i for i, (a, b) in enumerate(zip(few, more, strict=True)) if a != b]
    return Samples(changed[0], outer) if len(changed) == 1 else LOST


def _grown(leaf: Any, at: Samples | None, samples: int, by: int = 1) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    shape = list(leaf.shape)
    if at is not None and at.dim >= 0:
        shape[at.dim] += by * (shape[at.dim] // samples)
    return torch.empty(shape, dtype=leaf.dtype, device="meta")


def fits(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    where: Where,
    results: Sequence[Tensor],
    places: Sequence[Samples | None],
    samples: int,
) -> bool:
    """Whether results have one sample more where the arguments do."""

    def grow(leaf: Any) -> Any:
        return _grown(leaf, where(leaf), samples) if isinstance(leaf, Tensor) else leaf

    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = list(tensors([function(*tree_map(grow, args), **tree_map(grow, kwargs))]))
    except Exception:
        return False
    expected = [
        _grown(result, at, samples).shape for result, at in zip(results, places, strict=True)
    ]
    return [tensor.shape for tensor in found] == expected


_SPECIAL: dict[str, Callable[..., list[Any]]] = {
    **dict.fromkeys(
        ("reshape", "view", "flatten", "unflatten", "reshape_as", "view_as", "ravel"), _reshaped
    ),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to", "repeat", "tile"), _expanded),
    "repeat_interleave": _interleaved,
    **dict.fromkeys(("cat", "concat", "concatenate"), _joined),
    "stack": _stacked,
    **dict.fromkeys(("chunk", "split", "tensor_split"), _pieces),
    "unbind": _unbound,
}
# Functions along a dimension: the place of the argument that tells it, and its default.
_ALONG = {
    **dict.fromkeys(("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "flip"), (1, None)),
    **dict.fromkeys(("logcumsumexp", "cummax", "cummin", "index_select", "gather"), (1, None)),
    **dict.fromkeys(("index_add", "index_copy", "index_fill", "index_reduce"), (1, None)),
    **dict.fromkeys(("scatter", "scatter_add", "scatter_reduce", "take_along_dim"), (1, None)),
    **dict.fromkeys(("sort", "argsort", "glu"), (1, -1)),
    **dict.fromkeys(("roll", "renorm"), (2, None)),
    **dict.fromkeys(("topk", "diff", "fft_fft", "fft_ifft", "fft_rfft"), (2, -1)),
    "normalize": (2, 1),
    "take_along_dim": (2, None),
}
_ANYWHERE = {"take", "put", "index_put", "masked_scatter", "masked_select", "embedding_renorm"}
# Functions of the last dimensions: how many of them, where the name does not tell.
_LAST = {"scaled_dot_product_attention": 2, "unfold": 2, "grid_sample": 2, "affine_grid": 2}
_KEEPS = {"to", "cpu", "cuda", "type", "add", "iadd", "sub", "mul", "div", "copy", "requires_grad"}


def _mixes(name: str, args: Any, kwargs: Any, tensor: Tensor, at: Samples) -> bool:
    """Whether a function that keeps the shape brings samples together."""

    def argument(place: int, key: str, default: Any = None) -> Any:
        return args[place] if place < len(args) else kwargs.get(key, default)

    if name in _ANYWHERE:
        return True
    if name in _ALONG:
        place, default = _ALONG[name]
        dims = argument(place, "dim", kwargs.get("dims", default))
        if dims is None:
            return True
        dims = args[place:] if name == "flip" and type(dims) is int and args else dims
        return at.dim in [d % tensor.ndim for d in ((dims,) if type(dims) is int else dims)]
    if name == "batch_norm":
        return at.dim == 1 or bool(argument(5, "training", False))
    if name in ("group_norm", "instance_norm"):
        return at.dim > 0
    if name in ("layer_norm", "rms_norm"):
        return at.dim >= tensor.ndim - len(argument(1, "normalized_shape"))
    if "conv" in name and name[-2:] in ("1d", "2d", "3d"):
        return at.dim > 0
    if "pool" in name and name[-2:] in ("1d", "2d", "3d"):
        return at.dim >= tensor.ndim - int(name[-2])
    if name == "interpolate":
        return at.dim > 1
    return name in _LAST and args[0] is tensor and at.dim >= tensor.ndim - _LAST[name]


def by_size(tensor: Tensor, samples: int) -> Samples | None:
    """Guess where samples are: the first or the second dimension, if as long as there are."""
    sizes = tuple(tensor.shape[:2])
    return Samples(sizes.index(samples)) if samples in sizes else None


def repeated(tensor: Tensor, base: Tensor, samples: int) -> Samples | None:
    """Return the dimension along which a tensor repeats another for each sample, if any."""
    full = (1,) * (tensor.ndim - base.ndim) + tuple(base.shape)
    pairs = list(enumerate(zip(tensor.shape, full, strict=True)))
    if all(a == b or b == 1 for _, (a, b) in pairs):
        for dim, (a, b) in pairs[:2]:
            if a == samples and b == 1:
                return Samples(dim)
    return None


def plain_name(function: Callable[..., Any]) -> str:
    """Return the name of a function, of one that writes that of the one that does not."""
    name = str(getattr(function, "__name__", ""))
    if name.startswith("__i") and name != "__invert__":
        return f"__{name[3:]}"
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from tensors(value)
        elif isinstance(value, dict):
            yield from tensors(value.values())
