"""Structure matrices of small models through the whole Jacobian: the same, where it is open."""

import contextlib
import math

import pytest
import torch
from test_structure import MODELS, jacobians, make, on_tangent_space
from torch import Tensor, nn

import conjopt.measure.dense as dense
import conjopt.measure.structure as structure
from conjopt.measure import batch_structure_matrix, costs, self_check, structure_matrix
from conjopt.measure.layers.tape import Tape
from conjopt.potentials import Softmax, Squared

# Recurrent networks write to their intermediate results, which vmap refuses.
CLOSED = {"tagger"}


def peak_bytes(run) -> int:
    """The most bytes of tensors held at once in a run, beyond those before it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    held = least = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            least = min(least, held)  # what is freed at first was there before
            peak = max(peak, held - least)
    return peak


class Ways:
    """Counts the ways that were taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.layers = self.jacobians = 0
        ways = self

        class Tape(structure.Tape):
            def __init__(self, *args):
                ways.layers += 1
                super().__init__(*args)

        plain = dense.Shortcut.jacobian

        def jacobian(*args):
            found = plain(*args)
            ways.jacobians += found is not None
            return found

        monkeypatch.setattr(structure, "Tape", Tape)
        monkeypatch.setattr(dense.Shortcut, "jacobian", jacobian)

    def take(self):
        """The number of each since the last time, of layers and of Jacobians."""
        found, self.layers, self.jacobians = (self.layers, self.jacobians), 0, 0
        return found


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Ways:
    return Ways(monkeypatch)


def opened(model: nn.Module, inputs: Tensor, measure=structure_matrix) -> bool:
    return dense.Shortcut(measure.__name__, model, inputs).like is not None


def close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert not found.requires_grad
    assert (found - expected).norm() <= 1e-10 * expected.norm()


