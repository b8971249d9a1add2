"""Reading and checking what the entropies are given."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.laws import Targets, blocks
from conjopt.potentials import Potential, Softmax

SAME = 64.0  # outputs that differ by this many roundings are taken as equal
MOST_CLASSES = 2**20


class Sample:
    """Arrays of one length without the rows of weight 0, and the other rows' weights `(m,)`."""

    def __init__(self, weights: Tensor | ArrayLike | None, **arrays: Tensor | ArrayLike) -> None:
        self.arrays = {name: as_tensor(name, values) for name, values in arrays.items()}
        n = len(self.arrays["targets"])
        given = torch.ones(n) if weights is None else as_tensor("weights", weights)
        lengths = {name: len(values) for name, values in self.arrays.items()}
        lengths["weights"] = len(given)
        if len(set(lengths.values())) > 1:
            raise ValueError(f"lengths {lengths}: expected one row for each sample in all of them.")
        if n == 0:
            raise ValueError("targets are empty: expected at least one sample.")
        if given.ndim != 1:
            raise ValueError(f"weights of shape {tuple(given.shape)}: expected ({n},).")
        given = given.double()
        self.rows = torch.arange(n)  # what the caller calls them
        self.check("weights", given, lambda w: (w >= 0) & (w < torch.inf), "finite numbers >= 0")
        if not bool((given > 0).any()):
            raise ValueError("weights are all 0: expected a positive one, or weights=None.")
        self.weight = given / given.max()
        if bool((self.weight == 0).any()):
            self.rows = self.weight.nonzero().squeeze(1)
            self.weight = self.weight[self.rows]
            self.arrays = {name: values[self.rows] for name, values in self.arrays.items()}

    def number(self, row: int) -> int:
        """Return the caller's number of a row."""
        return int(self.rows[row])

    def group_of(self, row: int) -> str:
        """Name the group of a row."""
        label = self.arrays["groups"][row]
        return f"group {label.item()}" if label.ndim == 0 else f"the group {_shown(label)}"

    def check(
        self, name: str, values: Tensor, holds: Callable[[Tensor], Tensor], expected: str
    ) -> None:
        """Refuse the first row that something does not hold for."""
        for lo, hi in blocks(0, len(values), values[0].numel()):
            bad = ~holds(values[lo:hi])
            if bool(bad.any()):
                row = lo + int(bad.nonzero()[0, 0])
                raise ValueError(
                    f"{name}[{self.number(row)}] = {_shown(values[row])}: expected {expected}."
                )

    def check_finite(self, name: str) -> None:
        """Refuse NaN and infinite numbers."""
        if self.arrays[name].is_floating_point():
            expected = "finite numbers; drop the row, or give it weight 0"
            self.check(name, self.arrays[name], torch.isfinite, expected)


def _shown(row: Tensor) -> str:
    values = [f"{value:.6g}" for value in row.flatten()[:6].tolist()]
    return f"({', '.join(values)}{', ...' if row.numel() > 6 else ''})" if row.ndim else values[0]


def as_tensor(name: str, values: Tensor | ArrayLike) -> Tensor:
    """Return an array-like as a tensor on the CPU, which shares its memory where it can."""
    if not isinstance(values, Tensor):
        array = np.asarray(values)
        if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
            raise TypeError(
                f"{name} of dtype {array.dtype}: expected real numbers of at most 64 bits. Number "
                "other labels by np.unique(labels, return_inverse=True)[1]."
            )
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
        if any(stride < 0 for stride in array.strides):
            array = array.copy()
        with warnings.catch_warnings():  # that an array is read-only: nothing is written here
            warnings.simplefilter("ignore")
            values = torch.from_numpy(array)
    elif values.layout != torch.strided or values.is_complex():
        raise TypeError(
            f"{name} of dtype {values.dtype}, layout {values.layout}: expected a dense tensor of "
            "real numbers; use to_dense() or torch.view_as_real."
        )
    if values.ndim == 0:
        raise ValueError(f"{name} is a single number: expected one row for each sample.")
    return values.detach().cpu()


def _columns(values: Tensor, potential: Potential) -> Tensor:
    """Return samples as `(n, k)`, which on the simplex they have to be already."""
    if potential.on_simplex or values.ndim == 2:
        return values
    return values.unsqueeze(1) if values.ndim == 1 else values.flatten(1)


