"""Batch rules: from measured noise and step times to the size of the batches to come."""

from __future__ import annotations

import abc
import dataclasses
import math
import time
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from conjopt.measure.observation import Batch
from conjopt.measure.process_group import Joined
from conjopt.optim.batch_size import best_batch_size, least_batch_size
from conjopt.optim.statistics import Statistics
from conjopt.optim.step_times import StepTimes

__all__ = [
    "BatchAdvisor",
    "BatchRule",
    "Correlation",
    "Fixed",
    "NoiseReading",
    "Recommendation",
    "WorkOptimal",
    "batch_rule",
]

GROWTH = 4  # most that one recommendation goes beyond the size that the noise was measured at


@dataclasses.dataclass(frozen=True)
class NoiseReading:
    """Gradient noise as numbers on the host, for draws with replacement (Thm 3.3, Estimators).

    Attributes:
        mean_square: running mean of the estimates of ``||G||^2``; not positive where no signal
            was seen in the noise.
        noise: running mean of the estimates of ``S^2``.
        batch_size: samples in the last step; None if unknown.

    Example:
        >>> NoiseReading(2.0, 8.0).noise_scale()
        4.0
        >>> NoiseReading(2.0, 8.0).noise_scale(population=4)
        1.5
    """

    mean_square: float
    noise: float
    batch_size: int | None = None

    def noise_scale(self, population: int | None = None) -> float:
        """``B_noise`` in samples, infinite unless a signal was seen.

        Args:
            population: n where batches are drawn without replacement, for which ``S^2`` is
                ``(n-1)/n`` of its estimate and ``||G||^2`` is ``S^2/n`` of it more.
        """
        signal, noise = self.mean_square, max(self.noise, 0.0)
        if population is not None:
            signal, noise = signal + noise / population, noise * (population - 1) / population
        # Without noise the first sample shows all there is.
        return noise / signal if signal > 0 else (math.inf if noise > 0 else 0.0)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """What a batch rule makes of a reading.

    Attributes:
        batch_size: m; None for no opinion.
        reason: in words, with the numbers.
        urgent: whether to act at once, because the size itself is to be tried, or is not measured.

    Example:
        >>> Recommendation(64, "fixed").batch_size
        64
    """

    batch_size: int | None
    reason: str
    urgent: bool = False


class BatchRule(abc.ABC):
    """How large batches should be; a rule of your own defines `recommend`.

    Attributes:
        name: in words of a user.

    Example:
        >>> class Noisy(BatchRule):
        ...     name = "noisy"
        ...     def recommend(self, noise, times, population=None, *, least=1, most=None):
        ...         return Recommendation(math.ceil(noise.noise_scale(population)), "noise scale")
        >>> Noisy().recommend(NoiseReading(2.0, 7.0), None)
        Recommendation(batch_size=4, reason='noise scale', urgent=False)
    """

    name: ClassVar[str]

    @abc.abstractmethod
    def recommend(
        self,
        noise: NoiseReading,
        times: StepTimes | None,
        population: int | None = None,
        *,
        least: int = 1,
        most: int | None = None,
    ) -> Recommendation:
        """A size for the batches to come.

        Args:
            noise: what was measured.
            times: of the steps so far; None if they are not known.
            population: n, samples in all; None if unknown.
            least: the smallest size that the caller can use.
            most: the largest; None for any.
        """


class Fixed(BatchRule):
    """A size that nothing changes.

    Args:
        batch_size: m; None for the one at hand.

    Raises:
        ValueError: if it is no positive whole number.

    Example:
        >>> Fixed(32).recommend(NoiseReading(2.0, 8.0), None).batch_size
        32
    """

    name = "fixed"

    def __init__(self, batch_size: int | None = None) -> None:
        if batch_size is not None and (
            isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1
        ):
            raise ValueError(
                f"Fixed: batch_size={batch_size!r}, expected a whole number >= 1, or None for the "
                "size at hand"
            )
        self.batch_size = batch_size

    def recommend(
        self,
        noise: NoiseReading,
        times: StepTimes | None,
        population: int | None = None,
        *,
        least: int = 1,
        most: int | None = None,
    ) -> Recommendation:
        """The fixed size."""
        return Recommendation(self.batch_size, "fixed", urgent=True)


