"""What the watch reads from ordinary training loops, and the halves of the batch that follow."""

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from conjopt.losses import SoftmaxLoss
from conjopt.measure.observation import Batch
from conjopt.measure.parts import Parts, respond, split
from conjopt.measure.watch import Watch

RTOL = 1e-10
CLASSES = 4


def mlp(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()


def data(n: int = 7, *shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (n, *shape, 3), as the MLP takes them, and class targets (n, *shape)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, *shape, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (n, *shape), generator=generator)


def watching(model: nn.Module, criterion: nn.Module, armed: bool = True) -> Watch:
    watch = Watch(model, criterion, dict(model.named_parameters()))
    watch.armed = armed
    return watch


def flat(tensors: Any) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def gradient_of(watch: Watch) -> Tensor:
    """``g``: the gradients at hand in units of the theory."""
    weight = watch.batch().weight
    return flat(p.grad / weight for p in watch.parameters.values() if p.grad is not None)


def parts_of(watch: Watch, by_rows: bool = False) -> Parts:
    batch = watch.batch()
    moving = {n: p for n, p in watch.parameters.items() if p.grad is not None}
    g = [p.grad / batch.weight for p in moving.values()]
    parts = split(
        batch, moving, g, changed=watch.changed_since_backward(batch.marks), by_rows=by_rows
    )
    assert parts is not None
    return parts


def own_gradient(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The gradient of a loss by plain autograd, on a copy of the model that nothing watches."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    loss(twin).backward()
    return flat(p.grad for p in twin.parameters() if p.grad is not None)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    assert_close(actual, expected, rtol=RTOL, atol=RTOL * expected.abs().max().item())


def one_observation(watch: Watch) -> Any:
    (observation,) = watch.batch().observations
    return observation


# The halves of a batch, for what loops do between the model and the criterion.

Pair = Callable[[Any, Tensor], tuple[Tensor, Tensor]]


class Tokens(nn.Module):
    """The MLP on tokens: (N, T, 3) to (N, T, C), which it hands out as wanted."""

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda f: f) -> None:
        super().__init__()
        self.inner, self.wrap = mlp(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x))


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, f: Tensor) -> tuple[Tensor, Tensor]:
        return 1 * f, 2 * f

    @staticmethod
    def backward(ctx: Any, once: Tensor, twice: Tensor) -> Tensor:
        return once + 2 * twice


def added(f: Tensor) -> Tensor:
    f += torch.arange(CLASSES)
    return f


def plain(f: Any, y: Tensor) -> tuple[Tensor, Tensor]:
    return f, y


@dataclasses.dataclass
class Layout:
    pair: Pair = plain
    tokens: tuple[int, ...] = ()
    wrap: Callable[[Tensor], Any] = lambda f: f


LAYOUTS = {
    "(N,C)": Layout(),
    "scaled": Layout(lambda f, y: (f / 0.7, y)),
    "log-probabilities": Layout(lambda f, y: (f.log_softmax(1), y)),
    "in-place scaled": Layout(lambda f, y: (f.mul_(2), y)),
    "in-place shifted": Layout(lambda f, y: (added(f), y)),
    "in-place part": Layout(lambda f, y: (*(f[:, :2].mul_(3), f)[1:], y)),
    "tuple": Layout(lambda f, y: (f[1], y), (), lambda f: (f.detach().argmax(1), f, f.sum())),
    "dict": Layout(lambda f, y: (f["logits"], y), (), lambda f: {"features": f * 0, "logits": f}),
    "two outputs": Layout(lambda f, y: (f[0] + f[1], y), (), lambda f: [f.sin(), f**2]),
    "one of several": Layout(
        lambda f, y: (f[1], y), (), lambda f: torch.stack([f.sin(), f]).unbind(0)
    ),
    "custom function": Layout(lambda f, y: (f[1], y), (), Twice.apply),
    "custom function, scaled": Layout(lambda f, y: (f[1] / 0.7 + f[0], y), (), Twice.apply),
    "custom function between": Layout(lambda f, y: (Twice.apply(f)[1], y)),
    "(N,C,T)": Layout(plain, (3,), lambda f: f.movedim(-1, 1)),
    "(N,T,C) as rows": Layout(lambda f, y: (f.view(-1, CLASSES), y.reshape(-1)), (3,)),
    "shifted": Layout(lambda f, y: (f[:, :-1].reshape(-1, CLASSES), y[:, 1:].reshape(-1)), (4,)),
    "transposed": Layout(lambda f, y: (f.transpose(1, 2), y), (3,)),
    "time first": Layout(lambda f, y: (f.transpose(0, 1).flatten(0, 1), y.T.flatten()), (3,)),
    "selected": Layout(lambda f, y: (f[y != 0], y[y != 0]), (5,)),
    "last token": Layout(lambda f, y: (f[:, -1], y[:, -1]), (3,)),
    "pooled": Layout(lambda f, y: (f.mean(1), y[:, 0]), (3,)),
    "image": Layout(lambda f, y: (f.movedim(-1, 1), y), (2, 3)),
}

