"""Half precision, autocast, `torch.compile`, and no waiting for a device."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from conjopt.potentials import Logistic, Sparsemax, Squared
from conjopt.regularizers import (
    AttainableLoss,
    ConditionalEntropy,
    OutputCodingRate,
    PredictiveEntropy,
    WithinClassScatter,
)

MAKERS = [
    ConditionalEntropy,
    OutputCodingRate,
    WithinClassScatter,
    AttainableLoss,
    PredictiveEntropy,
    lambda: ConditionalEntropy(queue=20),
    lambda: OutputCodingRate(queue=20),
    lambda: ConditionalEntropy(potential=Sparsemax()),
    lambda: AttainableLoss(tau=0),
    lambda: ConditionalEntropy(max_rows=10),
]
of_maker = pytest.mark.parametrize("make", MAKERS)
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def batch(k=5):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, k, generator=generator), torch.randint(k, (24,), generator=generator)


@HALF
@of_maker
def test_half_precision_is_computed_in_single(make, dtype):
    f, y = batch()
    half = (8 * f).to(dtype).requires_grad_()
    single = half.detach().float().requires_grad_()
    term, twin = make(), make()
    for _ in range(2):  # the queue is of single precision, too
        half.grad = single.grad = None
        value, expected = term(half, y), twin(single, y)
        value.backward()
        expected.backward()
        assert value.dtype == torch.float32
        assert torch.equal(value, expected)
        assert torch.equal(half.grad, single.grad.to(dtype))


@HALF
@of_maker
def test_autocast_does_not_reach_inside(make, dtype):
    f, y = batch()
    expected = make()(f, y)
    with torch.autocast("cpu", dtype):
        assert torch.equal(make()(f, y), expected)


def test_a_network_under_autocast_gets_gradients():
    torch.manual_seed(0)
    model, (f, y) = nn.Linear(5, 5), batch()
    for kind in MAKERS:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            value = kind()(model(f), y)
        value.backward()
        assert model.weight.grad.isfinite().all()
        assert model.weight.grad.abs().max() > 0


def test_double_precision_stays():
    f, y = batch()
    for make in MAKERS:
        assert make()(f.double(), y).dtype == torch.float64
        assert make()(f, F.one_hot(y, 5).double()).dtype == torch.float64


# torch.compile.

in_dynamo = pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated")  # its own


@in_dynamo
@of_maker
def test_compiled_in_one_piece_it_is_the_same(make):
    torch._dynamo.reset()
    f, y = batch()
    term, twin = make(), make()
    term(f, y), twin(f, y)  # makes the queue, whose shape is not known before
    compiled = torch.compile(term, backend="eager", fullgraph=True)
    for step in range(3):
        outputs, own = (f + step).requires_grad_(), (f + step).requires_grad_()
        value, expected = compiled(outputs, y), twin(own, y)
        value.backward()
        expected.backward()
        assert torch.equal(value, expected)
        assert torch.equal(outputs.grad, own.grad)
    assert term.skipped == 0
    bad = torch.full_like(f, torch.nan)
    assert compiled(bad, y) == 0
    assert term.skipped == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "weight", [0.3, lambda calls: 0.1 * calls], ids=["constant weight", "schedule"]
)
@pytest.mark.parametrize("queue", [0, 20])
@in_dynamo
def test_a_compiled_loop_body_is_the_same(weight, queue):
    """The making of a queue and a schedule are left as they are; the rest is compiled."""
    torch._dynamo.reset()

    def body(term, f, y):
        return F.cross_entropy(f, y) + term(f, y)

    compiled = torch.compile(body, backend="eager")
    f, y = batch()
    term, twin = (ConditionalEntropy(weight, queue=queue) for _ in range(2))
    for step in range(4):
        assert torch.equal(compiled(term, f + step, y), body(twin, f + step, y))
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch._prims_common.check:FutureWarning")  # its own, too
@in_dynamo
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@of_maker
def test_the_default_backend(make):
    torch._dynamo.reset()
    f, y = batch()
    term, twin = make(), make()
    term(f, y), twin(f, y)
    compiled = torch.compile(term)
    outputs, own = f.clone().requires_grad_(), f.clone().requires_grad_()
    value, expected = compiled(outputs, y), twin(own, y)
    value.backward()
    expected.backward()
    assert_close(value, expected)
    assert_close(outputs.grad, own.grad)
    torch._dynamo.reset()


# No waiting.

READS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}


class Spy(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ in READS:
            self.seen.append(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "make",
    [
        *MAKERS,
        lambda: ConditionalEntropy(lambda calls: 0.5**calls),
        lambda: ConditionalEntropy(potential=nn.CrossEntropyLoss(torch.ones(5))),
    ],
)
def test_a_call_reads_nothing_from_a_device(make, monkeypatch):
    # On a CPU targets are looked at, and outputs that are not finite warned of: not on a device.
    for module in ("base", "conditional_entropy", "coding_rate"):
        monkeypatch.setattr(f"conjopt.regularizers.{module}._can_look_at", lambda tensor: False)
    f, y = batch()
    f.requires_grad_()
    term = make()
    term(f, y)
    with Spy() as spy:
        term(f, y).backward()
    assert not spy.seen


def test_the_spy_sees():
    with Spy() as spy:
        ConditionalEntropy().estimate(*batch())
    assert spy.seen


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@of_maker
def test_on_a_device_it_is_the_same_and_waits_for_nothing(make):
    f, y = batch()
    term, twin = make().cuda(), make()
    outputs, own = f.cuda().requires_grad_(), f.clone().requires_grad_()
    labels = y.cuda()
    term(outputs, labels), twin(own, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = term(outputs, labels)
        value.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = twin(own, y)
    expected.backward()
    assert_close(value.cpu(), expected, rtol=1e-4, atol=1e-5)
    assert_close(outputs.grad.cpu(), own.grad, rtol=1e-3, atol=1e-5)


@in_dynamo
def test_other_potentials_compile_too():
    torch._dynamo.reset()
    f, y = batch()
    for term, targets in (
        (ConditionalEntropy(potential=Squared()), f.sin()),
        (OutputCodingRate(potential=Logistic()), f.sigmoid()),
        (AttainableLoss(potential=nn.MSELoss()), f.sin()),
        (OutputCodingRate(), F.one_hot(y, 5).float()),
    ):
        compiled = torch.compile(term, backend="eager", fullgraph=True)
        assert torch.equal(compiled(f, targets), term(f, targets))
    torch._dynamo.reset()