class Correlation(BatchRule):
    """The least size whose gradient correlation ``rho_m`` reaches a target (Thm 3.3).

    At a target of 1/2 and many samples that is the noise scale ``B_noise``. One recommendation
    goes at most to 4 times the size that the noise was measured at, beyond which estimates say
    little.

    Args:
        target: between 0 and 1, both excluded.

    Raises:
        ValueError: if it is not.

    Example:
        >>> Correlation(0.5).recommend(NoiseReading(1.0, 100.0), None).batch_size
        100
    """

    name = "correlation"

    def __init__(self, target: float = 0.5) -> None:
        if not 0 < target < 1:
            raise ValueError(
                f"Correlation: target={target!r}, expected a number between 0 and 1, both "
                "excluded; 0.5 weighs signal and noise alike"
            )
        self.target = float(target)

    def recommend(
        self,
        noise: NoiseReading,
        times: StepTimes | None,
        population: int | None = None,
        *,
        least: int = 1,
        most: int | None = None,
    ) -> Recommendation:
        """Thm 3.3's least m."""
        scale = noise.noise_scale(population)
        size = least_batch_size(scale, self.target, population)
        reason = f"correlation {self.target:g} at noise scale {_samples(scale)}"
        return _within(size, reason, noise, least, most)


class WorkOptimal(BatchRule):
    """The size of most progress per second, from noise and measured step times (Thm 3.3).

    ``c0`` and ``c1`` cannot be told apart from steps of one size. Until two sizes were timed that
    are a factor of 2 apart it asks for a few steps at double the size, and then at half, with a
    reason that begins with "exploring". One recommendation goes at most to 4 times the size that
    the noise was measured at.

    Times differ from run to run, and with them its recommendations.

    Example:
        >>> times = StepTimes()
        >>> for _ in range(3):
        ...     times.record(32, 0.004 + 32 * 0.001)
        >>> WorkOptimal().recommend(NoiseReading(1.0, 100.0), times).reason
        'exploring: steps of 64 were not timed yet'
        >>> for _ in range(3):
        ...     times.record(64, 0.004 + 64 * 0.001)
        ...     times.record(16, 0.004 + 16 * 0.001)
        >>> WorkOptimal().recommend(NoiseReading(1.0, 100.0), times).batch_size
        20
    """

    name = "work"

    def recommend(
        self,
        noise: NoiseReading,
        times: StepTimes | None,
        population: int | None = None,
        *,
        least: int = 1,
        most: int | None = None,
    ) -> Recommendation:
        """Thm 3.3's ``m*``, or a size to time."""
        if times is None or not times.sizes:
            return Recommendation(None, "no step was timed yet")
        known = times.sizes
        if (untried := _untried(known, least, _least_of(most, population))) is not None:
            reason = f"exploring: steps of {untried} were not timed yet"
            return Recommendation(untried, reason, urgent=True)
        cost = times.fit()
        if cost is None:
            return Recommendation(None, f"no other size than {known[0]} could be timed")
        scale = noise.noise_scale(population)
        size = best_batch_size(scale, cost.fixed, cost.per_sample, population)
        reason = (
            f"noise scale {_samples(scale)}, a step takes {cost.fixed:.2g} + "
            f"{cost.per_sample:.2g} m seconds"
        )
        return _within(size, reason, noise, least, most)


RULES: dict[str, type[BatchRule]] = {
    "fixed": Fixed,
    "correlation": Correlation,
    "work": WorkOptimal,
}


def batch_rule(given: str | BatchRule | None) -> BatchRule | None:
    """The rule of a name, or the given one.

    Args:
        given: "fixed", "correlation", "work", a rule, or None for none.

    Raises:
        ValueError: if it is none of these.

    Example:
        >>> batch_rule("correlation").target
        0.5
    """
    if given is None or isinstance(given, BatchRule):
        return given
    if not isinstance(given, str) or given not in RULES:
        raise ValueError(
            f"batch_rule={given!r}, expected one of {sorted(RULES)}, a BatchRule such as "
            "Correlation(0.5), or None"
        )
    return RULES[given]()


