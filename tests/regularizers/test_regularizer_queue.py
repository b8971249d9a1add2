"""The queue of past batches: what is in it, what it changes, and an exact resume."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from conjopt.potentials import Squared
from conjopt.regularizers import ConditionalEntropy, OutputCodingRate, WithinClassScatter

KINDS = [ConditionalEntropy, OutputCodingRate, WithinClassScatter]
of_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
SPREADS = KINDS[1:]


def batch(step: int, m: int = 6, k: int = 3):
    generator = torch.Generator().manual_seed(step)
    f = torch.randn(m, k, generator=generator, dtype=torch.float64)
    return f, torch.randint(k, (m,), generator=generator)


def test_it_keeps_the_newest_rows():
    term = ConditionalEntropy(queue=10)
    assert len(term.queue) == 0
    for step in range(3):
        term(*batch(step))
    newest = torch.cat([batch(2)[0], batch(1)[0][:4]])
    assert torch.equal(term.queue.rows, newest)
    assert torch.equal(term.queue.targets, torch.cat([batch(2)[1], batch(1)[1][:4]]))
    assert not term.queue.rows.requires_grad
    term(*batch(3, m=25))
    assert torch.equal(term.queue.rows, batch(3, m=25)[0][:10])
    term.queue.clear()
    assert len(term.queue) == 0


def test_of_a_spread_it_keeps_what_the_loss_sees():
    term = OutputCodingRate(queue=6)
    f, y = batch(0)
    term(f, y)
    assert_close(term.queue.rows, f - f.mean(1, keepdim=True))


@pytest.mark.parametrize("kind", SPREADS, ids=lambda kind: kind.__name__)
def test_a_spread_is_that_of_all_rows_and_this_batch_carries_the_gradient(kind):
    (old, y_old), (new, y_new) = batch(0, m=12), batch(1)
    term = kind(1.0, queue=12)
    term(old, y_old)
    new.requires_grad_()
    value = term.estimate(new, y_new)
    joined = kind(1.0).estimate(torch.cat([new, old]), torch.cat([y_new, y_old]))
    assert_close(value, joined)
    gradient, expected = (torch.autograd.grad(v, new)[0] for v in (value, joined))
    assert_close(gradient, 3 * expected)  # 6 rows for 18


def test_conditional_entropy_asks_this_batch_only():
    (old, y_old), (new, y_new) = batch(0, m=12), batch(1)
    term = ConditionalEntropy(queue=12)
    term(old, y_old)
    # A loop of its own: the neighbours of each new row among all.
    rows, labels = torch.cat([new, old]), torch.cat([y_new, y_old])
    u = rows - rows.mean(0)
    u = u / u.square().mean().sqrt()
    total = 0.0
    for i in range(6):
        scores = -(u[i] - u).square().sum(1) / (2 * 3 * 0.1)
        scores[i] = -torch.inf
        mean = scores.softmax(0) @ torch.eye(3, dtype=torch.float64)[labels]
        total += torch.special.entr(mean).sum() / 6
    assert_close(term.estimate(new, y_new), total)


def test_with_a_queue_a_batch_of_a_row_is_enough():
    term = ConditionalEntropy(queue=30)
    f, y = batch(0, m=30)
    for i in range(30):
        value = term(f[i : i + 1].requires_grad_(), y[i : i + 1])
    assert value > 0


def test_many_classes_need_it():
    """A sample of each class has no company in its batch, but in the queue."""
    k = 20
    f = torch.randn(k, k, generator=torch.Generator().manual_seed(0)).double()
    y = torch.arange(k)
    alone, helped = ConditionalEntropy(), ConditionalEntropy(queue=4 * k)
    for _ in range(4):
        assert alone(f, y) == 0
        helped(f + 0.01, y)
    assert helped.estimate(f, y) > 0


@of_kind
@pytest.mark.parametrize("soft", [False, True], ids=["classes", "points"])
def test_a_resumed_run_is_the_unbroken_one(kind, soft):
    def targets(y):
        return torch.eye(3, dtype=torch.float64)[y] if soft else y

    def make():
        return kind(lambda calls: 0.1 * (calls + 1), queue=10)

    term = make()
    for step in range(3):
        f, y = batch(step)
        term(f, targets(y))
    file = io.BytesIO()
    torch.save(term.state_dict(), file)
    file.seek(0)
    resumed = make()
    resumed.load_state_dict(torch.load(file, weights_only=True))
    assert resumed.calls == 3
    for step in range(3, 6):
        f, y = batch(step)
        assert torch.equal(resumed(f, targets(y)), term(f, targets(y)))
    for name, tensor in term.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            assert torch.equal(resumed.state_dict()[name], tensor), name


def test_a_state_replaces_whatever_the_queue_held():
    full, empty = ConditionalEntropy(queue=10), ConditionalEntropy(queue=10)
    full(*batch(0))
    state = copy.deepcopy(full.state_dict())
    full(*batch(1, k=3))
    full.load_state_dict(empty.state_dict())
    assert len(full.queue) == 0
    wide = ConditionalEntropy(queue=10)
    wide(*batch(0, k=7))
    wide.load_state_dict(state)
    assert torch.equal(wide.queue.rows, state["queue.rows"])


@of_kind
def test_copies_go_their_own_way(kind):
    term = kind(queue=10)
    term(*batch(0))
    twin = copy.deepcopy(term)
    assert torch.equal(twin(*batch(1)), term(*batch(1)))
    term(*batch(2))
    assert not torch.equal(twin.queue.rows, term.queue.rows)


@of_kind
def test_only_training_calls_fill_it(kind):
    term = kind(queue=10)
    term.estimate(*batch(0))
    with torch.no_grad():
        term(*batch(0))
    term.eval()
    term(*batch(0))
    assert len(term.queue) == 0
    term.train()
    term(*batch(0))
    assert len(term.queue) == 10


@of_kind
@pytest.mark.filterwarnings("ignore:.*adds 0 where outputs are NaN")
def test_a_batch_that_is_left_out_leaves_nothing_behind(kind):
    term, twin = kind(queue=12), kind(queue=12)
    f, y = batch(0)
    for one in (term, twin):
        one(f, y)
    term(torch.full_like(f, torch.nan), y)
    assert torch.isfinite(term.queue.rows).all()
    assert_close(term.estimate(*batch(1)), twin.estimate(*batch(1)))


def test_ignored_rows_stay_ignored():
    term, twin = ConditionalEntropy(queue=12), ConditionalEntropy(queue=12)
    f, y = batch(0)
    ignored = y.clone()
    ignored[2:4] = -100
    term(f, ignored)
    kept = ignored >= 0
    twin(f[kept], y[kept])
    assert_close(term.estimate(*batch(1)), twin.estimate(*batch(1)))


def test_rows_of_another_kind_are_refused():
    term = ConditionalEntropy(queue=10)
    f, y = batch(0)
    term(f, y)
    with pytest.raises(ValueError, match=r"queue holds rows .* Call queue.clear\(\)"):
        term(f, torch.eye(3, dtype=torch.float64)[y])
    with pytest.raises(ValueError, match="queue holds rows"):
        term(f, y, features=torch.randn(6, 5))
    term.queue.clear()
    term(f, y, features=torch.randn(6, 5))


def test_regression_has_one_too():
    term = ConditionalEntropy(potential=Squared(), queue=6)
    f, _ = batch(0)
    term(f, f.sin())
    new = batch(1)[0]
    value = term.estimate(new, new.sin())
    assert value > 0
    assert value != ConditionalEntropy(potential=nn.MSELoss()).estimate(new, new.sin())
