"""`conjopt.testing.check_optimizer`: ours pass, and every planted bug is found by its statement."""

import copy
import dataclasses
import math

import pytest
import torch
from torch.optim import Optimizer

from conjopt import ConjSGD
from conjopt.bounds import LedgerStep, convergence
from conjopt.optim import Edge
from conjopt.optim.directions import Direction, Momentum
from conjopt.testing import OptimizerReport, ViolationError, check_optimizer

EQUAL = "equal runs are equal"
FINITE = "parameters and state stay finite"
DOWNHILL = "the first step is downhill"
RESUME = "exact resume from a file"
COPY = "a copy goes on as the original"
SEPARATE = "two optimizers share no state"
NO_GRADIENT = "parameters without a gradient stay"
NOTHING = "a step without gradients changes nothing"
GRADIENTS = "gradients are as they were after a step"
ZERO_GRAD = "zero_grad forgets the gradients"
CLOSURE = "a closure is called and is the same loop"
CLOSURE_ERROR = "an error in the closure leaves no trace"
RATE_ZERO = "a group at rate 0 stands still"
SCHEDULER = "half the rate is half the first step, by a scheduler"
ADDED = "a group that is added takes part"
MAXIMIZE = "maximize is the step of the negative gradient"
IDENTITY = "Thm 3.1: both sides of the ledger are equal"
BOUND = "Thm 3.1: the gradients are within its bound"
C1 = "C1 of Thm 3.1: a L / 2 is below 1"
NOT_FINITE = "a gradient that is not finite leaves the parameters"
NO_TRACE = "a step that was given up leaves no trace"
LOADED = "a loaded state is not written to"
GROUPS = "groups of equal options are one group"
ZERO = "gradients of zero move nothing"
TRUST = "Thm 3.6: no more than (1 + tau)^2 times the excess risk"
REPORTED = "Thm 3.6: the reported trust region is tau sqrt(2 L / beta) / V"


class Plain(Optimizer):
    """One of a user's own: a heavy ball whose rate falls with the square root of its steps.

    It keeps all of torch's contract and gives up steps that are not finite.
    """

    def __init__(self, params, lr=0.05, momentum=0.9, maximize=False):
        super().__init__(params, {"lr": lr, "momentum": momentum, "maximize": maximize})

    @torch.no_grad()
    def step(self, closure=None):
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        pairs = [(p, group) for group in self.param_groups for p in group["params"]]
        pairs = [(p, group) for p, group in pairs if p.grad is not None]
        if self.usable(pairs):
            for p, group in pairs:
                self.move(p, group, self.state[p])
        return result

    def usable(self, pairs):
        return all(bool(p.grad.isfinite().all()) for p, _ in pairs)

    def move(self, p, group, state):
        if not state:
            state["step"], state["ball"] = torch.zeros(()), torch.zeros_like(p)
        state["step"] = state["step"] + 1
        gradient = -p.grad if group["maximize"] else p.grad
        state["ball"] = group["momentum"] * state["ball"] + gradient
        p.sub_(self.rate(group) / state["step"].sqrt() * state["ball"])

    def rate(self, group):
        return group["lr"]


class Uphill(Plain):
    def rate(self, group):
        return -group["lr"]


class Overflowing(Plain):
    def move(self, p, group, state):
        super().move(p, group, state)
        state["mass"] = 1e110 * state.get("mass", torch.ones(()).double())


class StateNotSaved(Plain):
    def state_dict(self):
        return {**super().state_dict(), "state": {}}


class StateNotRestored(Plain):
    def load_state_dict(self, state_dict):
        held = self.state
        super().load_state_dict(state_dict)
        self.state = held


class StateNotReset(Plain):
    def load_state_dict(self, state_dict):
        held = dict(self.state)
        super().load_state_dict(state_dict)
        for p, state in held.items():
            if not self.state[p]:
                self.state[p] = state


class CounterLost(Plain):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state["step"] = torch.zeros(())


class HalvesOfTheState(Plain):
    """Rounds what it saves, as a careless cast does."""

    def state_dict(self):
        saved = copy.deepcopy(super().state_dict())
        for state in saved["state"].values():
            state["ball"] = state["ball"].float()
        return saved


class SharedByCopies(Plain):
    def __deepcopy__(self, memo):
        twin = type(self)([copy.deepcopy(p, memo) for p in self.param_groups[0]["params"]])
        for p, q in zip(twin.param_groups[0]["params"], self.param_groups[0]["params"]):
            if q in self.state:
                twin.state[p] = self.state[q]
        return twin


