"""Fenchel-Young losses as modules, drop-in for torch's (docs/theory.md, section 0)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from conjopt.losses.reading import of_fenchel_young, working_dtype
from conjopt.potentials import Potential

__all__ = ["FenchelYoungLoss"]


class FenchelYoungLoss(nn.Module):
    """The loss `l(y, f) = Phi(y) + Phi*(f) - <y, f>` of a potential, with torch's layouts.

    The value is `l` itself, which is 0 at the best output. The losses of torch are
    `Phi*(f) - <y, f>`, that is `l` plus the entropy `-Phi(y)` of the (smoothed) target. For hard
    class and 0/1 targets that is 0; `include_target_entropy=True` adds it for soft ones.

    Potentials on the simplex take outputs of shape `(C)`, `(N, C)` or `(N, C, d1, ...)` and
    targets that are either class indices, `(...)` the outputs' shape without `C`, or probabilities
    of the outputs' shape; a loss term belongs to each of the `N * d1 * ...` tokens. Other
    potentials take targets of the outputs' shape; dimension 0 counts samples and all remaining
    elements of a sample are its `k` coordinates (`k = 1` for 1-d outputs; 0-d is one sample), and
    a loss term, summed over coordinates, belongs to each sample.

    Targets are constants: no gradient flows to them. On the CPU their values are checked; on
    another device, where that would wait for it, and in compiled code they are not. Half precision
    is computed in float32, and the value is float32.

    Args:
        potential: The potential `Phi`.
        weight: On the simplex a weight for each class, shape `(C)`, with torch's meaning: a hard
            target weighs its term by the weight of its class, and the mean divides by the weights
            of the targets; for probability or smoothed targets class `c` weighs `w_c y_c`. For
            separable potentials weights of the elements that broadcast to the outputs, as in
            torch's `BCEWithLogitsLoss`; the mean divides by the number of samples. (There is no
            `pos_weight`; for that, use torch's loss.)
        ignore_index: Class index of the tokens that do not count.
        label_smoothing: Share of the uniform distribution mixed into class or probability
            targets, in `[0, 1]`.
        reduction: `"mean"` over the terms that count (NaN if there are none, as in torch),
            `"sum"`, or `"none"`, which has the shape of class-index targets on the simplex and
            `(N)` otherwise.
        include_target_entropy: Add `-Phi(y)`, so that the value is `Phi*(f) - <y, f>`.

    Raises:
        TypeError: For a potential, a weight, outputs or targets of another type.
        ValueError: At construction for an unknown reduction, a smoothing outside of `[0, 1]`,
            negative weights, or options that the potential has no meaning for; at a call for
            shapes or types of outputs and targets that do not belong together, or targets outside
            of the domain of `Phi`.
        IndexError: At a call for a class index outside of `[0, C)` other than `ignore_index`.

    Reference:
        docs/theory.md, section 0.

    Example:
        >>> import torch
        >>> from conjopt.losses import FenchelYoungLoss
        >>> from conjopt.potentials import Softmax
        >>> outputs = torch.tensor([[2.0, 0.0], [0.0, 0.0]])
        >>> FenchelYoungLoss(Softmax())(outputs, torch.tensor([0, 1]))
        tensor(0.4100)
        >>> half = torch.full((2, 2), 0.5)
        >>> FenchelYoungLoss(Softmax(), reduction="none")(outputs, half)
        tensor([0.4338, 0.0000])
    """

    weight: Tensor | None

    def __init__(
        self,
        potential: Potential,
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        include_target_entropy: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            raise TypeError(
                f"potential={potential!r}: expected an instance of a Potential, such as "
                "conjopt.potentials.Softmax()."
            )
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction={reduction!r}: expected 'none', 'mean' or 'sum'.")
        if not isinstance(label_smoothing, int | float) or not isinstance(ignore_index, int):
            raise TypeError(
                f"label_smoothing={label_smoothing!r} and ignore_index={ignore_index!r}: expected "
                "a number and an integer; leave them out for their defaults."
            )
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing={label_smoothing}: expected a number in [0, 1].")
        if not potential.on_simplex and (label_smoothing != 0 or ignore_index != -100):
            raise ValueError(
                f"label_smoothing={label_smoothing} and ignore_index={ignore_index} need class "
                f"targets, but {potential!r} is not on the simplex: leave them out, or smooth the "
                "targets yourself."
            )
        if weight is not None:
            _check_weight(weight, potential)
        _check_boundary(potential)
        self.potential = potential
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing
        self.reduction = reduction
        self.include_target_entropy = include_target_entropy

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of the layouts that the class describes.

        Args:
            outputs: Floating-point outputs.
            targets: Class indices, probabilities or target values.

        Returns:
            A scalar, or one value per term for `reduction="none"`; float32 or wider.
        """
        view = of_fenchel_young(self)
        _check_types(outputs, targets)
        view._check(outputs, targets)
        if _can_look_at(targets):
            self._check_targets(outputs, targets)
        losses = view._row_losses(outputs.to(working_dtype(outputs, targets)), targets)
        if self.include_target_entropy:
            losses = losses + view._entropy(outputs, targets).detach()
        if self.reduction == "none":
            return view._terms(losses, outputs)
        divisor = view._divisor(outputs, targets).detach()
        return torch.where(divisor > 0, losses.sum(), 0) / divisor  # NaN, with a gradient of 0

    def _check_targets(self, outputs: Tensor, targets: Tensor) -> None:
        if self.potential.on_simplex and not targets.is_floating_point():
            classes = outputs.shape[min(outputs.ndim - 1, 1)]
            index = targets.long()
            wrong = ((index < 0) | (index >= classes)) & (index != self.ignore_index)
            if bool(wrong.any()):
                place = ", ".join(str(int(i)) for i in wrong.nonzero()[0])
                raise IndexError(
                    f"Got class index {int(index[wrong][0])} at targets[{place}]: expected one in "
                    f"[0, {classes}) for outputs of shape {tuple(outputs.shape)}, or ignore_index="
                    f"{self.ignore_index}. Give the model as many outputs as there are classes."
                )
            return
        if self.potential.on_simplex and self.ignore_index >= 0:
            raise ValueError(
                f"ignore_index={self.ignore_index} is given with probability targets, which have "
                "no class index: leave it out, or weigh the terms of reduction='none'."
            )
        rows = of_fenchel_young(self).rows(targets)
        inside = self.potential.contains(rows)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0])
            shown = ", ".join(f"{float(value):.6g}" for value in rows[row][:6])
            more = ", ..." if len(rows[row]) > 6 else ""
            total = f" of sum {float(rows[row].sum()):.6g}" if self.potential.on_simplex else ""
            raise ValueError(
                f"Got the target [{shown}{more}]{total}, row {row}: expected "
                f"{self.potential.domain}, the domain of {self.potential!r}."
            )

    def extra_repr(self) -> str:
        """Return the arguments, for `repr`."""
        smoothing = f", label_smoothing={self.label_smoothing}" if self.label_smoothing else ""
        entropy = ", include_target_entropy=True" if self.include_target_entropy else ""
        weight = "" if self.weight is None else f", weight of shape {tuple(self.weight.shape)}"
        ignored = "" if self.ignore_index == -100 else f", ignore_index={self.ignore_index}"
        return (
            f"{self.potential!r}{weight}{ignored}{smoothing}, reduction={self.reduction!r}{entropy}"
        )


