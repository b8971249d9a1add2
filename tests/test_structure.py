"""Structure matrices against dense Jacobians by `torch.func.jacrev`, in float64."""

import contextlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from conjopt.measure import MeasurementError
from conjopt.measure.layers import pieces, rules
from conjopt.measure.structure import (
    batch_structure_matrix,
    extreme_eigenvalues,
    structure_matrix,
    tangent_basis,
)
from conjopt.potentials import Potential, Softmax, Squared

SEQUENCE = 5


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(2, 8) for _ in range(2))
        self.convolutions = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in "ab")
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for norm, convolution in zip(self.norms, self.convolutions):
            x = x + convolution(F.silu(norm(x)))
        return self.head(x.mean((2, 3)))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(2, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).mT
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.position
        return self.head(self.encoder(tokens)[:, 0])


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.lstm = nn.LSTM(4, 3, bidirectional=True, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.lstm(self.words(words))[0]).mT  # (N, C, T)


class TiedLanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(6, 8)
        self.position = nn.Embedding(SEQUENCE, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.head = nn.Linear(8, 6, bias=False)
        self.head.weight = self.words.weight

    def forward(self, words: Tensor) -> Tensor:
        length = words.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length, dtype=torch.float64)
        h = self.words(words) + self.position(torch.arange(length))
        return self.head(self.layer(h, src_mask=mask, is_causal=True)).mT


class TimeFirst(nn.Module):
    """Samples along dimension 1 inside: of the same size as the places, they look alike."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).sum(0))


def mlp():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))


def lenet():
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 4)),
    )


def words(m):
    return torch.randint(6, (m, SEQUENCE))


MODELS = {
    "mlp": (mlp, lambda m: torch.randn(m, 6)),
    "lenet": (lenet, lambda m: torch.randn(m, 1, 12, 12)),
    "residual": (Residual, lambda m: torch.randn(m, 2, 8, 8)),
    "vision transformer": (VisionTransformer, lambda m: torch.randn(m, 2, 8, 8)),
    "tagger": (Tagger, words),
    "tied": (TiedLanguageModel, words),
    "time first": (TimeFirst, lambda m: torch.randn(m, 4, 4)),
}


def jacobians(model: nn.Module, inputs: Tensor) -> Tensor:
    """J, (m, k, P), one sample after the other."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    frozen = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}

    def run(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, {**frozen, **parameters}, sample[None]).flatten()

    with contextlib.ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        # Of what is fused there is no second derivative, nor one that can be vectorised.
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            before, torch.backends.mkldnn.enabled = torch.backends.mkldnn.enabled, False
            stack.callback(setattr, torch.backends.mkldnn, "enabled", before)
        rows = [
            torch.cat([j.flatten(1) for j in torch.func.jacrev(run)(parameters, x).values()], 1)
            for x in inputs
        ]
    return torch.stack(rows)


def on_tangent_space(J: Tensor, shape: torch.Size, potential: Potential | None) -> Tensor:
    """Project the rows of J with an orthonormal basis found by a singular value decomposition."""
    if potential is None or not potential.on_simplex:
        return J
    classes = shape[1]
    contrasts = torch.linalg.svd(torch.ones(1, classes).double()).Vh[1:]
    return torch.einsum("dc,mctp->mdtp", contrasts, J.unflatten(1, (classes, -1))).flatten(1, 2)


def make(name: str, m: int, seed: int = 0):
    torch.manual_seed(seed)
    build, draw = MODELS[name]
    model, inputs = build().double(), draw(m)
    return model, inputs.double() if inputs.is_floating_point() else inputs