class SharedByAll(Plain):
    balls = {}  # noqa: RUF012

    def move(self, p, group, state):
        ball = self.balls.setdefault(p.shape, torch.zeros_like(p))
        ball.mul_(0.5).add_(p.grad)
        p.sub_(self.rate(group) * ball)


class MovesAll(Plain):
    """Weight decay for parameters that take no part, too."""

    def step(self, closure=None):
        result = super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.mul_(1 - 0.01 * group["lr"])
        return result


class GradientInPlace(Plain):
    def move(self, p, group, state):
        p.grad.mul_(0.5)
        super().move(p, group, state)


class ZeroGradOfNone(Plain):
    def zero_grad(self, set_to_none=True):
        if set_to_none:
            super().zero_grad()


class ClosureTwice(Plain):
    def step(self, closure=None):
        if closure is not None:
            closure()
        return super().step(closure)


class ClosureForgotten(Plain):
    def step(self, closure=None):
        super().step(closure)


class ClosureWithoutGradients(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        return (None if closure is None else closure(), super().step())[0]


class CountsBeforeTheClosure(Plain):
    def step(self, closure=None):
        for state in self.state.values():
            state["step"] = state["step"] + 1
        return super().step(closure)


class RateOfTheStart(Plain):
    def rate(self, group):
        return self.defaults["lr"]


class RateOfTheFirstGroup(Plain):
    def rate(self, group):
        return self.param_groups[0]["lr"]


class BallIsTheGradient(Plain):
    """Begins its moving average with the gradient itself, which the loop may fill with zeros."""

    def move(self, p, group, state):
        first = not state
        state["ball"] = p.grad if first else group["momentum"] * state["ball"] + p.grad
        p.sub_(self.rate(group) * state["ball"])


class RateSquared(Plain):
    def rate(self, group):
        return 20 * group["lr"] ** 2


class GroupForgotten(Plain):
    def add_param_group(self, group):
        if not self.param_groups:
            super().add_param_group(group)


class MaximizeForgotten(Plain):
    def move(self, p, group, state):
        super().move(p, {**group, "maximize": False}, state)


class Noisy(Plain):
    def move(self, p, group, state):
        super().move(p, group, state)
        p.add_(1e-12 * group["lr"] * torch.randn_like(p))


class LetsInfinityThrough(Plain):
    def usable(self, pairs):
        return not any(bool(p.grad.isnan().any()) for p, _ in pairs)


class Poisoned(Plain):
    """The parameters stay, but the moving averages have seen the numbers."""

    def usable(self, pairs):
        if super().usable(pairs):
            return True
        for p, _ in pairs:
            if self.state[p]:
                self.state[p]["ball"] = self.state[p]["ball"] + p.grad
        return False


class CountsGivenUpSteps(Plain):
    def usable(self, pairs):
        for p, _ in pairs:
            if self.state[p] and not super().usable(pairs):
                self.state[p]["count"] = self.state[p]["count"] + 1
        return super().usable(pairs)


class WritesToLoaded(Plain):
    def move(self, p, group, state):
        held = state.get("ball")
        super().move(p, group, state)
        if held is not None:
            held.copy_(state["ball"])


class NormByGroup(Plain):
    def rate(self, group):
        return group["lr"] / len(group["params"])


class Drifting(Plain):
    def move(self, p, group, state):
        super().move(p, group, state)
        p.add_(1e-9 * group["lr"])


PROMISED = (NOT_FINITE, NO_TRACE, LOADED, GROUPS, ZERO)
PLANTED = {
    Uphill: DOWNHILL,
    Overflowing: FINITE,
    StateNotSaved: RESUME,
    StateNotRestored: RESUME,
    StateNotReset: RESUME,
    CounterLost: RESUME,
    HalvesOfTheState: RESUME,
    SharedByCopies: COPY,
    SharedByAll: SEPARATE,
    MovesAll: NO_GRADIENT,
    GradientInPlace: GRADIENTS,
    ZeroGradOfNone: ZERO_GRAD,
    ClosureTwice: CLOSURE,
    ClosureForgotten: CLOSURE,
    ClosureWithoutGradients: CLOSURE,
    CountsBeforeTheClosure: CLOSURE_ERROR,
    BallIsTheGradient: ZERO_GRAD,
    RateOfTheStart: RATE_ZERO,
    RateOfTheFirstGroup: RATE_ZERO,
    RateSquared: SCHEDULER,
    GroupForgotten: ADDED,
    MaximizeForgotten: MAXIMIZE,
    Noisy: EQUAL,
    LetsInfinityThrough: NOT_FINITE,
    Poisoned: NO_TRACE,
    CountsGivenUpSteps: NO_TRACE,
    WritesToLoaded: LOADED,
    NormByGroup: GROUPS,
    Drifting: ZERO,
}


EVERY = {
    *(value for name, value in list(globals().items()) if name.isupper() and type(value) is str)
}


def only(*names):
    """What to leave out to look at these alone."""
    return EVERY - set(names)


def of(kind, **options):
    return lambda model, loss: kind(model.parameters(), **options)


def conj(kind=ConjSGD, **options):
    short = {"warmup": 2, "measure_every": 3, **options}
    return lambda model, loss: kind(model.parameters(), model=model, loss=loss, **short)


def test_the_names_are_all_there_are():
    report = check_optimizer(of(Plain), max_examples=1)
    found = {*report.statements, *report.left_out, *(v.statement for v in report.not_promised)}
    assert found == EVERY


def test_a_users_own_holds():
    report = check_optimizer(of(Plain), promises=PROMISED, max_examples=5)
    assert isinstance(report, OptimizerReport)
    assert {RESUME, COPY, IDENTITY, BOUND, *PROMISED} <= set(report.statements)
    assert set(report.left_out) == {REPORTED}
    assert "does not promise: Thm 3.6" in str(report)


@pytest.mark.parametrize("kind", PLANTED, ids=lambda kind: kind.__name__)
def test_planted_bugs_are_found(kind):
    SharedByAll.balls.clear()
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(kind), promises=PROMISED, leave_out=only(PLANTED[kind]), max_examples=5)
    violations = {v.statement: v for v in error.value.violations}
    assert PLANTED[kind] in violations
    found = violations[PLANTED[kind]]
    assert found.left != found.right
    assert set(found.example) == {"model", "loss", "scale", "samples", "taken", "seed"}
    assert str(found) in str(error.value)


