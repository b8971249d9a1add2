"""`conjopt.entropy` against plain loops, its grouping of equal rows, units and errors."""

import math
import warnings
from collections import defaultdict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from conjopt.entropy import (
    conditional_entropy,
    data_floor,
    generalized_entropy,
    information_loss,
    laws,
    reading,
    risk_decomposition,
)
from conjopt.entropy import grouping as groups_of
from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared

EPS = torch.finfo(torch.float64).eps
ON_SIMPLEX = [Softmax(), Sparsemax(), Entmax(1.3), Entmax(1.5)]
POTENTIALS = [*ON_SIMPLEX, Squared(), Logistic(), Poisson()]


def phi(potential: Potential, y: list[float]) -> float:
    """`Phi(y)` from the table of docs/theory.md, in plain Python."""

    def negative_entropy(p: float) -> float:
        return p * math.log(p) if p > 0 else 0.0

    if potential == Squared():
        return math.fsum(v * v for v in y) / 2
    if potential == Softmax():
        return math.fsum(map(negative_entropy, y))
    if potential == Logistic():
        return math.fsum(negative_entropy(v) + negative_entropy(1 - v) for v in y)
    if potential == Poisson():
        return math.fsum(negative_entropy(v) - v for v in y)
    a = potential.order
    return (math.fsum(v**a for v in y) - 1) / (a * (a - 1))


def plain_entropy(potential, targets, groups, weights):
    """`Ent(Y|Z)` by its definition, sample after sample, and the size of its terms."""
    of_group = defaultdict(list)
    for y, z, w in zip(targets, groups, weights):
        of_group[z].append((y, w))
    total, size = 0.0, 1.0
    for members in of_group.values():
        mass = math.fsum(w for _, w in members)
        if mass == 0:
            continue
        columns = zip(*(y for y, _ in members))
        mean = [math.fsum(w * v for v, (_, w) in zip(c, members)) / mass for c in columns]
        mean_phi = math.fsum(w * phi(potential, y) for y, w in members) / mass
        total += mass * (mean_phi - phi(potential, mean))
        size = max(size, *(abs(phi(potential, y)) for y, w in members if w > 0))
    return total / math.fsum(weights), size


def draw_targets(potential: Potential, n: int, k: int, kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, k, generator=generator, dtype=torch.float64)
    if kind == "coarse":  # many equal targets, and coordinates on the boundary
        noise = noise.round()
    if potential.on_simplex:
        y = noise.clamp(min=0) + (noise == noise.amax(1, keepdim=True))
        return y / y.sum(1, keepdim=True)
    if potential == Logistic():
        return noise.clamp(0, 1)
    return (3 * noise).abs() if potential == Poisson() else 10 * noise


@st.composite
def samples(draw):
    potential = draw(st.sampled_from(POTENTIALS))
    n, k = draw(st.integers(1, 24)), draw(st.sampled_from([1, 2, 3, 7]))
    seed = draw(st.integers(0, 2**32))
    targets = draw_targets(potential, n, k, draw(st.sampled_from(["coarse", "fine"])), seed)
    generator = np.random.default_rng(seed)
    groups = generator.integers(draw(st.sampled_from([1, 3, 30])), size=n) - 1
    kind = draw(st.sampled_from(["none", "equal", "spread", "zeros"]))
    weights = {
        "none": None,
        "equal": np.full(n, 0.1),
        "spread": 10 ** generator.uniform(-6, 6, n),
        "zeros": np.append(generator.integers(0, 3, n - 1), 2),
    }[kind]
    return potential, targets, groups, weights


@given(samples())
def test_entropies_are_their_definitions(sample):
    potential, targets, groups, weights = sample
    plain = np.ones(len(targets)) if weights is None else weights
    for z, actual in (
        (groups, conditional_entropy(targets, groups, potential, weights=weights)),
        (0 * groups, generalized_entropy(targets, potential, weights=weights)),
        (groups, data_floor(groups, targets, potential, weights=weights)),
    ):
        expected, size = plain_entropy(potential, targets.tolist(), z.tolist(), plain.tolist())
        assert abs(float(actual) - expected) <= 64 * EPS * size
        assert actual >= 0
        assert actual.dtype == torch.float64
        assert actual.shape == ()


