"""Forwards that go along the calls of earlier ones: the same norms, and nothing found out twice."""

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from conjopt.measure import EnergyProbe
from conjopt.measure import per_sample_gradient_norms as norms_of
from conjopt.measure.layers import pieces, plan
from conjopt.measure.layers.plan import Followed, Found, Plan
from conjopt.measure.layers.uses import Recorder
from conjopt.measure.live import Live

CRITERION = nn.CrossEntropyLoss()
Y = torch.tensor([0, 1, 2, 1, 0, 2])


class Attending(nn.Module):
    """Learned positions, a learned first place, chunks, and a module that returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 4), nn.Embedding(5, 4)
        self.first = nn.Parameter(torch.randn(1, 1, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gate, self.head = nn.Linear(4, 8), nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1])) * self.scale
        h = torch.cat([self.first.expand(len(x), -1, -1), h], 1)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        a, b = self.gate(h).chunk(2, -1)
        return self.head((a * b.sigmoid())[:, 0, ...])


class Normalised(nn.Module):
    """Weights that are made of others, also by writing, and by looking rows up."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
        self.table, self.scale = nn.Embedding(7, 3), nn.Parameter(torch.ones(3))
        self.padded = nn.Embedding(7, 3, padding_idx=2)

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.tensor([0, 2, 2, 5, 1])
        made = self.table(rows).mul_(2) + self.padded(rows) + self.table.weight[:5] * self.scale
        return torch.tanh(self.inner(x)) @ (made + self.table(rows))


class Looking(nn.Module):
    """Rows that are looked up, and meet samples as they are, written to, or padded."""

    def __init__(self, more: dict[str, object], writes: bool = False) -> None:
        super().__init__()
        self.table, self.writes = nn.Embedding(7, 3, **more), writes

    def forward(self, x: Tensor) -> Tensor:
        made = self.table(torch.tensor([0, 2, 2, 1]))
        return x @ (made.mul_(2) if self.writes else made)


class Writing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(x.shape)
        h[:, 1:] = self.inner(x)[:, 1:]
        return self.head(F.relu(h.mul_(2), inplace=True))


MODELS = {
    "attending": (Attending, torch.randint(9, (6, 5))),
    "normalised": (Normalised, torch.randn(6, 4, dtype=torch.float64)),
    "looking up": (lambda: Looking({}), torch.randn(6, 4, dtype=torch.float64)),
    "padded": (lambda: Looking({"padding_idx": 2}), torch.randn(6, 4, dtype=torch.float64)),
    "written to": (lambda: Looking({}, writes=True), torch.randn(6, 4, dtype=torch.float64)),
    "scaled": (
        lambda: nn.Sequential(nn.Linear(4, 4), Looking({"scale_grad_by_freq": True})),
        torch.randn(6, 4, dtype=torch.float64),
    ),
    "writing": (Writing, torch.randn(6, 4, dtype=torch.float64)),
    "convolutional": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True), nn.GroupNorm(1, 3),
            nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3),
        ),
        torch.randn(6, 2, 4, 4, dtype=torch.float64),
    ),
    "recurrent": (
        lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True), Last()),
        torch.randn(6, 5, 4, dtype=torch.float64),
    ),
}  # fmt: skip


class Last(nn.Module):
    def forward(self, x: tuple[Tensor, object]) -> Tensor:
        return x[0][:, -1]


def check(model: nn.Module, probe: EnergyProbe, x: Tensor, y: Tensor = Y, **named: object) -> None:
    model.zero_grad()
    CRITERION(model(x, **named), y).backward()
    twin = copy.deepcopy(model)
    inputs = {"x": x, **named} if named else x
    rtol = 1e-12 if next(model.parameters()).dtype == torch.float64 else 1e-4
    assert_close(probe.norms, norms_of(twin, CRITERION, inputs, y), rtol=rtol, atol=1e-14)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_forwards_along_a_plan_give_the_same(name, fused):
    torch.manual_seed(0)
    build, x = MODELS[name]
    model = build().double()
    probe = EnergyProbe(model, fused=fused)
    for _ in range(5):
        check(model, probe, x)
        x = x.roll(1, 0)