def assert_close(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    assert not found.requires_grad
    assert (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("few", [0, 10**9])  # through factors, or all gradients side by side
@pytest.mark.parametrize("m", [1, 2, 4])
@pytest.mark.parametrize("name", MODELS)
def test_structure_matrices_are_those_of_the_dense_jacobian(
    name: str, m: int, few: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("conjopt.measure.layers.totals.FEW", few)
    monkeypatch.setattr("conjopt.measure.layers.tape.LITTLE", few)
    model, inputs = make(name, m)
    J = jacobians(model, inputs)
    for memory in (2**28, 1):
        assert_close(structure_matrix(model, inputs, memory=memory), J @ J.mT)
        K = J.flatten(0, 1) @ J.flatten(0, 1).T
        assert_close(batch_structure_matrix(model, inputs, memory=memory), K)


@pytest.mark.parametrize("potential", [Softmax(), Squared()], ids=repr)
@pytest.mark.parametrize("name", MODELS)
def test_on_the_tangent_space_the_basis_does_not_matter(name: str, potential: Potential):
    model, inputs = make(name, 3)
    J = on_tangent_space(jacobians(model, inputs), model(inputs).shape, potential)
    A = structure_matrix(model, inputs, potential=potential)
    K = batch_structure_matrix(model, inputs, potential=potential)
    assert A.shape == (3, J.shape[1], J.shape[1])
    assert K.shape == (3 * J.shape[1],) * 2
    expected = torch.linalg.eigvalsh(J @ J.mT)
    assert (torch.linalg.eigvalsh(A) - expected).norm() <= 1e-12 * expected.norm()
    expected = torch.linalg.eigvalsh(J.flatten(0, 1) @ J.flatten(0, 1).T)
    assert (torch.linalg.eigvalsh(K) - expected).norm() <= 1e-12 * expected.norm()
    assert_close(structure_matrix(model, inputs, potential=potential, memory=1), A)
    assert_close(batch_structure_matrix(model, inputs, potential=potential, memory=1), K)


@settings(max_examples=40)
@given(
    k=st.integers(1, 5),
    m=st.integers(1, 7),
    width=st.integers(1, 9),
    bias=st.booleans(),
    potential=st.sampled_from([None, Softmax(), Squared()]),
    memory=st.sampled_from([1, 2000, 10000, 2**28]),
)
def test_any_widths(k, m, width, bias, potential, memory):
    torch.manual_seed(k + 10 * m)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, k, bias=bias)).double()
    inputs = torch.randn(m, 3).double()
    J = jacobians(model, inputs)
    d = k
    if potential is not None and potential.on_simplex:
        J, d = tangent_basis((k,), potential) @ J, k - 1
    A = structure_matrix(model, inputs, potential=potential, memory=memory)
    K = batch_structure_matrix(model, inputs, potential=potential, memory=memory)
    assert A.shape == (m, d, d)
    assert_close(A, J @ J.mT)
    assert_close(K, J.flatten(0, 1) @ J.flatten(0, 1).T)
    # The blocks on the diagonal of K_B are the A_i.
    blocks = K.reshape(m, d, m, d)[range(m), :, range(m)] if d else A
    assert_close(blocks, A)


@settings(max_examples=30)
@given(
    channels=st.integers(1, 4),
    groups=st.sampled_from([1, 2]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    dims=st.integers(1, 3),
    k=st.integers(1, 4),
)
def test_any_convolution(channels, groups, stride, padding, dilation, dims, k):
    torch.manual_seed(0)
    layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    channels *= groups
    model = nn.Sequential(
        layer(channels, 2 * groups, 2, stride, padding, dilation, groups), nn.Flatten()
    )
    inputs = torch.randn(3, channels, *(4, 5, 3)[:dims])
    model.append(nn.Linear(model(inputs).shape[1], k)).double()
    J = jacobians(model, inputs.double())
    assert_close(structure_matrix(model, inputs.double()), J @ J.mT)
    K = J.flatten(0, 1) @ J.flatten(0, 1).T
    assert_close(batch_structure_matrix(model, inputs.double()), K)


@pytest.mark.parametrize("channels", [8, 16])
@pytest.mark.parametrize("size", [2, 5, 12])
def test_every_way_of_a_convolution(channels: int, size: int):
    torch.manual_seed(0)
    convolution = nn.Conv2d(8, channels, 3, padding=1)
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(channels * size**2, 2)).double()
    inputs = torch.randn(2, 8, size, size).double()
    J = jacobians(model, inputs)
    assert_close(structure_matrix(model, inputs), J @ J.mT)


@pytest.mark.parametrize("shape", [(1,), (2,), (7,), (3, 4), (2, 3, 2), (1, 5)])
def test_the_basis_is_orthonormal_and_sums_to_zero_over_classes(shape: tuple[int, ...]):
    basis = tangent_basis(shape, Softmax())
    d = (shape[0] - 1) * math.prod(shape[1:])
    assert basis.shape == (d, math.prod(shape))
    torch.testing.assert_close(basis @ basis.T, torch.eye(d).double(), rtol=0, atol=1e-15)
    sums = basis.reshape(d, *shape).sum(1)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-15)


