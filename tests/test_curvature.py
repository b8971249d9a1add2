"""``J u`` and ``u^T GGN u`` on the modules that forward mode stumbles on, and their errors.

References are dense float64: central differences of the model itself, or reverse mode row by row
where differences see more than the derivative (the power iteration of spectral norm).
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.testing import assert_close
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from conjopt.measure import curvature_along
from conjopt.measure.curvature import JacobianProduct, relative_step
from conjopt.measure.replay import Replay
from conjopt.potentials import Softmax, Squared


def global_flags() -> tuple[bool, ...]:
    return (
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.mkldnn.enabled,
        torch.backends.cudnn.enabled,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.is_grad_enabled(),
        torch._C._is_fwd_grad_enabled(),
    )


FLAGS = global_flags()


@pytest.fixture(autouse=True)
def _global_flags_stay():
    yield
    assert global_flags() == FLAGS


# Modules


class Attention(nn.Module):
    """Self-attention by `nn.MultiheadAttention`, its weights returned or not."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.need_weights = need_weights
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        outputs = self.attention(x, x, x, need_weights=self.need_weights)
        return outputs if self.need_weights else outputs[0]


class Fused(nn.Module):
    """Self-attention by `scaled_dot_product_attention`."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.projection = nn.Linear(4, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projection(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).squeeze(1)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.inner = kind(4, 3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)[0]


class NoForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return NoForwardDerivative.apply(self.inner(x))


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool = False) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(
            lambda x: self.first(x).tanh(), x, use_reentrant=self.use_reentrant
        )  # a closure: its parameters are no arguments
        return self.second(hidden)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x).tanh())


class Frozen(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        self[0].requires_grad_(False)


class WritesToItsInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.mul_(2).add_(1))


class Convolutional(nn.Sequential):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__(nn.Conv1d(5, 3, 2), norm, nn.GELU(), nn.Flatten(), nn.Linear(9, 3))


class Constant(nn.Module):
    """Two layers, and what part of them autograd is to take for constant."""

    def __init__(self, part: Callable[["Constant", Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 5), nn.Linear(5, 3)
        self.part = part
        self.register_buffer("average", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.part(self, x)

    def network(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh())


def branch(model: Constant, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = model.network(x + 0.1)
    return model.network(x) - target


def all_in_a_block(model: Constant, x: Tensor) -> Tensor:
    with torch.no_grad():
        hidden = model.first(x).tanh()
    return model.second(hidden)


def scaled(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.no_grad():
        scale = hidden.abs().amax(1, keepdim=True)
    return model.second(hidden / scale)


@torch.no_grad()
def rounded(x: Tensor) -> Tensor:
    return x + 0.1 * x.sign()


def straight_through(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    return model.second((hidden + rounded(hidden.sin()) - rounded(hidden)).tanh())


def switched(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    torch.set_grad_enabled(False)
    norm = hidden.norm()
    torch.set_grad_enabled(True)
    return model.second(hidden / norm)


def enabled_inside(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.no_grad():
        still = hidden.tanh()
        with torch.enable_grad():
            moving = hidden.sin() * still
        still = still + moving
    return model.second(still * moving)


def inference(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.inference_mode():
        view = hidden[:, :1]
        still = hidden.norm(dim=1, keepdim=True)
    return model.second(hidden.tanh() + view + still)


def views(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.no_grad():
        parts = hidden.view(-1).view(6, 5).T.chunk(5)
        same = hidden.contiguous()  # no view: autograd goes through it
        shape = hidden.shape
    assert isinstance(shape, torch.Size)
    return model.second(same.tanh() * parts[0].T + hidden[:, :1] * parts[1].T)


def written_to(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x) * 1
    with torch.no_grad():
        hidden.mul_(0.5)
        hidden[:, 0] = 2
        hidden.view(-1)[1:].clamp_(max=0.3)
    return model.second(hidden.tanh())


def averaged(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.no_grad():
        model.average.mul_(0.9).add_(hidden.mean(0), alpha=0.1)
        torch.mean(hidden, 0, out=model.average[:])
    return model.second((hidden - model.average).tanh())


class OwnForwardDerivative(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        with torch.enable_grad(), torch.no_grad():
            return x.view_as(x).sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return tangent * ctx.saved_tensors[0].cos()


def own_functions(model: Constant, x: Tensor) -> Tensor:
    hidden = model.first(x)
    with torch.no_grad():
        still = OwnForwardDerivative.apply(hidden)
    return model.second(OwnForwardDerivative.apply(hidden) * still)


CONSTANTS = [
    branch,
    all_in_a_block,
    scaled,
    straight_through,
    switched,
    enabled_inside,
    inference,
    views,
    written_to,
    averaged,
    own_functions,
]


class FunctionalPadding(nn.Module):
    """A row of the table has no gradient from one of its look-ups."""

    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(7, 4)), nn.Linear(4, 3)
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        rows = F.embedding(x, self.table, padding_idx=self.padding)
        rows = rows.mul_(2) + F.embedding(x, self.table).sin()
        return self.head((rows + self.table[0] * self.table[5]).tanh())


class TiedPadding(Tied):
    def __init__(self) -> None:
        super().__init__()
        self.embedding.padding_idx = 2


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


def inplace_relu() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3))


def input_relu() -> nn.Module:
    return nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3))


def sequences() -> Tensor:
    return torch.randn(3, 5, 4)


def vectors() -> Tensor:
    return torch.randn(6, 4)


def indices() -> Tensor:
    return torch.randint(7, (3, 5))


@dataclasses.dataclass
class Case:
    make: Callable[[], nn.Module]
    inputs: Callable[[], Tensor]
    method: str = "forward"
    training: bool = True
    reference: str = "differences"


def spectral_norm() -> nn.Module:
    return parametrizations.spectral_norm(nn.Linear(4, 3))


def weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(4, 3))


def embedding_bag() -> nn.Module:
    return nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3))


CASES = {
    "mha train": Case(Attention, sequences),
    "mha eval": Case(Attention, sequences, training=False),
    "mha weights": Case(lambda: Attention(need_weights=True), sequences),
    "encoder layer train": Case(encoder_layer, sequences),
    "encoder layer eval": Case(encoder_layer, sequences, training=False),
    "sdpa": Case(lambda: Fused(causal=False), sequences),
    "sdpa causal": Case(lambda: Fused(causal=True), sequences),
    "lstm train": Case(lambda: Recurrent(nn.LSTM), sequences),
    "lstm eval": Case(lambda: Recurrent(nn.LSTM), sequences, training=False),
    "gru": Case(lambda: Recurrent(nn.GRU), sequences),
    "weight norm": Case(weight_norm, vectors, "two_vjps"),
    "spectral norm train": Case(spectral_norm, vectors, reference="reverse"),
    "spectral norm eval": Case(spectral_norm, vectors, training=False),
    "custom function": Case(CustomFunction, vectors, "two_vjps"),
    "embedding bag": Case(embedding_bag, indices, "differences"),
    "embedding": Case(lambda: nn.Sequential(nn.Embedding(7, 4), nn.Tanh()), indices),
    "batch norm train": Case(lambda: Convolutional(nn.BatchNorm1d(3)), sequences),
    "batch norm eval": Case(lambda: Convolutional(nn.BatchNorm1d(3)), sequences, training=False),
    "group norm": Case(lambda: Convolutional(nn.GroupNorm(1, 3)), sequences),
    "tied weights": Case(Tied, indices),
    "frozen": Case(Frozen, vectors),
    "checkpointing": Case(Checkpointed, vectors),
    "in-place relu": Case(inplace_relu, vectors),
    "in-place relu of the input": Case(input_relu, vectors),
    "writes to its inputs": Case(WritesToItsInputs, vectors),
    "padding": Case(
        lambda: nn.Sequential(nn.Embedding(7, 4, padding_idx=2), nn.Tanh()),
        indices,
        reference="reverse",
    ),
    "functional padding": Case(lambda: FunctionalPadding(5), indices, reference="reverse"),
    "padding from the end": Case(lambda: FunctionalPadding(-7), indices, reference="reverse"),
    "no functional padding": Case(lambda: FunctionalPadding(None), indices),
    "tied weights with padding": Case(TiedPadding, indices, reference="reverse"),
    **{
        part.__name__: Case(functools.partial(Constant, part), vectors, reference="reverse")
        for part in CONSTANTS
    },
}


@dataclasses.dataclass
class Instance:
    model: nn.Module
    inputs: Tensor
    direction: dict[str, Tensor]

    def replay(self) -> Replay:
        return Replay(self.model, (self.inputs,), {}, Replay.random_state(self.model))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())


def instance_of(case: Case, dtype: torch.dtype) -> Instance:
    torch.manual_seed(0)
    model, inputs = case.make().to(dtype).train(case.training), case.inputs()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):  # as after some training
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return Instance(model, inputs, {n: torch.randn_like(p) for n, p in trained.items()})


def reference(instance: Instance, kind: str) -> list[Tensor]:
    """``J u`` of each output, from a double twin of the model."""
    model = copy.deepcopy(instance.model).double()
    moving = {n: p.detach() for n, p in model.named_parameters() if n in instance.direction}
    u = {n: t.double() for n, t in instance.direction.items()}

    def run(parameters: dict[str, Tensor]) -> list[Tensor]:
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        x = instance.inputs.clone()
        x = x.double() if x.is_floating_point() else x
        return tree_leaves(functional_call(model, {**buffers, **parameters}, (x,)))

    if kind == "differences":
        h = 1e-6
        with torch.no_grad():
            ahead, behind = (run({n: p + s * h * u[n] for n, p in moving.items()}) for s in (1, -1))
        return [(a - b) / (2 * h) for a, b in zip(ahead, behind)]
    leaves = {n: p.requires_grad_() for n, p in moving.items()}
    changes = []
    with torch.enable_grad():
        outputs = run(leaves)
    for output in outputs:
        rows = [
            torch.autograd.grad(
                element, list(leaves.values()), retain_graph=True, materialize_grads=True
            )
            for element in output.flatten()
        ]
        along = [sum((g * t).sum() for g, t in zip(row, u.values())) for row in rows]
        changes.append(torch.stack(along).reshape(output.shape))
    return changes


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert equality up to a share of the greatest expected element."""
    atol = tolerance * expected.abs().max().item()
    assert_close(actual.double(), expected, rtol=tolerance, atol=atol)


