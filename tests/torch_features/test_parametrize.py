"""`torch.nn.utils.parametrize` and `torch.nn.utils.prune`, put on before or on the way."""

import pytest
import torch
from loop import RULES, any_rule, criterion_of, data, equal, make, network, parameters, train
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

OPTIONS = {"warmup": 3, "measure_every": 4}


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


class Plain(nn.Module):
    """What `Symmetric` on a linear layer is, written out."""

    def __init__(self, layer):
        super().__init__()
        self.bias = nn.Parameter(layer.bias.detach().clone())
        self.weight = nn.Parameter(layer.weight.detach().clone())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.triu() + self.weight.triu(1).T, self.bias)


def square():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))


@any_rule
def test_a_parametrized_layer_is_the_layer_written_out(rule):
    model, twin = square(), square()
    twin[0] = Plain(twin[0])
    parametrize.register_parametrization(model[0], "weight", Symmetric(), unsafe=True)
    with torch.no_grad():  # registration replaces the weight by what the parametrization makes
        model[0].parametrizations.weight.original.copy_(twin[0].weight)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    train(model, optimizer, 8)
    train(twin, other, 8)
    assert torch.equal(model[0].parametrizations.weight.original, twin[0].weight)
    assert torch.equal(model[2].weight, twin[2].weight)
    assert torch.equal(model[0].weight, model[0].weight.T)


NORMS = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    # Not "householder", whose diagonal holds signs that nothing but a zero gradient keeps: a
    # direction that mixes the entries of a matrix moves them.
    "orthogonal": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
}


@any_rule
@pytest.mark.parametrize("norm", NORMS)
def test_torchs_own_parametrizations_train(norm, rule):
    model = network()
    for i in (0, 3):
        NORMS[norm](model[i])
    options = {**OPTIONS, "weight_decay": 0.0, **RULES[rule]}
    optimizer = make(model, **options)
    x, y = data()
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = criterion_of(optimizer)(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    status = optimizer.status()
    assert (status.step, status.skipped_steps) == (40, 0)
    if norm == "orthogonal":
        gram = model[0].weight.T @ model[0].weight
        torch.testing.assert_close(gram, torch.eye(4), rtol=0, atol=1e-4)


@any_rule
def test_cached_parametrizations(rule):
    """One evaluation for several uses in a forward, as `parametrize.cached` gives."""
    model, twin = square(), square()
    for net in (model, twin):
        parametrize.register_parametrization(net[0], "weight", Symmetric(), unsafe=True)
    optimizer, other = make(model, **OPTIONS, **RULES[rule]), make(twin, **OPTIONS, **RULES[rule])
    for step in range(5):
        with parametrize.cached():
            train(model, optimizer, 1, step)
        train(twin, other, 1, step)
    assert equal(parameters(model), parameters(twin))


@any_rule
def test_pruned_entries_have_no_part_in_the_loss(rule):
    """Pruning makes another parameter of the weight, so it comes before the optimizer."""
    model = network()
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    prune.random_structured(model[3], "weight", amount=2, dim=0)
    optimizer = make(model, **OPTIONS, **{"weight_decay": 0.0, **RULES[rule]})
    masks = [model[i].weight_mask.clone() for i in (0, 3)]
    before = parameters(model)
    train(model, optimizer, 8)
    x, y = data()
    assert criterion_of(optimizer)(model(x), y).isfinite()
    for i, mask in zip((0, 3), masks):
        assert torch.equal(model[i].weight_mask, mask)
        assert torch.equal(model[i].weight == 0, mask == 0)
    assert not any(torch.equal(p, q) for p, q in zip(before, model.parameters()))
    if rule.startswith("sgd"):  # a gradient of zero moves nothing
        for i, mask in zip((0, 3), masks):
            kept = dict(zip([n for n, _ in model.named_parameters()], before))
            old = kept[f"{i}.weight_orig"]
            assert torch.equal(model[i].weight_orig[mask == 0], old[mask == 0])


@any_rule
def test_parameters_replaced_on_the_way_are_new_ones(rule):
    """As for any optimizer: give it the new ones. The rest goes on."""
    model = network()
    optimizer = make(model, **OPTIONS, **RULES[rule])
    train(model, optimizer, 2)
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    fresh = make(model, **OPTIONS, **RULES[rule])
    train(model, fresh, 3)
    assert fresh.status().step == 3