def small_model(m: int = 3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(m, 3).double()  # P = 26, k = 2


@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("potential", [None, Softmax(), Squared()], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_both_ways_are_the_dense_jacobian(
    name: str, potential, m: int, ways: Ways, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dense, "SMALL", 10**9)
    monkeypatch.setattr(dense, "ATTENDING", 10**9)
    monkeypatch.setattr(dense, "PART", 10**9)
    model, inputs = make(name, m)
    J = on_tangent_space(jacobians(model, inputs), model(inputs).shape, potential)
    for measure, expected in (
        (structure_matrix, J @ J.mT),
        (batch_structure_matrix, J.flatten(0, 1) @ J.flatten(0, 1).T),
    ):
        if potential is not None and potential.on_simplex:  # another basis of the same space
            expected = torch.linalg.eigvalsh(expected)
        first = measure(model, inputs, potential=potential)
        assert ways.take()[0] > 0  # through the layers, with all that they refuse
        second = measure(model, inputs, potential=potential)
        assert ways.take() == ((1, 0) if name in CLOSED else (0, 1))
        close(second, first)
        for found in (first, second):
            found = torch.linalg.eigvalsh(found) if expected.ndim < found.ndim else found
            close(found, expected)


@pytest.mark.parametrize("measure", [structure_matrix, batch_structure_matrix])
def test_the_size_of_the_jacobian_decides(measure, ways: Ways, monkeypatch: pytest.MonkeyPatch):
    for limit, expected in ((3 * 2 * 26, (0, 1)), (3 * 2 * 26 - 1, (1, 0))):
        model, inputs = small_model()
        monkeypatch.setattr(dense, "SMALL", limit)
        measure(model, inputs)
        ways.take()
        measure(model, inputs)
        assert ways.take() == expected


def test_it_is_taken_for_small_models_and_not_for_large_ones(ways: Ways):
    for width, m, expected in ((16, 8, (0, 1)), (16, 512, (1, 0)), (256, 64, (1, 0))):
        model, inputs = nn.Sequential(nn.Linear(8, width), nn.Linear(width, 10)), torch.randn(m, 8)
        structure_matrix(model, inputs)
        ways.take()
        structure_matrix(model, inputs)
        assert ways.take() == expected


@pytest.mark.parametrize("measure", [structure_matrix, batch_structure_matrix])
def test_attention_is_taken_whole_longer(measure, ways: Ways, monkeypatch: pytest.MonkeyPatch):
    model = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)
    inputs = torch.randn(3, 2, 4)
    size = 3 * 8 * sum(p.numel() for p in model.parameters())
    for limit, expected in ((size, (0, 1)), (size - 1, (1, 0))):
        monkeypatch.setattr(dense, "SMALL", 1)
        monkeypatch.setattr(dense, "ATTENDING", limit)
        monkeypatch.setattr(dense, "PART", limit)
        dense._SETTLED.clear()
        measure(model, inputs)
        ways.take()
        measure(model, inputs)
        assert ways.take() == expected


def narrow(k: int, side: int, dims: int = 2) -> tuple[nn.Module, Tensor]:
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    model = nn.Sequential(layer(1, 2, 2, bias=False), nn.Tanh(), nn.Flatten())
    model.append(nn.AdaptiveAvgPool1d(3)).append(nn.Linear(3, k, bias=False))
    return model.double(), torch.randn(5, 1, *[side + 1] * dims).double()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_narrow_convolutions_are_taken_whole_longer(
    dims: int, ways: Ways, monkeypatch: pytest.MonkeyPatch
):
    torch.manual_seed(0)
    model, inputs = narrow(4, 13, dims)
    J = jacobians(model, inputs)
    monkeypatch.setattr(dense, "SMALL", 1)
    for limit, expected in ((J.numel(), (0, 1)), (J.numel() - 1, (1, 0))):
        monkeypatch.setattr(dense, "PART", limit)
        dense._SETTLED.clear()
        for _ in range(2):
            ways.take()
            close(structure_matrix(model, inputs), J @ J.mT)
        assert ways.take() == expected


def test_those_that_are_not_narrow_are_not(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "SMALL", 1)
    # 2 n^2 results of the convolution, and 8 + 3 k parameters
    for k, side, expected in ((4, 4, (0, 1)), (4, 3, (1, 0)), (4, 12, (0, 1)), (92, 12, (1, 0))):
        model, inputs = narrow(k, side)
        for _ in range(2):
            ways.take()
            structure_matrix(model, inputs)
        assert ways.take() == expected


def test_with_one_output_those_are_whose_factors_save_little(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dense, "SMALL", 1)
    # A gradient of 72 x 8 entries: T places cost 576 T, or T^2 (72 + 8) by the factors' products.
    for k, side, expected in ((1, 2, (1, 0)), (1, 3, (0, 1)), (2, 3, (1, 0))):
        model = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Flatten(), nn.AdaptiveAvgPool1d(3))
        model = model.append(nn.Linear(3, k)).double()
        inputs = torch.randn(5, 8, side + 2, side + 2).double()
        J = jacobians(model, inputs)
        for _ in range(2):
            ways.take()
            close(structure_matrix(model, inputs), J @ J.mT)
        assert ways.take() == expected


def test_narrow_ones_are_not_where_all_samples_are_needed(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dense, "SMALL", 1)
    model, inputs = narrow(4, 12)
    batch_structure_matrix(model, inputs)
    assert ways.take()[1] == 0
    assert not opened(model, inputs, batch_structure_matrix)


def test_narrow_ones_are_not_where_the_batch_is_split(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "SMALL", 1)
    model, inputs = narrow(4, 12)
    J = jacobians(model, inputs)
    # 4 outputs times as many results and 5 samples' gradients of the weights, in float64
    whole = 4 * (2 * 5 * (2 * 12**2 + 4) + 5 * 8) * 8
    assert J.numel() * 4 * 8 <= whole  # there is memory for the Jacobian
    for memory, expected in ((whole - 1, False), (whole, True)):
        dense._SETTLED.clear()
        for _ in range(2):
            close(structure_matrix(model, inputs, memory=memory), J @ J.mT)
        assert opened(model, inputs) == expected
    ways.take()
    for memory, expected in ((whole, (0, 1)), (whole - 1, (3, 0)), (whole, (0, 1))):
        close(structure_matrix(model, inputs, memory=memory), J @ J.mT)
        assert ways.take() == expected


def attending(m: int, k: int) -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(4, 2, 4, 0.0, batch_first=True)
    return nn.Sequential(layer, nn.Flatten(), nn.Linear(8, k)), torch.randn(m, 2, 4)


