"""The losses against torch's and the entmax package's: values, gradients, dtypes, transforms."""

import copy
import shutil
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from conjopt.losses import (
    EntmaxLoss,
    LogisticLoss,
    PoissonLoss,
    SoftmaxLoss,
    SparsemaxLoss,
    SquaredLoss,
)

CLASS_LOSSES = {
    "softmax": SoftmaxLoss,
    "sparsemax": SparsemaxLoss,
    "entmax 1.5": EntmaxLoss,
    "entmax 1.25": partial(EntmaxLoss, 1.25),
}
LAYOUTS = [(4,), (5, 4), (5, 1), (3, 4, 2), (2, 3, 2, 2), (0, 4), (2, 4, 0)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(
    criterion: Callable[[Tensor, Tensor], Tensor], outputs: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = outputs.detach().clone().requires_grad_()
    value = criterion(outputs, targets)
    return value.detach(), torch.autograd.grad(value.sum(), outputs)[0]


def same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], rtol: float = 1e-12) -> None:
    size = max(1.0, theirs[0].nan_to_num().abs().max().item() if theirs[0].numel() else 0)
    assert_close(ours[0], theirs[0], rtol=rtol, atol=1e-2 * rtol * size, equal_nan=True)
    assert_close(ours[1], theirs[1], rtol=rtol, atol=1e-1 * rtol)


@st.composite
def class_problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, dict]:
    """Outputs, targets and options that torch's cross-entropy takes too."""
    shape, seed = draw(st.sampled_from(LAYOUTS)), draw(st.integers(0, 2**32))
    outputs = draw(st.sampled_from([0.01, 1.0, 100.0])) * normal(*shape, seed=seed)
    dim = min(len(shape) - 1, 1)
    terms, classes = shape[:dim] + shape[dim + 1 :], shape[dim]
    weight = draw(st.sampled_from([None, "some", "zeros"]))
    if weight:
        weight = normal(classes, seed=seed + 1)
        weight = weight.exp() if weight == "some" else weight.clamp(min=0)
    options = {
        "weight": weight,
        "ignore_index": -100,
        "label_smoothing": draw(st.sampled_from([0.0, 0.1, 1.0])),
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }
    kind = draw(st.sampled_from(["hard", "padded", "soft", "one-hot"]))
    targets = normal(*terms, classes, seed=seed + 2).softmax(-1)
    if kind != "soft":
        targets = targets.argmax(-1)
    if kind == "padded":
        options["ignore_index"] = draw(st.sampled_from([-100, -1, 0, classes - 1, classes]))
        share = draw(st.sampled_from([0.5, 1.0]))
        skip = normal(*terms, seed=seed + 3).sigmoid() <= share
        targets = targets.masked_fill(skip, options["ignore_index"])
    if kind == "one-hot":
        targets = F.one_hot(targets, classes).double()
    return outputs, targets.movedim(-1, dim) if targets.is_floating_point() else targets, options


@given(class_problems())
@settings(max_examples=400)
def test_cross_entropy(problem: tuple[Tensor, Tensor, dict]):
    outputs, targets, options = problem
    ours = value_and_gradient(SoftmaxLoss(**options, include_target_entropy=True), outputs, targets)
    theirs = value_and_gradient(nn.CrossEntropyLoss(**options), outputs, targets)
    same(ours, (theirs[0], theirs[1].nan_to_num(0)))  # a mean over nothing has gradient 0
    if not targets.is_floating_point() and not options["label_smoothing"]:
        same(value_and_gradient(SoftmaxLoss(**options), outputs, targets), ours)


@given(class_problems(), st.sampled_from(list(CLASS_LOSSES)))
@settings(max_examples=200)
def test_with_the_target_entropy_every_class_counts_by_itself(
    problem: tuple[Tensor, Tensor, dict], name: str
):
    """As in torch: `sum_c w_c y_c l(e_c, f)`, over the weights of hard targets for the mean."""
    outputs, targets, options = problem
    loss = CLASS_LOSSES[name](**options, include_target_entropy=True)
    dim = min(outputs.ndim - 1, 1)
    classes = outputs.shape[dim]
    weight = torch.ones(classes).double() if options["weight"] is None else options["weight"]
    hard = not targets.is_floating_point()
    counts = targets != options["ignore_index"] if hard else torch.ones(())
    if hard:
        mix = F.one_hot(torch.where(counts, targets, 0), classes).double()
        mix = mix * counts.unsqueeze(-1)
        divisor = (mix @ weight).sum()
        mix = mix + options["label_smoothing"] * (1 / classes - mix) * counts.unsqueeze(-1)
    else:
        mix = targets.movedim(dim, -1)
        divisor = mix[..., 0].numel()
        mix = mix + options["label_smoothing"] * (1 / classes - mix)
    potential, logits = loss.potential, outputs.movedim(dim, -1)
    each = [potential.conjugate(logits) - logits[..., c] for c in range(classes)]  # Phi(e_c) is 0
    terms = (weight * mix * torch.stack(each, -1)).sum(-1)
    expected = {
        "none": terms,
        "sum": terms.sum(),
        "mean": terms.sum() / divisor if divisor else torch.nan * terms.sum(),
    }
    value = loss(outputs, targets)
    atol = 1e-12 * (1 + (outputs.abs().max().item() if outputs.numel() else 0))
    assert_close(value, expected[options["reduction"]], rtol=1e-12, atol=atol, equal_nan=True)


