"""Gradients of single tokens against a plain loop over samples and tokens, in float64.

The reference runs one sample at a time and differentiates the loss of one token at a time. With
`c` counted tokens of `m T`, what is measured is `m T / c` times that under a mean, so that the
mean of all is the gradient.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_sample import F, Function
from torch import Tensor, nn
from torch.testing import assert_close

from conjopt.losses import SoftmaxLoss, SquaredLoss
from conjopt.measure import gradient_energy, per_sample_gradient_norms
from conjopt.measure.layers.tape import Tape
from conjopt.measure.tokens import dimension_within_tokens, token_squares

C = 4  # classes, or numbers of a token


def transformer() -> nn.Module:
    block = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(7, 6), block, nn.Linear(6, C))


def causal() -> nn.Module:
    def forward(self: Any, t: Tensor) -> Tensor:
        h = self.m[0](t)
        q, k, v = self.m[1](h).chunk(3, -1)
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return (h @ self.m[0].weight.mT)[..., :C]  # tied

    return Function(forward, nn.Embedding(7, 6), nn.Linear(6, 18))


def tagger() -> nn.Module:
    lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
    call = lambda self, t: self.m[2](self.m[1](self.m[0](t))[0])  # noqa: E731
    return Function(call, nn.Embedding(7, 6), lstm, nn.Linear(10, C))


def single() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, C))


def normalised() -> nn.Module:
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, C))
    return nn.Sequential(nn.Embedding(7, 6), nn.LayerNorm(6), layer)


MODELS = {f.__name__: f for f in (transformer, causal, tagger, single, normalised)}


def classes_second(model: nn.Module) -> nn.Module:
    return Function(lambda self, t: self.m[0](t).mT, model)


def make(name: str, m: int = 3, T: int = 5) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return MODELS[name]().double(), torch.randint(7, (m, T))


def loop(model: nn.Module, x: Tensor, own: Callable[[Tensor, int, int], Tensor]) -> Tensor:
    """Gradients of the tokens' own losses, `(m, T, P)`; `own` is given a sample's outputs."""
    parameters = list(model.parameters())
    rows = []
    for i in range(len(x)):
        outputs = model(x[i : i + 1])[0]
        for t in range(x.shape[1]):
            found = torch.autograd.grad(
                own(outputs, i, t), parameters, retain_graph=True, materialize_grads=True
            )
            rows.append(torch.cat([g.flatten() for g in found]))
    return torch.stack(rows).unflatten(0, x.shape)


def gradient(model: nn.Module, loss: Any, x: Tensor, y: Tensor) -> Tensor:
    found = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


def agree(model: nn.Module, loss: Any, x: Tensor, y: Tensor, expected: Tensor) -> None:
    """Norms are those of gradients whose mean, or sum, is the gradient."""
    total = expected.sum((0, 1)) if loss.reduction == "sum" else expected.mean((0, 1))
    assert_close(total, gradient(model, loss, x, y), rtol=1e-10, atol=1e-14)
    found = per_sample_gradient_norms(model, loss, x, y, unit="token")
    assert not found.requires_grad
    assert_close(found, expected.norm(dim=-1), rtol=1e-10, atol=1e-14)
    energy = gradient_energy(model, loss, x, y, unit="token")
    assert_close(energy, expected.square().sum(-1).mean(), rtol=1e-10, atol=0)
    rows = torch.tensor([2, 0])
    found = per_sample_gradient_norms(model, loss, x, y, rows=rows, unit="token")
    assert_close(found, expected[rows].norm(dim=-1), rtol=1e-10, atol=1e-14)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_class_numbers(name: str, ignored: bool, reduction: str):
    model, x = make(name)
    model, y = classes_second(model), torch.randint(C, x.shape)
    if ignored:
        y[0, 1:] = y[1, 0] = -100
    loss = nn.CrossEntropyLoss(reduction=reduction)
    own = lambda f, i, t: F.cross_entropy(f[:, t], y[i, t], reduction="sum")  # noqa: E731
    counted = int((y != -100).sum())
    expected = loop(model, x, own) * (y.numel() / counted if reduction == "mean" else 1)
    agree(model, loss, x, y, expected)
    if ignored:
        norms = per_sample_gradient_norms(model, loss, x, y, unit="token")
        assert torch.equal(norms == 0, y == -100)


@pytest.mark.parametrize("name", MODELS)
def test_weights_of_classes_count(name: str):
    model, x = make(name)
    model, y = classes_second(model), torch.randint(C, x.shape)
    y[2, 3] = -100
    weight = torch.rand(C, dtype=torch.float64) + 0.1
    of_tokens = torch.where(y < 0, 0, weight[y.clamp(min=0)])
    own = lambda f, i, t: F.cross_entropy(f[:, t], y[i, t], weight, reduction="sum")  # noqa: E731
    expected = loop(model, x, own) * (y.numel() / of_tokens.sum())
    agree(model, nn.CrossEntropyLoss(weight), x, y, expected)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(), SoftmaxLoss()], ids=["torch", "ours"])
def test_probabilities_are_of_classes_at_dimension_one(loss: nn.Module):
    """As many places as classes, and targets of the outputs' shape: the criterion tells."""
    model, x = make("transformer", T=C)
    model, y = classes_second(model), torch.rand(3, C, C, dtype=torch.float64).softmax(1)
    own = lambda f, i, t: F.cross_entropy(f[:, t], y[i, :, t])  # noqa: E731
    agree(model, loss, x, y, loop(model, x, own))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_values_at_the_last_dimension(name: str, reduction: str):
    model, x = make(name, T=C)
    y = torch.randn(3, C, C, dtype=torch.float64)
    loss = nn.MSELoss(reduction=reduction)
    own = lambda f, i, t: F.mse_loss(f[t], y[i, t], reduction=reduction)  # noqa: E731
    agree(model, loss, x, y, loop(model, x, own))


