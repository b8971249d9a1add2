"""Batch rules: from the statistics of an optimizer and the times of its steps to a size."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import nnls
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conjopt import ConjSGD
from conjopt.optim import (
    BatchRule,
    Correlation,
    Fixed,
    NoiseReading,
    Recommendation,
    StepTimes,
    WorkOptimal,
    best_batch_size,
    gradient_correlation,
    least_batch_size,
)
from conjopt.optim.batch_rule import GROWTH, batch_rule
from conjopt.optim.step_times import ENOUGH, SIZES, WINDOW

LOUD = NoiseReading(mean_square=1.0, noise=1000.0)


def timed(seconds: dict[int, float], steps: int = ENOUGH) -> StepTimes:
    times = StepTimes()
    for m, t in seconds.items():
        for _ in range(steps):
            times.record(m, t)
    return times


# Step times.


@given(
    st.dictionaries(
        st.integers(1, 512), st.tuples(st.floats(1e-6, 10), st.integers(3, 20)), min_size=2
    )
)
def test_costs_are_the_non_negative_least_squares(steps):
    times = StepTimes()
    for m, (t, count) in steps.items():
        for _ in range(count):
            times.record(m, t)
    kept = dict(list(steps.items())[-SIZES:])
    sizes = np.array(list(kept), dtype=float)
    seconds, counts = (np.array(v, dtype=float) for v in zip(*kept.values()))
    root = np.sqrt(counts)
    matrix = np.stack([root, root * sizes], 1)
    expected, misfit = nnls(matrix, root * seconds)
    cost = times.fit()
    assert cost.fixed >= 0
    assert cost.per_sample >= 0
    found = np.linalg.norm(matrix @ np.array(cost) - root * seconds)
    assert found <= misfit + 1e-12 * np.linalg.norm(root * seconds)
    # The minimizer is unique; its digits are those that the spread of the sizes leaves.
    condition = np.linalg.cond(matrix) ** 2
    scale = np.abs(expected) + np.array([seconds.max(), seconds.max() / sizes.max()])
    assert (np.abs(np.array(cost) - expected) <= 1e-14 * condition * scale).all()


def test_an_outlier_does_not_matter():
    times = timed({10: 2.0, 20: 3.0}, steps=5)
    times.record(10, 500.0)  # an evaluation, or the validation after an epoch
    times.record(20, 900.0)
    assert times.fit() == pytest.approx((1.0, 0.1))


def test_one_size_does_not_tell_costs_apart():
    assert timed({10: 2.0}).fit() is None
    assert StepTimes().fit() is None
    few = timed({10: 2.0})
    for _ in range(ENOUGH - 1):
        few.record(20, 3.0)
    assert few.fit() is None
    few.record(20, 3.0)
    assert few.fit() == pytest.approx((1.0, 0.1))


def test_only_the_last_steps_and_sizes_are_remembered():
    times = timed({10: 7.0}, steps=WINDOW)
    for _ in range(WINDOW):
        times.record(10, 2.0)
    for _ in range(ENOUGH):
        times.record(20, 3.0)
    assert times.fit() == pytest.approx((1.0, 0.1))
    assert max(len(seconds) for seconds in times.state_dict().values()) == WINDOW
    for m in range(100, 100 + SIZES):
        times.record(m, 1.0)
    assert sorted(times.state_dict()) == list(range(100, 100 + SIZES))


def test_a_state_of_times_survives_a_file():
    times = timed({10: 2.0, 20: 3.0})
    file = io.BytesIO()
    torch.save(times.state_dict(), file)
    again = StepTimes()
    again.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert again.fit() == times.fit()
    assert list(again.state_dict()) == list(times.state_dict())  # the oldest is forgotten first


# Readings.


@given(st.integers(0, 2**32), st.integers(2, 9))
def test_the_noise_scale_is_that_of_the_sample(seed: int, n: int):
    """Halves estimate with the bias of draws without replacement, which the reading takes off."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(n, 3, generator=generator, dtype=torch.float64) + 1
    pairs = list(itertools.permutations(range(n), 2))
    mean_square = sum(float(g[i] @ g[j]) for i, j in pairs) / len(pairs)
    noise = sum(float((g[i] - g[j]).square().sum()) / 2 for i, j in pairs) / len(pairs)
    G2 = float(g.mean(0).square().sum())
    S2 = float(g.square().sum(1).mean()) - G2
    scale = NoiseReading(mean_square, noise).noise_scale(n)
    assert scale == pytest.approx(S2 / G2, rel=1e-9 * max(1, S2 / G2))


