"""Bad input: an exception that names the remedy, with parameters and state untouched."""

import contextlib
import copy
import gc
import math
import warnings

import pytest
import torch
from torch import nn

from conjopt import ConjSGD
from conjopt.losses import SoftmaxLoss
from conjopt.optim import Constant, Edge, GradientEdge, Spectral

CRITERION = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def data(size=12):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, generator=generator)
    return x, x[:, :3].argmax(1)


def make(model, *, loss=CRITERION, **options):
    return ConjSGD(model.parameters(), model=model, loss=loss, **options)


def train(model, optimizer, criterion=CRITERION, steps=1):
    x, y = data()
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = criterion(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def same(a, b):
    """Whether two nested states are equal, NaN being equal to itself."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a.nan_to_num(1e9), b.nan_to_num(1e9))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b))
    return a == b


@contextlib.contextmanager
def untouched(model, optimizer, *, skipped=0):
    """Parameters and state are the same before and after, up to the count of skipped steps."""
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    yield
    after = (model.state_dict(), optimizer.state_dict())
    before[1]["param_groups"][0]["controller"]["statistics"]["skipped"] += skipped
    for _, state in before, after:  # an empty state of a parameter is no state
        state["state"] = {i: of_one for i, of_one in state["state"].items() if of_one}
    assert same(before, after)


def hooks_of(module):
    return [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]


@pytest.fixture(params=[0, 3], ids=["first step", "later step"])
def steps_before(request):
    return request.param


# At construction.


@pytest.mark.parametrize(
    ("options", "error", "remedy"),
    [
        ({"model": None}, TypeError, r"nothing as model=.*model=model, loss=criterion"),
        ({"loss": None}, TypeError, r"nothing as loss=.*model=model, loss=criterion"),
        ({"model": [nn.Linear(2, 1)]}, TypeError, r"a list as model=, expected the torch.nn.Mod"),
        ({"model": lambda x: x}, TypeError, r"as model=, expected the torch.nn.Module that the"),
        ({"loss": nn.functional.cross_entropy}, TypeError, r"a function as loss=, expected the"),
        ({"loss": nn.L1Loss()}, TypeError, r"L1Loss\(\) is not recognised.*CrossEntropyLoss.*Use"),
        ({"loss": nn.Linear(3, 1)}, TypeError, r"not recognised: expected an instance of Cross"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, ValueError, r"use reduction='mean' or"),
        ({"loss": nn.MSELoss(reduction="none")}, ValueError, r"use reduction='mean' or 'sum'"),
        ({"loss": SoftmaxLoss(reduction="none")}, ValueError, r"use reduction='mean' or 'sum'"),
        (
            {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, -1.0, 1.0]))},
            ValueError,
            "weight has negative entries.*at least 0",
        ),
        ({"params": []}, ValueError, r"empty parameter list.*pass model.parameters\(\)"),
        ({"params": iter(())}, ValueError, r"empty parameter list.*pass model.parameters\(\)"),
        ({"params": [{"params": []}]}, ValueError, r"empty parameter list.*pass model.parameters"),
        ({"params": nn.Parameter(torch.ones(3))}, TypeError, r"Parameter as params.*model.parame"),
        ({"params": {"params": []}}, TypeError, r"dict as params.*pass model.parameters\(\)"),
        ({"params": nn.Linear(4, 5).parameters()}, ValueError, r"\(5, 4\) is not one of.*pass the"),
        ({"direction": "adam"}, ValueError, r"direction='adam', expected one of \['sgd', 'spect"),
        ({"direction": None}, ValueError, "direction=None, expected one of"),
        ({"direction": Spectral}, ValueError, "expected one of .* or a Direction"),
        ({"step_rule": "polyak"}, ValueError, r"step_rule='polyak', expected one of \['constant"),
        ({"step_rule": None}, ValueError, "step_rule=None, expected one of"),
        ({"step_rule": GradientEdge()}, ValueError, "does not go with direction='spectral'; use"),
        ({"step_rule": Edge(), "direction": "sgd"}, ValueError, "with direction='sgd'; use Edge"),
        ({"nesterov": True, "dampening": 0.1}, ValueError, "dampening=0, or pass nesterov=False"),
        ({"maximize": True}, ValueError, "minimize the criterion, or use step_rule='constant'"),
        ({"maximize": True, "direction": "sgd"}, ValueError, "or use step_rule='constant'"),
        ({"data_floor": "entropy"}, ValueError, "data_floor='entropy', expected 'auto' or a num"),
        ({"data_floor": math.nan}, ValueError, "data_floor=nan, expected 'auto' or a finite num"),
        ({"data_floor": math.inf}, ValueError, "data_floor=inf, expected 'auto' or a finite num"),
        ({"data_floor": None}, ValueError, "data_floor=None, expected 'auto' or a finite number"),
        ({"measure_every": 0}, ValueError, "measure_every=0, expected a whole number >= 1"),
        ({"measure_every": 2.5}, ValueError, "measure_every=2.5, expected a whole number >= 1"),
        ({"measure_every": math.inf}, ValueError, "measure_every=inf, expected a whole number"),
        ({"warmup": -1}, ValueError, "warmup=-1, expected a whole number >= 1"),
        ({"warmup": True}, ValueError, "warmup=True, expected a whole number >= 1"),
    ],
)
def test_constructor_refuses(options, error, remedy):
    model, loss = network(), copy.deepcopy(CRITERION)
    before = copy.deepcopy(model.state_dict())
    given = {"params": model.parameters(), "model": model, "loss": loss} | options
    with pytest.raises(error, match=f"(?s){remedy}"):
        ConjSGD(**given)
    assert same(before, model.state_dict())


@pytest.mark.parametrize("options", [{"params": [{"params": []}]}, {"momentum": 2}], ids=str)
def test_a_refusing_constructor_does_not_go_on_watching(options):
    model, loss = network(), copy.deepcopy(CRITERION)
    with pytest.raises(ValueError, match="ConjSGD"):
        ConjSGD(**({"params": model.parameters(), "model": model, "loss": loss} | options))
    gc.collect()
    assert hooks_of(model) + hooks_of(loss) == []


NUMBERS = {  # and a value above their range, if there is one
    "lr": None,
    "momentum": 1.0,
    "weight_decay": None,
    "dampening": 1.5,
    "max_step": None,
    "decay": 1.0,
    "average": 1.0,
    "max_decay": 1.5,
}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name, value)
        for name, above in NUMBERS.items()
        for value in (-0.1, math.nan, math.inf, "much", above)
        if value is not None
    ],
)
def test_constructor_refuses_numbers_out_of_range(name, value):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"{name}={value!r}, expected a finite number >= 0"):
        make(model, nesterov=False, **{name: value})
    if name not in ("decay", "average", "max_decay"):  # those that a group can have of its own
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), name: value}]
        with pytest.raises(ValueError, match=rf"{name}={value!r}, expected a finite number >= 0"):
            ConjSGD(groups, model=model, loss=CRITERION, nesterov=False)
    assert same(before, model.state_dict())


def test_constructor_refuses_a_tensor_of_several_rates():
    with pytest.raises(ValueError, match="expected a finite number >= 0"):
        make(network(), lr=torch.ones(2))


@pytest.mark.parametrize(
    ("rule", "name", "values"),
    [
        (Edge, "s", (0, -1, 2.5, math.nan, math.inf)),
        (Edge, "rho_min", (-0.1, 1.1, math.nan)),
        (Edge, "tau", (0, -1, math.nan, math.inf)),
        (Edge, "tau_alone", (0, -1, math.nan, math.inf)),
        (GradientEdge, "s", (0, -1, 2.5, math.nan, math.inf)),
        (GradientEdge, "tau", (0, -1, math.nan, math.inf)),
        (Spectral, "second_moment_decay", (-0.1, 1, math.nan)),
    ],
)
def test_rules_refuse_numbers_out_of_range(rule, name, values):
    for value in values:
        with pytest.raises(ValueError, match=rf"{rule.__name__}: {name}={value}, expected"):
            rule(**{name: value})


def test_constructor_refuses_complex_parameters():
    model = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(ValueError, match="'weight' is complex, expected real; hold real and imag"):
        make(model, loss=nn.MSELoss())


def test_constructor_refuses_several_devices():
    model = network()
    with pytest.raises(TypeError, match=r"a DataParallel as model=.*train the inner module on one"):
        make(nn.DataParallel(model))


def test_accepts_the_ends_of_the_ranges():
    make(network(), lr=0, momentum=0, weight_decay=0, max_step=0, decay=0, max_decay=0, warmup=1)
    make(network(), step_rule="constant", direction="sgd", maximize=True)
    make(network(), step_rule=Constant())
    make(network(), dampening=0.1, momentum=0)  # Nesterov is ignored at momentum 0, as in torch


# Groups added later.


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"params": nn.Linear(4, 5).parameters()}, "is not one of the parameters of model=Sequen"),
        ({"lr": -1.0}, "lr=-1.0, expected a finite number"),
        ({"weight_decay": None}, "weight_decay=None, expected a finite number"),
        ({"dampening": 0.5}, "pass nesterov=False"),
        ({"maximize": True}, "or use step_rule='constant'"),
    ],
)
def test_add_param_group_refuses(options, remedy):
    model = network()
    optimizer = ConjSGD(model[0].parameters(), model=model, loss=CRITERION)
    train(model, optimizer)
    groups = list(optimizer.param_groups)
    with (
        untouched(model, optimizer),
        pytest.raises(ValueError, match=remedy),
    ):
        optimizer.add_param_group({"params": model[2].parameters()} | options)
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0] is groups[0]
    optimizer.add_param_group({"params": model[2].parameters()})
    train(model, optimizer)


# At a step.


def loss_of(model, kind):
    x, y = data()
    if kind == "NaN input":
        return CRITERION(model(torch.where(x > 1, torch.nan, x)), y)
    if kind == "infinite input":
        return CRITERION(model(x * torch.inf), y)
    if kind == "NaN added to the loss":
        return CRITERION(model(x), y) + torch.nan * model[0].bias.sum()
    if kind == "infinite factor":
        return CRITERION(model(x), y) * torch.inf
    if kind == "infinite loss, finite gradient":
        return CRITERION(Outlier.apply(model(x)), y)
    assert kind == "NaN gradient"
    loss = CRITERION(model(x), y)
    loss.backward()
    model[2].weight.grad[1, 2] = torch.nan
    return None


class Outlier(torch.autograd.Function):
    """Makes the loss of one sample infinite, and leaves the gradient as it is."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        x[0, 1:] = -torch.inf
        x[0, 0] = -torch.inf
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient.nan_to_num(0.0)


NOT_FINITE = [
    "NaN input",
    "infinite input",
    "NaN added to the loss",
    "infinite factor",
    "infinite loss, finite gradient",
    "NaN gradient",
]


@pytest.mark.parametrize(
    "options", [{}, {"direction": "sgd"}, {"average": 0.1, "warmup": 2}], ids=str
)
@pytest.mark.parametrize("kind", NOT_FINITE)
def test_gives_up_a_step_that_is_not_finite(kind, options, steps_before):
    model, twin = network(), network()
    optimizer, other = make(model, **options), make(twin, **options)
    train(model, optimizer, steps=steps_before)
    train(twin, other, steps=steps_before)
    for time in (1, 2):
        optimizer.zero_grad()
        loss = loss_of(model, kind)
        if loss is not None:
            loss.backward()
        warned = pytest.warns(RuntimeWarning, match="gave up a step.*status.*infinities in inputs")
        with untouched(model, optimizer, skipped=1), warned if time == 1 else silence():
            optimizer.step()
        status = optimizer.status()
        assert (status.skipped_steps, status.step) == (time, steps_before)
    with pytest.raises(RuntimeError, match="no training forward"):  # what was seen is forgotten
        optimizer.step()
    # It goes on as if nothing had been.
    train(model, optimizer, steps=2)
    train(twin, other, steps=2)
    assert same(model.state_dict(), twin.state_dict())
    assert optimizer.status().skipped_steps == 2


def silence():
    catching = warnings.catch_warnings()
    stack = contextlib.ExitStack()
    stack.enter_context(catching)
    warnings.simplefilter("error")
    return stack


def test_gives_up_a_constant_step_that_is_not_finite(steps_before):
    model = network()
    optimizer = make(model, direction="sgd", step_rule="constant", lr=0.1)
    train(model, optimizer, steps=steps_before)
    loss_of(model, "NaN input").backward()
    with untouched(model, optimizer, skipped=1), pytest.warns(RuntimeWarning, match="gave up"):
        optimizer.step()
    train(model, optimizer)
    assert optimizer.status().step == steps_before + 1


def test_gives_up_a_step_whose_curvature_is_not_finite():
    """Loss and gradients are finite, the square of the change of the outputs is not."""
    model, criterion = nn.Linear(1, 1), nn.MSELoss()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = make(model, loss=criterion)
    criterion(model(torch.full((4, 1), 3e25)), torch.ones(4, 1)).backward()
    with untouched(model, optimizer, skipped=1), pytest.warns(RuntimeWarning, match="gave up"):
        optimizer.step()


def test_step_without_gradients_does_nothing():
    model = network()
    optimizer = make(model)
    with untouched(model, optimizer):
        optimizer.step()
        optimizer.zero_grad()
        optimizer.step()
        model(data()[0])
        optimizer.step()


def without_forward(model, optimizer):
    for p in model.parameters():
        p.grad = torch.ones_like(p)


def other_module_called(model, optimizer):
    x, y = data()
    twin = copy.deepcopy(model)  # a wrapped or compiled module is another one in the same way
    twin[0].weight, twin[2].weight = model[0].weight, model[2].weight
    CRITERION(twin(x), y).backward()


def shallow_copy_called(model, optimizer):
    x, y = data()
    CRITERION(copy.copy(model)(x), y).backward()  # of the same parameters and hooks


def parts_called(model, optimizer):
    x, y = data()
    CRITERION(model[2](model[1](model[0](x))), y).backward()


def functional_loss(model, optimizer):
    x, y = data()
    nn.functional.cross_entropy(model(x), y).backward()


def other_criterion(model, optimizer):
    x, y = data()
    nn.CrossEntropyLoss()(model(x), y).backward()


def evaluated_only(model, optimizer):
    x, y = data()
    outputs = model(x)
    with torch.no_grad():
        CRITERION(outputs, y)
    nn.functional.cross_entropy(outputs, y).backward()


def value_not_used(model, optimizer):
    x, y = data()
    outputs = model(x)
    CRITERION(outputs, y)
    outputs.square().mean().backward()


def other_output(model, optimizer):
    x, y = data()
    outputs, head = model(x), nn.Linear(4, 3)
    (CRITERION(head(x), y) + outputs.square().mean()).backward()


def forgotten(model, optimizer):
    """The gradients are those of a batch whose observation `zero_grad` has thrown away."""
    x, y = data()
    CRITERION(model(x), y).backward()
    kept = [p.grad for p in model.parameters()]
    optimizer.zero_grad()
    for p, g in zip(model.parameters(), kept):
        p.grad = g


@pytest.mark.parametrize("rule", ["spectral", "sgd"])
@pytest.mark.parametrize(
    ("scenario", "remedy"),
    [
        (without_forward, "no training forward of Sequential was seen.*call the very module"),
        (other_module_called, "no training forward of Sequential was seen.*give that one as model"),
        (shallow_copy_called, "no training forward of Sequential was seen.*call the very module"),
        (parts_called, "no training forward of Sequential was seen.*call the very module"),
        (functional_loss, r"CrossEntropyLoss was not called between.*optimizer.observe\(outputs"),
        (other_criterion, r"CrossEntropyLoss was not called between.*call the very module that"),
        (evaluated_only, r"CrossEntropyLoss was not called between.*optimizer.observe\(outputs"),
        (value_not_used, r"no backward pass went through the value.*call backward\(\) on it.*obse"),
        (other_output, "the model's output was not consumed; give the criterion what the model"),
        (forgotten, "no backward pass went through"),
    ],
)
def test_step_refuses_gradients_that_were_not_observed(scenario, remedy, rule, steps_before):
    model, twin = network(), network()
    optimizer, other = make(model, direction=rule), make(twin, direction=rule)
    train(model, optimizer, steps=steps_before)
    train(twin, other, steps=steps_before)
    optimizer.zero_grad()
    scenario(model, optimizer)
    with untouched(model, optimizer), pytest.raises(RuntimeError, match=f"(?s){remedy}"):
        optimizer.step()
    # The loop, put right, goes on as if nothing had been.
    train(model, optimizer, steps=2)
    train(twin, other, steps=2)
    assert same(model.state_dict(), twin.state_dict())


def test_observe_refuses_outputs_of_unknown_origin():
    model = network()
    optimizer = make(model)
    x, y = data()
    for outputs in (torch.zeros(12, 3), model(x).detach()):
        with pytest.raises(RuntimeError, match=r"after model.* and before backward"):
            optimizer.observe(outputs, y)
    outputs = model(x)
    optimizer.observe(outputs, y)
    nn.functional.cross_entropy(outputs, y).backward()
    optimizer.step()
    assert optimizer.status().step == 1


class Bag(nn.Module):
    def __init__(self, sparse):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(7, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.embedding(tokens).mean(1))


@pytest.mark.parametrize("options", [{}, {"direction": "sgd", "step_rule": "constant"}], ids=str)
def test_step_refuses_sparse_gradients(options):
    model = Bag(sparse=True)
    optimizer = make(model, **options)
    CRITERION(model(torch.tensor([[1, 2], [3, 4]])), torch.tensor([0, 1])).backward()
    with (
        untouched(model, optimizer),
        pytest.raises(RuntimeError, match=r"\(7, 4\) is sparse.*use nn.Embedding.*sparse=False"),
    ):
        optimizer.step()


# A floor that is none.


@pytest.mark.parametrize("options", [{}, {"warmup": 4}, {"direction": "sgd"}], ids=str)
def test_gives_up_a_data_floor_above_the_losses(options):
    model = network()
    optimizer = make(model, data_floor=2.0, **options)
    first = train(model, optimizer, steps=9)
    assert first < 2.0
    assert optimizer.status().step_size == 0  # nothing to gain, says the floor
    with pytest.warns(RuntimeWarning, match="data_floor=2.0.*criterion's units.*data_floor=\"auto"):
        train(model, optimizer)
    train(model, optimizer)  # without another warning
    assert optimizer.status().step_size > 0  # at once
    last = train(model, optimizer, steps=60)
    assert last < first / 2
    assert optimizer.status().loss < 2.0


def test_keeps_a_data_floor_below_the_losses():
    model = network()
    optimizer = make(model, data_floor=0.2)
    loss = train(model, optimizer, steps=1)
    assert optimizer.status().loss == pytest.approx(loss - 0.2, rel=1e-5)


def test_data_floor_is_in_the_units_of_the_criterion():
    """MSELoss averages over the k = 2 elements: l = k / 2 times its value."""
    model, criterion = nn.Linear(3, 2), nn.MSELoss(reduction="sum")
    optimizer = make(model, loss=criterion, data_floor=1.0)
    loss = criterion(model(torch.ones(4, 3)), torch.full((4, 2), 5.0))
    loss.backward()
    optimizer.step()
    assert optimizer.status().loss == pytest.approx((loss.item() - 1.0) / (2 * 4), rel=1e-5)


# States that do not fit.


def broken(state, how):
    if how == "of another optimizer":
        model = network()
        return torch.optim.SGD(model.parameters(), lr=0.1).state_dict()
    if how == "of another version":
        state["param_groups"][0]["controller"]["version"] = 2
    elif how == "without calls":
        del state["param_groups"][0]["controller"]["calls"]
    elif how == "without a statistic":
        del state["param_groups"][0]["controller"]["statistics"]["loss"]
    elif how == "of another number of groups":
        state["param_groups"] *= 2
    elif how == "of another number of parameters":
        state["param_groups"][0]["params"].pop()
    return state


@pytest.mark.parametrize(
    ("how", "remedy"),
    [
        ("of another optimizer", r"load a state that ConjSGD.state_dict\(\) made"),
        ("of another version", "expected the state of a ConjSGD with a 'controller' of version 1"),
        ("without calls", r"the controller lacks \['calls'\]"),
        ("without a statistic", "lacks.*loss"),
        ("of another number of groups", "different number of parameter groups"),
        ("of another number of parameters", "doesn't match the size of optimizer's group"),
    ],
)
def test_load_state_dict_refuses(how, remedy):
    model, other = network(), network()
    optimizer, source = make(model), make(other)
    train(model, optimizer, steps=2)
    train(other, source, steps=5)
    state = broken(copy.deepcopy(source.state_dict()), how)
    with untouched(model, optimizer), pytest.raises(ValueError, match=f"(?s){remedy}"):
        optimizer.load_state_dict(state)


def test_averaged_needs_an_average():
    with (
        pytest.raises(RuntimeError, match=r"keeps no average; make it with average=0\.1"),
        make(network()).averaged(),
    ):
        pass