CRITERIA = {
    "mean": nn.CrossEntropyLoss,
    "sum": lambda: nn.CrossEntropyLoss(reduction="sum"),
    "ignore": lambda: nn.CrossEntropyLoss(ignore_index=1),
    "smooth": lambda: nn.CrossEntropyLoss(label_smoothing=0.2),
    "own": SoftmaxLoss,
}


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("criterion_name", CRITERIA)
@pytest.mark.parametrize("name", LAYOUTS)
def test_halves_are_those_of_their_own_losses(name: str, criterion_name: str, clipped: bool):
    layout, criterion = LAYOUTS[name], CRITERIA[criterion_name]()
    model = Tokens(layout.wrap)
    x, y = data(7, *layout.tokens)
    if name == "selected":
        y[1] = 0  # a sample without tokens
    watch = watching(model, criterion)

    returned = model(x)
    outputs, targets = layout.pair(returned, y)
    loss = criterion(outputs, targets)
    (3 * loss).backward()
    observation = one_observation(watch)
    assert observation.kappa == 3
    places = [i for i, leaf in enumerate(tree_leaves(returned)) if leaf is outputs]
    assert observation.place == (places[0] if places and "in-place" not in name else None)
    assert observation.loss == loss
    counted = (targets != 1).sum().item() if criterion_name == "ignore" else targets.numel()
    assert observation.scale == (targets.numel() if criterion_name == "sum" else 1)
    assert watch.batch().weight == 3 * observation.scale
    mean = copy.deepcopy(criterion)
    mean.reduction = "mean"
    entropy = observation.offset / observation.scale
    assert_close(watch.batch().loss(0.0), mean(outputs, targets).detach())
    assert_close(watch.batch().loss(None), mean(outputs, targets).detach() - entropy)

    def of(rows: Any) -> Callable[[nn.Module], Tensor]:
        return lambda twin: mean(*layout.pair(twin(x[rows]), y[rows]))

    factor = 1.0
    if clipped:
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1e-2).item()
        factor = 1e-2 / (norm + 1e-6)
        assert factor < 0.1
    parts = parts_of(watch)
    assert parts.sizes == (4, 3)
    assert counted > 0
    assert_same(flat(parts.first), factor * own_gradient(model, of(slice(0, None, 2))))
    assert_same(flat(parts.second), factor * own_gradient(model, of(slice(1, None, 2))))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("tokens", [(), (3,), (7,)])
def test_a_half_without_weight_stands_for_the_whole(
    tokens: tuple[int, ...], empty: int, clipped: bool, dtype: torch.dtype
):
    model, criterion = mlp().to(dtype), nn.CrossEntropyLoss(ignore_index=1)
    x, y = data(22, *tokens)
    x = x.to(dtype)
    y[y == 1] = 2
    y[empty::2] = 1
    watch = watching(model, criterion)
    f = model(x)
    criterion(f.movedim(-1, 1), y).backward()
    if clipped:
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    parts, g = parts_of(watch), gradient_of(watch)
    for half in (parts.first, parts.second):
        assert_close(flat(half), g, rtol=1e-4, atol=1e-4 * g.abs().max().item())


@pytest.mark.parametrize("kind", ["squared", "logistic"])
def test_halves_of_criteria_of_values(kind: str):
    criterion = nn.MSELoss() if kind == "squared" else nn.BCEWithLogitsLoss(reduction="sum")
    model, (x, _) = mlp(), data(6)
    y = torch.rand(6, CLASSES, dtype=torch.float64)
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    observation = one_observation(watch)
    scale = 2 / CLASSES if kind == "squared" else 6
    assert observation.scale == pytest.approx(scale)
    parts = parts_of(watch)
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):
        own = own_gradient(model, lambda twin, rows=rows: criterion(twin(x[rows]), y[rows]))
        assert_same(flat(half), own / (scale if kind == "squared" else 3))


