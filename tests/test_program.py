"""What is written down and done again: the same, or not written down at all."""

import functools
import gc
import linecache
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from conjopt.measure import EnergyProbe
from conjopt.measure import per_sample_gradient_norms as norms_of
from conjopt.measure.layers import Dense, program, register_rule, rules
from conjopt.measure.layers.program import Recording, again

CRITERION = nn.CrossEntropyLoss()
Y = torch.tensor([0, 1, 2, 1, 0, 2])


def views(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x[1:, ::2].mT @ y, x[2], x.flatten()[5:7] * y[0, 0]]


def written(x: Tensor, y: Tensor) -> list[Tensor]:
    total = x.new_zeros(2, 3)
    total[0] += y[0]
    total.mT[1:].mul_(3)
    total[1:] = y[1:2]
    return [total, total[0] + total[1]]


def several(x: Tensor, y: Tensor) -> list[Tensor]:
    mean, deviation = torch.var_mean(x, 1)
    values, places = y.topk(2, dim=1)
    halves = x.split(2)
    return [mean, deviation, values, places.to(x.dtype), halves[1] * 2, torch.cat(halves)]


def filtered(x: Tensor, y: Tensor) -> list[Tensor]:
    return list(
        torch.ops.aten.convolution_backward(
            y.reshape(1, 3, 3), x[:3].reshape(1, 3, 5), y.new_ones(3, 3, 3),
            *(None, [1], [0], [1], False, [0], 1, [True, True, False]),
        )[:2]
    )  # fmt: skip


def the_same(x: Tensor, y: Tensor) -> list[Tensor]:
    total, before = x.sum(1), y.sum(1)
    sums = x.sum(1) + y.sum(1).mean()
    z = 2 * y
    torch._foreach_mul_([z], 3.0)
    return [total * before.mean(), sums, z, 2 * y, z.sum(1), z.mul_(2).sum(1), z.mul_(2).sum(1)]


def kept(x: Tensor, y: Tensor) -> list[Tensor]:
    return [x, y.detach(), torch.ones(3)]


def inputs() -> list[Tensor]:
    """One with an offset and strides of its own, which the next one may not have."""
    return [torch.randn(4, 2 * 5)[:, 1::2], torch.randn(3, 3)]


@pytest.mark.parametrize("function", [views, written, several, filtered, the_same, kept])
def test_a_program_does_the_same(function):
    torch.manual_seed(0)
    first = inputs()
    with Recording(first) as recording:
        lists = function(*first)
    found = recording.program(lists)
    for offset in (1, 7):
        x, y = torch.randn(100), torch.randn(3, 3)
        second = [x.as_strided((4, 5), (10, 2), offset), y]
        before = [t.clone() for t in second]
        for a, b in zip(found(*second), function(*second), strict=True):
            assert torch.equal(a, b)
            assert a.stride() == b.stride()
        assert all(map(torch.equal, second, before))


ELSEWHERE = torch.ones(3)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, y: x.sum() if x.sum() > 0 else y.sum(),
        lambda x, y: x * float(y[0, 0]),
        lambda x, y: x[x > 0],
        lambda x, y: x + torch.randn(5),
        lambda x, y: F.dropout(x, 0.5),
        lambda x, y: y + ELSEWHERE,
        lambda x, y: y + torch.tensor([1.0, 2.0, 3.0]),
        lambda x, y: y.view(torch.int32),
        lambda x, y: ELSEWHERE,
    ],
)
def test_what_cannot_be_done_again_is_not(function):
    x, y = inputs()
    with Recording([x, y]) as recording:
        result = function(x, y)
    assert recording.program([result]) is None


def test_what_is_called_twice_with_the_same_is_done_once():
    x, y = inputs()
    with Recording([x, y]) as recording:
        found = [x.sum(1), 2 * x.sum(1), x.sum(0), (x @ x.mT).sum(1), (x @ x.mT).sum(1) + 1]
    done = [node.target for node in recording._graph.nodes]
    assert done.count(torch.sum) == 3
    assert done.count(torch.mm) == 1
    assert_close(list(recording.program(found)(x, y)), found, rtol=0, atol=0)


