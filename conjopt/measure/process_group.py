"""The processes that share a step: what their batches say together, in few fused sums.

The gradients at hand are means over the ranks, as `torch.nn.parallel.DistributedDataParallel`
leaves them. With ``w_r = sum kappa c`` of rank r (`Batch.weight`) the joined batch has the weight
``mean_r w_r`` and the loss ``sum_r w_r L_r / sum_r w_r``. Even ranks are the first part of it and
odd ranks the second, so that their own gradients are those of two halves.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from conjopt.measure.observation import Batch
from conjopt.measure.parts import Parts, Response, of_parts

__all__ = ["Joined", "Ranks"]

SAME = 1e-3  # relative difference of two ranks' gradients that is no rounding


@dataclasses.dataclass(eq=False)
class Joined:
    """What the batches of all ranks are together.

    Attributes:
        weight: () ``.grad`` over this is in per-sample Fenchel-Young units.
        loss: () mean loss over the floor.
        samples: number of samples, () if it was summed over ranks.
        shares: () of the weight, of the first and the second part; None in one process.
        sizes: () effective samples of each part, ``(sum w)^2 / sum w^2/m`` over its ranks, which is
            their number where all samples weigh the same; None in one process.
    """

    weight: Tensor
    loss: Tensor
    samples: int | Tensor
    shares: tuple[Tensor, Tensor] | None = None
    sizes: tuple[Tensor, Tensor] | None = None


class Ranks:
    """The processes of a group, and sums over them; a single process sends nothing.

    Every sum is a collective, which all ranks have to call in the same order.

    Args:
        group: of `torch.distributed`; None for a process by itself.

    Attributes:
        size: number of processes.
        rank: number of this one in the group.

    Raises:
        ValueError: if this process is not in the group.

    Example:
        >>> ranks = Ranks()
        >>> ranks.several, ranks.sum([torch.tensor(2.0)])
        (False, [tensor(2.)])
    """

    def __init__(self, group: Any = None) -> None:
        self.group = group
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        if self.rank < 0:
            raise ValueError(
                f"process {dist.get_rank()} is not in the process group {group!r}; give the group "
                "whose ranks the gradients are averaged over"
            )

    @property
    def several(self) -> bool:
        """Whether there are others to agree with."""
        return self.size > 1

    @property
    def second(self) -> bool:
        """Whether the samples of this rank are of the second part."""
        return self.rank % 2 == 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sums over the ranks of tensors of any shapes, the same bits on all of them.

        Args:
            tensors: of the same shapes on every rank; sent as one, in float32 or wider.
        """
        if not self.several:
            return list(tensors)
        wide = functools.reduce(torch.promote_types, (t.dtype for t in tensors), torch.float32)
        flat = torch.cat([t.detach().flatten().to(wide) for t in tensors])
        dist.all_reduce(flat, group=self.group)
        pieces = flat.split([t.numel() for t in tensors])
        return [piece.reshape(t.shape) for piece, t in zip(pieces, tensors, strict=True)]

    def join(self, batch: Batch, loss: Tensor, size: Tensor) -> Joined:
        """The batches of all ranks as one; one sum of a few numbers.

        Args:
            batch: of this rank.
            loss: () its mean over the floor.
            size: () the greatest entry of the gradients, which all ranks share.

        Raises:
            RuntimeError: on a CPU, if the gradients are not those of the other ranks; a device is
                not asked.
        """
        if not self.several:
            return Joined(batch.weight, loss, batch.samples)
        weight = batch.weight.to(loss)
        samples = torch.full_like(loss, batch.samples)
        own = torch.stack([weight, weight.square() / samples.clamp_min(1)])
        none = torch.zeros_like(own)
        first, second, total, count, all_sizes = self.sum(
            [
                *((none, own) if self.second else (own, none)),
                torch.where(weight != 0, weight * loss, 0.0),
                samples,
                size,
            ]
        )
        if size.device.type == "cpu" and bool((all_sizes / self.size - size).abs() > SAME * size):
            raise RuntimeError(
                f"the gradients of the {self.size} ranks differ: they were not averaged. Call the "
                "DistributedDataParallel wrapper in the loop, not the module in it, run the last "
                "backward() before step() outside no_sync(), and change gradients alike on all "
                "ranks"
            )
        every = (first + second)[0]
        return Joined(
            every / self.size,
            total / every,
            count,
            (first[0] / every, second[0] / every),
            (first[0].square() / first[1], second[0].square() / second[1]),
        )

    def parts(
        self,
        batch: Batch,
        joined: Joined,
        parameters: Mapping[str, Tensor],
        gradients: Sequence[Tensor],
        local: Mapping[str, Tensor],
        *,
        changed: bool,
    ) -> Parts:
        """Gradients of the even and of the odd ranks; one sum of one or two gradients.

        Args:
            batch: of this rank, observed while the watch was armed.
            joined: of all of them.
            parameters: by name, those with gradients.
            gradients: g in their order, of the joined batch.
            local: by name, what this rank added to ``.grad`` before it was averaged.
            changed: see `split`.
        """
        assert joined.shares is not None
        assert joined.sizes is not None
        own = [local.get(name, torch.zeros_like(p)) for name, p in parameters.items()]
        none = [torch.zeros_like(p) for p in own]
        sent = none if self.second else own
        if changed:
            sent = [*sent, *(own if self.second else none)]
        unit = joined.weight * self.size
        summed = [
            (t / unit).to(g.dtype)
            for t, g in zip(self.sum(sent), [*gradients, *gradients], strict=False)
        ]
        first, second = summed[: len(own)], summed[len(own) :]
        g1, g2 = of_parts(gradients, first, second if changed else None, joined.shares)
        forward = batch.forwards[-1]
        assert forward.replay is not None
        return Parts(g1, g2, joined.sizes, forward, forward.replay, mask=None, here=self.second)

    def respond(self, responses: Sequence[Response], here: bool = True) -> list[Response]:
        """What they are for the samples of all ranks; one sum of a few numbers.

        Args:
            responses: of this rank's samples; `Response.nothing` where it could not tell.
            here: whether these count.

        Returns:
            as many; lost on all ranks if they are on one, whether its samples count or not.
        """
        if not self.several:
            return list(responses)
        own = [
            torch.stack([r.weight * r.curvature, r.weight * r.change.square(), r.weight])
            for r in responses
        ]
        joined = []
        sent = own if here else [torch.where(t[2].isnan(), t, 0.0) for t in own]
        for curvature, square, weight in self.sum(sent):
            total = torch.where(weight > 0, weight, 1.0)
            joined.append(Response(curvature / total, (square / total).sqrt(), weight))
        return joined
