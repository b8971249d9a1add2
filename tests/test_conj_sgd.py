"""ConjSGD in a user's hands: groups, schedulers, checkpoints, copies, batches of every kind."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from torch import nn

from conjopt import ConjSGD
from conjopt.losses import SoftmaxLoss
from conjopt.measure.watch import Hook

BLOCK_STATE = {"square", "square_weight", "slopes", "shrinkage", "momentum_buffer", "average"}


def network(dtype=torch.float32, dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)


def data(size=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator, dtype=dtype)
    return x, x[:, :3].argmax(1)


def make(model, criterion=None, params=None, **options):
    params = model.parameters() if params is None else params
    return ConjSGD(params, model=model, loss=criterion or nn.CrossEntropyLoss(), **options)


def criterion_of(optimizer):
    return optimizer._watch.criterion


def backward(model, optimizer, step=0, size=8):
    """One forward and backward pass; the batch and the dropout follow from the step."""
    x, y = data(dtype=next(model.parameters()).dtype)
    torch.manual_seed(100 + step)
    rows = torch.randperm(len(x))[:size]
    optimizer.zero_grad()
    loss = criterion_of(optimizer)(model(x[rows]), y[rows])
    loss.backward()
    return loss.item()


def train(model, optimizer, steps, start=0, **options):
    for step in range(start, start + steps):
        loss = backward(model, optimizer, step, **options)
        optimizer.step()
    return loss


def parameters(model):
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def same(a, b):
    """Whether two nested states are equal, NaN being equal to itself."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    return a == b


def hooks_of(module):
    hooks = [
        *module._forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._backward_hooks.values(),
    ]
    return [hook for hook in hooks if isinstance(hook, Hook)]


RULES = {
    "spectral": {},
    "sgd": {"direction": "sgd"},
    "spectral constant": {"step_rule": "constant", "lr": 0.02},
    "sgd constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.1},
}
any_rule = pytest.mark.parametrize("rule", RULES)


# Parameter groups.


@any_rule
def test_groups_of_equal_options_are_one_group(rule):
    one, two = network(), network()
    first = make(one, warmup=3, measure_every=4, **RULES[rule])
    groups = [{"params": two[i].parameters()} for i in (0, 3)]
    second = make(two, params=groups, warmup=3, measure_every=4, **RULES[rule])
    second.add_param_group({"params": two[5].parameters()})
    train(one, first, 15)
    train(two, second, 15)
    assert equal(parameters(one), parameters(two))
    assert str(first.status()) == str(second.status())
    sizes = [group["step_size"] for group in second.param_groups]
    assert sizes == [first.param_groups[0]["step_size"]] * 3


@any_rule
def test_a_group_of_rate_zero_stands_still(rule):
    model = network()
    lr = RULES[rule].get("lr", 1.0)
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[3:].parameters()}]
    optimizer = make(model, params=groups, weight_decay=0.1, **{**RULES[rule], "lr": lr})
    before = parameters(model)
    train(model, optimizer, 5)
    after = parameters(model)
    assert equal(before[:2], after[:2])
    assert not any(torch.equal(p, q) for p, q in zip(before[2:], after[2:]))


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_all_rates_zero_stand_still(rule):
    model = network()
    optimizer = make(model, lr=0.0, **RULES[rule])
    before = parameters(model)
    train(model, optimizer, 3)
    assert equal(before, parameters(model))
    assert (optimizer.status().step, optimizer.status().step_size) == (3, 0)


def test_step_sizes_are_the_least_limit_times_each_rate():
    model = network()
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in ((0, 0.25), (3, 2), (5, 1))]
    optimizer = make(model, params=groups)
    for step in range(25):
        train(model, optimizer, 1, step)
        status = optimizer.status()
        least = min(status.limits.values())
        sizes = [float(group["step_size"]) for group in optimizer.param_groups]
        assert sizes == pytest.approx([0.25 * least, 2 * least, least], rel=1e-6)
        assert status.step_size == sizes[0]


def test_ratios_of_rates_are_part_of_the_measured_direction():
    model = network(torch.float64)
    groups = [{"params": model[i].parameters(), "lr": lr} for i, lr in ((0, 0.4), (3, 0), (5, 0.2))]
    optimizer = make(model, params=groups)
    train(model, optimizer, 1)
    raw = held = 0.0
    for group, ratio in zip(optimizer.param_groups, (1, 0, 0.5)):
        for p in group["params"]:
            state = optimizer.state[p]
            block = ratio * state["shrinkage"] * state["slopes"] / 0.1  # a mean of one, from zero
            raw, held = raw + block[0].item(), held + block[1].item()
    status = optimizer.status()
    assert status.raw_slope == pytest.approx(raw, rel=1e-10)
    assert status.slope == pytest.approx(held, rel=1e-10)

    one, two = network(torch.float64), network(torch.float64)  # a common factor is no part of it
    first, second = make(one), make(two, lr=0.5)
    train(one, first, 1)
    train(two, second, 1)
    assert first.status().limits == second.status().limits
    assert second.status().step_size == 0.5 * first.status().step_size