VALUE_PEERS = {
    "squared": (SquaredLoss, lambda f, y: F.mse_loss(f, y, reduction="none") / 2),
    "logistic": (
        partial(LogisticLoss, include_target_entropy=True),
        partial(F.binary_cross_entropy_with_logits, reduction="none"),
    ),
    "poisson": (
        partial(PoissonLoss, include_target_entropy=True),
        partial(F.poisson_nll_loss, reduction="none"),
    ),
}


def values(name: str, outputs: Tensor) -> Tensor:
    targets = normal(*outputs.shape, seed=1)
    return {"squared": targets, "logistic": targets.sigmoid(), "poisson": targets.exp()}[name]


@pytest.mark.parametrize("name", VALUE_PEERS)
@pytest.mark.parametrize("shape", [(), (5,), (4, 3), (4, 3, 2), (0, 3), (3, 0)])
@pytest.mark.parametrize("weight", [None, (), (1,), "row", "column", "all"])
def test_value_losses(name: str, shape: tuple[int, ...], weight: object):
    kind, peer = VALUE_PEERS[name]
    outputs = normal(*shape)
    if isinstance(weight, str):
        of = {"row": shape[-1:], "column": (*shape[:-1], 1)[-len(shape) :], "all": shape}[weight]
        weight = normal(*(of if shape else ()), seed=2).clamp(min=0)
    elif weight is not None:
        if not shape:
            weight = ()
        weight = normal(*weight, seed=2).exp()
    targets, samples = values(name, outputs), shape[0] if shape else 1
    factor = 1 if weight is None else weight  # elementwise, as in torch
    theirs = value_and_gradient(lambda f, y: (factor * peer(f, y)).sum(), outputs, targets)
    ours = value_and_gradient(kind(weight=weight, reduction="sum"), outputs, targets)
    same(ours, theirs)
    mean = value_and_gradient(kind(weight=weight), outputs, targets)
    same(mean, (theirs[0] / samples, theirs[1] / max(samples, 1)))
    each = value_and_gradient(kind(weight=weight, reduction="none"), outputs, targets)
    assert each[0].shape == shape[:1]
    same((each[0].sum(), each[1]), theirs)


def test_value_losses_are_k_times_those_of_torch():
    outputs = normal(4, 3, 2)
    hard, counts = (outputs.roll(1) > 0).double(), normal(4, 3, 2, seed=1).exp().round()
    assert_close(SquaredLoss()(outputs, hard), 6 / 2 * nn.MSELoss()(outputs, hard))
    assert_close(LogisticLoss()(outputs, hard), 6 * nn.BCEWithLogitsLoss()(outputs, hard))
    poisson = PoissonLoss(include_target_entropy=True)(outputs, counts)
    assert_close(poisson, 6 * nn.PoissonNLLLoss()(outputs, counts))
    some = counts + 1  # torch's value at the rate 0 is NaN
    excess = nn.PoissonNLLLoss()(outputs, some) - nn.PoissonNLLLoss()(some.log(), some)
    assert_close(PoissonLoss()(outputs, some), 6 * excess)


@pytest.mark.parametrize("name", VALUE_PEERS)
def test_value_losses_vanish_at_the_best_output(name: str):
    outputs = normal(4, 3)
    loss = VALUE_PEERS[name][0](reduction="none")
    loss.include_target_entropy = False
    value, gradient = value_and_gradient(loss, outputs, loss.potential.link(outputs))
    assert_close(value, torch.zeros(4).double(), rtol=0, atol=1e-14)
    assert_close(gradient, torch.zeros(4, 3).double(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e4])
