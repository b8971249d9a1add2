"""The probe of an ordinary training loop against the plain function, and what it leaves alone."""

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conjopt.measure import EnergyProbe, MeasurementError, gradient_energy
from conjopt.measure import per_sample_gradient_norms as norms_of

CRITERION = nn.CrossEntropyLoss()
Y = torch.tensor([0, 1, 2, 1, 0, 2])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(lambda h: self.inner(h).tanh(), x, use_reentrant=False))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.inner(self.table(tokens))).mean(1)
        return (h @ self.table.weight.t())[:, :3]


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(18, 3))


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 3)), (6,)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.PReLU(), nn.Flatten(),
            nn.Linear(64, 3),
        ),
        (2, 4, 4),
    ),
    "attention": (attention, (3, 6)),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(6, 4, batch_first=True), Last(), nn.Linear(4, 3)),
        (3, 6),
    ),
    "checkpointed": (Checkpointed, (6,)),
}  # fmt: skip


class Last(nn.Module):
    def forward(self, found: tuple[Tensor, Tensor]) -> Tensor:
        return found[0][:, -1]


def make(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if name == "tied":
        return Tied().double(), torch.randint(7, (6, 5))
    build, shape = MODELS[name]
    return build().double(), torch.randn(6, *shape, dtype=torch.float64)


@pytest.mark.parametrize("share", [1.0, 0.5, 0.2])
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_norms_are_those_of_the_function_and_gradients_the_same_to_the_bit(name, share):
    model, x = make(name)
    CRITERION(model(x), Y).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    expected = norms_of(model, CRITERION, x, Y)
    probe = EnergyProbe(model, share=share)
    model.zero_grad()
    CRITERION(model(x), Y).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))
    assert_close(probe.norms, expected[:: round(1 / share)], rtol=1e-12, atol=0)
    assert_close(probe.energy, probe.norms.square().mean())
    if share == 1:
        assert_close(probe.energy, gradient_energy(model, CRITERION, x, Y))


def test_it_measures_every_so_many_forwards_with_gradients():
    model, x = make("mlp")
    probe = EnergyProbe(model, every=3)
    seen = []
    for _ in range(7):
        with torch.no_grad():
            model(x)  # does not count
            for parameter in model.parameters():
                parameter.mul_(0.9)
        before = probe.norms
        CRITERION(model(x), Y).backward()
        seen.append(probe.norms is not before)
        if seen[-1]:
            assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)
    assert seen == [True, False, False, True, False, False, True]


def test_factors_of_the_loss_multiply_the_norms():
    model, x = make("cnn")
    probe = EnergyProbe(model)
    (8 * CRITERION(model(x), Y) + 0.1 * model[0].weight.square().sum()).backward()
    assert_close(probe.norms, 8 * norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


def test_frozen_parameters_do_not_count():
    model, x = make("mlp")
    model[0].requires_grad_(False)
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


def test_as_many_places_as_samples():
    model, _ = make("attention")
    model[2] = nn.Linear(36, 3, dtype=torch.float64)
    x = torch.randn(6, 6, 6, dtype=torch.float64)
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


def test_coupled_samples_are_refused_in_the_forward_and_the_model_goes_on():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    x = torch.randn(6, 6)
    probe = EnergyProbe(model)
    with pytest.raises(MeasurementError, match="BatchNorm1d"):
        model(x)
    probe.remove()
    CRITERION(model(x), Y).backward()
    assert probe.norms is None


def test_an_error_in_the_forward_leaves_no_mode_behind():
    model, x = make("mlp")
    probe = EnergyProbe(model)
    with pytest.raises(RuntimeError):
        model(x[:, :3])
    assert not torch.overrides._get_current_function_mode_stack()
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


def test_forwards_without_a_backward_hold_nothing():
    model, x = make("mlp")
    EnergyProbe(model)
    for _ in range(3):
        outputs = model(x)
        hidden = weakref.ref(outputs)
        del outputs
        gc.collect()
        assert hidden() is None
    live = [item for item in gc.get_objects() if type(item).__name__ == "_Live"]
    assert not live


def test_a_removed_probe_stands_still():
    model, x = make("mlp")
    probe = EnergyProbe(model)
    probe.remove()
    CRITERION(model(x), Y).backward()
    assert probe.norms is None
    assert probe.energy is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("options", [{"share": 0.0}, {"share": 1.5}, {"every": 0}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EnergyProbe(nn.Linear(2, 2), **options)


def test_nothing_waits_for_the_device():
    from test_no_synchronisation import Spy  # counts what reads a value on the host

    model, x = make("cnn")
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()  # the first of its kind checks, and waits
    with Spy() as spy:
        CRITERION(model(x), Y).backward()
    assert not spy.seen
    assert probe.norms is not None
