"""Eigenvalues from products against dense ones, in float64; references by reverse mode alone."""

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_no_synchronisation import Spy
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conjopt.measure import krylov
from conjopt.measure.layers.tape import Tape
from conjopt.measure.linearised import AllSamples, Linearised, Projection, plain_kernels
from conjopt.measure.spectrum import (
    Eigenvalue,
    lanczos,
    sample_top_eigenvalues,
    spectral_density,
    top_curvature,
    top_structure,
)
from conjopt.potentials import Logistic, Potential, Softmax, Squared

EPS = torch.finfo(torch.float64).eps


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.inner = nn.Sequential(nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 3, padding=1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        return self.head((h + self.inner(h)).mean((2, 3)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 4, 6))
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x + self.place)).mT  # (N, C, T)


class TiedWithPadding(nn.Module):
    """A row of the table has no gradient from look-ups, but from the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 3, padding_idx=0)
        self.head = nn.Linear(3, 4)
        self.head.weight = self.table.weight
        nn.init.normal_(self.table.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x).tanh()).mT


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)),
        lambda: torch.randn(6, 5),
    ),
    "lenet": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(3, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 6),
            nn.ReLU(),
            nn.Linear(6, 3),
        ),
        lambda: torch.randn(5, 1, 6, 6),
    ),
    "residual": (Residual, lambda: torch.randn(4, 2, 4, 4)),
    "attention": (Attention, lambda: torch.randn(3, 4, 6)),
    "tied": (TiedWithPadding, lambda: torch.tensor([[1, 0, 2], [3, 1, 0]])),
}


def make(name: str, seed: int = 0) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(seed)
    model, inputs = (build() for build in MODELS[name])
    model.double()
    return model, inputs.double() if inputs.is_floating_point() else inputs


def jacobian(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs, and J of their shape with P behind it, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(inputs)
    found = []
    for output in outputs.flatten():
        row = torch.autograd.grad(output, parameters, retain_graph=True, allow_unused=True)
        found.append(
            torch.cat([(p * 0 if g is None else g).flatten() for p, g in zip(parameters, row)])
        )
    return outputs.detach(), torch.stack(found).detach().reshape(*outputs.shape, -1)


def on_V(J: Tensor, potential: Potential | None) -> Tensor:
    """J of (m, ..., P), its outputs projected."""
    return J - J.mean(1, keepdim=True) if potential and potential.on_simplex else J


def dense_structures(J: Tensor) -> tuple[Tensor, Tensor]:
    """A (m, k, k) and K_B (mk, mk)."""
    J = J.flatten(1, -2)
    return J @ J.mT, J.flatten(0, 1) @ J.flatten(0, 1).T


def dense_curvature(outputs: Tensor, J: Tensor, potential: Potential) -> Tensor:
    """GGN, (P, P)."""
    if potential.on_simplex:
        outputs, J = outputs.movedim(1, -1), J.movedim(1, -2)
        rows, J = outputs.flatten(0, -2), J.flatten(0, -3)
    else:
        rows, J = outputs.flatten(1), J.flatten(1, -2)
    H = torch.func.vmap(torch.func.jacrev(potential.link))(rows)
    return torch.einsum("rkp,rkl,rlq->pq", J, H, J) / len(rows)


def assert_bars_hold(found: Eigenvalue, matrix: Tensor) -> None:
    """A lower bound of the greatest eigenvalue, some eigenvalue within the residual."""
    eigenvalues = torch.linalg.eigvalsh(matrix)
    rounding = 16 * EPS * eigenvalues[..., -1]
    assert (found.value <= eigenvalues[..., -1] + rounding).all()
    nearest = (eigenvalues - found.value.unsqueeze(-1)).abs().amin(-1)
    assert (nearest <= found.residual + rounding).all()


# Lanczos


def operator(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda v: (matrix @ v.unsqueeze(-1)).squeeze(-1)


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """Symmetric, of chosen eigenvalues: zero, repeated, of both signs, any scale."""
    n = draw(st.integers(1, 9))
    kinds = st.sampled_from([0.0, 1.0, 1.0, -1.0, 2.0, 1e-3, 1e-9])
    eigenvalues = torch.tensor(draw(st.lists(kinds, min_size=n, max_size=n))).double()
    torch.manual_seed(draw(st.integers(0, 2**32)))
    eigenvalues = eigenvalues + draw(st.sampled_from([0.0, 1.0])) * torch.randn(n).double()
    Q = torch.linalg.qr(torch.randn(n, n).double()).Q
    return draw(st.sampled_from([1.0, 1e-120, 1e120])) * (Q * eigenvalues) @ Q.T


@settings(max_examples=150)
@given(matrices(), st.integers(1, 12), st.sampled_from([torch.float64, torch.float32]))
def test_ritz_values_are_bounds_and_their_bars_hold(matrix, steps, dtype):
    if dtype == torch.float32:
        matrix = matrix / matrix.abs().max().clamp_min(1e-300)
    matrix = ((matrix + matrix.T) / 2).to(dtype)
    eigenvalues = torch.linalg.eigvalsh(matrix.double())
    ritz = lanczos(operator(matrix), torch.randn(len(matrix)).to(dtype), steps=steps)
    rounding = 16 * torch.finfo(dtype).eps * eigenvalues.abs().max()
    assert ritz.values.shape == ritz.residuals.shape == (min(steps, len(matrix)),)
    assert (ritz.values.diff() >= 0).all()
    assert ritz.values[-1] <= eigenvalues[-1] + rounding
    assert ritz.values[0] >= eigenvalues[0] - rounding
    nearest = (ritz.values.unsqueeze(1) - eigenvalues).abs().amin(1)
    assert (nearest <= ritz.residuals + rounding).all()
    assert ritz.weights.sum().item() == pytest.approx(1, abs=64 * torch.finfo(dtype).eps)
    if steps >= len(matrix):
        assert_close(ritz.values[-1], eigenvalues[-1], rtol=0, atol=4 * rounding.item())


@given(matrices(), st.integers(1, 5))
def test_ritz_values_are_a_gauss_quadrature(matrix, steps):
    u = torch.randn(len(matrix)).double()
    u = u / u.norm()
    matrix = matrix / matrix.abs().max().clamp_min(1e-300)
    ritz = lanczos(operator(matrix), 3 * u, steps=steps)
    power = u
    for degree in range(2 * steps):
        exact = u @ power
        assert_close((ritz.weights * ritz.values**degree).sum(), exact, rtol=0, atol=1e-9)
        power = matrix @ power


def test_many_operators_at_once_are_as_each_alone():
    torch.manual_seed(0)
    B = torch.randn(2, 3, 6, 6).double()
    B[0, 1] = 0
    B[1, 2, 2:] = 0  # rank 2
    matrices, start = B.mT @ B, torch.randn(2, 3, 6).double()
    start[1, 1] = 0
    together = lanczos(operator(matrices), start, steps=5)
    for i in range(2):
        for j in range(3):
            alone = lanczos(operator(matrices[i, j]), start[i, j], steps=5)
            for one, other in zip(together, alone):
                assert_close(one[i, j], other, rtol=1e-10, atol=1e-10)
    assert together.values[0, 1].eq(0).all()  # the zero operator
    assert together.values[1, 1].eq(0).all()  # the zero start
    assert together.weights[1, 1].eq(0).all()


def test_an_eigenvalue_is_found_once_however_often_it_is_repeated():
    diagonal = torch.tensor([1.0, 1, 1, 1, 5, 5, 0, 0]).double()
    ritz = lanczos(lambda v: diagonal * v, torch.ones(8).double(), steps=8)
    assert_close(ritz.values, torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 5]).double(), atol=1e-14, rtol=0)
    kept = ritz.weights[ritz.weights > 0]
    assert_close(kept, torch.tensor([2 / 8, 4 / 8, 2 / 8]).double())


def test_the_loop_reads_nothing(monkeypatch):
    monkeypatch.setattr(krylov, "_ritz", lambda *parts: parts)
    with Spy() as spy:
        lanczos(lambda v: 2 * v, torch.randn(3, 4), steps=4)
    assert not spy.seen


# Against dense matrices


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("potential", [Softmax(), Squared(), Logistic()], ids=repr)
def test_top_curvature(name: str, potential: Potential):
    model, inputs = make(name)
    GGN = dense_curvature(*jacobian(model, inputs), potential)
    hi = torch.linalg.eigvalsh(GGN)[-1]
    found = top_curvature(model, potential, inputs, steps=40)
    assert found.value.shape == found.residual.shape == ()
    assert_close(found.value, hi, rtol=1e-11, atol=0)
    for steps in (1, 2, 4, 8):
        assert_bars_hold(top_curvature(model, potential, inputs, steps=steps), GGN)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("potential", [None, Softmax(), Squared()], ids=repr)
def test_top_structure(name: str, potential: Potential | None):
    model, inputs = make(name)
    J = on_V(jacobian(model, inputs)[1], potential)
    A, K_B = dense_structures(J)
    found = top_structure(model, inputs, potential=potential, steps=40)
    assert_close(found.value, torch.linalg.eigvalsh(K_B)[-1], rtol=1e-11, atol=0)
    for steps in (1, 2, 4, 8):
        assert_bars_hold(top_structure(model, inputs, potential=potential, steps=steps), K_B)
    for exact_up_to in (1000, 0):
        options = {"potential": potential, "exact_up_to": exact_up_to}
        found = sample_top_eigenvalues(model, inputs, steps=40, **options)
        assert_close(found.value, torch.linalg.eigvalsh(A)[:, -1], rtol=1e-11, atol=0)
        assert found.residual.shape == (len(inputs),)
        for steps in (1, 2, 4):
            assert_bars_hold(sample_top_eigenvalues(model, inputs, steps=steps, **options), A)


@pytest.mark.parametrize("name", list(MODELS))
def test_one_backward_and_one_injected_forward_give_every_product(name: str):
    model, inputs = make(name)
    A, _ = dense_structures(jacobian(model, inputs)[1])
    with plain_kernels(model):
        tape = Tape(model, inputs)
        product = AllSamples(tape, tape.only_output(), Projection(None, tape.only_output()))
        u = torch.randn(A.shape[:2]).double()
        assert_close(product(u), operator(A)(u), rtol=1e-11, atol=1e-11)
        assert not product.agreement.fails()
        with Spy() as spy:
            product(u)
    assert not spy.seen


@pytest.mark.parametrize("name", MODELS)
def test_products_of_the_batch_read_nothing(name: str):
    model, inputs = make(name)
    linear = Linearised(model, inputs, Softmax())
    linear.gauss_newton(linear.zero)
    with Spy() as spy:
        linear.gauss_newton(torch.randn_like(linear.zero))
        linear.structure(torch.randn_like(linear.outputs).flatten())
    # Formulas of torch's forward mode name the device that the tensor is on.
    assert not set(spy.seen) - {"_to_copy"}


@settings(max_examples=40)
@given(
    st.integers(0, 2**32),
    st.sampled_from([Softmax(), Squared(), Logistic()]),
    st.integers(1, 5),
    st.integers(1, 4),
    st.sampled_from([0.0, 1e-3, 1.0, 30.0]),
    st.integers(1, 12),
)
def test_values_are_lower_bounds_with_bars(seed, potential, m, k, scale, steps):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, k)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    inputs = torch.randn(m, 3).double()
    outputs, J = jacobian(model, inputs)
    A, K_B = dense_structures(on_V(J, potential))
    assert_bars_hold(top_structure(model, inputs, potential=potential, steps=steps), K_B)
    for exact_up_to in (0, 32):
        found = sample_top_eigenvalues(
            model, inputs, potential=potential, steps=steps, exact_up_to=exact_up_to
        )
        assert_bars_hold(found, A)
    GGN = dense_curvature(outputs, J, potential)
    found = top_curvature(model, potential, inputs, steps=steps)
    # Softmax's H cancels where p is nearly one-hot: its rounding is that of ||J||^2.
    size = 64 * EPS * J.square().sum() / m
    eigenvalues = torch.linalg.eigvalsh(GGN)
    assert found.value <= eigenvalues[-1] + size
    assert (eigenvalues - found.value).abs().min() <= found.residual + size


def test_nothing_of_the_model_or_the_generators_moves():
    model, inputs = make("residual")
    model = nn.Sequential(model, nn.BatchNorm1d(3).double(), nn.Dropout(0.5))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = top_curvature(model, Softmax(), inputs, steps=3)
    again = top_curvature(model, Softmax(), inputs, steps=3)
    assert first == again
    assert torch.equal(state, torch.get_rng_state())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in model.parameters())
    other = torch.Generator().manual_seed(1)
    assert top_curvature(model, Softmax(), inputs, steps=3, generator=other).value != first.value


def test_float32_of_a_frozen_and_compiled_kind():
    model, inputs = make("lenet")
    model[0].requires_grad_(False)
    _, K_B = dense_structures(jacobian(model, inputs)[1])
    hi = torch.linalg.eigvalsh(K_B)[-1]
    compiled = torch.compile(model, backend="eager")
    assert_close(top_structure(compiled, inputs, steps=20).value, hi, rtol=1e-11, atol=0)
    found = top_structure(model.float(), inputs.float(), steps=20)
    assert found.value.dtype == torch.float32
    assert found.value.item() == pytest.approx(hi.item(), rel=1e-5)
    assert float(found) == found.value.item()


class StraightThrough(nn.Module):
    """In the backward the rounding is none, which is all that there is of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.no_grad():
            missing = hidden.square() - hidden
        return self.second(hidden + missing)


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_what_the_backward_takes_for_constant_stands_still(context):
    torch.manual_seed(0)
    model, inputs = StraightThrough(), torch.randn(6, 5).double()
    J = jacobian(model, inputs)
    hi = torch.linalg.eigvalsh(dense_curvature(*J, Softmax()))[-1]
    with context():
        linear = Linearised(model, inputs * 1, Softmax())
        assert linear.solve(linear.gauss_newton, linear.zero + 1, 40).values[-1] > 0
        assert linear._product.method == "forward"
        found = top_curvature(model, Softmax(), inputs, steps=40)
        assert_close(found.value, hi, rtol=1e-11, atol=0)
        found = top_structure(model, inputs, steps=40)
        each = [sample_top_eigenvalues(model, inputs, exact_up_to=most) for most in (0, 32)]
    A, K_B = dense_structures(J[1])
    assert_close(found.value, torch.linalg.eigvalsh(K_B)[-1], rtol=1e-11, atol=0)
    for found in each:
        assert_close(found.value, torch.linalg.eigvalsh(A)[:, -1], rtol=1e-11, atol=0)


