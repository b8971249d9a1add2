"""The remarks on architecture in docs/theory.md, section 2, on random instances in float64."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing import assert_close

from conjopt.measure.structure import structure_matrix
from conjopt.potentials import Softmax

EPS = torch.finfo(torch.float64).eps
SEEDS = st.integers(0, 2**32)


class Block(nn.Module):
    """`h + F(h)`, or `F(h)` alone, with or without a ReLU after it."""

    def __init__(self, inner: nn.Module, *, skip: bool = True, relu_after: bool = False) -> None:
        super().__init__()
        self.inner, self.skip, self.relu_after = inner, skip, relu_after

    def forward(self, h: Tensor) -> Tensor:
        found = h + self.inner(h) if self.skip else self.inner(h)
        return found.relu() if self.relu_after else found


def inner_map(kind: str, p: int, scale: float) -> nn.Module:
    layers: dict[str, Callable[[], nn.Module]] = {
        "linear": lambda: nn.Linear(p, p),
        "tanh": lambda: nn.Sequential(nn.Linear(p, p), nn.Tanh(), nn.Linear(p, p)),
        "relu": lambda: nn.Sequential(nn.Linear(p, 2 * p), nn.ReLU(), nn.Linear(2 * p, p)),
        "contraction": lambda: nn.Linear(p, p, bias=False),  # -I / 2 and a little noise
    }
    model = layers[kind]().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
        if kind == "contraction":
            model.weight.copy_(-0.5 * torch.eye(p) + 0.1 * model.weight)
    return model


@st.composite
def blocks(draw: st.DrawFn) -> tuple[nn.Module, nn.Module, Tensor]:
    """Draw F, what follows the block, and one state h, `(p,)`."""
    torch.manual_seed(draw(SEEDS))
    p = draw(st.integers(1, 5))
    k = draw(st.integers(1, p))
    kind = draw(st.sampled_from(["linear", "tanh", "relu", "contraction"]))
    F = inner_map(kind, p, draw(st.sampled_from([0.1, 0.5, 1.0, 3.0])))
    after = nn.Sequential(nn.Linear(p, p), nn.Tanh(), nn.Linear(p, k)).double()
    return F, after, torch.randn(p).double()


def jacobian(function: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    return torch.func.jacrev(function)(h).detach()


def lo(B: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(B @ B.T)[0]


def hi(B: Tensor) -> Tensor:
    return torch.linalg.eigvalsh(B @ B.T)[-1]


def rounding(*factors: Tensor) -> float:
    """Rounding of an eigenvalue of the product of these."""
    return 256 * EPS * float(torch.stack([1 + hi(factor) for factor in factors]).prod())


@settings(max_examples=200)
@given(blocks())
def test_a_residual_block_keeps_its_share(block: tuple[nn.Module, nn.Module, Tensor]):
    F, after, h = block
    B = jacobian(after, (h + F(h)).detach())  # of what follows, at the block's result
    whole = jacobian(lambda h: after(h + F(h)), h)
    DF = jacobian(F, h)
    slack = rounding(B, torch.eye(len(h)).double() + DF)
    by_norm = (1 - torch.linalg.matrix_norm(DF, 2)).clamp(min=0) ** 2
    by_symmetric_part = (1 + torch.linalg.eigvalsh((DF + DF.T) / 2)[0]).clamp(min=0) ** 2
    assert lo(whole) >= by_norm * lo(B) - slack
    assert lo(whole) >= by_symmetric_part * lo(B) - slack
    # Both bound the least singular value of I + DF, which itself bounds the factor.
    least = torch.linalg.svdvals(torch.eye(len(h)).double() + DF)[-1] ** 2
    assert max(by_norm, by_symmetric_part) <= least + 64 * EPS * (1 + hi(DF))
    assert lo(whole) >= least * lo(B) - slack


@settings(max_examples=200)
@given(blocks())
def test_a_plain_chain_keeps_the_least_singular_value(
    block: tuple[nn.Module, nn.Module, Tensor],
):
    F, after, h = block
    B = jacobian(after, F(h).detach())
    whole = jacobian(lambda h: after(F(h)), h)
    DF = jacobian(F, h)
    assert lo(whole) >= torch.linalg.svdvals(DF.T)[-1] ** 2 * lo(B) - rounding(B, DF)


def test_the_factors_are_attained():
    B, h = torch.eye(2).double(), torch.ones(2).double()
    for c, factor in [(-0.5, 0.25), (-0.9, 0.01), (0.5, 2.25)]:
        whole = jacobian(lambda h, c=c: h + c * h, h)
        assert_close(lo(B @ whole), torch.tensor(factor).double())
    # By the symmetric part 2.25, by the norm 0.25: neither bound replaces the other.
    rotation = torch.tensor([[0.0, -3.0], [3.0, 0.0]]).double()
    assert_close(lo(torch.eye(2).double() + rotation), torch.tensor(10.0).double())


def test_nothing_keeps_a_plain_chain_from_zero():
    """The same F of small norm: the chain loses all, the residual block next to nothing."""
    torch.manual_seed(0)
    F = inner_map("tanh", 4, 0.1)
    B, h = torch.eye(4).double(), torch.randn(4).double()
    chain = jacobian(Block(F, skip=False), h)
    residual = jacobian(Block(F), h)
    assert lo(B @ chain) < 1e-8
    assert lo(B @ residual) > 0.9


def test_a_relu_after_the_addition_takes_the_guarantee_away():
    h, F = -torch.ones(3).double(), inner_map("linear", 3, 0.1)
    assert (1 - torch.linalg.matrix_norm(jacobian(F, h), 2)) ** 2 > 0.5
    assert lo(jacobian(Block(F), h)) > 0.5
    assert lo(jacobian(Block(F, relu_after=True), h)) == 0


def test_the_structure_matrix_through_blocks_follows():
    """Trained parameters before the block only: `A = B' A_h B'^T`, and lo keeps its share."""
    torch.manual_seed(0)
    first, head = nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    F = inner_map("tanh", 4, 0.5)
    x = torch.randn(5, 3).double()
    for frozen in (F, head):
        frozen.requires_grad_(False)
    with_block = structure_matrix(nn.Sequential(first, Block(F), head), x)
    for i in range(5):
        h = first(x[i]).detach()
        DF = jacobian(F, h)
        norm = torch.linalg.matrix_norm(DF, 2)
        # first is linear with a bias: A_h = (||x||^2 + 1) I, so A = (||x||^2 + 1) B' B'^T.
        factor = x[i].square().sum() + 1
        expected = factor * lo(head.weight.detach()) * (1 - norm).clamp(min=0) ** 2
        assert norm < 1
        assert torch.linalg.eigvalsh(with_block[i])[0] >= expected * (1 - 1e-12)


# What is trained


def perceptron(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(3, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3)
    ).double()


def least_eigenvalue_of(matrix: Tensor) -> float:
    return float(torch.linalg.eigvalsh(matrix).min())


@settings(max_examples=60)
@given(SEEDS, st.integers(1, 5), st.sets(st.integers(0, 5)), st.booleans())
def test_freezing_takes_a_semidefinite_term_away(
    seed: int, width: int, frozen: set[int], on_simplex: bool
):
    torch.manual_seed(seed)
    model, x = perceptron(width), torch.randn(3, 3).double()
    potential = Softmax() if on_simplex else None
    outputs = model(x)
    parameters = list(model.parameters())
    A = structure_matrix(model, x, potential=potential)
    for place in frozen:
        parameters[place].requires_grad_(False)
    less = structure_matrix(model, x, potential=potential)
    for parameter in parameters:
        parameter.requires_grad_(not parameter.requires_grad)
    term = structure_matrix(model, x, potential=potential)  # of what was frozen
    size = float(A.diagonal(dim1=1, dim2=2).sum(1).max())
    assert torch.equal(model(x), outputs)
    assert_close(less + term, A, rtol=0, atol=64 * EPS * size)
    assert least_eigenvalue_of(A - less) >= -64 * EPS * size
    assert (torch.linalg.eigvalsh(less) <= torch.linalg.eigvalsh(A) + 64 * EPS * size).all()


class Wider(nn.Module):
    """A model whose first layer gets units that its second layer does not use yet."""

    def __init__(self, model: nn.Sequential, more: int) -> None:
        super().__init__()
        self.first, self.second = model[0], model[2]
        self.rest = nn.Sequential(model[3], model[4])
        self.new_first = nn.Linear(3, more).double()
        self.new_second = nn.Linear(more, self.second.out_features, bias=False).double()
        nn.init.zeros_(self.new_second.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.second(self.first(x).tanh()) + self.new_second(self.new_first(x)))


class Adapter(nn.Module):
    """A layer with a product of two thin matrices added, the second one 0."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.layer = layer
        self.down = nn.Parameter(torch.randn(rank, layer.in_features).double())
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank).double())

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.down.T @ self.up.T


