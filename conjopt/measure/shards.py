"""Parameters of which every process holds a shard, as FSDP2 (`fully_shard`) leaves them.

They are ``DTensor``s: what is done entry by entry is done to the shards, and what is one number of
all entries, or needs whole matrices, goes through the functions here, which are collectives.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "group_of",
    "holds_back",
    "is_sharded",
    "local",
    "moved_in_place",
    "reshard",
    "sharded_as",
    "sum_over_shards",
    "total_norm",
    "whole",
]


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a ``DTensor``; none exists before its module, slow to load, is there.

    Args:
        tensor: a parameter, a gradient, or anything computed from them.

    Example:
        >>> is_sharded(torch.ones(2))
        False
    """
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's shard, which shares the memory of the tensor; a plain tensor itself.

    Args:
        tensor: of any kind.

    Example:
        >>> local(torch.ones(2))
        tensor([1., 1.])
    """
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The gathered tensor on every process; a plain tensor itself.

    Args:
        tensor: of any kind.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def sharded_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, sharded in the way of another; nothing is sent.

    Args:
        tensor: the same on all processes.
        like: of the same shape.

    Example:
        >>> sharded_as(torch.ones(2), torch.zeros(2))
        tensor([1., 1.])
    """
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    other: Any = like
    mesh = other.device_mesh
    everywhere = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(placements=other.placements)


def group_of(parameters: Iterable[Tensor]) -> Any:
    """The process group that sharded parameters' gradients are averaged over.

    Args:
        parameters: of a model.

    Returns:
        the group, or None if none of them is sharded.

    Raises:
        ValueError: if some are sharded and some not, or differently, or the mesh of several
            dimensions is not that of all processes; it says what to do.

    Example:
        >>> group_of(nn.Linear(2, 3).parameters()) is None
        True
    """
    every: list[Any] = list(parameters)
    sharded = [p for p in every if is_sharded(p)]
    if not sharded:
        return None
    mesh = sharded[0].device_mesh
    if len(sharded) < len(every) or any(p.device_mesh != mesh for p in sharded):
        raise ValueError(
            f"{len(sharded)} of {len(every)} parameters are sharded, or they are over different "
            "meshes; expected all over the same one: call fully_shard on the whole model last, "
            "before the optimizer is made"
        )
    for parameter in sharded:
        _sharding(parameter)
    if mesh.ndim == 1:
        return mesh.get_group()
    if mesh.size() == dist.get_world_size():
        return dist.group.WORLD
    raise ValueError(
        f"the parameters are sharded over a mesh {tuple(mesh.shape)} that is not all of the "
        f"{dist.get_world_size()} processes; give process_group=, whose ranks the gradients are "
        "averaged over"
    )


