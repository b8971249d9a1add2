"""Autocast to bfloat16 and float16; the measuring passes run in full precision."""

import pytest
import torch
from loop import RULES, any_rule, criterion_of, data, make, network, parameters
from torch.amp import GradScaler

DTYPES = [torch.bfloat16, torch.float16]


def run(rule, dtype, steps):
    """Status after the first step, and the losses of a run with a scaler where it is needed."""
    model = network()
    optimizer = make(model, warmup=5, measure_every=5, weight_decay=0.0, **RULES[rule])
    scaler = GradScaler("cpu", init_scale=256.0, enabled=dtype == torch.float16)
    x, y = data()
    losses, first = [], None
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            outputs = model(x)
            assert outputs.dtype == (dtype or torch.float32)
            loss = criterion_of(optimizer)(outputs, y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        first = first or optimizer.status()
    assert all(p.dtype == torch.float32 for p in parameters(model))
    assert optimizer.status().skipped_steps == 0
    return first, losses


@any_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_measured_is_that_of_full_precision(rule, dtype):
    """To the digits that the half type has."""
    (exact, _), (status, _) = run(rule, None, 1), run(rule, dtype, 1)
    tolerance = 30 * torch.finfo(dtype).eps
    assert status.loss == pytest.approx(exact.loss, rel=tolerance, nan_ok=True)
    assert status.step_size == pytest.approx(exact.step_size, rel=tolerance)
    for name in ("slope", "raw_slope", "curvature", "output_change"):
        value = getattr(exact, name)
        assert getattr(status, name) == pytest.approx(value, rel=tolerance, nan_ok=True), name


@any_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_goes_as_in_full_precision(rule, dtype):
    (_, exact), (_, losses) = run(rule, None, 60), run(rule, dtype, 60)
    assert losses[-1] < 0.8 * losses[0]
    assert losses[-1] == pytest.approx(exact[-1], rel=0.5, abs=0.1)
