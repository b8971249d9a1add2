"""Bounds on unseen samples refuse what would void them, and say what, where, and what to do."""

import math

import numpy as np
import pytest
import torch

from conjopt.bounds import (
    LogitGrid,
    TopClass,
    generalization_range,
    heldout_certificate,
    total_variation_gap,
    uniform_gap_bound,
)
from conjopt.potentials import Poisson, Squared


@pytest.mark.parametrize("bound", [heldout_certificate, generalization_range])
def test_losses_above_the_maximum_are_counted_and_named(bound):
    losses = torch.full((100,), 0.5)
    losses[[3, 17, 40]] = torch.tensor([1.5, 9.0, math.inf])
    with pytest.raises(
        ValueError, match=r"3 of 100 losses, at \[3, 17, 40\], are above max_loss=1.*clip"
    ):
        bound(losses, max_loss=1.0)
    with pytest.raises(ValueError, match=r"100 of 100 losses, at \[0, .*, 9, \.\.\.\], are above"):
        bound(losses, max_loss=0.1)


def test_a_loss_just_above_the_maximum_is_not_rounding():
    at = 1.0 + 4 * float(np.finfo(np.float32).eps)
    with pytest.raises(ValueError, match=r"1 of 2 losses, at \[1\], are above"):
        heldout_certificate(torch.tensor([0.0, at]), max_loss=1.0)
    with pytest.raises(ValueError, match=r"1 of 2 losses, at \[1\], are above"):
        heldout_certificate([0.0, 1.0 + 1e-15], max_loss=1.0)


@pytest.mark.parametrize("bound", [heldout_certificate, generalization_range])
def test_losses_that_are_nan_or_below_the_minimum(bound):
    with pytest.raises(ValueError, match=r"2 of 4 losses, at \[1, 2\], are NaN.*count it as max_"):
        bound([0.0, math.nan, math.nan, 1.0], max_loss=1.0)
    with pytest.raises(ValueError, match=r"1 of 2 losses, at \[1\], are below min_loss=0.*-0.1"):
        bound([0.0, -0.1], max_loss=1.0)


@pytest.mark.parametrize("shape", [(0,), (2, 3), ()])
def test_losses_that_are_no_row(shape):
    with pytest.raises(ValueError, match=r"losses"):
        heldout_certificate(torch.zeros(shape), max_loss=1.0)


def test_losses_that_are_no_numbers():
    for losses in (["a", "b"], np.zeros(3, dtype=complex), torch.zeros(3, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="real"):
            heldout_certificate(losses, max_loss=1.0)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.1, math.nan])
def test_a_confidence_out_of_range(confidence):
    with pytest.raises(ValueError, match=r"confidence=.*between 0 and 1, such as 0.95"):
        heldout_certificate([0.0], max_loss=1.0, confidence=confidence)
    with pytest.raises(ValueError, match=r"confidence=.*between 0 and 1, such as 0.95"):
        uniform_gap_bound([0], max_loss=1.0, confidence=confidence)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_loss": 0.0},
        {"max_loss": math.inf},
        {"max_loss": math.nan},
        {"max_loss": 1.0, "min_loss": 2.0},
        {"max_loss": 1.0, "min_loss": -math.inf},
    ],
)
def test_a_range_that_is_none(limits):
    for bound in (
        lambda: heldout_certificate([0.0], **limits),
        lambda: uniform_gap_bound([0], **limits),
        lambda: total_variation_gap([1.0], [1.0], **limits),
    ):
        with pytest.raises(ValueError, match="finite numbers with min_loss < max_loss"):
            bound()


def test_choices_that_are_unknown():
    with pytest.raises(ValueError, match=r"method='clt', expected one of 'betting', 'kl'"):
        heldout_certificate([0.0], max_loss=1.0, method="clt")
    with pytest.raises(ValueError, match="side='left', expected 'upper', 'lower' or 'two-sided'"):
        heldout_certificate([0.0], max_loss=1.0, side="left")
    with pytest.raises(ValueError, match="form='best', expected one of 'empirical'"):
        uniform_gap_bound([0], max_loss=1.0, form="best")


def test_ranges_of_impossible_numbers():
    for number in (-0.1, math.nan, 3.0):
        for name in ("entropy", "sample_entropy"):
            with pytest.raises(ValueError, match=f"^generalization_range: {name}="):
                generalization_range([1.0], max_loss=2.0, **{name: number})
    with pytest.raises(ValueError, match=r"below sample_entropy=0.5, which no function of Z"):
        generalization_range([0.1, 0.2], max_loss=2.0, sample_entropy=0.5)


def test_laws_that_are_none():
    for law in ([0.5, 0.6], [1.5, -0.5], [math.nan, 1.0], [[0.5, 0.5]], [3, 7], []):
        with pytest.raises(ValueError, match=r"probabilities of shape .* sum 1; divide counts"):
            total_variation_gap(law, [0.5, 0.5], max_loss=1.0)
        with pytest.raises(ValueError, match=r"cells of shape .* sum 1; divide counts"):
            uniform_gap_bound(law, max_loss=1.0, form="population", samples=10)
    with pytest.raises(ValueError, match="2 probabilities and 3 frequencies"):
        total_variation_gap([0.5, 0.5], [0.5, 0.5, 0.0], max_loss=1.0)


def test_cells_that_are_none():
    with pytest.raises(TypeError, match=r"cells of dtype torch.float32.*quantize"):
        uniform_gap_bound(torch.randn(5), max_loss=1.0)
    for cells in (torch.zeros(2, 3).long(), torch.zeros(0).long()):
        with pytest.raises(ValueError, match=r"cells of shape .*, expected \(n,\)"):
            uniform_gap_bound(cells, max_loss=1.0)
    with pytest.raises(ValueError, match="samples=None with form='population'"):
        uniform_gap_bound([0.5, 0.5], max_loss=1.0, form="population")
    with pytest.raises(ValueError, match="samples=5 with form='empirical'"):
        uniform_gap_bound([0, 1], max_loss=1.0, samples=5)
    with pytest.raises(ValueError, match="samples=0, expected at least 1"):
        uniform_gap_bound([0.5, 0.5], max_loss=1.0, form="population", samples=0)


def test_grids_that_are_none():
    for step in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="expected a positive number"):
            LogitGrid(step)
    for potential in (Squared(), Poisson()):
        with pytest.raises(ValueError, match=r"has no Lipschitz constant.*pass lipschitz="):
            LogitGrid(1.0, potential)
    with pytest.raises(ValueError, match="lipschitz=-1"):
        LogitGrid(1.0, lipschitz=-1.0)
    with pytest.raises(ValueError, match="below the rounding error"):
        LogitGrid(1e-17)(torch.tensor([[1.0, -1.0]]), [0])


@pytest.mark.parametrize("quantizer", [LogitGrid(1.0), TopClass()])
def test_outputs_that_have_no_cell(quantizer):
    f = torch.zeros(4, 3)
    f[2, 1] = math.nan
    with pytest.raises(ValueError, match=r"1 of 4 rows of logits are not finite.* row 2"):
        quantizer(f, [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"logits of shape \(4,\), expected \(n, k\)"):
        quantizer(torch.zeros(4), [0, 1, 2, 0])
    with pytest.raises(ValueError, match=r"one row for each sample"):
        quantizer(torch.zeros(4, 3), [0, 1])
