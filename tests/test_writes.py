"""Models whose forward writes to their own weights: measuring leaves them as they are."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt import ConjSGD, bounds, measure
from conjopt.losses import FenchelYoungLoss
from conjopt.measure.writes import Backup, renormalised, told, written
from conjopt.potentials import Softmax

SOFTMAX = Softmax()


def normalises(layer: nn.Module) -> None:
    """As forced weight normalisation does (Karras et al., 2024, arXiv:2312.02696)."""
    layer.weight.copy_(1.1 * F.normalize(layer.weight, dim=1))


def drifts(layer: nn.Module) -> None:
    layer.weight.mul_(0.9).add_(0.01)


def clips_data(layer: nn.Module) -> None:
    layer.weight.data.clamp_(-0.5, 0.4)


def replaces_data(layer: nn.Module) -> None:
    layer.weight.data = 1.01 * layer.weight.data


WRITERS = [normalises, drifts, clips_data, replaces_data]


class Written(nn.Module):
    """A linear layer that writes to its weight in training mode."""

    def __init__(self, write: Callable[[nn.Module], None], inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64))
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.write(self)
        return F.linear(x, self.weight / self.weight.norm(dim=1, keepdim=True))


def network(write: Callable[[nn.Module], None]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Written(write, 4, 8), nn.Tanh(), Written(write, 8, 3))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 4, dtype=torch.float64, generator=generator), torch.arange(6) % 3


def fixed_direction(model: nn.Module) -> dict[str, Tensor]:
    return {name: torch.full_like(p, 0.1) for name, p in model.named_parameters()}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(2)


LOSS = nn.CrossEntropyLoss()
MEASURED: dict[str, Callable[[nn.Module, Tensor, Tensor], Any]] = {
    "per_sample_gradient_norms": lambda m, x, y: measure.per_sample_gradient_norms(m, LOSS, x, y),
    "structure_matrix": lambda m, x, y: measure.structure_matrix(m, x),
    "batch_structure_matrix": lambda m, x, y: measure.batch_structure_matrix(m, x),
    "top_structure": lambda m, x, y: measure.top_structure(m, x, generator=generator()).value,
    "top_curvature": lambda m, x, y: (
        measure.top_curvature(m, SOFTMAX, x, generator=generator()).value
    ),
    "curvature_along": lambda m, x, y: measure.curvature_along(m, SOFTMAX, x, fixed_direction(m)),
    "gradient_noise": lambda m, x, y: measure.gradient_noise(m, LOSS, x, y).noise,
    "risk_sandwich": lambda m, x, y: torch.as_tensor(
        bounds.risk_sandwich(m, FenchelYoungLoss(SOFTMAX), x, F.one_hot(y, 3).double()).upper
    ),
}


def state(model: nn.Module) -> list[Any]:
    return [p.detach().clone() for p in model.parameters()]


def assert_untouched(model: nn.Module, before: list[Tensor]) -> None:
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("name", MEASURED)
def test_measuring_leaves_the_weights_and_is_of_those_that_the_forward_writes(name, write):
    model, (x, y) = network(write), batch()
    before = state(model)
    for _ in range(2):  # the first time it is found out what is written to
        found = MEASURED[name](model, x, y)
        assert_untouched(model, before)
        after = copy.deepcopy(model)
        after(x)
        expected = MEASURED[name](after.eval(), x, y)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("write", WRITERS)
def test_self_check_finds_nothing_and_leaves_the_weights(write):
    model, (x, y) = network(write), batch()
    before = state(model)
    measure.self_check(model, LOSS, x, y)
    assert_untouched(model, before)


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("options", [{}, {"share": 0.5}, {"fused": True}], ids=str)
def test_a_probed_loop_is_the_loop_without(options, write):
    plain, (x, y) = network(write), batch()
    watched = copy.deepcopy(plain)
    probe = measure.EnergyProbe(watched, **options)
    for _ in range(4):
        for model in (plain, watched):
            model.zero_grad()
            LOSS(model(x), y).backward()
        assert all(map(torch.equal, plain.parameters(), watched.parameters()))
        for one, other in zip(plain.parameters(), watched.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad)
        still = copy.deepcopy(plain).eval()
        expected = measure.per_sample_gradient_norms(still, LOSS, x, y)
        expected = expected[::2] if "share" in options else expected
        torch.testing.assert_close(probe.norms, expected, rtol=1e-12, atol=1e-13)


class Counting(nn.Module):
    """Counts its forwards by a parameter that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.assigns = nn.Linear(4, 3, dtype=torch.float64), False
        self.forwards = nn.Parameter(torch.zeros((), dtype=torch.float64), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.assigns:
            self.forwards += 1
        else:
            self.forwards.add_(1)
        return self.linear(x) + 0 * self.forwards


@pytest.mark.parametrize("assigns", [True, False])
@pytest.mark.parametrize("direction", ["spectral", "sgd"])
def test_the_optimizer_adds_no_forwards_that_a_parameter_could_count(direction, assigns):
    model, (x, y) = Counting(), batch()
    model.assigns = assigns
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=LOSS, direction=direction, measure_every=2
    )
    for step in range(1, 9):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
        assert int(model.forwards) == step


