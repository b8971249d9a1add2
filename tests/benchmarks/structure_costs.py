"""Fit the constants of conjopt.measure.costs: what either way to a structure matrix takes.

On random MLPs, convolutional networks and residual blocks on sequences, batches with 2^16 to 2^22
entries of the Jacobian go both ways in turns. Non-negative least squares of the relative error give
the constants; then it is told what the choice by them costs, in units of the faster way and of the
whole Jacobian, on models that were not fitted, beside the choice by the package's constants and by
the number of entries. Seconds are those of the process's CPU on one thread.

    python tests/benchmarks/structure_costs.py [--models 600] [--seed 0]
"""

from __future__ import annotations

import argparse
import copy
import random
import warnings
from collections.abc import Callable

import numpy as np
import scipy.optimize
import torch
from loss_time import keep_freed_memory
from small_structures import Tokens, convolutional, mlp, seconds
from torch import Tensor, nn

from conjopt.measure import costs, dense, structure_matrix
from conjopt.measure.dense import Shortcut
from conjopt.measure.layers.tape import Tape

TURNS = 5


def drawn(sizes: random.Random) -> tuple[nn.Module, Callable[[int], Tensor], int]:
    """Draw a model, what draws so many samples for it, and its outputs."""
    k = sizes.choice((1, 1, 2, 3, 5, 10, 20, 50))
    kind = sizes.choice(("mlp", "mlp", "convolutions", "tokens"))
    if kind == "mlp":
        widths = [sizes.choice((4, 8, 16, 32, 64, 128, 256)) for _ in range(sizes.randint(1, 6))]
        return mlp(*widths, k), lambda m: torch.randn(m, widths[0]), k
    if kind == "convolutions":
        channels, kernel = sizes.choice((2, 4, 8, 12, 16, 24)), sizes.choice((1, 3, 5))
        side = sizes.choice((8, 12, 16))
        return convolutional(channels, k, kernel), lambda m: torch.randn(m, 1, side, side), k
    width, places = sizes.choice((8, 16, 32, 64)), sizes.choice((4, 8, 16, 32))
    return Tokens(width, k), lambda m: torch.randn(m, places, width), k


def both(model: nn.Module, x: Tensor) -> tuple[float, float] | None:
    """Take the seconds through the whole Jacobian and through the layers."""
    ways = {"whole": model, "layers": copy.deepcopy(model)}
    for way, limit in (("whole", 2**24), ("layers", 0)):
        dense.SMALL = dense.PART = limit
        costs._MARGIN = float("inf")  # both are tried, whatever their estimates
        for _ in range(3):
            structure_matrix(ways[way], x)
    dense.SMALL = dense.PART = 2**24
    opened = [Shortcut("structure_matrix", m, x).like is not None for m in ways.values()]
    if opened != [True, False]:
        return None
    calls = max(1, int(3e-3 / seconds(lambda: structure_matrix(ways["layers"], x), 2)))
    times = [
        [seconds(lambda m=m: structure_matrix(m, x), calls) for m in ways.values()]
        for _ in range(TURNS)
    ]
    whole, layers = np.median(times, axis=0)
    return float(whole), float(layers)


def fitted(counts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Fit constants that are not negative to relative errors."""
    relative = counts / times[:, None]
    size = np.maximum(relative.max(axis=0), 1e-30)
    constants, _ = scipy.optimize.nnls(relative / size, np.ones(len(times)))
    return constants / size


def main() -> None:
    """Time, fit, and tell."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    keep_freed_memory()
    sizes, margin = random.Random(options.seed), costs._MARGIN
    found = []
    while len(found) < options.models:
        torch.manual_seed(0)
        model, draw, k = drawn(sizes)
        entries = k * sum(p.numel() for p in model.parameters())
        m = round(2 ** sizes.uniform(16, 22) / entries)
        if 2 <= m <= 4096 and (times := both(model, x := draw(m))) is not None:
            narrow = costs.has_narrow_convolutions(tape := Tape(model, x), k)
            found.append((*costs.features(tape, m, k), *times, narrow, m * entries))
    whole, layers, whole_times, layer_times, narrow, entries = map(
        np.array, zip(*found, strict=True)
    )
    times = np.stack([whole_times, layer_times])
    half = len(found) // 2
    by_whole, by_layers = (
        fitted(whole[:half], times[0, :half]),
        fitted(layers[:half], times[1, :half]),
    )
    print("whole: ", ", ".join(f"{c:.2g}" for c in by_whole))
    print("layers:", ", ".join(f"{c:.2g}" for c in by_layers))
    choices = {
        "fitted to the other half": whole @ by_whole < margin * (layers @ by_layers),
        "the package's": whole @ costs.WHOLE < margin * (layers @ costs.LAYERS),
        "at most 2^19 entries": entries <= 2**19,
        "always whole": np.ones(len(found), bool),
        "never whole": np.zeros(len(found), bool),
    }
    print("| choice | whole | to the faster: mean, 90 %, most | to the whole: 90 %, 95 %, most |")
    print("|---|---|---|---|")
    for name, choice in choices.items():
        taken = np.where(choice | narrow, *times)[half:]
        best, other = taken / times[:, half:].min(axis=0), taken / times[0, half:]
        print(
            f"| {name} | {np.mean((choice | narrow)[half:]):.0%} "
            f"| {best.mean():.2f}, {np.quantile(best, 0.9):.2f}, {best.max():.2f} "
            f"| {np.quantile(other, 0.9):.2f}, {np.quantile(other, 0.95):.2f}, {other.max():.2f} |"
        )


if __name__ == "__main__":
    main()