# ``J u``


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", CASES)
def test_jacobian_product_is_that_of_the_reference(name: str, dtype: torch.dtype):
    case = CASES[name]
    instance = instance_of(case, dtype)
    expected = reference(instance, case.reference)
    product = JacobianProduct(instance.model)
    outputs, changes = product(instance.replay().run, instance.parameters, instance.direction)
    assert product.method == case.method
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-5}[dtype]
    if case.method == "differences":
        tolerance = tolerance ** (2 / 3)
    assert len(changes) == len(expected)
    with torch.no_grad():
        plain = [t for t in instance.replay().run({}) if t is not None]
    for output, change, same, right in zip(outputs, changes, plain, expected):
        assert change.dtype == dtype
        assert not change.requires_grad
        assert_close(output, same, rtol=10 * tolerance, atol=10 * tolerance)
        assert_near(change, right, tolerance)


@pytest.mark.parametrize("name", CASES)
def test_nothing_of_the_model_or_the_process_is_touched(name: str):
    instance = instance_of(CASES[name], torch.float32)
    model, inputs = instance.model, instance.inputs
    for parameter in list(model.parameters())[::2]:
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    state = {n: (t, t._version, t.clone()) for n, t in model.state_dict(keep_vars=True).items()}
    gradients = [(p.grad, None if p.grad is None else p.grad._version) for p in model.parameters()]
    requires_grad = [p.requires_grad for p in model.parameters()]
    kept, random = inputs.clone(), torch.get_rng_state()

    with torch.no_grad():
        replay = instance.replay()
    product = JacobianProduct(model)
    _, first = product(replay.run, instance.parameters, instance.direction)
    _, second = product(replay.run, instance.parameters, instance.direction)

    for once, again in zip(first, second):
        assert torch.equal(once, again)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(inputs, kept)
    for parameter, (gradient, version) in zip(model.parameters(), gradients):
        assert parameter.grad is gradient
        assert gradient is None or gradient._version == version
    assert [p.requires_grad for p in model.parameters()] == requires_grad
    for name_, tensor in model.state_dict(keep_vars=True).items():
        same, version, value = state[name_]
        assert tensor is same
        assert tensor._version == version
        assert torch.equal(tensor, value)


