"""Thm 2.5 on random networks in float64: the bound of the last layer, and its conditions."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

from conjopt.measure.last_layer import last_layer_bound
from conjopt.measure.structure import extreme_eigenvalues, structure_matrix
from conjopt.potentials import Softmax

EPS = torch.finfo(torch.float64).eps


class Network(nn.Module):
    """Tokens (m, T, 3), or vectors (m, 3), through hidden layers and a head."""

    def __init__(self, k: int = 3, width: int = 5, bias: bool = True, depth: int = 1) -> None:
        super().__init__()
        sizes = [3, *[width] * depth]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(sizes[-1], k, bias=bias)
        self.double()

    def features(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class Tokens(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x)).mT  # (m, k, T)


class TimeFirst(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.transpose(0, 1))).permute(1, 2, 0)


@given(
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(0, 2),
    st.sampled_from(["bias", "frozen bias", "no bias"]),
    st.sampled_from([1e-3, 1.0, 30.0]),
    st.integers(0, 2**32),
)
def test_it_is_below_the_structure_matrix(
    k: int, width: int, depth: int, bias: str, scale: float, seed: int
):
    torch.manual_seed(seed)
    model = Network(k, width, bias != "no bias", depth)
    if bias == "frozen bias":
        model.head.bias.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    inputs = torch.randn(3, 3).double()
    bound = last_layer_bound(model, inputs)
    expected = model.features(inputs).square().sum(1) + (bias == "bias")
    torch.testing.assert_close(bound, expected.detach(), rtol=1e-14, atol=0)
    A = structure_matrix(model, inputs)
    rounding = 64 * EPS * A.diagonal(0, 1, 2).sum(1)
    lo, hi = extreme_eigenvalues(A)
    assert (bound <= lo + rounding).all()
    if depth == 0:  # nothing else is trained: equal
        assert (hi <= bound + rounding).all()
    on_V, _ = extreme_eigenvalues(structure_matrix(model, inputs, potential=Softmax()))
    if k > 1:
        assert (bound <= on_V + rounding).all()


@given(
    st.sampled_from([Tokens, TimeFirst]),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 4),
    st.integers(1, 7),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_it_is_below_the_structure_matrix_of_tokens(
    kind: type[Network], k: int, width: int, m: int, tokens: int, bias: bool, seed: int
):
    torch.manual_seed(seed)
    model = kind(k, width, bias)
    inputs = torch.randn(m, tokens, 3).double()
    H = model.features(inputs).detach()
    M = H @ H.mT + bias
    rounding = 64 * EPS * M.diagonal(0, 1, 2).sum(1)
    bound = last_layer_bound(model, inputs)
    assert bound.shape == (m,)
    assert (bound >= 0).all()
    assert ((bound - extreme_eigenvalues(M)[0]).abs() <= rounding).all()
    if m != tokens or kind is Tokens:
        A = structure_matrix(model, inputs)
        assert (bound <= extreme_eigenvalues(A)[0] + 64 * EPS * A.diagonal(0, 1, 2).sum(1)).all()


def test_a_single_layer_attains_it_for_tokens():
    torch.manual_seed(0)
    model = Tokens(2, depth=0)
    inputs = torch.randn(4, 3, 3).double()
    lo, _ = extreme_eigenvalues(structure_matrix(model, inputs))
    torch.testing.assert_close(last_layer_bound(model, inputs), lo, rtol=1e-12, atol=0)


@pytest.mark.parametrize("m", [1, 127, 128, 129, 300])
def test_every_sample_gets_its_own(m: int):
    torch.manual_seed(0)
    model, inputs = TimeFirst(2, 4), torch.randn(m, 2, 3).double()
    H = model.features(inputs).detach()
    expected = torch.linalg.eigvalsh(H @ H.mT + 1)[:, 0]
    torch.testing.assert_close(last_layer_bound(model, inputs), expected, rtol=1e-9, atol=1e-12)
    narrow = last_layer_bound(model.to(torch.bfloat16), inputs.to(torch.bfloat16))
    assert ((narrow - expected).abs() < 0.1).all()
    assert narrow.dtype == torch.float32


@pytest.mark.parametrize("head", [None, "head", "module"])
def test_the_head_can_be_named(head: str | None):
    model, inputs = Network(), torch.randn(2, 3).double()
    found = last_layer_bound(model, inputs, head=model.head if head == "module" else head)
    assert torch.equal(found, last_layer_bound(model, inputs))


def test_a_model_can_be_its_head_and_may_get_no_samples():
    model = nn.Linear(2, 5)
    assert torch.equal(last_layer_bound(model, torch.tensor([[3.0, 4.0]])), torch.tensor([26.0]))
    assert last_layer_bound(model, torch.ones(0, 2)).shape == (0,)


def test_one_output_may_be_squeezed_and_the_weight_looked_at():
    class Looking(Network):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.head.weight.norm()  # no output depends on it
            return super().forward(x).squeeze(1).float()

    model, inputs = Looking(k=1), torch.randn(2, 3).double()
    expected = model.features(inputs).square().sum(1) + 1
    assert torch.equal(last_layer_bound(model, inputs), expected.detach())


class Scaled(Network):
    def forward(self, x: Tensor) -> Tensor:
        return 0.1 * super().forward(x)


class LearnedScale(Network):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(()).double())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale.exp()


class Tied(Network):
    def __init__(self) -> None:
        super().__init__(k=3, width=3)
        self.hidden[0].weight = self.head.weight


class TwiceCalled(Network):
    def __init__(self) -> None:
        super().__init__(k=5, width=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.head(self.features(x))))


class Transposed(Network):
    """The head's weight serves the other way round too, as in a tied autoencoder."""

    def __init__(self) -> None:
        super().__init__(k=3, width=5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x @ self.head.weight))