WRITES = {
    "part": lambda made: made[:, :2].mul_(3),
    "row": lambda made: made[0].mul_(3),
    "flat": lambda made: made.view(-1).mul_(3),
    "assigned": lambda made: made[0].__setitem__(slice(2), 0.0),
    "activated": lambda made: F.relu(made[1:], inplace=True),
    "hooked": lambda made: made.register_hook(lambda gradient: 2 * gradient) and None,
}


@pytest.mark.parametrize("how", WRITES)
def test_rows_that_were_looked_up_may_be_written_to(how):
    torch.manual_seed(0)
    model = Looking({}).double()
    made = model.table.forward
    x = torch.randn(6, 4, dtype=torch.float64)
    probe = EnergyProbe(model)
    check(model, probe, x)

    def written(index: Tensor) -> Tensor:
        rows = made(index)
        WRITES[how](rows)
        return rows

    model.table.forward = written
    for _ in range(3):
        model.zero_grad()
        outputs = model(x)
        CRITERION(outputs, Y).backward()
        found, norms, gradients = probe.norms, [], []
        for i in range(len(x)):
            loss = F.cross_entropy(model(x[i : i + 1]), Y[i : i + 1])
            gradients.append(torch.autograd.grad(loss, list(model.parameters()))[0])
            norms.append(gradients[-1].norm())
        assert_close(found, torch.stack(norms), rtol=1e-12, atol=0)
        assert_close(model.table.weight.grad, torch.stack(gradients).mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("places", [3, 40])
def test_many_rows_that_are_looked_up_are_not_compared_with_each_other(places, monkeypatch):
    """A table of positions; its gradients are as large as samples times rows, or smaller."""
    torch.manual_seed(0)
    model = Positions(40).double()
    compared = []
    found = pieces._lookup_gram
    monkeypatch.setattr(
        pieces, "_lookup_gram", lambda piece: compared.append(piece) or found(piece)
    )
    probe = EnergyProbe(model)
    x = torch.randn(6, places, 4, dtype=torch.float64)
    model(x).square().sum().backward()
    assert bool(compared) == (places == 3)
    probe.remove()
    rows = [torch.autograd.grad(6 * model(x[i : i + 1]).square().sum(), [model.table.weight])[0]
            for i in range(6)]  # fmt: skip
    assert_close(probe.norms, torch.stack([g.norm() for g in rows]), rtol=1e-12, atol=0)


class Positions(nn.Module):
    def __init__(self, places: int) -> None:
        super().__init__()
        self.table = nn.Embedding(places, 4)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table(torch.arange(x.shape[1]))).tanh().sum(1)


@pytest.mark.parametrize("rows", [3, 40])  # as they are, or compared with each other
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_norms_of_looked_up_rows_do_not_underflow_in_float16(scale, rows):
    torch.manual_seed(0)
    model = Positions(rows).half()
    x = torch.randn(6, 3, 4).half()
    probe = EnergyProbe(model)
    (model(x).float().square().mean() * scale).backward()
    twin = copy.deepcopy(model).double()
    expected = norms_of(twin, SquaredMean(), x.double(), Y) * scale
    assert_close(probe.norms.double(), expected, rtol=1e-2, atol=0)


class SquaredMean(nn.Module):
    def forward(self, outputs: Tensor, targets: object) -> Tensor:
        return outputs.square().mean()