def _check_boundary(potential: Potential) -> None:
    """Refuse a potential on the simplex that is not finite at hard targets."""
    if not potential.on_simplex:
        return
    try:
        value = potential.value(torch.eye(2))
    except Exception:  # one that is made for another number of classes, say
        return
    if value.shape != (2,) or not bool(value.isfinite().all()):
        raise ValueError(
            f"{potential!r}.value returned {value} for the two one-hot targets of two classes: "
            "expected two finite numbers, (..., k) -> (...), on the boundary of the simplex, too; "
            "write y log y as -torch.special.entr(y)."
        )


def _check_weight(weight: Tensor, potential: Potential) -> None:
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight={weight!r}: expected a tensor; use torch.tensor(...).")
    if not (potential.on_simplex or potential.separable):
        raise ValueError(
            f"weight is given, but {potential!r} has no classes and its coordinates do not add up: "
            "use reduction='none' and weigh the terms yourself."
        )
    if potential.on_simplex and weight.ndim != 1:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}: expected one weight for each class, shape "
            "(C)."
        )
    if not weight.is_floating_point() or bool((weight < 0).any() | ~weight.isfinite().all()):
        raise ValueError(
            f"weight={weight}: expected finite floating-point numbers that are at least 0."
        )


def _check_types(outputs: Tensor, targets: Tensor) -> None:
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor):
        raise TypeError(
            f"Got outputs of type {type(outputs).__name__} and targets of type "
            f"{type(targets).__name__}: expected tensors; use torch.as_tensor(...)."
        )
    if not outputs.is_floating_point():
        raise ValueError(
            f"Got outputs of type {outputs.dtype}: expected floating-point outputs of a model; "
            "the outputs come first and the targets second."
        )


def _can_look_at(targets: Tensor) -> bool:
    """Whether values cost no synchronisation and are there to be seen."""
    if targets.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(targets)
