"""Thm 2.4 on random networks in float64: the batch gradient as a form in `K_B`, and its bounds."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.losses import FenchelYoungLoss
from conjopt.measure.structure import batch_structure_matrix, extreme_eigenvalues, tangent_basis
from conjopt.potentials import Logistic, Potential, Softmax, Squared

EPS = torch.finfo(torch.float64).eps
POTENTIALS = [Softmax(), Squared(), Logistic()]


def make_model(kind: str, k: int, width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, and the shape of one sample of its inputs."""
    if kind == "mlp":
        return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, k)), (3,)
    if kind == "convolution":
        layers = [nn.Conv2d(1, width, 2), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(6 * width, k)), (1, 3, 4)
    return nn.Sequential(nn.Conv1d(2, width, 2), nn.Tanh(), nn.Conv1d(width, k, 2)), (2, 4)


@dataclasses.dataclass
class Instance:
    model: nn.Module
    potential: Potential
    inputs: Tensor
    targets: Tensor  # points of the domain


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    potential = draw(st.sampled_from(POTENTIALS))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kind = draw(st.sampled_from(["mlp", "convolution", "tokens"]))
    model, shape = make_model(kind, draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(draw(st.sampled_from([1e-3, 1.0, 1.0, 30.0])))
    inputs = torch.randn(draw(st.integers(1, 5)), *shape).double()
    targets = torch.rand_like(model(inputs))
    if potential.on_simplex:
        targets = targets / targets.sum(1, keepdim=True)
    return Instance(model, potential, inputs, targets.detach())


@dataclasses.dataclass
class Measured:
    K: Tensor  # on all of R^k
    on_V: Tensor
    e: Tensor  # (m, k)
    squared_norm: Tensor  # of g_B
    rounding: Tensor


def measure(instance: Instance) -> Measured:
    model, inputs, m = instance.model, instance.inputs, len(instance.inputs)
    outputs = model(inputs)
    value = FenchelYoungLoss(instance.potential)(outputs, instance.targets)
    (residuals,) = torch.autograd.grad(value, outputs, retain_graph=True)
    gradients = torch.autograd.grad(value, list(model.parameters()))
    K = batch_structure_matrix(model, inputs)
    e = (m * residuals).flatten(1)
    # e leaves V by rounding, of the size of the predictions and not of e.
    rounding = 64 * EPS * K.trace() * (e.square().sum() + e.norm()) / m**2
    return Measured(
        K,
        batch_structure_matrix(model, inputs, potential=instance.potential),
        e,
        sum((g.square().sum() for g in gradients), torch.zeros(()).double()),
        rounding,
    )


@given(instances())
def test_the_gradient_is_a_form_in_the_residuals(instance: Instance):
    found, m = measure(instance), len(instance.inputs)
    e_B = found.e.flatten()
    assert (e_B @ found.K @ e_B / m**2 - found.squared_norm).abs() <= found.rounding
    basis = tangent_basis(instance.model(instance.inputs).shape[1:], instance.potential)
    e_V = (found.e @ basis.T).flatten()  # the coordinates of e_B on V^m
    assert (e_V @ found.on_V @ e_V / m**2 - found.squared_norm).abs() <= found.rounding


@given(instances())
def test_the_gradient_is_between_the_extreme_eigenvalues_times_the_residuals(instance: Instance):
    found, m = measure(instance), len(instance.inputs)
    mean = found.e.square().sum(1).mean()
    for K in (found.on_V,) if instance.potential.on_simplex else (found.on_V, found.K):
        lo, hi = extreme_eigenvalues(K)
        assert lo / m * mean <= found.squared_norm + found.rounding
        assert found.squared_norm <= hi / m * mean + found.rounding


@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
def test_both_sides_are_attained(potential: Potential):
    """With `m dim V = 1` both are the norm itself: another constant on either side would fail."""
    torch.manual_seed(0)
    k = 2 if potential.on_simplex else 1
    model, _ = make_model("mlp", k, 5)
    targets = torch.tensor([[1.0, 0.0]]).double()[:, :k]
    found = measure(Instance(model.double(), potential, torch.randn(1, 3).double(), targets))
    for side in extreme_eigenvalues(found.on_V):
        bound = side * found.e.square().sum()
        torch.testing.assert_close(bound, found.squared_norm, rtol=1e-12, atol=0)


def test_the_upper_side_is_attained_by_equal_samples():
    """For `m` copies of one sample `||g_B||^2 = hi(K_B) / m mean ||e||^2`: the `1 / m` is right."""
    torch.manual_seed(0)
    model, _ = make_model("mlp", 1, 5)
    inputs, targets = torch.randn(1, 3).double().expand(6, -1), torch.zeros(6, 1).double()
    found = measure(Instance(model.double(), Squared(), inputs, targets))
    _, hi = extreme_eigenvalues(found.on_V)
    bound = hi / 6 * found.e.square().sum(1).mean()
    torch.testing.assert_close(bound, found.squared_norm, rtol=1e-12, atol=0)


@given(instances(), st.integers(0, 4))
def test_equal_inputs_make_it_singular(instance: Instance, which: int):
    copied = instance.inputs[which % len(instance.inputs)]
    inputs = torch.cat([instance.inputs, copied[None]])
    K = batch_structure_matrix(instance.model, inputs, potential=instance.potential)
    lo, _ = extreme_eigenvalues(K)
    assert lo <= 64 * EPS * K.trace()


@given(
    st.sampled_from([None, Softmax()]), st.integers(1, 4), st.integers(1, 8), st.integers(0, 2**32)
)
def test_it_takes_as_many_parameters_as_residuals(
    potential: Potential | None, k: int, m: int, seed: int
):
    torch.manual_seed(seed)
    model = nn.Linear(2, k).double()
    K = batch_structure_matrix(model, torch.randn(m, 2).double(), potential=potential)
    d = k - (potential is not None)
    parameters = 3 * k
    lo, hi = extreme_eigenvalues(K)
    assert K.shape == (m * d, m * d)
    if m * d > parameters:
        assert lo <= 64 * EPS * K.trace()
    if m <= 3 and d:  # and here so many are enough: inputs in general position
        assert lo > 0
        assert hi < math.inf
