"""What the ways to a structure matrix take, estimated from a forward.

There are two for small models: through the layers (`conjopt.measure.structure`), and the whole
Jacobian (`conjopt.measure.dense`). tests/benchmarks/structure_costs.py fits the constants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch.nn import functional as F

from conjopt.measure.layers.tape import Tape

__all__ = ["LAYERS", "WHOLE", "features", "has_narrow_convolutions", "whole_is_shorter"]

_CONVOLUTIONS = {torch.conv1d, torch.conv2d, torch.conv3d}

# CPU seconds for each of what `features` counts.
WHOLE = (5.8e-4, 1.8e-4, 2.5e-11, 1.8e-9, 7.3e-10, 2.3e-11)
LAYERS = (5.7e-4, 3.1e-4, 2.5e-4, 2.1e-9, 1.9e-9, 3.5e-9, 3.6e-9)
# An estimate this much greater still counts as less: three of four are right within 0.15.
_MARGIN = 1.1


def features(tape: Tape, samples: int, outputs: int) -> tuple[list[float], list[float]]:
    """Count what takes time in either way.

    Args:
        tape: Of a forward of some samples.
        samples: `m`, of the whole batch.
        outputs: `d`, cotangents of a sample.

    Returns:
        For the whole Jacobian: 1, uses of parameters, multiplications for it, elements arriving at
        layers, entries of it, and multiplications for its products. For the layers: 1, uses, uses
        on sequences or images, elements arriving at layers on vectors, at those on sequences and
        images, and at others, and inner products.

    Example:
        >>> tape = Tape(torch.nn.Linear(4, 3), torch.ones(2, 4))
        >>> whole, layers = features(tape, 10, 3)
        >>> whole  # 10 samples, 3 outputs, 15 parameters
        [1.0, 1.0, 360.0, 210.0, 450.0, 1350.0]
        >>> layers
        [1.0, 1.0, 0.0, 210.0, 0.0, 0.0, 90.0]
    """
    uses, md = len(tape.uses), samples * outputs
    sequences, multiplied = 0, 0.0
    vectors, places, others, entries = 0.0, 0.0, 0.0, 0.0
    for use in tape.uses:
        weight, entries = use.weights[0], entries + md * sum(w.numel() for w in use.weights)
        elements = sum(map(math.prod, use.shapes)) / tape.samples
        if weight.ndim < 2 or not (use.function is F.linear or use.function in _CONVOLUTIONS):
            others += md * elements
            continue
        number = elements / len(weight)
        arriving = number * (len(weight) + weight[0].numel())
        multiplied += md * number * weight.numel()
        if number > 1:
            sequences, places = sequences + 1, places + md * arriving
        else:
            vectors += md * arriving
    whole = [1, uses, multiplied, vectors + places, entries, entries * outputs]
    layers = [1, uses, sequences, vectors, places, others, md * outputs * uses]
    return [float(x) for x in whole], [float(x) for x in layers]


def whole_is_shorter(tape: Tape, samples: int, outputs: int) -> bool:
    """Whether the whole Jacobian is estimated to be the faster way.

    Args:
        tape: Of a forward of some samples.
        samples: `m`, of the whole batch.
        outputs: `d`, cotangents of a sample.

    Example:
        >>> tape = Tape(torch.nn.Linear(64, 64), torch.ones(2, 64))
        >>> whole_is_shorter(tape, 1, 10), whole_is_shorter(tape, 1000, 10)
        (True, False)
    """
    whole, layers = features(tape, samples, outputs)
    return _sum(WHOLE, whole) < _MARGIN * _sum(LAYERS, layers)


def has_narrow_convolutions(tape: Tape, outputs: int) -> bool:
    """Whether convolutions' gradients are best taken whole, by what both ways compute.

    That is where their results have a quarter more elements than there are parameters; and for one
    output also where the inner products of a sample's factors, at `T` places of `b` inputs each,
    take more than 1 / 1.7 of the `T a b` of its gradient `(a, b)`, as measured.

    Args:
        tape: Of a forward of some samples.
        outputs: `d`, cotangents of a sample.

    Example:
        >>> layers = torch.nn.Conv1d(1, 2, 3), torch.nn.Flatten()
        >>> has_narrow_convolutions(Tape(torch.nn.Sequential(*layers), torch.ones(1, 1, 9)), 14)
        True
    """
    elements, gradients, factors = 0, 0, 0
    for use in tape.uses:
        if use.function in _CONVOLUTIONS:
            weight, m = use.weights[0], tape.samples
            for shape in use.shapes if weight.ndim > 1 else ():
                places = math.prod(shape) // (m * len(weight))
                gradients += places * weight.numel()
                factors += places**2 * (len(weight) + weight[0].numel())
            elements += sum(map(math.prod, use.shapes))
    weights = {id(weight): weight.numel() for use in tape.uses for weight in use.weights}
    one = outputs == 1 and 0 < gradients <= 1.7 * factors
    return one or elements > 1.25 * tape.samples * sum(weights.values())


def _sum(constants: Sequence[float], counts: Sequence[float]) -> float:
    return sum(c * n for c, n in zip(constants, counts, strict=True))