def test_a_reading_without_signal_is_infinite_noise():
    assert NoiseReading(-1.0, 5.0).noise_scale() == math.inf
    assert NoiseReading(0.0, 5.0).noise_scale() == math.inf
    assert NoiseReading(2.0, 0.0).noise_scale() == 0
    assert NoiseReading(-1.0, 5.0).noise_scale(4) == 15.0  # the sum of both is positive


# Rules.


@pytest.mark.parametrize("population", [None, 500])
@pytest.mark.parametrize("target", [0.2, 0.5, 0.9])
def test_correlation_takes_the_least_size(target, population):
    reading = NoiseReading(1.0, 100.0)
    found = Correlation(target).recommend(reading, None, population)
    scale = reading.noise_scale(population)
    assert found.batch_size == least_batch_size(scale, target, population)
    assert gradient_correlation(scale, found.batch_size, population) >= target
    assert f"correlation {target:g} at noise scale" in found.reason
    assert not found.urgent


def test_work_takes_the_best_size():
    times = timed({m: 0.02 + 0.001 * m for m in (32, 64, 128)})
    found = WorkOptimal().recommend(NoiseReading(1.0, 300.0), times, 5000)
    scale = NoiseReading(1.0, 300.0).noise_scale(5000)
    cost = times.fit()
    assert found.batch_size == best_batch_size(scale, cost.fixed, cost.per_sample, 5000)
    assert cost == pytest.approx((0.02, 0.001))
    assert found.batch_size == 77  # sqrt(6000)
    assert "a step takes 0.02 + 0.001 m seconds" in found.reason


@pytest.mark.parametrize(
    ("rule", "times"),
    [(Correlation(0.5), None), (WorkOptimal(), timed({8: 2.0, 16: 2.0, 32: 2.01}))],
    ids=["correlation", "work"],
)
def test_a_recommendation_keeps_to_its_range(rule, times):
    def size(reading, **options):
        return rule.recommend(reading, times, **options).batch_size

    nothing = NoiseReading(-5.0, 50.0, batch_size=16)
    assert size(nothing) == 64  # no signal: up, but not to all at once
    assert size(nothing, population=40) == 40
    assert size(nothing, most=20) == 20
    assert size(NoiseReading(-5.0, 50.0)) is None
    assert size(NoiseReading(-5.0, 50.0), population=20) == 20
    assert size(NoiseReading(1.0, 0.0)) == 1
    assert size(NoiseReading(1.0, 0.0), least=4) == 4


def test_fixed_keeps_a_size():
    assert Fixed(48).recommend(LOUD, None) == Recommendation(48, "fixed", urgent=True)
    assert Fixed().recommend(LOUD, None).batch_size is None


def explore(start: int, c0: float, c1: float, *, least: int = 1, most: int | None = None):
    """What a loop sees that follows every recommendation: the sizes, and the last reason."""
    times, size, sizes = StepTimes(), start, [start]
    for _ in range(60):
        times.record(size, c0 + c1 * size)
        found = WorkOptimal().recommend(
            NoiseReading(1.0, 100.0, size), times, least=least, most=most
        )
        size = found.batch_size or size
        if size != sizes[-1]:
            sizes.append(size)
    return sizes, found


def test_exploration_tries_double_and_half_and_ends():
    sizes, found = explore(64, 4.0, 1.0)
    assert sizes == [64, 128, 32, 20]
    assert not found.urgent


@pytest.mark.parametrize(
    ("limits", "tried"),
    [
        ({"most": 64}, [64, 32, 16, 20]),
        ({"least": 64}, [64, 128, 64]),
        ({"least": 40, "most": 100}, [64]),
        ({"most": 120, "least": 32}, [64, 32]),
    ],
)
def test_exploration_keeps_to_the_range(limits, tried):
    sizes, found = explore(64, 4.0, 1.0, **limits)
    assert sizes == tried
    assert not found.urgent
    if len(tried) == 1:
        assert found == Recommendation(None, "no other size than 64 could be timed")


def test_work_waits_for_times():
    assert WorkOptimal().recommend(LOUD, None).batch_size is None
    assert WorkOptimal().recommend(LOUD, StepTimes()).reason == "no step was timed yet"