def test_each_group_has_its_own_momentum_and_decay():
    model, twin = network(torch.float64), network(torch.float64)
    common = {"step_rule": "constant", "lr": 0.01}
    groups = [
        {"params": model[0].parameters(), "momentum": 0.5, "weight_decay": 0.15},
        {"params": model[3:].parameters(), "nesterov": False},
    ]
    optimizer = make(model, params=groups, weight_decay=0.0, **common)
    other = make(twin, params=[dict(g, weight_decay=0.0) for g in regroup(groups, twin)], **common)
    before = parameters(model)
    train(model, optimizer, 1)
    train(twin, other, 1)
    for old, p, q in zip(before[:2], model[0].parameters(), twin[0].parameters()):
        torch.testing.assert_close(q - p, old * 0.15 * 0.01)
    for p, q in zip(model[3:].parameters(), twin[3:].parameters()):
        assert torch.equal(p, q)
    for p in model.parameters():
        momentum = 0.5 if p is model[0].weight or p is model[0].bias else 0.9
        torch.testing.assert_close(optimizer.state[p]["momentum_buffer"], (1 - momentum) * p.grad)


def regroup(groups, twin):
    """The groups of `test_each_group_has_its_own_momentum_and_decay`, of another model."""
    parts = (twin[0], twin[3:])
    return [dict(g, params=part.parameters()) for g, part in zip(groups, parts)]


@any_rule
def test_the_decay_is_capped(rule):
    """theta (1 - min(weight_decay a, max_decay)) - a u, from the same theta and u."""
    for decay in (0.01, 1e3):
        model, twin = network(torch.float64), network(torch.float64)
        before = parameters(model)
        optimizer = make(model, weight_decay=decay, max_decay=0.004, **RULES[rule])
        train(model, optimizer, 1)
        train(twin, make(twin, weight_decay=0.0, **RULES[rule]), 1)
        taken = min(decay * optimizer.status().step_size, 0.004)
        for old, p, q in zip(before, model.parameters(), twin.parameters()):
            torch.testing.assert_close(q - p, old * taken, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize(
    ("criterion", "options", "expected"),
    [
        (nn.CrossEntropyLoss(), {}, 0.1),
        (SoftmaxLoss(), {}, 0.1),
        (nn.BCEWithLogitsLoss(), {}, 0.1),
        (nn.CrossEntropyLoss(), {"step_rule": "constant"}, 0.1),
        (nn.MSELoss(), {}, 0.0),
        (nn.CrossEntropyLoss(), {"direction": "sgd"}, 0.0),
        (nn.BCEWithLogitsLoss(), {"direction": "sgd"}, 0.0),
        (nn.CrossEntropyLoss(), {"weight_decay": 0.02}, 0.02),
        (nn.CrossEntropyLoss(), {"weight_decay": 0.0}, 0.0),
        (nn.MSELoss(), {"weight_decay": 0.3, "direction": "sgd"}, 0.3),
    ],
)
def test_weight_decay_of_none_follows_from_the_loss(criterion, options, expected):
    assert make(network(), criterion, **options).param_groups[0]["weight_decay"] == expected


# The cap on the step, and schedulers.


@pytest.mark.parametrize("cap", [0.001, 0.0007, 0.0013, 1e-5, 0])
@any_rule
def test_max_step_is_respected_and_said(rule, cap):
    model = network()
    optimizer = make(model, max_step=cap, weight_decay=0.0, **RULES[rule])
    before = parameters(model)
    train(model, optimizer, 1)
    status = optimizer.status()
    assert status.limited_by == "max_step"
    assert status.step_size == pytest.approx(cap, rel=1e-6)
    assert "(limited by max_step)" in str(status)
    if rule == "sgd constant":
        for old, p in zip(before, model.parameters()):
            torch.testing.assert_close(p, old - cap * 1.9 * p.grad)  # Nesterov's first step
    assert equal(before, parameters(model)) == (cap == 0)


def test_max_step_caps_after_lr_and_by_group():
    model = network()
    groups = [{"params": model[:2].parameters()}, {"params": model[2:].parameters()}]
    groups[1]["max_step"] = 1e-4
    optimizer = make(model, params=groups, lr=0.5, max_step=100.0)
    train(model, optimizer, 2)
    status = optimizer.status()
    assert status.limited_by in status.limits
    assert status.step_size == pytest.approx(0.5 * min(status.limits.values()), rel=1e-6)
    assert float(optimizer.param_groups[1]["step_size"]) == pytest.approx(1e-4, rel=1e-6)


@any_rule
def test_a_scheduler_scales_the_step_by_its_factor(rule):
    model, twin = network(), network()
    options = {"lr": 1.0, "weight_decay": 0.0, **RULES[rule]}
    base = options["lr"]
    optimizer, other = make(model, **options), make(twin, **options)
    factors = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0 if t < 6 else 0.25)
    for step in range(6):
        train(model, optimizer, 1, step)
        factors.step()
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))
    before = parameters(model)
    assert optimizer.param_groups[0]["lr"] == 0.25 * base
    train(model, optimizer, 1, 6)
    train(twin, other, 1, 6)
    assert optimizer.status().step_size == 0.25 * other.status().step_size
    assert optimizer.status().limits == other.status().limits
    for old, p, q in zip(before, parameters(model), parameters(twin)):
        torch.testing.assert_close((p - old) / 0.25, q - old, rtol=1e-3, atol=3e-6)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_a_tensor_for_lr_is_as_good(rule):
    model, twin = network(), network()
    train(model, make(model, lr=torch.tensor(0.5), **RULES[rule]), 4)
    train(twin, make(twin, lr=0.5, **RULES[rule]), 4)
    assert equal(parameters(model), parameters(twin))