class Student(nn.Module):
    """A part runs with other weights first, in a call that the plan does not get through."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = Writing(), nn.Linear(3, 3)
        self.teacher = {
            name: torch.randn(p.shape, dtype=torch.float64)
            for name, p in self.inner.named_parameters()
        }

    def forward(self, x: Tensor) -> Tensor:
        other = torch.func.functional_call(self.inner, self.teacher, (x,))
        return self.head(self.inner(x) + other)


def test_weights_that_are_swapped_for_a_while_are_known():
    torch.manual_seed(0)
    model = Student().double()
    probe = EnergyProbe(model)
    for _ in range(3):
        check(model, probe, torch.randn(6, 4, dtype=torch.float64))


def test_probes_of_the_first_and_of_every_other_sample_are_told_apart():
    torch.manual_seed(0)
    for order in ((False, True), (True, False)):
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(6, 4, dtype=torch.float64)
        expected = norms_of(model, CRITERION, x, Y)
        for fused in order:
            probe = EnergyProbe(model, share=0.5, fused=fused)
            for _ in range(3):
                CRITERION(model(x), Y).backward()
                assert_close(probe.norms, expected[:3] if fused else expected[::2])
            probe.remove()


@pytest.mark.parametrize("copied", [lambda m: pickle.loads(pickle.dumps(m)), copy.deepcopy])
def test_a_model_that_holds_its_probe_can_be_copied(copied):
    model = Attending()
    model.probe = EnergyProbe(model)
    x = MODELS["attending"][1]
    for _ in range(2):
        CRITERION(model(x), Y).backward()
    twin = copied(model)
    assert twin.probe.norms is not model.probe.norms
    assert_close(twin(x), model(x))


@pytest.mark.parametrize("name", MODELS)
def test_a_step_holds_nothing_once_it_is_over(name):
    """Hooks on nodes and what leads to these nodes must not hold each other."""
    build, x = MODELS[name]
    model = build().double()
    EnergyProbe(model)
    gc.collect()
    before = [item for item in gc.get_objects() if type(item) is Live]
    for backward in (True, True, False):
        loss = CRITERION(model(x), Y)
        if backward:
            loss.backward()
    del loss
    gc.collect()
    after = [item for item in gc.get_objects() if type(item) is Live]
    assert len(after) == len(before)


@pytest.mark.parametrize("name", ["attending", "convolutional"])
def test_nothing_is_found_out_twice(name, monkeypatch):
    anew: list[object] = []
    found = Recorder._anew
    monkeypatch.setattr(
        Recorder,
        "_anew",
        lambda self, function, *given: anew.append(function) or found(self, function, *given),
    )
    build, x = MODELS[name]
    model = build().double()
    EnergyProbe(model)
    for number in range(4):
        anew.clear()
        CRITERION(model(x), Y).backward()
        assert bool(anew) == (number == 0)


class Changing(nn.Module):
    """What it does depends on attributes; the sizes are the same throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)
        self.register_buffer("shift", torch.ones(6))
        self.dim, self.first, self.scale, self.by = 1, True, 2.0, [1, 0]
        self.stop, self.trains = False, True
        self.by_name = ["input", "weight", "bias"]
        self.kept = nn.Parameter(torch.randn(6))
        self.others = [self.kept]

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        with torch.set_grad_enabled(self.trains):
            h = (self.a if self.first else self.b)(x)
        if self.stop:
            raise ValueError("stop")
        h = torch.tanh(h * self.scale + self.shift) * self.others[0]
        given = {"input": h, "weight": self.b.weight, "bias": self.b.bias}
        h = h + F.linear(**{name: given[name] for name in self.by_name})
        if twice:
            h = self.a(h)
        h = h.softmax(self.dim if self.dim == 1 else -1)
        h = torch.cat([h, x][:: self.by[0]], 1)[:, :6]
        return self.head(h[:, slice(self.by[1], self.by[1] + 6)].contiguous())


