"""The self-check: silent where all is well, and every problem in one message."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.losses import FenchelYoungLoss
from conjopt.measure import comparing
from conjopt.measure.checking import MeasurementError, first_use_check, self_check
from conjopt.measure.layers import rules
from conjopt.potentials import Sparsemax

X, Y = torch.randn(5, 6, generator=torch.Generator().manual_seed(0)), torch.arange(5) % 4
IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.arange(20).reshape(5, 4) % 7


class Calls(nn.Module):
    """A function of parts and parameters as a model."""

    def __init__(self, function, *parts: nn.Module, **parameters: Tensor) -> None:
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *args: Tensor, **kwargs: Tensor):
        return self.function(self, *args, **kwargs)


def pooled(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(4))


def recurrent(self: Calls, x: Tensor) -> Tensor:
    return self.parts[1](self.parts[0](x.unsqueeze(1).expand(-1, 3, -1))[0][:, -1])


def first(self: Calls, x: Tensor) -> Tensor:
    return self.parts[0](x)


def frozen_then_trained() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8).requires_grad_(False), nn.Linear(8, 4))


GOOD = {
    "perceptron": (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), X),
    "convolution": (lambda: pooled(nn.Conv2d(3, 5, 3), nn.GroupNorm(5, 5), nn.ReLU()), IMAGES),
    "batch norm": (lambda: pooled(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), IMAGES),
    "bias without effect": (lambda: pooled(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4)), IMAGES),
    "recurrent": (lambda: Calls(recurrent, nn.LSTM(6, 5, batch_first=True), nn.Linear(5, 4)), X),
    "bag": (lambda: nn.Sequential(nn.EmbeddingBag(7, 6), nn.Linear(6, 4)), TOKENS),
    "frozen part": (frozen_then_trained, X),
    "unused parameter": (lambda: Calls(first, nn.Linear(6, 4), nn.Linear(2, 2)), X),
    "many outputs": (lambda: nn.Linear(6, 40), X),
}


@pytest.mark.filterwarnings("ignore:TF32 acceleration", "ignore:There is a performance drop")
@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_is_said_where_all_is_well(name: str, dtype: torch.dtype):
    torch.manual_seed(0)
    make, x = GOOD[name]
    x = x.to(dtype) if x.is_floating_point() else x
    model = make()
    model(x.float() if x.is_floating_point() else x)
    model.to(dtype)
    before = [b.clone() for b in (*model.parameters(), *model.buffers())]
    state, mode = torch.get_rng_state(), [m.training for m in model.modules()]
    assert self_check(model, nn.CrossEntropyLoss(), x, Y) is None
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers())))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert mode == [m.training for m in model.modules()]


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(reduction="sum"), Y),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0, 4.0]), ignore_index=0), Y),
        (nn.MSELoss(), torch.ones(5, 4)),
        (nn.BCEWithLogitsLoss(), torch.ones(5, 4)),
        (FenchelYoungLoss(Sparsemax()), Y),
    ],
)
def test_criteria(loss: nn.Module, targets: Tensor):
    self_check(nn.Linear(6, 4), loss, X, targets)


def test_inputs_of_every_form():
    def both(self: Calls, a: Tensor, b: Tensor) -> Tensor:
        return self.parts[0](a) + b @ self.w

    model = Calls(both, nn.Linear(6, 4), w=torch.randn(6, 4))
    self_check(model, nn.CrossEntropyLoss(), (X, X + 1), Y)
    self_check(model, nn.CrossEntropyLoss(), {"a": X, "b": X + 1}, Y)
    self_check(model, nn.CrossEntropyLoss(), (X[:1], X[:1]), Y[:1])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("m", [4, 5])
def test_masks_over_as_many_places_as_samples(m: int):
    layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
    x = torch.randn(m, 5, 6, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(5, 5).triu(1).bool()
    self_check(layer, nn.MSELoss(), (x, mask), torch.zeros(m, 5, 6))
    self_check(nn.Linear(m, 2), nn.MSELoss(), torch.eye(m), torch.ones(m, 2))


def test_gradient_modes():
    with torch.no_grad():
        self_check(nn.Linear(6, 4), FenchelYoungLoss(Sparsemax()), X, Y)
    with torch.inference_mode():
        assert "Inference mode is on" in message(nn.Linear(6, 4))


def message(model: nn.Module, x=X, y=Y, loss=None) -> str:
    with pytest.raises(MeasurementError) as error:
        self_check(model, nn.CrossEntropyLoss() if loss is None else loss, x, y)
    return str(error.value)


def test_dropout():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 4))
    found = message(model)
    assert "Two runs differ: '1' (Dropout) draws random numbers" in found
    assert found.count("\n- ") == 1
    assert "the model draws" in message(
        Calls(lambda s, x: s.parts[0](x + torch.rand_like(x)), nn.Linear(6, 4))
    )


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("images", [True, False])
def test_batch_statistics(track: bool, images: bool):
    norm = nn.BatchNorm2d if images else nn.BatchNorm1d
    layer = nn.Conv2d(3, 4, 3) if images else nn.Linear(6, 4)
    model = nn.Sequential(layer, norm(4, track_running_stats=track), nn.Flatten(), nn.LazyLinear(4))
    x = IMAGES if images else X
    model(x)
    found = message(model if track else model.eval(), x)
    assert f"couples samples through '1' ({norm.__name__})" in found
    assert found.count("\n- ") == 1


def test_coupling_by_hand():
    found = message(Calls(lambda s, x: s.parts[0](x - x.mean(0)), nn.Linear(6, 4)))
    assert "The model couples samples: a sample alone" in found


def test_coupling_by_the_criterion():
    def contrast(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs @ outputs.T).logsumexp(1).mean()

    assert "The criterion couples samples" in message(nn.Linear(6, 4), loss=contrast)


@contextlib.contextmanager
def broken(function, rule):
    before = rules._RULES[function]
    rules._RULES[function] = rule
    try:
        yield
    finally:
        rules._RULES[function] = before


def test_wrong_norms_name_their_parameters():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4))
    plain = rules._RULES[F.linear]

    def twice(use, cotangents):  # the bias of the first layer counts twice
        found = plain(use, cotangents)
        return [*found, found[1]] if use.args[0].shape[1] == 6 else found

    with broken(F.linear, twice):
        found = message(model)
    assert "The per-sample gradients of '0.bias' are measured wrong" in found
    assert "by up to 3 of" in found

    def without(use, cotangents):  # the bias of both is skipped
        return plain(use, cotangents)[:1]

    with broken(F.linear, without):
        found = message(model)
    assert "gradients of '0.bias', '2.bias' are measured wrong" in found
    self_check(model, nn.CrossEntropyLoss(), X, Y)


def test_a_rule_that_is_wrong_for_several_cotangents_only():
    """Structure matrices need those; a norm needs one."""
    plain = rules._RULES[F.linear]

    def swapped(use, cotangents):
        return plain(use, [cotangents[0][:1].expand_as(cotangents[0])])

    with broken(F.linear, swapped):
        found = message(nn.Linear(6, 4))
    assert "'weight', 'bias' are measured wrong" in found


def test_structure_matrices_are_compared(monkeypatch: pytest.MonkeyPatch):
    plain = comparing.structure_matrix
    monkeypatch.setattr(
        comparing, "structure_matrix", lambda model, inputs: plain(model, inputs) * 1.1
    )
    assert "structure matrices of two samples are measured wrong" in message(nn.Linear(6, 4))


@pytest.mark.parametrize("seed", range(4))
def test_gradients_of_rounding_alone_are_not_compared(seed: int):
    """One class has no loss, and one number, normalised, is none: all that is left is rounding."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Tanh(), nn.Linear(1, 1)).double()
    x, y = torch.randn(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.long)
    self_check(model, nn.CrossEntropyLoss(), x, y)