@pytest.mark.parametrize("classes", [1, 2, 7, 1000])
@pytest.mark.parametrize("name", ["sparsemax", "entmax 1.5", "entmax 1.25"])
def test_the_entmax_package(name: str, classes: int, scale: float):
    peers = pytest.importorskip("entmax")
    peer = {
        "sparsemax": peers.sparsemax_loss,
        "entmax 1.5": peers.entmax15_loss,
        "entmax 1.25": partial(peers.entmax_bisect_loss, alpha=1.25, n_iter=100),
    }[name]
    outputs = scale * normal(20, classes)
    targets = torch.arange(20) % classes
    ours = value_and_gradient(CLASS_LOSSES[name](reduction="none"), outputs, targets)
    theirs = value_and_gradient(peer, outputs, targets)
    tolerance = 1e-11 * max(1.0, scale)
    assert_close(ours, theirs, rtol=1e-11, atol=tolerance)
    one_hot = F.one_hot(targets, classes).double()
    soft = value_and_gradient(CLASS_LOSSES[name](reduction="none"), outputs, one_hot)
    assert_close(soft, ours, rtol=1e-11, atol=tolerance)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("level", [0.0, 1e4, -1e4])
def test_equal_outputs(name: str, classes: int, level: float):
    loss = CLASS_LOSSES[name]()
    outputs = torch.full((3, classes), level, dtype=torch.float64)
    targets = torch.tensor([0, classes - 1, classes // 2])
    value, gradient = value_and_gradient(loss, outputs, targets)
    order = getattr(loss.potential, "order", 1)
    k = torch.tensor(float(classes), dtype=torch.float64)
    expected = k.log() if order == 1 else (1 - k ** (1 - order)) / (order * (order - 1))
    assert_close(value, expected, rtol=1e-12, atol=1e-12)
    residual = 1 / classes - F.one_hot(targets, classes).double()
    assert_close(3 * gradient, residual, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("entropy", [False, True])
def test_masked_classes(name: str, entropy: bool):
    """A logit of -inf takes its class away, where the target has no mass there."""
    outputs, kept = normal(3, 5), [0, 2, 3]
    outputs[:, [1, 4]] = -torch.inf
    hard, small = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 2])
    soft = torch.zeros(3, 5).double()
    soft[:, kept] = normal(3, 3, seed=1).softmax(-1)
    weights = normal(5, seed=2).exp()
    for weight in (None, weights):
        loss = CLASS_LOSSES[name](weight=weight, include_target_entropy=entropy)
        few = None if weight is None else weight[kept]
        reduced = CLASS_LOSSES[name](weight=few, include_target_entropy=entropy)
        for targets, fewer in ((hard, small), (soft, soft[:, kept])):
            value, gradient = value_and_gradient(loss, outputs, targets)
            expected = value_and_gradient(reduced, outputs[:, kept], fewer)
            same((value, gradient[:, kept]), expected)
            assert (gradient[:, [1, 4]] == 0).all()


@pytest.mark.parametrize("name", CLASS_LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
def test_where_nothing_counts_gradients_are_zero(name: str, reduction: str, weighted: bool):
    weight = torch.tensor([0.0, 1.0]) if weighted else None
    nothing = torch.tensor([0, -100, 0]) if weighted else torch.full((3,), -100)
    empty = torch.zeros(0, dtype=torch.long)
    for size, targets in ((3, nothing), (0, empty), (0, torch.zeros(0, 2))):
        for smoothing in (0.0, 0.1)[: 1 + (not weighted)]:
            loss = CLASS_LOSSES[name](weight=weight, reduction=reduction, label_smoothing=smoothing)
            value, gradient = value_and_gradient(loss, torch.ones(size, 2), targets)
            assert value.isnan() if reduction == "mean" else (value == 0).all()
            assert (gradient == 0).all()


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_infinite_losses_of_no_weight_do_not_count(name: str):
    outputs = torch.tensor([[0.0, -torch.inf, 1.0], [0.5, 0.0, 1.0]])
    hard, soft = torch.tensor([1, 0]), torch.eye(3)[[1, 0]]
    for targets in (hard, soft):
        loss = CLASS_LOSSES[name](weight=torch.tensor([1.0, 0.0, 1.0]), reduction="sum")
        value, gradient = value_and_gradient(loss, outputs, targets)
        expected = value_and_gradient(loss, outputs[1:], targets[1:])
        assert_close((value, gradient[1:]), expected)
        assert (gradient[0] == 0).all()


def test_infinite_losses_of_elements_of_no_weight_do_not_count():
    outputs, targets = torch.tensor([[torch.inf, 1.0]]), torch.tensor([[0.0, 1.0]])
    for loss in (SquaredLoss, LogisticLoss, PoissonLoss):
        weighted = loss(weight=torch.tensor([0.0, 2.0]))(outputs, targets)
        assert_close(weighted, 2 * loss()(outputs[:, 1:], targets[:, 1:]))


def test_no_gradient_flows_to_weights():
    weight, outputs = torch.rand(3).requires_grad_(), normal(4, 3).requires_grad_()
    SoftmaxLoss(weight=weight)(outputs, torch.tensor([0, 1, 2, 0])).backward()
    assert weight.grad is None


# Precision.

SHARES = torch.tensor([0.625, 0.375, 0.0], dtype=torch.float64)  # exact in every dtype
CASES = {  # of all losses, with targets for outputs (N, 3)
    "hard": lambda n: torch.arange(n) % 3,
    "soft": lambda n: torch.stack([SHARES.roll(i) for i in range(n)]),
}
OPTIONS = {
    "plain": {},
    "weighted": {"weight": torch.tensor([0.5, 0.0, 2.0])},
    "smoothed": {"label_smoothing": 0.1},
    "torch's": {
        "weight": torch.tensor([0.5, 1.0, 2.0]),
        "label_smoothing": 0.1,
        "include_target_entropy": True,
    },
    "none": {"reduction": "none"},
}
VALUE_LOSSES = {
    "squared": (SquaredLoss, lambda n: normal(n, 3, seed=1)),
    "logistic": (LogisticLoss, lambda n: normal(n, 3, seed=1).sigmoid()),
    "logistic hard": (LogisticLoss, lambda n: (normal(n, 3, seed=1) > 0).long()),
    "poisson": (PoissonLoss, lambda n: normal(n, 3, seed=1).exp().round()),
}
ALL = {
    f"{name}, {kind}, {option}": (loss(**OPTIONS[option]), CASES[kind])
    for name, loss in CLASS_LOSSES.items()
    for kind in CASES
    for option in OPTIONS
} | {
    f"{name}, {option}": (loss(**options), targets)
    for name, (loss, targets) in VALUE_LOSSES.items()
    for option, options in {
        "plain": {},
        "weighted": {"weight": torch.tensor([0.5, 0.0, 2.0])},
        "none": {"reduction": "none"},
        "torch's": {} if name == "squared" else {"include_target_entropy": True},
    }.items()
}
every_loss = pytest.mark.parametrize("name", ALL)


def as_dtype(targets: Tensor, dtype: torch.dtype) -> Tensor:
    return targets.to(dtype) if targets.is_floating_point() else targets


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype):
    loss, of = ALL[name]
    outputs, targets = normal(6, 3).to(dtype), as_dtype(of(6), dtype)
    value, gradient = value_and_gradient(loss, outputs, targets)
    assert (value.dtype, gradient.dtype) == (torch.float32, dtype)
    expected = value_and_gradient(loss, outputs.float(), as_dtype(targets, torch.float32))
    assert_close(value, expected[0])
    assert_close(gradient, expected[1].to(dtype))


@every_loss
@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 6e4), (torch.bfloat16, 1e4)])
def test_half_precision_does_not_overflow(name: str, dtype: torch.dtype, size: float):
    loss, of = ALL[name]
    if isinstance(loss, PoissonLoss):
        size = 80.0  # exp(89) is more than float32 holds
    outputs = torch.tensor([[size, -size, 0], [-size, -size, size], [size] * 3], dtype=dtype)
    targets = as_dtype(of(3), dtype)
    value, gradient = value_and_gradient(loss, outputs, targets)
    expected = value_and_gradient(loss, outputs.double(), as_dtype(targets, torch.float64))
    assert_close(value, expected[0].float(), rtol=1e-5, atol=1e-5)
    assert_close(gradient, expected[1].to(dtype))
    if not isinstance(loss, PoissonLoss):
        assert gradient.isfinite().all()


