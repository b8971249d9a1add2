"""The risk between gradients and extreme eigenvalues (docs/theory.md, Thm 2.3 and 2.4)."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conjopt.losses import potential_of
from conjopt.losses.reading import PotentialOf, working_dtype
from conjopt.measure.energy import per_sample_gradient_norms
from conjopt.measure.graph_hooks import without_multi_grad_hooks
from conjopt.measure.layers.tape import as_arguments
from conjopt.measure.replay import Replay, refuse_reentrant
from conjopt.measure.structure import (
    batch_structure_matrix,
    extreme_eigenvalues,
    structure_matrix,
)

__all__ = ["MeanBounds", "PLBound", "RiskSandwich", "pl_bound", "risk_sandwich"]


class MeanBounds(NamedTuple):
    """The risk of a batch between the means of its bounds (Thm 2.3).

    Attributes:
        lower: Mean of the lower bounds, shape `()`.
        losses: The risk, shape `()`.
        upper: Mean of the upper bounds, shape `()`; infinite if one of them is.

    Reference:
        docs/theory.md, Thm 2.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import MeanBounds
        >>> MeanBounds(torch.tensor(0.5), torch.tensor(1.0), torch.tensor(2.0)).losses
        tensor(1.)
    """

    lower: Tensor
    losses: Tensor
    upper: Tensor


@dataclasses.dataclass(frozen=True)
class RiskSandwich:
    """The loss of each sample between two bounds, made by `risk_sandwich` (Thm 2.3).

    All are of shape `(m,)`. Losses and bounds are in units of the Fenchel-Young loss, and gradients
    are those of this loss, whatever the criterion's reduction, scale and weights.

    Attributes:
        lower: `phi_low(||g_i|| / sqrt(hi_i))`, at most the loss.
        losses: `l_i`.
        upper: `psi(||g_i|| / sqrt(lo_i))`, at least the loss; infinite where there is no bound.
        lo: Least eigenvalue of the structure matrix `A_i` on `V`.
        hi: Greatest eigenvalue of `A_i` on `V`.
        gradient_norms: `||g_i||`.
        residual_norms: `||e_i||`.
        weights: The share of each sample in the criterion's mean; they sum to 1.

    Reference:
        docs/theory.md, Thm 2.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import risk_sandwich
        >>> model, inputs = torch.nn.Linear(1, 1, bias=False), torch.tensor([[1.0], [2.0]])
        >>> torch.nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0.]], requires_grad=True)
        >>> found = risk_sandwich(model, torch.nn.MSELoss(), inputs, torch.tensor([[2.0], [4.0]]))
        >>> found.losses, found.hi, found.gradient_norms
        (tensor([2., 8.]), tensor([1., 4.]), tensor([2., 8.]))
        >>> found.mean().losses
        tensor(5.)
    """

    lower: Tensor
    losses: Tensor
    upper: Tensor
    lo: Tensor
    hi: Tensor
    gradient_norms: Tensor
    residual_norms: Tensor
    weights: Tensor

    def mean(self) -> MeanBounds:
        """Return the means over the samples, weighed as the criterion weighs them.

        That of the losses is the criterion's value without its scale and offset
        (`conjopt.losses.potential_of`). Samples of weight 0 do not count.

        Returns:
            Means of lower bounds, losses and upper bounds, each of shape `()`.
        """
        counts = self.weights > 0
        return MeanBounds(
            *(
                torch.where(counts, self.weights * values, 0).sum()
                for values in (self.lower, self.losses, self.upper)
            )
        )


def risk_sandwich(model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor) -> RiskSandwich:
    """Bound each sample's loss from both sides by its gradient and extreme eigenvalues (Thm 2.3).

    `phi_low(||g_i|| / sqrt(hi_i)) <= l_i <= psi(||g_i|| / sqrt(lo_i))`, with the bounds
    `phi_low` and `psi` of Thm 2.2 that depend on the residual's norm and the target alone. The
    upper bound is infinite where `psi` is, and where `lo_i` is 0. Of the measured `lo_i`, its
    rounding error `8 d eps hi_i` is taken off first, with `d` the dimension of `V`, so an
    eigenvalue that is 0 but for rounding does not pass for a positive one.

    The model runs in the mode it is in and nothing it owns is written to.

    Args:
        model: Returns one tensor with samples along dimension 0, and computes no sample's output
            from another sample (`conjopt.measure.self_check` tells).
        loss: A criterion that `conjopt.losses.potential_of` recognises.
        inputs: Of the model, `m` samples: a tensor, or a tuple or a dict of its arguments.
        targets: Of the criterion.

    Returns:
        The bounds, in units of the Fenchel-Young loss. Class weights do not enter them, only their
        mean. Samples that the criterion ignores have no target: their losses, bounds, gradient
        and residual norms are NaN, and the mean leaves them out.

    Raises:
        TypeError: For a criterion that is not recognised.
        ValueError: If the criterion has not one term for each sample (one for each token, or
            weighed elements), or for shapes of outputs and targets that do not belong together.
        RuntimeError: If per-sample gradients do not exist or cannot be seen.

    Reference:
        docs/theory.md, Thm 2.3.

    Example:
        >>> import torch
        >>> from conjopt.bounds import risk_sandwich
        >>> model, inputs = torch.nn.Linear(2, 2), torch.tensor([[1.0, 1.0], [0.0, 2.0]])
        >>> for parameter in model.parameters():
        ...     torch.nn.init.zeros_(parameter).shape
        torch.Size([2, 2])
        torch.Size([2])
        >>> found = risk_sandwich(model, torch.nn.CrossEntropyLoss(), inputs, torch.tensor([0, 1]))
        >>> found.mean()  # two classes and one layer: both bounds are the loss, log 2
        MeanBounds(lower=tensor(0.6931), losses=tensor(0.6931), upper=tensor(0.6931))
    """
    view = potential_of(loss)
    criterion = _Residuals(view, "risk_sandwich")
    with torch.enable_grad():
        norms = per_sample_gradient_norms(model, criterion, inputs, targets).detach()
    lo, hi, d = _extremes(structure_matrix(model, inputs, potential=view.potential))
    rows, points, residuals = criterion.rows, criterion.points, criterion.residuals
    norms, lo, hi = (values.to(residuals.dtype) for values in (norms, lo, hi))
    sure = _less_rounding(lo, hi, d, criterion.eps)
    low = torch.where(hi > 0, norms / hi.sqrt(), 0)
    lower = torch.where(hi > 0, view.potential.loss_bounds(low, points).lower, 0)
    above = view.potential.loss_bounds(torch.where(sure > 0, norms / sure.sqrt(), 1), points).upper
    upper = torch.where(sure > 0, above, torch.inf) if d else torch.zeros_like(norms)
    lower, losses, upper, norms, sizes = (
        torch.where(criterion.weights > 0, values, torch.nan)
        for values in (
            lower,
            view.potential.loss(points, rows),
            upper,
            norms,
            residuals.norm(dim=-1),
        )
    )
    return RiskSandwich(lower, losses, upper, lo, hi, norms, sizes, criterion.weights)


@dataclasses.dataclass(frozen=True)
class PLBound:
    """The squared gradient of a batch between two bounds, made by `pl_bound` (Thm 2.4).

    All are of shape `()`, and those of the gradient are in units of the Fenchel-Young loss.

    Attributes:
        lower: `lo mean_i ||e_i||^2 / m`, at most the squared norm.
        gradient_square: `||g_B||^2`.
        upper: `hi mean_i ||e_i||^2 / m`, at least the squared norm.
        lo: Least eigenvalue of the batch's structure matrix `K_B` on `V^m`.
        hi: Greatest eigenvalue of `K_B` on `V^m`.
        residual_square: `mean_i ||e_i||^2`.

    Reference:
        docs/theory.md, Thm 2.4.

    Example:
        >>> import torch
        >>> from conjopt.bounds import pl_bound
        >>> model, inputs = torch.nn.Linear(2, 1, bias=False), torch.eye(2)
        >>> torch.nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
        >>> found = pl_bound(model, torch.nn.MSELoss(), inputs, torch.ones(2, 1))
        >>> found.lower, found.gradient_square, found.upper
        (tensor(0.5000), tensor(0.5000), tensor(0.5000))
    """

    lower: Tensor
    gradient_square: Tensor
    upper: Tensor
    lo: Tensor
    hi: Tensor
    residual_square: Tensor


def pl_bound(model: nn.Module, loss: nn.Module, inputs: Any, targets: Tensor) -> PLBound:
    """Bound the squared gradient of a batch by its residuals and extreme eigenvalues (Thm 2.4).

    `lo(K_B) mean||e||^2 / m <= ||g_B||^2 <= hi(K_B) mean||e||^2 / m`, eigenvalues on `V^m`.

    What this says of the risk `R_B`, the mean loss: for the squared potential
    `R_B = mean||e||^2 / 2`, so `m ||g_B||^2 / (2 hi) <= R_B <= m ||g_B||^2 / (2 lo)`, which is the
    Polyak-Lojasiewicz inequality. For another potential with a `beta`-Lipschitz link,
    `R_B >= mean||e||^2 / (2 beta) >= m ||g_B||^2 / (2 beta hi)`. Upper bounds `psi` of Thm 2.2 are
    neither convex nor concave in `||e||^2`, and a mean of squares does not enter them; but no
    single `||e_i||^2` exceeds their sum, which is at most `m^2 ||g_B||^2 / lo`, so
    `l_i <= psi(m ||g_B|| / sqrt(lo))` for every sample, and `R_B` is at most the mean of these.

    Args:
        model: Returns one tensor with samples along dimension 0, and computes no sample's output
            from another sample (`conjopt.measure.self_check` tells).
        loss: A criterion that `conjopt.losses.potential_of` recognises.
        inputs: Of the model, `m` samples: a tensor, or a tuple or a dict of its arguments.
        targets: Of the criterion.

    Returns:
        The bounds, for the gradient of the criterion without its scale (which is 1 for
        `CrossEntropyLoss()`, see `conjopt.losses.potential_of`). Where the criterion has class
        weights or ignores samples, `e_i` stands for `m w_i` times the residual, with weights `w`
        that sum to 1: the theorem holds for these as they are, what is said of the risk only for
        equal weights.

    Raises:
        TypeError: For a criterion that is not recognised.
        ValueError: If the criterion has not one term for each sample (one for each token, or
            weighed elements), or for shapes of outputs and targets that do not belong together.
        RuntimeError: If per-sample gradients do not exist or cannot be seen.

    Reference:
        docs/theory.md, Thm 2.4.

    Example:
        >>> import torch
        >>> from conjopt.bounds import pl_bound
        >>> model, inputs = torch.nn.Linear(2, 1, bias=False), torch.diag(torch.tensor([1.0, 2.0]))
        >>> torch.nn.init.zeros_(model.weight)
        Parameter containing:
        tensor([[0., 0.]], requires_grad=True)
        >>> found = pl_bound(model, torch.nn.MSELoss(), inputs, torch.ones(2, 1))
        >>> found.lo, found.hi  # K_B = inputs inputs^T
        (tensor(1.), tensor(4.))
        >>> found.lower, found.gradient_square, found.upper
        (tensor(0.5000), tensor(1.2500), tensor(2.))
    """
    view = potential_of(loss)
    criterion = _Residuals(view, "pl_bound")
    args, kwargs = as_arguments(inputs)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.enable_grad(), without_multi_grad_hooks(parameters):
        outputs = Replay(model, args, kwargs, Replay.random_state(model)).run({})
        if len(outputs) != 1 or outputs[0] is None:
            raise ValueError(
                f"pl_bound: {type(model).__name__} returned {len(outputs)} values, expected one "
                "tensor; wrap the model in a module that returns what the loss is given"
            )
        refuse_reentrant([outputs[0]])
        value = criterion.weighted(outputs[0], targets)
        gradients = (
            torch.autograd.grad(value, parameters, allow_unused=True)
            if parameters and value.requires_grad
            else []
        )
    squares = [g.square().sum() for g in gradients if g is not None]
    residuals = criterion.residuals * (len(criterion.residuals) * criterion.weights).unsqueeze(1)
    square = residuals.square().sum(-1).mean()
    total = torch.stack(squares).sum().to(square.dtype) if squares else torch.zeros_like(square)
    lo, hi, _ = _extremes(batch_structure_matrix(model, inputs, potential=view.potential))
    lo, hi = lo.to(square.dtype), hi.to(square.dtype)
    m = len(residuals)
    return PLBound(lo * square / m, total, hi * square / m, lo, hi, square)


class _Residuals:
    """A criterion whose gradient in the outputs is the residuals; it keeps what it saw.

    Attributes:
        rows, points, residuals: `f`, `y` and `e`, each `(m, k)`.
        weights: `(m,)`.
        eps: Of the outputs' dtype.
    """

    reduction = "sum"
    rows: Tensor
    points: Tensor
    residuals: Tensor
    weights: Tensor
    eps: float

    def __init__(self, view: PotentialOf, name: str) -> None:
        self._view, self._name = view, name

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        rows = self._see(outputs, targets)
        return (rows * self.residuals).sum()

    def weighted(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return a value with the gradient of the weighted mean loss."""
        rows = self._see(outputs, targets)
        return (rows * self.weights.unsqueeze(1) * self.residuals).sum()

    def _see(self, outputs: Tensor, targets: Tensor) -> Tensor:
        view = self._view
        rows = view.rows(outputs).to(working_dtype(outputs, targets))
        m = outputs.shape[0] if outputs.ndim else 0
        if len(rows) != m:
            raise ValueError(
                f"{self._name}: {view.criterion!r} has {len(rows)} terms for outputs of shape "
                f"{tuple(outputs.shape)}, expected one for each sample of dimension 0; pass "
                "outputs of shape (N, C) for classes, and criteria without element weights"
            )
        self.weights = view.weights(outputs, targets)
        self.points = view.points(outputs, targets)
        self.rows = rows.detach()
        residuals = view.potential.link(self.rows) - self.points
        self.residuals = torch.where(self.weights.unsqueeze(1) > 0, residuals, 0).detach()
        self.eps = torch.finfo(outputs.dtype).eps
        return rows


def _extremes(matrix: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return lo, hi and the dimension; below 0 they are only by rounding."""
    lo, hi = extreme_eigenvalues(matrix)
    return lo.clamp(min=0), hi.clamp(min=0), matrix.shape[-1]


def _less_rounding(lo: Tensor, hi: Tensor, d: int, eps: float) -> Tensor:
    return lo - 8 * d * eps * hi