BACKWARD = [part.__name__ for part in CONSTANTS] + [n for n in CASES if "padding" in n]


@pytest.mark.parametrize("method", ["forward", "two_vjps"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("name", BACKWARD)
def test_what_the_backward_takes_for_constant_stands_still(
    name: str, context: Callable[[], Any], method: str
):
    instance = instance_of(CASES[name], torch.float64)
    (expected,) = reference(instance, "reverse")
    product = JacobianProduct(instance.model)
    product.method = method
    with context():
        direction = {n: u * 1 for n, u in instance.direction.items()}  # inference tensors, too
        _, (change,) = product(instance.replay().run, instance.parameters, direction)
    assert product.method == method
    assert_near(change, expected, 1e-12)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_curvature_is_that_of_the_loss_that_backward_sees(context: Callable[[], Any]):
    instance = instance_of(CASES["branch"], torch.float64)
    (change,) = reference(instance, "reverse")
    with context():
        found = curvature_along(instance.model, Squared(), instance.inputs, instance.direction)
    assert_close(found, change.square().sum(1).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", ["forward", "two_vjps"])
def test_parameters_made_in_inference_mode(method: str):
    with torch.inference_mode():
        model = nn.Linear(4, 3)
    instance = Instance(model, vectors(), {"weight": torch.ones(3, 4)})
    product = JacobianProduct(model)
    product.method = method
    _, (change,) = product(instance.replay().run, instance.parameters, instance.direction)
    assert product.method == method
    assert_close(change, instance.inputs.sum(1, keepdim=True).expand(6, 3))


def test_nothing_moves_in_a_model_that_is_all_constant():
    model = Constant(torch.no_grad()(Constant.network))
    instance = Instance(
        model, vectors(), {n: torch.ones_like(p) for n, p in model.named_parameters()}
    )
    product = JacobianProduct(model)
    for product.method in ("forward", "two_vjps"):
        _, (change,) = product(instance.replay().run, instance.parameters, instance.direction)
        assert torch.equal(change, torch.zeros(6, 3))


def test_differences_cannot_tell_but_for_the_padding_of_modules():
    instance = instance_of(CASES["all_in_a_block"], torch.float64)
    product = JacobianProduct(instance.model)
    product.method = "differences"
    _, (change,) = product(instance.replay().run, instance.parameters, instance.direction)
    assert_near(change, reference(instance, "differences")[0], 1e-6)
    instance = instance_of(CASES["padding"], torch.float64)
    instance.inputs[0] = 2
    product = JacobianProduct(instance.model)
    product.method = "differences"
    _, (change,) = product(instance.replay().run, instance.parameters, instance.direction)
    assert_near(change, reference(instance, "reverse")[0], 1e-6)
    assert torch.equal(change[0], torch.zeros(5, 4).double())


def test_no_graph_is_recorded_in_forward_mode():
    seen = []

    def note(model: Constant, x: Tensor) -> Tensor:
        hidden = model.first(x)
        seen.append((torch.is_grad_enabled(), hidden.requires_grad))
        return model.second(hidden)

    model = Constant(note)
    product = JacobianProduct(model)
    for one in ("first.weight", "second.bias"):
        replay = Replay(model, (vectors(),), {}, Replay.random_state(model))
        replay.find_writes()
        parameters = dict(model.named_parameters())
        seen.clear()
        with torch.no_grad():
            outputs, _ = product(replay.run, parameters, {one: torch.ones_like(parameters[one])})
        assert not outputs[0].requires_grad
        assert seen == [(True, False)]


def test_inputs_and_directions_with_a_graph_leave_none_behind():
    model = nn.Linear(4, 3)
    x, u = vectors().requires_grad_(), torch.randn(3, 4, requires_grad=True)
    instance = Instance(model, x, {"weight": u})
    product = JacobianProduct(model)
    (output,), (change,) = product(instance.replay().run, instance.parameters, instance.direction)
    assert product.method == "forward"
    assert not output.requires_grad
    assert not change.requires_grad
    assert_close(change, (x @ u.T).detach())


def test_an_error_where_gradients_are_off_leaves_forward_mode_on():
    def fails(model: Constant, x: Tensor) -> Tensor:
        torch.set_grad_enabled(False)
        raise ValueError("mine")

    model = Constant(fails)
    instance = Instance(model, vectors(), {"first.bias": torch.ones(5)})
    with pytest.raises(ValueError, match="mine"):
        JacobianProduct(model)(instance.replay().run, instance.parameters, instance.direction)
    assert torch._C._is_fwd_grad_enabled()


def test_dropout_is_drawn_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    x = torch.randn(6, 4).double()
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    random = Replay.random_state(model)
    expected = model(x)
    torch.rand(7)  # the loop goes on drawing
    after = torch.get_rng_state()
    replay = Replay(model, (x,), {}, random)
    outputs, changes = JacobianProduct(model)(replay.run, dict(model.named_parameters()), direction)
    assert torch.equal(outputs[0], expected)
    assert torch.equal(torch.get_rng_state(), after)

    def at(step: float) -> Tensor:
        torch.set_rng_state(random[0])
        moved = {n: p + step * direction[n] for n, p in model.named_parameters()}
        with torch.no_grad():
            return functional_call(model, moved, (x,))

    assert_near(changes[0], (at(1e-5) - at(-1e-5)) / 2e-5, 1e-8)


def test_curvature_leaves_generators_and_gradients_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3))
    model[0].weight.grad = torch.ones(50, 4)
    random = torch.get_rng_state()
    u = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    first = curvature_along(model, Softmax(), vectors(), u)
    assert not torch.equal(torch.get_rng_state(), random)  # by vectors()
    torch.set_rng_state(random)
    x, before = vectors(), torch.get_rng_state()
    assert torch.equal(curvature_along(model, Softmax(), x, u), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(model[0].weight.grad, torch.ones(50, 4))
    assert model[2].weight.grad is None


def test_half_precision_is_that_of_its_type():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).bfloat16()
    x = torch.randn(6, 4).bfloat16()
    u = {n: torch.randn(p.shape) for n, p in model.named_parameters()}  # float32
    instance = Instance(model, x, u)
    product = JacobianProduct(model)
    (output,), (change,) = product(instance.replay().run, instance.parameters, u)
    assert product.method == "forward"
    assert output.dtype == change.dtype == torch.bfloat16
    (expected,) = reference(instance, "differences")
    assert_near(change, expected, 0.03)  # some roundings of 2^-9
    for method, tolerance in (("two_vjps", 0.03), ("differences", 0.2)):
        product.method = method
        _, (change,) = product(instance.replay().run, instance.parameters, u)
        assert product.method == method
        assert change.dtype == torch.bfloat16
        assert_near(change, expected, tolerance)
    measured = curvature_along(model, Squared(), x, u)
    assert measured.item() == pytest.approx(expected.square().sum(1).mean().item(), rel=0.03)


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 3), weight_norm, embedding_bag])
def test_no_direction_is_no_change(make: Callable[[], nn.Module]):
    model = make()
    x = indices() if isinstance(model, nn.Sequential) else vectors()
    instance = Instance(model, x, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    _, (change,) = JacobianProduct(model)(
        instance.replay().run, instance.parameters, instance.direction
    )
    assert torch.equal(change, torch.zeros_like(change))


@pytest.mark.parametrize("name", ["lstm train", "weight norm", "embedding bag", "frozen"])
def test_parameters_that_are_not_named_stand_still(name: str):
    instance = instance_of(CASES[name], torch.float64)
    one = next(iter(instance.direction))
    instance = dataclasses.replace(instance, direction={one: instance.direction[one]})
    _, (change,) = JacobianProduct(instance.model)(
        instance.replay().run, instance.parameters, instance.direction
    )
    assert_near(change, reference(instance, "differences")[0], 1e-6)


def test_outputs_that_do_not_move_and_those_that_are_no_floats():
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = weight_norm()

        def forward(self, x: Tensor) -> Any:
            f = self.inner(x)
            return {"f": f, "constant": x, "class": f.argmax(1), "nothing": None}

    model = Several()
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    instance = Instance(model, vectors(), direction)
    product = JacobianProduct(model)
    outputs, changes = product(instance.replay().run, instance.parameters, instance.direction)
    assert product.method == "two_vjps"
    there = [change is not None for change in changes]
    assert there == [output is not None for output in outputs]
    f, constant = (change for change in changes if change is not None)
    assert f.abs().max() > 0
    assert torch.equal(constant, torch.zeros(6, 4))


# Errors


class Raises(nn.Module):
    def __init__(self, error: Exception, *inner: nn.Module) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.inner = nn.ModuleList(inner)
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize("error", [RuntimeError, ValueError, NotImplementedError, KeyError])
def test_errors_of_the_model_are_its_own(error: type[Exception]):
    model = Raises(error("mine"), nn.LSTM(2, 2), nn.MultiheadAttention(4, 2))
    random = torch.get_rng_state()
    with pytest.raises(error, match="mine"):
        curvature_along(model, Softmax(), torch.ones(2, 3), {"weight": torch.ones(3)})
    instance = Instance(model, torch.ones(2, 3), {"weight": torch.ones(3)})
    product = JacobianProduct(model)
    for method in ("forward", "two_vjps", "differences"):
        product.method = method
        with pytest.raises(error, match="mine"):
            product(instance.replay().run, instance.parameters, instance.direction)
        assert product.method == method  # the way is kept: it was not at fault
    assert torch.equal(torch.get_rng_state(), random)


def test_flags_that_the_user_set_stay():
    model = Attention().eval()
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    instance = Instance(model, sequences(), direction)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        product = JacobianProduct(model)
        product(instance.replay().run, instance.parameters, instance.direction)
        assert not torch.backends.mha.get_fastpath_enabled()
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"'wieght', which is no parameter of Linear; use the"):
        curvature_along(nn.Linear(2, 3), Softmax(), torch.ones(4, 2), {"wieght": torch.ones(3, 2)})


