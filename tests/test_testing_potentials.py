"""`conjopt.testing.check_potential`: ours pass, and every planted bug is found by its statement."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from conjopt.potentials import (
    Entmax,
    Logistic,
    LossBounds,
    Poisson,
    Potential,
    Softmax,
    Sparsemax,
    Squared,
)
from conjopt.testing import Violation, ViolationError, check_potential

DEFINITION = "the loss is its definition"
LINK = "the link is the gradient of the conjugate"
HESSIAN = "the Hessian product is the derivative of the link"
LIPSCHITZ = "the link is beta-Lipschitz"
CONJUGACY = "conjugacy: <y, f> - Phi*(f) is at most Phi(y)"
BOUNDS = "Thm 2.2: the loss is within the bounds by its residual"


class Quartic(Potential):
    """One of a user's own, by its value and its conjugate alone."""

    def value(self, y):
        return (y**4).sum(-1) / 4

    def conjugate(self, f):
        return 0.75 * (f.abs() ** (4 / 3)).sum(-1)


@pytest.mark.parametrize(
    "potential",
    [Softmax(), Sparsemax(), Entmax(1.2), Entmax(1.5), Squared(), Logistic(), Poisson()],
    ids=repr,
)
def test_ours_hold(potential):
    report = check_potential(potential, max_examples=40)
    assert len(report.statements) == 12 - (potential.smoothness is None)
    assert repr(potential) in str(report)


def test_a_users_own():
    signed = st.lists(st.floats(-2, 2, width=32), min_size=6, max_size=6).map(
        lambda values: torch.tensor(values, dtype=torch.float64).reshape(2, 3)
    )
    # Its link has an unbounded slope at 0, where the Hessian is not defined.
    with pytest.raises(ViolationError) as error:
        check_potential(Quartic(), k=3, targets=signed)
    assert {v.statement for v in error.value.violations} <= {
        HESSIAN,
        "the Hessian is positive semidefinite",
    }


class WrongBeta(Softmax):
    smoothness = 0.25


class WrongLink(Softmax):
    def link(self, f):
        return f.sigmoid() / f.sigmoid().sum(-1, keepdim=True)


class ScaledLink(Squared):
    def link(self, f):
        return 1.001 * f


class ShiftedConjugate(Squared):
    def conjugate(self, f):
        return super().conjugate(f) + 0.1


class LoweredConjugate(Softmax):
    def conjugate(self, f):
        return super().conjugate(f) - 1e-6

    def loss(self, y, f):
        return super().loss(y, f) - 1e-6


class ShiftedValue(Logistic):
    def value(self, y):
        return super().value(y) - 0.1


class ShiftedLoss(Sparsemax):
    def loss(self, y, f):
        return super().loss(y, f) + 1e-6


class HalfHessian(Logistic):
    def hessian_product(self, f, v):
        return super().hessian_product(f, v) / 2


class NegativeHessian(Softmax):
    def hessian_product(self, f, v):
        return -super().hessian_product(f, v)


class Untangled(Squared):
    def tangent_projection(self, v):
        return v - v.mean(-1, keepdim=True)


class NotOnTheSimplex(Softmax):
    """A projection that forgets the mean is right for residuals; this one forgets a coordinate."""

    def tangent_projection(self, v):
        return torch.cat([torch.zeros_like(v[..., :1]), v[..., 1:]], -1)


class TooTightBelow(Squared):
    def loss_bounds(self, residual_norm, target, *, prediction=None):
        lower, upper = super().loss_bounds(residual_norm, target, prediction=prediction)
        return LossBounds(1.01 * lower, upper)


class TooTightAbove(Softmax):
    def loss_bounds(self, residual_norm, target, *, prediction=None):
        lower, upper = super().loss_bounds(residual_norm, target, prediction=prediction)
        return LossBounds(lower, lower + 0 * upper.clamp(max=1))


class Concave(Squared):
    def value(self, y):
        return -super().value(y)


class Infinite(Softmax):
    def conjugate(self, f):
        return f.exp().sum(-1).log() * torch.where(f.abs().amax(-1) > 20, torch.nan, 1.0)


class Broken(Squared):
    def link(self, f):
        raise RuntimeError("no link today")