def test_one_value_for_each_token():
    model, x = make("tagger")
    model = Function(lambda self, t: self.m[0](t)[..., 0], model)
    y = torch.randn(3, 5, dtype=torch.float64)
    own = lambda f, i, t: (f[t] - y[i, t]) ** 2  # noqa: E731
    agree(model, nn.MSELoss(), x, y, loop(model, x, own))
    # This package's loss is a mean over samples, of sums over places.
    own = lambda f, i, t: x.shape[1] * (f[t] - y[i, t]) ** 2 / 2  # noqa: E731
    agree(model, SquaredLoss(), x, y, loop(model, x, own))


def test_a_function_with_class_numbers_at_last():
    model, x = make("transformer")
    y = torch.randint(C, x.shape)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    expected = loop(model, x, lambda f, i, t: F.cross_entropy(f[t], y[i, t]))
    found = per_sample_gradient_norms(model, loss, x, y, unit="token")
    assert_close(found, expected.norm(dim=-1), rtol=1e-10, atol=0)
    turned = classes_second(model)
    found = per_sample_gradient_norms(turned, F.cross_entropy, x, y, unit="token")
    assert_close(found, expected.norm(dim=-1), rtol=1e-10, atol=0)


def test_places_of_an_image():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.Tanh(), nn.Conv2d(5, C, 1)).double()
    x, y = torch.randn(2, 2, 3, 4).double(), torch.randint(C, (2, 3, 4))
    found = per_sample_gradient_norms(model, nn.CrossEntropyLoss(), x, y, unit="token")
    for i, a, b in [(0, 0, 0), (1, 2, 3), (0, 1, 2)]:
        one = F.cross_entropy(model(x[i : i + 1])[0, :, a, b], y[i, a, b])
        grads = torch.autograd.grad(one, list(model.parameters()))
        assert_close(
            found[i, a, b], torch.cat([g.flatten() for g in grads]).norm(), rtol=1e-10, atol=0
        )


@settings(max_examples=25)
@given(st.sampled_from(sorted(MODELS)), st.integers(1, 4), st.integers(1, 5), st.integers(0, 2**31))
def test_any_shape(name: str, m: int, T: int, seed: int):
    torch.manual_seed(seed)
    model = classes_second(MODELS[name]()).double()
    x, y = torch.randint(7, (m, T)), torch.randint(C, (m, T))
    expected = loop(model, x, lambda f, i, t: F.cross_entropy(f[:, t], y[i, t]))
    found = per_sample_gradient_norms(model, nn.CrossEntropyLoss(), x, y, unit="token")
    assert_close(found, expected.norm(dim=-1), rtol=1e-10, atol=1e-13)


