"""Step rules along the gradient: their formulas, resume, and steps that are given up."""

import copy
import io
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_bad_input import CRITERION, NOT_FINITE, data, loss_of, network, same, untouched
from torch import nn
from torch.nn import functional as F

from conjopt import ConjSGD
from conjopt.optim import (
    GradientEdge,
    PolyakStep,
    Smoothness,
    gradient_rules,
    measuring,
    other_terms,
)
from conjopt.optim.statistics import SLOW, Measurement, Statistics

RULES = ["edge", "smoothness", "polyak"]
any_rule = pytest.mark.parametrize("rule", RULES)


def number(value):
    return torch.tensor(value, dtype=torch.float64)


def make(model, rule="edge", criterion=CRITERION, params=None, **options):
    params = model.parameters() if params is None else params
    options = {"model": model, "loss": criterion, "direction": "sgd", "step_rule": rule} | options
    return ConjSGD(params, **options)


def train(model, optimizer, steps, start=0, size=8):
    """Steps on batches that follow from their numbers; the losses."""
    x, y = data(24)
    losses = []
    for step in range(start, start + steps):
        rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:size]
        optimizer.zero_grad()
        loss = optimizer._watch.criterion(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


# The formulas.


class Mean:
    """A running mean, corrected for its start at zero."""

    def __init__(self, decay):
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    def see(self, value):
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + 1 - self.decay

    def __call__(self):
        return self.total / self.weight


MEASURED = st.lists(
    st.tuples(
        st.floats(1e-4, 1e4),  # hi(GGN_B)
        st.one_of(st.none(), st.floats(-1, 1)),  # correlation, if there were two halves
        st.floats(1e-3, 1e3),  # V
        st.floats(0, 1e3),  # the loss
        st.floats(1e-3, 1e3),  # ||u||
    ),
    min_size=1,
    max_size=30,
)
CONSTANTS = st.fixed_dictionaries(
    {},
    optional={
        "s": st.floats(0.01, 2),
        "damping": st.floats(0, 3),
        "rho_min": st.floats(0.01, 1),
        "stable": st.floats(0.1, 4),
        "tau": st.floats(0.1, 10),
    },
)


@settings(max_examples=60)
@given(MEASURED, CONSTANTS, st.floats(0, 40), st.floats(0.1, 1), st.sampled_from([0.5, None]))
def test_the_limits_of_the_edge(measured, constants, steps, braked, smoothness):
    rule = GradientEdge(**constants)
    statistics = Statistics(0.9, dtype=torch.float64)
    statistics.brake, statistics.steps = number(braked), number(steps)
    log_top, correlation, top, gain = Mean(SLOW["log_top"]), Mean(0.9), 0.0, 0.0
    for i, (hi, rho, v, _, length) in enumerate(measured):
        found = Measurement(change=number(v), top=number(hi), length=number(length))
        found.correlation = None if rho is None else number(rho)
        statistics.see(found, None)
        log_top.see(math.log(hi))
        top = hi if i == 0 else max(hi, 0.9 * top + 0.1 * hi)
        gain = v / length if i == 0 else max(v / length, 0.9 * gain + 0.1 * v / length)
        if rho is not None:
            correlation.see(rho)
    loss, length = measured[-1][3], 2.0
    statistics.loss, statistics.lowest = number(loss), number(1.0)
    statistics.length = number(length)
    statistics.slow, statistics.slow_weight = number(1.0), number(1.0)  # the brake rests here
    statistics.start, statistics.lowest_at = number(1.0), number(steps)
    rule.after_measuring(statistics, False, None)
    assert statistics.brake == braked
    rho = correlation() if correlation.weight else gradient_rules.UNKNOWN
    rho = min(max(rho, rule.rho_min), 1)
    share = braked * min((steps + 1) / gradient_rules.RAMP, 1)
    share /= 1 + rule.damping * (1 / rho - 1)
    risk = min(loss, gradient_rules.RISEN)  # times the least so far
    reach = gradient_rules.REACH
    radius = rule.tau * math.sqrt(2 * risk / 0.5) if smoothness else min(math.sqrt(2 * risk), reach)
    limits = rule.limits(statistics, smoothness, False)
    expected = {
        "edge": share * rule.s / math.exp(log_top()),
        "stability": share * rule.stable / top,
        "trust region": radius / (gain * length),
    }
    assert list(limits) == list(expected)
    assert {n: float(v) for n, v in limits.items()} == pytest.approx(expected, rel=1e-9)
    a = rule.step_size(statistics, smoothness, False)
    assert a == pytest.approx(min(expected.values()), rel=1e-9)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), st.floats(0.1, 4))