# Parameters that take no part.


@any_rule
def test_frozen_and_unused_parameters_stand_still(rule):
    model, twin = network(), network()
    for net in (model, twin):
        net[0].bias.requires_grad_(False)
        net.unused = nn.Linear(2, 2)
        net.forward = lambda x, net=net: nn.Sequential.forward(net[:6], x)
    optimizer = make(model, average=0.2, **RULES[rule])
    needed = [p for name, p in twin.named_parameters() if "unused" not in name and name != "0.bias"]
    other = make(twin, params=needed, average=0.2, **RULES[rule])
    before = [model[0].bias.clone(), *parameters(model.unused)]
    train(model, optimizer, 6)
    train(twin, other, 6)
    assert equal(before, [model[0].bias, *parameters(model.unused)])
    assert not any(optimizer.state.get(p) for p in (model[0].bias, *model.unused.parameters()))
    for p, q in zip(needed, twin.parameters()):
        assert p is q or p.requires_grad
    assert equal(parameters(model[:6]), parameters(twin[:6]))


@any_rule
def test_layers_can_be_frozen_and_thawed_on_the_way(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    before = parameters(model)
    train(model, optimizer, 3, 3)
    assert equal(before[:2], parameters(model)[:2])
    model[0].requires_grad_(True)
    train(model, optimizer, 3, 6)
    assert not torch.equal(before[0], model[0].weight)
    assert optimizer.status().step == 9


@any_rule
def test_a_frozen_layer_with_a_left_over_gradient(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    train(model, optimizer, 2)
    optimizer.zero_grad(set_to_none=False)
    model[0].requires_grad_(False)  # its gradient stays at zero; momentum goes on, as in torch
    x, y = data()
    criterion_of(optimizer)(model(x), y).backward()
    optimizer.step()
    assert optimizer.status().step == 3
    assert all(p.isfinite().all() for p in model.parameters())


@any_rule
def test_parameters_without_elements_are_no_trouble(rule):
    model, twin = network(), network()
    model.register_parameter("none", nn.Parameter(torch.empty(0, 3)))
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    x, y = data()
    for _ in range(3):
        optimizer.zero_grad()
        (criterion_of(optimizer)(model(x), y) + model.none.sum()).backward()
        optimizer.step()
        other.zero_grad()
        criterion_of(other)(twin(x), y).backward()
        other.step()
    assert equal(parameters(model[:6]), parameters(twin))


# Checkpoints.


RESUMED = {
    "spectral": {},
    "spectral, averaged": {"average": 0.1, "max_step": 0.05},
    "spectral, half precision": {"dtype": torch.bfloat16, "average": 0.1},
    "spectral, double precision": {"dtype": torch.float64, "weight_decay": 0.03},
    "spectral, with a floor that is none": {"data_floor": 1.5},
    "spectral, batch norm": {"normalize": True},
    "sgd": {"direction": "sgd", "average": 0.2},
    "spectral constant": {"step_rule": "constant", "lr": 0.02, "average": 0.1},
    "sgd constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.1},
}


@pytest.mark.filterwarnings("ignore:ConjSGD. losses stay below data_floor:RuntimeWarning")
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_the_unbroken_one(kind):
    """Saved after every step: inside the warm-up, at measurements and between them."""
    options = {"warmup": 4, "measure_every": 5, **RESUMED[kind]}
    dtype, normalize = options.pop("dtype", torch.float32), options.pop("normalize", False)
    steps = 17

    def start():
        model = network(dtype, dropout=0.3)
        if normalize:
            model[1] = nn.BatchNorm1d(6)
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        groups[0]["lr"] = 0.5 * options.get("lr", 1.0)
        optimizer = make(model, params=groups, **options)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, gamma=0.5)

    def run(model, optimizer, scheduler, first, last):
        for step in range(first, last):
            loss = train(model, optimizer, 1, step)
            scheduler.step()
        return loss

    parts = start()
    saves = []
    for step in range(steps):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        saves.append(file.getvalue())
        run(*parts, step, step + 1)
    model, optimizer, _ = parts
    for step, save in enumerate(saves):
        again = start()
        again[0].eval()
        train(again[0], again[1], 2, 50)  # what is there before is forgotten
        again[0].train()
        for part, state in zip(again, torch.load(io.BytesIO(save), weights_only=True)):
            part.load_state_dict(state)
        run(*again, step, steps)
        assert equal(parameters(again[0]), parameters(model)), f"saved after {step} steps"
        assert same(again[1].state_dict(), optimizer.state_dict()), f"saved after {step} steps"
        assert str(again[1].status()) == str(optimizer.status())


def test_a_state_holds_its_own_precision():
    model = network(torch.bfloat16)
    optimizer = make(model, average=0.1)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    assert set().union(*before["state"].values()) == BLOCK_STATE
    optimizer.load_state_dict(before)
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        for key, value in state.items():
            assert value.dtype == after["state"][number][key].dtype
    assert after["state"][0]["slopes"].dtype == torch.float32


# The tail average.


@any_rule
@pytest.mark.parametrize("average", [0.1, 0.5])
def test_averaged_is_the_running_mean_of_the_docstring(average, rule):
    model = network(torch.float64)
    optimizer = make(model, average=average, **RULES[rule])
    mean = None
    for step in range(12):
        train(model, optimizer, 1, step)
        now = parameters(model)
        weight = 1 / (average * (step + 1) + 1)
        mean = now if mean is None else [m + weight * (p - m) for m, p in zip(mean, now)]
        with optimizer.averaged():
            for m, p in zip(mean, model.parameters(), strict=True):
                torch.testing.assert_close(p.detach(), m, rtol=1e-12, atol=1e-14)
        assert equal(now, parameters(model))


def test_averaged_puts_the_parameters_back_after_an_exception():
    model = network()
    optimizer = make(model, average=0.1)
    train(model, optimizer, 4)
    before, state = parameters(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ZeroDivisionError), optimizer.averaged():
        _ = 1 / int(equal(before, parameters(model)))
    assert equal(before, parameters(model))
    assert same(state, optimizer.state_dict())


def test_averaging_leaves_the_run_alone():
    model, twin = network(), network()
    optimizer = make(model, average=0.1)
    other = make(twin)
    for step in range(6):
        train(model, optimizer, 1, step)
        with optimizer.averaged(), torch.no_grad():
            model(data()[0])
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))


