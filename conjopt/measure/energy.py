"""Per-sample gradient norms and the gradient energy (section 0, Thm 2.1)."""

from __future__ import annotations

import sys
import threading
from numbers import Integral, Real
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._pytree import tree_flatten, tree_leaves

from conjopt.measure.last_layer import is_empty
from conjopt.measure.layers.layout import Samples
from conjopt.measure.layers.pieces import squared_norms
from conjopt.measure.layers.plan import Plan
from conjopt.measure.layers.tape import (
    Arguments,
    Tape,
    number_of_samples,
    places_of_inputs,
    refuse_mixed,
)
from conjopt.measure.layers.uses import unwatched
from conjopt.measure.live import Live
from conjopt.measure.replay import REPLAYING, compiled_parts
from conjopt.measure.tokens import dimension_within_tokens, token_squares

__all__ = ["EnergyProbe", "gradient_energy", "per_sample_gradient_norms"]

_MOST_KINDS = 64  # of forwards that are remembered


def per_sample_gradient_norms(
    model: nn.Module,
    loss: Any,
    inputs: Any,
    targets: Any,
    *,
    rows: Tensor | None = None,
    unit: Literal["sample", "token"] = "sample",
) -> Tensor:
    """Return `||g_i||`, the norms of the gradients of each sample's loss, or of each token's.

    `g_i` is the part of the gradient that goes through sample `i`, times the number of samples if
    the loss is a mean: then the mean of the `g_i` is the gradient. For an unweighted loss with one
    term per sample it is the gradient of the sample's own loss; with tokens, ignored targets or
    weights, the weights count. One forward and one backward of activations, and inner products in
    each layer; no gradient of a parameter is formed, and `.grad` is left alone.

    With `unit="token"` each place of a sequence, or of an image, is a sample of its own: `g_{i,t}`
    is the part of the gradient that goes through the outputs of sample `i` at place `t`, times the
    number `m T` of all places if the loss is a mean, so that the mean of all the `g_{i,t}` is the
    gradient. An ignored place has the norm 0. Where all places count alike it is the gradient of
    the token's own loss; with `c` of them counted, multiply by `c / (m T)` to have that. A token's
    gradient may pass through other places, so each place takes a backward of activations.

    The model runs in the mode it is in, on copies of its buffers, and draws from the random number
    generators without moving them. At the first use for a model and a kind of inputs two samples
    are compared with plain autograd (`conjopt.measure.self_check`), which takes some steps' time.

    Args:
        model: Returns one tensor, with samples along dimension 0.
        loss: Called with outputs and targets; what it says by `reduction` (`"mean"` or `"sum"`) is
            believed, and a mean where it says nothing.
        inputs: Of the model, a tensor, or a tuple or a dict of its arguments.
        targets: Of the loss.
        rows: Numbers of the samples to measure, or a boolean for each sample; all if `None`.
        unit: `"sample"`, or `"token"`: outputs are then `(m, C, d1, ...)` for a criterion of class
            numbers or of probabilities, as torch lays them out, and `(m, T, k)` or `(m, T)` where
            the targets have their shape.

    Returns:
        Shape `(m,)`, or one for each of the rows; units of the loss per unit of the parameters. For
        tokens `(m, d1, ...)`, as the class numbers have, or `(m, T)`.

    Raises:
        MeasurementError: If the check at the first use finds anything; it lists all of it.
        RuntimeError: If samples are coupled (batch normalisation in training mode), or a parameter
            is used where it cannot be seen.
        ValueError: If the model does not return one tensor with samples along dimension 0, the
            loss does not reduce, it cannot be told what a token is, or rows are none.

    Reference:
        docs/theory.md, section 0 and Thm 2.1.

    Example:
        >>> from conjopt.losses import SquaredLoss
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> inputs, targets = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> per_sample_gradient_norms(model, SquaredLoss(), inputs, targets)
        tensor([5., 2.])
        >>> model = nn.Linear(2, 1, bias=False)  # at each of two places
        >>> _ = nn.init.zeros_(model.weight)
        >>> per_sample_gradient_norms(
        ...     model, nn.MSELoss(), inputs.unsqueeze(0), targets.unsqueeze(0), unit="token"
        ... )
        tensor([[10.,  4.]])
    """
    if unit not in ("sample", "token"):
        raise ValueError(f"unit={unit!r}: expected 'sample' or 'token'.")
    reduction = getattr(loss, "reduction", "mean")
    if reduction == "none":
        raise ValueError(
            f"The loss {loss!r} has reduction='none', so how its terms are weighed is not known: "
            "use reduction='mean' or 'sum'."
        )
    if not is_empty(inputs):
        _check(model, inputs, loss, targets, "per_sample_gradient_norms")
    tape = Tape(model, inputs)
    outputs = tape.only_output()
    rows = None if rows is None else _numbers(rows, tape.samples)
    total = outputs.new_zeros(tape.samples if rows is None else len(rows)).detach()
    with torch.enable_grad():
        value = loss(outputs, targets)
    within = dimension_within_tokens(loss, outputs, targets) if unit == "token" else None
    if outputs.requires_grad:
        (cotangent,) = torch.autograd.grad(value, [outputs])
    else:  # nothing is trained
        cotangent = torch.zeros_like(outputs)
    with torch.no_grad():
        if unit == "token":
            total = token_squares(tape, outputs, cotangent, within, rows)
        elif outputs.requires_grad:
            for _, pieces in tape.pull([outputs], [[cotangent]]):
                chosen = pieces if rows is None else [piece.select(rows) for piece in pieces]
                total = total + squared_norms(chosen)
    places = total[0].numel() if len(total) else 1
    return (1 if reduction == "sum" else tape.samples * places) * total.sqrt()


