"""Directions ``u`` of a step ``theta <- theta - a u``, for the step rule to scale.

A direction proposes without writing to its state, so that a step can still be given up, and
commits afterwards.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from conjopt.measure.shards import is_sharded, sharded_as, whole
from conjopt.optim.gate import Gate, write

__all__ = ["ByGroup", "Direction", "Momentum", "Spectral", "orthogonalize"]

State = MutableMapping[str, Any]


Pending = list[Any]
T = TypeVar("T")


class Direction(abc.ABC):
    """How gradients become a direction.

    Attributes:
        name: as `ConjSGD` takes it.
        held_out: whether a measuring step makes the direction from one half of the batch, so that
            the other half can give its unbiased slope.

    Example:
        >>> class Sign(Direction):
        ...     name, held_out = "sign", True
        ...
        ...     def propose(self, gradients, batch_gradients, states, groups):
        ...         return [gradient.sign() for gradient in gradients], []
        ...
        ...     def commit(self, batch_gradients, states, groups, pending, gate):
        ...         pass
        >>> Sign().propose([torch.tensor([3.0, -1.0])], [], [{}], [{}])
        ([tensor([ 1., -1.])], [])
    """

    name: ClassVar[str]
    held_out: ClassVar[bool]

    @abc.abstractmethod
    def propose(
        self,
        gradients: Sequence[Tensor],
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
    ) -> tuple[list[Tensor], Pending]:
        """The direction, and what is to be committed if the step is taken; nothing is written to.

        Args:
            gradients: that the direction is made from, of a half of the batch if it is held out.
            batch_gradients: of the whole batch.
            states: of each parameter, as `commit` left them.
            groups: the parameter group of each.

        Returns:
            ``u`` in the gradients' shapes, which may share memory with the pending state, and that
            state.
        """

    @abc.abstractmethod
    def commit(
        self,
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
        pending: Pending,
        gate: Gate,
    ) -> None:
        """Take the batch into the state.

        Args:
            batch_gradients: of the whole batch, finite.
            states: written to.
            groups: the parameter group of each.
            pending: what `propose` returned.
            gate: () whether the step is taken; if not, the state stays as it is.
        """


class Momentum(Direction):
    """Heavy ball or Nesterov on the gradient, with the buffer of `torch.optim.SGD`.

    ``b <- momentum b + (1 - dampening) g``; ``u = b``, or ``g + momentum b`` with ``nesterov``,
    which is ignored at momentum 0. The same operations as torch's in the same order, so that a
    constant step reproduces it bit for bit.

    Example:
        >>> direction, state = Momentum(), {}
        >>> group = {"momentum": 0.9, "dampening": 0.0, "nesterov": False}
        >>> g = torch.ones(1)
        >>> for _ in range(2):
        ...     u, pending = direction.propose([g], [g], [state], [group])
        ...     direction.commit([g], [state], [group], pending, None)
        >>> u
        [tensor([1.9000])]
    """

    name = "sgd"
    held_out = False

    def propose(
        self,
        gradients: Sequence[Tensor],
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
    ) -> tuple[list[Tensor], Pending]:
        """See `Direction.propose`."""
        directions: list[Tensor] = []
        pending: Pending = []
        for gradient, of_batch, state, group in zip(
            gradients, batch_gradients, states, groups, strict=True
        ):
            momentum = group["momentum"]
            if momentum == 0:
                directions.append(gradient)
                pending.append(None)
                continue
            kept = buffer = self._buffer(of_batch, state, group)
            if gradient is not of_batch:
                buffer = self._buffer(gradient, state, group)
            nesterov = group["nesterov"]
            directions.append(gradient.add(buffer, alpha=momentum) if nesterov else buffer)
            pending.append(kept)
        return directions, pending

    def commit(
        self,
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
        pending: Pending,
        gate: Gate,
    ) -> None:
        """See `Direction.commit`."""
        for buffer, state in zip(pending, states, strict=True):
            if buffer is not None:
                old = state.get("momentum_buffer", 0.0)
                state["momentum_buffer"] = write(gate, buffer, old)

    def _buffer(self, gradient: Tensor, state: State, group: dict[str, Any]) -> Tensor:
        old = state.get("momentum_buffer")
        if old is None:
            return gradient.clone()
        return old.mul(group["momentum"]).add_(gradient, alpha=1 - group["dampening"])


class Spectral(Direction):
    """Orthogonalised momentum for matrices, momentum over its root mean square for the rest.

    The orthogonalised matrix is the steepest descent in the spectral norm: the most decrease for
    the change that it makes in the extreme eigenvalues of the layer's share of the structure
    matrix. Convolutions are matrices of outputs by all the rest; tensors with one row or one column
    are vectors, scaled by one number each.

    With ``m <- momentum m + (1 - momentum) g``, ``u`` is made from the look-ahead
    ``momentum^2 m + (1 - momentum^2) g``, or from the new ``m`` without ``nesterov``.

    Args:
        second_moment_decay: of the mean square gradients that vectors are scaled by.

    Raises:
        ValueError: if the decay is not in [0, 1).

    Example:
        >>> direction, gradient = Spectral(), torch.diag(torch.tensor([3.0, 1.0]))
        >>> group = {"momentum": 0.9, "nesterov": True}
        >>> (u,), _ = direction.propose([gradient], [gradient], [{}], [group])
        >>> bool((torch.linalg.svdvals(u) - 1).abs().max() < 0.3)  # near 1, whatever they were
        True
    """

    name = "spectral"
    held_out = True

    def __init__(self, second_moment_decay: float = 0.99) -> None:
        if not 0 <= second_moment_decay < 1:
            raise ValueError(
                f"Spectral: second_moment_decay={second_moment_decay}, expected 0 <= decay < 1; "
                "0.99 is the default"
            )
        self.second_moment_decay = second_moment_decay

    def propose(
        self,
        gradients: Sequence[Tensor],
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
    ) -> tuple[list[Tensor], Pending]:
        """See `Direction.propose`."""
        ahead = []
        for gradient, state, group in zip(gradients, states, groups, strict=True):
            kept = group["momentum"] ** (2 if group["nesterov"] else 1)
            momentum = state.get("momentum_buffer")
            step = gradient.mul(1 - kept)
            ahead.append(step if momentum is None else step.add_(momentum, alpha=kept))
        directions: list[Any] = [None] * len(ahead)
        pending: Pending = [None] * len(ahead)
        shapes: dict[Any, list[int]] = {}
        for i, tensor in enumerate(ahead):
            if is_matrix(tensor):
                rows, columns = tensor.shape[0], tensor.numel() // tensor.shape[0]
                # Sharded matrices are gathered one after the other, plain ones stacked.
                alone = i if is_sharded(tensor) else None
                key = (min(rows, columns), max(rows, columns), tensor.dtype, tensor.device, alone)
                shapes.setdefault(key, []).append(i)
            else:
                square, weight = pending[i] = self._mean_square(batch_gradients[i], states[i])
                rms = (square / weight).sqrt()
                directions[i] = tensor / rms.clamp_min(torch.finfo(rms.dtype).tiny)
        for members in shapes.values():
            matrices = [whole(ahead[i]).flatten(1) for i in members]
            stacked = torch.stack([m.T if m.shape[0] > m.shape[1] else m for m in matrices])
            for i, matrix, turned in zip(members, matrices, orthogonalize(stacked), strict=True):
                rows, columns = matrix.shape
                if rows > columns:
                    turned = turned.T * (rows / columns) ** 0.5
                directions[i] = sharded_as(turned.reshape(ahead[i].shape), ahead[i])
        return directions, pending

    def commit(
        self,
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
        pending: Pending,
        gate: Gate,
    ) -> None:
        """See `Direction.commit`."""
        for gradient, state, group, squares in zip(
            batch_gradients, states, groups, pending, strict=True
        ):
            if squares is not None:
                for name, value in zip(("square", "square_weight"), squares, strict=True):
                    state[name] = write(gate, value, state.get(name, 0.0))
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            share = 1 - group["momentum"]
            if gate is not None:
                share = gate.to(gradient.dtype) * share
            state["momentum_buffer"].lerp_(gradient, share)

    def _mean_square(self, gradient: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Running mean of the mean square gradient and its bias correction, both ()."""
        share = 1 - self.second_moment_decay
        now = whole(gradient.square().mean())
        # Of another type where the state was loaded from a model of one.
        square = state.get("square", torch.zeros_like(now)).to(now)
        weight = state.get("square_weight", torch.zeros_like(now)).to(now)
        return square.lerp(now, share), weight.lerp(torch.ones_like(now), share)