def test_the_ledger_adds_no_forwards_that_a_parameter_could_count():
    model, (x, y) = Counting(), batch()
    ledger = bounds.ConvergenceLedger(model, LOSS, x, y, whole=True, chunk=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(1, 4):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        start = ledger.begin(x, y)
        optimizer.step()
        ledger.end(start)
        assert int(model.forwards) == step


class Assigned(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight *= 0.9
        return super().forward(x)


def test_assignments_to_a_parameter_are_refused_with_what_to_do():
    model, (x, y) = Assigned(4, 3, dtype=torch.float64), batch()
    before = state(model)
    with pytest.raises(measure.MeasurementError, match=r"write to it, as in .self.weight.mul_"):
        measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert all(map(torch.equal, model.parameters(), before))


def test_what_is_written_to_is_remembered_by_mode():
    model, (x, y) = network(drifts), batch()
    assert not told(model)
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert told(model)
    assert list(written(model)) == ["0.weight", "2.weight"]
    model.eval()
    assert not told(model)
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert list(written(model)) == []


def test_what_is_written_to_later_is_found_then():
    model, (x, y) = network(lambda layer: None), batch()
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    model[2].write = drifts
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert list(written(model)) == ["2.weight"]
    before = state(model)
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("write", [drifts, replaces_data])
def test_writes_are_told_on_devices_whose_values_are_not_looked_at(write, monkeypatch):
    monkeypatch.setattr("conjopt.measure.writes._same", lambda copy, given: True)
    model, (x, y) = network(write), batch()
    measure.per_sample_gradient_norms(model, LOSS, x, y)
    assert list(written(model)) == ["0.weight", "2.weight"]


def test_an_embedding_that_renormalises_is_known_beforehand():
    model = nn.Sequential(nn.Embedding(3, 2, max_norm=1.0), nn.Linear(2, 2))
    assert list(written(model)) == list(renormalised(model)) == ["0.weight"]


def test_nothing_is_remembered_of_a_forward_that_fails_and_the_weights_are_put_back():
    class Fails(Assigned):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise KeyError

    model, (x, _) = Fails(4, 3, dtype=torch.float64), batch()
    before = state(model)
    with pytest.raises(KeyError):
        measure.structure_matrix(model, x)
    assert not told(model)
    assert all(map(torch.equal, model.parameters(), before))


def test_not_a_number_is_no_write():
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[0] = float("nan")
    assert Backup(model).undo() == set()


def test_what_the_forward_keeps_is_there_for_the_loss():
    class Masks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            self.mask = (x > 0).double()
            return self.layer(x * (1 - self.mask))

    model, (x, _) = Masks(), batch()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets).square() * model.mask[: len(outputs)]).sum(1).mean()

    model(torch.randn(6, 4, dtype=torch.float64))
    found = measure.per_sample_gradient_norms(model, loss, x, x)
    for i in range(6):
        gradients = torch.autograd.grad(loss(model(x[i : i + 1]), x[i : i + 1]), model.parameters())
        expected = torch.cat([g.flatten() for g in gradients]).norm()
        torch.testing.assert_close(found[i], expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("size", [4, 1])
def test_what_only_the_first_forward_sets_stays(size):
    class FirstCall(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(size, dtype=torch.float64))
            self.head, self.ready = nn.Linear(4, 3, dtype=torch.float64), False

        def forward(self, x: Tensor) -> Tensor:
            if not self.ready:
                self.ready, self.bias.data = True, -x.mean(0)
            return self.head(x + self.bias)

    model, (x, y) = FirstCall(), batch()
    measure.per_sample_gradient_norms(model, LOSS, x[:2], y[:2])
    assert torch.equal(model.bias, -x[:2].mean(0))
    assert list(written(model)) == []


def test_layers_that_the_first_forward_builds_stay():
    class Builds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.width = nn.Linear(4, 5), None

        def forward(self, x: Tensor) -> Tensor:
            if self.width is None:
                self.width, self.head = 5, nn.Linear(5, 3)
            return self.head(self.body(x))

    model, inputs = Builds(), torch.randn(6, 4)
    measure.structure_matrix(model, inputs)
    built = model.head.weight
    model(inputs)
    assert model.head.weight is built


def test_parameters_with_attributes_and_of_own_classes_are_left_in_place():
    class Scaled(nn.Parameter):
        def whole(self) -> Tensor:
            return self * self.scale

    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)
            self.fixed = Scaled(torch.ones(3, 4, dtype=torch.float64), requires_grad=False)
            self.fixed.scale = 0.1
            self.held = [self.layer.weight]

        def forward(self, x: Tensor) -> Tensor:
            assert self.held[0] is self.layer.weight
            return self.layer(x) + F.linear(x, self.fixed.whole())

    model, (x, y) = Frozen(), batch()
    assert measure.per_sample_gradient_norms(model, LOSS, x, y).shape == (6,)