def _numbers(rows: Tensor, samples: int) -> Tensor:
    """Return the numbers of the chosen samples."""
    if rows.dtype is torch.bool and rows.shape == (samples,):
        return rows.nonzero().squeeze(1)
    if rows.ndim != 1 or rows.dtype is torch.bool or rows.is_floating_point():
        raise ValueError(
            f"rows: got {rows.dtype} of shape {tuple(rows.shape)}, expected numbers of samples, "
            f"(r,) integers, or a boolean for each of the {samples} samples."
        )
    return rows


def gradient_energy(
    model: nn.Module,
    loss: Any,
    inputs: Any,
    targets: Any,
    *,
    rows: Tensor | None = None,
    unit: Literal["sample", "token"] = "sample",
) -> Tensor:
    """Return the gradient energy `E = mean_i ||g_i||^2`, a mean over samples or over tokens.

    Arguments and errors: `per_sample_gradient_norms`.

    Returns:
        Shape `()`.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> from conjopt.losses import SquaredLoss
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> inputs, targets = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0], [2.0]])
        >>> gradient_energy(model, SquaredLoss(), inputs, targets)
        tensor(14.5000)
    """
    return (
        per_sample_gradient_norms(model, loss, inputs, targets, rows=rows, unit=unit)
        .square()
        .mean()
    )


def _check(model: nn.Module, inputs: Any, loss: Any, targets: Any, name: str) -> None:
    from conjopt.measure.checking import first_use_check  # which measures, too

    first_use_check(model, inputs, loss, targets, name=name)


