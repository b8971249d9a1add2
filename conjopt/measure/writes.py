"""What a forward writes to of its own model: parameters, and attributes of its modules."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterable, Iterator, Mapping
from operator import is_

import torch
from torch import Tensor, nn

from conjopt.measure.shards import is_sharded

__all__ = ["Attributes", "renormalised", "told", "untouched", "written"]

# By model and mode, the names of parameters that a forward was seen to write to.
_SEEN: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, frozenset[str]]] = (
    weakref.WeakKeyDictionary()
)


def renormalised(model: nn.Module) -> dict[str, Tensor]:
    """Tables of embeddings with a `max_norm`, which a forward writes to.

    Args:
        model: not the wrapper of torch.compile.

    Returns:
        by their names in `model.named_parameters()`.

    Example:
        >>> list(renormalised(nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 2))))
        ['0.weight']
    """
    return _named(model, model.modules(), frozenset())


def told(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> bool:
    """Whether `untouched` has seen a forward of a model, in the mode that it is in, or never will.

    Args:
        model: not the wrapper of torch.compile.
        modules: of the model, where they are at hand.

    Example:
        >>> told(nn.Linear(2, 2))
        False
    """
    modules = list(model.modules() if modules is None else modules)
    seen = _seen(model)
    return seen is None or _mode(modules) in seen or not _can_be_told(modules)


def written(model: nn.Module, modules: Iterable[nn.Module] | None = None) -> dict[str, Tensor]:
    """Parameters that a forward writes to: `renormalised` ones, and what `untouched` has seen.

    Args:
        model: not the wrapper of torch.compile; in the mode that is asked about.
        modules: of the model, where they are at hand.

    Returns:
        by their names in `model.named_parameters()`.

    Example:
        >>> list(written(nn.Linear(2, 2)))
        []
    """
    modules = list(model.modules() if modules is None else modules)
    return _named(model, modules, (_seen(model) or {}).get(_mode(modules), frozenset()))


class Attributes:
    """What the attributes of modules refer to, to be given back: counters, flags, states.

    Args:
        modules: whose attributes to keep.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.calls = 0
        >>> attributes = Attributes([model])
        >>> model.calls, model.more = 1, 2
        >>> attributes.restore()
        >>> model.calls, hasattr(model, "more")
        (0, False)
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._before = [(now := vars(module), now.copy()) for module in modules]

    def restore(self) -> None:
        """Give them back; what is written into an object that stays the same one is not."""
        for now, then in self._before:
            if len(now) != len(then) or not all(map(is_, now.values(), then.values())):
                for name in set(now) - set(then):
                    del now[name]
                now.update(then)


@contextlib.contextmanager
def untouched(
    model: nn.Module, parameters: Mapping[str, Tensor], *, copy: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Yield what a forward is to use in place of parameters, so that it leaves the model alone.

    Those that it writes to are replaced by copies. The first forward of a model in a mode has
    copies of all, and which of them it wrote to is remembered: by their versions, their memory
    and, on a CPU, their values. Attributes of modules, as counters, flags and states are, are given
    back what they referred to; not those of torch's distributed engines.

    Args:
        model: not the wrapper of torch.compile.
        parameters: by name, those that are replaced anyway.
        copy: whether to copy, or else only to remember writes to the model's own parameters.

    Raises:
        RuntimeError: if the forward assigns to a parameter.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model.calls = 0
        >>> with untouched(model, {}) as parameters, torch.no_grad():
        ...     model.calls += 1
        ...     _ = parameters["weight"].mul_(2)
        >>> model.calls, list(written(model))
        (0, ['weight'])
    """
    modules = list(model.modules())  # once, as measuring steps come here
    attributes = Attributes(m for m in modules if not _is_foreign(m))
    own = [p for m in modules for p in m._parameters.values() if p is not None]
    versions = [_version(p) for p in own]
    first = copy and not told(model, modules)
    copies: dict[str, tuple[Tensor, Tensor, tuple[int, int]]] = {}
    if copy:
        for name, p in (
            dict(model.named_parameters()) if first else written(model, modules)
        ).items():
            given = parameters.get(name, p)
            copies[name] = _copy(given), given, (0, 0)
    if first:
        copies = {name: (c, given, _state(c)) for name, (c, given, _) in copies.items()}
    try:
        yield {**parameters, **{name: c for name, (c, *_) in copies.items()}}
    except (TypeError, ValueError) as error:
        if "parameter '" not in str(error):
            raise
        raise RuntimeError(
            f"The forward of {type(model).__name__} assigns to a parameter, as in `self.weight "
            "*= 0.9`, and so cannot run with others: write to it, as in `self.weight.mul_(0.9)`"
        ) from error
    finally:
        attributes.restore()
    changed = [_version(p) for p in own] != versions
    if first or changed:
        found = {
            n for n, (c, g, s) in copies.items() if first and not (_state(c) == s and _same(c, g))
        }
        moved = {id(p) for p, version in zip(own, versions, strict=True) if _version(p) != version}
        found |= {name for name, p in model.named_parameters() if id(p) in moved}
        if (seen := _seen(model)) is not None and (first or found):
            mode = _mode(modules)
            seen[mode] = seen.get(mode, frozenset()) | found


def _seen(model: nn.Module) -> dict[Hashable, frozenset[str]] | None:
    try:
        return _SEEN.setdefault(model, {})
    except TypeError:  # a module that cannot be hashed or referred to weakly
        return None


def _mode(modules: Iterable[nn.Module]) -> Hashable:
    return tuple([module.training for module in modules])


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    copy._is_param = True  # so that a module lets it be assigned
    return copy


def _named(
    model: nn.Module, modules: Iterable[nn.Module], seen: frozenset[str]
) -> dict[str, Tensor]:
    """Name the parameters that were seen to be written to, and the tables."""
    tables = {
        id(module.weight)
        for module in modules
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }
    if not tables and not seen:
        return {}
    return {name: p for name, p in model.named_parameters() if id(p) in tables or name in seen}


def _can_be_told(modules: list[nn.Module]) -> bool:
    """Whether all parameters can be replaced in a forward by copies, and those be compared."""
    transformed = torch._C._functorch.peek_interpreter_stack() is not None
    return (
        not transformed
        and not any(map(_is_foreign, modules))
        and not any(
            is_sharded(p) or p.is_sparse or isinstance(p, nn.UninitializedParameter)
            for module in modules
            for p in module._parameters.values()
            if p is not None
        )
    )


def _is_foreign(module: nn.Module) -> bool:
    home = type(module).__module__
    return isinstance(module, torch.jit.ScriptModule) or home.startswith(
        ("torch.nn.parallel", "torch.distributed")
    )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _state(copy: Tensor) -> tuple[int, int]:
    return _version(copy), copy.data_ptr()


def _same(copy: Tensor, given: Tensor) -> bool:
    if copy.device.type != "cpu":  # would wait for it
        return True
    return torch.equal(copy, given) or not bool(given.isfinite().all())