class TwoMinds(torch.autograd.Function):
    """Its forward derivative is not that of its backward."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_forward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return gradient

    @staticmethod
    def jvp(ctx, tangent):
        return tangent * ctx.saved_tensors[0].cos()


def test_the_backward_counts_where_a_forward_derivative_says_otherwise():
    class Model(nn.Sequential):
        def forward(self, x):
            return self[1](TwoMinds.apply(self[0](x)))

    torch.manual_seed(0)
    model, inputs = Model(nn.Linear(5, 4), nn.Linear(4, 3)).double(), torch.randn(6, 5).double()
    hi = torch.linalg.eigvalsh(dense_structures(jacobian(model, inputs)[1])[1])[-1]
    assert_close(top_structure(model, inputs, steps=40).value, hi, rtol=1e-11, atol=0)


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        hidden = checkpoint(lambda x: self.first(x).tanh(), x, use_reentrant=self.use_reentrant)
        return self.second(hidden)


def test_checkpoints():
    torch.manual_seed(0)
    inputs = torch.randn(4, 5).double()
    model = Checkpointed(False)
    A, K_B = dense_structures(jacobian(model, inputs)[1])
    found = top_structure(model, inputs, steps=20)
    assert_close(found.value, torch.linalg.eigvalsh(K_B)[-1], rtol=1e-11, atol=0)
    found = sample_top_eigenvalues(model, inputs, exact_up_to=0)
    assert_close(found.value, torch.linalg.eigvalsh(A)[:, -1], rtol=1e-11, atol=0)
    inputs.requires_grad_()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        top_structure(Checkpointed(True), inputs)


class DifferentiableOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].cos()


class WrongDerivative(torch.autograd.Function):
    """Its backward loses the way to the gradient that it is given."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, gradient):
        return (gradient.detach() + (gradient - gradient.detach()) / 2) * ctx.saved_tensors[0].cos()


