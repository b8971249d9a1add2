"""The strategies of `conjopt.testing`: what they promise and shrink to, and guarantees on them."""

import re

import pytest
import torch
from hypothesis import assume, find, given, settings
from hypothesis import strategies as st
from torch import nn

from conjopt.bounds import risk_sandwich, total_variation_gap
from conjopt.entropy import conditional_entropy, information_loss, risk_decomposition
from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.measure import extreme_eigenvalues, per_sample_gradient_norms, structure_matrix
from conjopt.potentials import Potential, Softmax
from conjopt.testing import (
    Batch,
    Network,
    batches,
    discrete_laws,
    losses,
    networks,
    outputs,
    potentials,
    targets,
)
from conjopt.testing.networks import KINDS
from conjopt.testing.strategies import _LOSSES

EPS = torch.finfo(torch.float64).eps
ONE_TERM = tuple(kind for kind in KINDS if kind != "tokens")


@st.composite
def instances(draw: st.DrawFn, kinds=KINDS, **options) -> tuple[Network, nn.Module, Batch]:
    network = draw(networks(kinds=kinds))
    # One weight for each of k elements does not fit outputs (m, k, tokens).
    loss = draw(losses(k=network.k, **{"one_term": network.kind == "tokens", **options}))
    batch = draw(batches(network, loss))
    assume(
        float(loss(network(batch.inputs), batch.targets).detach()) < 1e100
    )  # its square is finite
    return network, loss, batch


@pytest.mark.parametrize("shape", [(3,), (1, 3), (5, 3), (2, 4, 3)])
@settings(max_examples=20)
@given(st.data())
def test_targets_are_in_the_domain_and_shaped_like_outputs(shape, data):
    potential = data.draw(potentials())
    f = torch.zeros(shape, dtype=torch.float64)
    y = data.draw(targets(potential, f))
    assert y.shape == f.shape
    assert torch.isfinite(potential.loss(y, f)).all()


@settings(max_examples=30)
@given(instances())
def test_networks_losses_and_batches_fit(instance):
    network, loss, (x, y) = instance
    state = torch.get_rng_state()
    again = eval(repr(network), {"Network": Network})
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(again(x), network(x))
    outputs = network(x)
    assert outputs.shape == (len(x), *network.outputs)
    assert outputs.dtype == torch.float64
    value, view = loss(outputs, y), potential_of(loss)
    assert value.isfinite()
    weights, points = view.weights(outputs, y), view.points(outputs, y)
    assert weights.sum() == pytest.approx(1)
    assert view.potential.contains(points).all()


@settings(max_examples=30)
@given(instances(kinds=KINDS))
def test_thm_2_1(instance):
    network, loss, (x, y) = instance
    outputs = network(x)
    (pulled,) = torch.autograd.grad(loss(outputs, y), outputs)
    factor = 1 if loss.reduction == "sum" else len(x)
    e = (factor * pulled).flatten(1).norm(dim=1)
    energies = per_sample_gradient_norms(network, loss, x, y).square()
    A = structure_matrix(network, x, potential=potential_of(loss).potential)
    lo, hi = extreme_eigenvalues(A)
    whole = structure_matrix(network, x).diagonal(0, 1, 2).sum(1)
    rounding = 1e4 * EPS * whole * (e.square() + factor * e)
    assert (lo * e.square() <= energies + rounding).all()
    assert (energies <= hi * e.square() + rounding).all()


@settings(max_examples=30)
@given(instances(kinds=ONE_TERM, one_term=True))
def test_thm_2_3(instance):
    network, loss, (x, y) = instance
    found = risk_sandwich(network, loss, x, y)
    counts = found.weights > 0
    rounding = (1e-9 * (1 + found.losses) + 1e4 * EPS * found.losses.clamp(max=30).exp())[counts]
    assert (found.lower[counts] <= found.losses[counts] + rounding).all()
    assert (found.losses[counts] <= found.upper[counts] + rounding).all()
    view, outputs = potential_of(loss), network(x).detach()
    value = view.scale(outputs, y) * found.mean().losses + view.offset(outputs, y)
    size = 1 + value.abs() + view.scale(outputs, y) * outputs.abs().max()
    assert (value - loss(outputs, y)).abs() <= 1e-9 * size


@settings(max_examples=100)
@given(discrete_laws(), st.integers(0, 99))
def test_thm_1_3_and_1_4(law, seed):
    generator = torch.Generator().manual_seed(seed)
    k = law.targets.shape[1]
    table = torch.randn(4, k, generator=generator, dtype=torch.float64)
    parts = risk_decomposition(
        table[law.groups], law.targets, law.groups, law.potential, weights=law.weights
    )
    size = float(1 + law.targets.abs().max() + law.targets.square().max())
    assert abs(parts.risk - parts.floor - parts.excess) <= 1e-10 * size
    fine, coarse = (
        conditional_entropy(law.targets, groups, law.potential, weights=law.weights)
        for groups in (law.groups, law.coarser)
    )
    lost = information_loss(
        law.targets, law.groups, law.coarser, law.potential, weights=law.weights
    )
    assert abs(coarse - fine - lost) <= 1e-10 * size
    assert lost >= 0