def test_a_table_that_is_not_strided_is_left_out():
    warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3, dtype=torch.float64)
            table = torch.eye(4, dtype=torch.float64)
            self.table = nn.Parameter(table.to_sparse_csr(), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer((self.table @ x.T).T)

    model, (x, y) = Sparse(), batch()
    optimizer = ConjSGD(model.parameters(), model=model, loss=LOSS, measure_every=2)
    for _ in range(3):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    assert told(model)


def test_errors_that_speak_of_parameters_are_those_of_the_model():
    class Fails(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            raise ValueError("unknown value for parameter 'mode'")

    with pytest.raises(ValueError, match="unknown value for parameter 'mode'"):
        measure.structure_matrix(Fails(4, 3), torch.randn(6, 4))


class Shared(nn.Module):
    """A module under two names, and another whose weight is tied to a third's."""

    def __init__(self) -> None:
        super().__init__()
        self.one = self.other = nn.Linear(4, 4)
        self.p, self.q = nn.Linear(4, 4), nn.Linear(4, 4)
        self.q.weight = self.p.weight
        self.head = nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.q(self.p(self.other(self.one(x).tanh())).tanh()))


@pytest.mark.parametrize("name", MEASURED)
def test_a_module_with_two_names_keeps_its_parameters(name):
    torch.manual_seed(0)
    model, (x, y) = Shared(), batch()
    before = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
    for _ in range(3):
        MEASURED[name](model, x, y)
        after = {n: id(p) for n, p in model.named_parameters(remove_duplicate=False)}
        assert after == before


@pytest.mark.parametrize("direction", ["spectral", "sgd"])
def test_the_optimizer_trains_a_module_with_two_names(direction):
    torch.manual_seed(0)
    model, (x, y) = Shared(), batch()
    ledger = bounds.ConvergenceLedger(model, LOSS, x, y, whole=True)
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=LOSS, direction=direction, ledger=ledger
    )
    weight = model.one.weight
    for _ in range(4):
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        assert weight.grad is not None
        optimizer.step()
        assert model.other.weight is weight