@pytest.mark.parametrize("m", [40, 48])  # parts of 13, 13 and 14 samples, and of 16
@pytest.mark.parametrize("k", [1, 3])
def test_attention_is_taken_in_parts(k: int, m: int, ways: Ways, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    model, inputs = (x.double() for x in attending(m, k))
    J = jacobians(model, inputs)
    k = J.shape[1]
    monkeypatch.setattr(dense, "SMALL", 1)
    monkeypatch.setattr(dense, "ATTENDING", 1)
    for limit, expected in ((16, (0, 3)), (16 - 1e-9, (1, 0))):  # samples to a part
        monkeypatch.setattr(dense, "PART", limit * k * J.shape[2])
        dense._SETTLED.clear()
        close(structure_matrix(model, inputs), J @ J.mT)
        tried = ways.take()[1]
        assert tried == (2 if expected[1] else 0)  # the first part and the last
        close(structure_matrix(model, inputs), J @ J.mT)
        assert ways.take() == expected


def test_no_parts_without_attention(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    model, inputs = nn.Linear(3, 2), torch.randn(24, 3)
    monkeypatch.setattr(dense, "SMALL", 1)
    structure_matrix(model, inputs)
    assert ways.take()[1] == 0
    structure_matrix(model, inputs)
    assert ways.take() == (1, 0)


def test_no_parts_where_all_samples_are_needed(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "SMALL", 1)
    monkeypatch.setattr(dense, "ATTENDING", 1)
    model, inputs = attending(24, 3)
    batch_structure_matrix(model, inputs)
    assert ways.take()[1] == 0
    assert not opened(model, inputs, batch_structure_matrix)


def test_parts_are_of_two_sizes():
    model = nn.Linear(3, 2, bias=False)
    for m in range(8, 60):
        shortcut = dense.Shortcut("example", model, torch.randn(m, 3))
        for part in (96, 97, 140, 360):
            shortcut._part = part
            parts = shortcut.parts(2, math.inf)
            assert [i for rows in parts for i in rows] == list(range(m))
            assert {len(rows) for rows in parts} == {len(parts[0]), len(parts[-1])}
            largest = max(map(len, parts))
            assert len(parts) == 1 or 12 * (largest - 1) < part
            assert shortcut.parts(2, 12 * largest) == parts
            assert shortcut.parts(2, 12 * largest - 1) == []


@pytest.mark.parametrize("size", [13, 14])
def test_a_part_that_is_wrong_closes_it(size: int, ways: Ways, monkeypatch: pytest.MonkeyPatch):
    model, inputs = (x.double() for x in attending(40, 3))
    plain = dense.Shortcut.jacobian

    def wrong(self, basis, like, rows):
        found = plain(self, basis, like, rows)  # None with fused attention
        return found and [J * (1.001 if len(rows) == size else 1) for J in found]

    monkeypatch.setattr(dense.Shortcut, "jacobian", wrong)
    monkeypatch.setattr(dense, "SMALL", 1)
    monkeypatch.setattr(dense, "ATTENDING", 1)
    monkeypatch.setattr(dense, "PART", 16 * 3 * sum(p.numel() for p in model.parameters()))
    J = jacobians(model, inputs)
    for _ in range(2):
        close(structure_matrix(model, inputs), J @ J.mT)
    assert not opened(model, inputs)


def test_what_is_not_finite_in_a_later_part_is_refused(monkeypatch: pytest.MonkeyPatch):
    model, inputs = attending(48, 3)
    monkeypatch.setattr(dense, "SMALL", 1)
    monkeypatch.setattr(dense, "ATTENDING", 1)
    monkeypatch.setattr(dense, "PART", 16 * 3 * sum(p.numel() for p in model.parameters()))
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    inputs[24] = torch.nan
    with pytest.raises(ValueError, match="outputs of 1 of 48 samples hold NaN or infinity"):
        structure_matrix(model, inputs)


def test_the_jacobian_is_not_joined():
    model, inputs = (
        nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)),
        torch.randn(8, 32),
    )
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    size = 4 * 8 * 2 * sum(p.numel() for p in model.parameters())
    assert size < peak_bytes(lambda: structure_matrix(model, inputs)) < 1.5 * size


@pytest.mark.parametrize("m", [2, 5])  # for as many samples as outputs, vmap in vmap is wrong
@pytest.mark.parametrize("weights", [1, 4])
def test_prelu_is_right_both_times(weights: int, m: int):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(weights), nn.Linear(4, 2)).double()
    inputs = torch.randn(m, 3).double()
    J = jacobians(model, inputs)
    for _ in range(2):
        close(structure_matrix(model, inputs), J @ J.mT)