def test_halves_with_dropout_and_batch_norm_in_eval_mode():
    torch.manual_seed(0)
    inner = [nn.Linear(3, 30), nn.BatchNorm1d(30).eval(), nn.Dropout(0.5), nn.Linear(30, CLASSES)]
    model, criterion = nn.Sequential(*inner).double(), nn.CrossEntropyLoss(reduction="none")
    x, y = data()
    random = torch.get_rng_state()
    watch = watching(model, nn.CrossEntropyLoss())
    watch.criterion(model(x), y).backward()
    torch.rand(3)
    after = torch.get_rng_state()
    parts = parts_of(watch)
    assert torch.equal(torch.get_rng_state(), after)
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):
        torch.set_rng_state(random)
        own = own_gradient(model, lambda twin, rows=rows: criterion(twin(x), y)[rows].mean())
        assert_same(flat(half), own)


def test_response_is_that_of_the_second_half():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(ignore_index=1), data(7, 3)
    watch = watching(model, criterion)
    criterion(model(x).flatten(0, 1), y.flatten()).backward()
    parts = parts_of(watch)
    change = torch.randn(7, 3, CLASSES, generator=torch.Generator().manual_seed(0)).double()
    response = respond(watch.batch(), parts.forward, {0: change}, parts.mask)
    keep = y[1::2] != 1
    v, p = change[1::2][keep], model(x)[1::2][keep].softmax(1)
    assert_close(response.curvature, ((v**2 * p).sum(1) - (v * p).sum(1) ** 2).mean())
    tangent = v - v.mean(1, keepdim=True)
    assert_close(response.change, tangent.square().sum(1).mean().sqrt())


# Accumulation


@pytest.mark.parametrize("sizes", [(4, 4), (5, 2), (1, 3, 2)])
@pytest.mark.parametrize("order", ["one by one", "one backward", "all forwards first"])
@pytest.mark.parametrize("clipped", [False, True])
def test_accumulated_batches_are_the_parts(sizes: tuple[int, ...], order: str, clipped: bool):
    model, criterion = mlp(), nn.CrossEntropyLoss()
    batches = [data(size, seed=seed) for seed, size in enumerate(sizes)]
    watch = watching(model, criterion)
    many = len(sizes)
    if order == "one by one":
        for x, y in batches:
            (criterion(model(x), y) / many).backward()
    elif order == "one backward":
        sum(criterion(model(x), y) / many for x, y in batches).backward()
    else:
        outputs = [model(x) for x, _ in batches]
        sum(criterion(f, y) / many for f, (_, y) in zip(outputs, batches)).backward()
    batch = watch.batch()
    assert [o.kappa.item() for o in batch.observations] == [pytest.approx(1 / many)] * many
    assert batch.weight.item() == pytest.approx(1)
    losses = [criterion(model(x), y).item() for x, y in batches]
    assert batch.loss(None).item() == pytest.approx(sum(losses) / many)
    factor = 1.0
    if clipped:
        factor = 1e-2 / (nn.utils.clip_grad_norm_(model.parameters(), 1e-2).item() + 1e-6)
    parts = parts_of(watch)
    own = [own_gradient(model, lambda twin, b=b: criterion(twin(b[0]), b[1])) for b in batches]
    by_parts = (flat(parts.first), flat(parts.second))
    # The observations come in the order of their backward passes, so either end may be first.
    rests = [(own[i], sum(own[:i] + own[i + 1 :]) / (many - 1)) for i in (0, many - 1)]
    assert any(
        torch.allclose(by_parts[0], factor * first, rtol=RTOL, atol=1e-13)
        and torch.allclose(by_parts[1], factor * second, rtol=RTOL, atol=1e-13)
        for first, second in rests
    )
    assert sum(parts.sizes) == sum(sizes)


def test_a_second_backward_through_one_loss_counts_twice():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    loss = criterion(model(x), y)
    loss.backward(retain_graph=True)
    loss.backward()
    assert watch.batch().weight == 2
    assert_same(gradient_of(watch), own_gradient(model, lambda twin: criterion(twin(x), y)))
    own = own_gradient(model, lambda twin: criterion(twin(x[1::2]), y[1::2]))
    assert_same(flat(parts_of(watch).second), own)


# Other things that loops do


def assert_halves_of_cross_entropy(watch: Watch, x: Tensor, y: Tensor) -> None:
    def of(rows: slice) -> Callable[[nn.Module], Tensor]:
        return lambda twin: F.cross_entropy(twin(x[rows]), y[rows])

    parts = parts_of(watch)
    assert watch.batch().weight == 1
    assert_same(flat(parts.first), own_gradient(watch.model, of(slice(0, None, 2))))
    assert_same(flat(parts.second), own_gradient(watch.model, of(slice(1, None, 2))))