def test_averaged_before_any_step_changes_nothing():
    model = network()
    before = parameters(model)
    with make(model, average=0.1).averaged():
        assert equal(before, parameters(model))


# What it says of itself.


def test_status_before_and_after_the_first_step():
    model = network()
    optimizer = make(model)
    status = optimizer.status()
    assert (status.step, status.skipped_steps, status.step_size) == (0, 0, 0)
    assert (status.limited_by, status.limits) == ("nothing measured", {})
    assert math.isnan(status.loss)
    assert math.isnan(status.curvature)
    assert "loss             per sample, over the data floor not measured" in str(status)

    loss = train(model, optimizer, 1)
    status = optimizer.status()
    assert (status.step, status.skipped_steps) == (1, 0)
    assert list(status.limits) == ["edge", "Polyak cap", "trust region"]
    assert status.limited_by == min(status.limits, key=status.limits.get)
    assert status.step_size == min(status.limits.values())
    assert status.step_size == float(optimizer.param_groups[0]["step_size"])
    assert status.loss == pytest.approx(loss, rel=1e-6)
    assert status.correlation == pytest.approx(status.slope / status.raw_slope)
    slope, raw, q, v = status.slope, status.raw_slope, status.curvature, status.output_change
    assert status.limits["edge"] == pytest.approx(1.5 * max(slope, 0.3 * raw) / q, rel=1e-5)
    assert status.limits["Polyak cap"] == pytest.approx(loss / raw, rel=1e-5)
    assert status.limits["trust region"] == pytest.approx((2 * loss / 0.5) ** 0.5 / v, rel=1e-5)
    assert status.noise_scale > 0
    assert "heuristic" in status.guarantee

    rows = [line[:16].strip() for line in str(status).splitlines()]
    assert rows == [
        "step",
        "step size",
        "limits",
        "loss",
        "slope",
        "correlation",
        "curvature",
        "output change",
        "gradient energy",
        "noise scale",
        "batch size",
        "eigenvalues",
        "C1",
        "C2",
        "C3",
        "C4",
        "Thm 3.6",
    ]
    assert f"step size        {status.step_size:.4g} (limited by {status.limited_by})" in str(
        status
    )
    with pytest.raises(AttributeError, match="cannot assign"):
        status.step = 3


