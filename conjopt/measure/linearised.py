"""A model's outputs as a linear function of its parameters: products with the matrices of Thm 2.6.

`Linearised` gives products of a batch, `AllSamples` one product for each sample at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.measure.curvature import JacobianProduct
from conjopt.measure.graph_hooks import without_multi_grad_hooks
from conjopt.measure.krylov import Ritz, lanczos, norm
from conjopt.measure.layers.pieces import Dense, Piece, squared_norms
from conjopt.measure.layers.rules import pieces_of
from conjopt.measure.layers.tape import Tape, as_arguments
from conjopt.measure.layers.uses import Use
from conjopt.measure.replay import Replay, refuse_reentrant
from conjopt.potentials import Potential

__all__ = ["AllSamples", "Linearised", "Projection", "plain_kernels", "trainable"]


class Projection:
    """The projection on the tangent space `V` of every loss term, in the outputs' shape.

    Args:
        potential: Whose `V`; `None` for all outputs.
        outputs: Their shape counts.

    Attributes:
        rows: With a potential, rearranges a tensor of that shape to `(R, k)`, a row for each term.

    Raises:
        ValueError: If outputs have no dimension of classes, which a potential on the simplex needs.
    """

    def __init__(self, potential: Potential | None, outputs: Tensor) -> None:
        self._potential = potential
        if potential is None:
            return
        if potential.on_simplex and outputs.ndim < 2:
            raise ValueError(
                f"Got outputs of shape {tuple(outputs.shape)}: {type(potential).__name__} expects "
                "(N, C) or (N, C, d1, ...), with the classes along dimension 1."
            )
        self.rows = potential_of(FenchelYoungLoss(potential)).rows

    def __call__(self, v: Tensor) -> Tensor:
        """Project a tensor of the outputs' shape."""
        if self._potential is None:
            return v
        rows, back = torch.func.vjp(self.rows, v)[:2]
        return back(self._potential.tangent_projection(rows))[0]