def test_frozen_layers():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    model[0].requires_grad_(False)
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_a_model_without_gradients_in_one_backward_leaves_no_trace():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    model.requires_grad_(False)
    offset = torch.zeros(CLASSES, requires_grad=True, dtype=torch.float64)
    criterion(model(x) + offset, y).backward()  # trains something else
    model.requires_grad_(True)
    with pytest.raises(RuntimeError, match="no training forward"):
        watch.batch()


@pytest.mark.parametrize("kind", ["no_grad", "grad", "eval mode", "after the forward"])
def test_evaluation_leaves_no_trace(kind: str):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    other = data(5, seed=9)
    watch = watching(model, criterion)

    def evaluate() -> None:
        model.train(kind != "eval mode")
        with torch.no_grad() if kind == "no_grad" else contextlib.nullcontext():
            criterion(model(other[0]), other[1])
        model.train()

    evaluate()
    f = model(x)
    if kind == "after the forward":
        evaluate()
    loss = criterion(f, y)
    evaluate()
    loss.backward()
    evaluate()
    assert len(watch.batch().observations) == 1
    assert_halves_of_cross_entropy(watch, x, y)


def test_two_models_share_one_criterion():
    one, two, criterion = mlp(0), mlp(1), nn.CrossEntropyLoss()
    (x, y), (x2, y2) = data(7), data(4, seed=5)
    watches = watching(one, criterion), watching(two, criterion)
    loss, loss2 = criterion(one(x), y), criterion(two(x2), y2)
    (loss + loss2).backward()
    for watch, inputs, targets in ((watches[0], x, y), (watches[1], x2, y2)):
        assert len(watch.batch().observations) == 1
        assert_halves_of_cross_entropy(watch, inputs, targets)


def test_a_model_on_top_of_another_has_its_own_halves():
    below, above, criterion, (x, y) = nn.Linear(3, 3).double(), mlp(), nn.CrossEntropyLoss(), data()
    watches = watching(below, criterion), watching(above, criterion)
    criterion(above(below(x)), y).backward()
    hidden = below(x).detach()
    assert_halves_of_cross_entropy(watches[1], hidden, y)
    parts = parts_of(watches[0])
    own = own_gradient(below, lambda twin: F.cross_entropy(above(twin(x[1::2])), y[1::2]))
    assert_same(flat(parts.second), own)


def test_inputs_that_the_model_writes_to():
    model = nn.Sequential(nn.ReLU(inplace=True), *mlp())
    criterion, (x, y) = nn.CrossEntropyLoss(), data()
    given = x.clone()
    watch = watching(model, criterion)
    criterion(model(given), y).backward()
    assert not torch.equal(given, x)
    assert_halves_of_cross_entropy(watch, x, y)


class Doubles(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2))


