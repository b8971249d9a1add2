"""What one step and many steps buy, in closed form (docs/theory.md, Thm 3.1, 3.2 and 3.5)."""

from __future__ import annotations

import math

__all__ = [
    "batch_gradient_square",
    "check_step",
    "convergence_bound",
    "expected_decrease",
    "polyak_distance",
    "realised_curvature",
]


def realised_curvature(
    risk: float, risk_after: float, slope: float, square: float, step_size: float = 1.0
) -> float:
    """Return the curvature that a step met: `2 (R+ - R + a <g,u>) / (a^2 ||u||^2)`.

    It is what makes `R+ = R - a <g,u> + L a^2 ||u||^2 / 2` an equation. Losses of the size of 1
    know it to about `eps / (a^2 ||u||^2)`: compute them in float64.

    Args:
        risk: `R_B(theta)`, the mean loss of the batch.
        risk_after: `R_B(theta - a u)`, of the same samples.
        slope: `<g_B, u>`.
        square: `||u||^2`.
        step_size: `a`; 1 if `u` is the displacement itself.

    Returns:
        `L`, which may be negative; 0 for a step that does not move.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import realised_curvature
        >>> realised_curvature(0.5, 0.125, slope=1.0, square=1.0, step_size=0.5)  # R = theta^2 / 2
        1.0
    """
    moved = step_size**2 * square
    return 2 * (risk_after - risk + step_size * slope) / moved if moved else 0.0


def convergence_bound(
    decrease: float,
    steps: int,
    *,
    batch_size: float,
    samples: float,
    curvature: float,
    out_change: float = 0.0,
    step_size: float | None = None,
) -> float:
    """Bound the mean of `||g_t||^2` over the steps of a run with constant settings (Thm 3.1).

    `[n (R_0 - R_*) / (m T) + (n - m) M / m] / (a (1 - a L / 2))`, which is `8/3 L [...]` for
    `a = 1 / (2 L)`. It is a guarantee if the realised curvature of no step exceeds `L`, and the
    out-of-batch change of no step `M`; their mean over the steps is enough for `M`.

    Args:
        decrease: `R_0 - R_*`, of the risk over all `n` samples, with any floor `R_* <= R_T`.
        steps: `T`.
        batch_size: `m`.
        samples: `n`. Only `m / n` counts.
        curvature: `L`.
        out_change: `M`.
        step_size: `a`; by default `1 / (2 L)`.

    Returns:
        The bound; infinite unless `0 < a < 2 / L`.

    Raises:
        ValueError: For numbers that make no sense: no steps, no batch of so many samples, a
            negative decrease, or a curvature that sets no step size.

    Reference:
        docs/theory.md, Thm 3.1.

    Example:
        >>> from conjopt.bounds import convergence_bound
        >>> convergence_bound(2.0, 100, batch_size=10, samples=10, curvature=3.0)  # 8/3 3 2 / 100
        0.16
        >>> convergence_bound(
        ...     2.0, 100, batch_size=5, samples=10, curvature=3.0, out_change=0.01
        ... )
        0.4
    """
    if steps < 1:
        raise ValueError(f"convergence_bound: steps={steps}, expected at least 1")
    if not 0 < batch_size <= samples:
        raise ValueError(
            f"convergence_bound: batch_size={batch_size} of samples={samples}, expected "
            "0 < batch_size <= samples"
        )
    if not decrease >= 0:
        raise ValueError(
            f"convergence_bound: decrease={decrease}, expected R_0 - R_* >= 0: the floor is no "
            "lower bound of the risk"
        )
    if step_size is None:
        if not curvature > 0:
            raise ValueError(
                f"convergence_bound: curvature={curvature} sets no step size 1/(2L): pass a "
                "positive curvature, or step_size="
            )
        step_size = 1 / (2 * curvature)
    gain = step_size * (1 - step_size * curvature / 2)
    if not gain > 0:
        return math.inf
    total = samples * decrease / (batch_size * steps)
    return (total + (samples - batch_size) * out_change / batch_size) / gain