# ConjSGD and the ledger.


OPTIONS = {
    "spectral": {},
    "sgd": {"direction": "sgd"},
    "polyak": {"direction": "sgd", "step_rule": "polyak", "momentum": 0},
    "constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_ours_hold(name):
    report = check_optimizer(conj(**OPTIONS[name]), max_examples=2)
    constant = name == "constant"
    assert {v.statement for v in report.not_promised} <= ({C1, TRUST} if constant else {C1})
    assert set(report.left_out) == {REPORTED if constant else MAXIMIZE}
    assert {RESUME, NOT_FINITE, NO_TRACE, LOADED, GROUPS, BOUND} <= set(report.statements)
    assert constant or {TRUST, REPORTED} <= set(report.statements)


class WrongTau(Edge):
    def limits(self, *arguments):
        limits = super().limits(*arguments)
        return {**limits, "trust region": 1.01 * limits["trust region"]}


class TrustAlone(Edge):
    """The other limits are nearly always below it."""

    factor = 1.0

    def limits(self, *arguments):
        return {"trust region": self.factor * super().limits(*arguments)["trust region"]}


class LooseTrustAlone(TrustAlone):
    factor = 1.3

    def radius(self, *arguments):
        return None


class Along(Direction):
    """The gradient with a sign; uphill the trust region is all there is."""

    name, held_out, sign = "along", True, -1.0

    def propose(self, gradients, batch_gradients, states, groups):
        u, pending = Momentum().propose(gradients, batch_gradients, states, groups)
        return [self.sign * t for t in u], pending

    def commit(self, *arguments):
        Momentum().commit(*arguments)


class StatisticsNotRestored(ConjSGD):
    def load_state_dict(self, state_dict):
        held = self._statistics.state_dict()
        super().load_state_dict(state_dict)
        self._statistics.load_state_dict(held)


class CallsNotRestored(ConjSGD):
    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        self._calls = 0


class NeverGivenUp(ConjSGD):
    def _given_up(self, finite):
        return False


OURS = {
    "trust region 1 % too wide": (conj(step_rule=WrongTau()), REPORTED),
    "trust region 30 % too wide": (
        conj(direction=Along(), step_rule=LooseTrustAlone(), momentum=0),
        TRUST,
    ),
    "sign of the direction": (
        conj(direction=Along(), step_rule=TrustAlone(), momentum=0),
        DOWNHILL,
    ),
    "statistics not restored": (conj(StatisticsNotRestored), RESUME),
    "step counter not restored": (conj(CallsNotRestored), RESUME),
    "never given up": (conj(NeverGivenUp), NOT_FINITE),
}


@pytest.mark.parametrize("bug", OURS)
def test_planted_bugs_of_ours_are_found(bug):
    make, statement = OURS[bug]
    with pytest.raises(ViolationError) as error:
        check_optimizer(make, leave_out=only(statement), max_examples=5)
    assert statement in {v.statement for v in error.value.violations}


def test_uphill_the_trust_region_holds():
    make = conj(direction=Along(), step_rule=TrustAlone(), momentum=0)
    with pytest.raises(ViolationError) as error:
        check_optimizer(make, leave_out=only(DOWNHILL, TRUST, REPORTED), max_examples=5)
    assert {v.statement for v in error.value.violations} == {DOWNHILL}


@pytest.mark.parametrize("factor", [0.9, 1.1])
def test_a_bound_with_a_wrong_constant_is_found(monkeypatch, factor):
    true = convergence.bound_of

    def wrong(*arguments, **options):
        bound = true(*arguments, **options)
        return dataclasses.replace(bound, weighted_bound=factor * bound.weighted_bound)

    monkeypatch.setattr(convergence, "bound_of", wrong)
    assert_found(BOUND)


@pytest.mark.parametrize(("name", "factor"), [("constant_bound", 0.7), ("mean_bound", 0.7)])
def test_other_bounds_that_are_too_low_are_found(monkeypatch, name, factor):
    true = convergence.bound_of

    def wrong(*arguments, **options):
        bound = true(*arguments, **options)
        return dataclasses.replace(bound, **{name: factor * getattr(bound, name)})

    monkeypatch.setattr(convergence, "bound_of", wrong)
    assert_found(BOUND)


@pytest.mark.parametrize("name", ["left", "out_of_batch"])
def test_a_ledger_that_forgets_the_share_of_the_batch_is_found(monkeypatch, name):
    true = getattr(LedgerStep, name).fget
    by = {"left": lambda step: step.share, "out_of_batch": lambda step: 1 - step.share}[name]
    wrong = property(lambda step: true(step) / by(step) if by(step) else 0.0)
    monkeypatch.setattr(LedgerStep, name, wrong)
    assert_found(IDENTITY)


def assert_found(statement):
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(torch.optim.SGD, lr=0.02), leave_out=only(statement), max_examples=20)
    assert statement in {v.statement for v in error.value.violations}