def test_samples_coupled_later_are_refused_as_before():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    inputs = torch.randn(5, 3)
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    with pytest.raises(RuntimeError, match="batch normalisation in training mode"):
        structure_matrix(model.train(), inputs)
    # Without running statistics vmap would take each sample for a batch.
    model[1] = nn.BatchNorm1d(4, track_running_stats=False)
    with pytest.raises(RuntimeError, match="batch normalisation in training mode"):
        structure_matrix(model.eval(), inputs)


def test_what_is_not_finite_is_refused_as_before():
    model, inputs = small_model()
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    inputs[1] = torch.nan
    with pytest.raises(ValueError, match="outputs of 1 of 3 samples hold NaN or infinity"):
        structure_matrix(model, inputs)


def test_a_potential_without_classes_is_refused_as_before():
    model = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    inputs = torch.randn(5, 3)
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    with pytest.raises(ValueError, match=r"dimension of classes, .* got \(5,\)"):
        structure_matrix(model, inputs, potential=Softmax())


def test_hooks_see_what_they_saw(ways: Ways):
    model, inputs = small_model()
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    seen = []
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(model[0], register)(lambda *args: seen.append(args[1][0].shape))
        ways.take()
        structure_matrix(model, inputs)
        assert ways.take() == (1, 0)
        assert seen.pop() == (3, 3)
        handle.remove()
    handle = model[0].register_full_backward_hook(lambda *args: None)
    with pytest.warns(UserWarning, match="Full backward hook is firing"):
        structure_matrix(model, inputs)
    assert ways.take()[1] == 0
    handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    structure_matrix(model, inputs)
    handle.remove()
    assert ways.take() == (1, 0)
    structure_matrix(model, inputs)
    assert ways.take() == (0, 1)


def test_a_wrong_jacobian_is_not_used(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    plain = dense.Shortcut.jacobian
    monkeypatch.setattr(dense.Shortcut, "jacobian", lambda *args: [1.001 * J for J in plain(*args)])
    model, inputs = small_model()
    J = jacobians(model, inputs)
    for _ in range(3):
        close(structure_matrix(model, inputs), J @ J.mT)
    assert not opened(model, inputs)


def test_what_a_model_keeps_stays_plain():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.seen = nn.Linear(3, 2), []

        def forward(self, x):
            self.seen = [self.layer(x)]
            return self.seen[0]

    model, inputs = Keeps(), torch.randn(4, 3)
    for _ in range(3):
        structure_matrix(model, inputs)
        assert torch.equal(model.seen[0], model.layer(inputs))
    assert not opened(model, inputs)


def test_buffers_and_tables_that_a_forward_writes_to_are_left_alone():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.layer(x)

    model, inputs = Counts(), torch.randn(4, 3)
    for _ in range(3):
        structure_matrix(model, inputs)
        assert model.calls == 0
    assert not opened(model, inputs)
    table = nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten(), nn.Linear(6, 2))
    words, before = torch.randint(5, (4, 2)), table[0].weight.clone()
    for _ in range(3):
        structure_matrix(table, words)
        assert torch.equal(table[0].weight, before)
    assert not opened(table, words)


