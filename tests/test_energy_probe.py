"""The probe of an ordinary training loop against the plain function, and what it leaves alone."""

import copy
import gc
import pickle
import weakref
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conjopt.measure import EnergyProbe, MeasurementError, comparing, gradient_energy, live
from conjopt.measure import per_sample_gradient_norms as norms_of
from conjopt.measure.layers import rules
from conjopt.measure.live import Live

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


class Written(nn.Module):
    """Writes parameters to views of what layers returned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(3, 6, 1), nn.Linear(6, 4)
        self.token, self.place = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x).transpose(1, 2)
        z[:, 0] = self.token
        y = self.second(z)
        y += self.place
        return self.head(y.relu_()).mean(1)


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
    "written": (Written, (3, 6)),
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
    for _ in range(4):  # the second is written down, and done again from then on
        model.zero_grad()
        CRITERION(model(x), Y).backward()
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), plain))
        assert_close(probe.norms, expected[:: round(1 / share)], rtol=1e-12, atol=0)
        assert_close(probe.energy, probe.norms.square().mean())
    if share == 1:
        assert_close(probe.energy, gradient_energy(model, CRITERION, x, Y))


class Normalised(nn.Module):
    """A group normalisation as it is called in several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.inner = way, nn.Conv1d(3, 4, 1)
        self.norm = nn.GroupNorm(1 if way == "one group" else 2, 4, eps=0.1)
        nn.init.normal_(self.norm.weight)
        if way == "frozen scale":
            self.norm.weight.requires_grad_(False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inner(x)
        if self.way == "no places":
            return self.head(self.norm(h.mean(2)).tanh())
        if self.way == "by name":
            return self.head(F.group_norm(h, num_groups=2, weight=self.norm.weight).mean(2).tanh())
        if self.way == "checkpointed":
            h = checkpoint(self.norm, h, use_reentrant=False)
        else:
            h = self.norm(h)
        return self.head((h.relu_() if self.way == "written to" else h.tanh()).mean(2))


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    "way",
    ["plain", "one group", "frozen scale", "no places", "by name", "checkpointed", "written to"],
)
def test_group_normalisation_without_normalising_again(way, share):
    torch.manual_seed(0)
    model, x = Normalised(way).double(), torch.randn(6, 3, 5, dtype=torch.float64)
    model.norm.bias.requires_grad_(way != "by name")  # where it has no part
    probe = EnergyProbe(model, share=share)
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, norms_of(model, CRITERION, x, Y)[:: round(1 / share)])


def test_group_normalisation_under_autocast():
    torch.manual_seed(0)
    model, x = Normalised("plain"), torch.randn(6, 3, 5)
    expected = norms_of(model, CRITERION, x, Y)
    probe = EnergyProbe(model)
    with torch.autocast("cpu", torch.bfloat16):
        CRITERION(model(x), Y).backward()
    assert_close(probe.norms.float(), expected, rtol=3e-2, atol=0)


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


