"""Thm 2.1 on random networks in float64: `lo ||e||^2 <= ||g||^2 <= hi ||e||^2`, on `V` as well."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.losses import FenchelYoungLoss
from conjopt.measure.energy import per_sample_gradient_norms
from conjopt.measure.structure import extreme_eigenvalues, structure_matrix
from conjopt.potentials import Logistic, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps


def make_model(kind: str, k: int, width: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, and the shape of one sample of its inputs."""
    if kind == "linear":
        return nn.Linear(3, k), (3,)
    if kind == "mlp":
        layers = [nn.Linear(3, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(width, k)), (3,)
    if kind == "convolution":
        layers = [nn.Conv2d(1, width, 2), nn.Tanh(), nn.Flatten()]
        return nn.Sequential(*layers, nn.Linear(6 * width, k)), (1, 3, 4)
    return nn.Sequential(nn.Conv1d(2, width, 2), nn.Tanh(), nn.Conv1d(width, k, 2)), (2, 5)


@dataclasses.dataclass
class Instance:
    model: nn.Module
    potential: Potential
    inputs: Tensor
    targets: Tensor  # points of the domain


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    potential = draw(st.sampled_from([Softmax(), Squared(), Logistic(), Sparsemax()]))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    kinds = st.sampled_from(["linear", "mlp", "convolution", "tokens"])
    model, shape = make_model(draw(kinds), draw(st.integers(1, 5)), draw(st.integers(1, 6)))
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(draw(st.sampled_from([1e-3, 1.0, 1.0, 30.0])))
    for parameter in list(model.parameters())[:-1]:  # one is always trained
        parameter.requires_grad_(draw(st.sampled_from([True, True, False])))
    inputs = torch.randn(draw(st.integers(1, 4)), *shape).double()
    outputs = model(inputs).detach()
    targets = torch.rand_like(outputs)
    if potential.on_simplex:
        hard = nn.functional.one_hot(targets.argmax(1), outputs.shape[1]).movedim(-1, 1).double()
        targets = draw(st.sampled_from([hard, targets / targets.sum(1, keepdim=True)]))
    return Instance(model, potential, inputs, targets)


def sides(instance: Instance) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`lo ||e||^2`, `||g||^2`, `hi ||e||^2` on V, the last on all of R^k, and the rounding."""
    model, inputs = instance.model, instance.inputs
    loss = FenchelYoungLoss(instance.potential)
    outputs = model(inputs)
    (gradient,) = torch.autograd.grad(loss(outputs, instance.targets), outputs)
    e = (len(inputs) * gradient).flatten(1).norm(dim=1)
    energies = per_sample_gradient_norms(model, loss, inputs, instance.targets).square()
    A = structure_matrix(model, inputs)
    on_V = structure_matrix(model, inputs, potential=instance.potential)
    lo, hi = extreme_eigenvalues(on_V)
    _, whole = extreme_eigenvalues(A)
    # e leaves V by rounding, of the size of the predictions and not of e.
    rounding = 64 * EPS * A.diagonal(0, 1, 2).sum(1) * (e.square() + e)
    return lo * e.square(), energies, hi * e.square(), whole * e.square(), rounding


@given(instances())
def test_the_gradient_is_between_the_extreme_eigenvalues_times_the_residual(instance: Instance):
    lower, energies, upper, upper_on_all, rounding = sides(instance)
    assert (lower <= energies + rounding).all()
    assert (energies <= upper + rounding).all()
    assert (upper <= upper_on_all + rounding).all()


@pytest.mark.parametrize("potential", [Softmax(), Squared(), Logistic()], ids=repr)
def test_both_sides_are_attained(potential: Potential):
    """With `dim V = 1` both are the norm itself: a factor of 1 + 1e-9 on either side would fail."""
    torch.manual_seed(0)
    k = 2 if potential.on_simplex else 1
    model, _ = make_model("mlp", k, 5)
    inputs, targets = torch.randn(4, 3).double(), torch.eye(2).repeat(2, 1).double()[:, :k]
    lower, energies, upper, _, _ = sides(Instance(model.double(), potential, inputs, targets))
    torch.testing.assert_close(lower, energies, rtol=1e-12, atol=0)
    torch.testing.assert_close(upper, energies, rtol=1e-12, atol=0)


def test_a_residual_outside_of_the_tangent_space_has_no_such_bound():
    """The condition is needed: along `1` the gradient can vanish, whatever `lo` on `V` is."""

    class Contrasts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            f = self.layer(x)
            return f - f.mean(1, keepdim=True)

    model, inputs = Contrasts().double(), torch.ones(1, 2).double()
    lo, _ = extreme_eigenvalues(structure_matrix(model, inputs, potential=Softmax()))
    assert lo.item() == pytest.approx(3.0)
    J_transposed_one = torch.autograd.grad(model(inputs).sum(), model.layer.weight)[0]
    assert J_transposed_one.norm() < 1e-14
