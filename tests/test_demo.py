from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conjopt.demo import training
from conjopt.demo.data import load_split, make_model
from conjopt.demo.summary import RunSummary, Spread, sentences, summarise, table

ORDER = ["ConjSGD", "SGD", "AdamW"]


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on busy cores would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(records, **keys):
    """Records of one run, from pairs of epoch and training loss."""
    keys = {"model": "mlp", "optimizer": "ConjSGD", "seed": 0, "test_loss": 0.2} | keys
    return [
        {
            "test_accuracy": 0.9,
            **keys,
            "epoch": epoch,
            "cpu_seconds": 10 * epoch,
            "train_loss": loss,
            "step_size": 0.1,
        }
        for epoch, loss in records
    ]


def summary_of(losses, **keys):
    return RunSummary.of(run(enumerate(losses), **keys))


# Training


def test_splits_are_stratified_disjoint_and_fixed_by_the_seed():
    split, again, other = load_split(0), load_split(0), load_split(1)
    assert torch.equal(split.train_inputs, again.train_inputs)
    assert not torch.equal(split.train_targets, other.train_targets)
    whole = torch.cat([split.train_inputs, split.test_inputs]).flatten(1)
    assert len(whole) == 1797
    # All 1797 images of the data set differ, so a test image is in no training set.
    assert len(whole.unique(dim=0)) == len(whole)
    shares = [
        torch.bincount(targets).double() / len(targets)
        for targets in (split.train_targets, split.test_targets)
    ]
    assert (shares[0] - shares[1]).abs().max() < 0.003


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_models_are_fixed_by_the_seed(name):
    first, again, other = (make_model(name, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="expected one of mlp, cnn, got 'vit'"):
        make_model("vit", 0)


def test_seconds_are_those_of_the_steps_alone(monkeypatch):
    # A clock that ticks once at every look: a step, looked at before and after, takes one tick.
    monkeypatch.setattr(time, "process_time", itertools.count().__next__)
    records = []

    def look(values):
        records.append(values)
        time.process_time()

    training.train("mlp", "SGD", 0, split=load_split(0), epochs=2, on_record=look)
    assert [record["cpu_seconds"] for record in records] == [r["step"] for r in records]


def test_evaluation_runs_without_dropout_or_gradients_and_over_every_image(monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.9), nn.Linear(64, 10))
    outputs = []
    model.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    split = load_split(0)
    first, second = (training._evaluate(model, split) for _ in range(2))
    assert first == second
    assert not any(output.requires_grad for output in outputs)
    assert model.training
    logits = model.eval()(split.train_inputs).double().log_softmax(1)
    expected = -logits[range(1437), split.train_targets].mean().item()
    assert first["train_loss"] == pytest.approx(expected, rel=1e-12)


def test_the_real_optimizers_train():
    records = []
    split = load_split(0)
    for name in ORDER:
        training.train("mlp", name, 0, split=split, epochs=2, on_record=records.append)
    ends = [record for record in records if record["epoch"] == 2]
    assert [record["optimizer"] for record in ends] == ORDER
    assert all(record["train_loss"] < 0.6 for record in ends)
    assert all(record["test_accuracy"] > 0.8 for record in ends)
    assert all(record["step_size"] > 0 for record in ends)


# The summary


def test_a_target_is_reached_at_the_first_evaluation_at_or_below_it():
    summary = RunSummary.of(run([(0, 2.3), (0.5, 0.2), (1, 0.1), (1.5, 0.3), (2, 0.05)]))
    assert summary.epochs_to == {0.1: 1, 0.01: None}
    assert summary.cpu_seconds_to == {0.1: 10, 0.01: None}
    assert summary.smallest_train_loss == summary.train_loss == 0.05
    assert summary.cpu_seconds == 20


@given(losses=st.lists(st.floats(0, 3) | st.just(math.nan) | st.just(math.inf), min_size=1))
def test_of_any_losses_the_summary_tells_the_truth(losses):
    summary = summary_of(losses)
    for target, epoch in summary.epochs_to.items():
        assert not any(loss <= target for loss in losses[:epoch])
        assert epoch is None or losses[epoch] <= target
    finite = [loss for loss in losses if math.isfinite(loss)]
    assert summary.smallest_train_loss == (min(finite) if finite else None)
    fine = bool(finite) and losses[-1] <= 2 * min(finite)
    assert summary.rebounded != fine