def test_random_numbers_close_it():
    torch.manual_seed(0)
    model, inputs = (
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)),
        torch.ones(5, 3),
    )
    state = torch.get_rng_state()
    found = [structure_matrix(model, inputs) for _ in range(3)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(found[0], found[2])
    assert not opened(model, inputs)
    structure_matrix(model.eval(), inputs)
    assert opened(model, inputs)


def test_a_choice_by_values_closes_it():
    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer(x) if x.abs().sum() > 0 else self.layer(-x)

    model, inputs = Chooses(), torch.randn(4, 3)
    first = structure_matrix(model, inputs)
    assert torch.equal(structure_matrix(model, inputs), first)
    assert not opened(model, inputs)


def test_trained_parameters_and_parts_are_as_they_are_now():
    model, inputs = small_model()
    structure_matrix(model, inputs)
    model[0].weight.requires_grad_(False)
    for _ in range(2):
        J = jacobians(model, inputs)
        close(structure_matrix(model, inputs), J @ J.mT)
    with torch.no_grad():
        model[2].weight.mul_(3)  # a step of training
    J = jacobians(model, inputs)
    close(structure_matrix(model, inputs), J @ J.mT)
    model[1] = nn.ReLU()
    assert not opened(model, inputs)
    J = jacobians(model, inputs)
    close(structure_matrix(model, inputs), J @ J.mT)


def test_little_memory_goes_through_the_layers(ways: Ways):
    model, inputs = small_model()
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    ways.take()
    enough = 4 * (3 * 2 * 26) * 8
    structure_matrix(model, inputs, memory=enough)
    assert ways.take() == (0, 1)
    structure_matrix(model, inputs, memory=enough - 1)
    assert ways.take() == (1, 0)


def test_only_so_many_kinds_are_tried(ways: Ways, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dense, "_MOST_KINDS", 2)
    model, inputs = small_model(6)
    for m, tries in ((1, 1), (2, 1), (3, 0), (4, 0)):
        structure_matrix(model, inputs[:m])
        assert ways.take()[1] == tries
    structure_matrix(model, inputs[:2])
    assert ways.take() == (0, 1)


def test_other_inputs_and_settings_go_through_the_layers(ways: Ways):
    model, inputs = small_model()
    structure_matrix(model, inputs)
    assert opened(model, inputs)
    ways.take()
    for other, context in (
        ({"input": inputs}, contextlib.nullcontext()),
        (inputs, torch.autocast("cpu", dtype=torch.bfloat16)),
        (inputs, nn.utils.parametrize.cached()),
    ):
        with context:
            structure_matrix(model, other)
        layers, whole = ways.take()
        assert layers > 0 == whole
    self_check(model, nn.MSELoss(), inputs, torch.zeros(3, 2).double())
    assert ways.take()[1] == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_narrow_types(dtype: torch.dtype, ways: Ways):
    model, inputs = small_model()
    expected = structure_matrix(model, inputs)
    model, inputs = model.to(dtype), inputs.to(dtype)
    structure_matrix(model, inputs)
    ways.take()
    found = structure_matrix(model, inputs)
    assert ways.take() == (0, 1)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 16 * torch.finfo(dtype).eps * expected.norm()


def test_the_model_is_left_alone():
    model, inputs = small_model()
    model[0].weight.grad = torch.ones(4, 3).double()
    before, kept = {n: t.clone() for n, t in model.state_dict().items()}, inputs.clone()
    for _ in range(2):
        structure_matrix(model, inputs)
    assert opened(model, inputs)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert torch.equal(inputs, kept)
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3).double())
    assert model[2].weight.grad is None
    assert all(isinstance(p, nn.Parameter) for p in model.parameters())


def test_the_whole_jacobian_is_taken_where_it_is_estimated_to_be_shorter(
    ways: Ways, monkeypatch: pytest.MonkeyPatch
):
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    inputs = torch.randn(7, 6).double()
    J = jacobians(model, inputs)
    whole, layers = costs.features(Tape(model, inputs), 7, 4)
    # Only the entries cost the one way, and only calls the other: then the numbers decide.
    entries = 7 * 4 * (6 * 5 + 5 + 5 * 4 + 4)
    assert (whole[4], layers[1]) == (entries, 2)
    monkeypatch.setattr(costs, "LAYERS", (0, 1, 0, 0, 0, 0, 0))
    for call, expected in ((2.1 * 1.1 / entries, (1, 0)), (1.9 * 1.1 / entries, (0, 1))):
        monkeypatch.setattr(costs, "WHOLE", (0, 0, 0, 0, call, 0))
        dense._SETTLED.clear()
        for _ in range(2):
            ways.take()
            close(structure_matrix(model, inputs), J @ J.mT)
        assert ways.take() == expected


def test_what_is_counted_for_the_estimate():
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Flatten(2), nn.LayerNorm(4), nn.Flatten())
    model.append(nn.Linear(12, 5))
    tape = Tape(model, torch.randn(2, 2, 3, 3))
    whole, layers = costs.features(tape, 10, 5)
    md = 10 * 5
    convolution, linear = 4 * (2 * 2 * 2 * 3), 12 * 5
    arriving = 4 * (2 * 2 * 2 + 3)
    parameters = sum(p.numel() for p in model.parameters())
    assert whole == [
        *(1, 3, md * (convolution + linear), md * (arriving + 12 + 5)),
        *(md * parameters, md * parameters * 5),
    ]
    assert layers == [1, 3, 1, md * (12 + 5), md * arriving, md * 12, md * 5 * 3]
