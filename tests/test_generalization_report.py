"""The generalization report: numbers against their definitions, state untouched, bad input."""

import copy
import math
import random
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
)

from conjopt.bounds import (
    LogitGrid,
    TopClass,
    generalization_report,
    heldout_certificate,
    report_reading,
    uniform_gap_bound,
)
from conjopt.entropy import (
    attainable_maximum_loss,
    coding_rate,
    conditional_entropy,
    kernel_conditional_entropy,
    quantized_feature_entropies,
)
from conjopt.losses import EntmaxLoss, PoissonLoss, SquaredLoss, potential_of
from conjopt.potentials import Softmax

CLIP = 2.0
GAMMA = math.log(1 + 2 * math.exp(2 * CLIP))  # of three classes


def samples(n=700, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, generator=generator)
    return x, (x[:, :3] + torch.randn(n, 3, generator=generator)).argmax(1)


def clipped(outputs=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, outputs))
    return nn.Sequential(model, nn.Hardtanh(-CLIP, CLIP))


def split(x, y, first=300, size=64):
    parts = (slice(None, first), slice(first, None))
    return [DataLoader(TensorDataset(x[p], y[p]), size) for p in parts]


def factor(report, name, group=None):
    (found,) = [f for f in report.factors if name in f.name and group in (None, f.group)]
    return found


def bound(report, statement, symbols, of=None):
    return [
        b
        for b in report.bounds
        if b.statement == statement and symbols in b.bounds and of in (None, b.of)
    ]


@pytest.fixture(scope="module")
def case():
    x, y = samples()
    model = clipped()
    with torch.no_grad():
        f = model(x).double()
    report = generalization_report(model, nn.CrossEntropyLoss(), *split(x, y), max_output=CLIP)
    return report, f, y, F.cross_entropy(f, y, reduction="none")


def test_risks_and_certificate_are_those_of_the_losses(case):
    report, f, y, losses = case
    assert report.samples == (300, 400)
    assert report.training_risk == pytest.approx(float(losses[:300].mean()), abs=1e-12)
    assert report.heldout_risk == pytest.approx(float(losses[300:].mean()), abs=1e-12)
    assert report.gap == report.heldout_risk - report.training_risk
    assert report.training_criterion == pytest.approx(report.training_risk, rel=1e-6)
    wrong = (f.argmax(1) != y).double()
    assert report.training_error == pytest.approx(float(wrong[:300].mean()), abs=1e-12)
    assert report.heldout_error == pytest.approx(float(wrong[300:].mean()), abs=1e-12)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    expected = heldout_certificate(losses[300:][order], max_loss=GAMMA)
    assert (report.certified, report.reason) == ("loss", "")
    assert report.maximum == pytest.approx(GAMMA, abs=1e-12)
    assert report.certificate == pytest.approx(expected, abs=1e-10)


def test_every_bound_is_the_function_it_names_and_says_what_it_promises(case):
    report, f, y, losses = case
    risk = float(losses[:300].mean())
    first, second = bound(report, "Thm 4.4", "R")
    assert (first.value, first.kind) == (report.certificate, "guarantee")
    assert second.value == pytest.approx(report.certificate - risk, abs=1e-12)
    (low,) = bound(report, "Thm 4.1", ">=")
    assert low.value == pytest.approx(-float(losses[:300].max()), abs=1e-12)
    before, after = bound(report, "Thm 4.1", "<=")
    floor = float(conditional_entropy(y[:300], f[:300], Softmax()))
    assert before.value == pytest.approx(GAMMA - floor, abs=1e-12)
    assert after.value == pytest.approx(GAMMA - risk, abs=1e-12)
    assert low.value <= report.gap <= after.value <= before.value
    training, heldout = bound(report, "Thm 4.3", "R", "loss")
    for found, part in ((training, slice(None, 300)), (heldout, slice(300, None))):
        cells = LogitGrid(0.5)(f[part], y[part])
        assert found.value == pytest.approx(uniform_gap_bound(cells, max_loss=GAMMA), abs=1e-12)
        assert f"{cells.count} cells" in found.why
    assert (training.kind, heldout.kind) == ("diagnostic", "guarantee")
    training, heldout = bound(report, "Thm 4.3", "R", "error rate")
    for found, part in ((training, slice(None, 300)), (heldout, slice(300, None))):
        cells = TopClass()(f[part], y[part])
        assert found.value == pytest.approx(uniform_gap_bound(cells, max_loss=1.0), abs=1e-12)
    assert (training.kind, heldout.kind) == ("diagnostic", "guarantee")
    assert "nothing is promised" in training.why


def test_factors_are_those_of_the_entropy_package(case):
    report, f, y, losses = case
    for name, part in (("training", slice(None, 300)), ("heldout", slice(300, None))):
        g, t = f[part], y[part]
        centred = g - g.mean(1, keepdim=True)
        cells = torch.floor(centred / 0.5)
        quantized = quantized_feature_entropies(cells, t, quantum=None)
        expected = {
            "Ent(Y|X), equal": 0.0,
            "Ent(Y|Q), outputs": conditional_entropy(t, cells, Softmax()),
            "I =": conditional_entropy(t, cells, Softmax()),
            "kernel": kernel_conditional_entropy(g, t, Softmax(), form="cross-entropy"),
            "observed": losses[part].max(),
            "attainable": attainable_maximum_loss(g, Softmax()),
            "H(Q|Y)": quantized.conditional,
            "pairs": quantized.cells / len(g),
            "coding": coding_rate(centred, t),
        }
        assert len(expected) == len(report.factors)
        for key, value in expected.items():
            assert getattr(factor(report, key), name) == pytest.approx(float(value), abs=1e-9)


def test_a_discrete_law_is_known_exactly():
    """Inputs 0, 1, 2, of which the model sees whether they are 0; the law has rational numbers."""
    model = nn.Linear(3, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]))
    eye = torch.eye(3, dtype=torch.float64)
    # (input, label, number in training, number held out)
    table = [(0, 0, 3, 2), (0, 1, 1, 1), (1, 0, 2, 3), (2, 1, 2, 4)]
    parts = []
    for column in (2, 3):
        x = torch.cat([eye[[row[0]] * row[column]] for row in table])
        y = torch.cat([torch.full((row[column],), row[1]) for row in table])
        parts.append([(x, y)])
    report = generalization_report(
        model, nn.CrossEntropyLoss(), *parts, max_loss=math.log1p(math.exp(2)), equal_inputs=True
    )
    right, miss, half = math.log1p(math.exp(-2)), math.log1p(math.exp(2)), math.log(2)
    assert report.training_risk == pytest.approx((3 * right + miss + 4 * half) / 8, abs=1e-12)
    assert report.heldout_risk == pytest.approx((2 * right + miss + 7 * half) / 10, abs=1e-12)
    coin = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    floor = factor(report, "equal inputs")
    assert floor.training == pytest.approx(0.5 * coin, abs=1e-12)
    # Inputs 1 and 2 become one output: four samples of a fair coin.
    assert factor(report, "I =").training == pytest.approx(0.5 * half, abs=1e-12)
    before = bound(report, "Thm 4.1", "<=")[0]
    assert before.value == pytest.approx(miss - 0.5 * coin - 0.5 * half, abs=1e-12)
    # Given y = 0 the outputs split 3 to 2, given y = 1 they split 1 to 2.
    found = factor(report, "pairs")
    assert (found.training, found.heldout) == (pytest.approx(4 / 8), pytest.approx(4 / 10))
    # argmax of equal outputs is class 0: wrong are (0, 1) and (2, 1).
    assert (report.training_error, report.heldout_error) == (3 / 8, 5 / 10)


def test_without_a_maximum_the_error_rate_is_certified_by_kl():
    x, y = samples()
    model = clipped()[0]
    report = generalization_report(
        model, nn.CrossEntropyLoss(label_smoothing=0.1), *split(x, y), confidence=0.9
    )
    with torch.no_grad():
        f = model(x)
    wrong = f.argmax(1) != y
    expected = heldout_certificate(wrong[300:], max_loss=1, method="kl", confidence=0.9)
    assert report.certified == "error rate"
    assert report.certificate == pytest.approx(expected, abs=1e-12)
    assert report.maximum == math.inf
    assert "no maximum known beforehand" in report.reason
    assert bound(report, "Thm 4.4", "R <=", "loss")[0].kind == "none"
    cells = TopClass()(f[:300], y[:300])
    found = bound(report, "Thm 4.3", "(training)", "error rate")[0]
    assert found.value == pytest.approx(
        uniform_gap_bound(cells, max_loss=1, confidence=0.9), abs=1e-12
    )
    smoothed = F.cross_entropy(f[300:], y[300:], label_smoothing=0.1)
    assert report.heldout_criterion == pytest.approx(float(smoothed), rel=1e-5)
    assert "max_output" in str(report)


def test_squared_losses_are_half_of_torch_and_certified_in_a_stated_range():
    x, _ = samples()
    y = x[:, :2].clamp(-1, 1)
    model = clipped(2)
    parts = split(x, y)
    report = generalization_report(
        model, nn.MSELoss(), *parts, max_output=CLIP, target_range=(-1, 1)
    )
    with torch.no_grad():
        losses = (model(x).double() - y).square().sum(1) / 2
    assert report.maximum == pytest.approx(2 * (CLIP + 1) ** 2 / 2)
    assert report.training_risk == pytest.approx(float(losses[:300].mean()), abs=1e-12)
    assert report.training_criterion == pytest.approx(report.training_risk, rel=1e-6)  # 2/k = 1
    assert math.isnan(report.heldout_error)
    assert {b.kind for b in bound(report, "Thm 4.3", "R")} == {"none"}
    report = generalization_report(model, nn.MSELoss(), *parts)
    assert (report.certified, math.isnan(report.certificate)) == ("nothing", True)
    assert "no labels" in report.reason
    assert "nothing is certified" in str(report)
    with pytest.raises(ValueError, match=r"300 training targets are outside of target_range"):
        generalization_report(model, nn.MSELoss(), *parts, target_range=(5, 6))


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([2.0, 1.0, 1.0])), "one-hot"),
        (EntmaxLoss(), "classes"),
        (nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]), reduction="sum"), "classes"),
        (SquaredLoss(), "one-hot"),
        (PoissonLoss(), "one-hot"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_the_maximum_of_clipped_outputs_bounds_every_loss(loss, targets):
    x, y = samples()
    model = clipped()
    y = F.one_hot(y, 3).float() if targets == "one-hot" else y
    simplex = isinstance(loss, nn.CrossEntropyLoss | EntmaxLoss)
    ranged = None if simplex or isinstance(loss, nn.BCEWithLogitsLoss) else (0.0, 1.0)
    report = generalization_report(
        model, loss, *split(x, y), max_output=CLIP, target_range=ranged, samples=100
    )
    assert report.certified == "loss"
    with torch.no_grad():
        own = float(loss(model(x[:300]), y[:300]))
    assert report.training_criterion == pytest.approx(own, rel=1e-5)
    # Corners of the cube of outputs and extreme targets: the greatest loss is one of them.
    from conjopt.losses import potential_of

    potential = potential_of(loss).potential
    corners = CLIP * torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).double()
    ends = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3).double()
    ends = torch.eye(3).double() if simplex else ends
    greatest = max(float(potential.loss(end, corners).max()) for end in ends)
    assert report.maximum == pytest.approx(greatest, abs=1e-9)


@pytest.mark.parametrize("clip", [0.3, 4.0, 7.7])
def test_losses_at_the_maximum_are_not_above_it_by_rounding(clip):
    """Outputs are at corners of the cube, in float32; the wrong class is certain."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.where(F.one_hot(torch.zeros(80, 39).long(), 3).movedim(-1, 1) > 0, -9.0, 9.0)
    corner = corner + torch.rand(corner.shape, generator=generator)
    report = generalization_report(
        nn.Hardtanh(-clip, clip),
        nn.CrossEntropyLoss(),
        *split(corner, torch.zeros(80, 39).long(), 40),
        max_output=clip,
    )
    at = float(torch.tensor(clip))  # the float32 number that is nearest
    assert report.heldout_risk == pytest.approx(math.log1p(2 * math.exp(2 * at)), rel=1e-12)
    assert report.maximum == pytest.approx(math.log1p(2 * math.exp(2 * max(at, clip))), rel=1e-12)
    assert report.heldout_risk <= report.certificate <= report.maximum


def test_tokens_are_averaged_within_a_sample():
    torch.manual_seed(0)
    x, y = torch.randn(200, 5, 4), torch.randint(3, (200, 5))
    y[:, 3:][torch.rand(200, 2) < 0.5] = -100
    y[7] = -100  # a sample that does not count

    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, inputs):
            return self.linear(inputs).clamp(-CLIP, CLIP).movedim(-1, 1)

    model = Tagger()
    report = generalization_report(
        model, nn.CrossEntropyLoss(), *split(x, y, first=100), max_output=CLIP
    )
    with torch.no_grad():
        by_token = F.cross_entropy(model(x).double(), y, reduction="none")
    kept = [i for i in range(100) if i != 7]
    losses = by_token.sum(1) / (y >= 0).sum(1)
    assert report.samples == (99, 100)
    assert report.training_risk == pytest.approx(float(losses[kept].mean()), abs=1e-12)
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    expected = heldout_certificate(losses[100:][order], max_loss=GAMMA)
    assert report.certificate == pytest.approx(expected, abs=1e-10)
    assert all("not independent" in b.why for b in bound(report, "Thm 4.3", "R"))


def test_the_certificate_does_not_depend_on_a_sorted_loader():
    x, y = samples()
    model = clipped()[0]
    sorted_ = 300 + y[300:].argsort()
    report = generalization_report(
        model,
        nn.CrossEntropyLoss(),
        [(x[:300], y[:300])],
        [(x[sorted_], y[sorted_])],
        max_loss=20.0,
    )
    with torch.no_grad():
        losses = F.cross_entropy(model(x[sorted_]).double(), y[sorted_], reduction="none")
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))
    expected = heldout_certificate(losses[order], max_loss=20.0)
    assert report.certificate == pytest.approx(expected, abs=1e-10)
    assert report.certificate != pytest.approx(heldout_certificate(losses, max_loss=20.0), abs=1e-6)


def test_nothing_is_left_behind():
    x, y = samples()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # a mixture of modes
    model(x).sum().backward()
    generator = torch.Generator().manual_seed(3)
    train = DataLoader(TensorDataset(x[:300], y[:300]), 32, shuffle=True, generator=generator)
    before = copy.deepcopy(model.state_dict())
    gradients = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy())  # noqa: NPY002
    of_loader = generator.get_state()
    first = generalization_report(model, nn.CrossEntropyLoss(), train, [(x[300:], y[300:])])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])  # noqa: NPY002
    assert torch.equal(generator.get_state(), of_loader)
    again = generalization_report(model, nn.CrossEntropyLoss(), train, [(x[300:], y[300:])])
    assert str(first) == str(again)
    with torch.no_grad():
        expected = F.cross_entropy(copy.deepcopy(model).eval()(x[300:]), y[300:])
    assert first.heldout_risk == pytest.approx(float(expected), rel=1e-5)


def test_printed_drawn_and_as_a_dict(case, tmp_path, monkeypatch):
    report = case[0]
    lines = str(report).splitlines()
    assert all(len(line) <= 100 for line in lines)
    assert f"{report.certificate:.4f}" in str(report)
    for kind in ("guarantee", "diagnostic"):
        assert kind in str(report)
    found = report.to_dict()
    assert found["gap"] == report.gap
    assert found["bounds"][0]["value"] == report.certificate
    assert found["factors"][0]["group"] == "information loss"
    figure = report.plot(tmp_path / "report.png")
    assert len(figure.axes) == 3
    titles = {axes._left_title.get_fontsize() for axes in figure.axes}
    texts = [text for axes in figure.axes for text in axes.get_yticklabels()]
    assert len(titles) == 1  # they stand side by side, over smaller text
    assert max(text.get_fontsize() for text in texts) < min(titles)
    assert (tmp_path / "report.png").stat().st_size > 20_000
    assert [p.name for p in tmp_path.iterdir()] == ["report.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"conjopt\[plot\]"):
        report.plot()


def overlapping(kind):
    x, y = samples()
    dataset = TensorDataset(x, y)
    if kind == "subsets":
        return DataLoader(Subset(dataset, range(300)), 64, shuffle=True), DataLoader(
            Subset(Subset(dataset, range(200, 700)), range(90, 500)), 64
        )
    if kind == "samplers":
        return DataLoader(dataset, 64, sampler=SubsetRandomSampler(range(300))), DataLoader(
            dataset, 64, sampler=SubsetRandomSampler(range(290, 700))
        )
    if kind == "whole":
        return DataLoader(dataset, sampler=RandomSampler(dataset)), DataLoader(
            Subset(dataset, range(10))
        )
    return [(x[:300], y[:300])], [(x[290:], y[290:])]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("subsets", r"share 10 of the 410 held-out entries of one TensorDataset, such as \[290, "),
        ("samplers", r"share 10 of the 410 held-out entries"),
        ("whole", r"share 10 of the 10 held-out entries"),
        ("equal rows", r"10 of 410 held-out samples, \[0, 1, .*, 9\], have inputs equal"),
    ],
)
def test_samples_that_were_trained_on_are_refused(kind, message):
    train, heldout = overlapping(kind)
    with pytest.raises(ValueError, match=message):
        generalization_report(clipped(), nn.CrossEntropyLoss(), train, heldout)


def test_disjoint_parts_of_one_data_set_are_fine():
    x, y = samples()
    dataset = TensorDataset(x, y)
    report = generalization_report(
        clipped(),
        nn.CrossEntropyLoss(),
        DataLoader(dataset, 64, sampler=SubsetRandomSampler(range(300))),
        DataLoader(Subset(dataset, range(300, 700)), 64),
    )
    assert report.samples == (300, 400)


def broken(part):
    """A model whose output is not finite for the first sample of a part."""
    x, y = samples()
    x[0 if part == "training" else 300] = math.nan
    return clipped()[0], split(x, y)


@pytest.mark.parametrize("part", ["training", "held-out"])
def test_outputs_that_are_not_finite_are_refused(part):
    model, parts = broken(part)
    with pytest.raises(ValueError, match=rf"{part} samples: the outputs of 1 of \d00 samples, \[0"):
        generalization_report(model, nn.CrossEntropyLoss(), *parts)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confidence": 1.0}, "confidence=1.0, expected a number between 0 and 1"),
        ({"confidence": 0.0}, "confidence=0.0"),
        ({"confidence": math.nan}, "confidence=nan"),
        (
            {"max_loss": 0.5},
            r"training samples: \d+ of 300 .*above max_loss=0.5.*clip",
        ),
        ({"max_loss": -1.0}, "max_loss=-1.0, expected a positive number"),
        ({"max_loss": math.inf}, "max_loss=inf, expected a positive number"),
        ({"max_output": 0.1}, r"of 300 training outputs are beyond max_output=0.1.*Hardtanh"),
        ({"step": 0.0}, "step=0.0"),
        ({"samples": 1}, "samples=1"),
        ({"method": "best"}, "method='best', expected one of 'betting'"),
        ({"target_range": (0.0, 1.0)}, r"target_range=\(0.0, 1.0\) with Softmax"),
    ],
)
def test_options_that_say_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        generalization_report(clipped(), nn.CrossEntropyLoss(), *split(*samples()), **options)


def test_losses_above_the_maximum_are_found_among_held_out_samples_alone():
    x, y = samples()
    model = clipped()[0]
    with torch.no_grad():
        losses = F.cross_entropy(model(x), y, reduction="none")
    order = losses.argsort()
    x, y, top = x[order], y[order], float(losses.sort().values[-3:].min())
    with pytest.raises(
        ValueError, match=r"held-out samples: 3 of 400 losses, at \[397, 398, 399\]"
    ):
        generalization_report(model, nn.CrossEntropyLoss(), *split(x, y), max_loss=top - 1e-4)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "gave no samples"),
        ([(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))], ValueError, "gave no samples"),
        ([(torch.ones(3, 4), torch.zeros(2, dtype=torch.long))], ValueError, r"\(3, 3\).*\(2,\)"),
        ([(torch.ones(3, 4), torch.zeros(3, 2))], ValueError, "do not fit.*expected outputs"),
        (
            [(torch.ones(3, 4), torch.tensor([0, 1, 3]))],
            ValueError,
            "1 of 3 targets, such as 3",
        ),
        ([(torch.ones(3, 4), torch.full((3,), -100))], ValueError, "ignores all 3 samples"),
        ([torch.ones(3, 4)], TypeError, "expected a pair"),
        (torch.ones(3, 4), TypeError, "expected a DataLoader"),
    ],
)
def test_loaders_that_do_not_fit_are_refused_by_name(part, batches, error, message):
    parts = split(*samples())
    parts[part] = batches
    name = ("training", "held-out")[part]
    with pytest.raises(error, match=f"generalization_report, {name} samples: .*{message}"):
        generalization_report(clipped(), nn.CrossEntropyLoss(), *parts)


def test_a_criterion_without_known_units_is_refused():
    with pytest.raises(TypeError, match="not recognised"):
        generalization_report(clipped(), nn.HuberLoss(), *split(*samples()))


def test_one_hot_targets_have_labels_and_others_none():
    rows = torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 1.0, 3.0]], dtype=torch.float64)
    points = torch.eye(3, dtype=torch.float64)[[0, 1, 1]]
    view = potential_of(nn.CrossEntropyLoss())
    labels, wrong = report_reading._labels(view, points, rows, None)
    assert labels.tolist() == [0, 1, 1]
    assert wrong.tolist() == [False, False, True]
    assert report_reading._labels(view, 0.9 * points + 0.1 / 3, rows, None) == (None, None)
    view = potential_of(nn.BCEWithLogitsLoss())
    labels, wrong = report_reading._labels(view, points, rows, None)
    assert labels[1] == labels[2] != labels[0]
    assert wrong.all()


def test_what_a_loader_of_its_own_batches_reads_is_not_known():
    data = TensorDataset(torch.arange(8.0))

    class Own(BatchSampler):
        pass

    plain = DataLoader(data, batch_size=2)
    assert report_reading._entries(plain) == (data, set(range(8)))
    own = DataLoader(data, batch_sampler=Own(SequentialSampler(data), 2, False))
    assert report_reading._entries(own) == (None, set())
