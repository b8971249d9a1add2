"""What each layer of a network loses of the targets: `Ent(Y|Z)` along its layers (Thm 1.4)."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.entropy import (
    conditional_entropy,
    kernel_conditional_entropy,
    quantized_conditional_entropy,
)
from conjopt.entropy.kernel import standardised
from conjopt.measure.layers.tape import as_arguments
from conjopt.measure.replay import Replay
from conjopt.potentials import Potential

__all__ = ["LayerInformation", "layer_information_loss"]

METHODS = ("kernel", "quantized", "exact")


@dataclasses.dataclass(frozen=True)
class LayerInformation:
    """`Ent(Y|Z)` along the layers of a network, made by `layer_information_loss`.

    Attributes:
        layers: Names of the layers, in the order in which the forward called them. The first is
            `"inputs"`.
        entropies: `Ent(Y|Z)` of the values of each, `(L,)`, float64.
        losses: By how much each is above the one before, `(L - 1,)`. They add up to the loss of the
            whole chain. Estimates can be negative, which no true loss is.
        method: That was used.

    Reference:
        docs/theory.md, Thm 1.4.

    Example:
        >>> import torch
        >>> from conjopt.measure import layer_information_loss
        >>> from conjopt.potentials import Softmax
        >>> model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU())
        >>> inputs, targets = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), [0, 1, 0, 1]
        >>> print(layer_information_loss(
        ...     model, inputs, targets, potential=Softmax(), method="exact"
        ... ))
        layer   Ent(Y|Z)    loss
        inputs    0.0000
        0         0.0000  0.0000
        1         0.3466  0.3466
    """

    layers: list[str]
    entropies: Tensor
    losses: Tensor
    method: str

    def __str__(self) -> str:
        width = max(len(name) for name in ("layer", *self.layers))
        lines = [f"{'layer':{width}}  Ent(Y|Z)    loss"]
        losses = ["", *(f"  {loss:6.4f}" for loss in self.losses.tolist())]
        for name, entropy, loss in zip(self.layers, self.entropies.tolist(), losses, strict=True):
            lines.append(f"{name:{width}}  {entropy:8.4f}{loss}")
        return "\n".join(lines)


def layer_information_loss(
    model: nn.Module,
    inputs: Any,
    targets: Tensor | ArrayLike,
    layers: Sequence[str] | None = None,
    *,
    potential: Potential,
    method: str = "kernel",
    bandwidth: float = 0.1,
    form: str = "cross-entropy",
    quantum: float = 0.5,
    correction: str = "jackknife",
    batch_size: int = 1024,
) -> LayerInformation:
    """Return `Ent(Y|Z)` after each of some layers, and what each layer adds to it.

    `Ent(Y|Z)` is the least loss that any head reading the layer could reach; no later layer gets
    below it. What is said of a chain of layers holds if each carries the whole state, as in
    `nn.Sequential`; with skip connections around a layer its own entropy is right, and the loss may
    be negative.

    - `"kernel"`: `kernel_conditional_entropy` of each layer's values. In the form
      `"cross-entropy"` it is the loss of a head that reads the neighbours in that layer: above
      `Ent(Y|Z)`, the more so the less the layer has arranged the samples by their targets, so that
      it falls along the layers of a trained network and its losses are negative.
    - `"quantized"`: `quantized_conditional_entropy` of each layer's values, centred and divided by
      one root mean square, and rounded to multiples of `quantum`. Useful for layers of a few
      units: with more, each sample has a cell of its own, and the estimate is 0.
    - `"exact"`: `conditional_entropy` of groups of equal values: exact for the given data, and 0
      unless different inputs have equal values, as with discrete inputs or clipped units.

    On the samples that a network was trained on, kernel and quantized values tell how it arranged
    these, not what is true of others: take samples held out.

    The model runs in the mode it is in, without gradients: call `model.eval()` first, as dropout
    and batch statistics make a layer depend on more than its input. Its buffers, gradients and mode
    and the random number generators stay as they are.

    Args:
        model: Any module.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments. Tensors of as many
            rows as there are targets are taken apart by samples.
        targets: Class indices `(n,)` or points `(n, k)`, see `conjopt.entropy.generalized_entropy`.
        layers: Names as in `model.named_modules()`, `""` for the model itself; None for the
            model's children. A layer returns a tensor (or first of all a tensor) with the samples
            along dimension 0, and is called once in a forward.
        potential: The potential `Phi`; for a criterion
            `conjopt.losses.potential_of(criterion).potential`.
        method: `"kernel"`, `"quantized"` or `"exact"`.
        bandwidth: Of the kernel.
        form: Of the kernel estimate.
        quantum: Side of a cell, in units of the layer's root mean square about its mean.
        correction: Of the quantized estimate.
        batch_size: Samples that run at a time.

    Returns:
        Entropies of the inputs and of each layer, and their differences, in units of the mean
        Fenchel-Young loss.

    Raises:
        TypeError: As `conjopt.entropy.generalized_entropy`, and for a layer that returns no
            floating-point tensor.
        ValueError: As the estimate that is used, and for names that are not modules of the model,
            layers that are not called or more than once, and values without samples along
            dimension 0.

    Reference:
        docs/theory.md, Thm 1.4.

    Example:
        >>> import torch
        >>> from conjopt.measure import layer_information_loss
        >>> from conjopt.potentials import Softmax
        >>> model = torch.nn.Sequential(torch.nn.ReLU(), torch.nn.Linear(1, 2))
        >>> inputs, targets = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), [0, 1, 0, 1]
        >>> found = layer_information_loss(
        ...     model, inputs, targets, ["0"], potential=Softmax(), method="exact"
        ... )
        >>> found.losses  # the two inputs below 0 become one
        tensor([0.3466], dtype=torch.float64)
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: expected one of {METHODS}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1.")
    targets = targets if isinstance(targets, Tensor) else torch.as_tensor(targets)
    n = len(targets) if targets.ndim else 0
    if n == 0:
        raise ValueError(f"targets of shape {tuple(targets.shape)}: expected one for each sample.")
    values = [("inputs", _inputs(inputs, n))]
    values += _run(model, inputs, layers, n, batch_size).items()
    entropies = []
    for name, rows in values:
        try:
            if method == "kernel":
                found = kernel_conditional_entropy(
                    rows, targets, potential, bandwidth=bandwidth, form=form
                )
            elif method == "quantized":
                found = quantized_conditional_entropy(
                    _standardised(rows), targets, potential, quantum=quantum, correction=correction
                )
            else:
                found = conditional_entropy(targets, rows, potential)
        except (TypeError, ValueError) as error:
            raise type(error)(f"layer {name!r}: {error}") from error
        entropies.append(found.cpu())
    along = torch.stack(entropies)
    return LayerInformation([name for name, _ in values], along, along.diff(), method)