class Again(nn.Module):
    """Calls itself, with gradients or without, or stops."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head, self.stop = nn.Linear(3, 3), nn.Linear(3, 3), False

    def forward(self, x: Tensor, deep: int = 2) -> Tensor:
        h = torch.tanh(self.inner(x))
        if self.stop:
            raise KeyboardInterrupt
        with torch.no_grad():
            h = h + self(h, 0) if deep else h
        return self.head(self(h, deep - 1) if deep else h)


@pytest.mark.parametrize("every", [1, 2])
def test_a_module_that_calls_itself_is_one_forward(every):
    torch.manual_seed(0)
    model = Again()
    probe = EnergyProbe(model, every=every)
    for number in range(4):
        x = torch.randn(6, 3)
        probe.norms = None
        CRITERION(model(x), Y).backward()
        assert (probe.norms is None) == bool(number % every)
        if probe.norms is not None:
            twin = copy.deepcopy(model)  # which is not watched
            rows = [
                torch.autograd.grad(CRITERION(twin(x[i : i + 1]), Y[i : i + 1]), parameters)
                for parameters in [list(twin.parameters())]
                for i in range(6)
            ]
            expected = [torch.cat([g.flatten() for g in row]).norm() for row in rows]
            assert_close(probe.norms, torch.stack(expected))


@pytest.mark.parametrize("removed", [False, True])
def test_an_interrupted_forward_leaves_nothing_behind(removed):
    """KeyboardInterrupt, as in a notebook, ends a forward without its hooks."""
    torch.manual_seed(0)
    model = Again()
    probe = EnergyProbe(model)
    x = torch.randn(6, 3)
    CRITERION(model(x), Y).backward()
    model.stop = True
    with pytest.raises(KeyboardInterrupt):
        model(x)
    model.stop, probe.norms = False, None
    if removed:
        probe.remove()
    x = torch.randn(6, 3)
    CRITERION(model(x), Y).backward()
    assert _get_current_function_mode_stack() == []
    assert (probe.norms is None) == removed
    if not removed:
        expected = probe.norms
        CRITERION(model(x), Y).backward()
        assert_close(probe.norms, expected)


def test_a_probe_of_a_part_checks_it_within_a_watched_forward():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    outer, inner = EnergyProbe(model), EnergyProbe(model[0])
    CRITERION(model(torch.randn(6, 4)), Y).backward()
    assert (outer.norms > inner.norms).all()


def test_forwards_without_a_backward_hold_nothing():
    model, x = make("mlp")
    EnergyProbe(model)
    for _ in range(3):
        outputs = model(x)
        hidden = weakref.ref(outputs)
        del outputs
        gc.collect()
        assert hidden() is None
    assert not [item for item in gc.get_objects() if type(item) is Live]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_a_step_leaves_nothing_of_its_own_for_the_collector(name, fused):
    """Reference cycles would hold activations until Python looks for them, and make it look."""
    model, x = make(name)
    EnergyProbe(model, fused=fused)
    for _ in range(2):  # the first of a kind checks
        CRITERION(model(x), Y).backward()
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        CRITERION(model(x), Y).backward()
        gc.collect()
        left = [item for item in gc.garbage if type(item) in (FunctionType, Tensor, Live)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    torchs_own = ("torch.utils._pytree", "torch._functorch")  # closures that call themselves
    assert not [item for item in left if not getattr(item, "__module__", "").startswith(torchs_own)]


def test_a_gradient_that_is_written_to_later_in_the_backward_was_measured_before():
    """The gradients of a bias are those of the outputs themselves, so their norms can't wait."""
    model, x = make("mlp")
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    plain = probe.norms
    head = norms_of(model[2], CRITERION, model[:2](x).detach(), Y)

    def hooked(module: nn.Module, given: object, result: Tensor) -> None:
        result.grad_fn.register_prehook(lambda gradients: double(gradients[0]))

    # This hook runs after the probe's: what reaches the layers in front is twice as much.
    model[2].register_forward_hook(hooked)
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, (4 * plain.square() - 3 * head.square()).sqrt())


def test_a_second_backward_without_the_graph_is_torchs_own_error():
    model, x = make("mlp")
    EnergyProbe(model)
    loss = model(x).sum()  # which keeps nothing for its backward
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_hooks_that_change_a_gradient_are_before_the_probe():
    model, x = make("mlp")
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    plain = probe.norms
    model[2].register_forward_hook(lambda _, given, result: result.register_hook(double) and None)
    CRITERION(model(x), Y).backward()
    assert_close(probe.norms, 2 * plain)


def double(gradient: Tensor) -> None:
    with torch.no_grad():
        gradient.mul_(2)


def test_norms_of_small_gradients_are_taken_together(monkeypatch):
    """However many wait, and of whatever types, they all count."""
    model = nn.Sequential(*[Scaled() for _ in range(9)], nn.Linear(4, 3)).double()
    model[4].float()
    model[5].float()
    x = torch.randn(6, 4, dtype=torch.float64)
    expected = norms_of(model, CRITERION, x, Y)
    for many in (1, 2, 4, 64):
        monkeypatch.setattr(live, "MANY", many)
        probe = EnergyProbe(model)
        CRITERION(model(x), Y).backward()
        assert_close(probe.norms, expected.to(probe.norms.dtype), rtol=1e-6, atol=0)
        probe.remove()


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x.to(self.weight.dtype) * self.weight).double()


