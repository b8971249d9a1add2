"""The guarantees of a model, a loss and a batch: docs/theory.md, section 2 and Thm 3.6."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.losses import potential_of
from conjopt.measure.comparing import _drops_out
from conjopt.measure.layers.tape import as_arguments, number_of_samples, places_of_inputs
from conjopt.measure.replay import Replay
from conjopt.testing.model_statements import ModelStatements
from conjopt.testing.perturbed import Search
from conjopt.testing.report import Report, refuse_counts, run

__all__ = ["check_model"]

CHECKED = (torch.float64, torch.float32)
LARGEST = 2**30  # bytes of the dense Jacobians of an example


def check_model(
    model: nn.Module,
    loss: nn.Module,
    inputs: Any,
    targets: Tensor,
    *,
    dtype: torch.dtype | None = torch.float64,
    rows: int = 4,
    max_examples: int = 20,
) -> Report:
    """Check that what is measured of a model, and what the theory says of it, holds on it.

    What `conjopt.measure` and `conjopt.bounds` say is compared with plain autograd: per-sample
    gradients, energy, structure matrices, eigenvalues, curvature, noise, and what each trainable
    parameter adds to them; `EnergyProbe` leaves ``.grad`` the same to the bit. Then Thm 2.1 to 2.6
    and 3.6 are looked at, with the measured numbers in them. This finds a wrong rule of
    `conjopt.measure.layers.register_rule`, a parameter that is left out, and a potential of your
    own whose bounds do not hold.

    Examples are rows of the batch, some of them repeated, with parameters and inputs scaled, and
    targets redrawn among those that the loss takes; the smallest that contradicts is reported. All
    of it happens on a copy: the model, its ``.grad``, hooks, mode, buffers and the random number
    generators stay as they are.

    Args:
        model: returns one tensor with samples along dimension 0; in eval mode if it has dropout or
            batch normalisation.
        loss: a criterion that `conjopt.losses.potential_of` recognises.
        inputs: of the model, m samples: a tensor, or a tuple or a dict of its arguments. A few
            samples will do.
        targets: of the criterion.
        dtype: of the copy and the batch; None leaves theirs. Tolerances are of the size of its
            rounding, so float64 finds more; in float32 what a network with huge weights loses by
            cancellation can exceed them.
        rows: of an example, at most.
        max_examples: drawn for each statement, besides the batch as it is given.

    Returns:
        a report of the statements that hold, and why others were not checked: Thm 2.5 where its
        conditions do not hold, 2.6 and 3.6 without a smoothness, 2.3 and 2.4 with more than one
        loss term for a sample, noise for one sample.

    Raises:
        TypeError: if the model is no module, a count no integer, ``dtype`` no type, or the
            criterion is not recognised.
        ValueError: for what cannot be checked, with what to do: dropout or batch statistics in
            train mode, random outputs, outputs that are no tensor or that no trainable parameter
            reaches, a forward that writes to its inputs, types under 32 bits, complex numbers,
            parameters that are not initialised, no samples, no trainable parameter, numbers
            that are not finite, integers for a model without an embedding, a batch or a loss that
            do not fit the model, a model that cannot be copied, and one that is too large for
            dense Jacobians.
        ViolationError: listing every statement that does not hold, with both sides and the smallest
            counterexample found. If samples depend on one another, or the criterion is not what it
            is read as, that alone is listed, as the others take it for granted.

    Reference:
        docs/theory.md, section 0, Thm 2.1 to 2.6 and 3.6.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> x, y = torch.randn(5, 3), torch.tensor([0, 1, 1, 0, 1])
        >>> report = check_model(model, nn.CrossEntropyLoss(), x, y, max_examples=5)
        >>> len(report.statements), dict(report.left_out)
        (27, {})
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"check_model: got a {type(model).__name__}, expected a torch.nn.Module")
    refuse_counts("check_model", rows=rows, max_examples=max_examples)
    _refuse_dtype(model, inputs, dtype)
    potential_of(loss)  # refuses what it does not know
    _refuse_kinds(model, inputs, targets)
    _refuse_mode(model)
    samples = _samples(inputs, targets)
    _refuse_not_finite(model, inputs, targets)
    with _as_it_was(model):
        twin, criterion, inputs, targets = _copies(model, loss, inputs, targets, dtype)
        outputs = _outputs(twin, criterion, inputs, targets, samples)
        _refuse_large(twin, outputs, rows)
        places = places_of_inputs(twin, *as_arguments(inputs), samples)
        search = Search(twin, criterion, inputs, targets, places, samples, rows)
        statements = ModelStatements(search)
        subject = f"{type(model).__name__} with {type(loss).__name__}"
        options: dict[str, Any] = {"max_examples": max_examples, "given": search.given}
        drawn = search.strategy(), ("example",)
        basic = run(
            subject, statements.first(), *drawn, left_out={}, describe=search.describe, **options
        )
        others, left_out = statements.all()
        report = run(
            subject, others, *drawn, left_out=left_out, describe=search.describe, **options
        )
    return Report(subject, basic.statements + report.statements, left_out)


