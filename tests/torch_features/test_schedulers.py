"""Learning-rate schedulers act on the dimensionless `lr`: the step is scaled by their factor."""

import pytest
import torch
from loop import RULES, any_rule, equal, make, network, parameters, train

schedulers = torch.optim.lr_scheduler
SCHEDULES = {
    "steps": lambda o: schedulers.StepLR(o, 4, gamma=0.5),
    "multistep": lambda o: schedulers.MultiStepLR(o, [3, 7], gamma=0.3),
    "constant": lambda o: schedulers.ConstantLR(o, 0.25, total_iters=5),
    "linear": lambda o: schedulers.LinearLR(o, 0.1, total_iters=8),
    "exponential": lambda o: schedulers.ExponentialLR(o, 0.9),
    "polynomial": lambda o: schedulers.PolynomialLR(o, total_iters=12, power=2.0),
    "cosine": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "warm restarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 4, T_mult=2),
    "one cycle": lambda o: schedulers.OneCycleLR(o, 1.5 * o.defaults["lr"], total_steps=15),
    "cyclic": lambda o: schedulers.CyclicLR(o, 0.1 * o.defaults["lr"], o.defaults["lr"], 3),
    "lambda": lambda o: schedulers.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: schedulers.MultiplicativeLR(o, lambda t: 0.95),
    "plateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, factor=0.5),
    "sequential": lambda o: schedulers.SequentialLR(
        o, [schedulers.LinearLR(o, 0.2, total_iters=4), schedulers.ExponentialLR(o, 0.8)], [4]
    ),
    "chained": lambda o: schedulers.ChainedScheduler(
        [schedulers.ConstantLR(o, 0.5, total_iters=3), schedulers.ExponentialLR(o, 0.9)]
    ),
    "swa": lambda o: torch.optim.swa_utils.SWALR(o, 0.3 * o.defaults["lr"], anneal_epochs=5),
}
METRICS = (3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.5, 0.4)


def rates_of(scheduler, optimizer, schedule):
    """What a scheduler makes of an optimizer's rates and momenta, before each step."""
    for metric in METRICS:
        yield [(group["lr"], group["momentum"]) for group in optimizer.param_groups]
        optimizer.step()
        scheduler.step(metric) if schedule == "plateau" else scheduler.step()


@any_rule
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_under_a_scheduler_is_the_one_with_its_numbers(schedule, rule):
    """What torch's scheduler makes of a torch.optim.SGD, written into the groups by hand."""
    model, twin = network(), network()
    base = {"lr": 1.0, **RULES[rule]}
    groups = [
        [{"params": net[:2].parameters()}, {"params": net[2:].parameters()}]
        for net in (model, twin)
    ]
    optimizer = make(model, params=groups[0], warmup=3, measure_every=4, **base)
    other = make(twin, params=groups[1], warmup=3, measure_every=4, **base)
    momentum = base.get("momentum", 0.9)
    plain = torch.optim.SGD(
        [{"params": [torch.zeros(1)]}, {"params": [torch.zeros(1)]}], base["lr"], momentum
    )
    scheduler = SCHEDULES[schedule](optimizer)
    seen = []
    for step, rates in enumerate(rates_of(SCHEDULES[schedule](plain), plain, schedule)):
        train(model, optimizer, 1, step)
        scheduler.step(METRICS[step]) if schedule == "plateau" else scheduler.step()
        for group, (lr, now) in zip(other.param_groups, rates):
            group["lr"], group["momentum"] = lr, now
        train(twin, other, 1, step)
        assert equal(parameters(model), parameters(twin)), step
        seen += rates
    assert len({lr for lr, _ in seen}) > 1
    assert (len({momentum for _, momentum in seen}) > 1) == (schedule in ("one cycle", "cyclic"))


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