def batch_gradient_square(
    gradient_square: float, noise: float, *, batch_size: float, samples: float
) -> float:
    """Return `E ||g_B||^2` of `m` out of `n` samples drawn without replacement (Thm 3.2).

    Args:
        gradient_square: `||G||^2`, of the gradient of the mean over all samples.
        noise: `S^2`, the mean squared norm of the samples' gradients less `||G||^2`.
        batch_size: `m`.
        samples: `n`.

    Returns:
        `||G||^2 + (S^2 / m) (n - m) / (n - 1)`; the second term is 0 for one sample.

    Raises:
        ValueError: If there is no such batch.

    Reference:
        docs/theory.md, Thm 3.2.

    Example:
        >>> from conjopt.bounds import batch_gradient_square
        >>> batch_gradient_square(1.0, 3.0, batch_size=2, samples=4)
        2.0
    """
    if not 1 <= batch_size <= samples:
        raise ValueError(
            f"batch_gradient_square: batch_size={batch_size} of samples={samples}, expected "
            "1 <= batch_size <= samples"
        )
    if samples == 1:
        return gradient_square
    return gradient_square + noise / batch_size * (samples - batch_size) / (samples - 1)


def expected_decrease(
    gradient_square: float,
    noise: float,
    *,
    batch_size: float,
    samples: float,
    curvature: float,
    safety: float = 1.0,
) -> tuple[float, float]:
    """Return the step `a = s rho_m / L` and the decrease that it buys in expectation (Thm 3.2).

    The guarantee `E R(theta - a g_B) <= R - s (1 - s/2) rho_m ||G||^2 / L` needs
    `R(theta - a g_B) <= R - a <G, g_B> + L a^2 ||g_B||^2 / 2` for every batch that may be drawn.

    Args:
        gradient_square: `||G||^2`.
        noise: `S^2`.
        batch_size: `m`.
        samples: `n`.
        curvature: `L > 0`.
        safety: `s`, between 0 and 2.

    Returns:
        The step `a` and the decrease, both 0 where `G` is 0.

    Raises:
        ValueError: For a batch size, a curvature or a safety out of range.

    Reference:
        docs/theory.md, Thm 3.2.

    Example:
        >>> from conjopt.bounds import expected_decrease
        >>> expected_decrease(1.0, 3.0, batch_size=2, samples=4, curvature=0.5)  # rho_m = 1/2
        (1.0, 0.5)
    """
    check_step("expected_decrease", curvature, safety)
    square = batch_gradient_square(gradient_square, noise, batch_size=batch_size, samples=samples)
    correlation = gradient_square / square if gradient_square > 0 else 0.0
    gain = safety * (1 - safety / 2) * correlation * gradient_square / curvature
    return safety * correlation / curvature, gain


def polyak_distance(
    distance_square: float,
    excess: float,
    excess_over_floor: float,
    gradient_square: float,
    safety: float = 1.0,
) -> float:
    """Bound the squared distance to a minimizer after a Polyak step over a floor (Thm 3.5).

    The step is `a = s (R_B - l) / ||g||^2`. The bound is a guarantee if `R_B` is convex on the
    way from `theta` to the minimizer, as for models linear in their parameters; for others it says
    nothing.

    Args:
        distance_square: `||theta - theta_*||^2`.
        excess: `R_B - R_B*`, over the value at that minimizer.
        excess_over_floor: `R_B - l`, over a floor `l <= R_B*`.
        gradient_square: `||g_B||^2`, not 0.
        safety: `s > 0`.

    Returns:
        `||theta - theta_*||^2 - s (R_B - l) [2 (R_B - R_B*) - s (R_B - l)] / ||g||^2`.

    Raises:
        ValueError: For a floor above the minimum, where the theorem does not hold, a negative
            excess, or a gradient of 0, where there is no such step.

    Reference:
        docs/theory.md, Thm 3.5.

    Example:
        >>> from conjopt.bounds import polyak_distance
        >>> polyak_distance(4.0, 2.0, 2.0, 4.0)  # theta^2 / 2 at 2: the step halves theta
        3.0
    """
    if not excess >= 0 or not excess_over_floor >= excess:
        raise ValueError(
            f"polyak_distance: excess={excess} over the minimum and {excess_over_floor} over the "
            "floor, expected 0 <= excess <= excess_over_floor: a floor above the minimum voids "
            "Thm 3.5"
        )
    if not gradient_square > 0 or not safety > 0:
        raise ValueError(
            f"polyak_distance: gradient_square={gradient_square} and safety={safety}, expected "
            "positive numbers: where the gradient is 0 there is no Polyak step"
        )
    gained = safety * excess_over_floor * (2 * excess - safety * excess_over_floor)
    return distance_square - gained / gradient_square


def check_step(name: str, curvature: float, safety: float) -> None:
    """Refuse a curvature and a safety that no theorem is about."""
    if not curvature > 0:
        raise ValueError(f"{name}: curvature={curvature}, expected a positive L")
    if not 0 < safety < 2:
        raise ValueError(f"{name}: safety={safety}, expected a number between 0 and 2")