def test_a_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"'weight' has shape \(2, 3\), expected .* \(3, 2\)"):
        curvature_along(nn.Linear(2, 3), Softmax(), torch.ones(4, 2), {"weight": torch.ones(2, 3)})


def test_several_outputs_are_refused():
    model = Attention(need_weights=True)
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"Attention returned 2 values, expected one tensor; wrap"):
        curvature_along(model, Softmax(), sequences(), direction)


def test_reentrant_checkpointing_is_refused():
    model = Checkpointed(use_reentrant=True)
    direction = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    x = vectors().requires_grad_()
    with pytest.raises(RuntimeError, match="pass use_reentrant=False"):
        curvature_along(model, Softmax(), x, direction)


# ``u^T GGN u``


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.inner(x) + shift


def test_inputs_are_a_tensor_a_tuple_or_a_dict():
    torch.manual_seed(0)
    x, shift = vectors(), torch.randn(3)
    model = Keyword()
    u = {"inner.weight": torch.randn(3, 4)}
    moved = x @ u["inner.weight"].T
    f = model(x, shift=shift)
    expected = (moved * Softmax().hessian_product(f, moved)).sum(1).mean()
    found = curvature_along(model, Softmax(), {"x": x, "shift": shift}, u)
    assert_close(found, expected.detach())
    assert not found.requires_grad
    expected = moved.square().sum(1).mean()
    inner = {"weight": u["inner.weight"]}
    for inputs in (x, (x,), {"input": x}):
        assert_close(curvature_along(model.inner, Squared(), inputs, inner), expected)


def test_relative_step_grows_with_the_parameters_and_shrinks_with_the_direction():
    at, u = [torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([0.0]), torch.tensor([2.0])]
    eps = torch.finfo(torch.float32).eps
    assert relative_step(at, u, power=1 / 3).item() == pytest.approx(eps ** (1 / 3) * 6 / 2)
    assert relative_step(at, [0 * t for t in u], power=1 / 3).item() == 0