class EnergyProbe:
    """Per-sample gradient norms during the ordinary forward and backward of a training loop.

    The loop stays as it is, and `.grad` is the same to the bit unless `fused`. Norms are those of
    `per_sample_gradient_norms` for what is differentiated, a mean over the samples: multiply them
    by whatever else multiplies the loss (accumulation), or divide by it (loss scale). Copies of the
    model, also pickled ones, are not watched.

    Args:
        model: The module whose forward is watched.
        share: Share of the samples to measure, in (0, 1]: every `round(1 / share)`-th, from the
            first on; where `fused` as many, the first ones.
        every: Measure every so many forwards with gradients, from the first on.
        fused: Take the gradients of the weights of convolutions, and of linear layers on sequences,
            as the sum of the per-sample ones, instead of computing both: cheaper, with `.grad`
            equal to rounding only, and without gradients of gradients.

    Attributes:
        norms: Of the last measured backward, `(r,)` for its `r` rows; `None` before.

    Raises:
        TypeError: For something else than a module.
        ValueError: For a share or a number out of range.
        MeasurementError: In the first forward of a kind, if the model cannot be measured; two
            samples are then compared with plain autograd.
        RuntimeError: In a forward, if samples meet in front of the outputs, or if the model or a
            part of it is compiled; in a backward, if it goes through several measured forwards,
            whose samples could be the same or others.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> probe = EnergyProbe(model)
        >>> loss = (model(torch.tensor([[3.0, 4.0], [1.0, 0.0]])) - 1).square().mean()
        >>> loss.backward()
        >>> probe.norms, probe.energy
        (tensor([10.,  2.]), tensor(52.))
        >>> probe.remove()
    """

    def __init__(
        self, model: nn.Module, *, share: float = 1.0, every: int = 1, fused: bool = False
    ) -> None:
        given: Any = model, share, every
        if not isinstance(given[0], nn.Module):
            kind = type(given[0]).__name__
            raise TypeError(f"EnergyProbe: got {kind}, expected a torch.nn.Module.")
        if not isinstance(given[1], Real) or not 0 < share <= 1:
            raise ValueError(f"share={share!r}: expected a number in (0, 1].")
        if not isinstance(given[2], Integral) or every < 1:
            raise ValueError(f"every={every!r}: expected a whole number of forwards, at least 1.")
        self.norms: Tensor | None = None
        self._fused = fused
        self._stride, self._every, self._forwards = round(1 / share), every, 0
        self._live: Live | None = None
        self._frame: FrameType | None = None  # of the forward that goes on, around hooks
        self._thread, self._within = 0, 0  # where it runs, and in how many calls of its own
        self._backward = -1  # number of the last one that was measured
        self._known: dict[Any, list[Samples | None]] = {}  # where inputs of a kind have samples
        self._plans: dict[Any, Plan] = {}  # what forwards of a kind and so many samples do
        self._handles = [
            model.register_forward_pre_hook(_Hook(self, "_before"), with_kwargs=True, prepend=True),
            model.register_forward_hook(_Hook(self, "_after"), always_call=True),
        ]

    def __getstate__(self) -> dict[str, Any]:
        # Not what is known of this model's tensors, or of a forward that goes on.
        return {**vars(self), "_plans": {}, "_live": None, "_frame": None}

    @property
    def energy(self) -> Tensor | None:
        """The mean of the squared norms, `()`; `None` before the first."""
        return None if self.norms is None else self.norms.square().mean()

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()
        self._drop()

    def _before(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if REPLAYING.get():
            return
        if self._frame is not None:
            if self._thread != threading.get_ident():
                return
            if self._running():  # the model calls itself
                self._within += 1
                return
            self._drop()
        # Where a forward is recomputed under checkpointing, a backward is going on.
        if not torch.is_grad_enabled() or torch._C._current_graph_task_id() != -1:
            return
        self._thread, self._frame = threading.get_ident(), sys._getframe(2)  # around hooks
        self._forwards += 1
        if (self._forwards - 1) % self._every:
            return
        self._live = self._prepare(model, args, kwargs)
        if self._live is not None:
            self._live.__enter__()

    def _running(self) -> bool:
        """Whether the forward that began goes on: an interrupt ends it without a hook."""
        above: FrameType | None = sys._getframe()
        while above is not None and above is not self._frame:
            above = above.f_back
        return above is not None

    def _drop(self) -> None:
        """Stop a recording that was left behind."""
        live, self._live, self._frame, self._within = self._live, None, None, 0
        if live is not None:
            live.samples = 0  # it records nothing more, should other modes be above it
            if _get_current_function_mode_stack()[-1:] == [live]:
                live.__exit__(None, None, None)

    def _prepare(self, model: nn.Module, args: Any, kwargs: Any) -> Live | None:
        leaves, names = (args, None) if _are_tensors(args, kwargs) else tree_flatten((args, kwargs))
        tensors = [t for t in leaves if isinstance(t, Tensor)]
        samples = number_of_samples(tensors)
        if samples == 0:
            return None
        kind = (str(names), *((t.shape[1:], t.ndim and t.shape[0] == samples) for t in tensors))
        if kind not in self._known:
            _refuse_compiled(model)
            with unwatched():  # by another probe, of a module around this one
                _check(model, Arguments(args, kwargs), None, None, "EnergyProbe")
            self._known[kind] = places_of_inputs(model, args, kwargs, samples)
        if len(self._plans) >= _MOST_KINDS:
            self._plans.clear()
        key = kind, samples, *[(t.dtype, t.requires_grad) for t in tensors]
        plan = self._plans.setdefault(key, Plan())
        options = (samples, self._stride, self._fused, self._store, plan)
        return Live(model, tensors, self._known[kind], *options)

    def _after(self, model: nn.Module, args: Any, output: Any) -> None:
        if REPLAYING.get():
            return
        if self._frame is None or self._thread != threading.get_ident():
            return
        if self._within:
            self._within -= 1
            return
        live, self._live, self._frame = self._live, None, None
        if live is not None:
            live.__exit__(None, None, None)
            refuse_mixed(live, [t for t in tree_leaves(output) if isinstance(t, Tensor)])

    def _store(self, norms: Tensor, backward: int) -> None:
        if backward == self._backward:
            self.norms = None
            raise RuntimeError(
                "EnergyProbe: one backward went through several measured forwards, and whether "
                "their samples are the same ones cannot be told. Call backward for each of them, "
                "or wrap them in one module and watch that."
            )
        self.norms, self._backward = norms, backward


def _are_tensors(args: Any, kwargs: Any) -> bool:
    return not kwargs and all(isinstance(value, Tensor) for value in args)


class _Hook:
    """A hook that a copy of the module does not take along."""

    def __init__(self, probe: EnergyProbe | None = None, method: str = "") -> None:
        self._probe, self._method = probe, method

    def __call__(self, *arguments: Any) -> None:
        if self._probe is not None:
            getattr(self._probe, self._method)(*arguments)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def _refuse_compiled(model: nn.Module) -> None:
    if parts := compiled_parts(model):
        what = ", ".join(repr(name) if name else "the model itself" for name in parts)
        raise RuntimeError(
            f"EnergyProbe: {what} of {type(model).__name__} is compiled, and what is compiled "
            "cannot be watched and give the same gradients to the bit. Call "
            "per_sample_gradient_norms or gradient_energy instead (they run the model once more, "
            "uncompiled), or train without torch.compile while you measure."
        )