def test_status_of_other_rules():
    model = network()
    optimizer = make(model, **RULES["sgd"])
    train(model, optimizer, 2)
    status = optimizer.status()
    assert list(status.limits) == ["edge", "stability", "trust region"]
    assert math.isnan(status.slope)
    assert status.noise_scale > 0
    assert status.curvature > 0
    assert "held out not measured" in str(status)

    optimizer = make(model, **RULES["sgd constant"])
    train(model, optimizer, 2)
    status = optimizer.status()
    assert (status.step, status.limited_by, status.limits) == (2, "lr", {})
    assert status.step_size == optimizer.param_groups[0]["step_size"] == 0.1
    assert "constant" in status.guarantee
    assert "limits           none" in str(status).splitlines()


def test_status_does_not_disturb_the_run():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    for step in range(4):
        train(model, optimizer, 1, step)
        train(twin, other, 1, step)
        optimizer.status()
    assert equal(parameters(model), parameters(twin))


# The loop.


@any_rule
def test_a_closure_is_the_same_loop(rule):
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    for step in range(5):

        def closure(step=step):
            assert torch.is_grad_enabled()
            return backward(model, optimizer, step)

        assert optimizer.step(closure) == train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_gradients_can_be_reset_anywhere_before_the_backward_pass(rule, set_to_none):
    paths = []
    for where in ("before", "between", "after the step", "by the model"):
        model = network()
        optimizer = make(model, warmup=3, **RULES[rule])
        x, y = data()
        for _ in range(5):
            if where == "before":
                optimizer.zero_grad(set_to_none)
            if where == "by the model":
                model.zero_grad(set_to_none)
            outputs = model(x)
            if where == "between":
                optimizer.zero_grad(set_to_none)
            loss = criterion_of(optimizer)(outputs, y)
            loss.backward()
            optimizer.step()
            if where == "after the step":
                optimizer.zero_grad(set_to_none)
        paths.append(parameters(model))
    assert all(equal(paths[0], path) for path in paths)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize("reset", ["optimizer", "optimizer to zero", "model"])
def test_a_backward_pass_that_was_thrown_away_leaves_no_trace(rule, reset):
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    x, y = data()
    for _ in range(4):
        (3 * criterion_of(optimizer)(model(x + 1), y)).backward()
        if reset == "model":
            model.zero_grad()
        else:
            optimizer.zero_grad(set_to_none=reset == "optimizer")
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
        other.zero_grad()
        criterion_of(other)(twin(x), y).backward()
        other.step()
        model.zero_grad()
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@any_rule
def test_inputs_are_kept_for_measuring_steps_alone(rule):
    model = network()
    optimizer = make(model, warmup=2, measure_every=5, **RULES[rule])
    kept = []
    for step in range(1, 12):
        backward(model, optimizer, step)
        (observation,) = optimizer._watch.batch().observations
        if observation.outputs is not None:
            assert observation.forward.replay is not None
            kept.append(step)
        forward = weakref.ref(observation.forward)
        del observation
        optimizer.step()
        assert forward() is None
    assert kept == ([1, 2, 5, 10] if optimizer._rule.measures else [])


@any_rule
def test_a_compiled_model_is_watched_like_any_other(rule):
    model, twin = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = make(compiled, **RULES[rule]), make(twin, **RULES[rule])
    train(compiled, optimizer, 3)
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


