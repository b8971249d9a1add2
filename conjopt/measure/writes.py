"""Which of its own parameters a forward writes to, so that a replay can give it copies."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping

import torch
from torch import Tensor, nn

from conjopt.measure.shards import is_sharded

__all__ = ["Backup", "copies", "notice", "remember", "renormalised", "told", "versions", "written"]

# By model and mode, the names of parameters that a forward was seen to write to.
_SEEN: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, frozenset[str]]] = (
    weakref.WeakKeyDictionary()
)
_MOST_MODES = 64


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
    return _named(model, frozenset())


def written(model: nn.Module) -> dict[str, Tensor]:
    """Parameters that a forward writes to: `renormalised` ones, and those that it was seen to.

    Args:
        model: not the wrapper of torch.compile; in the mode that is asked about.

    Returns:
        by their names in `model.named_parameters()`.

    Example:
        >>> list(written(nn.Linear(2, 2)))
        []
    """
    return _named(model, (_seen(model) or {}).get(_mode(model), frozenset()))


def copies(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What to use in place of parameters: those given, and copies of those that are written to.

    Args:
        model: not the wrapper of torch.compile.
        parameters: by name, those that are replaced anyway.

    Example:
        >>> list(copies(nn.Embedding(3, 2, max_norm=1.0), {}))
        ['weight']
    """
    return {**parameters, **{n: _copy(parameters.get(n, p)) for n, p in written(model).items()}}


def told(model: nn.Module) -> bool:
    """Whether it is remembered what a forward of a model writes to, in the mode that it is in.

    Args:
        model: not the wrapper of torch.compile.

    Example:
        >>> told(nn.Linear(2, 2))
        False
    """
    seen = _seen(model)
    return seen is None or _mode(model) in seen


class Backup:
    """Copies of a model's parameters, to tell which of them a forward writes to, and to undo it.

    Told by their versions, their memory and, on a CPU, their values. Parameters that are sharded or
    not strided are left out.

    Args:
        model: not the wrapper of torch.compile.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> backup = Backup(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(2)
        >>> backup.undo()
        {'weight'}
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept: dict[str, tuple[Tensor, int, Tensor, Tensor]] = {}
        self._undone: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            if is_sharded(parameter) or isinstance(parameter, nn.UninitializedParameter):
                continue
            try:
                if parameter.layout is torch.strided:
                    data = parameter.data
                    self._kept[name] = parameter, _version(parameter), data, data.clone()
            except (RuntimeError, NotImplementedError):  # of an unusual kind
                continue

    @torch.no_grad()
    def undo(self) -> set[str]:
        """Write back what was there before, and return the names of what was written to."""
        for name, (parameter, version, data, copy) in self._kept.items():
            moved = parameter.data_ptr() != data.data_ptr()
            if moved or _version(parameter) != version or not _same(data, copy):
                self._undone[name] = parameter.detach().clone()
                if moved:
                    parameter.data = data
                data.copy_(copy)
        return set(self._undone)

    @torch.no_grad()
    def redo(self, names: Iterable[str]) -> None:
        """Write again what was undone.

        Args:
            names: of parameters.
        """
        for name in names:
            parameter, _, data, _ = self._kept[name]
            if data.shape == self._undone[name].shape:
                data.copy_(self._undone[name])
            else:
                parameter.data = self._undone[name]


def versions(model: nn.Module) -> list[int]:
    """Versions of a model's parameters, which torch counts writes by.

    Args:
        model: not the wrapper of torch.compile.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = versions(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(2)
        >>> [now - then for now, then in zip(versions(model), before, strict=True)]
        [1, 0]
    """
    return [_version(p) for m in model.modules() for p in m._parameters.values() if p is not None]


def notice(model: nn.Module, before: list[int]) -> None:
    """Remember which parameters a forward has written to.

    Args:
        model: not the wrapper of torch.compile.
        before: the `versions` before the forward.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = versions(model)
        >>> with torch.no_grad():
        ...     _ = model.weight.mul_(2)
        >>> notice(model, before)
        >>> list(written(model))
        ['weight']
    """
    after = versions(model)
    if after == before or len(after) != len(before):
        return
    own = [p for m in model.modules() for p in m._parameters.values() if p is not None]
    moved = {id(p) for p, old, new in zip(own, before, after, strict=True) if old != new}
    names = {name for name, p in model.named_parameters() if id(p) in moved}
    remember(model, names)


def _named(model: nn.Module, seen: frozenset[str]) -> dict[str, Tensor]:
    """Name the parameters that were seen to be written to, and the tables."""
    tables = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None
    }
    if not tables and not seen:
        return {}
    return {name: p for name, p in model.named_parameters() if id(p) in tables or name in seen}


def _seen(model: nn.Module) -> dict[Hashable, frozenset[str]] | None:
    try:
        return _SEEN.setdefault(model, {})
    except TypeError:  # a module that cannot be hashed or referred to weakly
        return None


def remember(model: nn.Module, names: Iterable[str]) -> None:
    """Remember that a forward was seen to write to some parameters, or to none, in this mode.

    Args:
        model: not the wrapper of torch.compile.
        names: of those parameters.

    Example:
        >>> remember(model := nn.Linear(2, 2), ["bias"])
        >>> list(written(model))
        ['bias']
    """
    mode = _mode(model)
    if (seen := _seen(model)) is not None:
        if len(seen) >= _MOST_MODES and mode not in seen:
            seen.clear()
        seen[mode] = seen.get(mode, frozenset()) | frozenset(names)


def _copy(tensor: Tensor) -> Tensor:
    copy = tensor.clone()
    if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
        copy = nn.Parameter(copy, requires_grad=False)  # a forward may assign it to itself
    return copy


def _mode(model: nn.Module) -> Hashable:
    return tuple([module.training for module in model.modules()])


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _same(data: Tensor, copy: Tensor) -> bool:
    if data.device.type != "cpu":  # would wait for it
        return True
    try:
        return torch.equal(data, copy) or not bool(copy.isfinite().all())
    except (RuntimeError, NotImplementedError):  # quantised, or of an unusual kind
        return True
