"""What ranks say together, with two ranks played in one process: their sum is worked out before."""

from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from conjopt.measure import process_group
from conjopt.measure.process_group import Ranks


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def batch(weight: float, samples: int, forwards=()) -> SimpleNamespace:
    return SimpleNamespace(weight=number(weight), samples=samples, forwards=list(forwards))


class Sent(Exception):
    """What a rank sends, in place of waiting for the others."""


def send(flat, group):
    raise Sent(flat.clone())


def played(monkeypatch, calls) -> list:
    """What `calls`, of a `Ranks` each, give on two ranks that take one sum."""
    monkeypatch.setattr(process_group.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(process_group.dist, "all_reduce", send)
    sent, found = [], []
    for rank, call in enumerate(calls):
        monkeypatch.setattr(process_group.dist, "get_rank", lambda group, rank=rank: rank)
        with pytest.raises(Sent) as caught:
            call(Ranks(object()))
        sent.append(caught.value.args[0])
    monkeypatch.setattr(
        process_group.dist, "all_reduce", lambda flat, group: flat.copy_(sent[0] + sent[1])
    )
    for rank, call in enumerate(calls):
        monkeypatch.setattr(process_group.dist, "get_rank", lambda group, rank=rank: rank)
        found.append(call(Ranks(object())))
    return found


def test_two_batches_are_one(monkeypatch):
    weights, samples, losses = (6.0, 2.0), (3, 4), (0.5, 1.5)

    def call(rank):
        return lambda ranks: ranks.join(
            batch(weights[rank], samples[rank]), number(losses[rank]), number(1.0)
        )

    first, second = played(monkeypatch, [call(0), call(1)])
    for joined in (first, second):
        assert joined.weight == 4
        assert joined.loss == (6 * 0.5 + 2 * 1.5) / 8
        assert joined.samples == 7
        assert_close(torch.stack(joined.shares), torch.tensor([0.75, 0.25]).double())
        # Effective samples: all of a rank's, where they weigh the same.
        assert_close(torch.stack(joined.sizes), torch.tensor([3.0, 4.0]).double())


def test_gradients_that_differ_are_refused(monkeypatch):
    def call(size):
        return lambda ranks: ranks.join(batch(1.0, 2), number(1.0), number(size))

    played(monkeypatch, [call(1.0), call(1.0005)])
    with pytest.raises(RuntimeError, match="gradients of the 2 ranks differ"):
        played(monkeypatch, [call(1.0), call(1.1)])


@pytest.mark.parametrize("changed", [False, True])
def test_the_parts_are_the_ranks(monkeypatch, changed):
    """Of the last forward; `g1` and `g2` are the means over the even and over the odd ranks."""
    own = [torch.tensor([1.0, 3.0]).double(), torch.tensor([5.0, -1.0]).double()]
    parameters = {"w": torch.zeros(2).double()}
    gradient = (own[0] + own[1]) / 2
    forwards = [SimpleNamespace(replay="first"), SimpleNamespace(replay="last")]

    def call(rank):
        def parts(ranks):
            joined = process_group.Joined(
                number(1.0), number(0.0), 4, (number(0.5), number(0.5)), (number(2.0), number(2.0))
            )
            return ranks.parts(
                batch(1.0, 2, forwards),
                joined,
                parameters,
                [gradient],
                {"w": own[rank]},
                changed=changed,
            )

        return parts

    for rank, parts in enumerate(played(monkeypatch, [call(0), call(1)])):
        assert_close(parts.first[0], own[0])
        assert_close(parts.second[0], own[1])
        assert parts.replay == "last"
        assert parts.here == (rank == 1)
