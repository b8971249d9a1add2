"""What is known of the batch that the gradients at hand came from.

The units are those of docs/theory.md, section 0: with the criterion ``c mean l + offset`` and the
factor ``kappa`` that its value is multiplied by in what is differentiated,
``.grad / sum(kappa c)`` is the gradient of the mean Fenchel-Young loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from conjopt.losses import PotentialOf
from conjopt.measure.replay import Replay

__all__ = ["Batch", "Forward", "Marks", "Observation", "sum_of"]

Marks = list[tuple[int, int] | None]  # of every gradient, what tells whether it was written to


@dataclasses.dataclass(eq=False)
class Forward:
    """One training forward of the model, with what it takes to run it again.

    Attributes:
        replay: runs it again; None unless the watch was armed.
        gradients: by place among the output's tensors, the gradients that reached them.
        samples: by place, their sizes along dimension 0.
        outputs: by place, the output's tensors themselves; none unless the watch was armed.
    """

    replay: Replay | None
    gradients: dict[int, Tensor]
    samples: dict[int, int]
    outputs: dict[int, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def batch_size(self) -> int | None:
        """Samples along dimension 0 of the outputs, None if they disagree or have none."""
        sizes = {self.samples[place] for place in self.gradients}
        return sizes.pop() if len(sizes) == 1 and min(sizes) > 0 else None


@dataclasses.dataclass(eq=False)
class Observation:
    """One call of the criterion whose value a backward pass went through.

    Attributes:
        loss: () value of the criterion.
        kappa: () gradient that reached this value: AMP scale, accumulation factor, and so on.
        scale: () ``c`` of the reduction.
        offset: () entropy of the targets in the criterion's value.
        outputs: what the criterion was given, in its own shape; None unless armed.
        targets: what they were compared with.
        forward: the model's forward that the outputs came from.
        place: which of its output tensors the outputs are, or None if they were made from them.
        pull: for outputs made from the model's, their vector-Jacobian product, linear in a
            cotangent of the outputs: (cotangent, {place: product}).
    """

    loss: Tensor
    kappa: Tensor
    scale: Tensor
    offset: Tensor
    outputs: Tensor | None
    targets: Tensor
    forward: Forward
    place: int | None
    pull: tuple[Tensor, dict[int, Tensor]] | None

    def push(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Carry a change of the model's output tensors to the criterion's input."""
        if self.place is not None:
            return tangents[self.place]
        assert self.pull is not None
        cotangent, products = self.pull
        places = [place for place in products if place in tangents]
        (change,) = torch.autograd.grad(
            [products[place] for place in places],
            [cotangent],
            [tangents[place].to(products[place].dtype) for place in places],
            retain_graph=True,
        )
        return change

    def pull_back(self, cotangent: Tensor, like: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Carry a cotangent of the criterion's input to the model's output tensors.

        Args:
            cotangent: in the shape of the outputs.
            like: by place, tensors in the shapes of the model's output tensors.
        """
        if self.place is not None:
            return {self.place: cotangent}
        assert self.pull is not None
        places = [place for place in self.pull[1] if place in like]
        with torch.enable_grad():
            tangents = {p: torch.zeros_like(like[p], requires_grad=True) for p in places}
            leaf, products = self.pull
            (change,) = torch.autograd.grad(
                [products[place] for place in places],
                [leaf],
                [tangents[place].to(products[place].dtype) for place in places],
                create_graph=True,
            )
            pulled = torch.autograd.grad(
                change, list(tangents.values()), cotangent.to(change.dtype), allow_unused=True
            )
        return {
            place: torch.zeros_like(like[place]) if part is None else part
            for place, part in zip(places, pulled, strict=True)
        }


@dataclasses.dataclass(eq=False)
class Batch:
    """What the gradients at hand came from: all observations since the last step.

    Attributes:
        observations: in the order of their backward passes.
        potential_of: the reading of the criterion.
        marks: the state of every gradient when the last backward pass ended.
    """

    observations: list[Observation]
    potential_of: PotentialOf
    marks: Marks

    @property
    def weight(self) -> Tensor:
        """() ``sum kappa c``: ``.grad`` over this is in per-sample Fenchel-Young units."""
        return sum_of([o.kappa * o.scale for o in self.observations])

    def loss(self, floor: float | None) -> Tensor:
        """() mean loss over the floor, in Fenchel-Young units.

        Args:
            floor: in the criterion's units; None for the entropy of the targets.
        """
        excess = [
            o.kappa * (o.loss - (o.offset if floor is None else floor)) for o in self.observations
        ]
        return sum_of(excess) / self.weight

    @property
    def samples(self) -> int:
        """Samples of all forwards; reads nothing from a device."""
        # Gradients tell which outputs count, but are kept on measuring steps only.
        sizes = {
            o.forward: max(o.forward.samples.values())
            if o.place is None
            else o.forward.samples[o.place]
            for o in self.observations
        }
        return sum(sizes.values())

    @property
    def forwards(self) -> list[Forward]:
        """The model's forwards behind the observations, each once."""
        return list(dict.fromkeys(o.forward for o in self.observations))


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of a non-empty list of tensors."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