def test_the_jacobian_is_projected_and_not_the_product():
    # All classes move together, a million times as much as apart: the product would lose 12 digits.
    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.common, self.apart = nn.Linear(2, 1), nn.Linear(2, 3)

        def forward(self, x):
            return 1e6 * self.common(x) + self.apart(x)

    model, inputs = Together(), torch.tensor([[3.0, 4.0]])
    A = structure_matrix(model, inputs, potential=Softmax())  # float32
    torch.testing.assert_close(A, 26 * torch.eye(2)[None], rtol=0, atol=0.5)
    Q = tangent_basis((3,), Softmax()).float()
    after = Q @ structure_matrix(model, inputs) @ Q.T
    assert (after - A).abs().max() > 10  # the test can tell


def test_one_class_has_no_tangent_space():
    model, inputs = nn.Linear(2, 1), torch.randn(3, 2)
    A = structure_matrix(model, inputs, potential=Softmax())
    assert A.shape == (3, 0, 0)
    assert batch_structure_matrix(model, inputs, potential=Softmax()).shape == (0, 0)
    assert all(torch.equal(side, torch.zeros(3)) for side in extreme_eigenvalues(A))


@pytest.mark.parametrize("m", [0, 3])
def test_no_samples_and_no_trainable_parameters(m: int):
    model = nn.Linear(2, 4).requires_grad_(m == 0)
    inputs = torch.randn(m, 2)
    assert torch.equal(structure_matrix(model, inputs), torch.zeros(m, 4, 4))
    assert structure_matrix(model, inputs, potential=Softmax()).shape == (m, 3, 3)
    assert torch.equal(batch_structure_matrix(model, inputs), torch.zeros(4 * m, 4 * m))


def test_frozen_parameters_do_not_count():
    model, inputs = make("mlp", 3)
    model[2].requires_grad_(False)
    J = jacobians(model, inputs)
    assert_close(structure_matrix(model, inputs), J @ J.mT)


def test_several_inputs_are_split_along_the_samples():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x, *, times, scale):  # times: (T, m, 4)
            return self.head(torch.tanh(self.inner(x) + self.inner(times).sum(0)) * scale)

    torch.manual_seed(0)
    model = Two().double()
    inputs = {
        "x": torch.randn(5, 4).double(),
        "times": torch.randn(2, 5, 4).double(),
        "scale": torch.tensor(3.0).double(),
    }
    whole = structure_matrix(model, inputs)
    alone = [
        structure_matrix(
            model,
            {"x": x[None], "times": times[:, None], "scale": inputs["scale"]},
        )
        for x, times in zip(inputs["x"], inputs["times"].unbind(1))
    ]
    assert_close(whole, torch.cat(alone))
    assert_close(structure_matrix(model, inputs, memory=1), whole)
    K = batch_structure_matrix(model, inputs)
    assert_close(batch_structure_matrix(model, inputs, memory=1), K)


