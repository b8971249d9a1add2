"""Structure matrices of small models through the whole Jacobian.

Where the Jacobian of a batch is small, calls are what takes time, and the fewest are those of one
forward and one backward, vectorised by `torch.func.vmap` over samples and over cotangents. That
sees neither coupled samples nor parameters out of sight, and not every function is vectorised
rightly. So this is a second way, open to a model and a kind of inputs that went the first one,
through the layers (`conjopt.measure.structure`), and with the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
import weakref
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules import module as nn_module
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from conjopt.measure.replay import compiled_parts, with_tied
from conjopt.measure.shards import is_sharded
from conjopt.measure.writes import written

__all__ = ["ATTENDING", "PART", "SMALL", "TOGETHER", "Shortcut"]

# Entries of a Jacobian up to which what both ways take was measured (`conjopt.measure.costs`).
SMALL = 2**22
# Those of one of all samples that are needed at once, which stays in the cache of a core.
TOGETHER = 2**19
# The same with multi-head attention, which the way through the layers computes twice.
ATTENDING = 2**22
# Entries of a part of the samples, where there are more: the calls for a part, some milliseconds,
# are little beside its arithmetic. Narrow convolutions are taken up to here, in one part: both ways
# do the same arithmetic, and this one in fewer passes over what arrives at the layers.
PART = 2**24
_FEWEST = 16  # samples that have to fit into a part; with fewer, large layers are faster
_MOST_KINDS = 64  # that are tried of a model


class _Known(NamedTuple):
    """How a way that is open goes."""

    like: Tensor | None  # the outputs; `None` where the way is closed
    plain: bool  # without fused kernels of attention
    part: int  # entries of the Jacobian of a part of the samples
    narrow: bool  # of narrow convolutions
    size: float  # bytes that the gradients of the layers take


# By model and kind.
_SETTLED: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, _Known]] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(eq=False)
class Shortcut:
    """The way through the whole Jacobian, for one model and one batch, and whether to take it.

    It is for one tensor of inputs on a CPU, with all samples along dimension 0. A model is tried
    once for inputs of a shape, in a mode, with the same parts and parameters trained. Hooks,
    compiled, scripted and sharded parts, a forward that writes to parameters, autocast and random
    numbers close it.

    Attributes:
        name: Of the function that measures.
        model: The module.
        inputs: Of the model.
        narrow: Whether it fits as narrow convolutions.

    Example:
        >>> model, x = nn.Linear(2, 3), torch.tensor([[3.0, 4.0]])
        >>> shortcut = Shortcut("example", model, x)
        >>> weight, bias = shortcut.jacobian(torch.eye(3), torch.empty(1, 3), range(1))
        >>> weight.shape, bias.shape
        (torch.Size([1, 3, 6]), torch.Size([1, 3, 3]))
        >>> weight @ weight.mT + bias @ bias.mT  # ||x||^2 + 1
        tensor([[[26.,  0.,  0.],
                 [ 0., 26.,  0.],
                 [ 0.,  0., 26.]]])
        >>> shortcut.like is None  # nothing was compared yet
        True
        >>> shortcut.settle(torch.empty(1, 3))
        >>> shortcut.like.shape
        torch.Size([1, 3])
    """

    name: str
    model: nn.Module
    inputs: Tensor

    def __post_init__(self) -> None:
        self._trained: dict[str, Tensor] = {}
        self._buffers: dict[str, Tensor] = {}
        self._tied = False  # a tensor with several names
        self._key = self._kind()
        self._known: dict[Hashable, _Known] = {}
        if self._key is not None:
            try:
                self._known = _SETTLED.setdefault(self.model, {})
            except TypeError:  # a module that cannot be hashed or referred to weakly
                self._key = None
        known = self._known.get(self._key)
        self._plain = known is not None and known.plain
        self._part = SMALL if known is None else known.part
        self.narrow = known is not None and known.narrow

    @property
    def like(self) -> Tensor | None:
        """A tensor like the outputs where the way is open, else `None`."""
        known = self._known.get(self._key)
        return None if known is None else known.like

    @property
    def size(self) -> float:
        """Bytes that the gradients of the layers take, as estimated when it was settled; else 0."""
        known = self._known.get(self._key)
        return 0 if known is None else known.size

    @property
    def untried(self) -> bool:
        """Whether it is still to be settled."""
        new = self._key is not None and self._key not in self._known
        return new and len(self._known) < _MOST_KINDS

    def parts(self, outputs: int, most: float) -> list[range]:
        """Split the samples into parts, whose Jacobians are taken one after the other.

        The first part is of the least and the last of the greatest size, and there are no others.

        Args:
            outputs: `d`.
            most: Entries of a Jacobian that there is memory for.

        Returns:
            The samples of each part; nothing if there is not the memory, or there are no entries.
        """
        m, entries = len(self.inputs), self._entries(outputs)
        number = math.ceil(entries / self._part)
        if not 0 < math.ceil(m / max(1, number)) * (entries // m) <= most:
            return []
        return [range(i * m // number, (i + 1) * m // number) for i in range(number)]

    def fits(
        self, like: Tensor, *, attending: bool, narrow: bool, shorter: bool, together: bool
    ) -> bool:
        """Whether the whole Jacobian is the shorter way, and the model one that may be tried.

        Args:
            like: A tensor like the outputs, `(m, ...)`.
            attending: Whether the model calls multi-head attention.
            narrow: Whether convolutions' gradients are best taken whole (`costs.py`).
            shorter: Whether it is estimated to be (`costs.py`).
            together: Whether the Jacobian of all samples is needed at once.
        """
        m, entries = len(self.inputs), self._entries(math.prod(like.shape[1:]))
        small = TOGETHER if together else SMALL if shorter else 0
        one = entries <= (PART if narrow else ATTENDING if attending else small)
        self._part = PART if attending or narrow else SMALL
        self.narrow = narrow
        many = attending and _FEWEST * entries <= m * PART
        return (
            entries > 0
            and (one or (many and not together))
            and like.device.type == "cpu"
            and not written(self.model)
            and not compiled_parts(self.model)
            and not any(isinstance(m, torch.jit.ScriptModule) for m in self.model.modules())
            and not any(is_sharded(p) for p in self.model.parameters())
        )

    def _entries(self, outputs: int) -> int:
        """Return the number of entries of the Jacobian of all samples."""
        trained = sum(parameter.numel() for parameter in self._trained.values())
        return len(self.inputs) * outputs * trained

    def jacobian(self, basis: Tensor, like: Tensor, rows: range) -> list[Tensor] | None:
        """Return the Jacobian of some samples in the parameters that are trained.

        Args:
            basis: Cotangents of a sample's outputs, `(d, k)`.
            like: A tensor like the outputs, `(m, ...)`.
            rows: The samples, that follow each other.

        Returns:
            For each parameter its columns, `(len(rows), d, entries)`, float32 or wider; `None` if
            the model cannot be called like this, returns something else, or numbers that are not
            finite.
        """
        model, d, one = self.model, len(basis), (1, *like.shape[1:])
        names, trained = list(self._trained), [p.detach() for p in self._trained.values()]
        buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}

        def pulled(sample: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
            def run(*parameters: Tensor) -> Tensor:
                tensors = {**buffers, **dict(zip(names, parameters, strict=True))}
                inputs = (sample.unsqueeze(0),)
                if self._tied:
                    tensors = with_tied(model, tensors)
                output = functional_call(model, tensors, inputs, tie_weights=False)
                if type(output) is not Tensor or output.shape != one or output.dtype != like.dtype:
                    raise ValueError("another output than before")
                return output

            pull: Any
            output, pull = vjp(run, *trained)  # type: ignore[misc]  # a third with has_aux
            if d == 1:  # saves the calls of a second vmap
                return output, tuple(g.unsqueeze(0) for g in pull(cotangents[0]))
            return output, vmap(pull)(cotangents)

        cotangents = basis.reshape(d, *one)
        try:
            with sdpa_kernel(SDPBackend.MATH) if self._plain else contextlib.nullcontext():
                outputs, found = vmap(pulled)(self.inputs[rows.start : rows.stop].detach().clone())
        except Exception:  # random numbers, a choice by values, something written to, no rule
            return None
        if not outputs.isfinite().all():
            return None
        wide = torch.promote_types(like.dtype, torch.float32)
        return [g.flatten(2).to(wide) for g in found]

    def tried(self, basis: Tensor, like: Tensor, rows: range) -> list[Tensor] | None:
        """Return the Jacobian, and `None` too if torch warns or the model keeps what it computed.

        What is not vectorised but called one by one, torch warns of; fused attention is.

        Args:
            basis: See `jacobian`.
            like: See `jacobian`.
            rows: See `jacobian`.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = self.jacobian(basis, like, rows)
            if found is None:
                self._plain = True
                found = self.jacobian(basis, like, rows)
        return None if self.keeps() else found

    def keeps(self) -> bool:
        """Whether tensors of a vectorised call are left in the model."""
        return any(
            isinstance(leaf, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(leaf)
            for module in self.model.modules()
            for leaf in tree_leaves(list(vars(module).values()))
        )

    def settle(self, like: Tensor | None, *, size: float = 0) -> None:
        """Remember that both ways gave the same, or that this one is closed.

        Args:
            like: A tensor like the outputs, `(m, ...)`; `None` to close it.
            size: Bytes that the gradients of the layers take.
        """
        if self._key is not None:
            known = _Known(like, self._plain, self._part, self.narrow, size)
            self._known[self._key] = known

    def _kind(self) -> Hashable:
        """Return all that a comparison holds for, `None` where the way is closed."""
        x = self.inputs
        if (
            x.device.type != "cpu"
            or torch.is_autocast_enabled("cpu")
            or torch.is_inference_mode_enabled()
            or parametrize._cache_enabled
            or nn_module._has_any_global_hook()
        ):
            return None
        parts: list[Hashable] = [self.name, x.shape, x.dtype]
        seen: set[int] = set()
        for prefix, module in self.model.named_modules():
            if (
                module._forward_hooks
                or module._forward_pre_hooks
                or module._backward_hooks
                or module._backward_pre_hooks
            ):
                return None
            parts += (id(module), module.training)
            for tensors, kept in (
                (module._parameters, self._trained),
                (module._buffers, self._buffers),
            ):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    parts += (tensor.shape, tensor.requires_grad)
                    if id(tensor) in seen:
                        self._tied = True
                    elif tensor.requires_grad or tensors is module._buffers:
                        kept[f"{prefix}.{name}" if prefix else name] = tensor
                    seen.add(id(tensor))
        return tuple(parts)
