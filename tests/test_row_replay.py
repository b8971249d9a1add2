"""Measuring halves by their own rows: where samples are coupled, the whole batch runs instead."""

import pytest
import torch
from loop import backward, make, network, parameters, train
from torch import nn
from torch.testing import assert_close

from conjopt.measure.replay import Replay
from conjopt.measure.row_replay import Coupled, RowReplay, of_rows
from conjopt.optim import measuring

SOME = torch.tensor([1, 3, 4])


def replay_of(model, *args, **kwargs):
    return Replay(model, args, kwargs, Replay.random_state(model))


class Conditioned(nn.Module):
    """Inputs by position and keyword, one of them for all samples, several outputs."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, *, shift, table):
        return {"first": self.layer(x) + shift, "second": (x @ table, 7)}


def test_rows_are_those_of_the_batch():
    torch.manual_seed(0)
    model = Conditioned().double()
    x, shift, table = (torch.randn(*s, dtype=torch.float64) for s in ((6, 4), (6, 3), (4, 2)))
    replay = replay_of(model, x, shift=shift, table=table)
    whole = replay.run({})
    some = of_rows(replay, SOME, 6, {0: whole[0].detach(), 1: whole[1].detach()}).run({})
    assert [leaf is None for leaf in some] == [False, False, True]
    rest = torch.tensor([0, 2, 5])
    for found, expected in zip(some[:2], whole[:2]):
        assert_close(found[SOME], expected[SOME], rtol=1e-14, atol=1e-15)
        assert not found[rest].any()


def test_pulls_and_products_are_those_of_the_masked_batch():
    torch.manual_seed(0)
    model = network(torch.float64)
    x = torch.randn(6, 4, dtype=torch.float64)
    replay, named = replay_of(model, x), dict(model.named_parameters())
    mask = torch.zeros(6, 1, dtype=torch.float64).index_fill(0, SOME, 1.0)
    cotangents = {0: torch.randn(6, 3, dtype=torch.float64) * mask}
    rows = of_rows(replay, SOME, 6)
    for found, expected in zip(rows.pull(cotangents, named), replay.pull(cotangents, named)):
        assert_close(found, expected, rtol=1e-13, atol=1e-15)
    from conjopt.measure.curvature import JacobianProduct

    along = {name: torch.randn_like(p) for name, p in named.items()}
    (_, (found,)), (_, (expected,)) = (
        JacobianProduct(model)(r.run, named, along) for r in (rows, replay)
    )
    assert_close(found, expected * mask, rtol=1e-12, atol=1e-14)


class Centred(nn.Module):
    def forward(self, x):
        return x - 1e-3 * x.mean(0)


class Shuffled(nn.Module):
    def forward(self, x):
        return nn.functional.dropout(x, 0.3)


class Flipped(nn.Module):
    """Of the right shape, but of other samples."""

    def forward(self, x):
        return x.flip(0)


class Reshaped(nn.Module):
    def forward(self, x):
        return x.reshape(6, -1)


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(0)


@pytest.mark.parametrize("kind", [Centred, Shuffled, Flipped, Reshaped, Pooled])
def test_coupled_samples_are_noticed(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), kind())
    x = torch.randn(6, 4)
    replay = replay_of(model, x)
    (whole,) = replay.run({})
    with pytest.raises(Coupled):
        of_rows(replay, SOME, 6, {0: whole.detach()}).run({})


def test_refused_before_running():
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))
    replay = replay_of(model, torch.ones(6, 4))
    with pytest.raises(Coupled, match="dropout"):
        of_rows(replay, SOME, 6)
    model.eval()
    assert isinstance(of_rows(replay, SOME, 6), RowReplay)
    with pytest.raises(Coupled, match="no input has 7 rows"):
        of_rows(replay, SOME, 7)


def test_out_of_memory_is_no_coupling():
    class Full(nn.Module):
        def forward(self, x):
            raise torch.OutOfMemoryError("full")

    with pytest.raises(torch.OutOfMemoryError):
        of_rows(replay_of(Full(), torch.ones(6, 4)), SOME, 6).run({})


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_a_run_by_rows_is_a_run_by_masks(clip, monkeypatch):
    """To rounding in float64, over measuring and ordinary steps, clipped gradients or not."""
    ran = []

    def of_rows_counted(*args, **kwargs):
        ran.append(args)
        return of_rows(*args, **kwargs)

    def run():
        model = network(torch.float64)
        optimizer = make(model, warmup=3, measure_every=3)
        for step in range(12):
            backward(model, optimizer, step, size=9)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return parameters(model), optimizer.status()

    monkeypatch.setattr("conjopt.measure.parts.of_rows", of_rows_counted)
    by_rows, status = run()
    assert len(ran) == 2 * 6
    monkeypatch.setattr(measuring, "BY_ROWS", (False,))
    by_masks, other = run()
    assert len(ran) == 2 * 6
    for found, expected in zip(by_rows, by_masks):
        assert_close(found, expected, rtol=1e-8, atol=1e-11)
    assert status.curvature == pytest.approx(other.curvature, rel=1e-8)
    assert status.slope == pytest.approx(other.slope, rel=1e-8)


@pytest.mark.parametrize("kind", [Centred, Shuffled])
def test_a_coupled_model_trains_as_with_masks(kind, monkeypatch):
    def run():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), kind(), nn.Linear(6, 3))
        optimizer = make(model, warmup=3, measure_every=3)
        train(model, optimizer, 8)
        return parameters(model)

    found = run()
    monkeypatch.setattr(measuring, "BY_ROWS", (False,))
    assert all(torch.equal(p, q) for p, q in zip(found, run()))