def test_names_of_rules():
    assert isinstance(batch_rule("fixed"), Fixed)
    assert isinstance(batch_rule("work"), WorkOptimal)
    assert batch_rule("correlation").target == 0.5
    assert batch_rule(None) is None
    own = Correlation(0.7)
    assert batch_rule(own) is own


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: batch_rule("big"), r"batch_rule='big', expected one of \['correlation', 'fixed'"),
        (lambda: batch_rule(64), "batch_rule=64, expected one of"),
        (lambda: batch_rule(Correlation), "a BatchRule such as Correlation"),
        (lambda: Correlation(1), "target=1, expected a number between 0 and 1"),
        (lambda: Correlation(0.0), "target=0.0, expected a number between 0 and 1"),
        (lambda: Correlation(math.nan), "target=nan, expected a number between 0 and 1"),
        (lambda: Fixed(0), "batch_size=0, expected a whole number >= 1"),
        (lambda: Fixed(2.5), "batch_size=2.5, expected a whole number >= 1"),
    ],
)
def test_bad_rules_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


# In the optimizer.


class Network:
    """A small problem, and an optimizer with a rule."""

    def __init__(self, batch_rule, **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = ConjSGD(
            self.model.parameters(),
            model=self.model,
            loss=self.criterion,
            batch_rule=batch_rule,
            **{"warmup": 2, "measure_every": 3, **options},
        )
        self.x = torch.randn(300, 4)
        self.y = (self.x[:, :3] + torch.randn(300, 3)).argmax(1)

    def train(self, *sizes):
        for m in sizes:
            self.optimizer.zero_grad()
            self.criterion(self.model(self.x[:m]), self.y[:m]).backward()
            self.optimizer.step()


def test_an_optimizer_recommends_from_its_statistics():
    run = Network(Correlation(0.4))
    assert run.optimizer.recommended_batch_size() is None
    assert run.optimizer.batch_advice().reason == "no gradient noise was measured yet"
    run.train(*[60] * 7)
    statistics = run.optimizer._statistics
    reading = NoiseReading(float(statistics.mean("mean_square")), float(statistics.mean("noise")))
    for n in (None, 300):
        expected = least_batch_size(reading.noise_scale(n), 0.4, n)
        assert expected < 60 * GROWTH
        assert run.optimizer.recommended_batch_size(n) == expected
    assert run.optimizer.batch_advice(most=7).batch_size == 7
    assert run.optimizer.recommended_batch_size() < least_batch_size(reading.noise_scale(), 0.8)


@pytest.mark.parametrize(
    "options",
    [{"step_rule": "constant", "lr": 0.1}, {"step_rule": "constant", "direction": "sgd"}],
    ids=str,
)
@pytest.mark.parametrize("rule", ["correlation", "work"])
def test_without_measurements_there_is_no_recommendation(options, rule):
    run = Network(rule, **options)
    run.train(*[20] * 5)
    assert run.optimizer.recommended_batch_size() is None
    assert Network(Fixed(9), **options).optimizer.recommended_batch_size() == 9


def test_coupled_samples_tell_no_noise():
    run = Network("correlation")
    run.model[1] = nn.BatchNorm1d(8)
    run.train(*[20] * 5)
    assert run.optimizer.status().output_change > 0  # it did measure
    assert run.optimizer.recommended_batch_size() is None


def test_without_a_rule_nothing_is_said_or_saved():
    run = Network(None)
    run.train(*[20] * 5)
    assert run.optimizer.recommended_batch_size() is None
    assert "no batch rule" in run.optimizer.batch_advice().reason
    assert set(run.optimizer.state_dict()["param_groups"][0]["controller"]) == {
        "version",
        "calls",
        "trust_only",
        "statistics",
    }


def test_a_rule_changes_no_step():
    plain, ruled = Network(None), Network("work")
    for run in plain, ruled:
        run.train(*[20] * 8)
    for p, q in zip(plain.model.parameters(), ruled.model.parameters()):
        assert torch.equal(p, q)


def test_steps_are_timed_from_one_to_the_next(monkeypatch):
    seconds = {20: 0.5, 40: 0.75}
    now = [0.0]
    monkeypatch.setattr("conjopt.optim.batch_rule.time.perf_counter", lambda: now[0])
    run = Network("work")
    sizes = [20] * 9 + [40] * 9
    for number, m in enumerate(sizes, 1):
        measures = number <= 2 or number % 3 == 0
        now[0] += 100.0 if measures else seconds[m]
        run.train(m)
    # Measuring steps are left out; so nothing of the 100 s is seen.
    assert run.optimizer._batches.times.state_dict() == {20: [0.5] * 4, 40: [0.75] * 6}
    assert run.optimizer._batches.times.fit() == pytest.approx((0.25, 0.0125))


def test_micro_batches_are_one_step(monkeypatch):
    run = Network("work")
    for _ in range(8):
        run.optimizer.zero_grad()
        for rows in torch.arange(30).split([10, 20]):
            loss = run.criterion(run.model(run.x[rows]), run.y[rows])
            (loss * len(rows) / 30).backward()
        run.optimizer.step()
    assert list(run.optimizer._batches.times.state_dict()) == [30]
    assert run.optimizer._batches.batch_size == 30


class Reads(TorchDispatchMode):
    """Counts what would make a device wait."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket.__name__ in {"_local_scalar_dense", "_to_copy"}
        return function(*args, **(kwargs or {}))


def test_a_rule_reads_nothing_in_a_step(monkeypatch):
    monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
    monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)
    monkeypatch.setattr("conjopt.optim.checks.positive", lambda weight: None)
    counts = []
    for rule in (None, "work"):
        run = Network(rule)
        run.train(*[20] * 6)
        with Reads() as reads:
            run.train(20, 20)
        counts.append(reads.count)
    assert counts[0] == counts[1]


def test_advice_is_one_transfer(monkeypatch):
    class Read(BatchRule):
        name = "read"

        def recommend(self, noise, times, population=None, *, least=1, most=None):
            return Recommendation(None, f"{noise.noise / noise.mean_square}")

    run = Network(Read())
    run.train(*[20] * 5)
    transfers = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: transfers.append(t) or original(t))
    with Reads() as reads:
        run.optimizer.batch_advice(300)
    assert [t.shape for t in transfers] == [(2,)]  # one tensor, whatever it holds
    assert reads.count == 0  # and no number besides


@pytest.mark.parametrize("rule", ["correlation", "work"])
def test_a_resumed_optimizer_recommends_the_same(rule):
    run = Network(rule)
    run.train(*[20] * 6, *[45] * 6, *[90] * 6)
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    again = Network(rule)
    again.train(*[10] * 6)  # what is there before is forgotten
    again.optimizer.load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    assert again.optimizer.batch_advice(300) == run.optimizer.batch_advice(300)
    assert (
        again.optimizer.state_dict()["param_groups"][0]["controller"]["batches"]
        == (run.optimizer.state_dict()["param_groups"][0]["controller"]["batches"])
    )
    assert list(again.optimizer._batches.times.state_dict()) == [20, 45, 90]


def test_the_pause_before_a_resume_is_no_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("conjopt.optim.batch_rule.time.perf_counter", lambda: now[0])
    run = Network("work")
    for _ in range(4):
        now[0] += 1
        run.train(20)
    state = copy.deepcopy(run.optimizer.state_dict())
    now[0] += 1000
    run.optimizer.load_state_dict(state)
    run.train(20)
    assert set(run.optimizer._batches.times.state_dict()[20]) == {1.0}


def test_a_state_from_before_there_were_rules_is_taken_up():
    run, old = Network("correlation"), Network(None)
    old.train(*[20] * 5)
    run.optimizer.load_state_dict(old.optimizer.state_dict())
    assert run.optimizer.status().step == 5
    assert run.optimizer.recommended_batch_size() > 0
    assert run.optimizer._batches.times.state_dict() == {}
    old.optimizer.load_state_dict(run.optimizer.state_dict())  # and the other way round


def test_a_rule_of_ones_own():
    class Half(BatchRule):
        name = "half"

        def recommend(self, noise, times, population=None, *, least=1, most=None):
            return Recommendation(max(least, noise.batch_size // 2), "half of the last")

    run = Network(Half())
    run.train(20, 40)
    assert run.optimizer.recommended_batch_size() == 20


def test_a_bad_rule_is_refused():
    with pytest.raises(ValueError, match="batch_rule='largest', expected one of"):
        Network("largest")
