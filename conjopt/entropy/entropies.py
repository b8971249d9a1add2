"""Entropies of targets, and what a map of the inputs loses (Def 1.1 and 1.2, Thm 1.4)."""

from __future__ import annotations

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from conjopt.entropy.grouping import group_rows
from conjopt.entropy.laws import Law, renumber
from conjopt.entropy.reading import Sample, read_targets
from conjopt.potentials import Potential


def generalized_entropy(
    targets: Tensor | ArrayLike, potential: Potential, *, weights: Tensor | ArrayLike | None = None
) -> Tensor:
    """Return `Ent(Y) = E Phi(Y) - Phi(E Y)` of targets, the least risk of a constant output.

    For classes it is Shannon's entropy in nats under `Softmax`, and `1/a` times Tsallis' under
    `Entmax(a)`; under `Squared` it is half the total variance (divided by `n`, not `n - 1`). It is
    computed as the mean divergence `E D(Y, E Y)`, which nothing cancels in: targets that are all
    equal give exactly 0, and it is never negative.

    Args:
        targets: Arrays or tensors of any device: class indices, integers of shape `(n,)`, for a
            potential on the simplex; or else points of the domain of `Phi`, floating, `(n, k)`.
            Potentials that are not on the simplex take any real dtype, and `(n,)` as `(n, 1)`;
            more dimensions are flattened to `k`.
        potential: The potential `Phi`.
        weights: Weights of the samples, `(n,)`, non-negative and not all 0; in any unit. Rows of
            weight 0 do not count, whatever they hold. None weighs all samples the same.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: For a dtype that does not fit the argument.
        ValueError: For shapes that do not belong together, empty data, values that are not finite,
            negative weights, negative class indices, or targets outside of the domain of `Phi`.

    Reference:
        docs/theory.md, Def 1.1.

    Example:
        >>> from conjopt.entropy import generalized_entropy
        >>> from conjopt.potentials import Softmax, Squared
        >>> generalized_entropy([0, 1, 1, 0], Softmax())
        tensor(0.6931, dtype=torch.float64)
        >>> generalized_entropy([1e8 + 1, 1e8 - 1], Squared())
        tensor(0.5000, dtype=torch.float64)
    """
    sample = Sample(weights, targets=targets)
    one = torch.zeros(len(sample.weight), dtype=torch.int64)
    return read_targets(sample, potential).entropy(one)


def conditional_entropy(
    targets: Tensor | ArrayLike,
    groups: Tensor | ArrayLike,
    potential: Potential,
    *,
    weights: Tensor | ArrayLike | None = None,
) -> Tensor:
    """Return `Ent(Y|Z)`, the mean over groups of the entropy of the targets in a group.

    It is the least risk of all outputs that are a function of the group.

    Args:
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        groups: Values of `Z`: labels `(n,)`, or rows `(n, ...)`; real, of any dtype. Equal rows
            are one group, exactly; `-0.0` equals `0.0`.
        potential: The potential `Phi`.
        weights: Weights of the samples, `(n,)`, see `generalized_entropy`.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `generalized_entropy`.
        ValueError: As `generalized_entropy`, and for groups that are not finite.

    Reference:
        docs/theory.md, Def 1.2.

    Example:
        >>> from conjopt.entropy import conditional_entropy
        >>> from conjopt.potentials import Softmax
        >>> conditional_entropy([0, 1, 1, 1], [7, 7, 9, 9], Softmax())
        tensor(0.3466, dtype=torch.float64)
    """
    sample = Sample(weights, targets=targets, groups=groups)
    return read_targets(sample, potential).entropy(group_rows(sample, "groups")[0])


def information_loss(
    targets: Tensor | ArrayLike,
    groups: Tensor | ArrayLike,
    coarser_groups: Tensor | ArrayLike,
    potential: Potential,
    *,
    weights: Tensor | ArrayLike | None = None,
) -> Tensor:
    """Return `I = E D(ybar_X, ybar_Z) >= 0`, by which the map `Z = T(X)` raises the floor.

    `Ent(Y|Z) = Ent(Y|X) + I`. It is 0 where the mean target is the same in all groups that a
    coarser group unites, and along a chain of maps the losses add up.

    Args:
        targets: Class indices `(n,)` or points `(n, k)`, see `generalized_entropy`.
        groups: Values of `X`, labels `(n,)` or rows `(n, ...)`, see `conditional_entropy`.
        coarser_groups: Values of `Z`, labels `(n,)` or rows `(n, ...)`: a function of `groups`.
        potential: The potential `Phi`.
        weights: Weights of the samples, `(n,)`, see `generalized_entropy`.

    Returns:
        Shape `()`, float64 on the CPU, in units of the mean Fenchel-Young loss.

    Raises:
        TypeError: As `generalized_entropy`.
        ValueError: As `conditional_entropy`, and if a group is split over coarser groups.

    Reference:
        docs/theory.md, Thm 1.4.

    Example:
        >>> from conjopt.entropy import information_loss
        >>> from conjopt.potentials import Softmax
        >>> x, y = [-2, -1, 1, 2], [0, 1, 1, 0]
        >>> information_loss(y, x, [4, 1, 1, 4], Softmax())  # x squared: y is an even function of x
        tensor(0., dtype=torch.float64)
        >>> information_loss(y, x, [-1, -1, 1, 1], Softmax())
        tensor(0.6931, dtype=torch.float64)
    """
    sample = Sample(weights, targets=targets, groups=groups, coarser_groups=coarser_groups)
    points = read_targets(sample, potential)
    group, first = group_rows(sample, "groups")
    coarser, _ = group_rows(sample, "coarser_groups")
    of_group = coarser[first]
    split = coarser != of_group[group]
    if bool(split.any()):
        row = int(split.nonzero()[0])
        raise ValueError(
            f"coarser_groups splits {sample.group_of(row)}: its rows "
            f"{sample.number(int(first[group[row]]))} and {sample.number(row)} differ there. "
            "Expected a function of groups: compute coarser_groups from groups."
        )
    # A coarser group of a single group, or of equal targets, loses nothing.
    keep = points.mixed(coarser) & (torch.bincount(of_group) > 1)[coarser]
    if not bool(keep.any()):
        return torch.zeros((), dtype=torch.float64)
    rank = torch.empty_like(of_group)  # groups in the order of coarser groups
    rank[torch.argsort(of_group, stable=True)] = torch.arange(len(of_group))
    group = renumber(rank[group[keep]])
    law = points.select(keep).law(group)
    coarser_of_group = torch.empty_like(law.total, dtype=torch.int64)
    coarser_of_group[group] = coarser[keep]
    means = Law(potential, points.k, law.means, renumber(coarser_of_group), law.total)
    return means.entropy() / points.weight.sum()
