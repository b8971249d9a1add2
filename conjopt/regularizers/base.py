"""What every regularizer does: read outputs and targets, guard the value, and weigh it."""

from __future__ import annotations

import abc
import math
import numbers
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.losses.fenchel_young import _can_look_at, _check_types
from conjopt.losses.reading import ClassTargets, working_dtype
from conjopt.potentials import Potential, Softmax
from conjopt.regularizers.rows import Rows

__all__ = ["Regularizer", "Schedule"]

Schedule = Callable[[int], float]


class Regularizer(nn.Module, abc.ABC):
    """A term that is added to the loss: `criterion(outputs, targets) + term(outputs, targets)`.

    Outputs and targets are read as the losses of this package read them (`FenchelYoungLoss`): class
    indices or probabilities with classes at dimension 1 for a potential on the simplex, else
    targets of the outputs' shape. Each output vector is a row; rows at `ignore_index` do not count.
    The value is computed in float32 or wider, also under autocast.

    A call adds 0, with a gradient of 0, if fewer rows count than the term needs (one, or two for
    terms that compare rows), or if an output of these rows is NaN or infinite. The second case is
    counted in `skipped`; on the CPU a warning says so the first time, and elsewhere, where looking
    would wait for the device, the next `estimate` does.

    Args:
        weight: A finite number that is at least 0, or a function that returns one. It gets the
            number of earlier training calls, 0 at first. A call counts in training mode and with
            gradients enabled.
        potential: The potential `Phi`, or a criterion that `potential_of` recognises: its class
            weights weigh the rows, and label smoothing smooths the targets.
        ignore_index: Class index of the rows that do not count. A criterion brings its own.

    Attributes:
        weight: As given; may be set.
        calls: Number of training calls so far, counted if the weight is a function.
        skipped: `()` number of training calls that added 0 for outputs that are not finite.

    Raises:
        TypeError: For a weight, a potential, outputs or targets of another type.
        ValueError: For a weight that is negative or not finite, also when its function returns it;
            for shapes of outputs and targets that do not belong together, and on the CPU for
            targets outside of the domain of `Phi`.
        IndexError: On the CPU for a class index out of range.

    Reference:
        docs/regularizers.md.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Potential
        >>> from conjopt.regularizers import Regularizer
        >>> class SquaredOutputs(Regularizer):
        ...     def _value(self, batch):
        ...         return batch.mean(batch.rows.square().sum(1))
        >>> term = SquaredOutputs(weight=lambda calls: 0.1 if calls < 1000 else 0.01)
        >>> outputs, targets = torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([0, 1])
        >>> term.estimate(outputs, targets), term(outputs, targets), term.calls
        (tensor(13.), tensor(1.3000), 1)
    """

    skipped: Tensor
    _least = 1  # rows that have to count
    _sign = 1  # of the weighted value in the loss
    _of_conjugate = False  # whether the value needs Phi*(f), which may overflow

    def __init__(
        self,
        weight: float | Schedule,
        *,
        potential: Potential | nn.Module | None = None,
        ignore_index: int = -100,
    ) -> None:
        super().__init__()
        self._weight: float | Schedule = 0.0
        self.weight = weight
        self.criterion = _criterion(Softmax() if potential is None else potential, ignore_index)
        self._view = potential_of(self.criterion)
        ignored = getattr(self.criterion, "ignore_index", -100)
        # Says what is wrong with targets. In a tuple, as it is no part of this module.
        self._domain = (FenchelYoungLoss(self.potential, ignore_index=ignored),)
        self.calls = 0
        self.register_buffer("skipped", torch.zeros((), dtype=torch.int64))
        self._warned = False

    @property
    def potential(self) -> Potential:
        """The potential `Phi`."""
        return self._view.potential

    @property
    def weight(self) -> float | Schedule:
        """The weight of the term, a number or a function of the number of training calls."""
        return self._weight

    @weight.setter
    def weight(self, weight: float | Schedule) -> None:
        self._weight = weight if callable(weight) else _checked_weight(weight, "weight")

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted term, to be added to the loss.

        Args:
            outputs: Outputs of the model (logits, natural parameters).
            targets: Class indices, probabilities or target values.

        Returns:
            Shape `()`, in float32 or wider.
        """
        return self._term(outputs, targets)

    def estimate(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the term without its weight; changes nothing.

        Args:
            outputs: As for a call.
            targets: As for a call.

        Returns:
            Shape `()`, in float32 or wider.
        """
        return self._estimate(outputs, targets)

    @abc.abstractmethod
    def _value(self, batch: Rows) -> Tensor:
        """The unweighted value of finite rows, of which at least `_least` count."""

    def _term(self, outputs: Tensor, targets: Tensor, features: Tensor | None = None) -> Tensor:
        learning = self.training and torch.is_grad_enabled()
        value, finite, batch = self._measure(outputs, targets, features, self._value)
        if learning:
            self.skipped += ~finite
            self._remember(batch)
        if _can_look_at(finite):
            self._warn(not bool(finite), depth=6)  # the call, below two frames of torch's
        if callable(self._weight):
            weight: Tensor = self._scheduled(learning)
            return weight.to(value.dtype) * (self._sign * value)
        return self._sign * self._weight * value

    def _estimate(
        self,
        outputs: Tensor,
        targets: Tensor,
        features: Tensor | None = None,
        value_of: Callable[[Rows], Tensor] | None = None,
    ) -> Tensor:
        value, finite, _ = self._measure(outputs, targets, features, value_of or self._value)
        if not torch.compiler.is_compiling():
            self._warn(not bool(finite) or bool(self.skipped), depth=4)
        return value

    def _measure(
        self,
        outputs: Tensor,
        targets: Tensor,
        features: Tensor | None,
        value_of: Callable[[Rows], Tensor],
    ) -> tuple[Tensor, Tensor, Rows]:
        """The value, whether the rows are finite, and the rows of this step."""
        self._check(outputs, targets)
        device = outputs.device.type
        with torch.autocast(device, enabled=False):
            fresh = self._read(outputs, targets, features)
            batch = self._joined(fresh)
            if len(batch.rows) < self._least:  # also where there is nothing to take a maximum of
                nothing = fresh.rows.flatten()[:0].sum()
                return nothing, torch.ones_like(nothing, dtype=torch.bool).detach(), fresh
            finite = (self._finite(batch.rows.detach()) | (batch.mass == 0)).all()
            # Before the value: behind it, the gradient of 0 would meet infinities on its way back.
            batch = batch.masked(finite)
            enough = (batch.mass > 0).sum() >= self._least
            value = torch.where(finite & enough, value_of(batch), 0)
            return value, finite, batch

    def _check(self, outputs: Tensor, targets: Tensor) -> None:
        _check_types(outputs, targets)
        self._view._check(outputs, targets)
        if _can_look_at(targets):
            self._domain[0]._check_targets(outputs, targets)

    def _read(self, outputs: Tensor, targets: Tensor, features: Tensor | None) -> Rows:
        """The rows of this process, in float32 or wider."""
        view = self._view
        rows = view.rows(outputs if features is None else features)
        rows = rows.to(working_dtype(rows, targets))
        mass = view._mass(outputs, targets).detach().to(rows.dtype)
        width = view.rows(outputs).shape[1]
        if isinstance(view, ClassTargets) and not targets.is_floating_point():
            points = view._index(targets)[0]
        else:
            points = view.points(outputs, targets).to(rows.dtype)
        return Rows(view, rows, mass, points, width, len(rows))

    def _joined(self, fresh: Rows) -> Rows:
        """The rows of this process with those of others and of past steps."""
        return fresh

    def _remember(self, batch: Rows) -> None:
        """Keep what later steps need."""

    def _finite(self, rows: Tensor) -> Tensor:
        """Whether a value and a gradient can be had from each row, `(R,)`."""
        finite = rows.abs().amax(1).isfinite()  # much faster than vector_norm(rows, inf)
        if self._of_conjugate and not self.potential.on_simplex:
            return finite & self.potential.conjugate(rows).isfinite()
        return finite

    @torch._disable_dynamo  # which imports the compiler no earlier than torch does
    def _scheduled(self, learning: bool) -> Tensor:
        schedule: Any = self._weight
        weight = _checked_weight(schedule(self.calls), f"The weight after {self.calls} calls")
        self.calls += int(learning)
        return torch.tensor(weight, dtype=torch.float64)  # 0-d: leaves the value's dtype and device

    def _warn(self, skipped: bool, depth: int) -> None:
        if skipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__} adds 0 where outputs are NaN, infinite or too large for "
                "the term; it counts such training calls in .skipped and says this once. Look at "
                "the loss of the same batch: it is likely not finite either.",
                stacklevel=depth,
            )

    def get_extra_state(self) -> dict[str, int]:
        """Return what `state_dict` holds beside the buffers."""
        return {"calls": self.calls}

    def set_extra_state(self, state: Any) -> None:
        """Take what `state_dict` held beside the buffers."""
        self.calls = int(state["calls"])

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        return f"weight={self.weight!r}"


def _criterion(potential: Potential | nn.Module, ignore_index: int) -> nn.Module:
    if isinstance(potential, nn.Module):
        if ignore_index != -100:
            raise ValueError(
                f"ignore_index={ignore_index} is given along with a criterion: give it to the "
                "criterion."
            )
        return potential
    return FenchelYoungLoss(potential, ignore_index=ignore_index)


def _checked_weight(weight: Any, name: str) -> float:
    if isinstance(weight, Tensor) and weight.numel() == 1 and weight.device.type == "cpu":
        weight = weight.item()
    if not isinstance(weight, numbers.Real) or isinstance(weight, bool):
        raise TypeError(
            f"{name} is {weight!r}: expected a number, or a function that returns one for a number "
            "of training calls. Of a tensor on a device take .item() at a time when waiting for it "
            "does no harm."
        )
    if not math.isfinite(weight) or weight < 0:
        raise ValueError(
            f"{name} is {weight}: expected a finite number that is at least 0. A term of the other "
            "sign is another regularizer; subtract its .estimate() if that is what you want."
        )
    return float(weight)