# Copies of the model, and more than one optimizer.


def test_copies_of_the_model_are_not_watched():
    model, twin = network(), network()
    optimizer, other = make(model), make(twin)
    train(model, optimizer, 2)
    train(twin, other, 2)
    copied = copy.deepcopy(model)
    mean = torch.optim.swa_utils.AveragedModel(model)
    x, y = data()
    backward(model, optimizer, 2)
    for net in (copied, mean, pickle.loads(pickle.dumps(model))):
        criterion_of(optimizer)(net(x + 1), y).backward()
        with torch.no_grad():
            net(x)
    optimizer.step()
    mean.update_parameters(model)
    train(twin, other, 1, 2)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


def test_a_copy_has_an_optimizer_of_its_own():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 2)
    copied = copy.deepcopy(model)
    fresh = make(copied)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 3, 2)
    train(copied, fresh, 3, 2)
    assert equal(parameters(model), parameters(copied))


def test_a_watched_model_can_be_saved_whole():
    model = network()
    optimizer = make(model)
    train(model, optimizer, 1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x, _ = data()
    assert torch.equal(model(x), loaded(x))
    train(model, optimizer, 1, 1)
    assert optimizer.status().step == 2


def test_no_hooks_are_left_behind():
    model, criterion = network(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion, average=0.1)
    train(model, optimizer, 2)
    backward(model, optimizer, 2)
    loss = criterion(model(data()[0]), data()[1])  # holds a graph, not the optimizer
    assert len(hooks_of(model)) == 2
    assert len(hooks_of(criterion)) == 1
    del optimizer
    gc.collect()
    assert hooks_of(model) == hooks_of(criterion) == []
    assert not any(hooks_of(module) for module in model.modules())
    loss.backward()


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_optimizers_one_after_the_other(rule):
    """The first ones are still there, as in a notebook, and do not meddle with the last."""
    model, twin, criterion = network(), network(), nn.CrossEntropyLoss()
    kept = []
    for _ in range(3):
        with torch.no_grad():
            for p, q in zip(model.parameters(), network().parameters()):
                p.copy_(q)
        optimizer = make(model, criterion, **RULES[rule])
        kept.append(optimizer)
        train(model, optimizer, 3)
    other = make(twin, **RULES[rule])
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
    assert [o.status().step for o in kept] == [3, 3, 3]


def test_two_optimizers_share_a_model():
    model = network()
    first = make(model, params=model[:3].parameters())
    second = make(model, params=model[3:].parameters(), criterion=criterion_of(first))
    x, y = data()
    losses = []
    for _ in range(30):
        first.zero_grad()
        second.zero_grad()
        loss = criterion_of(first)(model(x), y)
        loss.backward()
        first.step()
        second.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


# On a device, which is not asked whether numbers are finite.


@pytest.fixture
def as_on_a_device(monkeypatch):
    """Switches the path of devices on, here on a CPU."""

    def switch():
        monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
        monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)

    return switch