def test_public_norms_are_compared(monkeypatch: pytest.MonkeyPatch):
    plain = comparing.per_sample_gradient_norms
    monkeypatch.setattr(comparing, "per_sample_gradient_norms", lambda *args: 2 * plain(*args))
    assert "per_sample_gradient_norms gives" in message(nn.Linear(6, 4))


def test_gradients_that_are_changed_on_their_way():
    model = nn.Linear(6, 4)
    # A hook sees the gradient of a batch, and clips it: no sum of what samples alone give.
    model.weight.register_hook(lambda g: g / g.norm())
    assert "not made of the gradients of its samples for 'weight'" in message(model)


def test_values_that_are_not_finite():
    model = nn.Linear(6, 4)
    with torch.no_grad():
        model.bias[0] = torch.nan
    found = message(model)
    assert "parameter 'bias' has values that are not finite" in found
    assert "outputs have values that are not finite" in found
    x = X.clone()
    x[0, 0] = torch.inf
    assert "The input '0' has values" in message(nn.Linear(6, 4), x)
    root = Calls(lambda s, x: s.parts[0](x).abs().sqrt(), nn.Linear(6, 4, bias=False))
    x[0] = 0
    assert "gradients of 'parts.0.weight' are not finite" in message(root, x)


def test_outputs_of_other_shapes():
    whole = Calls(lambda s, x: s.parts[0](x).sum(), nn.Linear(6, 4))
    assert "outputs have the shape () for 5 samples" in message(whole)
    late = Calls(lambda s, x: s.parts[0](x).T, nn.Linear(6, 4))
    assert "outputs have the shape (4, 5) for 5 samples" in message(late)
    several = Calls(lambda s, x: (s.parts[0](x), x), nn.Linear(6, 4))
    assert "returned 2 values, [(5, 4), (5, 6)]" in message(several)
    classes = Calls(lambda s, x: s.parts[0](x).argmax(1), nn.Linear(6, 4))
    assert "returned 1 values, [None]" in message(classes)


def test_devices():
    found = message(nn.Linear(6, 4, device="meta"))
    assert "parameters on meta, inputs on cpu, targets on cpu" in found
    assert "targets on meta" in message(nn.Linear(6, 4), y=Y.to("meta"))


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, holder: list[Tensor], weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, g: Tensor):
        x, weight = ctx.saved_tensors
        return g @ weight, None, g.T @ x


