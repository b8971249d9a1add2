"""Reading a loader without leaving a trace: outputs and targets of what is seen, and a probe."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.measure.layers.tape import as_arguments
from conjopt.measure.replay import Replay

__all__ = ["Seen", "batches", "digest", "joined", "read", "taken", "untouched"]

MOST_OUTPUTS = 2**26  # numbers that the outputs of all samples seen may take


@dataclasses.dataclass(frozen=True)
class Seen:
    """What was read of a loader.

    Attributes:
        outputs: Of all samples seen, without a graph.
        targets: As the criterion takes them.
        inputs: Of the probe alone.
        probe: Which samples these are, `(m,)`, ascending.
        groups: Equal for samples with equal inputs, `(n,)`, numbered from 0.
        complete: Whether the loader ended before the limit.
        batch_size: Samples of the first batch.
    """

    outputs: Tensor
    targets: Tensor
    inputs: Any
    probe: Tensor
    groups: Tensor
    complete: bool
    batch_size: int


def read(model: nn.Module, loader: Any, *, samples: int, limit: int, seed: int) -> Seen:
    """Run the model on up to `limit` samples, and keep the inputs of some drawn evenly.

    Args:
        model: In the mode it is to run in.
        loader: Of batches `(inputs, targets)`.
        samples: How many inputs to keep.
        limit: How many samples to look at.
        seed: Of the draw.

    Returns:
        What was seen.

    Raises:
        TypeError: For batches that are no pairs of inputs and targets.
        ValueError: For a loader without samples, and batches that do not fit together.
    """
    draw, kept = random.Random(seed), {}  # a reservoir: place -> (number, inputs)
    outputs: list[Tensor] = []
    targets: list[Tensor] = []
    digests: list[bytes] = []
    complete = True
    for x, f, y, rows in batches(model, loader, "diagnose"):
        count = len(f)
        room = min(limit - len(digests), MOST_OUTPUTS // max(1, f[:1].numel()) - len(digests))
        complete = count <= room
        take = min(count, room)
        for i in range(take):
            number = len(digests) + i
            place = number if number < samples else draw.randint(0, number)
            if place < samples:
                kept[place] = (number, tree_map(partial(_one, i=i, count=count), x))
        digests += [digest(rows, i) for i in range(take)]
        outputs.append(f[:take].detach())
        targets.append(y[:take].to(f.device))
        if not complete:
            break
    f, y = joined(outputs, targets, "diagnose")
    names: dict[bytes, int] = {}
    groups = torch.tensor([names.setdefault(digest, len(names)) for digest in digests])
    chosen = sorted(kept.values(), key=lambda pair: pair[0])
    inputs = tree_map(_stacked, *(sample for _, sample in chosen))
    probe = torch.tensor([number for number, _ in chosen], device=f.device)
    return Seen(
        outputs=f,
        targets=y,
        inputs=inputs,
        probe=probe,
        groups=groups.to(f.device),
        complete=complete,
        batch_size=len(outputs[0]),
    )


Bytes = list[np.ndarray[Any, Any]]  # of samples, `(count, bytes)` for each tensor of inputs


def batches(
    model: nn.Module, loader: Any, name: str
) -> Iterator[tuple[Any, Tensor, Tensor, Bytes]]:
    """Run the model on each batch, without a trace on its buffers.

    Args:
        model: In the mode it is to run in.
        loader: Of batches `(inputs, targets)`.
        name: Of the caller, for errors.

    Yields:
        Inputs on the model's device, outputs, targets, and the bytes of the inputs.

    Raises:
        TypeError: For batches that are no pairs of inputs and targets.
        ValueError: For outputs, inputs and targets that do not fit together.
    """
    device = next((t.device for t in chain(model.parameters(), model.buffers())), None)
    for batch in _iterate(loader, name):
        x, y = _pair(batch, name)
        x = tree_map(lambda t: t.to(device) if isinstance(t, Tensor) else t, x)
        args, kwargs = as_arguments(x)
        with torch.no_grad():
            found = Replay(model, args, kwargs, Replay.random_state(model)).run({})
        if len(found) != 1 or found[0] is None or not found[0].ndim:
            raise ValueError(
                f"{name}: {type(model).__name__} returned {len(found)} values, expected one "
                "floating-point tensor with samples along dimension 0; wrap the model in a module "
                "that returns what the loss is given."
            )
        f = found[0]
        if not y.ndim or len(y) != len(f):
            raise ValueError(
                f"{name}: outputs of shape {tuple(f.shape)} came with targets of shape "
                f"{tuple(y.shape)}, expected as many samples along dimension 0 of both."
            )
        yield x, f, y, _rows(x, len(f), name)


def joined(outputs: list[Tensor], targets: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
    """Join what batches gave; refuse none, and those of different shapes.

    Args:
        outputs: Of each batch.
        targets: Of each batch.
        name: Of the caller, for errors.

    Returns:
        Outputs and targets of all samples.

    Raises:
        ValueError: If they cannot be joined.
    """
    if not sum(map(len, outputs)):
        raise ValueError(
            f"{name}: the loader gave no samples; expected at least one batch (inputs, targets). "
            "A generator that was used up is empty, too: pass a DataLoader or a list of batches."
        )
    if len({t.shape[1:] for t in outputs}) > 1 or len({t.shape[1:] for t in targets}) > 1:
        raise ValueError(
            f"{name}: outputs or targets of the batches have different shapes beyond dimension "
            "0; pad sequences to one length, with targets that the loss ignores."
        )
    return torch.cat(outputs), torch.cat(targets)


def _iterate(loader: Any, name: str) -> Iterator[Any]:
    if isinstance(loader, Tensor | Mapping | str) or not isinstance(loader, Iterable):
        raise TypeError(
            f"{name}: the loader is a {type(loader).__name__}, expected a DataLoader or another "
            "iterable of batches (inputs, targets); give a single batch as [(inputs, targets)]."
        )
    return iter(loader)


def _pair(batch: Any, name: str) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        raise TypeError(
            f"{name}: a batch is a dict with the keys {sorted(map(str, batch))}, in which inputs "
            "and targets cannot be told apart; pass pairs, such as "
            '[(batch["inputs"], batch["targets"]) for batch in loader].'
        )
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        shape = f" of length {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise TypeError(
            f"{name}: a batch is a {type(batch).__name__}{shape}, expected a pair (inputs, "
            "targets) with the targets in one tensor; inputs are a tensor, or a tuple or a dict "
            "of the model's arguments."
        )
    inputs, targets = batch
    return (tuple(inputs) if isinstance(inputs, list) else inputs), targets


def _rows(inputs: Any, count: int, name: str) -> Bytes:
    """Return the bytes of the samples, one array `(count, bytes)` for each tensor of them."""
    rows = []
    for leaf in tree_leaves(inputs):
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count:
            plain = leaf.detach().cpu()
            plain = plain + 0.0 if plain.is_floating_point() else plain  # -0.0 becomes 0.0
            flat = plain.reshape(count, math.prod(plain.shape[1:])).contiguous()
            rows.append(flat.view(torch.uint8).numpy())
    if not rows:
        raise ValueError(
            f"{name}: no tensor among the inputs has the {count} samples of the outputs along "
            "dimension 0."
        )
    return rows


def digest(rows: Bytes, i: int) -> bytes:
    """Return what tells the inputs of sample `i` from others.

    Args:
        rows: Of a batch.
        i: The sample's place in it.

    Returns:
        Bytes.
    """
    found = hashlib.blake2b(digest_size=16)
    for array in rows:
        found.update(array[i].tobytes())
    return found.digest()


def _one(leaf: Any, i: int, count: int) -> Any:
    if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == count:
        return leaf[i : i + 1].detach().clone()
    return leaf


def _stacked(first: Any, *others: Any) -> Any:
    together = isinstance(first, Tensor) and first.ndim and len(first) == 1
    return torch.cat([first, *others]) if together else first


def taken(inputs: Any, samples: Tensor, count: int) -> Any:
    """Take some samples of inputs.

    Args:
        inputs: Of `count` samples.
        samples: Numbers of those to take.
        count: How many there are.

    Returns:
        Inputs of the same structure.
    """
    return tree_map(
        lambda t: (
            t[samples.to(t.device)] if isinstance(t, Tensor) and t.ndim and len(t) == count else t
        ),
        inputs,
    )


@contextlib.contextmanager
def untouched(model: nn.Module, loader: Any) -> Iterator[None]:
    """Evaluate a model, and put back its mode and all random number generators afterwards.

    Args:
        model: Set to `eval()` meanwhile.
        loader: Whose generators are put back, too.

    Yields:
        Nothing.
    """
    modes = [(module, module.training) for module in model.modules()]
    batches = getattr(loader, "batch_sampler", None)
    owners = (loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None))
    own = {id(g): g for o in owners if isinstance(g := getattr(o, "generator", None), _Generator)}
    states = [(generator, generator.get_state()) for generator in own.values()]
    devices = {t.device.index for t in chain(model.parameters(), model.buffers()) if t.is_cuda}
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(sorted(devices)):
            model.eval()
            yield
    finally:
        for module, training in modes:
            module.training = training
        for generator, state in states:
            generator.set_state(state)
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


_Generator = torch.Generator