GATED = {
    **RULES,
    "spectral, averaged": {"average": 0.1, "max_step": 0.1},
    "spectral, no momentum": {"momentum": 0.0},
    "spectral constant, tensor": {"step_rule": "constant", "lr": torch.tensor(0.02)},
    "sgd constant, coupled": {
        "step_rule": "constant",
        "direction": "sgd",
        "lr": 0.1,
        "nesterov": False,
        "dampening": 0.3,
        "weight_decay": 0.1,
        "coupled_weight_decay": True,
    },
    "sgd constant, coupled, tensor": {
        "step_rule": "constant",
        "direction": "sgd",
        "lr": torch.tensor(0.1),
        "weight_decay": 0.1,
        "coupled_weight_decay": True,
    },
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", GATED)
def test_the_path_of_devices_takes_the_same_steps(kind, dtype, as_on_a_device):
    options = {"warmup": 3, "measure_every": 4, **GATED[kind]}
    model, twin = network(dtype), network(dtype)
    optimizer = make(model, **options)
    train(model, optimizer, 10)
    as_on_a_device()
    other = make(twin, **options)
    train(twin, other, 10)
    assert equal(parameters(model), parameters(twin))
    assert same(optimizer.state_dict(), other.state_dict())


def spoil(model, optimizer, step, how):
    loss = backward(model, optimizer, step)
    x, y = data(dtype=next(model.parameters()).dtype)
    if how == "gradient":
        model[0].weight.grad[0, 0] = torch.nan
        return loss
    optimizer.zero_grad()
    if how == "input":
        x = torch.where(x > 1, torch.nan, x)
    loss = criterion_of(optimizer)(model(x), y)
    (loss * torch.inf if how == "factor" else loss).backward()
    return loss


@pytest.mark.parametrize("how", ["gradient", "input", "factor"])
@pytest.mark.parametrize("kind", GATED)
def test_the_path_of_devices_gives_up_steps_that_are_not_finite(kind, how, as_on_a_device):
    """At a measuring step and at an ordinary one; the next warning is at the next record."""
    options = {"warmup": 3, "measure_every": 100, **GATED[kind]}
    as_on_a_device()
    for taken in (1, 4):
        model = network()
        optimizer = make(model, **options)
        train(model, optimizer, taken)
        before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        spoil(model, optimizer, taken, how)
        optimizer.step()
        after = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        assert after[1]["controller"]["statistics"].pop("skipped") == 1
        before[1]["controller"]["statistics"].pop("skipped")
        for _, state in before, after:  # of the host, which does not know
            for key in ("calls", "trust_only"):
                state["controller"].pop(key)
            state["controller"]["statistics"].pop("measured")
            for group in state["param_groups"]:
                group.pop("step_size")
        assert same(before, after)
        with pytest.warns(RuntimeWarning, match="gave up a step"):
            status = optimizer.status()
        assert (status.skipped_steps, status.step) == (1, taken)
        if optimizer._rule.measures:
            assert status.step_size == 0
        train(model, optimizer, 3, taken)
        assert all(p.isfinite().all() for p in model.parameters())
        assert optimizer.status().step == taken + 3


@pytest.mark.parametrize("kind", ["spectral", "sgd", "spectral, averaged"])
def test_the_path_of_devices_gives_up_the_first_step(kind, as_on_a_device):
    as_on_a_device()
    model, twin = network(), network()
    optimizer, other = make(model, **GATED[kind]), make(twin, **GATED[kind])
    before = parameters(model)
    spoil(model, optimizer, 0, "input")
    optimizer.step()
    assert equal(before, parameters(model))
    train(model, optimizer, 3)
    train(twin, other, 3)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q)


# Batches of every kind.


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_batch_norm_is_run_by_the_loop_alone(rule):
    model, twin = normalized(), normalized()
    optimizer = make(model, **RULES[rule])
    x, y = data(60)
    losses = []
    for step in range(60):
        rows = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:20]
        twin.load_state_dict({**twin.state_dict(), **dict(model.named_parameters())})
        twin(x[rows])
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x[rows]), y[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, twin.get_buffer(name)), name
    assert model[1].num_batches_tracked == 60
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    if rule == "spectral":
        status = optimizer.status()
        assert list(status.limits) == ["trust region"]
        assert math.isnan(status.slope)
        assert math.isnan(status.curvature)
        assert status.output_change > 0


def test_batch_norm_in_eval_mode_couples_nothing():
    model = normalized().eval()
    optimizer = make(model)
    x, y = data(60)
    for _ in range(5):
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x), y).backward()
        optimizer.step()
    assert list(optimizer.status().limits) == ["edge", "Polyak cap", "trust region"]


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_single_samples_at_the_end_of_epochs(rule):
    model = network()
    optimizer = make(model, warmup=8, measure_every=4, **RULES[rule])
    x, y = data(25)
    first = last = None
    for _ in range(12):
        for rows in torch.arange(25).split(8):  # 8, 8, 8, 1: each measurement after the warm-up
            optimizer.zero_grad()
            loss = criterion_of(optimizer)(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            last = loss.item() if len(rows) > 1 else last
            first = last if first is None else first
    status = optimizer.status()
    assert (status.step, status.skipped_steps) == (48, 0)
    assert len(status.limits) == 3
    assert last < first / 2


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_single_samples_only(rule):
    model = network()
    optimizer = make(model, **RULES[rule])
    x, y = data()
    before = criterion_of(optimizer)(model(x), y).item()
    for step in range(4 * len(x)):
        rows = slice(step % len(x), step % len(x) + 1)
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert criterion_of(optimizer)(model(x), y).item() < before
    if rule == "spectral":
        assert list(optimizer.status().limits) == ["trust region"]


def test_slopes_start_when_the_first_halves_come():
    """Measurements of the trust region alone do not count in the means of the others."""
    model, twin = network(torch.float64), network(torch.float64)
    optimizer = make(model, weight_decay=0.0)
    x, y = data(dtype=torch.float64)
    for step in range(4):
        optimizer.zero_grad()
        criterion_of(optimizer)(model(x[step : step + 1]), y[step : step + 1]).backward()
        optimizer.step()
    twin.load_state_dict(model.state_dict())
    other = make(twin, weight_decay=0.0)
    for p, q in zip(model.parameters(), twin.parameters()):
        keys = ("momentum_buffer", "square", "square_weight")
        state = optimizer.state[p]
        other.state[q] = {key: state[key].clone() for key in keys if key in state}
    train(model, optimizer, 1)
    train(twin, other, 1)
    ours, theirs = optimizer.status(), other.status()
    for name in ("slope", "raw_slope", "curvature", "noise_scale", "output_change"):
        assert getattr(ours, name) == pytest.approx(getattr(theirs, name), rel=1e-9), name
    assert ours.limits["edge"] == pytest.approx(theirs.limits["edge"], rel=1e-9)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.MSELoss(reduction="sum")], ids=str
)
def test_regression_and_binary_losses_fall(criterion, rule):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    x = torch.randn(100, 4)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    if isinstance(criterion, nn.BCEWithLogitsLoss):
        y = (y > 0).float()
    optimizer = make(model, criterion, **RULES[rule])
    start = criterion(model(x), y).item()
    for step in range(150):
        rows = torch.randperm(100, generator=torch.Generator().manual_seed(step))[:20]
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    assert criterion(model(x), y).item() < start / 2
    status = optimizer.status()
    assert status.skipped_steps == 0
    assert math.isfinite(status.step_size)