def test_the_step_of_the_theorem(tops, safety):
    rule, statistics, envelope = Smoothness(safety), Statistics(0.9, dtype=torch.float64), 0.0
    for i, hi in enumerate(tops):
        statistics.see(Measurement(change=number(1.0), top=number(hi)), None)
        envelope = hi if i == 0 else max(hi, 0.9 * envelope + 0.1 * hi)
    rule.after_measuring(statistics, False, None)
    a = float(rule.step_size(statistics, 0.5, False))
    assert a == pytest.approx(1 / (2 * safety * envelope), rel=1e-12)
    assert a <= 1 / (2 * safety * tops[-1]) * (1 + 1e-12)  # no longer than by the last


def some(least, most):
    """Normal numbers, whose quotients have all their digits."""
    return st.floats(least, most, allow_subnormal=False)


@given(some(-1, 1e3), some(-1, 1e3), some(1e-3, 1e3), some(0, 1e3))
def test_the_step_of_polyak(loss, slope, change, running):
    rule, statistics = PolyakStep(s=0.8, tau=2.0), Statistics(0.9, dtype=torch.float64)
    statistics.loss = number(running)
    statistics.see(Measurement(change=number(change)), None)
    rule.before_step(statistics, number(loss), number(slope), None)
    limits = rule.limits(statistics, 0.5, False)
    expected = 0.8 * max(loss, 0) / slope if slope > 0 else math.inf
    assert limits["Polyak step"] == pytest.approx(expected, rel=1e-12)
    assert limits["trust region"] == pytest.approx(2 * math.sqrt(2 * running / 0.5) / change)
    least = min(float(v) for v in limits.values())
    assert rule.step_size(statistics, 0.5, False) == pytest.approx(least)