def zeros(x: Tensor) -> list[Tensor]:
    a, b = torch.zeros_like(x), torch.zeros_like(x)
    torch._foreach_add_([a], [x])
    return [a, b]


def statistics(x: Tensor) -> list[Tensor]:
    a, b = torch.var_mean(x, 1)[0], torch.var_mean(x, 1)[0]
    return [a.add_(1) * 2, b * 3]


@pytest.mark.parametrize("function", [zeros, statistics, lambda x: [x.sum(0), x.sum(0)]])
def test_results_that_stand_for_several_are_not_written_to(function):
    """Two buffers of zeros are two buffers."""
    x, y = inputs()
    with Recording([x, y]) as recording:
        found = function(x)
    assert recording.program(found) is None


def test_inputs_that_share_memory_are_refused():
    x = torch.randn(4, 3)
    with Recording([x, x[:3]]) as recording:
        y = x.sum()
    assert recording.program([y]) is None


def test_it_is_called_twice_and_a_list_keeps_its_length():
    calls = []

    def function() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        calls.append(0)
        return [x + 1], [], [2 * x, x * y]

    for number in range(5):
        x, y = torch.randn(3), torch.randn(3)
        a, b, c = again("key", [x, y], function)
        assert torch.equal(a[0], x + 1)
        assert (len(a), b, len(c)) == (1, [], 2)
        assert torch.equal(c[1], x * y)
        assert len(calls) == min(number + 1, 2)


def test_what_cannot_be_done_again_is_called_each_time():
    calls = []

    def function() -> tuple[list[Tensor]]:
        calls.append(0)
        return ([x + float(x[0])],)

    for _ in range(4):
        x = torch.randn(3)
        assert torch.equal(again("key", [x], function)[0][0], x + x[0])
    assert len(calls) == 4


def test_no_more_than_so_many_are_kept(monkeypatch):
    monkeypatch.setattr(program, "_MOST", 3)
    x = torch.ones(2)
    for key in (*range(10), 9, 9):
        assert torch.equal(again(key, [x], lambda: ([x + 1],))[0][0], x + 1)
        assert len(program._KNOWN) <= 3


def test_nothing_is_held():
    references = []

    def function(x: Tensor) -> tuple[list[Tensor]]:
        between = x + 1
        references.extend(map(weakref.ref, (x, between)))
        return ([between * 2],)

    def once() -> None:
        x = torch.randn(3)
        again("key", [x], lambda: function(x))

    for _ in range(3):
        once()
    gc.collect()
    assert len(references) == 4
    assert all(reference() is None for reference in references)


def probed(model: nn.Module, x: Tensor) -> None:
    CRITERION(model(x), Y[: len(x)]).backward()


def test_other_shapes_and_layouts_are_other_kinds():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 3),
    ).double()  # fmt: skip
    probe = EnergyProbe(model)
    shapes = [(6, 5, 5), (6, 5, 5), (6, 5, 5), (4, 5, 5), (6, 7, 5), (6, 5, 5), (6, 5, 7)]
    for m, *size in shapes * 2:
        plain = torch.randn(m, 3, *size, dtype=torch.float64)
        for x in (plain, plain.to(memory_format=torch.channels_last), plain.mT.clone().mT):
            probed(model, x)
            assert_close(probe.norms, norms_of(model, CRITERION, x, Y[:m]), rtol=1e-12, atol=0)


def test_freezing_is_seen():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    probe = EnergyProbe(model)
    for trained in (True, True, True, False, False, False, True):
        model[0].weight.requires_grad_(trained)
        model[2].bias.requires_grad_(not trained)
        probed(model, x)
        assert_close(probe.norms, norms_of(model, CRITERION, x, Y))