@settings(max_examples=40)
@given(SEEDS, st.integers(1, 4), st.integers(1, 3), st.sampled_from(["units", "adapter", "scale"]))
def test_further_parameters_add_a_semidefinite_term(seed: int, width: int, more: int, kind: str):
    torch.manual_seed(seed)
    model, x = perceptron(width), torch.randn(3, 3).double()
    if kind == "units":
        larger: nn.Module = Wider(model, more)
    elif kind == "adapter":
        larger = nn.Sequential(*model[:2], Adapter(model[2], more), *model[3:])
    else:
        norm = nn.Linear(3, 3, bias=True).double()  # begins as the identity
        with torch.no_grad():
            norm.weight.copy_(torch.eye(3))
            norm.bias.zero_()
        larger = nn.Sequential(*model, norm)
    assert_close(larger(x), model(x), rtol=1e-14, atol=1e-15)
    A, after = structure_matrix(model, x), structure_matrix(larger, x)
    size = float(after.diagonal(dim1=1, dim2=2).sum(1).max())
    assert least_eigenvalue_of(after - A) >= -64 * EPS * size
    assert least_eigenvalue_of(after) >= least_eigenvalue_of(A) - 64 * EPS * size


@settings(max_examples=40)
@given(SEEDS, st.floats(0.1, 0.9))
def test_pruning_weights_that_are_zero_takes_a_semidefinite_term_away(seed: int, share: float):
    torch.manual_seed(seed)
    model, x = perceptron(4), torch.randn(3, 3).double()
    kept = torch.rand(4, 4) > share
    with torch.no_grad():
        model[2].weight.mul_(kept)
    outputs, A = model(x), structure_matrix(model, x)
    prune.custom_from_mask(model[2], "weight", kept)
    pruned = structure_matrix(model, x)
    size = float(A.diagonal(dim1=1, dim2=2).sum(1).max())
    assert torch.equal(model(x), outputs)
    assert least_eigenvalue_of(A - pruned) >= -64 * EPS * size
    assert (A - pruned).abs().max() > 1e-6 * size or bool(kept.all())


def test_changed_values_carry_no_such_guarantee():
    """So that the tests above can fail: pruning a weight that is not zero."""
    torch.manual_seed(0)
    model, x = perceptron(4), torch.randn(3, 3).double()
    A = structure_matrix(model, x)
    with torch.no_grad():
        model[2].weight.mul_(3)
    assert least_eigenvalue_of(A - structure_matrix(model, x)) < -1e-3


@pytest.mark.parametrize("dead", [True, False])
def test_dead_units_leave_the_last_bias_alone(dead: bool):
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    with torch.no_grad():
        model[0].bias.fill_(-100 if dead else 100)
    A = structure_matrix(model, torch.zeros(1, 2).double())[0]
    if dead:
        assert_close(A, torch.eye(2).double(), rtol=0, atol=0)
    else:
        assert least_eigenvalue_of(A) > 1 + 3e4
