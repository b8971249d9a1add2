"""Mean losses of sets of samples in float64, and gradients of them, at given parameters."""

from __future__ import annotations

import collections
import contextlib
import contextvars
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.losses import potential_of
from conjopt.losses.reading import PotentialOf
from conjopt.measure.layers.tape import as_arguments, number_of_samples
from conjopt.measure.replay import REPLAYING, Replay, refuse_reentrant, with_tied
from conjopt.measure.writes import copies

__all__ = ["Point", "Risk", "Samples", "Sums"]

_ALIKE = 1e-9  # relative; two ways to sum float64 losses of a few samples differ by less
_TRIED = 8  # samples of which it is seen that their mean is what the criterion returns


class Sums(NamedTuple):
    """Of a set of samples: the sum of losses, and what it is to be divided by.

    Attributes:
        total: Sum of the losses.
        size: Samples, or whatever the criterion's mean divides by: elements, weights, tokens.
        outputs: Sum of the greatest magnitude of an output, weighed likewise. Rounding errors of
            a loss are of the size of its outputs and not of its value.
    """

    total: float
    size: float
    outputs: float

    @property
    def mean(self) -> float:
        """The mean loss; 0 if nothing counts."""
        return self.total / self.size if self.size > 0 else 0.0

    def without(self, part: Sums) -> Sums:
        """Return the sums of the rest, empty if no more than rounding is left."""
        rest = self.size - part.size
        if rest <= 1e-12 * self.size:
            return Sums(0.0, 0.0, 0.0)
        return Sums(self.total - part.total, rest, self.outputs - part.outputs)


class Point(NamedTuple):
    """Parameters and buffers in float64.

    Attributes:
        trained: Parameters that require gradients, copies.
        other: The rest.
        eps: Of the dtypes that the first have in the model.
    """

    trained: dict[str, Tensor]
    other: dict[str, Tensor]
    eps: dict[str, float]

    def equals(self, other: Point) -> bool:
        """Whether all are equal; waits for the device."""
        return all(
            mine.keys() == theirs.keys()
            and all(torch.equal(value, theirs[name]) for name, value in mine.items())
            for mine, theirs in ((self.trained, other.trained), (self.other, other.other))
        )