def test_sgd_edge_classifies():
    model = network()
    optimizer = make(model, **RULES["sgd"])
    x, y = data()
    start = criterion_of(optimizer)(model(x), y).item()
    train(model, optimizer, 150)
    assert criterion_of(optimizer)(model(x), y).item() < start / 2


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize("sizes", [(12, 12), (8, 8, 8), (4, 16, 4)])
def test_accumulated_micro_batches_are_the_joined_batch(sizes, rule):
    x, y = data(24, torch.float64)
    results = []
    for parts in (torch.arange(24).split(24), torch.arange(24).split(list(sizes))):
        model = network(torch.float64)
        optimizer = make(model, warmup=1, measure_every=1000, average=0.1, **RULES[rule])
        train(model, optimizer, 1)  # the one that measures; its two parts would differ
        for _ in range(3):
            optimizer.zero_grad()
            for rows in parts:
                (criterion_of(optimizer)(model(x[rows]), y[rows]) * (len(rows) / 24)).backward()
            optimizer.step()
        results.append((optimizer.state_dict(), optimizer.status(), parameters(model)))
    (state, status, after), (state_of_parts, status_of_parts, after_parts) = results
    assert status_of_parts.loss == pytest.approx(status.loss, rel=1e-12)
    assert status_of_parts.step_size == pytest.approx(status.step_size, rel=1e-12)
    for number, of_one in state["state"].items():
        for key, value in of_one.items():
            torch.testing.assert_close(state_of_parts["state"][number][key], value)
    for p, q in zip(after_parts, after):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
def test_accumulation_trains(rule):
    """The measuring steps as well, whose two parts are the first micro-batch and the others."""
    model = network()
    optimizer = make(model, warmup=4, measure_every=5, **RULES[rule])
    x, y = data()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = 0
        for rows in torch.arange(24).split(8):
            part = criterion_of(optimizer)(model(x[rows]), y[rows]) / 3
            part.backward()
            loss += part.item()
        optimizer.step()
        losses.append(loss)
    assert losses[-1] < losses[0] / 2
    assert optimizer.status().loss < losses[0]


@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_changes_nothing(foreach):
    model, twin = network(), network()
    train(model, make(model, foreach=foreach), 5)
    train(twin, make(twin, foreach=False), 5)
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_thrown_away_by_the_model_do_not_count(set_to_none):
    torch.manual_seed(0)
    model, criterion = nn.Linear(3, 2), nn.CrossEntropyLoss()
    twin = copy.deepcopy(model)
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
    plain = ConjSGD(twin.parameters(), model=twin, loss=criterion)
    x, y = torch.randn(6, 3), torch.arange(6) % 2
    for _ in range(3):
        criterion(model(x + 1), y).backward()
        model.zero_grad(set_to_none=set_to_none)
        criterion(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        criterion(twin(x), y).backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickle.dumps])
def test_copies_are_refused_with_the_remedy(duplicate):
    model = nn.Linear(2, 1)
    optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
    with pytest.raises(TypeError, match="state_dict"):
        duplicate(optimizer)
