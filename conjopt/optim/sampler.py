"""Batches whose size follows an optimizer's batch rule, each sample once an epoch."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, Sampler

from conjopt.optim import sampler_checks as checks
from conjopt.optim.batch_rule import Recommendation

__all__ = ["AdaptiveBatchSampler", "Change", "Part"]

EXPLORING = 10  # batches until the next question while sizes are tried


class Part(NamedTuple):
    """What a delivered list of samples is of its batch.

    Attributes:
        share: factor of its mean loss in that of the whole batch.
        last: whether the batch is complete with it.

    Example:
        >>> Part(share=0.5, last=False).last
        False
    """

    share: float
    last: bool


class Change(NamedTuple):
    """A change of the batch size.

    Attributes:
        epoch: in which.
        batch: number of the first batch of the new size, from 0 in each epoch.
        old: size before.
        new: size from there on.
        reason: of the batch rule.

    Example:
        >>> Change(0, 25, 64, 128, "noise").new
        128
    """

    epoch: int
    batch: int
    old: int
    new: int
    reason: str


@dataclasses.dataclass
class _Pass:
    """One way through the data, or what is left of it after a resume."""

    epoch: int
    order: Sequence[Any]
    position: int = 0  # samples taken, of those in order
    number: int = 0  # batches begun
    planned: collections.deque[int] = dataclasses.field(default_factory=collections.deque)
    sizes: list[int] = dataclasses.field(default_factory=list)  # of the batches begun since iter()
    parts: list[Part] = dataclasses.field(default_factory=list)  # of the lists given since iter()
    delivered: int | None = None  # of these, if `parts` counts
    done: bool = False


class AdaptiveBatchSampler(Sampler[list[Any]]):
    """A ``batch_sampler`` of `torch.utils.data.DataLoader` whose size follows a batch rule.

    Every ``every`` batches it asks ``optimizer.batch_advice`` (of a `ConjSGD` with ``batch_rule=``)
    and changes the size after ``patience`` answers in a row that lie to one side by ``factor`` or
    more, to the nearest of these. Whatever the changes, every sample comes exactly once an epoch;
    ``drop_last`` leaves out no more than the rest at the end.

    Each pass through the loader is the next epoch, unless `set_epoch` says which. The loader asks
    for batches in the main process, ``prefetch_factor * num_workers`` of them ahead, so that a
    change acts that many batches later.

    On several ranks each takes its part of every batch of one common order: ``batch_size`` is that
    of all ranks together, and changes to multiples of their number. The last batch of an epoch may
    be uneven, and takes up to ``num_replicas - 1`` samples more than the others where a batch of
    the rest would leave a rank without a sample. With torch.distributed initialised all ranks do
    what rank 0 is advised.

    Args:
        data_source: a map-style data set, or anything with a length.
        optimizer: with ``batch_advice``, such as a `ConjSGD`. Without a ``batch_rule`` its advice
            is to leave the size as it is.
        batch_size: to begin with.
        sampler: indices of the data set, with a length, in place of ``shuffle``; on several ranks
            the same on all. Its ``set_epoch`` is called, if it has one.
        shuffle: whether to take the samples in an order drawn anew for each epoch.
        drop_last: whether to leave out the samples of an epoch that do not fill a batch.
        min_batch_size: least size to change to.
        max_batch_size: greatest; None for all samples.
        micro_batch_size: most samples in one list on one rank; larger batches come in several of
            about the same length, for the loop of `parts`. None for whole batches.
        seed: of the orders.
        factor: least ratio of sizes to act on, at least 1.
        patience: answers in a row to act on.
        every: batches from one question to the next.
        num_replicas: ranks; None for those of torch.distributed, or 1.
        rank: of this process; None for that of torch.distributed, or 0.

    Attributes:
        batch_size: the size now.
        epoch: the epoch now, or set for the next pass.
        history: the changes so far, each (epoch, number of batch, old, new, reason).

    Raises:
        TypeError: if the data set has no length or the optimizer gives no advice.
        ValueError: if a size or another number is out of range.

    Example:
        >>> class Advised:
        ...     def batch_advice(self, population, *, least, most):
        ...         return Recommendation(4, "for the example")
        >>> sampler = AdaptiveBatchSampler(
        ...     range(20), Advised(), batch_size=2, shuffle=False, every=2
        ... )
        >>> [len(batch) for batch in sampler]
        [2, 2, 4, 4, 4, 4]
        >>> sampler.history
        [Change(epoch=0, batch=2, old=2, new=4, reason='for the example')]
    """

    def __init__(
        self,
        data_source: Sized,
        optimizer: Any,
        batch_size: int,
        *,
        sampler: Iterable[Any] | None = None,
        shuffle: bool = True,
        drop_last: bool = False,
        min_batch_size: int = 1,
        max_batch_size: int | None = None,
        micro_batch_size: int | None = None,
        seed: int = 0,
        factor: float = 1.5,
        patience: int = 2,
        every: int = 25,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        total = checks.length(data_source, sampler)
        checks.advises(optimizer)
        together = distributed.is_available() and distributed.is_initialized()
        if num_replicas is None:
            num_replicas = distributed.get_world_size() if together else 1
        if rank is None:
            rank = distributed.get_rank() if together and num_replicas > 1 else 0
        if max_batch_size is None and isinstance(batch_size, int):
            max_batch_size = max(total, batch_size)
        checks.sizes(batch_size, min_batch_size, max_batch_size, micro_batch_size)
        checks.numbers(factor=factor, patience=patience, every=every, seed=seed)
        checks.ranks(total, batch_size, drop_last, num_replicas, rank)
        assert max_batch_size is not None
        self.batch_size, self.epoch = batch_size, 0
        self.history: list[Change] = []
        self._optimizer, self._sampler = optimizer, sampler
        self._total, self._shuffle, self._drop_last, self._seed = total, shuffle, drop_last, seed
        self._least = math.ceil(min_batch_size / num_replicas) * num_replicas
        self._most = max_batch_size // num_replicas * num_replicas
        self._micro, self._ranks, self._rank = micro_batch_size, num_replicas, rank
        self._factor, self._patience, self._every = factor, patience, every
        self._together = together and num_replicas > 1
        self._wait = 0  # batches until the next question
        self._pending: list[int] = []
        self._pass: _Pass | None = None
        self._next: _Pass | None = None  # after a resume
        self._chosen = True  # whether the next pass is of self.epoch

    def __iter__(self) -> Iterator[list[Any]]:
        # Begins with the first list, as a loader with workers calls iter() twice for one pass.
        yield from self._lists(self._begin_pass())

    def __len__(self) -> int:
        """Lists in this pass: those given and, at the size now, those to come; an estimate."""
        this = self._pass if self._next is None and not self._chosen else self._next
        if this is not None and this.done:
            this = None
        given = sum(map(self._pieces, this.sizes)) if this else 0
        rest = self._left(this) if this else self._total
        pieces = self._pieces(self.batch_size)
        if self._drop_last:
            return given + rest // self.batch_size * pieces
        whole, over = divmod(rest, self.batch_size)
        if over < self._ranks:
            over = 0
        return given + whole * pieces + (self._pieces(over) if over else 0)

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next pass is; after a resume its own goes on where it was left.

        Args:
            epoch: from 0.

        Raises:
            ValueError: if it is no whole number >= 0.

        Example:
            >>> class Advised:
            ...     def batch_advice(self, population, *, least, most):
            ...         return Recommendation(None, "no opinion")
            >>> sampler = AdaptiveBatchSampler(range(100), Advised(), batch_size=10)
            >>> first = list(sampler)
            >>> sampler.set_epoch(0)
            >>> list(sampler) == first
            True
        """
        checks.whole("epoch", epoch, 0)
        if self._next is not None and self._next.epoch != epoch:
            self._next = None
        self.epoch, self._chosen = epoch, True

    def parts(self, loader: DataLoader[Any]) -> Iterator[tuple[Any, Part]]:
        """Go through a loader of this sampler, with what each list is of its batch.

        It counts what was delivered, so that `state_dict` needs no argument.

        Args:
            loader: with this sampler as its ``batch_sampler``.

        Yields:
            what the loader delivers, with its `Part`. With ``micro_batch_size`` the mean loss of a
            micro-batch of ``m_j`` of m samples has the share ``m_j / m``; on R ranks whose
            gradients are averaged, ``R m_j / m``.

        Raises:
            ValueError: if the loader is of another sampler.

        Example:
            >>> class Advised:
            ...     def batch_advice(self, population, *, least, most):
            ...         return Recommendation(None, "no opinion")
            >>> data = torch.arange(6.0)
            >>> sampler = AdaptiveBatchSampler(
            ...     data, Advised(), batch_size=4, micro_batch_size=2, shuffle=False
            ... )
            >>> loader = DataLoader(data, batch_sampler=sampler)
            >>> for x, part in sampler.parts(loader):
            ...     print(x, part.share, part.last)
            tensor([0., 1.]) 0.5 False
            tensor([2., 3.]) 0.5 True
            tensor([4., 5.]) 1.0 True
        """
        if getattr(loader, "batch_sampler", None) is not self:
            raise ValueError(
                "AdaptiveBatchSampler.parts: the loader is not one of this sampler; make it with "
                "DataLoader(data_set, batch_sampler=sampler)"
            )
        for number, batch in enumerate(loader):
            this = self._pass
            assert this is not None
            this.delivered = number + 1
            yield batch, this.parts[number]

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """The state for a resume of which the batches to come are those of the unbroken run.

        Sizes that were decided for batches on their way in a loader's workers are part of it. Of a
        batch in several lists that is not complete all comes again, as its gradients are lost.

        Args:
            consumed: lists that the loader has delivered in this pass and the loop is done with;
                None for what `parts` has counted.

        Raises:
            ValueError: if that is not known, or more than were given.

        Example:
            >>> class Advised:
            ...     def batch_advice(self, population, *, least, most):
            ...         return Recommendation(None, "no opinion")
            >>> sampler = AdaptiveBatchSampler(range(100), Advised(), batch_size=10)
            >>> batches = list(sampler)
            >>> again = AdaptiveBatchSampler(range(100), Advised(), batch_size=10)
            >>> again.load_state_dict(sampler.state_dict(consumed=7))
            >>> list(again) == batches[7:]
            True
        """
        this = self._next if self._next is not None or self._chosen else self._pass
        if this is None:
            this = _Pass(self.epoch, [])
        if this is not self._pass:
            consumed = 0
        elif consumed is None:
            consumed = this.delivered
        if consumed is None:
            raise ValueError(
                "AdaptiveBatchSampler.state_dict: a loader with workers takes batches ahead, so "
                "how many lists of this pass were used is not known; go through the loader with "
                "`for batch, part in sampler.parts(loader)`, or give consumed="
            )
        if not 0 <= consumed <= len(this.parts):
            raise ValueError(
                f"AdaptiveBatchSampler.state_dict: consumed={consumed}, expected 0 to "
                f"{len(this.parts)}, the lists given in this pass"
            )
        used = sum(part.last for part in this.parts[:consumed])
        planned = [*this.sizes[used:], *this.planned]
        # Of batches that were begun, those not used are still to come.
        state = {
            "version": checks.VERSION,
            "total": self._total,
            "num_replicas": self._ranks,
            "seed": self._seed,
            "epoch": this.epoch,
            "position": this.position - sum(this.sizes[used:]),
            "number": this.number - len(this.sizes[used:]),
            "planned": planned,
            "done": this.done and not planned,
            "batch_size": self.batch_size,
            "wait": self._wait,
            "pending": list(self._pending),
            "history": [list(change) for change in self.history],
        }
        if self._sampler is not None:
            state["order"] = list(this.order)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up a state; the next pass gives what was left of its epoch.

        If nothing was, the next pass is the next epoch, unless `set_epoch` asks for that one.

        Args:
            state: from `state_dict` of a sampler of as many samples and ranks.

        Raises:
            ValueError: if it is of another kind; nothing is loaded then.

        Example:
            >>> class Advised:
            ...     def batch_advice(self, population, *, least, most):
            ...         return Recommendation(None, "no opinion")
            >>> sampler = AdaptiveBatchSampler(range(100), Advised(), batch_size=10)
            >>> sampler.load_state_dict(sampler.state_dict())
        """
        checks.state(state, total=self._total, num_replicas=self._ranks)
        self._seed, self.batch_size = state["seed"], state["batch_size"]
        self._wait, self._pending = state["wait"], list(state["pending"])
        self.history = [Change(*change) for change in state["history"]]
        self.epoch, self._pass, self._chosen = state["epoch"], None, False
        fresh = state["position"] == 0 and not state["planned"]
        order = state.get("order") if self._sampler is not None else None
        self._next = _Pass(
            state["epoch"],
            order if order and not fresh else self._order(state["epoch"]),
            position=state["position"],
            number=state["number"],
            planned=collections.deque(state["planned"]),
            done=state["done"],
        )

    def _begin_pass(self) -> _Pass:
        """The pass of the next epoch, or what a resume left of one."""
        this, self._next = self._next, None
        if this is not None and not self._chosen and (this.done or not self._left(this)):
            self.epoch, this = this.epoch + 1, None
        elif this is None and not self._chosen and self._pass is not None:
            self.epoch = self._pass.epoch + 1
        self._chosen = False
        this = _Pass(self.epoch, self._order(self.epoch)) if this is None else this
        self._pass = this
        return this

    def _order(self, epoch: int) -> Sequence[Any]:
        """The indices of an epoch, the same on all ranks."""
        if self._sampler is not None:
            if callable(choose := getattr(self._sampler, "set_epoch", None)):
                choose(epoch)
            return list(self._sampler)
        if not self._shuffle:
            return range(self._total)
        # Mixed, as torch's generator looks at 32 bits only and seed + epoch would repeat orders.
        mixed = int(np.random.SeedSequence([self._seed, epoch]).generate_state(1)[0])
        generator = torch.Generator().manual_seed(mixed)
        return torch.randperm(self._total, generator=generator).tolist()

    def _lists(self, this: _Pass) -> Iterator[list[Any]]:
        """The lists of a pass."""
        this.done = False
        while (size := self._begin(this)) > 0:
            start = this.position - size
            own = this.order[start : this.position][self._rank :: self._ranks]
            pieces = self._pieces(size)
            for j in range(pieces):
                piece = own[j * len(own) // pieces : (j + 1) * len(own) // pieces]
                share = self._ranks * len(piece) / size
                this.parts.append(Part(share, last=j == pieces - 1))
                yield list(piece)
        this.done = True

    def _begin(self, this: _Pass) -> int:
        """Take the samples of the next batch; 0 if there are none."""
        if this is not self._pass:
            raise RuntimeError(
                "AdaptiveBatchSampler: a newer pass has begun; go on with that one, or make a "
                "sampler for each of two loaders"
            )
        size = this.planned.popleft() if this.planned else self._size(this)
        this.position += size
        if size > 0:
            this.number += 1
            this.sizes.append(size)
        return size

    def _size(self, this: _Pass) -> int:
        """Of the next batch, after asking the optimizer if it is time to."""
        rest = self._left(this)
        if rest <= 0:
            return 0
        if self._wait == 0:
            self._ask(this)
        if rest < self.batch_size and self._drop_last:
            return 0
        self._wait -= 1
        after = rest - self.batch_size
        return rest if after < self._ranks and not self._drop_last else self.batch_size

    def _ask(self, this: _Pass) -> None:
        """Change the size if the optimizer's advice has called for it often enough."""
        advice = self._advice()
        self._wait = min(self._every, EXPLORING) if advice.urgent else self._every
        old = self.batch_size
        if advice.batch_size is None:
            self._pending.clear()
            return
        wanted = advice.batch_size // self._ranks * self._ranks
        wanted = min(max(wanted, self._least), self._most)
        near = max(wanted / old, old / wanted) < self._factor
        if wanted == old or (near and not advice.urgent):
            self._pending.clear()
            return
        if self._pending and (self._pending[0] > old) != (wanted > old):
            self._pending.clear()
        self._pending.append(wanted)
        if advice.urgent or len(self._pending) >= self._patience:
            # The nearest that all of them support, as estimates are noisy.
            nearest = min(self._pending) if wanted > old else max(self._pending)
            self.batch_size = wanted if advice.urgent else nearest
            self.history.append(
                Change(this.epoch, this.number, old, self.batch_size, advice.reason)
            )
            self._pending.clear()

    def _advice(self) -> Recommendation:
        """The optimizer's, on all ranks that of rank 0."""
        found: list[Any] = [None]
        if not self._together or self._rank == 0:
            advice = self._optimizer.batch_advice(self._total, least=self._least, most=self._most)
            found = [dataclasses.astuple(advice)]
        if self._together:
            distributed.broadcast_object_list(found, src=0)
        return Recommendation(*found[0])

    def _left(self, this: _Pass) -> int:
        return len(this.order) - this.position

    def _pieces(self, size: int) -> int:
        """Lists of a batch, as many on every rank."""
        if self._micro is None:
            return 1
        # No empty ones, so that all ranks have as many backward passes.
        return min(math.ceil(math.ceil(size / self._ranks) / self._micro), size // self._ranks)