def test_a_flat_loss_has_no_step_beyond_the_trust_region():
    statistics = Statistics(0.9, dtype=torch.float64)
    statistics.loss = number(0.0)
    statistics.see(Measurement(change=number(0.0), top=number(0.0)), None)
    for rule in (GradientEdge(), Smoothness(), PolyakStep()):
        rule.before_step(statistics, number(0.0), number(0.0), None)
        rule.after_measuring(statistics, False, None)
        assert math.isfinite(rule.step_size(statistics, None, False))


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (GradientEdge, "damping", (-0.1, math.nan, math.inf)),
        (GradientEdge, "rho_min", (0, -1, 1.1, math.nan)),
        (GradientEdge, "stable", (0, -1, 4.1, math.nan)),
        (Smoothness, "safety", (0, -1, math.nan, math.inf)),
        (PolyakStep, "s", (0, -1, 2.5, math.nan, math.inf)),
        (PolyakStep, "tau", (0, -1, math.nan, math.inf)),
    ],
)
def test_rules_refuse_numbers_out_of_range(rule, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{rule.__name__}: {name}={value}, expected"):
            rule(**{name: value})


@pytest.mark.parametrize("rule", [GradientEdge(), Smoothness(), PolyakStep()], ids=lambda r: r.name)
def test_rules_of_the_gradient_are_refused_for_held_out_directions(rule):
    model = network()
    with pytest.raises(ValueError, match=f"{type(rule).__name__} does not go with"):
        make(model, rule, direction="spectral")
    with pytest.raises(ValueError, match="go with direction='sgd'"):
        make(model, rule.name + "s", direction="spectral")


# Resume.


@settings(max_examples=30)
@given(
    st.sampled_from(RULES),
    st.integers(0, 17),
    st.sampled_from([{"momentum": 0}, {}, {"nesterov": False}, {"average": 0.2}]),
    st.sampled_from([CRITERION, nn.MSELoss()]),
)
def test_a_run_that_is_killed_goes_on_bit_for_bit(rule, kill, options, criterion):
    total, options = 18, {"warmup": 4, "measure_every": 3, **options}

    def fresh():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        return model, make(model, rule, copy.deepcopy(criterion), **options)

    def go(model, optimizer, steps, start):
        x, y = data(24)
        target = y if criterion is CRITERION else nn.functional.one_hot(y, 3).float()
        for step in range(start, start + steps):
            rows = torch.randperm(24, generator=torch.Generator().manual_seed(step))[:6]
            optimizer.zero_grad()
            optimizer._watch.criterion(model(x[rows]), target[rows]).backward()
            optimizer.step()

    whole, unbroken = fresh()
    go(whole, unbroken, total, 0)
    model, optimizer = fresh()
    go(model, optimizer, kill, 0)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    saved = torch.load(file)
    model, optimizer = fresh()
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    go(model, optimizer, total - kill, kill)
    assert same(whole.state_dict(), model.state_dict())
    assert same(unbroken.state_dict(), optimizer.state_dict())
    assert str(unbroken.status()) == str(optimizer.status())


def test_every_scalar_of_the_controller_is_in_the_state():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 60)
    tensors = {n for n, v in vars(optimizer._statistics).items() if isinstance(v, torch.Tensor)}
    assert tensors <= set(optimizer.state_dict()["param_groups"][0]["controller"]["statistics"])


# Steps that are not finite.


