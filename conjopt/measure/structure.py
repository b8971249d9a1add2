"""Structure matrices and their extreme eigenvalues (Thm 2.1 and 2.4).

The Jacobians of the outputs are not formed: vectors of a basis of the outputs are pulled back to
the layers, and only inner products of what arrives there are taken (`conjopt.measure.layers`). For
small models there is a shorter way (`conjopt.measure.dense`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.measure.costs import has_narrow_convolutions, whole_is_shorter
from conjopt.measure.dense import Shortcut
from conjopt.measure.last_layer import empty_output
from conjopt.measure.layers.layout import Samples
from conjopt.measure.layers.pieces import cast, products
from conjopt.measure.layers.tape import (
    Arguments,
    Tape,
    as_arguments,
    number_of_samples,
    places_of_inputs,
)
from conjopt.measure.layers.totals import GramTotal
from conjopt.measure.tangent import basis_like, tangent_basis
from conjopt.potentials import Potential

__all__ = ["batch_structure_matrix", "extreme_eigenvalues", "structure_matrix", "tangent_basis"]

_LARGE = 2**18  # elements of inputs of which two samples are tried first
# Functions whose gradients stay in factors; others give a weight's size for each output.
_FACTORED = {
    F.linear,
    F.embedding,
    torch.mm,
    torch.matmul,
    Tensor.mm,
    Tensor.matmul,
    Tensor.__matmul__,
}


def structure_matrix(
    model: nn.Module, inputs: Any, *, potential: Potential | None = None, memory: float = 2**28
) -> Tensor:
    """Return the structure matrices `A_i = J_i J_i^T` of all samples.

    `J_i` is the Jacobian of all that the model returns for sample `i`, flattened to `k` numbers, in
    the parameters that require gradients; a sequence is one sample. On the simplex, `V` holds what
    sums to zero over the classes, dimension 1 of the outputs, at every further place: the Jacobian
    is projected on it before the product, with the rows of `tangent_basis` as coordinates.

    The model runs in the mode it is in, on copies of its buffers, and draws from the random number
    generators without moving them. The batch is taken in parts where it has to be, unless
    the model draws random numbers: its draws belong to the whole batch.

    Args:
        model: Returns one floating-point tensor, samples along dimension 0.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        potential: Of the loss, for its tangent space `V`; without one, all of `R^k`.
        memory: Bytes that the gradients of the layers may take, as estimated from the shapes of the
            layers' results; a single sample is always taken. The graph of the forward of a part and
            the result come on top.

    Returns:
        Shape `(m, k, k)`, or `(m, d, d)` with `d = dim V`, in squared units of the outputs per unit
        of the parameters; zeros without trainable parameters. Symmetric and positive semidefinite
        up to rounding; float32 or wider.

    Raises:
        ValueError: If the model does not return one tensor with the samples along dimension 0, if a
            potential on the simplex finds no dimension of classes, and, on the CPU, if outputs are
            not finite; on other devices NaN goes on to the results.
        RuntimeError: If there are no per-sample gradients, as for batch normalisation in training
            mode, or if parameters are used out of sight.

    Reference:
        docs/theory.md, Thm 2.1.

    Example:
        >>> from conjopt.measure import structure_matrix
        >>> from conjopt.potentials import Softmax
        >>> model, x = nn.Linear(2, 2), torch.tensor([[3.0, 4.0]])
        >>> structure_matrix(model, x)  # (||x||^2 + 1) I
        tensor([[[26.,  0.],
                 [ 0., 26.]]])
        >>> structure_matrix(model, x, potential=Softmax()).shape
        torch.Size([1, 1, 1])
    """
    batch = _Batch("structure_matrix", model, inputs, potential, memory)
    if not batch.samples:
        return batch.empty()

    def through_layers() -> Tensor:
        parts, tape = batch.plan()
        if len(parts) == 1:
            found = batch.gram(tape or batch.forward(parts))
        else:
            found = torch.cat([batch.gram(batch.forward([part])) for part in parts])
        _check(model, inputs, "structure_matrix")
        return found

    return batch.shortest(through_layers, _within_samples)


def batch_structure_matrix(
    model: nn.Module, inputs: Any, *, potential: Potential | None = None, memory: float = 2**28
) -> Tensor:
    """Return the structure matrix `K_B` of the batch, with the blocks `J_i J_j^T`.

    Args:
        model: As for `structure_matrix`.
        inputs: As for `structure_matrix`.
        potential: As for `structure_matrix`.
        memory: As for `structure_matrix`; a batch that needs more is taken in pairs of parts, which
            are pulled back once for each other part.

    Returns:
        Shape `(m k, m k)`, or `(m d, m d)`, sample-major: the coordinates of sample 0 come first.

    Raises:
        ValueError: As for `structure_matrix`.
        RuntimeError: As for `structure_matrix`.

    Reference:
        docs/theory.md, Thm 2.4.

    Example:
        >>> from conjopt.measure import batch_structure_matrix
        >>> model = nn.Linear(2, 1, bias=False)
        >>> batch_structure_matrix(model, torch.tensor([[1.0, 0.0], [3.0, 4.0]]))
        tensor([[ 1.,  3.],
                [ 3., 25.]])
    """
    batch = _Batch("batch_structure_matrix", model, inputs, potential, memory)
    if not batch.samples:
        return batch.empty().reshape(0, 0)

    def through_layers() -> Tensor:
        parts, tape = batch.plan(at_once=2)
        if len(parts) > 1:
            found = _in_pairs(batch, parts)
        else:
            found = batch.gram(tape or batch.forward(parts), across=True).flatten(2).flatten(0, 1)
        _check(model, inputs, "batch_structure_matrix")
        return found

    return batch.shortest(through_layers, _across_samples, together=True)


def _within_samples(columns: list[Tensor]) -> Tensor:
    total = products(columns[0])
    for J in columns[1:]:  # joined, they would take as much memory again
        total += products(J)
    return total


def _across_samples(columns: list[Tensor]) -> Tensor:
    J = torch.cat(columns, 2).flatten(0, 1)
    return J @ J.T


def _in_pairs(batch: _Batch, parts: Sequence[range]) -> Tensor:
    """Return the structure matrix of a batch, `(m d, m d)`, two parts at a time."""
    blocks: dict[tuple[int, int], Tensor] = {}
    for i, j in itertools.combinations(range(len(parts)), 2):
        gram = batch.gram(batch.forward([parts[i], parts[j]]), across=True)
        place = {i: slice(len(parts[i])), j: slice(len(parts[i]), None)}
        for a, b in itertools.product((i, j), repeat=2):
            if (a, b) not in blocks:
                blocks[a, b] = gram[place[a], :, place[b]].flatten(2).flatten(0, 1)
    numbers = range(len(parts))
    return torch.cat([torch.cat([blocks[i, j] for j in numbers], 1) for i in numbers])


def extreme_eigenvalues(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the greatest eigenvalue of symmetric matrices, exactly.

    All eigenvalues are computed, in float64, on the matrices' device. The symmetric part counts.

    Args:
        matrix: Symmetric matrices, shape `(..., d, d)`.

    Returns:
        `lo` and `hi`, each of shape `(...)`, in the matrices' units and dtype; zeros for `d = 0`.
        The `lo` of a semidefinite matrix may be negative by rounding, of size `eps * hi`. On
        devices other than the CPU, NaN for matrices that are not finite.

    Raises:
        ValueError: If the matrices are not square or, on the CPU, not finite.

    Reference:
        docs/theory.md, Thm 2.1.

    Example:
        >>> from conjopt.measure import extreme_eigenvalues
        >>> extreme_eigenvalues(torch.tensor([[2.0, 1.0], [1.0, 2.0]]))
        (tensor(1.), tensor(3.))
    """
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2]:
        raise ValueError(
            f"extreme_eigenvalues: expected square matrices (..., d, d), got shape "
            f"{tuple(matrix.shape)}"
        )
    matrix = matrix.detach()
    if not matrix.is_floating_point():
        matrix = matrix.double()
    if matrix.numel() == 0:
        zeros = matrix.new_zeros(matrix.shape[:-2])
        return zeros, zeros.clone()
    finite = matrix.isfinite().all(-1).all(-1)
    if matrix.device.type == "cpu" and not finite.all():
        raise ValueError(
            f"extreme_eigenvalues: {int((~finite).sum())} of {finite.numel()} matrices hold NaN or "
            "infinity, which have no eigenvalues; leave them out"
        )
    wide = torch.where(finite[..., None, None], matrix.double(), 0)
    values = torch.linalg.eigvalsh((wide + wide.mT) / 2).to(matrix.dtype)
    values = torch.where(finite.unsqueeze(-1), values, math.nan)
    return values[..., 0], values[..., -1]