class Samples:
    """Inputs and targets that are cut along dimension 0.

    Args:
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        targets: Of the criterion.
        name: Of the caller, for errors.

    Attributes:
        count: How many.

    Raises:
        ValueError: Without a dimension of samples, for no samples, or for another number of
            targets.
    """

    def __init__(self, inputs: Any, targets: Any, name: str) -> None:
        self._args, self._kwargs = as_arguments(inputs)
        self._targets = targets
        self.count = number_of_samples(self._tensors((self._args, self._kwargs)))
        wanted = self._tensors(targets)
        if self.count == 0:
            raise ValueError(f"{name}: there are no samples: pass at least one")
        if not any(t.ndim and t.shape[0] == self.count for t in wanted):
            raise ValueError(
                f"{name}: {self.count} samples with targets of shapes "
                f"{[tuple(t.shape) for t in wanted]}: expected one target for each sample, both "
                "along dimension 0"
            )

    @staticmethod
    def _tensors(tree: Any) -> list[Tensor]:
        return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]

    def parts(
        self, chunk: int, rows: Tensor | None = None
    ) -> Iterator[tuple[tuple[Any, ...], dict[str, Any], Any, int]]:
        """Yield arguments, targets and number of samples of each chunk.

        Args:
            chunk: Samples at once.
            rows: Which to take, `(r,)`; all by default.
        """
        chosen = torch.arange(self.count) if rows is None else rows
        for index in chosen.split(chunk):
            args, kwargs, targets = self.take(index)
            yield args, kwargs, targets, len(index)

    def take(self, rows: Tensor) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
        """Return arguments and targets of some rows."""
        first, last = int(rows[0]), int(rows[-1]) + 1
        joined = last - first == len(rows) and bool((rows.diff() == 1).all())

        def cut(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or not leaf.ndim or leaf.shape[0] != self.count:
                return leaf
            return leaf[first:last] if joined else leaf[rows.to(leaf.device)]

        taken: tuple[tuple[Any, ...], dict[str, Any], Any] = tree_map(
            cut, (self._args, self._kwargs, self._targets)
        )
        return taken

    def keys(self) -> list[bytes]:
        """Return what tells a sample and its target from others, in float32."""
        digests = [hashlib.blake2b(digest_size=16) for _ in range(self.count)]
        for leaf in self._tensors((self._args, self._kwargs, self._targets)):
            if not leaf.ndim or leaf.shape[0] != self.count:
                continue
            values = leaf.detach().to("cpu")
            if values.is_floating_point():
                values = values.float() + 0.0  # one zero
            elif not values.is_complex():
                values = values.long()
            rows = np.ascontiguousarray(values.reshape(self.count, -1).numpy())
            for digest, row in zip(digests, rows, strict=True):
                digest.update(row.tobytes())
        return [digest.digest() for digest in digests]


class Risk:
    """The mean loss of samples as a function of the parameters, in float64.

    The model runs in the mode it is in, on copies of its buffers, outside of autocast, and what
    runs for it is hidden from `EnergyProbe`. Gradients are not stored on parameters.

    Args:
        model: Deterministic, and computes no sample's output from another sample.
        loss: A criterion that returns the sum or the mean of its samples' losses.
        chunk: Samples at once.
        name: Of the caller, for errors.
    """

    def __init__(self, model: nn.Module, loss: Any, chunk: int, name: str) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.loss, self.chunk, self.name = loss, chunk, name
        self.reduction = getattr(loss, "reduction", "mean")
        if self.reduction not in ("mean", "sum", "batchmean"):
            raise ValueError(
                f"{name}: the loss {loss!r} has reduction={self.reduction!r}, from which no mean "
                "over samples can be had: use reduction='mean' or 'sum'"
            )
        self.view = _view(loss)
        self._seen: set[tuple[bool, ...]] = set()

    def point(self) -> Point:
        """Return the parameters and buffers as they are, in float64."""
        trained: dict[str, Tensor] = {}
        other: dict[str, Tensor] = {}
        eps: dict[str, float] = {}
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "mps":
                raise ValueError(
                    f"{self.name}: parameters are on {parameter.device}, which has no float64: "
                    "move the model to the CPU"
                )
            into = trained if parameter.requires_grad else other
            into[name] = _double(parameter.detach(), copy=True)
            if parameter.requires_grad:
                eps[name] = torch.finfo(parameter.dtype).eps
        for name, buffer in self.model.named_buffers():
            other[name] = _double(buffer.detach(), copy=True)
        if not trained:
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} has no parameter that requires a "
                "gradient: there is nothing to keep account of"
            )
        return Point(trained, other, eps)

    def check(self, samples: Samples) -> None:
        """Refuse what has no deterministic mean over samples, once for each mode of the model.

        Args:
            samples: A few of them are tried.

        Raises:
            ValueError: With the reason and what to do.
        """
        modes = tuple(module.training for module in self.model.modules())
        if modes in self._seen:
            return
        self._refuse_layers()
        rows = torch.linspace(0, samples.count - 1, min(samples.count, _TRIED)).long()
        point = self.point()
        joint = self.sums(samples, point, rows)
        single = self._added([self.sums(samples, point, row) for row in rows.split(1)])
        scale = abs(joint.mean) + joint.outputs / max(joint.size, 1e-300)
        if not abs(joint.mean - single.mean) <= _ALIKE * scale:
            raise ValueError(
                f"{self.name}: the loss of {len(rows)} samples is {joint.mean:.6g}, but the mean "
                f"of their losses, one at a time, {single.mean:.6g}. Either the loss weighs them "
                "in a way that conjopt.losses.potential_of does not know: use reduction='sum'; or "
                "the model computes a sample's output from other samples: use model.eval()"
            )
        self._seen.add(modes)

    def _refuse_layers(self) -> None:
        for name, module in self.model.named_modules():
            kind = f"'{name}' ({type(module).__name__})"
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and (
                module.training or module.running_mean is None
            ):
                raise ValueError(
                    f"{self.name}: {kind} computes with statistics of the batch, so the loss of a "
                    "sample depends on the others, and Thm 3.1 does not hold: put it in eval mode, "
                    "with running statistics, or use GroupNorm"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p:
                raise ValueError(
                    f"{self.name}: {kind} draws random numbers, and Thm 3.1 needs a deterministic "
                    "model: put it in eval mode, or set its p to 0"
                )

    def sums(self, samples: Samples, point: Point, rows: Tensor | None = None) -> Sums:
        """Return the sums over samples.

        Args:
            samples: From which to take.
            point: Where.
            rows: Which to take; all by default.
        """
        with torch.no_grad(), self._aside():
            return self._added(
                [self._run(part, point)[1] for part in samples.parts(self.chunk, rows)]
            )

    def gradient(self, samples: Samples, point: Point) -> tuple[Sums, dict[str, Tensor]]:
        """Return the sums over all samples and the gradient of the mean, by name."""
        names, leaves = list(point.trained), [t.detach() for t in point.trained.values()]
        gradients = [torch.zeros_like(leaf) for leaf in leaves]
        found = []
        with torch.enable_grad(), self._aside():
            for part in samples.parts(self.chunk):
                wanted = [leaf.clone().requires_grad_() for leaf in leaves]
                at = point._replace(trained=dict(zip(names, wanted, strict=True)))
                total, sums = self._run(part, at)
                found.append(sums)
                if not total.requires_grad:
                    continue
                refuse_reentrant([total])
                for into, g in zip(
                    gradients, torch.autograd.grad(total, wanted, allow_unused=True), strict=True
                ):
                    if g is not None:
                        into += g
        sums = self._added(found)
        scale = 1 / sums.size if sums.size > 0 else 0.0
        return sums, {name: scale * g for name, g in zip(names, gradients, strict=True)}

    @staticmethod
    def _added(parts: list[Sums]) -> Sums:
        return Sums(*(sum(values) for values in zip(*parts, strict=True)))

    def _run(self, part: tuple[Any, Any, Any, int], point: Point) -> tuple[Tensor, Sums]:
        """Return the sum of the losses with its graph, and the sums."""
        *trees, count = part
        device = next(iter(point.trained.values())).device
        # Copies, as a model may write to its inputs.
        args, kwargs, targets = tree_map(lambda leaf: _double(leaf, device, copy=True), trees)
        before = Replay.random_state(self.model)
        # Copies of what the forward writes to, as far as a replay has told.
        tensors = copies(self.model, {**point.other, **point.trained})
        tensors = with_tied(self.model, tensors)
        outputs = functional_call(self.model, tensors, args, kwargs, tie_weights=False)
        if not _equal(before, Replay.random_state(self.model)):
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} draws random numbers, and Thm 3.1 needs "
                "a deterministic model: use model.eval(), or take what draws them out"
            )
        if isinstance(outputs, Tensor) and outputs.dtype != torch.float64:
            raise ValueError(
                f"{self.name}: {type(self.model).__name__} returned {outputs.dtype} for float64 "
                "inputs, parameters and buffers: take casts such as .float() out of its forward"
            )
        value = self._criterion(outputs, targets)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(
                f"{self.name}: the loss returned {shape}, from which no mean over samples can be "
                "had: expected one number, the mean or the sum of the samples' losses"
            )
        divisor = float(count)
        if self.view is not None and self.reduction == "mean":
            divisor = float(self.view._divisor(outputs, targets))
        total = value.reshape(())
        if self.reduction != "sum":
            total = total * divisor if divisor > 0 else torch.zeros_like(total)
        leaves = [t.detach() for t in tree_leaves(outputs) if isinstance(t, Tensor)]
        greatest = max((float(t.abs().amax()) for t in leaves if t.numel()), default=0.0)
        return total, Sums(float(total.detach()), divisor, greatest * divisor)

    def _criterion(self, outputs: Any, targets: Any) -> Any:
        if not isinstance(self.loss, nn.Module):
            return self.loss(outputs, targets)
        state = {**dict(self.loss.named_parameters()), **dict(self.loss.named_buffers())}
        doubled = {name: _double(tensor.detach(), copy=True) for name, tensor in state.items()}
        return functional_call(self.loss, doubled, (outputs, targets))

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """Leave generators alone, and autocast and probes aside."""
        devices = {t.device for t in self.model.parameters()}
        indices = [device.index for device in devices if device.type == "cuda"]
        token: contextvars.Token[bool] = REPLAYING.set(True)
        try:
            with contextlib.ExitStack() as stack:
                stack.enter_context(torch.random.fork_rng(indices, enabled=True))
                for kind in {device.type for device in devices}:
                    stack.enter_context(torch.autocast(kind, enabled=False))
                yield
        finally:
            REPLAYING.reset(token)


def beyond(batch: list[bytes], whole: Mapping[bytes, int]) -> int:
    """Return how many samples of a batch are not among those of a set, or more often."""
    return sum((collections.Counter(batch) - collections.Counter(whole)).values())


def _view(loss: Any) -> PotentialOf | None:
    try:
        return potential_of(loss)
    except (TypeError, ValueError):  # its mean is tried in `check`
        return None


def _double(leaf: Any, device: torch.device | None = None, *, copy: bool = False) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    dtype = torch.float64 if leaf.is_floating_point() else leaf.dtype
    return leaf.to(device=device, dtype=dtype, copy=copy)


def _equal(a: Any, b: Any) -> bool:
    return torch.equal(a[0], b[0]) and all(torch.equal(a[1][d], b[1][d]) for d in a[1])