class ByGroup(Direction):
    """The direction that each parameter's group names.

    On measuring steps all are made from the second half of the batch, as held-out slopes are of
    the whole of ``u``.

    Args:
        named: the directions by name.

    Example:
        >>> direction = ByGroup({"sgd": Momentum(), "spectral": Spectral()})
        >>> groups = [{"momentum": 0.0, "nesterov": False, "direction": d} for d in direction.named]
        >>> gradients = [torch.diag(torch.tensor([3.0, 1.0]))] * 2
        >>> u, _ = direction.propose(gradients, gradients, [{}, {}], groups)
        >>> [bool(torch.equal(t, gradients[0])) for t in u]
        [True, False]
    """

    name = "by group"
    held_out = True

    def __init__(self, named: Mapping[str, Direction]) -> None:
        self.named = dict(named)

    def propose(
        self,
        gradients: Sequence[Tensor],
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
    ) -> tuple[list[Tensor], Pending]:
        """See `Direction.propose`."""
        directions: list[Any] = [None] * len(groups)
        pending: Pending = []
        for name, direction in self.named.items():
            places = [i for i, group in enumerate(groups) if group["direction"] == name]
            if not places:
                continue
            own, to_commit = direction.propose(
                _at(gradients, places),
                _at(batch_gradients, places),
                _at(states, places),
                _at(groups, places),
            )
            pending.append((direction, places, to_commit))
            for i, u in zip(places, own, strict=True):
                directions[i] = u
        return directions, pending

    def commit(
        self,
        batch_gradients: Sequence[Tensor],
        states: Sequence[State],
        groups: Sequence[dict[str, Any]],
        pending: Pending,
        gate: Gate,
    ) -> None:
        """See `Direction.commit`."""
        for direction, places, to_commit in pending:
            direction.commit(
                _at(batch_gradients, places),
                _at(states, places),
                _at(groups, places),
                to_commit,
                gate,
            )