# Others.


def test_what_torchs_own_do_not_promise():
    looked_at = only(C1, NOT_FINITE, NO_TRACE, LOADED, GROUPS, ZERO, TRUST)
    make = of(torch.optim.SGD, lr=0.1, momentum=0.9)
    sgd = check_optimizer(make, leave_out=looked_at, max_examples=10)
    assert {v.statement for v in sgd.not_promised} == {C1, NOT_FINITE, NO_TRACE, LOADED, TRUST}
    adamw = check_optimizer(of(torch.optim.AdamW, lr=0.1), leave_out=looked_at, max_examples=5)
    assert {NOT_FINITE, NO_TRACE, LOADED} <= {v.statement for v in adamw.not_promised}
    assert GROUPS in adamw.statements


def test_one_that_needs_a_closure():
    """LBFGS cannot be copied, and moves by its history where there is no gradient."""
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(torch.optim.LBFGS, lr=0.1, max_iter=2), max_examples=3)
    found = {v.statement for v in error.value.violations}
    assert {COPY, NO_GRADIENT} <= found <= {COPY, NO_GRADIENT, SCHEDULER}


def test_strict_and_leave_out():
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(torch.optim.SGD, lr=0.1), strict=True, max_examples=2)
    assert {NOT_FINITE, NO_TRACE} <= {v.statement for v in error.value.violations}
    report = check_optimizer(of(Uphill), leave_out=[DOWNHILL, BOUND], max_examples=2)
    assert report.left_out[DOWNHILL] == "as you said"
    assert DOWNHILL not in report.statements


def test_the_counterexample_is_the_simplest():
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(Uphill), leave_out=only(DOWNHILL), max_examples=5)
    (found,) = (v for v in error.value.violations if v.statement == DOWNHILL)
    simplest = {"model": "linear", "loss": "MSELoss", "scale": 1.0, "samples": 1}
    assert found.example == {**simplest, "taken": 0, "seed": 0}


def test_it_leaves_random_numbers_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    check_optimizer(of(Plain), max_examples=2)
    assert torch.equal(torch.rand(3), expected)