def _refuse_dtype(model: nn.Module, inputs: Any, dtype: Any) -> None:
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(
            f"check_model: got dtype={dtype!r}, expected torch.float64, torch.float32 or None"
        )
    if dtype is not None and dtype not in CHECKED:
        raise ValueError(
            f"check_model: got dtype={dtype}, expected torch.float64 (the default), torch.float32 "
            "or None: in fewer bits a mistake cannot be told from rounding"
        )
    if dtype is None:
        named = _named(model, inputs, None)
        few = [n for n, t in named.items() if t.is_floating_point() and t.dtype not in CHECKED]
        if few:
            raise ValueError(
                f"check_model: dtype=None leaves {', '.join(few)} in {named[few[0]].dtype}, in "
                "which a mistake cannot be told from rounding: pass dtype=torch.float64, the "
                "default, which checks a copy in float64"
            )


def _named(model: nn.Module, inputs: Any, targets: Tensor | None) -> dict[str, Tensor]:
    """All tensors that a check sees, by what a user calls them."""
    named: dict[str, Tensor] = {f"parameter '{n}'": p for n, p in model.named_parameters()}
    named |= {f"buffer '{n}'": b for n, b in model.named_buffers()}
    leaves = [leaf for leaf in tree_leaves(as_arguments(inputs)) if isinstance(leaf, Tensor)]
    named |= {f"input {i}": leaf for i, leaf in enumerate(leaves)}
    return named if targets is None else named | {"targets": targets}


def _refuse_kinds(model: nn.Module, inputs: Any, targets: Any) -> None:
    named = _named(model, inputs, targets if isinstance(targets, Tensor) else None)
    for kind, what, remedy in (
        (is_lazy, "not initialised", "run the model once on the batch"),
        (
            lambda t: t.is_meta,
            "on the meta device, without numbers",
            "load or make the numbers first",
        ),
        (torch.is_complex, "complex", "what is measured is about real numbers: give real ones"),
    ):
        found = [name for name, tensor in named.items() if kind(tensor)]
        if found:
            raise ValueError(f"check_model: {', '.join(found)}: {what}: {remedy}")


def _refuse_mode(model: nn.Module) -> None:
    for name, module in model.named_modules():
        kind = f"'{name}' ({type(module).__name__})" if name else type(module).__name__
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None):
            raise ValueError(
                f"check_model: {kind} computes with the statistics of the batch, which couples its "
                "samples: call model.eval() first, with running statistics, or use group or layer "
                "normalisation"
            )
        if module.training and _drops_out(module):
            raise ValueError(
                f"check_model: {kind} draws random numbers, so that no two runs agree: call "
                "model.eval() first, or set the probability of dropout to 0"
            )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"check_model: no parameter of {type(model).__name__} requires a gradient, so there is "
            "nothing to check: call requires_grad_() on what you train"
        )


def _samples(inputs: Any, targets: Any) -> int:
    tensors = [leaf for leaf in tree_leaves(as_arguments(inputs)) if isinstance(leaf, Tensor)]
    try:
        samples = number_of_samples(tensors)
    except ValueError as error:
        raise ValueError(f"check_model: {error}") from None
    if samples == 0:
        raise ValueError("check_model: the batch has no samples: pass at least one")
    if not isinstance(targets, Tensor) or targets.ndim == 0 or len(targets) != samples:
        given = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(
            f"check_model: got {samples} samples with targets {given}: expected a tensor with one "
            "target for each sample, along dimension 0"
        )
    return samples


def _refuse_not_finite(model: nn.Module, inputs: Any, targets: Tensor) -> None:
    wrong = [
        name
        for name, tensor in _named(model, inputs, targets).items()
        if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]
    if wrong:
        raise ValueError(
            f"check_model: there are numbers that are not finite in {', '.join(wrong)}: look for "
            "what made them, or leave these samples out"
        )


@contextlib.contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Leave the random number generators, and those of the model's devices, as they were."""
    devices = {p.device.index for p in model.parameters() if p.is_cuda}
    with torch.random.fork_rng(list(devices)), torch.enable_grad():
        yield