# Three quintic steps fitted one after the other to singular values in [0.01, 1].
COEFFICIENTS = (
    (8.09337, -23.62043, 17.44615),
    (3.63659, -2.72193, 0.53655),
    (2.6613, -1.97715, 0.45262),
)


def orthogonalize(matrices: Tensor) -> Tensor:
    """The nearest matrices with orthonormal rows, roughly: singular values of about 0.7 to 1.3.

    Three steps ``X <- aX + (bA + cA^2)X`` with ``A = X X^T``, after division by the Schatten-4
    norm ``sqrt(||M M^T||_F)``; after Newton-Schulz iterations as in Muon (K. Jordan, 2024), with
    coefficients for three steps. Computed in bfloat16 on a GPU.

    Args:
        matrices: (batch, rows, columns) with no more rows than columns.

    Returns:
        the same shape; zero matrices stay zero. Directions with a singular value under a hundredth
        of the norm come out shorter.

    Example:
        >>> diagonal = torch.diag(torch.tensor([5.0, 1.0, 0.5])).unsqueeze(0)
        >>> torch.linalg.svdvals(orthogonalize(diagonal)).min() > 0.7
        tensor(True)
    """
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    # Scaled first by the largest entry, so that squares neither overflow nor vanish.
    tiny = torch.finfo(x.dtype).tiny
    x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(tiny)
    gram = torch.bmm(x, x.mT)
    squared = torch.linalg.matrix_norm(gram, keepdim=True).clamp_min(tiny)  # of the Schatten-4 norm
    x, gram = x / squared.sqrt(), gram / squared
    for i, (a, b, c) in enumerate(COEFFICIENTS):
        if i:
            gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.to(matrices.dtype)


def is_matrix(tensor: Tensor) -> bool:
    """Whether a tensor has at least two rows and two columns as (dimension 0, the rest).

    Args:
        tensor: a parameter.

    Example:
        >>> is_matrix(torch.zeros(3, 2, 1)), is_matrix(torch.zeros(1, 5)), is_matrix(torch.zeros(4))
        (True, False, False)
    """
    return tensor.ndim > 1 and tensor.shape[0] > 1 and tensor.numel() > tensor.shape[0]


def _at(items: Sequence[T], places: Sequence[int]) -> list[T]:
    return [items[i] for i in places]
