"""The probe that sums per-sample gradients into `.grad`, and how little the probe holds at once."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conjopt.measure import EnergyProbe, live
from conjopt.measure import per_sample_gradient_norms as norms_of
from conjopt.measure.layers import Dense, Outer, pieces

CRITERION = nn.CrossEntropyLoss()
Y = torch.tensor([0, 1, 2, 1, 0, 2])


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2) if x.ndim > 3 else x.mean(1)


class Twice(nn.Module):
    """One convolution that is used twice, and a linear layer whose weight multiplies, too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(2, 2, 3, padding=1), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.conv(torch.tanh(self.conv(x)))).mean(1)
        return self.head((torch.tanh(self.inner(h)) @ self.inner.weight).mean(1))


class ByName(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(2, 4, 3, padding="same"), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv2d(input=x, weight=self.conv.weight, bias=self.conv.bias, padding="same")
        h = F.linear(input=h.flatten(2).mT, weight=self.head.weight, bias=self.head.bias)
        return h.relu_().mean(1)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=False)
        return self.head(h).mean(1)


class InStep(nn.Module):
    """A sum of samples and something computed for as many, which cannot be taken for one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)
        self.shift = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        shift = torch.ones(len(x), 1, 1) * self.shift
        return self.head(torch.tanh(self.inner(x) + shift)).mean(1)


def frozen(name: str) -> nn.Module:
    layer = nn.Conv2d(2, 4, 3)
    getattr(layer, name).requires_grad_(False)
    return nn.Sequential(layer, nn.Tanh(), Mean(), nn.Linear(4, 3))


IMAGES = (6, 2, 4, 4)
MODELS = {
    "narrow": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(inplace=True), Mean()), IMAGES),
    "wide": (
        lambda: nn.Sequential(
            nn.Conv2d(8, 16, 3, 2, 1, groups=2), nn.Tanh(), Mean(), nn.Linear(16, 3)
        ),
        (6, 8, 5, 5),
    ),
    "few places": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3), nn.Tanh(), Mean(), nn.Linear(16, 3)),
        (6, 8, 3, 3),
    ),
    "transposed": (
        lambda: nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, 2), nn.Tanh(), nn.Conv2d(4, 3, 2, bias=False), Mean()
        ),
        IMAGES,
    ),
    "one dimension": (
        lambda: nn.Sequential(
            nn.Conv1d(2, 3, 3, dilation=2, padding=3, stride=2), nn.Tanh(), nn.Flatten(),
            nn.Linear(15, 3),
        ),
        (6, 2, 7),
    ),
    "long sequences": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3), Mean()),
        (6, 30, 5),
    ),
    "short sequences": (lambda: nn.Sequential(nn.Linear(30, 40), Mean(), nn.Linear(40, 3)),
                        (6, 2, 30)),
    "weight normalised": (
        lambda: nn.Sequential(
            nn.utils.parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh(), Mean(),
            nn.Linear(4, 3),
        ),
        (6, 9, 5),
    ),
    "used twice": (Twice, IMAGES),
    "by name": (ByName, IMAGES),
    "checkpointed": (Checkpointed, (6, 9, 5)),
    "in step": (InStep, (6, 9, 5)),
    "frozen weight": (lambda: frozen("weight"), IMAGES),
    "frozen bias": (lambda: frozen("bias"), IMAGES),
}  # fmt: skip


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, shape = MODELS[name]
    return build().double(), torch.randn(shape, dtype=torch.float64)


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("held", [1, 2**18])  # elements of per-sample gradients
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_norms_and_gradients_are_the_plain_ones(name, fused, held, monkeypatch):
    monkeypatch.setattr(live, "SLAB", held)
    monkeypatch.setattr(pieces, "SLAB", held)
    model, x = make(name)
    x.requires_grad_()
    CRITERION(model(x), Y).backward()
    plain, into = gradients(model), x.grad.clone()
    expected = norms_of(model, CRITERION, x, Y)
    probe = EnergyProbe(model, fused=fused)
    tolerance = {"rtol": 1e-12, "atol": 1e-15} if fused else {"rtol": 0, "atol": 0}
    for _ in range(4):  # the second is written down, and done again from then on
        model.zero_grad()
        x.grad = None
        CRITERION(model(x), Y).backward()
        assert_close(gradients(model), plain, **tolerance)
        assert_close(x.grad, into, rtol=0, atol=0)
        assert_close(probe.norms, expected, rtol=1e-12, atol=0)


def test_a_convolution_is_measured_a_few_samples_at_a_time(monkeypatch):
    sizes = []
    monkeypatch.setattr(live, "SLAB", 1)
    monkeypatch.setattr(
        live,
        "squared_norms",
        lambda found: sizes.extend(p.sizes[1] for p in found) or pieces.squared_norms(found),
    )
    model, x = make("by name")
    EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    assert sizes.count(1) == 2 * len(Y)  # weight and bias of the convolution
    assert len(sizes) == 2 * len(Y) + 1  # the head's weight; its bias waits for others


def test_a_sum_is_taken_where_it_is_promised(monkeypatch):
    """Sums of per-sample gradients that are changed on their way arrive in `.grad`."""
    joined = live.Live.joined
    monkeypatch.setattr(
        live.Live,
        "joined",
        lambda self, *given: {i: 2 * g for i, g in joined(self, *given).items()},
    )
    for name, doubled in (("wide", 2), ("long sequences", 4), ("checkpointed", 2)):
        model, x = make(name)
        CRITERION(model(x), Y).backward()
        plain = gradients(model)
        EnergyProbe(model, fused=True)
        model.zero_grad()
        CRITERION(model(x), Y).backward()
        twice = [p.grad.allclose(2 * g) for p, g in zip(model.parameters(), plain)]
        assert sum(twice) == doubled, name


def test_gradients_accumulate_and_can_be_asked_for():
    model, x = make("long sequences")
    CRITERION(model(x), Y).backward()
    plain = gradients(model)
    probe = EnergyProbe(model, fused=True)
    CRITERION(model(x), Y).backward()
    assert_close(gradients(model), [2 * g for g in plain], rtol=1e-12, atol=1e-15)
    found = torch.autograd.grad(CRITERION(model(x), Y), list(model.parameters()))
    assert_close(list(found), plain, rtol=1e-12, atol=1e-15)
    assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_a_kept_graph_is_measured_again(fused):
    model, x = make("narrow")
    probe = EnergyProbe(model, fused=fused)
    value = CRITERION(model(x), Y)
    value.backward(retain_graph=True)
    once, probe.norms = probe.norms, None
    value.backward()
    assert_close(probe.norms, once, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"twice|second time"):
        value.backward()


def test_gradients_of_gradients_are_refused():
    model, x = make("long sequences")
    EnergyProbe(model, fused=True)
    (found,) = torch.autograd.grad(CRITERION(model(x), Y), [model[0].weight], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        found.square().sum().backward()


@pytest.mark.parametrize("share", [0.5, 0.25, 0.01])
@pytest.mark.parametrize("held", [1, 2**18])  # elements of per-sample gradients
@pytest.mark.parametrize("name", MODELS)
def test_the_first_samples_are_measured_and_all_are_summed(name, held, share, monkeypatch):
    monkeypatch.setattr(live, "SLAB", held)
    monkeypatch.setattr(pieces, "SLAB", held)
    model, x = make(name)
    CRITERION(model(x), Y).backward()
    plain = gradients(model)
    expected = norms_of(model, CRITERION, x, Y)[: -(-len(Y) // round(1 / share))]
    probe = EnergyProbe(model, share=share, fused=True)
    for _ in range(4):
        model.zero_grad()
        CRITERION(model(x), Y).backward()
        assert_close(gradients(model), plain, rtol=1e-12, atol=1e-15)
        assert_close(probe.norms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_an_input_that_was_written_to_is_refused(share, monkeypatch):
    """Autograd does not notice: the weights of the call are detached."""
    monkeypatch.setattr(live, "SLAB", 1)  # in several ranges
    model, x = make("by name")
    writes = [False]
    forward = model.forward

    def written(x: Tensor) -> Tensor:
        x = x * 1
        result = forward(x)
        if writes[0]:
            x.mul_(2)
        return result

    model.forward = written
    EnergyProbe(model, fused=True, share=share)
    for _ in range(3):
        CRITERION(model(x), Y).backward()
    writes[0] = True
    with pytest.raises(RuntimeError, match="written to after the call"):
        CRITERION(model(x), Y).backward()


def test_samples_that_are_not_measured_take_no_per_sample_gradients(monkeypatch):
    made = []
    pieces_of = live.pieces_of
    monkeypatch.setattr(
        live, "pieces_of", lambda use, b: made.append(use.samples) or pieces_of(use, b)
    )
    model, x = make("wide")
    EnergyProbe(model, share=0.5, fused=True)
    CRITERION(model(x), Y).backward()
    assert made == [3, 3]  # the head and the convolution


@pytest.mark.parametrize(
    "options", [{}, {"share": 0.5}, {"fused": True}, {"share": 0.5, "fused": True}]
)
def test_inputs_of_layers_are_let_go_when_the_backward_has_passed(options):
    """The graph, kept alive by the loss, holds none of them without the cycle collector."""
    model, x = make("narrow")
    probe = EnergyProbe(model, **options)
    CRITERION(model(x), Y).backward()
    seen: list[weakref.ref[Tensor]] = []
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 1,))
    model[0].register_forward_hook(lambda module, args, output: seen.append(weakref.ref(args[0])))
    gc.disable()
    try:
        value = CRITERION(model(x), Y)
        assert seen[0]() is not None
        value.backward()
        assert seen[0]() is None
    finally:
        gc.enable()
    assert probe.norms is not None


@pytest.mark.parametrize("places", [1, 3, 40])
def test_norms_and_sums_of_factors_are_those_of_the_gradients(places, monkeypatch):
    monkeypatch.setattr(pieces, "SLAB", 50)
    torch.manual_seed(0)
    left = torch.randn(1, 5, 2, places, 4, dtype=torch.float64)
    right = torch.randn(1, 5, 2, places, 3, dtype=torch.float64)
    full = torch.einsum("mgtq,mgtp->mgqp", left[0], right[0])
    for piece in (Outer(left, right), Dense(full[None])):
        norms, total = pieces.norms_and_sum(piece)
        assert_close(norms, full.square().sum((1, 2, 3)), rtol=1e-12, atol=0)
        assert_close(total, full.sum(0), rtol=1e-12, atol=1e-14)


def test_another_probe_sees_the_same_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    probes = [EnergyProbe(model, fused=fused) for fused in (True, False, True)]
    for _ in range(4):
        x = torch.randn(6, 2, 5)
        CRITERION(model(x), Y).backward()
        for probe in probes:
            assert_close(probe.norms, norms_of(model, CRITERION, x, Y))