def test_inputs_that_are_written_to_anew_each_time():
    model, criterion, (x, y) = Doubles(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    criterion(model(x.clone()), y).backward()
    parts_of(watch)
    parts = parts_of(watch)
    own = own_gradient(model, lambda twin: criterion(twin(x[1::2].clone()), y[1::2]))
    assert_same(flat(parts.second), own)


class Counting(nn.Module):
    """Its outputs follow a count of its forwards."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, mlp()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("unset", None)
        self.register_buffer("edges", torch.eye(3).double().to_sparse(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "in place":
            self.count += 1
        elif self.how == "hidden":
            self.count.data += 1
        else:
            self.count = self.count + 1
        return self.inner(torch.sparse.mm(self.edges, x.T).T * self.count)


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("how", ["in place", "hidden", "anew"])
def test_buffers_that_the_forward_uses_and_changes(how: str, by_rows: bool):
    model, criterion, (x, y) = Counting(how), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    with torch.no_grad():
        model(x)  # the loop's own, between the backward pass and the step
    parts = parts_of(watch, by_rows=by_rows)
    assert model.count == 2
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):

        def first(twin: nn.Module, rows: slice = rows) -> Tensor:
            twin.count.zero_()
            return criterion(twin(x[rows]), y[rows])

        assert_same(flat(half), own_gradient(model, first))


@pytest.mark.parametrize("old", [False, True])
def test_spectral_norm_in_train_mode(old: bool):
    make = nn.utils.spectral_norm if old else nn.utils.parametrizations.spectral_norm
    torch.manual_seed(0)
    model = nn.Sequential(make(nn.Linear(3, 5)), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    before, criterion, (x, y) = copy.deepcopy(model), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    after = {name: buffer.clone() for name, buffer in model.named_buffers()}
    parts = parts_of(watch)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, after[name])
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):
        own = own_gradient(before, lambda twin, rows=rows: criterion(twin(x[rows]), y[rows]))
        assert_same(flat(half), own)


def test_no_buffers_are_kept_that_the_forward_leaves_alone():
    model, criterion, (x, y) = mlp().append(nn.BatchNorm1d(CLASSES).double()), nn.MSELoss(), data()
    target = F.one_hot(y, CLASSES).double()
    for train, kept in ((True, 3), (False, 0)):
        model.train(train)
        watch = watching(model, criterion)
        criterion(model(x), target).backward()
        assert len(one_observation(watch).forward.replay.buffers) == kept
        assert not watch._buffers


def test_inputs_and_outputs_that_are_edited_after_use():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    model[0].requires_grad_(False)  # so that autograd does not need the input any more
    given = x.clone()
    watch = watching(model, criterion)
    f = model(given)
    given.zero_()
    loss = criterion(f, y)
    loss.backward()
    with torch.no_grad():
        f.zero_()
        loss.zero_()
    assert_halves_of_cross_entropy(watch, x, y)
    assert one_observation(watch).loss == criterion(model(x), y)
    assert one_observation(watch).outputs.abs().min() > 0


@pytest.mark.parametrize("explicit", [False, True])
def test_targets_that_are_written_to_between_backward_and_step(explicit: bool):
    model, (x, y) = mlp(), data()
    criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2, 3, 4]).double(), ignore_index=0)
    watch = watching(model, criterion)
    buffer = y.clone()
    f = model(x)
    if explicit:
        watch.observe(f, buffer)
        F.cross_entropy(f, buffer, criterion.weight, ignore_index=0).backward()
    else:
        criterion(f, buffer).backward()
    expected = parts_of(watch)
    buffer.zero_()  # the loader's, which the next batch is put into
    parts = parts_of(watch)
    assert_same(flat(parts.first), flat(expected.first))
    assert_same(flat(parts.second), flat(expected.second))
    second = own_gradient(model, lambda twin: criterion(twin(x[1::2]), y[1::2]))
    assert_same(flat(parts.second), second)


def test_targets_of_an_ordinary_step_are_not_copied():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion, armed=False)
    criterion(model(x), y).backward()
    assert one_observation(watch).targets is y


@pytest.mark.parametrize(
    "call",
    [
        lambda c, f, y: c(input=f, target=y),
        lambda c, f, y: c(target=y, input=f),
        lambda c, f, y: c(f, target=y),
    ],
)
def test_criterion_called_with_keywords(call: Callable[..., Tensor]):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    call(criterion, model(x), y).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_own_criterion_called_with_keywords():
    model, criterion, (x, y) = mlp(), SoftmaxLoss(), data()
    watch = watching(model, criterion)
    criterion(targets=y, outputs=model(x)).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_model_called_with_keywords_and_structures():
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, batch: dict[str, Any], *, scale: float, mask: Any = None) -> Tensor:
            return self.inner(batch["x"] * scale) + batch["shift"][0]

    model, criterion, (x, y) = Structured(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    shift = torch.ones(CLASSES).double()
    criterion(model({"x": x, "shift": [shift]}, scale=2.0), y).backward()
    own = own_gradient(
        model,
        lambda twin: criterion(twin({"x": x[1::2], "shift": [shift]}, scale=2.0), y[1::2]),
    )
    assert_same(flat(parts_of(watch).second), own)


def test_a_penalty_on_the_outputs_is_part_of_the_halves():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    f = model(x)
    loss = criterion(f, y)
    (loss + 0.1 * f.square().mean()).backward()
    assert watch.batch().weight == 1
    assert watch.batch().loss(None) == loss
    parts = parts_of(watch)
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):

        def total(twin: nn.Module, rows: slice = rows) -> Tensor:
            f = twin(x[rows])
            return criterion(f, y[rows]) + 0.1 * f.square().mean()

        assert_same(flat(half), own_gradient(model, total))


def test_a_penalty_on_the_weights_is_left_in_the_second_half():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data(6)
    watch = watching(model, criterion)
    penalty = sum(p.square().sum() for p in model.parameters())
    (criterion(model(x), y) + 0.1 * penalty).backward()
    parts, g = parts_of(watch), gradient_of(watch)
    first = own_gradient(model, lambda twin: criterion(twin(x[::2]), y[::2]))
    assert_same(flat(parts.first), first)
    assert_same((flat(parts.first) + flat(parts.second)) / 2, g)


def test_what_was_added_to_the_gradients_is_left_in_both_halves():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(ignore_index=1), data()
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    for p in model.parameters():
        p.grad.mul_(0.5).add_(torch.ones_like(p), alpha=1e-3)
    parts, g = parts_of(watch), gradient_of(watch)
    first, second = (
        own_gradient(model, lambda twin, rows=rows: criterion(twin(x[rows]), y[rows]))
        for rows in (slice(0, None, 2), slice(1, None, 2))
    )
    share = (y[::2] != 1).sum().item() / (y != 1).sum().item()
    G = share * first + (1 - share) * second
    factor = (g @ G) / (G @ G)
    assert factor != pytest.approx(0.5, rel=1e-6)
    assert_same(flat(parts.first), factor * first + (g - factor * G))
    assert_same(flat(parts.second), factor * second + (g - factor * G))
    assert_same(share * flat(parts.first) + (1 - share) * flat(parts.second), g)


def test_an_attack_in_the_loop_leaves_no_observation():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    attacked = x.clone().requires_grad_()
    (towards,) = torch.autograd.grad(criterion(model(attacked), y), attacked)
    with pytest.raises(RuntimeError):
        watch.batch()
    adversarial = x + 0.1 * towards.sign()
    criterion(model(adversarial), y).backward()
    assert len(watch.batch().observations) == 1
    assert_halves_of_cross_entropy(watch, adversarial, y)


def test_an_attack_by_backward_on_the_inputs_alone_leaves_no_observation():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    attacked = x.clone().requires_grad_()
    criterion(model(attacked), y).backward(inputs=[attacked])
    with pytest.raises(RuntimeError):
        watch.batch()
    criterion(model(x), y).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_gradients_taken_of_the_loss_itself_do_not_count():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    loss = criterion(model(x), y)
    torch.autograd.grad(loss, model[0].weight, retain_graph=True)
    loss.backward()
    torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    assert len(watch.batch().observations) == 1
    assert_halves_of_cross_entropy(watch, x, y)


def test_a_gradient_penalty_counts_the_loss_once():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    given = x.clone().requires_grad_()
    loss = criterion(model(given), y)
    (by_input,) = torch.autograd.grad(loss, given, create_graph=True)
    (loss + 0.0 * by_input.square().sum()).backward()
    assert watch.batch().weight == 1
    assert_same(gradient_of(watch), own_gradient(model, lambda twin: criterion(twin(x), y)))


TRANSFORMS: dict[str, Callable[[nn.Module, nn.Module, Tensor, Tensor], Any]] = {
    "jacrev": lambda m, c, x, y: torch.func.vmap(torch.func.jacrev(m))(x),
    "jvp": lambda m, c, x, y: torch.func.jvp(m, (x,), (x,)),
    "hessian": lambda m, c, x, y: torch.func.hessian(lambda a: c(m(a), y))(x),
    "vmap": lambda m, c, x, y: torch.func.vmap(m)(x),
    "grad": lambda m, c, x, y: torch.func.vmap(torch.func.grad(lambda a, b: c(m(a), b)))(x, y),
    "per-sample gradients": lambda m, c, x, y: torch.func.vmap(
        torch.func.grad(lambda p, a, b: c(torch.func.functional_call(m, p, a), b)), (None, 0, 0)
    )(dict(m.named_parameters()), x, y),
}


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("armed", [False, True])
def test_transforms_of_torch_func_leave_no_observation(name: str, armed: bool):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    expected = TRANSFORMS[name](model, criterion, x, y)
    watch = watching(model, criterion, armed)
    loss = criterion(model(x), y)  # one that is open
    found = TRANSFORMS[name](model, criterion, x, y)
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b)
    loss.backward()
    assert one_observation(watch).loss == loss
    if armed:
        assert_halves_of_cross_entropy(watch, x, y)


class InnerCheckpoint(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(self.inner[:2], x, use_reentrant=False)
        return self.inner[2](checkpoint(self.dropout, hidden, use_reentrant=False))


@pytest.mark.parametrize("whole", [False, True])
def test_activation_checkpointing(whole: bool):
    model, criterion, (x, y) = InnerCheckpoint(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    torch.manual_seed(3)
    f = checkpoint(model, x, use_reentrant=False) if whole else model(x)
    criterion(f, y).backward()
    assert len(watch.batch().observations) == 1
    parts = parts_of(watch)

    def second(twin: nn.Module) -> Tensor:
        torch.manual_seed(3)
        return F.cross_entropy(twin(x)[1::2], y[1::2])

    assert_same(flat(parts.second), own_gradient(model, second))
    watch.armed = False
    model.zero_grad()
    criterion(model(x), y).backward()
    assert one_observation(watch).forward.replay is None


def test_a_forward_that_fails_is_forgotten():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(x[:, :2])
    watch.armed = False
    criterion(model(x), y).backward()
    assert one_observation(watch).forward.replay is None


def test_reentrant_checkpointing_is_refused():
    class Reentrant(InnerCheckpoint):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=True)

    model, criterion, (x, y) = Reentrant(), nn.CrossEntropyLoss(), data()
    x.requires_grad_()
    watch = watching(model, criterion)
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        model(x)
    watch.armed = False  # it is the measurements that cannot go through
    criterion(model(x), y).backward()
    assert watch.batch().weight == 1


def test_several_heads():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    y = y % 2
    watch = watching(model, criterion)
    f = model(x)
    (criterion(f[:, :2], y) + 2 * criterion(f[:, 2:], 1 - y)).backward()
    batch = watch.batch()
    assert sorted(o.kappa.item() for o in batch.observations) == [1, 2]
    assert batch.weight == 3
    assert len(batch.forwards) == 1
    parts = parts_of(watch)
    for half, rows in ((parts.first, slice(0, None, 2)), (parts.second, slice(1, None, 2))):

        def both(twin: nn.Module, rows: slice = rows) -> Tensor:
            f = twin(x[rows])
            return (criterion(f[:, :2], y[rows]) + 2 * criterion(f[:, 2:], 1 - y[rows])) / 3

        assert_same(flat(half), own_gradient(model, both))


def test_a_model_used_twice_for_one_loss_is_refused():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    criterion(model(x) - model(x + 1), y).backward()
    with pytest.raises(RuntimeError, match="several forwards"):
        watch.batch()
    watch.release()
    model.zero_grad()
    criterion(model(x), y).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_outputs_of_before_the_last_step_are_not_known_any_more():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    f = model(x)
    watch.release()
    model(x)
    criterion(f, y).backward()
    with pytest.raises(RuntimeError, match="since the last step: the model's output was not"):
        watch.batch()


def test_a_model_used_twice_inside_a_module_is_watched_from_there():
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) - self.inner(x + 1)

    model, criterion, (x, y) = Siamese(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    criterion(model(x), y).backward()
    assert_halves_of_cross_entropy(watch, x, y)


def test_a_constant_factor_is_unscaled_away():
    # As torch.amp.GradScaler does: scale the loss, and the gradients back before the step.
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    (1024 * criterion(model(x), y)).backward()
    assert watch.batch().weight == 1024
    own = own_gradient(model, lambda twin: criterion(twin(x), y))
    assert_same(gradient_of(watch), own)
    second = own_gradient(model, lambda twin: criterion(twin(x[1::2]), y[1::2]))
    assert_same(flat(parts_of(watch).second), second)


def test_observe_in_place_of_the_criterion():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    f = model(x).log_softmax(1)
    watch.observe(f, y, scale=0.5)
    (0.5 * F.nll_loss(f, y)).backward()
    observation = one_observation(watch)
    assert observation.kappa == 0.5
    assert_close(observation.loss, F.cross_entropy(model(x), y).detach())
    second = own_gradient(model, lambda twin: criterion(twin(x[1::2]), y[1::2]))
    assert_same(flat(parts_of(watch).second), second)


@pytest.mark.parametrize("armed", [False, True])
@pytest.mark.parametrize("first", ["observe", "criterion", "observe twice"])
def test_what_is_observed_twice_counts_once(first: str, armed: bool):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion, armed)
    for scale in (0.25, 0.75):  # two micro-batches
        f = model(x)
        if first != "criterion":
            watch.observe(f, y, scale=0.5)
        if first == "observe twice":
            watch.observe(f, y, scale=scale)
            loss = F.cross_entropy(f, y)
        else:
            loss = criterion(f, y)
        if first == "criterion":
            watch.observe(f, y, scale=0.5)
        (scale * loss).backward()
    assert [o.kappa for o in watch.batch().observations] == [0.25, 0.75]
    assert watch.batch().weight == 1
    assert_same(gradient_of(watch), own_gradient(model, lambda twin: criterion(twin(x), y)))


def test_what_only_looks_like_the_same_counts_by_itself():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    f = model(x)
    criterion(f, y)  # never differentiated
    watch.observe(f, y, scale=0.5)
    watch.observe(f, y.clone(), scale=0.25)  # other targets, mixed with the first
    watch.observe(f / 2, y)
    (0.75 * F.cross_entropy(f, y)).backward()
    assert [o.kappa for o in watch.batch().observations] == [0.5, 0.25]
    watch.clear()
    model.zero_grad()
    f = model(x)
    (criterion(f, y) + criterion(f, y)).backward()
    assert watch.batch().weight == 2


@pytest.mark.parametrize("where", ["after the criterion", "before the model"])
def test_errors_inside_a_backward_do_not_spoil_the_next(where: str):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)

    def fail(gradient: Tensor) -> None:
        raise KeyboardInterrupt

    f = model(x)
    if where == "after the criterion":
        f.register_hook(fail)
        loss = criterion(f, y)
    else:
        loss = criterion(f, y)
        scaled = loss * 1
        scaled.register_hook(fail)
        loss = scaled
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    model.zero_grad()
    watch.clear()
    criterion(model(x), y).backward()
    assert len(watch.batch().observations) == 1
    assert_halves_of_cross_entropy(watch, x, y)


def test_what_an_unarmed_watch_sees_is_the_same_but_for_the_halves():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(label_smoothing=0.1), data(7, 3)
    for armed in (True, False):
        watch = watching(model, criterion, armed)
        model.zero_grad()
        (criterion(model(x).flatten(0, 1), y.flatten()) / 4).backward()
        batch = watch.batch()
        assert batch.weight == 0.25
        assert_close(batch.loss(0.0), criterion(model(x).flatten(0, 1), y.flatten()).detach())
        observation = one_observation(watch)
        assert (observation.outputs is not None) == armed
        assert (observation.forward.replay is not None) == armed


# Memory: nothing that was differentiated, or never will be, is kept.


@pytest.fixture
def _no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def used(f: Tensor, how: str) -> Tensor:
    if how == "transformed":
        return f.log_softmax(1)
    return f.mul_(2) if how == "in place" else f


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("how", ["as it is", "transformed", "in place"])
@pytest.mark.parametrize("armed", [False, True])
def test_release_frees_the_graph(armed: bool, how: str, explicit: bool):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion, armed)
    given = x.clone()
    f = model(given)
    alive = [weakref.ref(f), weakref.ref(f.untyped_storage()), weakref.ref(given)]
    hidden = saved_by(f)
    g = used(f, how)
    if explicit:
        watch.observe(g, y)
        loss = F.cross_entropy(g, y)
    else:
        loss = criterion(g, y)
    alive.append(weakref.ref(loss))
    loss.backward()
    if armed:
        parts_of(watch)
    batch: Batch | None = watch.batch()
    assert batch is not None
    watch.release()
    del f, g, loss, batch, given
    assert [reference() for reference in alive] == [None] * 4
    assert hidden() is None


def saved_by(f: Tensor) -> weakref.ref:
    """A reference to something that lives as long as the graph behind a tensor."""

    class Token:
        pass

    token = Token()
    f.grad_fn.metadata["token"] = token
    return weakref.ref(token)


@pytest.mark.usefixtures("_no_garbage_collector")
@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("how", ["as it is", "transformed", "in place"])
@pytest.mark.parametrize("armed", [False, True])
def test_losses_that_are_never_differentiated_do_not_pile_up(armed: bool, how: str, explicit: bool):
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion, armed)
    graphs = []
    for _ in range(5):
        f = model(x)
        graphs.append(saved_by(f))
        g = used(f, how)
        if explicit:
            watch.observe(g, y)
            loss = F.cross_entropy(g, y)
        else:
            loss = criterion(g, y)
        del f, g, loss
        if explicit:
            watch.release()  # what was said explicitly stays known until a step
    assert not any(graph() for graph in graphs)


@pytest.mark.usefixtures("_no_garbage_collector")
def test_a_watch_dies_with_its_last_reference():
    model, criterion, (x, y) = mlp(), nn.CrossEntropyLoss(), data()
    watch = watching(model, criterion)
    loss = criterion(model(x), y)
    gone = weakref.ref(watch)
    del watch
    assert gone() is None
    loss.backward()
    assert not model._forward_hooks
    assert not criterion._forward_hooks


def test_a_view_edited_in_place_is_refused_with_the_remedy():
    # torch then takes the model's output out of the graph of what it has become.
    model = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (2, 2)))
    criterion = nn.CrossEntropyLoss()
    watch = Watch(model, criterion, dict(model.named_parameters()))
    outputs = model(torch.randn(5, 3))
    outputs.mul_(2)
    criterion(outputs, torch.zeros(5, 2).long()).backward()
    with pytest.raises(RuntimeError, match="edit a copy"):
        watch.batch()