@any_rule
@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("before", [0, 3, 30])
def test_gives_up_a_step_that_is_not_finite(rule, kind, before):
    model, twin = network(), network()
    optimizer, other = make(model, rule, warmup=4), make(twin, rule, warmup=4)
    train(model, optimizer, before)
    train(twin, other, before)
    optimizer.zero_grad()
    loss = loss_of(model, kind)
    if loss is not None:
        loss.backward()
    with untouched(model, optimizer, skipped=1), pytest.warns(RuntimeWarning, match="gave up"):
        optimizer.step()
    train(model, optimizer, 15, before)
    train(twin, other, 15, before)
    assert same(model.state_dict(), twin.state_dict())


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Switches the path of devices on: they are not asked whether numbers are finite."""

    def switch():
        monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
        monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)

    return switch


@any_rule
@pytest.mark.parametrize("kind", NOT_FINITE)
@pytest.mark.parametrize("before", [0, 3, 30])
def test_a_device_leaves_the_state_of_a_step_that_is_not_finite(rule, kind, before, as_on_a_device):
    model = network()
    optimizer = make(model, rule, warmup=4)
    train(model, optimizer, before)
    as_on_a_device()
    optimizer.zero_grad()
    loss = loss_of(model, kind)
    if loss is not None:
        loss.backward()
    statistics = optimizer._statistics.state_dict()
    weights = parameters(model)
    buffers = copy.deepcopy(optimizer.state_dict()["state"])
    optimizer.step()
    assert equal(weights, parameters(model))
    now = optimizer._statistics.state_dict()
    statistics["skipped"] += 1
    statistics["measured"] = now["measured"]  # the host counts what it asked for
    assert same(statistics, now)
    assert now["steps"] == before
    if before:
        assert same(buffers, optimizer.state_dict()["state"])
    assert optimizer.param_groups[0]["step_size"] == 0
    losses = train(model, optimizer, 20, before)
    assert all(math.isfinite(loss) for loss in losses)
    with pytest.warns(RuntimeWarning, match="gave up"):
        assert optimizer.status().skipped_steps == 1


@any_rule
def test_the_path_of_devices_is_the_path_of_a_cpu(rule, as_on_a_device):
    model, twin = network(), network()
    optimizer, other = make(model, rule), make(twin, rule)
    train(model, optimizer, 60)
    as_on_a_device()
    train(twin, other, 60)
    assert same(model.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), other.state_dict())


# Groups, schedules, caps.


@any_rule
def test_groups_move_in_the_ratio_of_their_rates(rule):
    model, size = network(), (12, 4)
    before = parameters(model)
    groups = [{"params": model[0].parameters(), "lr": 0.25}, {"params": model[2].parameters()}]
    optimizer = make(model, rule, params=groups, momentum=0)
    x, y = data(size[0])
    CRITERION(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    optimizer.step()
    status = optimizer.status()
    a = min(status.limits.values())
    assert status.step_size == pytest.approx(0.25 * a)
    for p, old, g, rate in zip(model.parameters(), before, gradients, (0.25, 0.25, 1, 1)):
        torch.testing.assert_close(p.detach(), old - rate * a * g, rtol=1e-5, atol=1e-6)


@any_rule
def test_groups_of_equal_options_are_one_group(rule):
    one, two = network(), network()
    first = make(one, rule)
    second = make(two, rule, params=[{"params": two[i].parameters()} for i in (0, 2)])
    train(one, first, 30)
    train(two, second, 30)
    assert equal(parameters(one), parameters(two))


@any_rule
def test_a_scheduler_acts_on_the_factor(rule):
    model = network()
    optimizer = make(model, rule, lr=0.8)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=5, gamma=0.5)
    for step in range(20):
        train(model, optimizer, 1, step)
        status = optimizer.status()
        lr = 0.8 * 0.5 ** (step // 5)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(lr)
        least = min(status.limits.values())
        assert status.step_size == pytest.approx(lr * least, rel=1e-6)
        assert status.limited_by == min(status.limits, key=status.limits.get)
        schedule.step()


@any_rule
def test_a_cap_of_the_step(rule):
    model = network()
    optimizer = make(model, rule, max_step=1e-3, momentum=0)
    before = parameters(model)
    train(model, optimizer, 1)
    assert optimizer.status().limited_by == "max_step"
    assert optimizer.status().step_size == pytest.approx(1e-3)
    for p, old in zip(model.parameters(), before):
        torch.testing.assert_close(p.detach(), old - 1e-3 * p.grad, rtol=1e-5, atol=1e-7)


# Batches without two halves.


@any_rule
def test_batches_of_one(rule):
    model = network()
    optimizer = make(model, rule)
    losses = train(model, optimizer, 200, size=1)
    status = optimizer.status()
    assert all(math.isfinite(loss) for loss in losses)
    assert status.correlation == 0  # as if all were noise
    assert math.isnan(status.noise_scale)
    assert 0 < status.step_size < math.inf
    assert (status.top_curvature > 0) == (rule != "polyak")
    if rule != "polyak":
        assert sum(losses[-50:]) < sum(losses[:50])


@any_rule
def test_batch_norm_in_train_mode(rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    optimizer = make(model, rule)
    means = [model[1].running_mean.clone()]
    losses = train(model, optimizer, 1)
    once = model[1].running_mean.clone()
    assert not torch.equal(once, means[0])
    assert model[1].num_batches_tracked == 1  # measuring ran it again, on copies
    losses += train(model, optimizer, 150, 1)
    status = optimizer.status()
    assert math.isnan(status.correlation)
    assert "edge" not in status.limits or status.limits["edge"] > 0
    assert sum(losses[-10:]) < sum(losses[:10]) / 2


def test_without_halves_the_edge_takes_a_stated_correlation():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))
    rule = GradientEdge()
    optimizer = make(model, rule)
    train(model, optimizer, 1)
    status = optimizer.status()
    share = 1 / gradient_rules.RAMP / (1 + rule.damping * (1 / gradient_rules.UNKNOWN - 1))
    expected = share * rule.s / status.top_curvature
    assert status.limits["edge"] == pytest.approx(expected, rel=1e-5)


def test_where_gradients_vanish_above_the_floor_the_trust_region_holds_polyak():
    # Dead units and balanced classes: the loss rests at ln 3 over the floor 0, and the less of a
    # gradient there is, the longer is the Polyak step. Only biases move, so Thm 3.6 is exact.
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
        model[2].bias.copy_(torch.tensor([1e-3, 0.0, -1e-3]))
    optimizer = make(model, PolyakStep(tau=0.5), momentum=0, warmup=50)
    x, y = torch.randn(12, 4).double(), torch.arange(12) % 3
    held = 0
    for step in range(50):
        optimizer.zero_grad()
        before = CRITERION(model(x), y)
        before.backward()
        optimizer.step()
        status, after = optimizer.status(), CRITERION(model(x), y).item()
        held += status.limited_by == "trust region"
        if step == 0:
            assert status.limits["Polyak step"] > 100 * status.limits["trust region"]
        assert after**0.5 <= (before.item() ** 0.5 + 0.5 * status.loss**0.5) * (1 + 1e-9)
    assert held > 10


# Terms of the loss that the rules do not measure.


class Heads(nn.Module):
    """Two heads on one layer; the criterion sees the first."""

    def __init__(self, *middle):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh())
        self.first, self.second = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        h = self.body(x)
        return self.first(h), self.second(h)


def second_head(model, first, second):
    return F.mse_loss(second, torch.ones_like(second))


def no_term(model, first, second):
    return 0.0 * second.sum()


def train_heads(optimizer, steps, term, spoil=None, start=0, parts=1, how="as it is"):
    """Steps on the criterion and one more term; what was said, by step."""
    (x, y), model, said = data(24), optimizer._watch.model, {}
    for step in range(start, start + steps):
        optimizer.zero_grad()
        for rows in torch.arange(24).chunk(parts):
            first, second = model(x[rows])
            if how == "transformed":
                first = first.log_softmax(1)
            if how == "observed":
                optimizer.observe(first, y[rows], scale=1 / parts)
                loss = F.cross_entropy(first, y[rows])
            else:
                loss = optimizer._watch.criterion(first, y[rows])
            ((loss + term(model, first, second)) / parts).backward()
        if spoil is not None:
            spoil(list(model.parameters()))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        for warning in caught:
            assert warning.filename == __file__
            said[step] = str(warning.message)
    return said


TERMS = {
    "second head": second_head,
    "outputs": lambda model, first, second: first.square().mean() + 0 * second.sum(),
    "weights": lambda model, first, second: sum(p.square().sum() for p in model.parameters()) / 2,
}


@any_rule
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("clip", [False, True])
def test_says_once_that_the_criterion_is_not_all_of_the_loss(term, rule, clip):
    model = Heads()
    optimizer = make(model, rule, momentum=0.9 if rule == "polyak" else 0.0)
    x, y = data(24)
    first, second = model(x)
    both = CRITERION(first, y), TERMS[term](model, first, second)
    criterion, total = (
        torch.cat([
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(model.parameters(), gradients)
        ])
        for gradients in (
            torch.autograd.grad(loss, model.parameters(), retain_graph=True, allow_unused=True)
            for loss in (both[0], sum(both))
        )
    )  # fmt: skip
    cosine = (criterion @ total) / (criterion.norm() * total.norm())
    share = (1 - cosine.clamp_min(0) ** 2).sqrt().item()
    spoil = (lambda params: nn.utils.clip_grad_norm_(params, 0.01)) if clip else None
    said = train_heads(optimizer, 30, TERMS[term], spoil)
    assert list(said) == [0]
    number = float(said[0].split()[1])
    assert number <= 100 * share + 0.5
    assert clip or number == pytest.approx(100 * share, abs=0.51)
    assert f'step_rule="{rule}"' in said[0]


def test_says_it_where_the_term_sets_in_later():
    optimizer = make(Heads(), warmup=20, measure_every=25)
    assert not train_heads(optimizer, 10, no_term)
    assert list(train_heads(optimizer, 20, second_head, start=10)) == [24]  # the 21st measurement
    assert not train_heads(optimizer, 30, second_head, start=30)


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "spectral", "step_rule": "edge"},
        {"step_rule": "polyak", "momentum": 0.0},
        {"step_rule": "constant", "lr": 0.01},
    ],
    ids=str,
)
def test_other_rules_do_not_speak_of_further_terms(options):
    assert not train_heads(make(Heads(), **options), 2, second_head)


SPOILS = {
    "nothing": None,
    "norm": lambda params: nn.utils.clip_grad_norm_(params, 0.01),
    "norm of each": lambda params: [nn.utils.clip_grad_norm_([p], 0.01) for p in params],
    "value": lambda params: nn.utils.clip_grad_value_(params, 0.01),
    "least value": lambda params: nn.utils.clip_grad_value_(params, 1e-6),
    "scale": lambda params: [p.grad.mul_(3) for p in params],
}


@pytest.mark.parametrize("spoil", SPOILS)
@pytest.mark.parametrize("how", ["as it is", "transformed", "observed"])
def test_a_loss_of_the_criterion_alone_is_explained(spoil, how):
    torch.manual_seed(0)
    options = {"coupled_weight_decay": True, "weight_decay": 0.5}
    for parts, middle in ((1, nn.Dropout(0.5)), (3, nn.Identity()), (1, nn.BatchNorm1d(6))):
        optimizer = make(Heads(middle), **options)
        assert not train_heads(optimizer, 2, no_term, SPOILS[spoil], parts=parts, how=how)


def test_a_small_term_is_not_worth_a_word():
    small = 1e-3
    optimizer = make(Heads())
    assert not train_heads(optimizer, 2, lambda model, f, s: small * second_head(model, f, s))


def test_looking_for_further_terms_leaves_the_run_alone(monkeypatch):
    runs = []
    for look in (True, False):
        if not look:
            monkeypatch.setattr("conjopt.optim.measuring.to_be_looked_at", lambda measured: False)
        optimizer = make(Heads(nn.Dropout(0.5), nn.BatchNorm1d(6)))
        torch.manual_seed(1)
        said = train_heads(optimizer, 25, second_head)
        assert bool(said) == look
        runs.append((parameters(optimizer._watch.model), optimizer.state_dict()))
    assert equal(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])


def test_a_model_that_does_not_run_again_is_not_judged(monkeypatch):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.runs = 0

        def forward(self, h):
            self.runs += 1
            return h * self.runs

    optimizer = make(Heads(Moody()))
    shares = []
    whole = other_terms.share_of_other_terms
    monkeypatch.setattr(
        "conjopt.optim.measuring.share_of_other_terms",
        lambda *args: shares.append(whole(*args)) or shares[-1],
    )
    assert not train_heads(optimizer, 1, second_head)
    assert shares == [0.0]


@pytest.mark.parametrize("direction", ["spectral", "sgd"])
def test_where_nobody_looks_no_other_terms_are_found(direction, monkeypatch):
    """A second head counts where its share is measured, and is 0 elsewhere."""
    found, measure = [], measuring.measure
    monkeypatch.setattr(
        measuring, "measure", lambda *given: found.append(measure(*given)) or found[-1]
    )
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, direction=direction)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ConjSGD: .* did not come through the criterion")
        for _ in range(3):
            optimizer.zero_grad()
            outputs = model(x)
            (criterion(outputs, y) + (outputs - 5).square().mean()).backward()
            optimizer.step()
    shares = [one.other_terms for one in found]
    assert shares[1:] == [0, 0]
    assert (shares[0] > 0.1) == (direction == "sgd")
    assert (shares[0] == 0) == (direction == "spectral")
