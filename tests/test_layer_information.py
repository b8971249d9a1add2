"""`Ent(Y|Z)` along layers: exact on discrete networks, which layers are seen, and bad input."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from conjopt.entropy import (
    conditional_entropy,
    data_floor,
    information_loss,
    kernel_conditional_entropy,
    quantized_conditional_entropy,
)
from conjopt.measure import layer_information_loss
from conjopt.potentials import Softmax, Squared

EPS = torch.finfo(torch.float64).eps


class Table(nn.Module):
    """A map of whole numbers, one column."""

    def __init__(self, image):
        super().__init__()
        self.image = image

    def forward(self, x):
        return self.image[x.long()]


@settings(max_examples=40)
@given(
    st.integers(1, 40),
    st.lists(st.integers(1, 8), min_size=1, max_size=5),
    st.sampled_from([Softmax(), Squared()]),
    st.integers(1, 50),
    st.integers(0, 2**32),
)
def test_losses_of_a_discrete_chain_are_exact_and_add_up(n, widths, potential, batch_size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(8, (n, 1), generator=generator).double()
    y = torch.randint(3, (n,), generator=generator)
    targets = y if potential == Softmax() else torch.randn(3, 2, generator=generator)[y]
    maps, z, states = [], x, [x]
    for width in widths:
        maps.append(Table(torch.randint(width, (8,), generator=generator).double()))
        z = maps[-1](z)
        states.append(z)
    found = layer_information_loss(
        nn.Sequential(*maps), x, targets, potential=potential, method="exact", batch_size=batch_size
    )
    assert found.layers == ["inputs", *map(str, range(len(maps)))]
    assert (found.losses >= -64 * EPS * 10).all()
    for i, (before, after) in enumerate(itertools.pairwise(states)):
        link = information_loss(targets, before, after, potential)
        assert (found.losses[i] - link).abs() <= 64 * EPS * 10
    whole = information_loss(targets, x, states[-1], potential)
    assert (found.losses.sum() - whole).abs() <= 64 * EPS * 10
    assert found.entropies[0] == data_floor(x, targets, potential)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(6, 3)
    ).eval()


@pytest.fixture
def sample():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 4, generator=generator)
    return x, x[:, :3].argmax(1)


def test_each_layer_is_estimated_from_what_it_returned(network, sample):
    x, y = sample
    found = layer_information_loss(network, x, y, potential=Softmax(), batch_size=7)
    z = [x]
    for layer in network:
        z.append(layer(z[-1].clone()).detach().clone())
    torch.testing.assert_close(found.losses, found.entropies.diff())
    plug_in = layer_information_loss(network, x, y, potential=Softmax(), form="plug-in")
    for form, values in (("cross-entropy", found.entropies), ("plug-in", plug_in.entropies)):
        expected = torch.stack([kernel_conditional_entropy(v, y, Softmax(), form=form) for v in z])
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)  # float32 layers

    rough = layer_information_loss(
        network, x, y, ["4"], potential=Softmax(), method="quantized", quantum=2.0
    )
    logits = z[-1].double()
    u = (logits - logits.mean(0)) / (logits - logits.mean(0)).square().mean().sqrt()
    expected = quantized_conditional_entropy(u, y, Softmax(), quantum=2.0)
    assert rough.layers == ["inputs", "4"]
    assert rough.method == "quantized"
    assert (rough.entropies[1] - expected).abs() < 1e-12


def test_the_model_is_left_as_it_was(network, sample):
    x, y = sample
    network.train()
    before = copy.deepcopy(network.state_dict())
    state = torch.get_rng_state()
    layer_information_loss(network, x, y, potential=Softmax())
    assert all(torch.equal(v, before[name]) for name, v in network.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    assert all(p.grad is None for p in network.parameters())
    with pytest.raises(ValueError, match="layers"):
        layer_information_loss(network, x, y, ["nose"], potential=Softmax())
    assert not any(module._forward_hooks for module in network.modules())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)
        self.tuple = nn.LSTM(3, 2, batch_first=True)
        self.reads = nn.Embedding(5, 3)

    def forward(self, a, index, scale=1.0):
        state, _ = self.tuple(self.reads(index))
        return self.shared(self.shared(a)) * scale + state[:, -1].sum(1, keepdim=True)


def test_several_arguments_and_layers_that_return_tuples():
    torch.manual_seed(0)
    model = Two()
    inputs = {"a": torch.randn(10, 3), "index": torch.arange(20).reshape(10, 2) % 5, "scale": 2.0}
    y = torch.arange(10) % 2
    found = layer_information_loss(
        model, inputs, y, ["tuple", ""], potential=Softmax(), batch_size=4
    )
    assert found.layers == ["inputs", "tuple", ""]
    outputs = model(**inputs).detach()
    expected = kernel_conditional_entropy(outputs, y, Softmax(), form="cross-entropy")
    assert (found.entropies[2] - expected).abs() < 1e-4
    for name, message in (("shared", "more than once"), ("unused", "did not call")):
        with pytest.raises(ValueError, match=message):
            layer_information_loss(model, inputs, y, [name], potential=Softmax())
    exact = layer_information_loss(model, inputs, y, ["reads"], potential=Softmax(), method="exact")
    rows = torch.cat([inputs["a"], inputs["index"].float()], 1)
    assert exact.entropies[0] == conditional_entropy(y, rows, Softmax())


def test_bad_input(network, sample):
    x, y = sample
    with pytest.raises(ValueError, match="method='best'"):
        layer_information_loss(network, x, y, potential=Softmax(), method="best")
    with pytest.raises(ValueError, match="batch_size=0"):
        layer_information_loss(network, x, y, potential=Softmax(), batch_size=0)
    with pytest.raises(ValueError, match="has 59 rows"):
        layer_information_loss(network, x, y[:-1], potential=Softmax())
    with pytest.raises(ValueError, match=r"layer 'inputs': .*two at least"):
        layer_information_loss(network, x[:1], y[:1], potential=Softmax())
    x = x.clone()
    x[3] = math.nan
    with pytest.raises(ValueError, match=r"layer 'inputs': outputs\[3\]"):
        layer_information_loss(network, x, y, potential=Softmax())
    with pytest.raises(ValueError, match="samples along dimension 0"):
        layer_information_loss(nn.Sequential(nn.Flatten(0)), sample[0], y, potential=Softmax())
    with pytest.raises(TypeError, match="floating-point tensor"):
        layer_information_loss(
            nn.Sequential(Table(torch.arange(3))), sample[1], y, potential=Softmax()
        )
    with pytest.raises(ValueError, match="expected one for each"):
        layer_information_loss(network, sample[0][:0], y[:0], potential=Softmax())