@pytest.mark.parametrize("function", [DifferentiableOnce, WrongDerivative])
def test_matrices_are_formed_where_a_backward_has_no_derivative(function):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

        def forward(self, x):
            return self.second(function.apply(self.first(x)))

    torch.manual_seed(0)
    model, inputs = Model(), torch.randn(4, 5).double()
    A, _ = dense_structures(jacobian(model, inputs)[1])
    found = sample_top_eigenvalues(model, inputs, exact_up_to=0)
    assert_close(found.value, torch.linalg.eigvalsh(A)[:, -1], rtol=1e-11, atol=0)


def test_outputs_that_do_not_depend_on_the_parameters():
    class Still(nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(2, 2)

        def forward(self, x):
            return 2 * x

    inputs = torch.randn(3, 2)
    assert float(top_curvature(Still(), Softmax(), inputs)) == 0
    assert float(top_structure(Still(), inputs)) == 0
    for exact_up_to in (0, 32):
        found = sample_top_eigenvalues(Still(), inputs, exact_up_to=exact_up_to)
        assert found.value.eq(0).all()


# Density


def integral(picture) -> float:
    return torch.trapezoid(picture.density, picture.grid).item()


@pytest.mark.parametrize("name", MODELS)
def test_density_has_the_mass_and_the_moments_of_the_spectrum(name: str):
    model, inputs = make(name)
    GGN = dense_curvature(*jacobian(model, inputs), Softmax())
    eigenvalues = torch.linalg.eigvalsh(GGN)
    picture = spectral_density(model, Softmax(), inputs, steps=25, probes=40)
    assert integral(picture) == pytest.approx(1, abs=1e-12)
    assert (picture.density >= 0).all()
    exact = torch.stack([eigenvalues.mean(), eigenvalues.square().mean()])
    assert ((picture.moments - exact).abs() <= 4 * picture.errors).all()
    assert_close(picture.nodes.max(), eigenvalues[-1], rtol=1e-9, atol=0)
    # Of the smoothed picture itself, less what the Gaussians add.
    mean = torch.trapezoid(picture.grid * picture.density, picture.grid)
    assert_close(mean, picture.moments[0], rtol=1e-6, atol=1e-9)
    sigma = eigenvalues[-1] / 100
    square = torch.trapezoid(picture.grid**2 * picture.density, picture.grid) - sigma**2
    assert_close(square, picture.moments[1], rtol=1e-3, atol=1e-9)
    # The cumulative share of each is that of the dense spectrum, away from the eigenvalues.
    share = (picture.weights * (picture.nodes > eigenvalues[-1] / 2)).sum() / 40
    assert share.item() == pytest.approx((eigenvalues > eigenvalues[-1] / 2).double().mean().item(),
                                         abs=0.03)  # fmt: skip


def test_density_on_a_grid_of_ones_own():
    model, inputs = make("mlp")
    grid = torch.linspace(-2, 20, 30)
    picture = spectral_density(model, Squared(), inputs, grid=grid, probes=1, steps=3)
    assert integral(picture) == pytest.approx(1, abs=1e-12)
    assert picture.errors.isnan().all()
    assert picture.nodes.shape == picture.weights.shape == (1, 3)
    narrow = spectral_density(model, Squared(), inputs, width=0.01)
    wide = spectral_density(model, Squared(), inputs, width=1.0)
    assert narrow.density.max() > wide.density.max()
    again = spectral_density(model, Squared(), inputs, width=1.0)
    assert torch.equal(again.density, wide.density)


def test_density_of_no_curvature_is_a_bump_at_zero():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    picture = spectral_density(model, Softmax(), torch.randn(4, 2))  # one class: H = 0
    assert picture.moments.abs().max() == 0
    assert integral(picture) == pytest.approx(1, abs=1e-6)


# Bad input

GOOD, X = nn.Linear(2, 3), torch.ones(4, 2)
MEASURES = {
    "curvature": lambda model, x, **options: top_curvature(model, Softmax(), x, **options),
    "structure": lambda model, x, **options: top_structure(model, x, **options),
    "samples": lambda model, x, **options: sample_top_eigenvalues(model, x, **options),
    "lanczos on samples": lambda model, x, **options: sample_top_eigenvalues(
        model, x, exact_up_to=0, **options
    ),
    "density": lambda model, x, **options: spectral_density(model, Softmax(), x, **options),
}


class Two(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x), x


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_bad_input_of_all(measure):
    with pytest.raises(ValueError, match="steps=0"):
        measure(GOOD, X, steps=0)
    with pytest.raises(ValueError, match="no trainable parameters"):
        measure(nn.Linear(2, 3).requires_grad_(False), X)
    with pytest.raises(ValueError, match="returned 2"):
        measure(Two(2, 3), X)
    with pytest.raises(ValueError, match=r"finite|infinity"):
        measure(GOOD, torch.full((4, 2), torch.nan))


def test_bad_input_of_some():
    with pytest.raises(TypeError, match="expected a conjopt"):
        top_curvature(GOOD, nn.CrossEntropyLoss(), X)
    with pytest.raises(TypeError, match="expected a conjopt"):
        top_structure(GOOD, X, potential="softmax")
    with pytest.raises(TypeError, match="expected a conjopt"):
        sample_top_eigenvalues(GOOD, X, potential=Softmax)
    flat = nn.Sequential(nn.Linear(2, 1), nn.Flatten(0))
    with pytest.raises(ValueError, match="classes along dimension 1"):
        top_curvature(flat, Softmax(), X)
    with pytest.raises(ValueError, match="samples along dimension 0"):
        sample_top_eigenvalues(nn.Sequential(nn.Linear(2, 3), nn.Flatten(0)), X)
    with pytest.raises(ValueError, match="at least one sample"):
        top_structure(GOOD, torch.ones(0, 2))
    assert sample_top_eigenvalues(GOOD, torch.ones(0, 2)).value.shape == (0,)
    normalised = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    for exact_up_to in (0, 32):
        with pytest.raises(RuntimeError, match=r"model\.eval\(\)"):
            sample_top_eigenvalues(normalised, torch.randn(4, 2), exact_up_to=exact_up_to)
    with pytest.raises(ValueError, match="probes=0"):
        spectral_density(GOOD, Softmax(), X, probes=0)
    with pytest.raises(ValueError, match="width=0"):
        spectral_density(GOOD, Softmax(), X, width=0)
    with pytest.raises(ValueError, match="ascending"):
        spectral_density(GOOD, Softmax(), X, grid=torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"expected a floating-point tensor"):
        lanczos(lambda v: v, torch.ones(3, dtype=torch.long), steps=1)
    with pytest.raises(ValueError, match="The product has shape"):
        lanczos(lambda v: v[:2], torch.ones(3), steps=1)