@every_loss
def test_wider_targets_make_wider_losses(name: str):
    loss, of = ALL[name]
    outputs, targets = normal(6, 3).float(), of(6)
    value, gradient = value_and_gradient(loss, outputs, targets)
    exact = value_and_gradient(loss, outputs.double(), targets)
    assert value.dtype == (torch.float64 if targets.is_floating_point() else torch.float32)
    assert_close(value, exact[0].to(value.dtype))
    assert_close(gradient, exact[1].float())


@every_loss
def test_autocast_changes_nothing(name: str):
    loss, of = ALL[name]
    targets = as_dtype(of(6), torch.float32)
    for outputs in (normal(6, 3).float(), normal(6, 3).bfloat16()):
        expected = value_and_gradient(loss, outputs, targets)
        with torch.autocast("cpu", torch.bfloat16):
            value, gradient = value_and_gradient(loss, outputs, targets)
        assert torch.equal(value, expected[0])
        assert torch.equal(gradient, expected[1])


@every_loss
def test_float32_is_close_to_float64_at_great_outputs(name: str):
    loss, of = ALL[name]
    outputs = (10 if isinstance(loss, PoissonLoss) else 1e4) * normal(6, 3).float()
    targets = as_dtype(of(6), torch.float32)
    value = loss(outputs, targets)
    exact = loss(outputs.double(), as_dtype(targets, torch.float64))
    assert_close(value.double(), exact, rtol=1e-5, atol=1e-5)