def test_a_removed_probe_stands_still():
    model, x = make("mlp")
    probe = EnergyProbe(model)
    probe.remove()
    CRITERION(model(x), Y).backward()
    assert probe.norms is None
    assert probe.energy is None
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_several_forwards_in_one_backward_are_refused():
    model, x = make("mlp")
    probe = EnergyProbe(model)
    loss = CRITERION(model(x), Y) + CRITERION(model(x.flip(0)), Y)
    with pytest.raises(RuntimeError, match="one backward went through several measured forwards"):
        loss.backward()
    assert probe.norms is None
    for _ in range(2):  # one after the other, as under accumulation
        CRITERION(model(x), Y).backward()
        assert_close(probe.norms, norms_of(model, CRITERION, x, Y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_model_are_not_watched(copied):
    model, x = make("mlp")
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()
    norms = probe.norms
    other = copied(model)
    CRITERION(other(2 * x), Y).backward()
    assert probe.norms is norms
    probe.remove()
    assert all(p.grad is not None for p in other.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"share": 0.0},
        {"share": 1.5},
        {"share": "half"},
        {"every": 0},
        {"every": 1.5},
        {"every": None},
    ],
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EnergyProbe(nn.Linear(2, 2), **options)


def test_what_is_no_module_is_refused():
    with pytest.raises(TypeError, match=r"got function, expected a torch\.nn\.Module"):
        EnergyProbe(lambda x: x)


def test_nothing_waits_for_the_device():
    from test_no_synchronisation import Spy  # counts what reads a value on the host

    model, x = make("cnn")
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()  # the first of its kind checks, and waits
    with Spy() as spy:
        CRITERION(model(x), Y).backward()
    assert not spy.seen
    assert probe.norms is not None


class Gated(nn.Module):
    """Takes positional and keyword arguments, and may bring samples together."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(
        self, x: Tensor, *, gate: Tensor | None = None, shift: Tensor | None = None,
        centred: bool = False,
    ) -> Tensor:  # fmt: skip
        h = self.inner(x).tanh()
        h = h if gate is None else h * gate
        h = h if shift is None else h + shift
        outputs = self.head(h)
        return outputs - outputs.mean(0) if centred else outputs


def gated() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return (
        Gated().double(),
        torch.randn(6, 6, dtype=torch.float64),
        torch.randn(6, 5, dtype=torch.float64),
    )


@pytest.fixture
def checks(monkeypatch):
    seen = []
    plain = comparing.Check.problems
    monkeypatch.setattr(
        comparing.Check, "problems", lambda self: (seen.append(self.model), plain(self))[1]
    )
    return seen


@pytest.mark.parametrize("positional", [True, False])
def test_keyword_arguments_are_measured_and_checked(positional, checks):
    model, x, gate = gated()
    expected = norms_of(model, CRITERION, {"x": x, "gate": gate}, Y)
    checks.clear()
    probe = EnergyProbe(model)
    for _ in range(2):
        args, kwargs = ((x,), {"gate": gate}) if positional else ((), {"x": x, "gate": gate})
        CRITERION(model(*args, **kwargs), Y).backward()
        assert_close(probe.norms, expected, rtol=1e-12, atol=0)
    assert len(checks) == 1
    CRITERION(model(x, shift=gate), Y).backward()  # the same shapes under another name
    assert_close(
        probe.norms, norms_of(model, CRITERION, {"x": x, "shift": gate}, Y), rtol=1e-12, atol=0
    )
    assert len(checks) == 2 + 1  # and that of the function


def test_a_wrong_rule_is_found_with_keyword_arguments():
    model, x, gate = gated()
    plain = rules._RULES[F.linear]
    rules._RULES[F.linear] = lambda use, cotangents: plain(use, cotangents)[:1]
    EnergyProbe(model)
    try:
        with pytest.raises(MeasurementError, match=r"'inner\.bias', 'head\.bias' are measured"):
            model(x, gate=gate)
    finally:
        rules._RULES[F.linear] = plain


def test_samples_that_meet_are_refused_with_keyword_arguments():
    model, x, gate = gated()
    probe = EnergyProbe(model)
    with pytest.raises(MeasurementError, match="couples samples"):
        model(x, gate=gate, centred=True)
    CRITERION(model(x, gate=gate), Y).backward()
    assert probe.norms is not None


def test_samples_that_meet_later_are_refused():
    """The check of the first forward is passed; a flag that it cannot see changes after it."""
    model, x, _ = gated()
    model.register_forward_hook(lambda m, args, output: output - output.mean(0) if flag else output)
    flag = False
    EnergyProbe(model)
    model(x)
    flag = True
    with pytest.raises(RuntimeError, match="In front of the outputs, samples meet"):
        model(x)
    assert not torch.overrides._get_current_function_mode_stack()
    flag = False
    CRITERION(model(x), Y).backward()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["whole", "part", "in place"])
def test_compiled_parts_are_refused_by_name(how):
    torch.compiler.reset()
    model, x = make("mlp")
    compiled = torch.compile(model if how == "whole" else model[2], backend="eager")
    if how == "in place":
        model[2].compile(backend="eager")
    elif how == "part":
        model[2] = compiled
    watched = compiled if how == "whole" else model
    probe = EnergyProbe(watched)
    name = "the model itself" if how == "whole" else "'2'"
    with pytest.raises(RuntimeError, match=f"{name} of .* is compiled.*per_sample_gradient_norms"):
        watched(x)
    probe.remove()
    expected = norms_of(make("mlp")[0], CRITERION, x, Y)
    assert_close(norms_of(watched, CRITERION, x, Y), expected, rtol=1e-12, atol=0)
    torch.compiler.reset()


def test_renormalised_embeddings_are_those_of_the_loop():
    torch.manual_seed(0)
    table = nn.Embedding(7, 4, max_norm=0.5)
    model = nn.Sequential(table, nn.Flatten(), nn.Linear(20, 3)).double()
    tokens = torch.randint(7, (6, 5))
    with torch.no_grad():
        table.weight.mul_(3)
    twin = copy.deepcopy(model)
    CRITERION(twin(tokens), Y).backward()
    probe = EnergyProbe(model)
    CRITERION(model(tokens), Y).backward()
    for mine, other in zip(model.parameters(), twin.parameters()):
        assert torch.equal(mine, other)
        assert torch.equal(mine.grad, other.grad)
    assert_close(probe.norms, norms_of(twin, CRITERION, tokens, Y), rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("channels", [4, 8])
def test_a_backward_outside_of_the_autocast_of_its_forward(channels, fused):
    torch.manual_seed(0)
    layers = [nn.Conv1d(channels, 16, 3), nn.Conv1d(16, 4, 1), nn.ConvTranspose1d(4, 4, 3)]
    model = nn.Sequential(*layers, nn.Linear(12, 12), nn.Flatten(), nn.Linear(48, 3))
    x = torch.randn(6, channels, 12)
    expected = norms_of(model, CRITERION, x, Y)
    probe = EnergyProbe(model, fused=fused)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            loss = CRITERION(model(x), Y)
        loss.backward()
        assert_close(probe.norms.float(), expected, rtol=3e-2, atol=0)


def test_norms_under_autocast_do_not_overflow_where_the_inputs_are_wide():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), 5 * torch.randn(6, 4)
    probe = EnergyProbe(model)
    CRITERION(model(x), Y).backward()  # with the check of the first use
    with torch.autocast("cpu", torch.float16):
        loss = CRITERION(model(x), Y)
    (2**14 * loss).backward()
    expected = 2**14 * norms_of(model, CRITERION, x, Y)
    assert expected.max() > 2 * torch.finfo(torch.float16).max
    assert_close(probe.norms, expected, rtol=3e-2, atol=float(1e-3 * expected.max()))