def test_parameters_that_cannot_be_seen():
    hidden = Calls(
        lambda s, x: s.parts[0](Hidden.apply(x, [], s.w)), nn.Linear(4, 4), w=torch.randn(4, 6)
    )
    assert "The outputs depend on w in a way that cannot be seen" in message(hidden)  # fmt: skip


def test_all_problems_at_once():
    model = Calls(
        lambda s, x: s.parts[1](s.parts[0](Hidden.apply(x, [], s.w))),
        nn.Dropout(0.5), nn.Linear(4, 4), w=torch.randn(4, 6),
    )  # fmt: skip
    model.register_buffer("state", torch.tensor(torch.nan))
    found = message(model)
    for problem in ("buffer 'state'", "(Dropout) draws", "depend on w in a way"):
        assert problem in found
    assert found.count("\n- ") == 3


def test_failures_are_told():
    assert "The model fails on this batch: RuntimeError: mat1" in message(nn.Linear(5, 4))
    assert "The criterion fails on this batch: " in message(nn.Linear(6, 4), y=Y[:3])
    fixed = Calls(lambda s, x: s.parts[0](x.reshape(5, 6)), nn.Linear(6, 4))
    assert "The model fails on a single sample: RuntimeError: shape" in message(fixed)
    assert "The batch has no samples" in message(nn.Linear(6, 4), X[:0], Y[:0])
    assert "nothing to measure" in message(nn.Linear(6, 4).requires_grad_(False))
    attention = nn.MultiheadAttention(6, 2, dropout=0.1, batch_first=True)
    model = Calls(lambda s, x: s.parts[0](x, x, x)[0].mean(1), attention)
    assert "'parts.0' (MultiheadAttention)" in message(model, torch.ones(5, 4, 6))


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that were checked."""
    seen: list[nn.Module] = []
    plain = comparing.Check.problems

    def counted(self) -> list[str]:
        seen.append(self.model)
        return plain(self)

    monkeypatch.setattr(comparing.Check, "problems", counted)
    return seen


def test_first_use_is_checked_once(checks: list[nn.Module]):
    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    loss = nn.CrossEntropyLoss()
    for x, y in ((X, Y), (X, Y), (X[:3], Y[:3])):
        first_use_check(model, x, loss, y)
    assert len(checks) == 1
    first_use_check(model, X)  # without a criterion
    first_use_check(model, X[:2])
    assert len(checks) == 2
    first_use_check(model.eval(), X)
    model[0].bias.requires_grad_(False)
    first_use_check(model, X)
    first_use_check(model, X.unsqueeze(1))
    first_use_check(model.double(), X.double())
    assert len(checks) == 6
    first_use_check(nn.Linear(6, 4), X)
    assert len(checks) == 7


def test_first_use_fails_again(checks: list[nn.Module]):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    for _ in range(2):
        with pytest.raises(
            MeasurementError, match=r"gradient_energy: Sequential .*\n.*BatchNorm1d"
        ):
            first_use_check(model, X, nn.CrossEntropyLoss(), Y, name="gradient_energy")
    first_use_check(model.eval(), X, nn.CrossEntropyLoss(), Y)
    assert len(checks) == 3


def test_first_use_lets_dropout_pass():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5))
    first_use_check(model, X, nn.CrossEntropyLoss(), Y)
    with pytest.raises(MeasurementError):
        self_check(model, nn.CrossEntropyLoss(), X, Y)


def test_first_use_does_not_call_itself(monkeypatch: pytest.MonkeyPatch, checks: list[nn.Module]):
    plain = comparing.per_sample_gradient_norms

    def checked(model, loss, inputs, targets):  # as a function of the engine calls it
        first_use_check(model, inputs, loss, targets)
        return plain(model, loss, inputs, targets)

    monkeypatch.setattr(comparing, "per_sample_gradient_norms", checked)
    checked(nn.Linear(6, 4), nn.CrossEntropyLoss(), X, Y)
    assert len(checks) == 1


def test_first_use_keeps_no_model_alive():
    model = nn.Linear(6, 4)
    first_use_check(model, X)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize(
    ("module", "drops"),
    [
        (nn.Dropout(0.5), True),
        (nn.Dropout(0.0), False),
        (nn.LSTM(2, 2, num_layers=2, dropout=0.5), True),
        (nn.LSTM(2, 2), False),
        (nn.TransformerEncoderLayer(4, 2), False),  # whose `dropout` is a module, met by itself
        (nn.Linear(2, 2), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_drops_out(module, drops):
    assert comparing._drops_out(module) is drops


def test_many_names_are_cut_short():
    assert comparing._names(list("abcdefgh")).endswith("'g', 'h'")
    assert comparing._names(list("abcdefghi")).endswith("'h' and 1 more")


def test_gradients_whose_squares_overflow_are_told_as_such():
    model = nn.Linear(2, 2).double()
    x, y = 1e120 * torch.ones(3, 2, dtype=torch.float64), torch.zeros(3, 2, dtype=torch.float64)
    found = message(model, x, y, nn.MSELoss())
    assert "'weight' are so large that their squares are infinite" in found