CHANGES = {
    "another module": lambda m: setattr(m, "first", not m.first),
    "another number": lambda m: setattr(m, "scale", m.scale + 1),
    "a number of another type": lambda m: setattr(m, "scale", int(m.scale)),
    "another order": lambda m: m.by.__setitem__(0, -m.by[0]),
    "another buffer": lambda m: setattr(m, "shift", torch.randn_like(m.shift)),
    "a buffer written to": lambda m: m.shift.normal_(),
    "another weight": lambda m: setattr(m.a, "weight", nn.Parameter(torch.randn_like(m.a.weight))),
    "the same weight": lambda m: setattr(m.b, "weight", m.a.weight),
    "a frozen weight": lambda m: m.a.weight.requires_grad_(not m.a.weight.requires_grad),
    "a frozen module": lambda m: m.b.requires_grad_(False),
    "keywords in another order": lambda m: m.by_name.reverse(),
    "a weight that leaves": lambda m: m._parameters.pop("kept", None),
    "another type": lambda m: m.float() if m.a.weight.dtype is torch.float64 else m.double(),
    "without gradients": lambda m: setattr(m, "trains", not m.trains),
    "another layer": lambda m: setattr(m, "head", nn.Linear(6, 3, dtype=m.a.weight.dtype)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_forward_that_changes_is_looked_at_anew(change):
    torch.manual_seed(0)
    model = Changing().double()
    probe = EnergyProbe(model)
    for number in range(8):
        x = torch.randn(6, 6, dtype=model.a.weight.dtype)
        check(model, probe, x)
        if number % 2:
            CHANGES[change](model)


class Turning(nn.Module):
    """As many samples as places and channels: what is called with what decides where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 3)
        self.grid = nn.Parameter(torch.randn(4, 4))
        self.turned, self.mixed = False, False

    def way(self, h: Tensor) -> Tensor:
        return torch.transpose(h, 0, int(self.turned))

    def forward(self, x: Tensor) -> Tensor:
        h = self.way(torch.tanh(self.inner(self.way(x))))
        mean = h.mean(0)
        return self.head(h @ (mean if self.mixed else self.grid)).mean(1)


class ByName(Turning):
    def way(self, h: Tensor) -> Tensor:
        return torch.transpose(h, dim0=0, dim1=int(self.turned))


class ByItems(Turning):
    def way(self, h: Tensor) -> Tensor:
        return torch.permute(h, (1, 0, 2) if self.turned else (0, 1, 2))


class ByFunction(Turning):
    def way(self, h: Tensor) -> Tensor:
        return (Tensor.adjoint if self.turned else Tensor.clone)(h.permute(1, 2, 0)).permute(
            *((1, 2, 0) if self.turned else (2, 0, 1))
        )


class ByAnother(Turning):
    def way(self, h: Tensor) -> Tensor:
        ways = [h, h.transpose(0, 1)]
        return ways[self.turned] * 2


@pytest.mark.parametrize("kind", [Turning, ByName, ByItems, ByFunction, ByAnother])
def test_samples_may_be_elsewhere_the_next_time(kind):
    torch.manual_seed(0)
    model = kind().double()
    probe = EnergyProbe(model)
    for turned in (False, False, True, True, False, True):
        model.turned = turned
        check(model, probe, torch.randn(4, 4, 4, dtype=torch.float64), Y[:4])


def test_samples_in_the_place_of_a_weight_are_noticed():
    torch.manual_seed(0)
    model = Turning().double()
    probe = EnergyProbe(model)
    for _ in range(3):
        check(model, probe, torch.randn(6, 4, 4, dtype=torch.float64))
    model.mixed = True
    with pytest.raises(RuntimeError, match="samples meet each other"):
        model(torch.randn(6, 4, 4, dtype=torch.float64))


class Sliced(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)
        self.register_buffer("start", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([x, 2 * x])
        return self.head(h[self.start : self.start + len(x)])


def test_a_slice_whose_ends_are_tensors_is_looked_at_each_time():
    torch.manual_seed(0)
    model = Sliced().double()
    probe = EnergyProbe(model)
    for _ in range(3):
        check(model, probe, torch.randn(6, 4, dtype=torch.float64))
    model.start.fill_(1)
    with pytest.raises(RuntimeError, match="samples meet each other"):
        CRITERION(model(torch.randn(6, 4, dtype=torch.float64)), Y).backward()


def test_inputs_of_other_kinds():
    torch.manual_seed(0)
    model = Changing().double()
    probe = EnergyProbe(model)
    for samples in (6, 5, 6, 1, 2, 6, 5):
        for needs in (False, True):
            for twice in (False, True):
                x = torch.randn(samples, 6, dtype=torch.float64, requires_grad=needs)
                check(model, probe, x, Y[:samples], twice=twice)


def test_a_forward_that_stops_half_way_leaves_the_plan_right():
    torch.manual_seed(0)
    model = Changing().double()
    probe = EnergyProbe(model)
    for stop in (True, False, True, False, False):
        model.stop = stop
        x = torch.randn(6, 6, dtype=torch.float64)
        if stop and probe.norms is not None:
            with pytest.raises(ValueError, match="stop"):
                model(x)
        else:
            model.stop = False
            check(model, probe, x)


class Copying(nn.Module):
    """Two tensors of which one may be the other."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        other = x.contiguous()
        return torch.addcmul(x, other, self.scale)[:, :3]


def test_two_tensors_may_be_one_the_next_time():
    torch.manual_seed(0)
    for order in ((0, 1, 1), (1, 0, 0)):
        model = Copying().double()
        probe = EnergyProbe(model)
        for whole in order:
            x = torch.randn(6, 12, dtype=torch.float64)[:, ::2]
            check(model, probe, x.contiguous() if whole else x)


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(3, 3, 3)

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return self.mix(x, other)


def test_two_inputs_may_be_one_the_next_time():
    torch.manual_seed(0)
    model = Pair().double()
    probe = EnergyProbe(model)
    x, other = torch.randn(2, 6, 3, dtype=torch.float64)
    for second in (other, x, other, x, x):
        CRITERION(model(x, second), Y).backward()
        expected = norms_of(model, CRITERION, (x, second.clone()), Y)
        assert_close(probe.norms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(6, 3),
        torch.ones(6, 2, requires_grad=True),
        torch.ones(6, 2).double(),
        nn.Parameter(torch.ones(6, 2), requires_grad=False),
        (torch.ones(6, 2),),
        None,
    ],
)
def test_a_call_that_returns_something_else_is_looked_at_anew(other):
    x, known = torch.ones(6, 2), Plan()
    Followed(known, [x], []).add(
        torch.relu, (x,), {}, x.relu(), Found([None]), False, lambda t: False
    )
    for result in (x.relu(), other):
        followed = Followed(known, [x], [])
        step = followed.step(torch.relu, (x,), {})
        found = followed.results(step, result)
        assert (found is None) == (result is other)
    assert known.steps == []


def test_a_plan_that_keeps_changing_is_given_up(monkeypatch):
    monkeypatch.setattr(plan, "_CHANGES", 3)
    model = Changing().double()
    probe = EnergyProbe(model)
    for _ in range(6):
        model.scale += 1
        check(model, probe, torch.randn(6, 6, dtype=torch.float64))
    (known,) = probe._plans.values()
    assert not known.grows
    assert [step.function for step in known.steps].count(F.linear) == 1  # of three


def test_a_plan_holds_no_tensors():
    model, x = MODELS["attending"][0](), MODELS["attending"][1]
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    (known,) = probe._plans.values()
    described = [v for step in known.steps for v in (*step.args, *step.kwargs.values())]
    assert len(known.steps) > 10
    assert not [value for value in described if isinstance(value, Tensor)]


def test_plans_of_many_kinds_are_dropped(monkeypatch):
    monkeypatch.setattr("conjopt.measure.energy._MOST_KINDS", 3)
    model = nn.Linear(2, 3)
    probe = EnergyProbe(model)
    for samples in range(1, 9):
        CRITERION(model(torch.randn(samples, 2)), Y[:1].expand(samples)).backward()
        assert len(probe._plans) <= 3


def test_a_recorder_with_a_plan_records_the_same():
    torch.manual_seed(0)
    model, x = MODELS["attending"]
    model, known = model(), Plan()
    seen = []
    for _ in range(3):
        recorder = Recorder(dict(model.named_parameters()), [x], list, len(x), plan=known)
        with recorder:
            output = model(x)
        seen.append([(u.function, u.places, u.whole, u.kind, u.shapes) for u in recorder.uses])
        assert recorder.where(output) == (0, 1)
    assert seen[0] == seen[1] == seen[2]