def _standardised(rows: Tensor) -> Tensor:
    # Numbers that are not finite are refused by what comes next.
    return standardised(rows.double().flatten(1))


def _inputs(inputs: Any, n: int) -> Tensor:
    """Join the inputs of each sample in one row, `(n, d)`."""
    rows = [
        leaf.detach().reshape(n, -1)
        for leaf in tree_leaves(as_arguments(inputs))
        if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n
    ]
    if not rows:
        raise ValueError(f"no tensor among the inputs has {n} rows, one for each target.")
    device = rows[0].device
    joined = torch.cat([row.to(device) for row in rows], 1)
    return joined if joined.is_floating_point() else joined.double()


def _run(
    model: nn.Module, inputs: Any, layers: Sequence[str] | None, n: int, batch_size: int
) -> dict[str, Tensor]:
    """Run the model, and return the values of the layers, `(n, d)` each, in their order."""
    # Names are those without the wrapper of torch.compile, which would not call hooks.
    model = getattr(model, "_orig_mod", model)
    modules = dict(model.named_modules())
    names = [name for name, _ in model.named_children()] if layers is None else list(layers)
    unknown = [name for name in names if name not in modules]
    if unknown or not names:
        raise ValueError(
            f"layers={layers}: {unknown or 'none'} of {type(model).__name__}; expected names from "
            f"{[name for name in modules if name]}, or '' for the model."
        )
    parts: dict[str, list[Tensor]] = {}
    args, kwargs = as_arguments(inputs)
    for lo in range(0, n, batch_size):
        cut = functools.partial(_cut, n=n, lo=lo, hi=min(lo + batch_size, n))
        some, named = tree_map(cut, (args, kwargs))
        found: dict[str, Tensor] = {}
        replay = Replay(model, some, named, Replay.random_state(model))
        with torch.no_grad():
            replay.find_writes()  # which may run it once more
            with _kept({name: modules[name] for name in names}, found):
                replay.run({})
        missing = [name for name in names if name not in found]
        if missing:
            raise ValueError(f"the forward did not call the layers {missing}: leave them out.")
        for name, value in found.items():
            rows = min(batch_size, n - lo)
            if value.ndim == 0 or len(value) != rows:
                raise ValueError(
                    f"layer {name!r} returned the shape {tuple(value.shape)} for {rows} samples: "
                    "expected samples along dimension 0."
                )
            parts.setdefault(name, []).append(value.reshape(rows, -1))
    return {name: torch.cat(values) for name, values in parts.items()}


def _cut(leaf: Any, n: int, lo: int, hi: int) -> Any:
    return leaf[lo:hi] if isinstance(leaf, Tensor) and leaf.ndim and len(leaf) == n else leaf


@contextlib.contextmanager
def _kept(modules: dict[str, nn.Module], found: dict[str, Tensor]) -> Iterator[None]:
    """Keep what modules return, by name."""

    def keep(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if name in found:
            raise ValueError(
                f"layer {name!r} ({type(module).__name__}) is called more than once in a forward: "
                "name a layer that contains these calls, or give each its own module."
            )
        first = next(iter(tree_leaves(output)), None)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise TypeError(
                f"layer {name!r} ({type(module).__name__}) returned {type(output).__name__}: "
                "expected a floating-point tensor."
            )
        found[name] = first.detach().clone()  # the next layer may write to it

    handles = [
        module.register_forward_hook(functools.partial(keep, name))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