# Derivatives and transforms.


@every_loss
def test_derivatives(name: str):
    loss, of = ALL[name]
    outputs, targets = normal(4, 3).requires_grad_(), of(4)

    def function(f: Tensor) -> Tensor:
        return loss(f, targets)

    assert torch.autograd.gradcheck(function, outputs)
    assert torch.autograd.gradgradcheck(function, outputs)


@every_loss
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # by torch.func itself
def test_function_transforms(name: str):
    loss, of = ALL[name]
    outputs, targets = normal(4, 3), of(4)

    def total(f: Tensor, y: Tensor) -> Tensor:
        return loss(f, y).sum()

    by_one = [value_and_gradient(loss, f, y) for f, y in zip(outputs, targets)]
    values, gradients = (torch.stack(column) for column in zip(*by_one))
    assert_close(torch.func.vmap(loss)(outputs, targets), values, equal_nan=True)
    per_sample = torch.func.vmap(torch.func.grad(total))(outputs, targets)
    assert_close(per_sample, gradients)
    whole = value_and_gradient(loss, outputs, targets)[1]
    assert_close(torch.func.grad(total)(outputs, targets), whole)
    hessians = torch.func.vmap(torch.func.hessian(total))(outputs, targets)
    backward = torch.func.jacrev(torch.func.jacrev(total))
    assert_close(hessians, torch.stack([backward(f, y) for f, y in zip(outputs, targets)]))


@pytest.mark.parametrize("name", CLASS_LOSSES)
def test_no_gradient_flows_to_targets(name: str):
    outputs, targets = normal(4, 3).requires_grad_(), CASES["soft"](4).requires_grad_()
    for options in ({}, OPTIONS["torch's"]):
        CLASS_LOSSES[name](**options)(outputs, targets).backward()
    assert targets.grad is None


@every_loss
def test_meta_tensors_have_shapes(name: str):
    loss, of = ALL[name]
    expected = value_and_gradient(loss, normal(4, 3), of(4))
    outputs, targets = normal(4, 3).to("meta"), of(4).to("meta")
    loss = copy.deepcopy(loss).to("meta")
    value, gradient = value_and_gradient(loss, outputs, targets)
    assert (value.shape, value.dtype) == (expected[0].shape, expected[0].dtype)
    assert gradient.shape == (4, 3)


# Compilation.

compiles = pytest.mark.filterwarnings(
    "ignore:<class 'torch.autograd.function.Function'>"
)  # torch's

FAST = [
    "softmax, hard, torch's",
    "softmax, soft, weighted",
    "sparsemax, hard, plain",
    "entmax 1.5, hard, weighted",
    "squared, plain",
    "logistic, weighted",
    "logistic hard, torch's",
    "poisson, torch's",
]


@compiles
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in ALL],
)
def test_compiled(name: str):
    loss, of = ALL[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for size in (4, 7):
        outputs, targets = normal(size, 3).requires_grad_(), of(size)
        torch._dynamo.mark_dynamic(outputs, 0)
        torch._dynamo.mark_dynamic(targets, 0)
        value = compiled(outputs, targets)
        gradient = torch.autograd.grad(value.sum(), outputs)[0]
        same((value.detach(), gradient), value_and_gradient(loss, outputs, targets))


@compiles
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method:DeprecationWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax, hard, plain", "entmax 1.5, soft, torch's"])
def test_compiled_by_inductor(name: str):
    if shutil.which("g++") is None:
        pytest.skip("inductor needs a compiler of C++")
    loss, of = ALL[name]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True)
    outputs, targets = normal(8, 3), of(8)
    same(
        value_and_gradient(compiled, outputs, targets),
        value_and_gradient(loss, outputs, targets),
    )


def test_compiled_losses_do_not_look_at_targets():
    torch._dynamo.reset()
    for loss, targets in (
        (LogisticLoss(), torch.full((2, 3), 2.0)),
        (SoftmaxLoss(), torch.full((2, 3), 0.5)),
    ):
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        assert compiled(torch.zeros(2, 3), targets).shape == ()
        torch.func.vmap(loss)(torch.zeros(2, 3), targets)
