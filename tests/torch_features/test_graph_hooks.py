"""Hooks on the graph and on all modules, and modes around the loop."""

import contextlib

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    make,
    network,
    parameters,
    train,
)
from torch import nn
from torch.autograd.graph import register_multi_grad_hook, save_on_cpu, saved_tensors_hooks
from torch.nn.modules import module as global_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from conjopt import bounds, diagnose, measure
from conjopt.potentials import Softmax

OPTIONS = {"warmup": 3, "measure_every": 4}


@contextlib.contextmanager
def handles(*registered):
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def on_all_gradients(model, seen):
    return handles(
        register_multi_grad_hook(list(model.parameters()), lambda gradients: seen.append(gradients))
    )


def on_any_gradient(model, seen):
    some = list(model.parameters())[:2]
    return handles(register_multi_grad_hook(some, lambda gradient: seen.append(1), mode="any"))


def on_activations(model, seen):
    """All activations of a forward, those of the measurements included."""
    kept = []

    def forward(module, args, output):
        if output.requires_grad:
            kept.append(output)

    def after(module, args, output):
        if kept:
            register_multi_grad_hook(tuple(kept), lambda gradients: seen.append(len(gradients)))
        kept.clear()

    inner = [layer.register_forward_hook(forward) for layer in model]
    return handles(*inner, model.register_forward_hook(after, always_call=True))


def on_nodes(model, seen):
    def forward(module, args, output):
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda gradients: seen.append("before"))
            output.grad_fn.register_hook(lambda inputs, outputs: seen.append("after"))
            output.retain_grad()

    return handles(*(m.register_forward_hook(forward, prepend=True) for m in model.modules()))


def on_all_modules(model, seen):
    return handles(
        global_hooks.register_module_forward_pre_hook(lambda *_: seen.append("before")),
        global_hooks.register_module_forward_hook(lambda *_: seen.append("after")),
        global_hooks.register_module_full_backward_pre_hook(lambda *_: seen.append("to")),
        global_hooks.register_module_full_backward_hook(lambda *_: seen.append("from")),
    )


def on_saved_tensors(model, seen):
    def pack(tensor):
        seen.append(tensor.shape)
        return tensor

    return saved_tensors_hooks(pack, lambda tensor: tensor)


def saved_elsewhere(model, seen):
    seen.append(1)
    return save_on_cpu()


def anomalies(model, seen):
    seen.append(1)
    return torch.autograd.detect_anomaly(check_nan=True)


class Names(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def every_operation(model, seen):
    return Names(seen)


def flops(model, seen):
    seen.append(1)
    return FlopCounterMode(display=False)


LOOKS = [
    on_all_gradients,
    on_any_gradient,
    on_activations,
    on_nodes,
    on_all_modules,
    on_saved_tensors,
    saved_elsewhere,
    anomalies,
    every_operation,
    flops,
]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@any_rule
@pytest.mark.parametrize("look", LOOKS)
def test_who_looks_changes_nothing(look, rule):
    model, twin, seen = network(), network(), []
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    with look(model, seen):
        train(model, optimizer, 8)
    train(twin, other, 8)
    assert seen
    assert equal(parameters(model), parameters(twin))
    assert str(optimizer.status()) == str(other.status())


@any_rule
@pytest.mark.parametrize("mode", ["all", "any"])
def test_a_hook_on_several_gradients_sees_those_of_the_loop(mode, rule):
    """Once a backward pass of the loop; `.grad` is what it saw."""
    model, seen, in_loop = network(), [], False
    optimizer = make(model, **OPTIONS, **RULES[rule])
    register_multi_grad_hook(
        list(model.parameters()), lambda found: seen.append(found) if in_loop else None, mode=mode
    )
    for step in range(6):
        in_loop = True
        backward(model, optimizer, step)
        in_loop = False
        (found,) = seen
        if mode == "all":
            assert equal(found, [p.grad for p in model.parameters()])
        optimizer.step()
        seen.clear()


def test_a_step_in_a_hook_on_all_gradients_is_refused_where_it_measures():
    model = network()
    optimizer = make(model)
    register_multi_grad_hook(list(model.parameters()), lambda gradients: optimizer.step())
    before = parameters(model)
    with pytest.raises(RuntimeError, match="inside a backward pass"):
        criterion_of(optimizer)(model(data()[0]), data()[1]).backward()
    assert equal(before, parameters(model))


@any_rule
def test_gradients_that_a_node_changes_are_those_of_the_model(rule):
    """A hook on the node of an activation is part of the function, in measurements as well."""
    model, twin = network(torch.float64), network(torch.float64)

    def halved(module, args, output):
        if output.grad_fn is not None:
            output.grad_fn.register_prehook(lambda gradients: (gradients[0] / 2,))

    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.clone()

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 2

        @staticmethod
        def jvp(ctx, tangent):
            return tangent.clone()

    class Half(nn.Module):
        def forward(self, x):
            return Halved.apply(x)

    model[3].register_forward_hook(halved)
    twin = nn.Sequential(*twin[:4], Half(), *twin[4:])
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    train(model, optimizer, 8)
    train(twin, other, 8)
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


MEASUREMENTS = {
    "per_sample_gradient_norms": lambda m, c, x, y: measure.per_sample_gradient_norms(m, c, x, y),
    "structure_matrix": lambda m, c, x, y: measure.structure_matrix(m, x),
    "batch_structure_matrix": lambda m, c, x, y: measure.batch_structure_matrix(m, x),
    "curvature_along": lambda m, c, x, y: measure.curvature_along(
        m, Softmax(), x, {name: torch.ones_like(p) for name, p in m.named_parameters()}
    ),
    "top_curvature": lambda m, c, x, y: measure.top_curvature(m, Softmax(), x).value,
    "top_structure": lambda m, c, x, y: measure.top_structure(m, x).value,
    "gradient_noise": lambda m, c, x, y: measure.gradient_noise(m, c, x, y).noise,
    "self_check": lambda m, c, x, y: measure.self_check(m, c, x, y),
    "risk_sandwich": lambda m, c, x, y: bounds.risk_sandwich(m, c, x, y).lower,
    "pl_bound": lambda m, c, x, y: bounds.pl_bound(m, c, x, y).gradient_square,
    "diagnose": lambda m, c, x, y: str(diagnose(m, c, [(x, y)])),
}


@pytest.mark.parametrize("mode", ["all", "any"])
@pytest.mark.parametrize("name", MEASUREMENTS)
def test_measurements_leave_hooks_on_several_gradients_alone(name, mode):
    def measured(hooked):
        model, seen = network(), []
        x, y = data(12)
        if hooked:
            register_multi_grad_hook(list(model.parameters()), seen.append, mode=mode)
        found = MEASUREMENTS[name](model, nn.CrossEntropyLoss(), x, y)
        assert not seen
        nn.CrossEntropyLoss()(model(x), y).backward()
        assert len(seen) == hooked
        return found

    expected, found = measured(False), measured(True)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected
