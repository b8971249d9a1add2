"""Measuring along the gradient by some samples of a large batch, against dense matrices."""

import pytest
import torch
from loop import equal, make, parameters
from torch import nn
from torch.func import functional_call, jacrev
from torch.testing import assert_close

from conjopt.measure.chunks import ChunkedReplay
from conjopt.measure.replay import Replay
from conjopt.optim import GradientEdge, measuring


class Places(nn.Module):
    """Classes at several places of each sample."""

    def __init__(self, places=1):
        super().__init__()
        self.places = places
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3 * places))

    def forward(self, x):
        y = self.body(x)
        return y if self.places == 1 else y.reshape(len(x), 3, self.places)


def problem(samples, places=1, seed=0):
    torch.manual_seed(seed)
    model = Places(places).double()
    x = torch.randn(samples, 4, dtype=torch.float64)
    y = torch.randint(3, (samples,) if places == 1 else (samples, places))
    return model, x, y


def step(optimizer, model, x, y):
    optimizer.zero_grad()
    optimizer._watch.criterion(model(x), y).backward()
    optimizer.step()
    return optimizer.status()


def jacobian(model, x):
    """(terms, 3, parameters)."""
    named = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda at: functional_call(model, at, x))(named)
    rows = torch.cat(
        [jacobians[name].reshape(len(x), 3, -1, p.numel()) for name, p in named.items()], 3
    )
    return rows.transpose(1, 2).flatten(0, 1)


def dense(model, x):
    """The Gauss-Newton matrix of the mean over samples and places."""
    rows = jacobian(model, x)
    p = model(x).detach().reshape(len(x), 3, -1).transpose(1, 2).flatten(0, 1).softmax(1)
    hessians = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    return torch.einsum("ikp,ikl,ilq->pq", rows, hessians, rows) / len(rows)


def gradient(model, x, y):
    loss = nn.functional.cross_entropy(model(x), y)
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


# Samples, places of each, and which samples are measured.
SIZES = [
    (63, 1, 1),
    (64, 1, 2),
    (65, 1, 2),
    (7, 10, 1),  # half would be three or four samples
    (8, 8, 2),
    (8, 7, 1),
    (16, 63, 2),
    (16, 64, 4),
    (15, 70, 2),
    (17, 60, 2),
]


@pytest.mark.parametrize(("samples", "places", "stride"), SIZES)
@pytest.mark.parametrize("rates", [(1.0, 1.0), (0.5, 1.0)])
def test_what_is_measured_is_of_every_so_many_th_sample(samples, places, stride, rates):
    model, x, y = problem(samples, places)
    groups = [
        {"params": model.body[0].parameters(), "lr": rates[0]},
        {"params": model.body[2].parameters(), "lr": rates[1]},
    ]
    ratio = torch.cat(
        [
            torch.full((p.numel(),), rates[0] if name.startswith("body.0") else 1.0)
            for name, p in model.named_parameters()
        ]
    ).double()
    some, rest = torch.arange(samples) % stride == 0, torch.arange(samples) % stride != 0
    matrix, g = dense(model, x[some]), gradient(model, x, y)
    matrix = ratio.sqrt() * matrix * ratio.sqrt()[:, None]
    vector = matrix @ (ratio.sqrt() * g)
    if stride == 1:
        top = float((matrix @ vector).norm() / vector.norm())
        rest = torch.arange(samples) % 2 == 1
        halves = [~rest, rest]
    else:
        top = float(vector @ matrix @ vector / vector.square().sum())
        halves = [some, rest]
    inner = float(torch.dot(*(gradient(model, x[part], y[part]) for part in halves)))
    # Nesterov's step from rest along rates times gradient.
    moved = torch.einsum("ikp,p->ik", jacobian(model, x[some]), ratio * g * 1.9)
    moved = moved - moved.mean(1, keepdim=True)
    change = float(moved.square().sum(1).mean().sqrt())

    optimizer = make(model, params=groups, direction="sgd", average=0.0)
    status = step(optimizer, model, x, y)
    assert status.top_curvature == pytest.approx(top, rel=1e-9)
    assert status.output_change == pytest.approx(change, rel=1e-9)
    assert status.correlation == pytest.approx(max(-1, min(1, inner / float(g @ g))), rel=1e-8)


def test_terms_that_do_not_count_are_no_terms():
    model, x, y = problem(64)
    y[::9] = -100
    optimizer = make(model, nn.CrossEntropyLoss(ignore_index=-100), direction="sgd")
    seen = y != -100
    top = gradient(model, x[seen], y[seen])
    for _ in range(2):
        top = dense(model, x[seen]) @ (top / top.norm())
    assert step(optimizer, model, x, y).top_curvature == pytest.approx(float(top.norm()), rel=1e-9)


@pytest.mark.parametrize("samples", [128, 1024])
def test_samples_without_terms_do_not_stand_for_others(samples):
    model, x, y = problem(samples)
    y[::2] = -100  # unlabelled ones between labelled ones
    optimizer = make(model, nn.CrossEntropyLoss(ignore_index=-100), direction="sgd")
    top = gradient(model, x[1::2], y[1::2])
    for _ in range(2):
        top = dense(model, x[1::2]) @ (top / top.norm())
    assert step(optimizer, model, x, y).top_curvature == pytest.approx(float(top.norm()), rel=1e-9)


def test_nor_do_samples_that_the_criterion_is_not_given():
    model, x, y = problem(128)
    optimizer = make(model, direction="sgd")
    top = gradient(model, x[1::2], y[1::2])
    for _ in range(2):
        top = dense(model, x[1::2]) @ (top / top.norm())
    optimizer._watch.criterion(model(x)[1::2], y[1::2]).backward()
    optimizer.step()
    assert optimizer.status().top_curvature == pytest.approx(float(top.norm()), rel=1e-9)


def test_the_theorem_goes_by_the_batch_itself():
    model, x, y = problem(64)
    vector = gradient(model, x, y)
    for _ in range(6):
        vector = dense(model, x) @ (vector / vector.norm())
    optimizer = make(model, direction="sgd", step_rule="smoothness", momentum=0)
    status = step(optimizer, model, x, y)
    assert status.top_curvature == pytest.approx(float(vector.norm()), rel=1e-9)


@pytest.mark.parametrize("places", [63, 64])
def test_later_measurements_of_a_quarter_leave_out_every_second_curvature(places, monkeypatch):
    model, x, y = problem(16, places)
    optimizer = make(model, direction="sgd", measure_every=2, warmup=21)
    asked = []
    found = measuring._top
    monkeypatch.setattr(measuring, "_top", lambda *args: asked.append(at) or found(*args))
    for at in range(1, 29):
        before = optimizer._statistics.measured
        step(optimizer, model, x, y)
        measured = optimizer._statistics.measured > before
        assert measured == (at <= 21 or at % 2 == 0)
    # 22 is the 22nd measurement, 24 the 23rd, and so on.
    later = [24, 28] if places == 64 else [22, 24, 26, 28]
    assert asked == [*range(1, 22), *later]


@pytest.mark.parametrize("kind", ["dropout", "mean of the batch"])
def test_samples_that_do_not_run_alone_are_measured_all(kind):
    class Centred(nn.Module):
        def forward(self, x):
            return x - x.mean(0)

    def run():
        torch.manual_seed(0)
        between = nn.Dropout(0.3) if kind == "dropout" else Centred()
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), between, nn.Linear(6, 3)).double()
        x = torch.randn(64, 4, dtype=torch.float64)
        optimizer = make(model, direction="sgd")
        for _ in range(3):
            step(optimizer, model, x, x[:, :3].argmax(1))
        return parameters(model)

    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientEdge, "sampled", False)
        assert equal(found, run())


class Bag(nn.Module):
    """It has no forward derivative, and is measured by differences."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.table(tokens).tanh())


def test_differences_run_the_samples_elsewhere():
    torch.manual_seed(0)
    model = Bag().double()
    tokens, y = torch.randint(9, (64, 5)), torch.randint(3, (64,))
    reference = Bag().double()
    reference.load_state_dict(model.state_dict())
    reference.forward = lambda t: reference.head(reference.table.weight[t].mean(1).tanh())
    matrix, g = dense(reference, tokens[::2]), gradient(reference, tokens, y)
    vector = matrix @ g
    optimizer = make(model, direction="sgd")
    status = step(optimizer, model, tokens, y)
    assert optimizer._product.method == "differences"
    expected = float(vector @ matrix @ vector / vector.square().sum())
    assert status.top_curvature == pytest.approx(expected, rel=1e-7)


@pytest.mark.parametrize("clip", [None, 1e-3])
def test_the_halves_are_as_with_masks(clip, monkeypatch):
    """By rows, or by masks with all samples: the same halves, whether gradients are clipped."""

    def run():
        model, x, y = problem(64)
        optimizer = make(model, direction="sgd")
        optimizer._watch.criterion(model(x), y).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        return optimizer.status()

    by_rows = run()
    monkeypatch.setattr(measuring, "BY_ROWS", (False,))
    by_masks = run()
    assert by_rows.correlation == pytest.approx(by_masks.correlation, rel=1e-8)
    assert by_rows.gradient_energy == pytest.approx(by_masks.gradient_energy, rel=1e-8)


@pytest.mark.parametrize("chunks", [0, 3])
def test_one_forward_for_many_cotangents(chunks):
    model, x, _ = problem(7)
    named, runs = dict(model.named_parameters()), []
    model.register_forward_hook(lambda *_: runs.append(1))
    replay = Replay(model, (x,), {}, Replay.random_state(model))
    replay.find_writes()
    runs.clear()
    if chunks:
        replay = ChunkedReplay(**vars(replay), samples=7, chunks=chunks)
    pull = replay.adjoint(named)
    made = len(runs)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        cotangent = {0: torch.randn(7, 3, generator=generator, dtype=torch.float64)}
        found = pull(cotangent)
        assert len(runs) == (made + 3 * (seed + 1) if chunks else 1)
        runs_before = len(runs)
        for a, b in zip(found, replay.pull(cotangent, named), strict=True):
            assert_close(a, b, rtol=1e-13, atol=1e-15)
        del runs[runs_before:]


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_each_group_moves_by_its_own_rate(factor):
    """And by the gradient of the mean loss, whatever the loop multiplies it by."""
    model, x, y = problem(12)
    groups = [
        {"params": model.body[0].parameters(), "lr": 0.5},
        {"params": model.body[2].parameters(), "lr": 1.0},
    ]
    optimizer = make(model, params=groups, direction="sgd", momentum=0.0)
    before = parameters(model)
    g = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    (factor * optimizer._watch.criterion(model(x), y)).backward()
    optimizer.step()
    sizes = [group["step_size"] for group in optimizer.param_groups for _ in group["params"]]
    assert sizes[0] == sizes[-1] / 2 > 0
    for was, is_, size, gradient in zip(before, parameters(model), sizes, g, strict=True):
        assert_close(is_, was - size * gradient, rtol=1e-12, atol=1e-14)