PLANTED = {
    WrongBeta: LIPSCHITZ,
    WrongLink: LINK,
    ScaledLink: LINK,
    ShiftedConjugate: DEFINITION,
    LoweredConjugate: CONJUGACY,
    ShiftedValue: CONJUGACY,
    ShiftedLoss: "the loss vanishes at the link",
    HalfHessian: HESSIAN,
    NegativeHessian: "the Hessian is positive semidefinite",
    Untangled: "residuals lie in the tangent space",
    NotOnTheSimplex: "residuals lie in the tangent space",
    TooTightBelow: BOUNDS,
    TooTightAbove: BOUNDS,
    Concave: "Def 1.1: the generalized entropy is not negative",
    Infinite: DEFINITION,
    Broken: LINK,
}


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_planted_bugs_are_found(kind):
    with pytest.raises(ViolationError) as error:
        check_potential(kind(), max_examples=30)
    violations = {v.statement: v for v in error.value.violations}
    assert PLANTED[kind] in violations
    found = violations[PLANTED[kind]]
    assert found.left != found.right
    assert set(found.example) == ({"y", "f", "v"} if kind is not Broken else set())
    assert str(found) in str(error.value)


def test_the_counterexample_is_small_and_contradicts():
    """It is the statement that fails on it, and hypothesis has shrunk it."""
    with pytest.raises(ViolationError) as error:
        check_potential(ShiftedConjugate())
    (found,) = (v for v in error.value.violations if v.statement == DEFINITION)
    f = torch.tensor(found.example["f"], dtype=torch.float64)
    y = torch.tensor(found.example["y"], dtype=torch.float64)
    assert f.shape[-1] == 1
    of = ShiftedConjugate()
    whole = of.value(y) + of.conjugate(f) - (y * f).sum(-1)
    assert float((whole - of.loss(y, f)).abs().max()) == pytest.approx(0.1)


def test_bad_input():
    with pytest.raises(TypeError, match="expected a conjopt"):
        check_potential(torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="needs k="):
        check_potential(Softmax(), targets=st.none())


ONES = torch.ones(2, 3, dtype=torch.float64)
BAD = {
    "k, a word": ({"k": "a"}, TypeError, "got k='a', expected an integer"),
    "k, none": ({"k": 0}, ValueError, "got k=0, expected at least 1"),
    "largest, 0": ({"largest": 0}, ValueError, "largest=0, expected a number from 0.001"),
    "largest, negative": ({"largest": -1}, ValueError, "largest=-1, expected a number from 0.001"),
    "largest, no number": ({"largest": float("nan")}, ValueError, "largest=nan"),
    "largest, a word": ({"largest": "a"}, TypeError, "largest='a', expected a number"),
    "no examples": ({"max_examples": 0}, ValueError, "max_examples=0, expected at least 1"),
    "a tensor": ({"k": 3, "targets": ONES}, TypeError, r"strategies.just\(tensor\)"),
    "targets of none": ({"k": 3, "targets": st.none()}, ValueError, "drew a NoneType, expected"),
    "a wrong width": (
        {"k": 4, "targets": st.just(ONES)},
        ValueError,
        r"drew the shape \(2, 3\) in torch.float64, expected .*\(2, 4\), .*by k=",
    ),
    "float32": ({"k": 3, "targets": st.just(ONES.float())}, ValueError, "in torch.float32"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options(name):
    options, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        check_potential(Squared(), **options)


def test_the_least_size_of_outputs():
    assert len(check_potential(Squared(), largest=1e-3, max_examples=2).statements) == 12


class Simplexless(Softmax):
    on_simplex = False


class OnNoSimplex(Squared):
    on_simplex = True


def test_what_on_simplex_can_hide():
    """As docs/testing_potentials.md says: a space too large is not found, one too small is."""
    assert len(check_potential(Simplexless(), max_examples=20).statements) == 12
    with pytest.raises(ViolationError) as error:
        check_potential(OnNoSimplex(), k=3, max_examples=20)
    assert "residuals lie in the tangent space" in str(error.value)


def test_without_hypothesis(tmp_path):
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "try: import conjopt.testing\n"
        "except ImportError as error: print(error)"
    )
    root = Path(__file__).parents[1]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert 'pip install "conjopt[testing]"' in ran.stdout


def test_a_violation_reads_well():
    text = str(Violation("Thm 2.2", "3", "at most 2", {"f": [1.0]}))
    assert text == "Thm 2.2: 3, expected at most 2; for f=[1.0]"


def test_outputs_are_as_large_as_was_asked_for():
    """A conjugate that overflows from 710 on is found beyond it, and not before."""

    class Overflowing(Softmax):
        def conjugate(self, f):
            return f.exp().sum(-1).log()

    check_potential(Overflowing(), k=2, largest=700, max_examples=20)
    with pytest.raises(ViolationError, match="inf"):
        check_potential(Overflowing(), k=2, largest=2000, max_examples=40)
    check_potential(Softmax(), k=2, largest=1000, max_examples=20)