def read_targets(
    sample: Sample,
    potential: Potential,
    count: tuple[str, int | None] = ("num_classes", None),
    smoothing: float = 0.0,
) -> Targets:
    """Check targets, for a number of classes or coordinates that some argument gives."""
    if not isinstance(potential, Potential):
        raise TypeError(
            f"potential={potential!r}: expected a Potential such as conjopt.potentials.Softmax(); "
            "that of a criterion is conjopt.losses.potential_of(criterion).potential."
        )
    if not 0 <= smoothing <= 1:
        raise ValueError(f"label_smoothing={smoothing}: expected a number in [0, 1].")
    if smoothing and not potential.on_simplex:
        raise ValueError(
            f"label_smoothing={smoothing}: {potential!r} is not on the simplex; leave it out, or "
            "smooth the targets yourself."
        )
    values = _columns(sample.arrays["targets"], potential)
    shape, (source, k) = f"targets of shape {tuple(values.shape)}", count
    classes = potential.on_simplex and not values.is_floating_point()
    if classes and values.dtype == torch.bool:
        raise TypeError("targets of dtype torch.bool: expected class indices; use long().")
    if values.ndim != (1 if classes else 2):
        raise ValueError(
            f"{shape} and dtype {values.dtype}: expected class indices (n,) of an integer dtype, "
            "or probabilities (n, k) of a floating one. Flatten pixels or tokens to rows, and give "
            "each the input of its sample with its place; give one-hot rows by double()."
        )
    if classes:
        if smoothing and k is None:
            raise ValueError(
                f"label_smoothing={smoothing} with class indices: expected num_classes, as a class "
                "that does not occur would not count."
            )
        values = values.long()
        sample.check(
            "targets", values, lambda y: y >= 0, "class indices >= 0; give ignored rows weight 0"
        )
        limit = MOST_CLASSES if k is None else k
        where = (
            "2^20; number the classes from 0, by np.unique(..., return_inverse=True)"
            if k is None
            else f"{k}, from {source}"
        )
        sample.check("targets", values, lambda y: y < limit, f"class indices below {where}")
        k = int(values.max()) + 1 if k is None else k
        return Targets(potential, values, sample.weight, k, smoothing)
    if values.shape[1] == 0 or (k is not None and values.shape[1] != k):
        raise ValueError(f"{shape}: expected (n, {k or 'k'}), k >= 1; {source} gives {k}.")
    sample.arrays["targets"] = values
    sample.check_finite("targets")
    sample.check(
        "targets",
        values,
        lambda y: potential.contains(y if y.is_floating_point() else y.double()),
        f"a point of the domain of {potential!r}"
        + (", probabilities that sum to 1" if potential.on_simplex else ""),
    )
    return Targets(potential, values, sample.weight, values.shape[1], smoothing)


def read_outputs(sample: Sample, potential: Potential) -> Tensor:
    """Check outputs, but for their number of columns."""
    outputs = sample.arrays["outputs"]
    if not outputs.is_floating_point():
        raise TypeError(f"outputs of dtype {outputs.dtype}: expected floating; use double().")
    if isinstance(potential, Potential):  # else it is refused with the targets
        outputs = sample.arrays["outputs"] = _columns(outputs, potential)
    if outputs.ndim != 2:
        raise ValueError(f"outputs of shape {tuple(outputs.shape)}: expected (n, k).")
    simplex = getattr(potential, "on_simplex", False)
    sample.check(
        "outputs",
        outputs,
        lambda f: torch.isfinite(f) | ((f == -torch.inf) & simplex),
        "finite numbers, or -inf for masked classes; drop the row, or give it weight 0",
    )
    return outputs


def read_rows(sample: Sample) -> Tensor:
    """Check outputs or features of any real kind, and return them as `(n, d)`."""
    rows = sample.arrays["outputs"]
    if not rows.is_floating_point():
        raise TypeError(f"outputs of dtype {rows.dtype}: expected floating; use double().")
    if rows[0].numel() == 0:
        raise ValueError(f"outputs of shape {tuple(rows.shape)}: expected (n, d), d >= 1.")
    sample.check_finite("outputs")
    return rows.flatten(1) if rows.ndim > 1 else rows.unsqueeze(1)


def read_labels(sample: Sample) -> Tensor:
    """Check that targets are class indices, and return them, `(n,)`."""
    values = sample.arrays["targets"]
    if values.is_floating_point() or values.ndim != 1:
        raise TypeError(
            f"targets of shape {tuple(values.shape)} and dtype {values.dtype}: expected class "
            "indices (n,) of an integer dtype; of probabilities or one-hot rows take argmax(1)."
        )
    return read_targets(sample, Softmax()).values


def one_for_each_group(sample: Sample, group: Tensor, first: Tensor) -> Callable[[Tensor], Tensor]:
    """Check that outputs are a function of the group, and return it, `(r,) -> (r, k)`."""
    outputs = sample.arrays["outputs"]

    def f(groups: Tensor) -> Tensor:
        return outputs[first[groups]].double()

    for lo, hi in blocks(0, len(outputs), outputs.shape[1]):
        change = (outputs[lo:hi].double() - f(group[lo:hi])).abs().amax(1)
        allowed = SAME * torch.finfo(outputs.dtype).eps * float(outputs.abs().max())
        if bool((change > allowed).any()):
            row = lo + int((change > allowed).nonzero()[0])
            raise ValueError(
                f"outputs differ within {sample.group_of(row)}, by {float(change[row - lo]):.3g} "
                f"between rows {sample.number(int(first[group[row]]))} and {sample.number(row)}. "
                "The decomposition needs outputs that are a function of the group: take them at "
                "one theta in eval() mode, without dropout or augmentation drawn per copy, and "
                "make the groups of equal inputs."
            )
    return f