@given(samples(), st.sampled_from(ON_SIMPLEX), st.sampled_from([0.0, 0.1, 1.0]))
def test_classes_are_one_hot_targets(sample, potential, smoothing):
    _, targets, groups, weights = sample
    label, k = targets.argmax(1), targets.shape[1]
    options = {"weights": weights, "label_smoothing": smoothing}
    by_class = data_floor(groups, label, potential, num_classes=k, **options)
    points = F.one_hot(label, k).double()
    torch.testing.assert_close(
        by_class, data_floor(groups, points, potential, **options), rtol=0, atol=16 * EPS
    )
    smoothed = (1 - smoothing) * points + smoothing / k
    plain = (np.ones(len(targets)) if weights is None else weights).tolist()
    expected, _ = plain_entropy(potential, smoothed.tolist(), groups.tolist(), plain)
    assert abs(float(by_class) - expected) <= 64 * EPS


@given(samples())
def test_memory_blocks_do_not_show(sample):
    potential, targets, groups, weights = sample

    def everything():
        outputs = targets[np.unique(groups, return_index=True, return_inverse=True)[1]]
        outputs = outputs[np.unique(groups, return_inverse=True)[1]]
        parts = risk_decomposition(outputs, targets, groups, potential, weights=weights)
        coarser = groups // 2
        loss = information_loss(targets, groups, coarser, potential, weights=weights)
        return torch.stack([parts.risk, parts.floor, parts.excess, loss])

    expected = everything()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(laws, "CHUNK", 5)
        size = 1 + targets.abs().max().item() ** 2
        torch.testing.assert_close(everything(), expected, rtol=64 * EPS, atol=64 * EPS * size)


# Known values.


def test_shannon_entropy_of_classes():
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    label = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    expected = -(p * p.log()).sum()
    torch.testing.assert_close(generalized_entropy(label, Softmax()), expected)
    weighted = generalized_entropy([2, 0, 1], Softmax(), weights=[2, 5, 3])
    torch.testing.assert_close(weighted, expected)


@pytest.mark.parametrize("a", [1.3, 1.5, 2.0])
def test_tsallis_entropy_of_classes_over_the_order(a):
    tsallis = (1 - (0.5**a + 0.3**a + 0.2**a)) / (a - 1)
    potential = Sparsemax() if a == 2 else Entmax(a)
    actual = generalized_entropy([0, 0, 0, 0, 0, 1, 1, 1, 2, 2], potential)
    assert float(actual) == pytest.approx(tsallis / a, rel=8 * EPS)


@pytest.mark.parametrize("offset", [0.0, 1e8])
@pytest.mark.parametrize("n", [2, 10_000])
def test_half_the_total_variance_keeps_its_digits(offset, n):
    y = torch.tensor([[1.0, -2.0], [-1.0, 2.0]], dtype=torch.float64).repeat(n // 2, 1) + offset
    assert float(generalized_entropy(y, Squared())) == pytest.approx(2.5, rel=4 * EPS)


def test_variance_is_as_exact_as_its_mean_can_be():
    noise = torch.randn(10**5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = noise + 1e12
    noise = y - 1e12
    expected = (noise - noise.mean()).square().mean() / 2
    spacing = 2.0**-13  # of numbers at 1e12
    excess = generalized_entropy(y, Squared()) - expected
    assert excess.abs() <= (spacing / 2) ** 2 / 2 + 64 * EPS


def test_a_mean_next_to_the_boundary_is_not_on_it():
    y = torch.ones(10**4, dtype=torch.float64)
    y[5] = 1 - 2**-53
    assert 0 < generalized_entropy(y, Logistic()) < 2 * EPS
    y = torch.tensor([[1e-30, 1.0], [0.0, 1.0]], dtype=torch.float64)
    for potential in (*ON_SIMPLEX, Poisson()):
        assert 0 <= generalized_entropy(y, potential, weights=[1e-300, 1]) < EPS


def test_rare_classes_keep_their_digits():
    p = 1e-12
    actual = generalized_entropy([0, 1], Softmax(), weights=[1 - p, p])
    expected = -p * math.log(p) - (1 - p) * math.log1p(-p)
    assert float(actual) == pytest.approx(expected, rel=16 * EPS)


@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
@pytest.mark.parametrize("weights", [None, [0.1, 0.7, 0.3]])
def test_equal_targets_have_exactly_no_entropy(potential, weights):
    y = torch.tensor([[0.1, 0.7, 0.2]], dtype=torch.float64).expand(3, 3)
    assert generalized_entropy(y, potential, weights=weights) == 0
    assert generalized_entropy(y.float(), potential, weights=weights) == 0
    if potential.on_simplex:
        assert data_floor([1, 1, 1], [2, 2, 2], potential, label_smoothing=0.1, num_classes=3) == 0


# Units.


def test_units_of_torch_criteria():
    label, x = torch.tensor([0, 1, 2, 2]), torch.tensor([5, 5, 5, 7])
    mean = torch.tensor([[1 / 3, 1 / 3, 1 / 3]] * 3 + [[0.0, 0.0, 1.0]], dtype=torch.float64)
    best = mean.clamp(min=1e-300).log()
    torch.testing.assert_close(data_floor(x, label, Softmax()), F.cross_entropy(best, label))

    criterion = torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    floor = data_floor(x, label, Softmax(), label_smoothing=0.1, num_classes=3)
    best = (0.9 * mean + 0.1 / 3).log()
    torch.testing.assert_close(
        floor + potential_of(criterion).offset(best, label), criterion(best, label)
    )
    loss = FenchelYoungLoss(Softmax(), label_smoothing=0.1)
    torch.testing.assert_close(floor, loss(best, label))

    y = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = torch.cat([y[:3].mean(0, keepdim=True).expand(3, 3), y[3:]])
    torch.testing.assert_close(data_floor(x, y, Squared()) * 2 / 3, F.mse_loss(best, y))

    hard = F.one_hot(label, 3)
    best = mean.logit(eps=1e-15)
    bce = F.binary_cross_entropy_with_logits(best, hard.double())
    torch.testing.assert_close(data_floor(x, hard, Logistic()) / 3, bce)


def test_smoothing_counts_the_classes_it_is_told_of():
    few = data_floor([0, 0], [0, 1], Softmax(), label_smoothing=0.2, num_classes=2)
    many = data_floor([0, 0], [0, 1], Softmax(), label_smoothing=0.2, num_classes=10)
    y = torch.eye(10, dtype=torch.float64)[:2] * 0.8 + 0.02
    torch.testing.assert_close(many, generalized_entropy(y, Softmax()))
    assert many != few


# Groups.

HASHES = {
    "as it is": None,
    "constant": lambda words: np.zeros(len(words), dtype=np.uint64),
    "poor": lambda words: words.sum(1, dtype=np.uint64) % np.uint64(3),
}


@pytest.fixture(params=HASHES)
def hashing(request, monkeypatch):
    if HASHES[request.param]:
        monkeypatch.setattr(groups_of, "_hash_rows", HASHES[request.param])


def grouping(rows, quantum=None):
    """The first equal row of each row."""
    sample = reading.Sample(None, targets=torch.zeros(len(rows)), groups=rows)
    group, first = groups_of.group_rows(sample, "groups", quantum)
    assert torch.equal(group.unique(), torch.arange(len(first)))
    return first[group].tolist()


@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3), (17,), (0,)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int64", "float16", "bfloat16", "float64"])
@pytest.mark.usefixtures("hashing")
def test_equal_rows_are_grouped(shape, dtype):
    values = torch.randint(-1, 2, (60, *shape), generator=torch.Generator().manual_seed(0))
    values = torch.cat([values[:, None] if not shape else values] * 2).to(getattr(torch, dtype))
    rows = values.flatten(1).tolist()
    assert grouping(values) == [rows.index(row) for row in rows]


@pytest.mark.usefixtures("hashing")
def test_signed_rows_do_not_collide_and_zeros_are_equal():
    signs = torch.tensor([[1.0, -1.0][(i >> j) & 1] for i in range(256) for j in range(8)])
    assert grouping(signs.reshape(256, 8).double()) == list(range(256))
    assert grouping(torch.tensor([[0.0, 1.0], [-0.0, 1.0], [0.0, -1.0]])) == [0, 0, 2]
    assert grouping(torch.tensor([1.0, 1.0 + 2**-23, 1e-45, 0.0])) == [0, 1, 2, 3]


def test_hashes_of_near_rows_differ():
    rows = torch.tensor([[i, j, k] for i in range(30) for j in range(30) for k in range(30)])
    for dtype in (torch.int64, torch.float64, torch.float32, torch.uint8):
        words = groups_of._words(rows.to(dtype), None)
        assert len(np.unique(groups_of._hash_rows(words))) == len(rows)


def test_a_collision_changes_no_result(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(4, (300, 3), generator=generator).float()
    label = torch.randint(5, (300,), generator=generator)
    expected = data_floor(x, label, Softmax())
    for hash_rows in filter(None, HASHES.values()):
        monkeypatch.setattr(groups_of, "_hash_rows", hash_rows)
        torch.testing.assert_close(data_floor(x, label, Softmax()), expected, rtol=8 * EPS, atol=0)


def test_quantum_unites_near_inputs():
    x = [0.0, 0.04, -0.04, 0.06, 1.0]
    assert grouping(x, 0.1) == [0, 0, 0, 3, 4]
    assert data_floor(x, [0, 1, 1, 1, 1], Softmax()) == 0
    expected = 3 / 5 * generalized_entropy([0, 1, 1], Softmax())
    torch.testing.assert_close(data_floor(x, [0, 1, 1, 1, 1], Softmax(), quantum=0.1), expected)


def test_many_classes_need_no_matrix():
    n = 100_000  # a matrix of n x n doubles would take 75 GiB
    label = torch.arange(n)
    assert data_floor(label, label, Softmax()) == 0
    x = torch.where(label < 2, 0, label)
    expected = 2 / n * math.log(2)
    assert float(data_floor(x, label, Softmax())) == pytest.approx(expected, rel=8 * EPS)


# Kinds of data.


@pytest.mark.parametrize("dtype", ["uint8", "int8", "int16", "int32", "uint16", "uint32", "int64"])
def test_integer_dtypes(dtype):
    label = np.array([0, 1, 1, 0, 2], dtype=dtype)
    for y in (label, torch.from_numpy(label)):
        floor = data_floor(label, np.array([0, 1, 2, 0, 2], dtype=dtype), Softmax())
        assert float(floor) == pytest.approx(2 / 5 * math.log(2))
        assert float(data_floor([0, 0, 1, 2, 2], y, Softmax())) == pytest.approx(
            4 / 5 * math.log(2)
        )
        for potential in (Squared(), Poisson()):
            expected = generalized_entropy([0.0, 1.0, 1.0, 0.0, 2.0], potential)
            assert generalized_entropy(y, potential) == expected
    expected = generalized_entropy([0.0, 1.0, 1.0, 0.0, 1.0], Logistic())
    assert generalized_entropy(label > 0, Logistic()) == expected
    assert generalized_entropy((label > 0).astype(dtype), Logistic()) == expected


@pytest.mark.parametrize("potential", POTENTIALS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_floating_dtypes(potential, dtype):
    y = torch.tensor([[0.3, 0.7], [0.9, 0.1], [0.5, 0.5]]).to(dtype)
    expected, _ = plain_entropy(potential, y.tolist(), [0, 0, 0], [1, 1, 1])
    assert float(generalized_entropy(y, potential)) == pytest.approx(expected, rel=64 * EPS)
    assert data_floor(y, y, potential) == 0
    parts = risk_decomposition(torch.zeros(3, 2, dtype=dtype), y, [0, 0, 0], potential)
    torch.testing.assert_close(parts.risk, parts.floor + parts.excess)


def test_arrays_of_every_kind():
    y = np.arange(12.0).reshape(6, 2)
    expected = generalized_entropy(y, Squared())
    read_only = y.copy()
    read_only.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert generalized_entropy(read_only, Squared()) == expected
    assert generalized_entropy(y[::-1], Squared()) == expected
    assert generalized_entropy(y.astype(">f8"), Squared()) == expected
    assert generalized_entropy(y.tolist(), Squared()) == expected
    tensor = torch.tensor(y, requires_grad=True)
    assert generalized_entropy(tensor, Squared()) == expected
    assert not generalized_entropy(tensor, Squared()).requires_grad
    assert generalized_entropy(tensor.T.contiguous().T, Squared()) == expected
    assert generalized_entropy(y.reshape(6, 1, 2), Squared()) == expected
    images = torch.zeros(4, 2, 3, 3).permute(0, 2, 3, 1)
    assert float(data_floor(images, [1, 0, 1, 0], Softmax())) == pytest.approx(math.log(2))


def test_data_are_left_as_they_are():
    x, y = np.array([[-0.0, 1.0], [0.0, 1.0]]), np.array([[0.5, 0.5], [1.0, 0.0]])
    before = x.tobytes(), y.tobytes()
    data_floor(x, y, Softmax(), weights=np.array([1.0, 3.0]), label_smoothing=0.1)
    assert (x.tobytes(), y.tobytes()) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_data_on_a_device():
    x, y = torch.tensor([1, 1, 2]), torch.tensor([0, 1, 1])
    on_device = data_floor(x.cuda(), y.cuda(), Softmax(), weights=torch.ones(3).cuda())
    assert on_device.device.type == "cpu"
    assert on_device == data_floor(x, y, Softmax())


def test_probabilities_may_be_off_by_rounding():
    y = torch.tensor([[1 + 1e-9, -1e-9], [0.5, 0.5]], dtype=torch.float64)
    for potential in ON_SIMPLEX:
        exact = generalized_entropy(y.clamp(0, 1), potential)
        torch.testing.assert_close(generalized_entropy(y, potential), exact, rtol=1e-7, atol=0)


# Weights.


@given(samples())
def test_weights_are_repetitions(sample):
    potential, targets, groups, _ = sample
    weights = np.arange(len(targets)) % 3 + 1
    weighted = conditional_entropy(targets, groups, potential, weights=weights)
    repeated = conditional_entropy(
        targets.repeat_interleave(torch.from_numpy(weights), 0), groups.repeat(weights), potential
    )
    torch.testing.assert_close(weighted, repeated, rtol=64 * EPS, atol=64 * EPS)
    scaled = conditional_entropy(targets, groups, potential, weights=weights * 1e300)
    torch.testing.assert_close(weighted, scaled, rtol=64 * EPS, atol=64 * EPS)


def test_rows_of_weight_0_do_not_count_whatever_they_hold():
    nan = math.nan
    x, label, weights = [1.0, 1.0, nan, 1.0], [0, 1, -100, -100], [1, 1, 0, 0]
    assert float(data_floor(x, label, Softmax(), weights=weights)) == pytest.approx(math.log(2))
    f = [[0.0, 0.0], [0.0, 0.0], [nan, nan], [9.0, 9.0]]
    parts = risk_decomposition(f, label, x, Softmax(), weights=weights)
    assert float(parts.risk) == pytest.approx(math.log(2))


def test_rows_keep_their_numbers_when_others_do_not_count():
    with pytest.raises(ValueError, match=r"inputs\[2\] = nan"):
        data_floor([1.0, 1.0, math.nan], [0, 0, 1], Softmax(), weights=[0, 1, 1])


# Outputs.


def test_outputs_may_differ_by_rounding():
    f = torch.tensor([[1.0, 2.0], [1.0, 2.0 + 2**-22]])
    parts = risk_decomposition(f, [0, 1], [0, 0], Softmax())
    torch.testing.assert_close(parts.risk, parts.floor + parts.excess)
    with pytest.raises(ValueError, match="eval"):
        risk_decomposition(f.double(), [0, 1], [0, 0], Softmax())


# Errors.

EYE = torch.eye(3)
BAD = {
    "lengths": (lambda: conditional_entropy([0, 1], [0], Softmax()), "'targets': 2, 'groups': 1"),
    "length of weights": (lambda: generalized_entropy([0], Softmax(), weights=[1, 1]), "lengths"),
    "empty": (lambda: generalized_entropy(torch.zeros(0, 2), Squared()), "at least one sample"),
    "no coordinate": (lambda: generalized_entropy(torch.zeros(2, 0), Squared()), "k >= 1"),
    "scalar": (lambda: generalized_entropy(3.0, Squared()), "single number"),
    "nan targets": (lambda: generalized_entropy([0.0, math.nan], Squared()), r"targets\[1\]"),
    "inf inputs": (lambda: data_floor([math.inf], [0], Softmax()), r"inputs\[0\] = inf"),
    "nan groups": (lambda: conditional_entropy([0], [math.nan], Softmax()), r"groups\[0\]"),
    "nan outputs": (
        lambda: risk_decomposition([[math.nan]], [[1.0]], [0], Squared()),
        r"outputs\[0\] = \(nan\)",
    ),
    "nan weight": (lambda: generalized_entropy([0], Softmax(), weights=[math.nan]), "weights"),
    "inf weight": (lambda: generalized_entropy([0], Softmax(), weights=[math.inf]), "weights"),
    "negative weight": (
        lambda: generalized_entropy([0, 1], Softmax(), weights=[1, -1]),
        r"weights\[1\] = -1",
    ),
    "zero weights": (lambda: generalized_entropy([0], Softmax(), weights=[0]), "all 0"),
    "2-d weights": (lambda: generalized_entropy([0], Softmax(), weights=[[1]]), "weights of shape"),
    "negative class": (lambda: generalized_entropy([0, -100], Softmax()), r"\[1\] = -100: .* >= 0"),
    "class too large": (
        lambda: data_floor([0], [3], Softmax(), num_classes=3),
        "below 3, from num_classes",
    ),
    "class without output": (
        lambda: risk_decomposition(EYE, [0, 1, 3], [0, 1, 2], Softmax()),
        "below 3, from outputs",
    ),
    "absurd class": (lambda: generalized_entropy([0, 2**40], Softmax()), "number the classes"),
    "columns": (
        lambda: risk_decomposition(EYE, torch.ones(3, 1), [0, 1, 2], Softmax()),
        r"expected \(n, 3\)",
    ),
    "column of classes": (lambda: generalized_entropy([[0], [1]], Softmax()), r"indices \(n,\)"),
    "floating classes": (lambda: generalized_entropy([0.0, 1.0], Softmax()), r"indices \(n,\)"),
    "not on the simplex": (lambda: generalized_entropy([[0.4, 0.4]], Softmax()), "sum to 1"),
    "negative counts": (lambda: generalized_entropy([3, -1], Poisson()), r"Poisson\(\)"),
    "not in [0, 1]": (lambda: generalized_entropy([2], Logistic()), r"Logistic\(\)"),
    "smoothing": (lambda: data_floor([0], [0], Softmax(), label_smoothing=1.1), r"in \[0, 1\]"),
    "smoothing of points": (
        lambda: data_floor([0], [0.0], Squared(), label_smoothing=0.1),
        "not on the simplex",
    ),
    "quantum 0": (lambda: data_floor([0.0], [0], Softmax(), quantum=0.0), "positive"),
    "quantum nan": (lambda: data_floor([0.0], [0], Softmax(), quantum=math.nan), "positive"),
    "quantum too small": (lambda: data_floor([1e300], [0], Softmax(), quantum=1e-300), "greater"),
    "outputs differ": (
        lambda: risk_decomposition(EYE, [0, 1, 2], [7, 8, 7], Softmax()),
        "group 7, by 1 between rows 0 and 2.*eval",
    ),
    "outputs of 1 dimension": (
        lambda: risk_decomposition([0.0], [0], [0], Softmax()),
        r"expected \(n, k\)",
    ),
    "no map": (
        lambda: information_loss([0, 1, 0], [5, 6, 5], [0, 0, 1], Softmax()),
        "splits group 5: its rows 0 and 2",
    ),
    "no map of rows": (
        lambda: information_loss([0, 1], [[5, 4], [5, 4]], [0, 1], Softmax()),
        r"splits the group \(5, 4\)",
    ),
}
WRONG_TYPE = {
    "text": (lambda: conditional_entropy([0], ["a"], Softmax()), "np.unique"),
    "complex": (lambda: data_floor(torch.zeros(1, dtype=torch.cfloat), [0], Softmax()), "real"),
    "sparse": (lambda: data_floor(EYE.to_sparse(), [0, 1, 2], Softmax()), "to_dense"),
    "boolean classes": (lambda: generalized_entropy([True, False], Softmax()), "long()"),
    "integer outputs": (lambda: risk_decomposition([[1]], [0], [0], Softmax()), "double()"),
    "class for a potential": (lambda: generalized_entropy([0], Softmax), r"Softmax\(\)"),
    "criterion for a potential": (
        lambda: risk_decomposition(EYE, [0, 1, 2], [0, 1, 2], torch.nn.CrossEntropyLoss()),
        "potential_of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_values_name_the_way_out(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("case", WRONG_TYPE)
def test_wrong_types_name_the_way_out(case):
    call, message = WRONG_TYPE[case]
    with pytest.raises(TypeError, match=message):
        call()
