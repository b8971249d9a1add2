"""Thm 2.6 on random instances in float64: ``u^T GGN u`` is what forward mode says, and bounded.

So is the greatest eigenvalue: ``hi(GGN) <= beta hi(K_B) / m``, on all outputs and on ``V^m``.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt.measure import curvature_along
from conjopt.measure.spectrum import top_curvature, top_structure
from conjopt.potentials import Logistic, Potential, Softmax, Squared

POTENTIALS = [Softmax(), Squared(), Logistic()]


class Flat(nn.Module):
    """(N, d) to (N,): one output for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).squeeze(1)


def make_model(layout: str, k: int) -> tuple[nn.Module, tuple[int, ...]]:
    """A model of the layout, and the shape of one sample of its inputs."""
    if layout == "(N,)":
        return Flat(), (3,)
    if layout == "(N,C)":
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, k)), (3,)
    if layout == "(N,C,d1)":
        return nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Conv1d(3, k, 2)), (2, 5)
    return nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Conv2d(3, k, 2)), (1, 4, 3)


@dataclasses.dataclass
class Instance:
    model: nn.Module
    potential: Potential
    inputs: Tensor
    direction: dict[str, Tensor]


@st.composite
def instances(draw: st.DrawFn) -> Instance:
    potential = draw(st.sampled_from(POTENTIALS))
    layouts = ["(N,C)", "(N,C,d1)", "(N,C,d1,d2)"] + ["(N,)"] * (not potential.on_simplex)
    torch.manual_seed(draw(st.integers(0, 2**32)))
    model, shape = make_model(draw(st.sampled_from(layouts)), draw(st.integers(1, 4)))
    model.double()
    scale = draw(st.sampled_from([1e-3, 1.0, 1.0, 30.0]))  # the last saturates the link
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    inputs = torch.randn(draw(st.integers(1, 4)), *shape).double()
    length = draw(st.sampled_from([1e-4, 1.0, 1e4]))
    direction = {n: length * torch.randn_like(p) for n, p in model.named_parameters()}
    kept = draw(st.sets(st.sampled_from(sorted(direction)), min_size=1))
    return Instance(model, potential, inputs, {n: u for n, u in direction.items() if n in kept})


def by_rows(outputs: Tensor, potential: Potential) -> Tensor:
    """Outputs as (m, k): torch's classes at dimension 1, or all that a sample has."""
    if potential.on_simplex:
        return outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
    return outputs.reshape(len(outputs), -1)


def dense(instance: Instance) -> tuple[Tensor, Tensor, Tensor]:
    """J: (m, k, P) in the moved parameters, H: (m, k, k), u: (P,); by reverse mode alone."""
    moved = {n: p.detach() for n, p in instance.model.named_parameters() if n in instance.direction}

    def run(parameters: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(instance.model, parameters, instance.inputs)
        return by_rows(outputs, instance.potential)

    jacobians = torch.func.jacrev(run)(moved)
    J = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
    outputs = run(moved).detach()

    def gradient(f: Tensor) -> Tensor:
        return torch.func.grad(lambda f: instance.potential.conjugate(f))(f)

    H = torch.func.vmap(torch.func.jacrev(gradient))(outputs)
    u = torch.cat([instance.direction[name].flatten() for name in moved])
    return J, H, u


@settings(deadline=None, max_examples=60)
@given(instances())
def test_curvature_is_the_generalised_gauss_newton_form(instance: Instance):
    J, H, u = dense(instance)
    m = len(J)
    JJ = J.flatten(0, 1)
    GGN = JJ.T @ torch.block_diag(*H) @ JJ / m
    measured = curvature_along(
        instance.model, instance.potential, instance.inputs, instance.direction
    )
    # Softmax's H cancels where p is nearly one-hot: its rounding is that of ||J u||^2.
    size = (JJ @ u).square().sum().item() / m
    assert measured.shape == ()
    torch.testing.assert_close(measured, u @ GGN @ u, rtol=1e-11, atol=1e-13 * size)


@settings(deadline=None, max_examples=60)
@given(instances())
def test_curvature_is_at_most_beta_times_the_structure_matrix(instance: Instance):
    J, _, u = dense(instance)
    m, k, _ = J.shape
    beta = instance.potential.smoothness
    measured = curvature_along(
        instance.model, instance.potential, instance.inputs, instance.direction
    ).item()
    on_V = instance.potential.tangent_projection(J.movedim(1, -1)).movedim(-1, 1)
    for jacobian in (J, on_V):
        K_B = jacobian.reshape(m * k, -1) @ jacobian.reshape(m * k, -1).T
        bound = beta * torch.linalg.eigvalsh(K_B)[-1] / m * u.square().sum()
        size = J.square().sum().item() * u.square().sum().item() / m
        assert -1e-13 * size <= measured <= bound.item() + 1e-13 * size


def test_the_bound_is_attained():
    # One sample, equal logits of two classes, u along the top eigenvector of K_B on V.
    model = nn.Linear(2, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    u = torch.tensor([[3.0, 4.0], [-3.0, -4.0]]).double()
    measured = curvature_along(model, Softmax(), torch.tensor([[3.0, 4.0]]).double(), {"weight": u})
    # K_B = ||x||^2 I, beta = 1/2, m = 1
    assert measured.item() == pytest.approx(0.5 * 25 * u.square().sum().item(), rel=1e-14)


@settings(deadline=None, max_examples=60)
@given(instances(), st.integers(1, 20))
def test_the_greatest_curvature_is_at_most_beta_times_that_of_the_structure_matrix(
    instance: Instance, steps: int
):
    for name, parameter in instance.model.named_parameters():
        parameter.requires_grad_(name in instance.direction)
    J, H, _ = dense(instance)
    m, k, _ = J.shape
    JJ = J.flatten(0, 1)
    GGN = JJ.T @ torch.block_diag(*H) @ JJ / m
    beta, potential = instance.potential.smoothness, instance.potential
    size = 1e-13 * J.square().sum().item() / m
    hi = torch.linalg.eigvalsh(GGN)[-1].item()
    measured = top_curvature(instance.model, potential, instance.inputs, steps=steps)
    assert measured.value.item() <= hi + size
    on_V = potential.tangent_projection(J.movedim(1, -1)).movedim(-1, 1)
    for jacobian, space in ((J, None), (on_V, potential)):
        K_B = jacobian.reshape(m * k, -1) @ jacobian.reshape(m * k, -1).T
        bound = beta * torch.linalg.eigvalsh(K_B)[-1].item() / m
        assert hi <= bound + size
        # Both measured, the right side with as many products as it has rows.
        right = top_structure(instance.model, instance.inputs, potential=space, steps=m * k + 1)
        assert measured.value.item() <= beta * right.value.item() / m * (1 + 1e-9) + size


def test_the_bound_on_the_greatest_curvature_is_attained():
    # Undecided logits of two classes: H = beta on V for every sample.
    model = nn.Linear(2, 2).double()
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    x = torch.tensor([[3.0, 4.0], [1.0, -1.0], [0.0, 2.0]]).double()
    curvature = top_curvature(model, Softmax(), x)
    structure = top_structure(model, x, potential=Softmax())
    assert curvature.value.item() == pytest.approx(0.5 * structure.value.item() / 3, rel=1e-12)