def test_one_token_is_the_sample():
    model, x = make("transformer", T=1)
    model, y = classes_second(model), torch.randint(C, x.shape)
    loss = nn.CrossEntropyLoss()
    tokens = per_sample_gradient_norms(model, loss, x, y, unit="token")
    assert tokens.shape == (3, 1)
    assert_close(tokens[:, 0], per_sample_gradient_norms(model, loss, x, y), rtol=1e-12, atol=0)
    flat = nn.Sequential(single(), nn.Flatten()).double()
    tokens = per_sample_gradient_norms(flat, loss, x, y[:, 0], unit="token")
    assert_close(tokens, per_sample_gradient_norms(flat, loss, x, y[:, 0]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("unit", ["sample", "token"])
def test_no_samples(unit: str):
    model, x = make("single", m=0)
    model, y = classes_second(model), torch.randint(C, x.shape)
    found = per_sample_gradient_norms(model, nn.CrossEntropyLoss(), x, y, unit=unit)
    assert found.shape == ((0, 5) if unit == "token" else (0,))


def test_nothing_trained():
    model, x = make("single")
    model, y = classes_second(model).requires_grad_(False), torch.randint(C, x.shape)
    model.m[0].register_parameter("unused", nn.Parameter(torch.ones(())))
    loss = nn.CrossEntropyLoss()
    assert torch.equal(
        per_sample_gradient_norms(model, loss, x, y, unit="token"), torch.zeros(3, 5).double()
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_small_budget_takes_a_place_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch):
    model, x = make(name)
    tape, numbers = Tape(model, x), []
    pull = tape.pull
    monkeypatch.setattr(
        tape, "pull", lambda roots, cots: (numbers.append(len(cots)), pull(roots, cots))[1]
    )
    output = tape.only_output()
    cotangent = torch.randn_like(output)
    whole = token_squares(tape, output, cotangent, 2)
    parts = token_squares(tape, output, cotangent, 2, memory=1)
    assert numbers == [5] + [1] * 5
    assert_close(parts, whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("loss", "outputs", "targets", "expected"),
    [
        (nn.CrossEntropyLoss(), (2, 3, 3), (2, 3), 1),
        (nn.CrossEntropyLoss(), (2, 3, 3), (2, 3, 3), 1),
        (nn.NLLLoss(), (2, 3, 3), (2, 3), 1),
        (F.nll_loss, (2, 4, 3), (2, 3), 1),
        (F.nll_loss, (2, 3, 4), (2, 3), 2),
        (F.nll_loss, (2, 4), (2,), 1),
        (nn.L1Loss(), (2, 3, 4), (2, 3, 4), 2),
        (nn.BCEWithLogitsLoss(), (2, 3), (2, 3), None),
        (F.nll_loss, (2, 3, 3), (2, 3), ValueError),
        (nn.L1Loss(), (2, 3, 4), (1, 1, 4), ValueError),
        (nn.CrossEntropyLoss(), (4,), (), ValueError),
        (nn.MSELoss(), (2, 3, 4), (2, 3, 1), ValueError),
    ],
    ids=str,
)
def test_what_a_token_is(loss: Any, outputs: Any, targets: Any, expected: Any):
    outputs, targets = torch.zeros(outputs), torch.zeros(targets)
    if expected is ValueError:
        with pytest.raises(ValueError, match="it cannot be told what a token is in outputs"):
            dimension_within_tokens(loss, outputs, targets)
    else:
        assert dimension_within_tokens(loss, outputs, targets) == expected


@pytest.mark.slow
def test_a_compiled_criterion_is_read():
    loss = torch.compile(nn.CrossEntropyLoss(), backend="eager")
    outputs = torch.zeros(2, 3, 3)
    assert dimension_within_tokens(loss, outputs, outputs) == 1


def test_another_unit_is_refused():
    with pytest.raises(ValueError, match="expected 'sample' or 'token'"):
        gradient_energy(nn.Linear(2, 2), nn.MSELoss(), torch.ones(1, 2), torch.ones(1, 2), unit="t")