def _check(model: nn.Module, inputs: Any, name: str) -> None:
    from conjopt.measure.checking import first_use_check  # which measures, too

    if any(parameter.requires_grad for parameter in model.parameters()):
        first_use_check(model, inputs, name=name)


def _checking() -> bool:
    from conjopt.measure.comparing import CHECKING  # which measures, too

    return CHECKING.get()


class _Batch:
    """A batch, forwards on parts of it, and the inner products of gradients that they give."""

    def __init__(
        self, name: str, model: nn.Module, inputs: Any, potential: Potential | None, memory: float
    ) -> None:
        if potential is not None and not isinstance(potential, Potential):
            raise ValueError(
                f"{name}: potential must be a conjopt.potentials.Potential or None, got "
                f"{type(potential).__name__}; see conjopt.losses.potential_of"
            )
        if not memory > 0:
            raise ValueError(f"{name}: memory must be a positive number of bytes, got {memory!r}")
        self.name, self.model, self.potential, self.memory = name, model, potential, memory
        self.args, self.kwargs = as_arguments(inputs)
        leaves = tree_leaves((self.args, self.kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        self.samples = number_of_samples(tensors)
        self._large = sum(tensor.numel() for tensor in tensors) > _LARGE
        self._draws = False
        self._like: Tensor | None = None  # like the outputs
        self._attends = self._narrow = self._shorter = False
        self._size = 0.0  # bytes that the gradients of the layers take
        self._places: list[Samples | None] | None = None

    def empty(self) -> Tensor:
        """Return the structure matrices of no samples, `(0, d, d)`."""
        output = empty_output(self.model, Arguments(self.args, self.kwargs))
        d = len(self._basis(output))
        return torch.zeros(0, d, d, dtype=_at_least_float32(output), device=output.device)

    def plan(self, at_once: int = 1) -> tuple[list[range], Tape | None]:
        """Split the batch into parts of which `at_once` fit the memory; and a forward of it all.

        The forward of a whole batch of small inputs comes first and tells the sizes; of a batch of
        large ones, or one that was split before, two samples tell them.
        """
        m = self.samples
        first = min(m, 2) if self._large else m
        tape = self.forward([range(first)])
        d = len(self._basis(tape.only_output()))
        self._narrow = has_narrow_convolutions(tape, d)
        self._shorter = whole_is_shorter(tape, m, d)
        by_sample = self._bytes(tape) / first
        self._size = m * by_sample
        if self._draws or m == 1 or self._size <= self.memory:
            return [range(m)], tape if first == m else None
        number = math.ceil(m / max(1, math.floor(self.memory / (at_once * by_sample))))
        ends = [i * m // number for i in range(number + 1)]
        return [range(*pair) for pair in itertools.pairwise(ends)], None

    def shortest(
        self,
        through_layers: Callable[[], Tensor],
        product: Callable[[list[Tensor]], Tensor],
        *,
        together: bool = False,
    ) -> Tensor:
        """Take the shortcut of small models where it is open, and find out where it may be."""
        (x, *others), m = self.args or (None,), self.samples
        plain = type(x) is Tensor and not others and not self.kwargs and x.shape[:1] == (m,)
        shortcut = Shortcut(self.name, self.model, x) if plain and not _checking() else None
        if shortcut is None:
            return through_layers()
        self._large |= shortcut.size > self.memory
        if (like := shortcut.like) is not None:
            found = self._by_jacobian(shortcut, like, product)
            return through_layers() if found is None else found
        result = through_layers()
        if shortcut.untried and (like := self._like) is not None:
            agrees = False
            if not self._draws and shortcut.fits(
                like,
                attending=self._attends,
                narrow=self._narrow and self._size <= self.memory and not together,
                shorter=self._shorter,
                together=together,
            ):
                agrees = self._agrees(shortcut, like, product, result)
                if shortcut.keeps():
                    through_layers()  # which leaves plain tensors
            shortcut.settle(like if agrees else None, size=self._size)
        return result

    def _parts(self, shortcut: Shortcut, like: Tensor) -> tuple[Tensor, list[range]]:
        """Return a basis, and parts of the samples whose Jacobians there is memory for, if any."""
        basis = self._basis(like)
        if shortcut.narrow and shortcut.size > self.memory:
            return basis, []
        # The columns of a part, what they are copied from, and as much again in between.
        return basis, shortcut.parts(len(basis), self.memory / (4 * like.itemsize))

    def _by_jacobian(
        self, shortcut: Shortcut, like: Tensor, product: Callable[[list[Tensor]], Tensor]
    ) -> Tensor | None:
        """Multiply the whole Jacobian with itself, if it has entries and there is memory for it."""
        basis, parts = self._parts(shortcut, like)
        found: list[Tensor] = []
        with torch.no_grad():
            for rows in parts:
                columns = shortcut.jacobian(basis, like, rows)
                if columns is None:
                    return None
                found.append(product(columns))
        if len(found) < 2:
            return found[0] if found else None
        return torch.cat(found)

    def _agrees(
        self,
        shortcut: Shortcut,
        like: Tensor,
        product: Callable[[list[Tensor]], Tensor],
        result: Tensor,
    ) -> bool:
        """Whether the whole Jacobian gives a result, too: tried on one part of each size."""
        basis, parts = self._parts(shortcut, like)
        eps = torch.finfo(like.dtype).eps
        with torch.no_grad():
            for rows in parts if len(parts) < 2 else (parts[0], parts[-1]):
                columns = shortcut.tried(basis, like, rows)
                expected = result if len(parts) < 2 else result[rows.start : rows.stop]
                if columns is None or not _same(product(columns), expected, eps):
                    return False
        return bool(parts)

    def forward(self, parts: Sequence[range]) -> Tape:
        """Run the model on parts of the batch."""
        args, kwargs = self.args, self.kwargs
        if sum(map(len, parts)) < self.samples:
            args, kwargs = self._taken(parts)
        model = getattr(self.model, "_orig_mod", self.model)
        tape = Tape(model, Arguments(args, kwargs))
        self._draws = tape.draws
        output = tape.only_output()
        self._attends = any(use.function is F.multi_head_attention_forward for use in tape.uses)
        self._like = output.new_empty(()).expand(self.samples, *output.shape[1:])
        if output.device.type == "cpu" and not output.isfinite().all():
            bad = int((~output.detach().isfinite()).flatten(1).any(1).sum())
            raise ValueError(
                f"{self.name}: the outputs of {bad} of {tape.samples} samples hold NaN or infinity"
            )
        return tape

    def _taken(self, parts: Sequence[range]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Take parts of the inputs."""
        if self._places is None:
            self._places = places_of_inputs(self.model, self.args, self.kwargs, self.samples)
        places = iter(self._places)

        def take(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or (at := next(places)) is None:
                return leaf
            size = leaf.shape[at.dim] // self.samples
            taken = [leaf.narrow(at.dim, size * p.start, size * len(p)) for p in parts]
            return torch.cat(taken, at.dim)

        taken: tuple[tuple[Any, ...], dict[str, Any]] = tree_map(take, (self.args, self.kwargs))
        return taken

    def gram(self, tape: Tape, *, across: bool = False) -> Tensor:
        """Sum the inner products over the parameters: within each sample, or across the batch."""
        output = tape.only_output()
        basis, dtype = self._basis(output), _at_least_float32(output)
        m, d = tape.samples, len(basis)
        total = GramTotal(across, m, d, dtype, output.device)
        if d == 0 or not output.requires_grad:
            return total.result()
        cotangents = basis.reshape(d, 1, *output.shape[1:]).expand(d, *output.shape)
        with torch.no_grad():
            for _, pieces in tape.pull([output], cotangents):
                total.add([cast(piece, dtype) for piece in pieces])
            return total.result()

    def _basis(self, output: Tensor) -> Tensor:
        try:
            return basis_like(output, self.potential)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}, got {tuple(output.shape)}") from None

    def _bytes(self, tape: Tape) -> int:
        """Estimate what the gradients of the layers take."""
        return max(1, len(self._basis(tape.only_output())) * bytes_by_cotangent(tape))


def bytes_by_cotangent(tape: Tape) -> int:
    """Estimate what the gradients of the layers take for one cotangent, at least 1."""
    elements = 0
    for use in tape.uses:
        elements += 2 * sum(map(math.prod, use.shapes))  # one by one, and stacked
        if use.function not in _FACTORED:
            elements += tape.samples * sum(weight.numel() for weight in use.weights)
    return max(1, elements * _at_least_float32(tape.only_output()).itemsize)


def _same(found: Tensor, expected: Tensor, eps: float) -> bool:
    """Whether two results agree, the largest difference to half of the digits of the largest."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    apart, size = (found - expected).abs().max(), expected.abs().max()
    return bool(apart <= math.sqrt(eps) * size)


def _at_least_float32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
