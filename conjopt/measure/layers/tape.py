"""One forward of a model with its uses of parameters, to pull cotangents of the outputs back."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from conjopt.measure.layers.layout import LOST, MIXED, Samples
from conjopt.measure.layers.layout import tensors as tensors_in
from conjopt.measure.layers.pieces import BUDGET, Dense, Lookup, Piece
from conjopt.measure.layers.rules import pieces_of
from conjopt.measure.layers.uses import Recorder, Use
from conjopt.measure.replay import Replay, refuse_reentrant
from conjopt.measure.writes import written

__all__ = ["LITTLE", "Arguments", "Tape", "as_arguments", "number_of_samples", "refuse_mixed"]

LITTLE = 2**21  # elements arriving at layers up to which calls are dear, and memory is not


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Inputs of a model that is called with positional and with keyword arguments.

    Attributes:
        args: The positional ones.
        kwargs: The keyword ones.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Tape:
    """A forward of the model, recorded.

    The model runs in the mode it is in, on copies of its buffers and its inputs, and draws from the
    random number generators without moving them.

    Args:
        model: The module.
        inputs: Its inputs: a tensor, a tuple or a dict of its arguments, or `Arguments`.

    Attributes:
        outputs: The tensors that it returned, with their graph.
        samples: `m`.
        draws: Whether it drew random numbers.

    Raises:
        ValueError: If the inputs have no samples.
        RuntimeError: If a parameter that the outputs depend on was not seen in use, or under
            reentrant checkpointing.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        args, kwargs = as_arguments(inputs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.samples = number_of_samples(tensors)
        replay = Replay(model, args, kwargs, Replay.random_state(model))
        with torch.enable_grad():  # as models may want it
            replay.find_writes()
        every: dict[str, Tensor] = dict(_plain(model).named_parameters())
        copies = {
            name: p.detach().clone().requires_grad_(p.requires_grad)
            for name, p in written(_plain(model)).items()
        }
        every |= copies
        self._parameters = {name: p for name, p in every.items() if p.requires_grad}
        where = places_of_inputs(model, args, kwargs, self.samples)
        constants = partial(constants_of, model)
        self._recorder = Recorder(every, tensors, constants, self.samples, where)
        with torch.enable_grad(), self._recorder:
            outputs, self.draws = replay.run_telling_draws(copies, copy=False)
        self.outputs = [output for output in outputs if output is not None]
        refuse_reentrant(self.outputs)
        if self.samples:
            self._refuse_unseen()

    def only_output(self) -> Tensor:
        """Return the one tensor that the model returned, with samples along dimension 0.

        Raises:
            ValueError: If it returned another number of tensors, or of samples.
        """
        if len(self.outputs) != 1:
            raise ValueError(
                f"The model returned {len(self.outputs)} floating-point tensors: expected one. "
                "Wrap it in a module that returns the tensor that the loss is given."
            )
        (output,) = self.outputs
        if output.ndim == 0 or output.shape[0] != self.samples:
            raise ValueError(
                f"The model returned a tensor of shape {tuple(output.shape)} for {self.samples} "
                "samples: expected the samples along dimension 0."
            )
        return output

    @property
    def uses(self) -> list[Use]:
        """The uses of parameters, in their order."""
        return self._recorder.uses

    def pull(
        self, roots: Sequence[Tensor], cotangents: Tensor | Sequence[Sequence[Tensor | None]]
    ) -> Iterator[tuple[str, list[Piece]]]:
        """Pull cotangents back, and yield what each parameter's gradients are made of.

        Args:
            roots: Tensors that were computed from the outputs.
            cotangents: `k` lists, each with one for each root; or, for one root, `(k, *shape)`.

        Yields:
            The name of a parameter, and the pieces of its gradients.
        """
        edges = [edge for use in self.uses for edge in use.edges if edge is not None]
        if not edges:
            return
        names = {id(p): name for name, p in self._parameters.items()}
        later = Counter(id(weight) for use in self.uses for weight in use.weights)
        shared = {id(base) for bases in self._recorder.bases.values() for base in bases}
        found: dict[int, list[Piece]] = {}
        elements = sum(math.prod(shape) for use in self.uses for shape in use.shapes)
        arriving = _pulled(roots, edges, cotangents, elements)[::-1]
        for use in self.uses:
            mine = [
                None if edge is None or (g := arriving.pop()) is None else g.reshape(-1, *shape)
                for edge, shape in zip(use.edges, use.shapes, strict=True)
            ]
            if any(cotangent is not None for cotangent in mine):
                for weight, piece in pieces_of(use, mine):
                    found.setdefault(id(weight), []).append(piece)
                    del piece
            del mine
            # What is complete is given away at once, as it may be large.
            for i in map(id, use.weights):
                later[i] -= 1
                if not later[i] and i in names and i not in shared and i in found:
                    yield names[i], found.pop(i)
        refuse_mixed(self._recorder, self.outputs)
        for made in self._recorder.made:
            for piece in found.pop(id(made), []):
                for parameter, gradient in through(made, self._recorder, piece):
                    found.setdefault(id(parameter), []).append(gradient)
        for name, parameter in self._parameters.items():
            if pieces := found.pop(id(parameter), None):
                yield name, pieces

    def _refuse_unseen(self) -> None:
        """Walk from the outputs to the parameters: each way there has to be a use."""
        ways: dict[Any, list[Tensor]] = {}  # from what a use returned, on through its arguments
        for use in self.uses:
            given = [t for t in tensors_in((use.args, use.kwargs)) if not use.is_weight(t)]
            for edge in use.edges:
                if edge is not None:
                    ways.setdefault(edge.node, []).extend(given)
        made = {id(tensor) for tensor in self._recorder.made}
        stack: list[Any] = [
            output.grad_fn
            for output in self.outputs
            if id(output) not in made or output.shape[:1] == (self.samples,)
        ]
        names = {id(p): name for name, p in self._parameters.items()}
        seen: set[Any] = set()
        lost: list[str] = []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(variable := getattr(node, "variable", None)) in names:
                lost.append(names[id(variable)])
            elif node in ways:
                stack.extend(t.grad_fn for t in ways[node])
            else:
                stack.extend(following for following, _ in node.next_functions)
        if lost:
            raise RuntimeError(
                f"The outputs depend on {', '.join(sorted(lost))} in a way that cannot be seen: "
                "compiled or scripted parts, a custom autograd function, or writing to a view. "
                "Measure the plain module, or write that part in torch functions."
            )


def refuse_mixed(recorder: Recorder, outputs: Sequence[Tensor]) -> None:
    """Refuse outputs in front of which samples meet.

    Args:
        recorder: Of the forward that returned them.
        outputs: With their graph.

    Raises:
        RuntimeError: If samples meet each other, or cannot be told apart any more.
    """
    for output in outputs:
        mixed = output.requires_grad and recorder.where(output) is LOST
        if mixed and output.shape[:1] == (recorder.samples,):
            raise RuntimeError(MIXED.format("the outputs"))


def through(made: Tensor, recorder: Recorder, piece: Piece) -> Iterator[tuple[Tensor, Piece]]:
    """Carry gradients of a made tensor on to the parameters that it was made of.

    Args:
        made: With its graph.
        recorder: Which knows the parameters.
        piece: Its per-sample gradients.
    """
    k, m, _, q, _ = piece.sizes
    bases, index = recorder.bases[id(made)], recorder.looked_up(made)
    if index is not None:
        (table,) = bases
        yield table, _of_table(index, piece.slab(0, q).reshape(k, m, -1, made.shape[-1]), table)
        return
    gradients = piece.slab(0, q).reshape(k * m, *made.shape)
    size = max(1, BUDGET // max(1, sum(base.numel() for base in bases)))
    parts = [
        _batched_grad(made, bases, gradients[start : start + size])
        for start in range(0, len(gradients), size)
    ]
    for base, found in zip(bases, zip(*parts, strict=True), strict=True):
        yield base, Dense(torch.cat(found).reshape(k, m, 1, 1, -1))


def _of_table(index: Tensor, right: Tensor, table: Tensor) -> Piece:
    """Return the gradients of a table, `(k, m, t, d)` for rows that are the same for all samples.

    Of each place with each other, or as they are, whichever is less.
    """
    (k, m, t, d), size = right.shape, len(table)
    if t * t < size:
        return Lookup(index.reshape(1, -1).expand(m, -1), right, size)
    found = right.new_zeros(k, m, size, d).index_add_(2, index.reshape(-1), right)
    return Dense(found.unsqueeze(2))


def _pulled(
    roots: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Tensor | Sequence[Sequence[Tensor | None]],
    elements: int,
) -> list[Tensor | None]:
    """Pull cotangents back to edges, `(k, *shape)` each: all at once where torch can.

    At the edges arrive so many elements for each cotangent.
    """
    stacked: list[Tensor] = []
    if isinstance(cotangents, Tensor):
        wanted, stacked = [0], [cotangents]
    else:
        wanted = [i for i in range(len(roots)) if cotangents[0][i] is not None]
        if len(cotangents) > 1 and all(c[i] is not None for c in cotangents for i in wanted):
            stacked = [
                torch.stack([g for c in cotangents if (g := c[i]) is not None]) for i in wanted
            ]
    if len(cotangents) > 1 and stacked:
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            batched = _vectorised if len(cotangents) * elements <= LITTLE else _at_once
            return batched([roots[i] for i in wanted], edges, stacked)
    each = [[c] for c in cotangents] if isinstance(cotangents, Tensor) else cotangents
    columns = [
        torch.autograd.grad(
            list(roots), edges, list(cotangent), retain_graph=True, allow_unused=True
        )
        for cotangent in each
    ]
    by_edge: list[Tensor | None] = []
    for gradients in zip(*columns, strict=True):
        live = [g for g in gradients if g is not None]
        by_edge.append(
            torch.stack([torch.zeros_like(live[0]) if g is None else g for g in gradients])
            if live
            else None
        )
    return by_edge


def _at_once(
    roots: list[Tensor], edges: Sequence[GradientEdge], stacked: list[Tensor]
) -> list[Tensor | None]:
    """Pull stacked cotangents back; convolutions and pooling are called once for each of them."""
    return list(
        torch.autograd.grad(
            roots, edges, stacked, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    )


def _vectorised(
    roots: list[Tensor], edges: Sequence[GradientEdge], stacked: list[Tensor]
) -> list[Tensor | None]:
    """Pull stacked cotangents back, all in one call of each function, for more memory."""
    live: list[int] = []

    def pull(*cotangents: Tensor) -> tuple[Tensor, ...]:
        found = torch.autograd.grad(roots, edges, cotangents, retain_graph=True, allow_unused=True)
        live.extend(i for i, g in enumerate(found) if g is not None)
        return tuple(g for g in found if g is not None)

    found = torch.func.vmap(pull)(*stacked)
    by_edge: list[Tensor | None] = [None] * len(edges)
    for i, gradient in zip(live, found, strict=True):
        by_edge[i] = gradient
    return by_edge


def _batched_grad(made: Tensor, bases: list[Tensor], gradients: Tensor) -> list[Tensor]:
    try:
        found = torch.autograd.grad(
            made, bases, gradients, retain_graph=True, is_grads_batched=True, allow_unused=True
        )
    except RuntimeError:
        columns = [
            torch.autograd.grad(made, bases, g, retain_graph=True, allow_unused=True)
            for g in gradients
        ]
        return [
            torch.stack([torch.zeros_like(base) if g is None else g for g in column])
            for base, column in zip(bases, zip(*columns, strict=True), strict=True)
        ]
    return [
        base.new_zeros(len(gradients), *base.shape) if g is None else g
        for base, g in zip(bases, found, strict=True)
    ]


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and keyword arguments that inputs stand for."""
    if isinstance(inputs, Arguments):
        return inputs.args, inputs.kwargs
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def number_of_samples(tensors: Sequence[Tensor]) -> int:
    """Return the size of dimension 0 of the first tensor that has one."""
    for tensor in tensors:
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError(
        "The inputs hold no tensor with a dimension of samples: expected samples along dimension 0."
    )


def constants_of(model: nn.Module) -> list[Tensor]:
    """Return the tensors that a model keeps without training them: buffers and attributes."""
    return [
        value
        for module in model.modules()
        for values in (module._buffers, vars(module))
        for value in values.values()
        if isinstance(value, Tensor)
    ]


def places_of_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int
) -> list[Samples | None]:
    """Tell where the samples of each input are, by its size if that says it all.

    Where it does not, as with a mask of places by places and as many samples, the model is run for
    one sample more, without gradients: only the right inputs may be longer then.

    Raises:
        ValueError: If it runs for none.
    """
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Tensor)]
    if samples == 0:
        return [None] * len(tensors)
    first = next(t for t in tensors if t.ndim)
    choices: list[list[Samples | None]] = []
    for tensor in tensors:
        places: list[Samples | None] = [
            Samples(d)
            for d, size in enumerate(tensor.shape[:2])
            if size == samples or (d == 0 and size and size % samples == 0)
        ]
        equal = samples in tensor.shape[:2]
        if tensor is first:
            places = [Samples(0)]
        elif samples > 1 and places and (not equal or samples in first.shape[1:]):
            places.append(None)
        choices.append(places or [None])
    every = list(itertools.product(*choices))
    if len(every) == 1:
        return list(every[0])
    shapes = _shapes(model, args, kwargs)
    for places_of_all in every:
        grown = iter(
            t
            if at is None
            else torch.cat([t, t.narrow(at.dim, 0, t.shape[at.dim] // samples)], at.dim)
            for t, at in zip(tensors, places_of_all, strict=True)
        )
        leaves = [next(grown) if isinstance(x, Tensor) else x for x in flat]
        with contextlib.suppress(Exception):
            longer = _shapes(model, *tree_unflatten(leaves, spec))
            more = [
                sum(a != b for a, b in zip(x, y, strict=True))
                for x, y in zip(shapes, longer, strict=True)
            ]
            # Only the samples are more: not, for instance, classes that are an input, too.
            if max(more) == 1:
                return list(places_of_all)
    raise ValueError(
        f"There are {samples} samples, and inputs of shapes {[tuple(t.shape) for t in tensors]}: "
        "it cannot be told which of them hold samples. Measure with another number of samples."
    )


def _shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Size]:
    with torch.no_grad():
        outputs = Replay(model, args, kwargs, Replay.random_state(model)).run({})
    return [output.shape for output in outputs if output is not None]


def _plain(model: nn.Module) -> nn.Module:
    """Take the wrapper of torch.compile off."""
    return getattr(model, "_orig_mod", model)
