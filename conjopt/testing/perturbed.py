"""The search for a counterexample around a batch: which rows, which scale, which targets."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.measure.layers.layout import Samples
from conjopt.testing.plain import Plain, taken
from conjopt.testing.strategies import fitting_targets

__all__ = ["Example", "Search"]

LARGEST = 30.0  # output that a perturbation may make: beyond it losses are all rounding
KEPT = 2**27  # bytes of dense matrices that are kept for the next statement


@dataclasses.dataclass(frozen=True)
class Example:
    """What is done to what was given.

    Attributes:
        rows: which samples are taken, in this order, some more than once.
        parameters: factor of all parameters.
        inputs: factor of floating-point inputs.
        targets: "given"; "hard", others; "near", the link of outputs next to the model's; "far".
        seed: of targets and of a random direction.
        direction: kind of the direction in the parameters, see `Plain.direction`.
        tau: of the trust region.
        parameter: whose accounting is looked at; None for all.
    """

    rows: tuple[int, ...]
    parameters: float = 1.0
    inputs: float = 1.0
    targets: str = "given"
    seed: int = 0
    direction: str = "random"
    tau: float = 1.0
    parameter: str | None = None


class Search:
    """Examples around a batch, and what plain autograd says of them.

    Args:
        model: a copy, whose parameters are written to.
        loss: a copy of the criterion.
        inputs: of the model.
        targets: of the criterion.
        places: where samples are in each tensor of the inputs.
        samples: how many are given.
        rows: of an example, at most.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        inputs: Any,
        targets: Tensor,
        places: list[Samples | None],
        samples: int,
        rows: int,
    ) -> None:
        self.model, self.loss, self.inputs, self.targets = model, loss, inputs, targets
        self.places, self.samples, self.most = places, samples, rows
        self._given = [parameter.detach().clone() for parameter in model.parameters()]
        self._found: collections.OrderedDict[Any, Plain] = collections.OrderedDict()
        self.names = [n for n, p in model.named_parameters() if p.requires_grad]
        self._float = any(
            isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in tree_leaves(inputs)
        )

    @property
    def first(self) -> Example:
        """The batch as it is given, or rows all over it if there are more than an example takes."""
        at = torch.linspace(0, self.samples - 1, min(self.samples, self.most)).long()
        return Example(tuple(at.tolist()))

    @property
    def given(self) -> list[tuple[Example]]:
        """Its rows one by one, in pairs, and all of them."""
        rows = self.first.rows
        pairs = list(itertools.pairwise(rows)) if len(rows) > 2 else []
        parts = [*((row,) for row in rows), *pairs]
        return [*((dataclasses.replace(self.first, rows=part),) for part in parts), (self.first,)]

    def strategy(self) -> st.SearchStrategy[tuple[Example]]:
        """Examples, from the first row as it is given."""
        return self._drawn()

    def _drawn(self) -> st.SearchStrategy[tuple[Example]]:
        @st.composite
        def drawn(draw: st.DrawFn) -> tuple[Example]:
            row = st.integers(0, self.samples - 1)
            example = Example(
                rows=tuple(draw(st.lists(row, min_size=1, max_size=self.most))),
                parameters=draw(st.sampled_from([1.0, 0.1, 3.0])),
                inputs=draw(st.sampled_from([1.0, 0.1, 10.0])) if self._float else 1.0,
                targets=draw(st.sampled_from(["given", "hard", "near", "far"])),
                seed=draw(st.integers(0, 99)),
                direction=draw(st.sampled_from(["random", "gradient", "top", "residual"])),
                tau=draw(st.sampled_from([1.0, 0.1, 3.0])),
                parameter=draw(st.sampled_from(self.names)),
            )
            return (self._usable(example),)

        return drawn()

    def _usable(self, example: Example) -> Example:
        """The example, or what is left of it where numbers are not finite or far too large."""
        plainer = dataclasses.replace(example, parameters=1.0, inputs=1.0, targets="given")
        for one, largest in ((example, LARGEST), (plainer, float("inf"))):
            try:
                plain = self.at(one)
                value, cotangents = plain.value_and_pull
                greatest = float(plain.outputs.abs().max())
                if greatest <= largest and bool(value.isfinite() & cotangents.isfinite().all()):
                    return one
            except Exception:  # the model or the loss does not take it
                continue
        return dataclasses.replace(self.first, seed=example.seed, direction=example.direction)

    def at(self, example: Example) -> Plain:
        """Make an example of the copy, and give the dense matrices that belong to it.

        Args:
            example: what to make.
        """
        with torch.no_grad():
            for parameter, given in zip(self.model.parameters(), self._given, strict=True):
                parameter.copy_(given if example.parameters == 1 else example.parameters * given)
                parameter.grad = None
        drawn = example.targets != "given"
        key = (*dataclasses.astuple(example)[:4], example.seed if drawn else None)
        if key not in self._found:
            self._found[key] = self._made(example)
            while len(self._found) * self.dense_bytes(self._found[key]) > KEPT:
                if len(self._found) == 1:
                    break
                self._found.popitem(last=False)
        return self._found[key]

    @staticmethod
    def dense_bytes(plain: Plain) -> int:
        """Of the Jacobians."""
        return 8 * sum(plain.sizes) * max(1, plain.outputs.numel())

    def _made(self, example: Example) -> Plain:
        rows = list(example.rows)
        inputs = taken(self.inputs, self.places, self.samples, rows)
        if example.inputs != 1:
            inputs = tree_map(lambda leaf: _scaled(leaf, example.inputs), inputs)
        targets = self.targets[torch.tensor(rows, device=self.targets.device)]
        plain = Plain(self.model, self.loss, inputs, targets, self.places, len(rows))
        if example.targets != "given":
            generator = torch.Generator().manual_seed(example.seed)
            how = "hard" if example.targets == "hard" else "soft"
            apart = 0.01 if example.targets == "near" else 3.0
            redrawn = fitting_targets(plain.view, plain.outputs, how, generator, apart)
            if redrawn.is_floating_point() == targets.is_floating_point():
                redrawn = redrawn.to(targets.dtype)
            plain.targets = redrawn.to(targets.device)
        return plain

    def describe(self, example: Example) -> Mapping[str, Any]:
        """What a report tells of an example: the rows, and what is not as it was given.

        Args:
            example: to tell of.
        """
        told: dict[str, Any] = {"rows": list(example.rows)}
        for name in ("parameters", "inputs"):
            if getattr(example, name) != 1:
                told[name] = f"times {getattr(example, name):g}"
        if example.targets != "given":
            told["targets"] = self.at(example).targets.tolist()
        if example.direction != "random":
            told["direction"] = example.direction
        if example.tau != 1:
            told["tau"] = example.tau
        return told


def _scaled(leaf: Any, factor: float) -> Any:
    return factor * leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf
