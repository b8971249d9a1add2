"""`torch.compile` of the model, of the loss and of the step."""

import pytest
import torch
from loop import RULES, any_rule, criterion_of, data, equal, make, network, parameters, train
from torch import nn


@any_rule
def test_a_compiled_model_is_watched_like_any_other(rule):
    model, twin = network(), network()
    compiled = torch.compile(model, backend="eager")
    optimizer, other = make(compiled, **RULES[rule]), make(twin, **RULES[rule])
    train(compiled, optimizer, 3)
    train(twin, other, 3)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


# The compiler itself looks at the gradients of what it goes on with after a break.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def one_step(model, optimizer, criterion, x, y):
    optimizer.zero_grad()
    loss = criterion(model(x), y)
    loss.backward()
    optimizer.step()
    return loss


@any_rule
@pytest.mark.parametrize("what", ["step", "loop body", "loss of model", "module in place"])
def test_whatever_is_compiled_the_run_is_the_same(rule, what):
    """The step itself is left as it is; what surrounds it is compiled in pieces."""
    torch._dynamo.reset()
    model, twin = network(), network()
    options = {"warmup": 2, "measure_every": 4, **RULES[rule]}
    optimizer, other = make(model, **options), make(twin, **options)
    criterion, (x, y) = criterion_of(optimizer), data()
    backend = {"backend": "eager"}
    body, loss_of = one_step, None
    if what == "step":
        optimizer.step = torch.compile(optimizer.step, **backend)
    if what == "loop body":
        body = torch.compile(one_step, **backend)
    if what == "module in place":
        model.compile(**backend)
    if what == "loss of model":
        loss_of = torch.compile(lambda x, y: criterion(model(x), y), **backend)
    for _ in range(6):
        if loss_of is None:
            body(model, optimizer, criterion, x, y)
        else:
            optimizer.zero_grad()
            loss_of(x, y).backward()
            optimizer.step()
        one_step(twin, other, criterion_of(other), x, y)
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())
    torch._dynamo.reset()


def test_a_compiled_loss_module_is_refused_with_the_remedy():
    criterion = torch.compile(nn.CrossEntropyLoss(), backend="eager")
    with pytest.raises(TypeError, match=r"wrapper of torch.compile.*use the loss itself"):
        make(network(), criterion)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # in its own import
@pytest.mark.slow
@any_rule
@pytest.mark.parametrize("what", ["model", "loop body"])
def test_the_default_backend(rule, what):
    """Code of another compiler: the same to rounding, until rounding has grown."""
    torch._dynamo.reset()
    model, twin = network(torch.float64), network(torch.float64)
    options = {"warmup": 2, "measure_every": 4, **RULES[rule]}
    net = torch.compile(model) if what == "model" else model
    optimizer, other = make(net, **options), make(twin, **options)
    body = torch.compile(one_step) if what == "loop body" else one_step
    x, y = data(dtype=torch.float64)
    for _ in range(6):
        body(net, optimizer, criterion_of(optimizer), x, y)
        one_step(twin, other, criterion_of(other), x, y)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)
    torch._dynamo.reset()
