"""Thm 4.3, real features: how much the loss varies within the cells of a quantizer."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.bounds import Cells, LogitGrid, TopClass, uniform_gap_bound
from conjopt.potentials import Entmax, Logistic, Softmax, Sparsemax, Squared

POTENTIALS = [Softmax(), Sparsemax(), Entmax(1.5), Logistic()]


@given(
    st.sampled_from(POTENTIALS),
    st.integers(1, 12),
    st.sampled_from([0.01, 0.3, 2.0]),
    st.sampled_from([0.1, 1.0, 30.0]),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_the_loss_varies_by_at_most_the_slack(potential, k, step, spread, soft, seed):
    generator = torch.Generator().manual_seed(seed)
    f = spread * torch.randn(40, k, generator=generator, dtype=torch.float64)
    # Neighbours: some of them are in one cell.
    f = torch.cat([f, f + step * (torch.rand(40, k, generator=generator).double() - 0.5)])
    shift = torch.randn(80, 1, generator=generator) if potential.on_simplex else 0.0
    if potential.on_simplex:
        y = torch.rand(40, k, generator=generator).double()
        y = y / y.sum(1, keepdim=True) if soft else torch.eye(k).double()[y.argmax(1)]
    else:
        y = torch.rand(40, k, generator=generator).double()
        y = y if soft else y.round()
    y = torch.cat([y, y])
    cells = LogitGrid(step, potential)(f + shift, y)
    losses = potential.loss(y, f).numpy()
    for label in cells.labels.unique():
        inside = losses[(cells.labels == label).numpy()]
        assert np.ptp(inside) <= cells.slack + 1e-10 * (1 + losses.max())


def test_cells_are_those_of_a_dense_grid():
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(500, 3, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (500,), generator=generator)
    cells = LogitGrid(0.7)(f, y).labels.numpy()
    centred = f.numpy() - f.numpy().mean(1, keepdims=True)
    rows = np.column_stack([np.floor(centred / 0.7), y.numpy()])
    plain = np.unique(rows, axis=0, return_inverse=True)[1]
    assert len(set(zip(cells, plain))) == len(set(cells)) == len(set(plain)) > 20


def test_the_slack_is_nearly_attained():
    # The right class falls and the wrong one that has it all rises, by nearly a step each.
    f = torch.tensor([[-50.01, 50.01, 0.0], [-50.99, 50.99, 0.0]], dtype=torch.float64)
    targets, grid = torch.tensor([0, 0]), LogitGrid(1.0)
    losses = Softmax().loss(torch.eye(3).double()[targets], f)
    assert grid(f, targets).count == 1
    assert 0.97 * grid.slack(3) < float(losses.diff()) <= grid.slack(3)
    # The Euclidean constant sqrt 2 times the diameter is no less, for any number of classes.
    assert all(grid.slack(k) <= 2**0.5 * k**0.5 * grid.step + 1e-15 for k in range(1, 100))


def test_a_lipschitz_constant_that_is_given_counts():
    grid = LogitGrid(0.5, Squared(), lipschitz=3.0)
    cells = grid(torch.randn(10, 4), torch.zeros(10, 4))
    assert cells.slack == pytest.approx(3.0 * 0.5 * 2.0)


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_zero_one_losses_are_a_table_over_top_classes(seed, k):
    generator = torch.Generator().manual_seed(seed)
    f, y = torch.randn(60, k, generator=generator), torch.randint(k, (60,), generator=generator)
    cells, wrong = TopClass()(f, y), f.argmax(1) != y
    assert cells.slack == 0
    triples = {*zip(f.argmax(1).tolist(), y.tolist(), cells.labels.tolist())}
    pairs = {(top, target) for top, target, _ in triples}
    assert len(triples) == len(pairs) == cells.count
    for label in cells.labels.unique():
        assert wrong[cells.labels == label].unique().numel() == 1


@pytest.mark.parametrize("form", ["empirical", "self-bounding"])
def test_the_slack_is_added(form):
    labels = torch.arange(5000) % 3
    plain = uniform_gap_bound(labels, max_loss=4.0, form=form)
    assert uniform_gap_bound(Cells(labels, 0.25), max_loss=4.0, form=form) == plain + 0.25