def _copies(
    model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor, dtype: torch.dtype | None
) -> tuple[nn.Module, nn.Module, Any, Tensor]:
    try:
        # Together, as they may share tensors.
        twin, criterion = copy.deepcopy((getattr(model, "_orig_mod", model), loss))
    except Exception as error:
        raise ValueError(
            f"check_model: {type(model).__name__} cannot be copied, and the check works on a copy "
            f"({type(error).__name__}: {error}): take what copy.deepcopy does not take out of it"
        ) from None
    for parameter in twin.parameters():
        parameter.grad = None

    def converted(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        other = dtype if dtype is not None and leaf.is_floating_point() else leaf.dtype
        return leaf.detach().to(other, copy=True)

    inputs, targets = tree_map(converted, inputs), converted(targets)
    if dtype is not None:
        twin, criterion = twin.to(dtype), criterion.to(dtype)
    return twin, criterion, inputs, targets


@dataclasses.dataclass
class _Seen:
    """What a call did: the type it returned unless that is a tensor, whether it wrote to inputs."""

    kind: str | None = None
    wrote: bool = False


@contextlib.contextmanager
def _watched(model: nn.Module) -> Iterator[_Seen]:
    seen = _Seen()
    given: list[tuple[Tensor, int, Tensor]] = []

    def before(_: nn.Module, args: Any, kwargs: Any) -> None:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        given.extend((leaf, leaf._version, leaf.clone()) for leaf in leaves)

    def after(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):
            seen.kind = type(output).__name__
        seen.wrote = any(
            leaf._version != version or not torch.equal(leaf, copied)
            for leaf, version, copied in given
        )

    hooks = (
        model.register_forward_pre_hook(before, prepend=True, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    )
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _outputs(
    model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor, samples: int
) -> Tensor:
    """Of the batch, once everything about them is as it has to be."""
    name = type(model).__name__
    args, kwargs = as_arguments(inputs)
    state = Replay.random_state(model)
    try:
        with _watched(model) as seen:
            found = Replay(model, args, kwargs, state).run({})
        with torch.no_grad():
            torch.rand(1)
            again = Replay(model, args, kwargs, Replay.random_state(model)).run({})
    except Exception as error:
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        embeds = any(isinstance(m, nn.Embedding | nn.EmbeddingBag) for m in model.modules())
        if not embeds and not any(leaf.is_floating_point() for leaf in leaves):
            raise ValueError(
                f"check_model: the inputs are integers, and {name} has no embedding to look them "
                f"up in ({type(error).__name__}: {error}): pass inputs.float()"
            ) from error
        raise ValueError(
            f"check_model: {name} fails on this batch ({type(error).__name__}: {error}); it was "
            "copied and converted, so if it runs on your batch, pass dtype=None"
        ) from error
    if len(found) != 1 or found[0] is None or again[0] is None or seen.kind is not None:
        what = (
            f"a value of type {seen.kind}" if seen.kind is not None else "a tensor of another type"
        )
        raise ValueError(
            f"check_model: {name} returned {what}, expected one floating-point tensor: wrap it in "
            "a module that returns the one that the loss is given"
        )
    if seen.wrote:
        raise ValueError(
            f"check_model: the forward of {name} writes to its inputs: copy them first"
        )
    if not found[0].requires_grad:
        raise ValueError(
            f"check_model: no trainable parameter reaches the outputs of {name}: look for "
            "detach(), no_grad() or numpy in its forward"
        )
    outputs = found[0].detach()
    if outputs.ndim == 0 or len(outputs) != samples:
        raise ValueError(
            f"check_model: the outputs have the shape {tuple(outputs.shape)} for {samples} "
            "samples: expected samples along dimension 0"
        )
    if not torch.equal(outputs, again[0]) and bool(outputs.isfinite().all()):
        raise ValueError(
            f"check_model: two runs of {name} differ: call model.eval() first, or take the random "
            "numbers out of it"
        )
    try:
        value = loss(outputs, targets)
        view = potential_of(loss)
        view.points(outputs, targets)
    except Exception as error:
        raise ValueError(
            f"check_model: the criterion fails on this batch ({type(error).__name__}: {error})"
        ) from error
    if not bool(outputs.isfinite().all() & value.isfinite()):
        raise ValueError(
            "check_model: the outputs or the loss of this batch are not finite: give smaller "
            "inputs, and targets of which at least one counts"
        )
    return outputs


def _refuse_large(model: nn.Module, outputs: Tensor, rows: int) -> None:
    P = sum(p.numel() for p in model.parameters() if p.requires_grad)
    size = rows * outputs[0].numel() * P * outputs.element_size()
    if size > LARGEST:
        raise ValueError(
            f"check_model: the dense Jacobians of {rows} samples with {outputs[0].numel()} outputs "
            f"in {P} parameters take {size / 2**30:.1f} GiB, and it compares with these: check a "
            "narrower or shallower model of the same layers, give rows=1, or freeze some layers"
        )