class Functional(Network):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.features(x), 2 * self.head.weight, self.head.bias)


class Multiplied(Network):
    def forward(self, x: Tensor) -> Tensor:
        return self.features(x) @ self.head.weight.T + self.head.bias


class Adapter(Network):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight.requires_grad_(False)
        self.down, self.up = nn.Linear(5, 1).double(), nn.Linear(1, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.features(x)
        return self.head(h) + self.up(self.down(h))


class Skipping(Network):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x


def changed(change) -> Network:
    model = Network()
    change(model.head)
    return model


VOID = {
    "a scale after it": (Scaled, "something comes after it"),
    "a learned scale after it": (LearnedScale, "something comes after it"),
    "a nonlinearity after it": (
        lambda: nn.Sequential(nn.Linear(3, 3), nn.Softmax(1)).double(),
        "something comes after it",
    ),
    "a skip around it": (Skipping, "something comes after it"),
    "an adapter": (Adapter, "something comes after it, or its weight is frozen"),
    "tied": (Tied, "used 2 times: tied"),
    "called twice": (TwiceCalled, "used 2 times: .* called again"),
    "used transposed": (Transposed, "used 2 times"),
    "a computed weight": (Functional, "weight .* is computed from others"),
    "another function": (Multiplied, "not what an nn.Linear with a trained weight returned"),
    "weight norm": (lambda: changed(parametrizations.weight_norm), "is computed"),
    "spectral norm": (lambda: changed(parametrizations.spectral_norm), "is computed"),
    "pruned": (lambda: changed(lambda head: prune.random_unstructured(head, "weight", 0.5)), "is"),
    "frozen": (lambda: changed(lambda head: head.requires_grad_(False)), "frozen"),
    "a convolution": (
        lambda: nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv1d(3, 3, 1), nn.Flatten()).double(),
        "not what an nn.Linear",
    ),
}


@pytest.mark.parametrize("name", VOID)
def test_where_a_condition_fails_it_is_refused(name: str):
    torch.manual_seed(0)
    build, message = VOID[name]
    model, inputs = build(), torch.randn(2, 3).double()
    model.train()
    with pytest.raises(ValueError, match=f"the last layer alone gives no bound: .*{message}"):
        last_layer_bound(model, inputs)
    if isinstance(model, Network):
        with pytest.raises(ValueError, match="the last layer alone gives no bound"):
            last_layer_bound(model, inputs, head="head")


@pytest.mark.parametrize("name", ["a scale after it", "tied", "an adapter", "frozen"])
def test_the_conditions_are_needed(name: str):
    """What would be returned without the check is above the least eigenvalue."""
    torch.manual_seed(0)
    model = VOID[name][0]()
    if name == "tied":  # along the second output the two uses of the weight work against each other
        with torch.no_grad():
            model.head.weight.copy_(torch.diag(torch.tensor([1.0, -1.0, -1.0])))
            model.hidden[0].bias.zero_()
        model.hidden[0].bias.requires_grad_(False)
        inputs = torch.tensor([[0.1, 0.0, 0.0]]).double()
    else:
        inputs = torch.randn(2, 3).double()
        model.hidden.requires_grad_(False)
    lo, _ = extreme_eigenvalues(structure_matrix(model, inputs))
    claimed = model.features(inputs).square().sum(1) + 1
    assert (lo < claimed - 1e-6).all()


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ("hidden.0", "'hidden.0' returned; something comes after it"),
        ("hidden", "is a ModuleList, no nn.Linear"),
        ("nothing", "Network has no module 'nothing'"),
        (nn.Linear(5, 3), "is no module of the model"),
    ],
)
def test_a_head_that_is_none(head, message: str):
    with pytest.raises(ValueError, match=message):
        last_layer_bound(Network(), torch.randn(2, 3).double(), head=head)


def test_a_bias_used_elsewhere_does_not_count():
    class Shared(Network):
        def __init__(self) -> None:
            super().__init__(k=5, width=5)
            self.hidden[0].bias = self.head.bias

    model, inputs = Shared(), torch.randn(2, 3).double()
    bound = last_layer_bound(model, inputs)
    torch.testing.assert_close(bound, model.features(inputs).square().sum(1).detach())
    assert (bound <= extreme_eigenvalues(structure_matrix(model, inputs))[0] + 1e-12).all()