@given(discrete_laws(Softmax(), k=3), st.integers(1, 5))
def test_thm_4_2_on_laws_with_cells_of_probability_0(law, seed):
    generator = torch.Generator().manual_seed(seed)
    n = len(law.weights)
    counts = torch.bincount(
        torch.multinomial(law.weights, 7, replacement=True, generator=generator), minlength=n
    )
    gap = total_variation_gap(law.weights, counts.double() / 7, max_loss=2.0)
    assert gap == pytest.approx(float((law.weights - counts.double() / 7).abs().sum()), abs=1e-12)


def test_the_simplest():
    assert repr(find(networks(), lambda network: True)) == "Network('linear')"
    loss = find(losses(k=3), lambda loss: True)
    assert isinstance(loss, nn.CrossEntropyLoss)
    assert (loss.reduction, loss.label_smoothing, loss.weight) == ("mean", 0.0, None)
    batch = find(batches(Network("mlp", k=2), loss), lambda batch: True)
    assert torch.equal(batch.inputs, torch.ones(1, 3).double())
    assert torch.equal(batch.targets, torch.tensor([0]))
    law = find(discrete_laws(Softmax()), lambda law: True)
    assert (law.targets.tolist(), law.weights.tolist()) == ([[1.0]], [1.0])
    deep = find(networks(), lambda network: network.depth == 2 and network.norm == "batch")
    assert repr(deep) == "Network('mlp', depth=2, norm='batch')"


@pytest.mark.parametrize("kind", KINDS)
def test_kinds(kind: str):
    @settings(max_examples=5)
    @given(networks(kinds=[kind], k=2))
    def drawn(network):
        assert network.kind == kind
        assert network.k == 2

    drawn()


@pytest.mark.parametrize("name", _LOSSES)
def test_every_loss_and_kind_of_targets(name: str):
    loss = find(losses(kinds=(name,), k=3), lambda loss: loss.reduction == "sum")
    assert type(loss).__name__ == name
    weighted = getattr(loss, "weight", None) is not None
    assert not weighted
    if name not in ("MSELoss", "PoissonNLLLoss"):
        found = find(losses(kinds=(name,), k=3), lambda loss: loss.weight is not None)
        assert found.weight.shape == (3,)
    network = Network("linear", k=3)
    soft = find(
        batches(network, loss),
        lambda batch: batch.targets.is_floating_point() and bool((batch.targets % 1 != 0).all()),
    )
    assert soft.targets.shape == (1, 3)


def test_what_atoms_laws_have():
    def vertices(law):
        return len(law.weights) > 2 and bool(((law.targets == 0) | (law.targets == 1)).all())

    assert find(discrete_laws(Softmax(), k=3), vertices).targets.sum() == 3
    assert (find(discrete_laws(), lambda law: (law.weights == 0).any()).weights == 0).sum() == 1
    uniform = find(discrete_laws(), lambda law: len(law.weights) > 1 and law.weights.max() == 0.5)
    assert uniform.weights.tolist() == [0.5, 0.5]
    inside = find(discrete_laws(Softmax(), k=2), lambda law: bool((law.targets % 1 > 0).any()))
    assert inside.targets.shape == (1, 2)


class Halved(Potential):
    """Of a user's own, off the simplex."""

    def value(self, y):
        return y.square().sum(-1)

    def conjugate(self, f):
        return f.square().sum(-1) / 4


def test_a_potential_of_ones_own():
    loss = FenchelYoungLoss(Halved())

    @given(batches((4,), loss, outputs=(2,)))
    @settings(max_examples=20)
    def fits(batch):
        assert batch.inputs.shape[1:] == (4,)
        assert batch.targets.shape == (len(batch.inputs), 2)

    fits()
    with pytest.raises(ValueError, match=r"the shape \(4,\) of inputs, which needs outputs="):
        find(batches((4,), loss), lambda batch: True)


@pytest.mark.parametrize(
    ("strategy", "named"),
    [
        (outputs(k=0), "k=0"),
        (outputs(largest=1e-4), "largest=0.0001"),
        (outputs(largest=float("nan")), "largest=nan"),
        (outputs(largest=float("inf")), "largest=inf"),
        (losses(k=0), "k=0"),
        (losses(kinds=()), "CrossEntropyLoss"),
        (losses(kinds=("L1Loss",)), "L1Loss"),
        (losses(kinds=("PoissonLoss",), smooth=True), "Poisson"),
        (batches((3,), nn.CrossEntropyLoss(), outputs=(2,), max_samples=0), "max_samples=0"),
        (batches((3,), nn.CrossEntropyLoss()), "outputs="),
        (discrete_laws(k=0), "k=0"),
        (discrete_laws(max_atoms=0), "max_atoms=0"),
        (networks(k=0), "k=0"),
        (networks(kinds="mlp"), "kinds='mlp'"),
        (networks(kinds=[]), "kinds=[]"),
        (networks(kinds=["mlp", "other"]), "kinds=['mlp', 'other']"),
        (losses(k="a"), "k='a'"),
        (targets(Softmax(), 3), "f=3"),
    ],
)
def test_options_out_of_range_are_refused(strategy, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        find(strategy, lambda _: True)
