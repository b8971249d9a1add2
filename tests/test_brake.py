"""The brake, against its definition in plain numbers over any losses."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_bad_input import same
from test_gradient_rules import Mean, number

from conjopt.optim import brake
from conjopt.optim.statistics import Statistics


class Brake:
    """The brake in plain numbers: what it has seen, and the factor that follows."""

    def __init__(self):
        self.mean = Mean(brake.DECAY)
        self.spread, self.factor, self.start, self.lowest = 0.0, 1.0, None, None
        self.lowest_at = self.braked_at = 0.0

    def watch(self, loss):
        self.mean.see(loss)
        off = loss - self.mean()
        self.spread = brake.DECAY * self.spread + (1 - brake.DECAY) * off * off

    def judge(self, now, settled):
        mean = self.mean()
        if self.lowest is None or mean < self.lowest:
            self.start = mean if self.lowest is None else self.start
            self.lowest, self.lowest_at = mean, now
            self.factor = min(self.factor * brake.UP, 1)
            return
        error = brake.ERRORS * math.sqrt(self.spread * (1 - brake.DECAY) / (1 + brake.DECAY))
        high = mean > min(brake.RISE * self.lowest, self.start) + error
        rises = high and now - self.braked_at >= brake.LATENCY and now >= settled
        if rises:
            self.braked_at = now
        if rises or now - self.lowest_at > max(brake.HORIZON * now, brake.PATIENCE):
            self.lowest_at = now
            self.factor = max(self.factor * brake.DOWN, brake.LEAST)


PIECES = st.lists(
    st.tuples(st.sampled_from(["falls", "rises", "rests", "noise", "jumps"]), st.integers(1, 120)),
    min_size=1,
    max_size=8,
)


def losses_of(pieces, seed):
    generator = torch.Generator().manual_seed(seed)
    loss, losses = 1.0, []
    for kind, length in pieces:
        for noise in torch.rand(length, generator=generator, dtype=torch.float64).tolist():
            if kind == "falls":
                loss *= 0.97
            elif kind == "rises":
                loss *= 1.04
            elif kind == "jumps":
                loss *= math.exp(6 * (noise - 0.5))
            loss = min(max(loss, 1e-6), 1e6)
            losses.append(loss * (0.2 + noise) if kind == "noise" else loss * (1 + 0.01 * noise))
    return losses


@settings(max_examples=60)
@given(PIECES, st.integers(0, 2**32), st.sampled_from([1, 7, 25]))
@example([("falls", 100), ("rises", 120), ("rises", 120), ("falls", 120)], 0, 7)
@example([("rests", 120)] * 8, 0, 25)
def test_the_brake_over_any_losses(pieces, seed, every):
    statistics, plain = Statistics(0.9, dtype=torch.float64), Brake()
    for step, loss in enumerate(losses_of(pieces, seed)):
        statistics.steps = number(float(step))
        brake.watch_loss(statistics, number(loss), None)
        plain.watch(loss)
        if step < 20 or (step + 1) % every == 0:
            brake.judge(statistics, None, 20)
            plain.judge(step, 20)
            assert statistics.brake == pytest.approx(plain.factor, rel=1e-12)
            assert brake.LEAST <= statistics.brake <= 1
            assert statistics.lowest == pytest.approx(plain.lowest, rel=1e-9)


def braked(losses, statistics, start=0):
    for step, loss in enumerate(losses, start):
        statistics.steps = number(float(step))
        brake.watch_loss(statistics, number(loss), None)
        if step % 10 == 0:
            brake.judge(statistics, None, 20)
    return float(statistics.brake)


def test_the_brake_tightens_to_its_least_and_recovers():
    statistics = Statistics(0.9, dtype=torch.float64)
    assert braked([1.0 * 0.99**i for i in range(200)], statistics) == 1  # falls: none
    losses = [0.14 * 1.01**i for i in range(2000)]
    assert braked(losses, statistics, 200) == pytest.approx(brake.LEAST)
    ups = math.ceil(math.log(1 / brake.LEAST) / math.log(brake.UP))
    # Each new least value lets it out a little, so it is out after as many, and some to get there.
    assert braked([1e-3 * 0.99**i for i in range(10 * ups + 800)], statistics, 2200) == 1


def test_a_loss_that_rests_is_braked_after_a_while():
    statistics = Statistics(0.9, dtype=torch.float64)
    assert braked([1.0] * int(brake.PATIENCE), statistics) == 1
    assert braked([1.0] * 40, statistics, int(brake.PATIENCE)) == brake.DOWN


def test_a_given_up_step_leaves_the_brake():
    statistics = Statistics(0.9, dtype=torch.float64)
    braked([1.0 + 0.01 * i for i in range(100)], statistics)
    before = copy.deepcopy(statistics.state_dict())
    gate = torch.tensor(False)
    for loss in (math.nan, math.inf, 1e9, 1e-9):
        brake.watch_loss(statistics, number(loss), gate)
        brake.judge(statistics, gate, 20)
        assert same(before, statistics.state_dict())