def test_a_model_that_draws_is_taken_whole():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    inputs = torch.randn(6, 3).double()
    state = torch.get_rng_state()
    whole = structure_matrix(model, inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert_close(structure_matrix(model, inputs, memory=1), whole)
    K = batch_structure_matrix(model, inputs)
    assert_close(batch_structure_matrix(model, inputs, memory=1), K)
    assert_close(K.reshape(6, 2, 6, 2)[range(6), :, range(6)], whole)


def test_the_memory_limits_the_parts(monkeypatch: pytest.MonkeyPatch):
    sizes = []
    import conjopt.measure.structure as module

    class Spy(module.Tape):
        def pull(self, roots, cotangents):
            sizes.append(self.samples)
            return super().pull(roots, cotangents)

    monkeypatch.setattr(module, "Tape", Spy)
    monkeypatch.setattr(module, "_check", lambda *args: None)  # which pulls, too
    model, inputs = make("mlp", 12)
    # 4 outputs times 8 + 7 + 4 results in float64, twice, and no more: linear layers have factors
    by_sample = 4 * (8 + 7 + 4) * 8 * 2
    for samples, expected in ((12, [12]), (11, [6, 6]), (5, [4, 4, 4]), (1, [1] * 12)):
        sizes.clear()
        structure_matrix(model, inputs, memory=samples * by_sample)
        assert sizes == expected
    sizes.clear()
    batch_structure_matrix(model, inputs, memory=6 * by_sample)
    assert sizes == [6] * 6  # pairs of four parts


def test_large_inputs_are_not_tried_at_once(monkeypatch: pytest.MonkeyPatch):
    import conjopt.measure.structure as module

    monkeypatch.setattr(module, "_LARGE", 20)
    model, inputs = make("mlp", 12)
    J = jacobians(model, inputs)
    for memory in (2**28, 3000, 1):
        assert_close(structure_matrix(model, inputs, memory=memory), J @ J.mT)


@pytest.mark.parametrize("part", [1, 40, 2**20])  # one sample at a time, some, and all
@pytest.mark.parametrize("budget", [1, 2**25])
@pytest.mark.parametrize("of_rows", [True, False])  # as convolutions have it, and linear layers
@pytest.mark.parametrize("g", [1, 2])
@pytest.mark.parametrize(
    ("k", "both", "t", "q", "p"),
    [
        (3, False, 4, 9, 8),  # through places
        (3, False, 9, 4, 8),  # through coordinates
        (3, False, 9, 4, 12),  # filled up to 16
        (3, False, 9, 4, 9),
        (3, False, 9, 4, 13),
        (2, True, 3, 4, 5),  # both sides differ between cotangents
        (1, False, 5, 4, 3),
        (15, False, 7, 2, 4),
        (15, False, 3, 9, 8),
    ],
)
def test_every_way_of_inner_products(
    k, both, t, q, p, g, of_rows, budget, part, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(pieces, "PART", part)
    monkeypatch.setattr(pieces, "BUDGET", budget)
    torch.manual_seed(0)
    sides = [torch.randn(n, 5, g, t, size) for n, size in ((k, q), (k if both else 1, p))]
    gradients = (sides[0].double().mT @ sides[1].double()).flatten(2).transpose(0, 1)
    if of_rows:
        sides[0] = sides[0].mT.contiguous().mT
    for left, right in (sides, sides[::-1]):
        for dtype, eps in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
            piece = pieces.Outer(left.to(dtype), right.to(dtype))
            found, expected = pieces.sample_gram([piece]), gradients @ gradients.mT
            assert found.dtype == dtype
            assert found.shape == (5, k, k)
            assert (found - expected).norm() <= eps * expected.norm()


@pytest.mark.parametrize("slab", [1, 2**7, 2**18])  # one sample at a time, some, and none
@pytest.mark.parametrize("k", range(1, 34))
def test_rows_are_filled_up(k: int, slab: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pieces, "SLAB", slab)
    torch.manual_seed(0)
    for dtype, eps in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        x, y = torch.randn(2, 5, k, 3).double()
        for found, expected in (
            (pieces.products(x.to(dtype)), x @ x.mT),
            (pieces.products(x.to(dtype), y.to(dtype)), x @ y.mT),
        ):
            assert found.shape == expected.shape
            assert (found - expected).norm() <= eps * expected.norm()


def test_what_was_split_is_split_at_once_later(monkeypatch: pytest.MonkeyPatch):
    import conjopt.measure.structure as module

    sizes = []

    class Spy(module.Tape):
        def __init__(self, *args):
            super().__init__(*args)
            sizes.append(self.samples)

    monkeypatch.setattr(module, "Tape", Spy)
    model, inputs = make("mlp", 12)
    J = jacobians(model, inputs)
    for expected in ([12, 6, 6], [2, 6, 6], [2, 6, 6]):
        assert_close(structure_matrix(model, inputs, memory=6 * 4 * (8 + 7 + 4) * 8 * 2), J @ J.mT)
        assert sizes[:3] == expected
        sizes.clear()


def test_the_model_is_left_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 2))
    model[0].weight.grad = torch.ones(4, 3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    structure_matrix(model, torch.randn(5, 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones(4, 3))
    assert model[2].weight.grad is None
    assert not model._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_types_are_added_up_in_float32(dtype: torch.dtype):
    model, inputs = make("mlp", 3)
    J = jacobians(model, inputs)
    found = structure_matrix(model.to(dtype), inputs.to(dtype))
    assert found.dtype == torch.float32
    tolerance = 16 * torch.finfo(dtype).eps
    assert (found - J @ J.mT).norm() <= tolerance * (J @ J.mT).norm()


class Wrong(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.layer, self.change = nn.Linear(2, 3), change

    def forward(self, x):
        return self.change(self.layer(x))


@pytest.mark.parametrize("measure", [structure_matrix, batch_structure_matrix])
@pytest.mark.parametrize(
    ("change", "inputs", "options", "error", "message"),
    [
        (lambda f: f.sum(), torch.ones(2, 2), {}, ValueError, "for 2 samples"),
        (lambda f: f.flatten(), torch.ones(2, 2), {}, ValueError, "along dimension 0"),
        (lambda f: (f, f), torch.ones(2, 2), {}, ValueError, "returned 2 floating-point"),
        (lambda f: f.argmax(1), torch.ones(2, 2), {}, ValueError, "returned 0 floating-point"),
        (lambda f: f / 0, torch.ones(2, 2), {}, ValueError, "2 of 2 samples hold NaN or inf"),
        (lambda f: f, torch.ones(2, 2), {"memory": 0}, ValueError, "memory must be a positive"),
        (lambda f: f, torch.ones(2, 2), {"memory": math.nan}, ValueError, "memory must be"),
        (lambda f: f, torch.ones(2, 2), {"potential": "softmax"}, ValueError, "Potential or None"),
        (lambda f: f[:, 0], torch.ones(2, 2), {"potential": Softmax()}, ValueError, "of classes"),
        (lambda f: f, torch.ones(2, 2).long(), {}, RuntimeError, "dtype"),
        (lambda f: f, torch.ones(2, 2, device="meta"), {}, RuntimeError, "device"),
        (lambda f: f, torch.ones(()), {}, ValueError, "no tensor with a dimension of samples"),
    ],
)
def test_bad_input(measure, change, inputs, options, error, message):
    with pytest.raises(error, match=message):
        measure(Wrong(change), inputs, **options)


@pytest.mark.parametrize("measure", [structure_matrix, batch_structure_matrix])
def test_coupled_samples_are_refused(measure):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError, match="batch normalisation in training mode"):
        measure(model, torch.randn(4, 2))
    assert measure(model.eval(), torch.randn(4, 2)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("d", [0, 1, 2, 5])
def test_extreme_eigenvalues(d: int, dtype: torch.dtype):
    torch.manual_seed(0)
    X = torch.randn(2, 3, d, d).to(dtype)
    matrix = (X + X.mT) / 2
    lo, hi = extreme_eigenvalues(matrix)
    assert lo.shape == hi.shape == (2, 3)
    assert lo.dtype == hi.dtype == dtype
    values = torch.linalg.eigvalsh(matrix.double()) if d else torch.zeros(2, 3, 1)
    assert torch.equal(lo, values[..., 0].to(dtype))
    assert torch.equal(hi, values[..., -1].to(dtype))


def test_extreme_eigenvalues_of_the_symmetric_part():
    lo, hi = extreme_eigenvalues(torch.tensor([[2.0, 0.0], [2.0, 2.0]]))
    assert (lo, hi) == (1, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_extreme_eigenvalues_want_finite_square_matrices(bad: float):
    matrices = torch.eye(2).repeat(3, 1, 1)
    matrices[1, 0, 0] = bad
    with pytest.raises(ValueError, match="1 of 3 matrices hold NaN or infinity"):
        extreme_eigenvalues(matrices)
    with pytest.raises(ValueError, match=r"square matrices .* shape \(2, 3\)"):
        extreme_eigenvalues(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"square matrices .* shape \(3,\)"):
        extreme_eigenvalues(torch.ones(3))


@pytest.mark.parametrize("measured", [structure_matrix, batch_structure_matrix])
def test_a_wrong_rule_is_found_at_the_first_use(measured, monkeypatch):
    right = rules._RULES[F.linear]

    def wrong(use, cotangents):
        return right(use, [2 * c for c in cotangents])

    monkeypatch.setitem(rules._RULES, F.linear, wrong)
    with pytest.raises(MeasurementError, match="are measured wrong"):
        measured(nn.Linear(3, 2), torch.randn(4, 3))
