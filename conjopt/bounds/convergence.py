"""Both sides of the convergence theorem along a run (docs/theory.md, Thm 3.1)."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.bounds import conditions
from conjopt.bounds.conditions import Condition
from conjopt.bounds.promise import Promise, promised
from conjopt.bounds.records import LedgerBound, LedgerStep, bound_of
from conjopt.bounds.risks import Point, Risk, Samples, Sums, beyond
from conjopt.bounds.start import LedgerStart, closed, joined
from conjopt.measure.structure import extreme_eigenvalues, structure_matrix

__all__ = ["ConvergenceLedger"]


class ConvergenceLedger:
    """Keeps account of both sides of Thm 3.1 along a run of any optimizer.

    For steps `theta+ = theta - a u` on batches of `m` out of `n` samples, exactly
    `sum_t (m_t/n) [a_t <g_t,u_t> - a_t^2 L_t ||u_t||^2 / 2] = R(theta_0) - R(theta_T) +
    sum_t ((n-m_t)/n) M_t`, which for `u = g` is Thm 3.1. `left` and `right` are these two sides
    over the recorded steps: *that they are equal is a guarantee, whatever the optimizer*.
    `bound` follows from it, *a guarantee for the recorded steps*. `promise` speaks of steps to
    come, *an extrapolation under assumed envelopes*.

    Everything is computed in float64, from copies of parameters, buffers and samples, with the
    model in the mode it is in. `.grad`, buffers and random number generators stay as they are. A
    recorded step costs a forward and a backward of the batch and two forwards of the set (one if
    it follows on the recorded step before it), in float64, and up to five
    copies of the parameters in float64 are held; the ledger waits for the device. Record every so
    many steps to pay less.

    Two ways to know the samples outside of the batch:

    - `whole=True`: the set is what batches are drawn from, and `R_out` is `(n R - m R_B)/(n - m)`.
      A batch with samples that the set does not hold, as augmentation makes them, or holds fewer
      times, is refused.
    - `whole=False`: the set is a fixed probe, and the population of a step is its batch and the
      probe. Samples of the probe that are in the batch, with equal inputs and targets in float32,
      are left out of `R_out` at that step. As populations differ from step to step, risks do
      not telescope; each step's identity is exact.

    The criterion's own mean counts, in its own units, with its weights and ignored targets; under
    `reduction="sum"` the mean over samples. If `conjopt.losses.potential_of` does not know the
    criterion, that its mean is the samples' mean is tried on eight of them.

    Args:
        model: Deterministic, computing no sample's output from another sample.
        loss: A criterion, or a function of outputs and targets that returns the mean.
        inputs: Of the set: a tensor, or a tuple or a dict of the model's arguments, `n` samples
            along dimension 0. They may be on another device than the model.
        targets: Of the set.
        whole: Whether every batch is part of the set.
        floor: `R_*`, in the criterion's units: any number that the risk of the set cannot be
            below, such as the data floor (`conjopt.entropy.data_floor`).
        chunk: Samples at once.

    Attributes:
        steps: The recorded steps.
        probes: `(step, lo, hi)` by `probe_eigenvalues`.

    Raises:
        ValueError: For a loss without a mean over samples, a model that is random or couples
            samples (dropout, batch statistics), and samples and targets that do not belong
            together.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> import torch
        >>> from conjopt.bounds import ConvergenceLedger
        >>> model, x, y = torch.nn.Linear(1, 1, bias=False), torch.ones(4, 1), torch.zeros(4, 1)
        >>> y[:2] = 1
        >>> _ = torch.nn.init.constant_(model.weight, 3.0)
        >>> criterion = torch.nn.MSELoss()
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.25)  # L = 2, a = 1 / (2L)
        >>> ledger = ConvergenceLedger(model, criterion, x, y, whole=True, floor=0.25)
        >>> for batch in (slice(0, 3), slice(1, 4), slice(0, 3)):
        ...     optimizer.zero_grad()
        ...     criterion(model(x[batch]), y[batch]).backward()
        ...     before = ledger.begin(x[batch], y[batch])
        ...     optimizer.step()
        ...     record = ledger.end(before)
        >>> round(record.curvature, 6), record.along_gradient
        (2.0, True)
        >>> abs(ledger.left() - ledger.right()) < 1e-12
        True
        >>> ledger.bound().mean <= ledger.bound().constant_bound
        True
        >>> print(ledger.conditions()[0])
        C1 holds: the largest a L / 2 of 3 steps is 0.25 (below 1 allowed, 0.5 best)
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Any,
        inputs: Any,
        targets: Any,
        *,
        whole: bool,
        floor: float = 0.0,
        chunk: int = 1024,
    ) -> None:
        if chunk < 1:
            raise ValueError(f"ConvergenceLedger: chunk={chunk}, expected at least 1 sample")
        if not math.isfinite(floor):
            raise ValueError(f"ConvergenceLedger: floor={floor}, expected a finite number")
        self.whole, self.floor = whole, float(floor)
        self.steps: list[LedgerStep] = []
        self.probes: list[tuple[int, float, float]] = []
        self._risk = Risk(model, loss, chunk, "ConvergenceLedger")
        self._set = Samples(inputs, targets, "ConvergenceLedger")
        self._risk.check(self._set)
        self._keys = self._set.keys()
        self._counts = collections.Counter(self._keys)
        self._last: tuple[Point, Sums] | None = None

    def begin(self, inputs: Any, targets: Any) -> LedgerStart:
        """Measure before a step.

        Args:
            inputs: Of the batch that the step is made from; not to be changed before `end`.
            targets: Of the batch.

        Returns:
            What `end` takes.

        Raises:
            ValueError: With `whole=True`, for samples that the set does not hold; if the model's
                mode has changed to one that is refused.
        """
        self._risk.check(self._set)
        batch = Samples(inputs, targets, "ConvergenceLedger.begin")
        keys = batch.keys()
        strange = beyond(keys, self._counts) if self.whole else 0
        if strange:
            raise ValueError(
                f"ConvergenceLedger.begin: {strange} of the {batch.count} samples of the batch are "
                "not in the set, or more often than there, but whole=True says that batches are "
                "parts of it: draw without replacement and augmentation, or use whole=False with "
                "a probe set"
            )
        point = self._risk.point()
        in_batch, gradient = self._risk.gradient(batch, point)
        rows = None
        if not self.whole:
            own = set(keys)
            rows = torch.tensor([i for i, key in enumerate(self._keys) if key not in own]).long()
        all_or_outside = self._outside(point, rows)
        outside = all_or_outside.without(in_batch) if self.whole else all_or_outside
        return LedgerStart(batch, rows, point, gradient, in_batch, outside)

    def _outside(self, point: Point, rows: Tensor | None) -> Sums:
        """Return the sums over the set; without the batch if that is known by its rows."""
        if rows is not None:
            return self._risk.sums(self._set, point, rows) if len(rows) else Sums(0.0, 0.0, 0.0)
        if self._last is not None and self._last[0].equals(point):
            return self._last[1]
        return self._risk.sums(self._set, point)

    def end(
        self, before: LedgerStart, step_size: float | None = None, *, step: int | None = None
    ) -> LedgerStep:
        """Measure after a step, and record it.

        Args:
            before: From `begin`.
            step_size: `a`, in units of the criterion's mean: for torch's SGD its `lr` (times the
                batch size under `reduction="sum"`); for `ConjSGD` its step over the criterion's
                scale (`conjopt.losses.potential_of`). By default the one that fits best,
                `<g,d> / ||g||^2` for the displacement `d`.
            step: Its number, if steps are left out; by default they are counted.

        Returns:
            The record, also appended to `steps`.

        Raises:
            ValueError: If parameters were added or removed, and for `step_size=0` where they moved.
        """
        after = self._risk.point()
        if after.trained.keys() != before.point.trained.keys():
            raise ValueError(
                "ConvergenceLedger.end: other parameters require gradients than at begin: freeze "
                "and unfreeze them between end and begin"
            )
        at = after._replace(other=before.point.other)  # the same function, with the same buffers
        in_batch = self._risk.sums(before.batch, at)
        if self.whole:
            everything = self._risk.sums(self._set, at)
            outside = everything.without(in_batch)
        else:
            everything = outside = self._outside(at, before.rows)
        record = closed(
            before,
            at,
            in_batch,
            outside,
            step_size=step_size,
            step=(self.steps[-1].step + 1 if self.steps else 0) if step is None else step,
            consecutive=self._follows(before),
        )
        self.steps.append(record)
        self._last = (at, everything) if self.whole else (at, Sums(0.0, 0.0, 0.0))
        return record

    def _follows(self, before: LedgerStart) -> bool:
        if not self.steps:
            return True
        if self._last is not None:
            return self._last[0].equals(before.point)
        risk = joined(before.in_batch, before.outside)  # resumed: parameters are not saved
        return math.isclose(risk, self.steps[-1].risk_after, rel_tol=1e-12)

    def left(self) -> float:
        """Return `sum (m/n) [a <g,u> - a^2 L ||u||^2 / 2]` over the recorded steps.

        For `u = g` it is the left side of Thm 3.1: `sum (m/n) a (1 - a L / 2) ||g||^2`.
        """
        return math.fsum(step.left for step in self.steps)

    def right(self) -> float:
        """Return `sum [R(theta_t) - R(theta_t+)] + sum ((n-m)/n) M` over the recorded steps.

        If each step follows on the one before it and the set is whole, the first sum is
        `R(theta_0) - R(theta_T)`. If steps are left out, it is that of the recorded steps alone,
        not of what happened between them.
        """
        return math.fsum(step.right for step in self.steps)

    def vector(self, name: str) -> Tensor:
        """Return an attribute of every recorded step, float64, `(T,)`.

        Args:
            name: Of an attribute of `LedgerStep`.
        """
        values = [float(getattr(step, name)) for step in self.steps]
        return torch.tensor(values, dtype=torch.float64)

    def bound(self) -> LedgerBound:
        """Return what the identity implies for the gradients of the recorded steps: a guarantee.

        Raises:
            ValueError: If no recorded step moved.
        """
        return bound_of(self.steps, self.floor, whole=self.whole)

    def promise(
        self,
        steps: int,
        *,
        step_size: float | None = None,
        share: float | None = None,
        curvature: float | None = None,
        out_change: float | None = None,
        last: int | None = None,
    ) -> Promise:
        """Return a bound on the mean of `||g_t||^2` over the next steps: an extrapolation.

        It holds if these steps are along the gradient with this `a` and `m / n` and none exceeds
        `L` and `M`, of which the past is evidence and no proof. The risk starts from its last
        recorded value.

        Args:
            steps: `T`.
            step_size: `a`; by default the last recorded.
            share: `m / n`; by default the last recorded.
            curvature: `L`; by default the greatest recorded, with its error.
            out_change: `M`; by default the greatest recorded, or 0 if all are negative.
            last: Of how many recorded steps the greatest are taken; of all by default.

        Raises:
            ValueError: If no step is recorded, and for fewer than one step.
        """
        if not self.steps:
            raise ValueError("ConvergenceLedger.promise: no step is recorded yet")
        return promised(
            self._recent(last),
            self.floor,
            steps,
            step_size=step_size,
            share=share,
            curvature=curvature,
            out_change=out_change,
        )

    def probe_eigenvalues(self, samples: int = 8) -> tuple[float, float]:
        """Measure the extreme eigenvalues of structure matrices where the model is now, for (C3).

        Args:
            samples: How many of the set, evenly spread.

        Returns:
            The least `lo`, less its rounding error, and the greatest `hi` over the samples, on the
            tangent space `V` if the criterion's potential is known. Also appended to `probes`.

        Raises:
            ValueError: For no samples.
        """
        if samples < 1:
            raise ValueError(
                f"ConvergenceLedger.probe_eigenvalues: samples={samples}, expected at least 1"
            )
        rows = torch.linspace(0, self._set.count - 1, min(samples, self._set.count)).long()
        args, kwargs, _ = self._set.take(rows)
        device = next(self._risk.model.parameters()).device
        inputs = torch.utils._pytree.tree_map(
            lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, kwargs or args
        )
        view = self._risk.view
        A = structure_matrix(
            self._risk.model, inputs, potential=None if view is None else view.potential
        )
        lo, hi = extreme_eigenvalues(A)
        sure = lo - 8 * A.shape[-1] * torch.finfo(A.dtype).eps * hi
        number = self.steps[-1].step + 1 if self.steps else 0
        self.probes.append((number, max(0.0, float(sure.min())), float(hi.max())))
        return self.probes[-1][1:]

    def conditions(
        self,
        *,
        energy_target: float | None = None,
        lo: float | Sequence[float] | None = None,
        hi: float | Sequence[float] | None = None,
        lo_min: float = 0.0,
        hi_max: float = math.inf,
        last: int | None = None,
    ) -> list[Condition]:
        """Return the conditions C1 to C4 with what was measured of them.

        - C1: the largest `a L / 2` is below 1, with rounding errors on either side; otherwise
          "unknown".
        - C2: the out-of-batch part of `bound` is below the energy target. Its number is that part,
          in units of `||g||^2`: `(n-m)M/m` over `a (1 - a L / 2)`, as the steps weigh it.
        - C3: `lo > lo_min` and `hi < hi_max` at all probes. *Between them nothing was measured.*
        - C4: `R_0 - R_*` is finite and no recorded risk below the floor.

        Args:
            energy_target: For C2, the mean squared batch gradient aimed at.
            lo: For C3, the least eigenvalues along the path; by default those of `probes`.
            hi: The greatest eigenvalues.
            lo_min: What `lo` must exceed.
            hi_max: What `hi` must stay below.
            last: How many recorded steps count; all by default.
        """
        recent = self._recent(last)
        lows = [low for _, low, _ in self.probes] if lo is None else _several(lo)
        highs = [high for *_, high in self.probes] if hi is None else _several(hi)
        return [
            conditions.step_sizes(recent),
            conditions.noise_below_target(recent, self.floor, energy_target, whole=self.whole),
            conditions.bounded_spectrum(lows, highs, lo_min, hi_max),
            conditions.finite_decrease(recent, self.floor),
        ]

    def _recent(self, last: int | None) -> list[LedgerStep]:
        if last is not None and last < 1:
            raise ValueError(f"ConvergenceLedger: last={last}, expected at least 1 step")
        return self.steps if last is None else self.steps[-last:]

    @property
    def summary(self) -> str:
        """Both sides, the bound and the conditions, in words."""
        where = "the whole set" if self.whole else "batch and probe"
        if not self.steps:
            return f"Thm 3.1 on {where}: no step is recorded"
        first, final = self.steps[0], self.steps[-1]
        lines = [
            f"Thm 3.1 on {where}: {len(self.steps)} steps recorded, number {first.step} to "
            f"{final.step}",
            f"risk {first.risk:.6g} -> {final.risk_after:.6g}, floor {self.floor:.6g}",
            f"identity: left {self.left():.6g}, right {self.right():.6g}",
        ]
        if not all(step.rests for step in self.steps):
            bound = self.bound()
            lines.append(
                f"{bound.of}: weighted mean {bound.weighted_mean:.4g} <= "
                f"{bound.weighted_bound:.4g}, mean {bound.mean:.4g} <= {bound.mean_bound:.4g}"
            )
        return "\n".join([*lines, *map(str, self.conditions())])

    def state_dict(self) -> dict[str, Any]:
        """Return what was recorded, in plain types; neither samples nor parameters."""
        return {
            "steps": [dataclasses.asdict(step) for step in self.steps],
            "probes": [list(probe) for probe in self.probes],
            "whole": self.whole,
            "floor": self.floor,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what another ledger recorded.

        Args:
            state: From `state_dict`, of a ledger with the same `whole`.

        Raises:
            ValueError: For another `whole`.
        """
        if state["whole"] != self.whole:
            raise ValueError(
                f"ConvergenceLedger.load_state_dict: the state is of whole={state['whole']}, this "
                f"ledger of whole={self.whole}; their risks are of different samples"
            )
        self.steps = [LedgerStep(**step) for step in state["steps"]]
        self.probes = [(int(step), float(lo), float(hi)) for step, lo, hi in state["probes"]]
        self.floor = float(state["floor"])
        self._last = None


def _several(values: float | Sequence[float]) -> list[float]:
    return [float(values)] if isinstance(values, int | float) else [float(v) for v in values]