def test_an_argument_that_was_written_to_is_seen():
    class Model(nn.Module):
        writes = False

        def __init__(self) -> None:
            super().__init__()
            self.bias, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = x + self.bias
            if self.writes:
                x.mul_(2)
            return self.head(y)

    model = Model()
    probe = EnergyProbe(model)
    for _ in range(4):
        x = torch.randn(6, 4)
        probed(model, x)
        assert_close(probe.norms, norms_of(model, CRITERION, x, Y))
    model.writes = True
    with pytest.raises(RuntimeError, match="was written to after the call"):
        probed(model, torch.randn(6, 4))


def scaled(x: Tensor, weight: Tensor) -> Tensor:
    if torch.overrides.has_torch_function((x, weight)):
        return torch.overrides.handle_torch_function(scaled, (x, weight), x, weight)
    return x * weight


def test_rules_of_others_are_called_each_time():
    calls = []

    @register_rule(scaled)
    def rule(use, cotangents):
        calls.append(0)
        x, weight = use.args
        return [(weight, Dense((cotangents[0] * x)[:, :, None, None]))]

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return scaled(x, self.weight)

    try:
        model = Model()
        probe = EnergyProbe(model)
        probed(model, torch.randn(6, 3))  # with a check
        for _ in range(4):
            x = torch.randn(6, 3)
            calls.clear()
            probed(model, x)
            assert len(calls) == 1
            assert_close(probe.norms, norms_of(model, CRITERION, x, Y))
    finally:
        del rules._RULES[scaled]


def test_narrower_arithmetic_is_another_kind():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    x = torch.randn(6, 2, 4)
    probe = EnergyProbe(model)
    for _ in range(3):
        loss = CRITERION(model(x), Y)
        with torch.autocast("cpu", torch.bfloat16):  # of products within the rules
            loss.backward()
    for _ in range(3):
        probed(model, x)
        assert_close(probe.norms, norms_of(model, CRITERION, x, Y))


def test_an_end_of_a_slice_may_be_a_tensor():
    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, end: Tensor) -> Tensor:
            return self.layer(F.pad(x[:, :end], (0, 4 - int(end))))

    torch.manual_seed(0)
    model = Cut().double()
    probe = EnergyProbe(model)
    for end in (4, 4, 4, 2, 2, 3):
        x, last = torch.randn(6, 5).double(), torch.tensor(end)
        CRITERION(model(x, last), Y).backward()
        assert_close(probe.norms, norms_of(model, CRITERION, (x, last), Y), rtol=1e-10, atol=0)


def test_a_rule_of_someone_else_may_wrap_one():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(6, 4)
    probe, before = EnergyProbe(model), rules._RULES[F.linear]
    for _ in range(3):
        CRITERION(model(x), Y).backward()
    once = probe.norms

    @register_rule(F.linear)
    @functools.wraps(before)
    def doubled(use, cotangents):
        return before(use, [2 * cotangent for cotangent in cotangents])

    try:
        CRITERION(model(x), Y).backward()
        assert_close(probe.norms, 2 * once)
    finally:
        rules._RULES[F.linear] = before


def test_torch_keeps_nothing_of_programs():
    names = set(linecache.cache)
    for number in range(5):
        with Recording([x := torch.ones(2)]) as recording:
            y = x + number
        assert recording.program([y])(x)[0].equal(x + number)
    assert names == set(linecache.cache)


def test_an_object_that_is_given_may_change_and_is_not_held():
    class Options:
        turned = False

    def scaled(x, weight, options):
        if torch.overrides.has_torch_function((x, weight)):
            return torch.overrides.handle_torch_function(scaled, (x, weight), x, weight, options)
        return (x * weight).T if options.turned else x * weight

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.layer = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)
            self.options = Options()

        def forward(self, x: Tensor) -> Tensor:
            h = scaled(x, self.weight, self.options)
            return self.layer(h.T if self.options.turned else h)

    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(6, 6)
    probe, found = EnergyProbe(model), []
    for turned in (False, False, True, True):
        model.options.turned = turned
        CRITERION(model(x), Y).backward()
        found.append(probe.norms)
        assert_close(found[-1], found[0])
    reference = weakref.ref(model.options)
    del model, probe
    gc.collect()
    assert reference() is None