class Linearised:
    """A model's outputs as a linear function of its trainable parameters, all in one vector.

    The graph of one forward is kept for `J^T v`; `J u` runs the model again in forward mode.

    Args:
        model: Returns one tensor.
        inputs: A tensor, or a tuple or a dict of its arguments.
        potential: Of the loss, or `None` for structure matrices on all of `R^k`.

    Attributes:
        outputs: Without their graph.
        project: On `V`, in the outputs' shape.
        zero: The zero vector of the parameters, `(P,)`.

    Raises:
        ValueError: Without trainable parameters, or for outputs that are not one tensor, empty, or
            do not fit the potential.
        RuntimeError: Under reentrant activation checkpointing.
    """

    def __init__(self, model: nn.Module, inputs: Any, potential: Potential | None) -> None:
        self._potential = potential
        self._parameters = trainable(model)
        args, kwargs = as_arguments(inputs)
        self._replay = Replay(model, args, kwargs, Replay.random_state(model))
        self._model = model
        self._product = JacobianProduct(model)
        with torch.inference_mode(False), torch.enable_grad(), plain_kernels(model):
            leaves = self._replay.run({})
        if len(leaves) != 1 or leaves[0] is None:
            raise _several(model, len(leaves))
        self._graph = leaves[0]
        if not self._graph.numel():
            raise ValueError(
                f"{type(model).__name__} returned shape {tuple(self._graph.shape)}: expected "
                "outputs of at least one sample."
            )
        refuse_reentrant([self._graph])
        self.outputs = self._graph.detach()
        self.project = Projection(potential, self.outputs)
        dtypes = {p.dtype for p in self._parameters.values()} | {torch.float32}
        dtype = torch.float64 if torch.float64 in dtypes else torch.float32
        size = sum(p.numel() for p in self._parameters.values())
        self.zero = torch.zeros(size, dtype=dtype, device=self.outputs.device)
        self._agreement = _Agreement(self.outputs)

    def rows(self, v: Tensor) -> Tensor:
        """Rearrange a tensor of the outputs' shape to `(R, k)`, a row for each loss term."""
        return self.project.rows(v)

    def push(self, u: Tensor) -> Tensor:
        """Return `J u` for `(P,)`."""
        parts = u.split([p.numel() for p in self._parameters.values()])
        direction = {
            name: part.view_as(p)
            for (name, p), part in zip(self._parameters.items(), parts, strict=True)
        }
        _, (change,) = self._product(self._replay.run, self._parameters, direction)
        assert change is not None
        return change

    def pull(self, v: Tensor) -> Tensor:
        """Return `J^T v`, `(P,)`, for `v` in the outputs' shape."""
        if not self._graph.requires_grad:
            return self.zero
        parameters = list(self._parameters.values())
        off = torch.inference_mode(False)
        with off, plain_kernels(self._model), without_multi_grad_hooks(parameters):
            products = torch.autograd.grad(
                self._graph,
                parameters,
                v.to(self._graph.dtype),
                retain_graph=True,
                allow_unused=True,
            )
        return torch.cat(
            [
                (torch.zeros_like(p) if product is None else product.to_dense())
                .flatten()
                .to(self.zero.dtype)
                for p, product in zip(parameters, products, strict=True)
            ]
        )

    def pull_rows(self, v: Tensor) -> Tensor:
        """Return `J^T v`, `(P,)`, for `v` in rows, `(R, k)`."""
        return self.pull(torch.func.vjp(self.rows, self.outputs)[1](v)[0])

    def gauss_newton(self, u: Tensor) -> Tensor:
        """Return `GGN u`, `(P,)`."""
        assert self._potential is not None
        rows, along = self.rows(self.outputs), self.rows(self.push(u))
        bent = self._potential.hessian_product(rows, along) / len(rows)
        result = self.pull_rows(bent)
        self._agreement.note(
            _inner(u, result), _inner(along.flatten(), bent.flatten()), norm(u) * norm(result)
        )
        return result

    def structure(self, v: Tensor) -> Tensor:
        """Return `K_B v`, `(m k,)`."""
        u = self.pull(self.project(v.view_as(self.outputs)))
        result = self.project(self.push(u)).flatten().to(v.dtype)
        self._agreement.note(_inner(v, result), _inner(u, u), norm(v) * norm(result))
        return result

    def solve(self, product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Ritz:
        """Run `lanczos`; again without forward mode where it is not the transpose of the backward.

        So it is with a function of the user's whose `jvp` is not that of its `backward`.
        """
        ritz = lanczos(product, start, steps=steps)
        if self._product.method == "forward" and self._agreement.fails():
            self._product.method = "two_vjps"
            ritz = lanczos(product, start, steps=steps)
        return ritz


class _Agreement:
    """Whether `<v, A v>` of products with `A` is what one half of the product says it is."""

    def __init__(self, outputs: Tensor) -> None:
        self._tolerance = math.sqrt(torch.finfo(outputs.dtype).eps)
        self._gap = self._scale = torch.zeros((), dtype=torch.float64, device=outputs.device)

    def note(self, found: Tensor, expected: Tensor, size: Tensor) -> None:
        """Compare, for one operator or one for each sample, `()` or `(m,)`, float64."""
        self._gap = torch.maximum(self._gap, (found - expected).abs())
        self._scale = torch.maximum(self._scale, torch.maximum(size, expected))

    def fails(self) -> bool:
        """Whether they ever differed by more than rounding; waits for the device."""
        return bool((self._gap > self._tolerance * self._scale).any())


class AllSamples:
    """`A_i u_i` for all samples: one backward, and one forward of what each use makes of it.

    The backward gives the cotangents `b` of the uses of parameters. Half the squared norm of the
    per-sample gradients that `b` makes has as its gradient in `b` how the use's result changes
    along them. The backward being linear in the outputs' cotangent, the transpose of its own graph
    carries these changes to the outputs.
    """

    def __init__(self, tape: Tape, outputs: Tensor, project: Projection) -> None:
        self._tape, self._outputs, self._project = tape, outputs, project
        edges = [
            (number, place, edge)
            for number, use in enumerate(tape.uses)
            for place, edge in enumerate(use.edges)
            if edge is not None
        ]
        self._cotangent = torch.zeros_like(outputs, requires_grad=True)
        arriving = self._backward([edge for *_, edge in edges], self._cotangent, keep=True)
        live = [place for place, b in enumerate(arriving) if b is not None]
        self._keys = [edges[place][:2] for place in live]
        self._edges = [edges[place][2] for place in live]
        self._linear = [b for b in arriving if b is not None]
        if not all(b.requires_grad for b in self._linear):
            raise RuntimeError("The backward of a function has no derivative.")
        self._groups = _groups(tape, {number for number, _ in self._keys})
        self.agreement = _Agreement(outputs)

    def __call__(self, u: Tensor) -> Tensor:
        """Return `A_i u_i` for all `i`, on `V`, `(m, k)`."""
        v = self._project(u.view_as(self._outputs).to(self._outputs.dtype))
        arriving = self._backward(self._edges, v, keep=False)
        leaves = {
            key: torch.zeros_like(b) if c is None else c.detach()
            for key, b, c in zip(self._keys, self._linear, arriving, strict=True)
        }
        changes: dict[tuple[int, int], Tensor | None] = {}
        squares = v.new_zeros(self._tape.samples)
        for group in self._groups:
            mine = {key: b.requires_grad_() for key, b in leaves.items() if key[0] in group}
            with torch.enable_grad():
                norms = self._squared_norms(group, mine)
                found = torch.autograd.grad(norms.sum() / 2, list(mine.values()), allow_unused=True)
            changes.update(zip(mine, found, strict=True))
            squares = squares + norms.detach()
        sent = [(b, changes[key]) for key, b in zip(self._keys, self._linear, strict=True)]
        live = [(b, change) for b, change in sent if change is not None]
        (pushed,) = torch.autograd.grad(
            [b for b, _ in live], self._cotangent, [c for _, c in live], retain_graph=True
        )
        result = self._project(pushed).flatten(1)
        # u^T A u is the squared norm of J^T u: the forward is checked by the backward.
        v = v.flatten(1)
        self.agreement.note(_inner(v, result), squares.double(), norm(v) * norm(result))
        return result

    def _backward(self, edges: Sequence[Any], v: Tensor, *, keep: bool) -> tuple[Any, ...]:
        return torch.autograd.grad(
            self._outputs, edges, v, retain_graph=True, create_graph=keep, allow_unused=True
        )

    def _squared_norms(self, group: set[int], cotangents: dict[tuple[int, int], Tensor]) -> Tensor:
        found: dict[int, list[Piece]] = {}
        for number in sorted(group):
            use = self._tape.uses[number]
            mine = [
                None if (b := cotangents.get((number, place))) is None else b.reshape(shape)
                for place, shape in enumerate(use.shapes)
            ]
            for weight, piece in pieces_of(use, [None if b is None else b[None] for b in mine]):
                found.setdefault(id(weight), []).append(piece)
        recorder = self._tape._recorder
        for made in recorder.made:
            for piece in found.pop(id(made), []):
                for base, gradients in _through(made, recorder.bases[id(made)], piece):
                    found.setdefault(id(base), []).append(gradients)
        return torch.stack([squared_norms(pieces) for pieces in found.values()]).sum(0)


def _groups(tape: Tape, wanted: set[int]) -> list[set[int]]:
    """Sets of uses that share parameters, so that each set can be measured on its own."""
    groups: list[tuple[set[int], set[int]]] = []  # parameters, uses
    for number in sorted(wanted):
        use: Use = tape.uses[number]
        parameters = {
            id(p) for weight in use.weights for p in tape._recorder.bases.get(id(weight), [weight])
        }
        numbers = {number}
        apart = []
        for others, members in groups:
            if others & parameters:
                parameters |= others
                numbers |= members
            else:
                apart.append((others, members))
        groups = [*apart, (parameters, numbers)]
    return [numbers for _, numbers in groups]


def _through(made: Tensor, bases: list[Tensor], piece: Piece) -> list[tuple[Tensor, Piece]]:
    """Carry gradients of a made tensor on to its parameters, differentiably."""
    k, m, _, q, _ = piece.sizes
    gradients = piece.slab(0, q).reshape(k * m, *made.shape)
    columns = [
        torch.autograd.grad(made, bases, g, retain_graph=True, create_graph=True, allow_unused=True)
        for g in gradients
    ]
    return [
        (base, Dense(torch.stack([g for g in column if g is not None]).reshape(k, m, 1, 1, -1)))
        for base, column in zip(bases, zip(*columns, strict=True), strict=True)
        if any(g is not None for g in column)
    ]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that require gradients, by name; `ValueError` if there are none."""
    parameters: dict[str, Tensor] = {
        name: p for name, p in model.named_parameters() if p.requires_grad
    }
    if not parameters:
        raise ValueError(
            f"{type(model).__name__} has no trainable parameters: call requires_grad_() on those "
            "to measure."
        )
    return parameters


def _several(model: nn.Module, count: int) -> ValueError:
    return ValueError(
        f"{type(model).__name__} returned {count} values: expected one floating-point tensor. Wrap "
        "the model in a module that returns the tensor that the loss is given."
    )


def plain_kernels(model: nn.Module) -> Any:
    """Kernels that can be differentiated forward and twice."""
    return JacobianProduct(model)._plain_kernels()


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner products along the last dimension, of rows all together, in float64."""
    return (a * b).sum(-1, dtype=torch.float64)
