"""What a step moves: parameters with gradients, each a block with its own state and group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from conjopt.measure.parts import inner_products
from conjopt.measure.shards import is_sharded, total_norm
from conjopt.optim.gate import Gate, choose

__all__ = ["Blocks", "is_known_one"]


@dataclasses.dataclass(eq=False)
class Blocks:
    """The parameters of one step; all lists are in the same order.

    Attributes:
        names: in the model.
        parameters: the tensors themselves.
        gradients: ``g``, at first ``.grad`` itself.
        states: of the optimizer.
        groups: of the optimizer.
    """

    names: list[str]
    parameters: list[Tensor]
    gradients: list[Tensor]
    states: list[Any]
    groups: list[dict[str, Any]]

    @classmethod
    def of(
        cls,
        groups: Sequence[dict[str, Any]],
        states: MutableMapping[Tensor, Any],
        names: Mapping[int, str],
    ) -> Blocks:
        """Those that have gradients.

        Args:
            groups: of the optimizer.
            states: of the optimizer, by parameter.
            names: by the parameters' ids.
        """
        pairs = [
            (p, group)
            for group in groups
            for p in group["params"]
            if p.grad is not None and p.numel()
        ]
        return cls(
            [names[id(p)] for p, _ in pairs],
            [p for p, _ in pairs],
            [p.grad for p, _ in pairs],
            [states[p] for p, _ in pairs],
            [group for _, group in pairs],
        )

    @property
    def by_name(self) -> dict[str, Tensor]:
        """The parameters by name."""
        return dict(zip(self.names, self.parameters, strict=True))

    @property
    def sharded(self) -> bool:
        """Whether every process holds a shard of them, or of some."""
        return any(is_sharded(parameter) for parameter in self.parameters)

    @property
    def ratios(self) -> list[float]:
        """Each block's ``lr`` over the greatest: part of the direction that is measured."""
        rates = [float(group["lr"]) for group in self.groups]
        most = max(rates)
        return [rate / most if most > 0 else 1.0 for rate in rates]

    @property
    def weights(self) -> list[Any]:
        """What each block of the direction is multiplied by: its ratio and its shrinkage."""
        return [
            state.get("shrinkage", 1.0) * ratio
            for state, ratio in zip(self.states, self.ratios, strict=True)
        ]

    @property
    def stand_still(self) -> bool:
        """Whether all rates and all gradients are zero; waits for a device if the rates are."""
        return all(float(group["lr"]) == 0 for group in self.groups) and bool(self.size(None) == 0)

    def expect_slopes(self, like: Tensor) -> None:
        """Give those that were not measured yet the state that stands for it.

        So all have the same state after a step, whatever it could measure: tools that load a
        checkpoint in place, as `torch.distributed.checkpoint` does, know what to expect.

        Args:
            like: () of the statistics' type and device.
        """
        for state in self.states:
            if "slopes" not in state:
                state["slopes"] = like.new_zeros(2)
            if "shrinkage" not in state:
                state["shrinkage"] = torch.ones_like(like)

    def size(self, foreach: bool | None) -> Tensor:
        """() the greatest entry of the gradients; not finite if any entry is not.

        Args:
            foreach: multi-tensor kernels; None for on a GPU.
        """
        return total_norm(self.gradients, math.inf, foreach)

    def scale(self, by: Tensor | None, foreach: bool | None) -> None:
        """Bring the gradients to the units and the sign of the step; ``.grad`` stays as it is.

        Args:
            by: () divides them; None for nothing, as 1 on a CPU is.
            foreach: multi-tensor kernels; None for on a GPU.
        """
        gradients = self.gradients
        if by is not None and not is_known_one(by):
            if foreach or (foreach is None and gradients[0].is_cuda):
                gradients = list(torch._foreach_div(gradients, by))
            else:
                gradients = [(gradient / by).to(gradient.dtype) for gradient in gradients]
        for i, (parameter, group) in enumerate(zip(self.parameters, self.groups, strict=True)):
            if group["maximize"]:
                gradients[i] = -gradients[i]
            if group["coupled_weight_decay"] and group["weight_decay"] != 0:
                gradients[i] = gradients[i].add(parameter, alpha=group["weight_decay"])
        self.gradients = gradients

    def along(self, directions: Sequence[Tensor], what: str) -> Tensor:
        """() ``<g, u>`` or ``||u||`` of the batch, with the blocks' weights.

        Args:
            directions: ``u``.
            what: "slope" or "length".
        """
        weighed = [
            u if isinstance(w, float) and w == 1 else u * w
            for u, w in zip(directions, self.weights, strict=True)
        ]
        if what == "slope":
            return inner_products(self.gradients, weighed).sum()
        return total_norm(weighed)

    def move(self, directions: Sequence[Tensor], max_decay: float, gate: Gate) -> None:
        """``theta <- theta (1 - min(weight_decay a, max_decay)) - a w u``.

        Args:
            directions: ``u``.
            max_decay: most that weight decay takes off.
            gate: () whether the step is taken.
        """
        left: dict[int, Tensor] = {}  # by group, what a step leaves of its parameters
        sizes: dict[tuple[int, torch.dtype], Tensor] = {}  # in the types of the parameters
        for parameter, group, state, u in zip(
            self.parameters, self.groups, self.states, directions, strict=True
        ):
            size = group["step_size"]  # a: a tensor, or a number under the constant rule
            if group["weight_decay"] != 0 and not group["coupled_weight_decay"]:
                taken = group["weight_decay"] * size if id(group) not in left else 0.0
                if isinstance(taken, Tensor):
                    left[id(group)] = 1 - choose(gate, taken.clamp(max=max_decay), 0.0)
                if id(group) in left:
                    parameter.mul_(left[id(group)])
                elif gate is None:
                    parameter.mul_(1 - min(taken, max_decay))
                else:
                    parameter.copy_(
                        choose(gate, parameter * (1 - min(taken, max_decay)), parameter)
                    )
            moved = choose(gate, u, 0.0)
            if isinstance(size, Tensor):
                key = id(group), parameter.dtype
                if "shrinkage" in state:
                    by = (size * state["shrinkage"]).to(parameter.dtype)
                elif key in sizes:
                    by = sizes[key]
                else:
                    by = sizes[key] = size.to(parameter.dtype)
                parameter.addcmul_(moved, by, value=-1)
            else:
                parameter.add_(moved, alpha=-size)

    def average(self, share: Tensor) -> None:
        """Take the parameters into their tail average.

        Args:
            share: () weight of the new ones.
        """
        for parameter, state in zip(self.parameters, self.states, strict=True):
            if "average" not in state:
                state["average"] = parameter.detach().clone()
            state["average"].lerp_(parameter, share.to(parameter.dtype))


def is_known_one(number: Tensor) -> bool:
    """Whether a number is 1; a device is not asked.

    Args:
        number: ().

    Example:
        >>> is_known_one(torch.tensor(1.0)), is_known_one(torch.tensor(2.0))
        (True, False)
    """
    return number.device.type == "cpu" and bool(number == 1)