def sum_over_shards(values: Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """Numbers of shards, such as inner products, summed up to those of the whole tensors.

    Args:
        values: of any shape, from the shards of this process.
        tensors: that they are of.

    Example:
        >>> sum_over_shards(torch.tensor(2.0), [torch.ones(2)])
        tensor(2.)
    """
    if not is_sharded(tensors[0]):
        return values
    summed = values.clone()
    dist.all_reduce(summed, group=_sharding(tensors[0]))
    return summed


def total_norm(
    tensors: Sequence[Tensor], order: float = 2.0, foreach: bool | None = None
) -> Tensor:
    """() norm of all entries of all tensors together; not finite if any entry is not.

    Args:
        tensors: sharded all alike, or none of them.
        order: 2 or infinity.
        foreach: multi-tensor kernels for plain tensors; None for on a GPU.

    Example:
        >>> total_norm([torch.tensor([3.0]), torch.tensor([4.0])])
        tensor(5.)
    """
    if not is_sharded(tensors[0]):
        return _total_norm(tensors, order, foreach)
    shards = [
        shard for t in tensors if (shard := local(t)).numel()
    ]  # a short tensor leaves some empty
    group = _sharding(tensors[0])
    own = torch.zeros((), dtype=tensors[0].dtype, device=local(tensors[0]).device)
    if shards:
        own = _total_norm(shards, order, foreach)
    # Each rank's own in a place of its own, as a maximum over ranks may lose what is not a number.
    every = own.new_zeros(dist.get_world_size(group))
    every[dist.get_rank(group)] = own
    dist.all_reduce(every, group=group)
    return every.max() if math.isinf(order) else torch.linalg.vector_norm(every, order)


def holds_back(model: nn.Module) -> bool:
    """Whether backward passes leave ``.grad`` for later: ``set_requires_gradient_sync(False)``.

    Args:
        model: sharded by `fully_shard` or not.

    Example:
        >>> holds_back(nn.Linear(2, 3))
        False
    """
    groups = [group for part in _parts(model) for group in _groups(part)]
    return any(not getattr(group, "reduce_grads", True) for group in groups)


def reshard(model: nn.Module) -> None:
    """Drop the gathered parameters that a forward may have left, which shards are newer than.

    Args:
        model: sharded by `fully_shard` or not.

    Example:
        >>> reshard(nn.Linear(2, 3))
    """
    for part in _parts(model):
        for group in _groups(part):
            # A forward that failed leaves its state, in which the gathered parameters would stay.
            state = getattr(group, "_training_state", None)
            if state is not None:
                group._training_state = type(state).IDLE
        part.reshard()


@contextlib.contextmanager
def moved_in_place(
    model: nn.Module, parameters: Mapping[str, Tensor]
) -> Iterator[Mapping[str, Tensor]]:
    """Put sharded values in the place of the model's own inside the block, and these back after it.

    The forward of FSDP gathers the model's own parameters, whatever a functional call puts there.

    Args:
        model: whose parameters are meant.
        parameters: by name, of any kind.

    Yields:
        those that are not sharded, left to the caller.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with moved_in_place(model, {"bias": torch.ones(1)}) as rest:
        ...     print(list(rest))
        ['bias']
    """
    new = {name: value for name, value in parameters.items() if is_sharded(value)}
    if not new and not any(is_sharded(p) for p in model.parameters()):
        yield parameters
        return
    reshard(model)
    own = {name: p for name, p in model.named_parameters() if name in new}
    moved = {name: value for name, value in new.items() if value is not own[name]}
    before = {name: local(own[name].detach()).clone() for name in moved}
    with torch.no_grad():
        for name, value in moved.items():
            local(own[name].detach()).copy_(local(value))
    try:
        yield {name: value for name, value in parameters.items() if name not in new}
    finally:
        reshard(model)
        with torch.no_grad():
            for name, value in before.items():
                local(own[name].detach()).copy_(value)


def _total_norm(tensors: Sequence[Tensor], order: float, foreach: bool | None) -> Tensor:
    if math.isinf(order) and not foreach and tensors[0].device.type == "cpu":
        # Several times faster than torch's maximum norm there; NaN comes through as well.
        ends = [torch.aminmax(t) for t in tensors]
        return torch.stack([end for pair in ends for end in pair]).abs().max()
    return torch.nn.utils.get_total_norm(tensors, order, foreach=foreach)


def _parts(model: nn.Module) -> list[Any]:
    """The modules that `fully_shard` was called on."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [part for part in model.modules() if isinstance(part, kind)]


def _groups(part: Any) -> list[Any]:
    """What torch keeps of the parameters of one of them; torch itself tells nobody."""
    state = part._get_fsdp_state()
    several = getattr(state, "_fsdp_param_groups", None)  # from torch 2.10 or so on
    return [getattr(state, "_fsdp_param_group", None)] if several is None else list(several)


def _sharding(tensor: Tensor) -> Any:
    """The process group over which a tensor is in shards."""
    sharded: Any = tensor
    along = [i for i, placement in enumerate(sharded.placements) if placement.is_shard()]
    if len(along) != 1 or any(placement.is_partial() for placement in sharded.placements):
        raise ValueError(
            f"a parameter of shape {tuple(tensor.shape)} is laid out as {sharded.placements}, "
            "expected shards along one dimension of the mesh, as fully_shard makes them; tensor "
            "parallel layouts are not supported"
        )
    return sharded.device_mesh.get_group(along[0])