def test_spreads_are_over_the_seeds_that_have_the_quantity():
    runs = [
        summary_of([2, 0.05, 0.005], seed=0),
        summary_of([2, 1, 0.05], seed=1),
        summary_of([2, 0.5, math.nan], seed=2),
    ]
    (row,) = summarise(runs)
    assert row.seeds == 3
    assert row.epochs_to[0.1] == Spread(1.5, 1, 2, 2)
    assert row.epochs_to[0.01] == Spread(2, 2, 2, 1)
    assert row.cpu_seconds_to[0.1] == Spread(15, 10, 20, 2)
    assert row.smallest_train_loss.mean == pytest.approx((0.005 + 0.05 + 0.5) / 3)
    assert math.isnan(row.train_loss.mean)
    assert Spread.of([None]) == Spread(None, None, None, 0)


def test_the_table():
    runs = [
        *(summary_of([2, 0.09, 0.005], seed=s, test_accuracy=0.96 + 0.01 * s) for s in range(3)),
        summary_of([2, 0.05, 0.004], optimizer="SGD", test_accuracy=0.95),
        summary_of([2, 0.6, 0.5], optimizer="SGD", seed=1, test_accuracy=0.95),
        summary_of([2, math.nan], model="cnn", optimizer="AdamW"),
    ]
    assert table(summarise(runs)).splitlines() == [
        "              training loss             test         epochs to    CPU seconds to",
        "               end smallest  accuracy   loss      0.1     0.01      0.1     0.01",
        "mlp",
        "  ConjSGD   0.0050   0.0050 97.0 ±1.0   0.20      1.0      2.0       10       20",
        "  SGD         0.25     0.25 95.0 ±0.0   0.20  1.0 1/2  2.0 1/2   10 1/2   20 1/2",
        "cnn",
        "  AdamW        nan      2.0      90.0   0.20        —        —        —        —",
        "Means over seeds; ±: half the range; 2/3: reached by two seeds of three.",
    ]


def pair(conj, sgd, adamw, seed=0, model="mlp"):
    """Three runs that reach 0.01 in these epochs (None: never)."""
    return [
        summary_of([2.0] * (epochs or 9) + [2.0 if epochs is None else 0.01], **keys)
        for epochs, name in ((conj, "ConjSGD"), (sgd, "SGD"), (adamw, "AdamW"))
        for keys in [{"optimizer": name, "seed": seed, "model": model}]
    ]


@pytest.mark.parametrize(
    ("epochs", "won"),
    [
        ((2, 3, 4), 1),
        ((3, 2, 4), 0),
        ((3, 4, 2), 0),
        ((3, 3, 4), 0),  # a tie is not fewer
        ((3, None, None), 1),
        ((None, None, None), 0),
        ((None, 3, 3), 0),
    ],
)
def test_a_pair_is_won_in_fewer_epochs_than_both(epochs, won):
    runs = pair(*epochs) + pair(1, 2, 3, seed=1)
    assert sentences(runs, summarise(runs))[0] == (
        "ConjSGD reached a training loss of 0.01 in fewer epochs than SGD and AdamW on "
        f"{won + 1} of 2 model-seed pairs."
    )


def test_pairs_that_were_not_finished_do_not_count():
    runs = pair(1, 2, 3) + pair(1, 2, 3, seed=1)[:2]
    assert "on 1 of 1 model-seed pairs" in sentences(runs, summarise(runs))[0]
    assert not any("pairs" in s for s in sentences(runs[:1], summarise(runs[:1])))


def test_accuracy_is_compared_with_the_better_of_the_others():
    runs = [
        summary_of([2.0], optimizer=name, seed=seed, test_accuracy=accuracy)
        for name, accuracies in (("ConjSGD", (0.96, 0.98)), ("SGD", (0.9, 1)), ("AdamW", (0.98, 1)))
        for seed, accuracy in enumerate(accuracies)
    ]
    found = sentences(runs, summarise(runs))
    assert (
        "mlp: test accuracy 97.00 % against 99.00 % by AdamW, the better of the others: "
        "-2.00 points."
    ) in found
    assert not any("accuracy" in s for s in sentences(runs[:-1], summarise(runs[:-1])))


def test_runs_that_rebounded_are_named():
    runs = [summary_of([2, 0.1, 0.2]), summary_of([2, 0.1, 0.21], seed=1, optimizer="SGD")]
    assert sentences(runs, summarise(runs))[-1] == (
        "1 of 2 runs ended above twice their smallest training loss: "
        "SGD on mlp, seed 1 (0.21 after 0.10)."
    )
    assert sentences(runs[:1], summarise(runs[:1]))[-1] == (
        "None of 1 runs ended above twice its smallest training loss."
    )