def test_bad_input():
    with pytest.raises(TypeError, match=r"got SGD, expected a function of a model and a loss"):
        check_optimizer(torch.optim.SGD)
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="got a SGD, expected a function"):
        check_optimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"cannot be called \(too many positional arguments\)"):
        check_optimizer(lambda params: torch.optim.SGD(params, lr=0.1))
    with pytest.raises(TypeError, match="returned a Linear, expected a torch"):
        check_optimizer(lambda m, loss: torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="has no parameter of the model"):
        check_optimizer(lambda m, loss: torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match=r"promises=.'fast'.*out of.*a copy goes on"):
        check_optimizer(of(Plain), promises=["fast"])
    with pytest.raises(ValueError, match="leave_out='equal runs are equal'"):
        check_optimizer(of(Plain), leave_out=EQUAL)
    for wrong, kind in ((0, ValueError), (-1, ValueError), (2.5, TypeError), (True, TypeError)):
        with pytest.raises(kind, match=f"max_examples={wrong}, expected a whole number of at l"):
            check_optimizer(of(Plain), max_examples=wrong)
    for tau, kind in ((-1, ValueError), (math.nan, ValueError), ("a", TypeError)):
        with pytest.raises(kind, match=f"tau={tau!r}, expected a .*number"):
            check_optimizer(of(Plain), tau=tau)


class WithoutNoGrad(Plain):
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad


class NeedsItsClosure(Plain):
    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            closure()
        return super().step()


class FailsLate(Plain):
    def move(self, p, group, state):
        super().move(p, group, state)
        if state["step"] == 2:
            raise KeyError("lr_max")


def test_an_optimizer_that_fails_plain_steps_is_one_error():
    with pytest.raises(
        RuntimeError, match=r"WithoutNoGrad, .*; decorate step with @torch\.no_grad"
    ):
        check_optimizer(of(WithoutNoGrad))
    with pytest.raises(RuntimeError, match=r"raised TypeError: .* declares step\(self, closure\)"):
        check_optimizer(of(NeedsItsClosure))
    with pytest.raises(RuntimeError, match="step 2 of FailsLate, on a linear model") as error:
        check_optimizer(of(FailsLate))
    assert isinstance(error.value.__cause__, KeyError)
    with pytest.raises(RuntimeError, match=r"SparseAdam, .* gradients are dense here"):
        check_optimizer(of(torch.optim.SparseAdam))
    made = []

    def again(model, loss):
        made.append(Plain(model.parameters()))
        return made[0]

    with pytest.raises(
        ValueError, match=r"no parameter of the model .*make a new one at each call"
    ):
        check_optimizer(again)


class NeverCallsIt(Plain):
    def step(self, closure=None):
        return super().step()


class KeepsGradients(Plain):
    def zero_grad(self, set_to_none=True):
        super().zero_grad(False)


SIDES = {
    Overflowing: (FINITE, "state['mass'] has inf", "finite numbers"),
    KeepsGradients: (ZERO_GRAD, "2 gradients are left", "None after zero_grad()"),
    ClosureTwice: (CLOSURE, "a step calls it 2 times", "once"),
    NeverCallsIt: (CLOSURE, "a step calls it 0 times", "once"),
    ClosureWithoutGradients: (
        CLOSURE,
        "the closure is called under no_grad",
        "gradients enabled in it",
    ),
    GroupForgotten: (
        ADDED,
        "a parameter of it stays as it was",
        "a step, as it has a gradient",
    ),
    WritesToLoaded: (LOADED, "a step writes to 'ball' of state 0 of the file", "a copy of it"),
}


@pytest.mark.parametrize("kind", SIDES, ids=lambda kind: kind.__name__)
def test_sides_tell_what_was_found(kind):
    name, *sides = SIDES[kind]
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(kind), promises=PROMISED, leave_out=only(name), max_examples=5)
    (found,) = error.value.violations
    assert [found.left, found.right] == sides


def test_a_step_that_returns_nothing_is_told_so():
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(ClosureForgotten), leave_out=only(CLOSURE), max_examples=2)
    (found,) = error.value.violations
    assert found.left == "a step returns None"
    assert found.right.startswith("the loss tensor(")


def test_both_sides_of_an_equation_are_told():
    """And not their difference."""
    with pytest.raises(ViolationError) as error:
        check_optimizer(of(GradientInPlace), leave_out=only(GRADIENTS), max_examples=2)
    (found,) = error.value.violations
    assert float(found.left) != 0 != float(found.right)