class BatchAdvisor:
    """What an optimizer keeps for its batch rule: the rule, step times, and the last size.

    Args:
        rule: None for none, which costs nothing.

    Example:
        >>> BatchAdvisor(None).advise(Statistics(0.9)).reason
        'no batch rule; make the optimizer with batch_rule="correlation", say'
    """

    def __init__(self, rule: BatchRule | None) -> None:
        self.rule = rule
        self.times = StepTimes()
        self._samples: int | torch.Tensor | None = None
        self._before: float | None = None

    def __getstate__(self) -> dict[str, Any]:
        """All but the clock, which is another one where a copy goes on."""
        return {**self.__dict__, "_before": None}

    @property
    def batch_size(self) -> int | None:
        """Samples in the last step, of all ranks; reads from the device if there are several."""
        return None if self._samples is None else int(self._samples)

    def record(
        self, batch: Batch | None, joined: Joined | None, ranks: int, *, measured: bool
    ) -> None:
        """Take note that a step was completed; reads nothing from a device.

        Args:
            batch: what it came from; None if that was not observed.
            joined: what it was with those of other ranks.
            ranks: their number.
            measured: whether it measured, which takes longer than the steps that are compared.
        """
        if batch is None or joined is None:
            return
        self._samples = joined.samples
        if self.rule is None:
            return
        now, before = time.perf_counter(), self._before
        self._before = now
        if before is not None and not measured:
            self.times.record(ranks * batch.samples, now - before)

    def advise(
        self,
        statistics: Statistics,
        population: int | None = None,
        *,
        least: int = 1,
        most: int | None = None,
    ) -> Recommendation:
        """What the rule says now; one transfer from the device.

        Args:
            statistics: of the optimizer.
            population: n, samples in all; None if unknown.
            least: the smallest size that the caller can use.
            most: the largest; None for any.
        """
        if self.rule is None:
            reason = 'no batch rule; make the optimizer with batch_rule="correlation", say'
            return Recommendation(None, reason)
        means = torch.stack([statistics.mean("mean_square"), statistics.mean("noise")])
        mean_square, noise = means.tolist()
        # NaN before the first measurement; both 0 where no measurement could tell them.
        unknown = not (math.isfinite(mean_square) and math.isfinite(noise))
        if (unknown or mean_square == noise == 0) and not isinstance(self.rule, Fixed):
            return Recommendation(None, "no gradient noise was measured yet")
        reading = NoiseReading(mean_square, noise, self.batch_size)
        return self.rule.recommend(reading, self.times, population, least=least, most=most)

    def state_dict(self) -> dict[str, Any]:
        """Step times and the last size, for a resume."""
        # Pairs, as torch.distributed.checkpoint takes dicts apart and asks for their keys.
        times = list(self.times.state_dict().items())
        return {"times": times, "batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Take up what `state_dict` gave.

        Args:
            state: None for one of an optimizer without a rule: nothing is known then.
        """
        self.times = StepTimes()
        self._samples, self._before = None, None
        if state is not None:
            self.times.load_state_dict(dict(state["times"]))
            self._samples = state["batch_size"]


def _untried(known: list[int], least: int, most: float) -> int | None:
    """The size to time next: double, then half, as far as the range goes."""
    lowest, highest = known[0], known[-1]
    if highest >= 3 * lowest:
        return None
    double, half = 2 * highest, lowest // 2
    choices = [half] if highest >= 2 * lowest else [double, half]
    return next((m for m in choices if max(least, 1) <= m <= most), None)


def _within(
    size: int | None, reason: str, noise: NoiseReading, least: int, most: int | None
) -> Recommendation:
    """The size in the range, and no further up than the noise was measured for."""
    wanted = math.inf if size is None else size
    if noise.batch_size is not None:
        wanted = min(wanted, GROWTH * noise.batch_size)
    wanted = max(least, _least_of(most, wanted))
    return Recommendation(None if math.isinf(wanted) else int(wanted), reason)


def _least_of(*values: float | None) -> float:
    return min((v for v in values if v is not None), default=math.inf)


def _samples(scale: float) -> str:
    return "infinite (no signal in the noise)" if math.isinf(scale) else f"{scale:.3g}"
