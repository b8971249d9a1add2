"""Rows of several ranks as one batch, with the ranks played in one process."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from conjopt.regularizers import ranks
from conjopt.regularizers.ranks import gathered
from conjopt.regularizers.rows import Rows


def rows_of(seed: int, count: int, soft: bool) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    targets = torch.randint(4, (count,), generator=generator)
    if soft:
        targets = torch.eye(4, dtype=torch.float64)[targets]
    return Rows(None, rows, rows[:, 0].abs(), targets, 4, count)


@pytest.mark.parametrize("soft", [False, True], ids=["classes", "points"])
def test_rows_of_two_ranks(monkeypatch, soft):
    """The other rank has the same number of rows; its message is this rank's own, and twice it."""
    own = rows_of(0, 5, soft)

    def all_gather(received, sent, group):
        received[0].copy_(sent)
        received[1].copy_(sent if sent.ndim == 0 else 2 * sent)

    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda group: 0)
    monkeypatch.setattr(ranks.dist, "all_gather", all_gather)
    leaf = own.rows.clone().requires_grad_()
    found = gathered(dataclasses.replace(own, rows=leaf), None)
    for name in ("rows", "mass", "targets"):
        one, both = getattr(own, name), getattr(found, name)
        assert_close(both.detach(), torch.cat([one, 2 * one]))
        assert both.dtype == one.dtype
    assert found.fresh == 10
    (gradient,) = torch.autograd.grad(found.rows.sum(), leaf)
    assert_close(gradient, torch.full_like(leaf, 2.0))


def test_a_rank_by_itself_sends_nothing(monkeypatch):
    own = rows_of(0, 5, False)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda group: 1)
    monkeypatch.setattr(ranks.dist, "get_rank", lambda group: 0)
    assert gathered(own, None) is own
