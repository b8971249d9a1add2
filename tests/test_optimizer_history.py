"""`ConjSGD(..., history=...)`: what is recorded, when, and what it may not disturb."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from loop import (
    RULES,
    any_rule,
    backward,
    criterion_of,
    data,
    equal,
    make,
    network,
    parameters,
    same,
    train,
)
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from conjopt import ConjSGD
from conjopt.bounds import ConvergenceLedger
from conjopt.optim import journal
from conjopt.report import History
from conjopt.report.digest import digest
from conjopt.report.html import page
from conjopt.report.words import headline, sentences

OPTIONS = {"warmup": 2, "measure_every": 5}


@any_rule
def test_measuring_steps_are_recorded_and_change_nothing(rule):
    history = History()
    runs = []
    for given in (None, history):
        model = network()
        optimizer = make(model, history=given, **OPTIONS, **RULES[rule])
        train(model, optimizer, 11)
        runs.append((parameters(model), optimizer.state_dict()))
    assert equal(runs[0][0], runs[1][0])
    assert same(runs[0][1], runs[1][1])
    assert [record["step"] for record in history.records] == [1, 2, 5, 10]


def test_a_record_is_the_status_of_its_step():
    history = History()
    model = network(torch.float64)
    optimizer = make(model, history=history, batch_rule="correlation", **OPTIONS)
    for step in range(5):
        loss = train(model, optimizer, 1, step)
    status, record = optimizer.status(), history.records[-1]
    assert record["step"] == status.step == 5
    assert record["loss"] == pytest.approx(loss, rel=1e-12)
    assert record["data_floor"] == 0
    assert record["excess_loss"] == status.loss
    for name in (
        *("step_size", "limited_by", "slope", "curvature", "correlation", "gradient_energy"),
        *("noise_scale", "batch_size", "recommended_batch_size", "skipped_steps"),
    ):
        assert record[name] == getattr(status, name), name
    assert record["lr"] == 1
    assert record["lo"] is None  # not measured, which is not the same as no number
    limits = {k: v for k, v in record.items() if k.startswith("limits/")}
    assert limits == {f"limits/{name}": value for name, value in status.limits.items()}
    assert {name: record[f"conditions/{name}"] for name in ("C1", "C2", "C3", "C4")} == {
        condition.name: condition.state for condition in status.conditions
    }


@pytest.mark.parametrize(
    ("criterion", "floor"),
    [
        (nn.CrossEntropyLoss(), "auto"),
        (nn.CrossEntropyLoss(reduction="sum"), "auto"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "auto"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), 0.05),
        (nn.MSELoss(), 0.01),
    ],
    ids=str,
)
def test_loss_and_floor_are_in_the_units_of_the_criterion(criterion, floor):
    history = History()
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, data_floor=floor, history=history
    )
    x = torch.randn(8, 4, dtype=torch.float64)
    y = torch.arange(8) % 3 if not isinstance(criterion, nn.MSELoss) else x[:, :3] ** 2
    losses = [criterion(model(part), target) for part, target in ((x[:4], y[:4]), (x[4:], y[4:]))]
    for loss in losses:  # as under accumulation with a gradient scaler
        (loss * 4.0).backward()
    optimizer.step()
    (record,) = history.records
    mean = sum(losses) / 2
    assert record["loss"] == pytest.approx(float(mean.detach()), rel=1e-12)
    smoothing = getattr(criterion, "label_smoothing", 0)
    entropy = -sum(
        p * math.log(p) for p in (1 - smoothing + smoothing / 3, *[smoothing / 3] * 2) if p
    )
    assert record["data_floor"] == pytest.approx(entropy if floor == "auto" else floor, rel=1e-6)


def test_eigenvalues_and_conditions_come_from_a_ledger():
    history = History()
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    ledger = ConvergenceLedger(model, criterion, x, y, whole=True)
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, ledger=ledger, ledger_every=1,
        history=history,
    )  # fmt: skip
    lo, hi = ledger.probe_eigenvalues(samples=4)
    criterion(model(x), y).backward()
    optimizer.step()
    (record,) = history.records
    assert (record["lo"], record["hi"]) == (lo, hi)
    assert record["conditions/C1"] in ("holds", "fails")


def test_a_path_becomes_a_history_that_a_resumed_run_appends_to(tmp_path):
    path = tmp_path / "run ü" / "history.jsonl"
    model = network()
    optimizer = make(model, history=path, **OPTIONS)
    train(model, optimizer, 5)
    state = copy.deepcopy(optimizer.state_dict())
    assert "history" not in str(state.keys())
    other = make(model, history=str(path), **OPTIONS)
    other.load_state_dict(state)
    train(model, other, 5, 5)
    assert [record["step"] for record in History.read(path)] == [1, 2, 5, 10]


def test_steps_that_are_given_up_are_recorded_and_then_thinned():
    history = History()
    model = network()
    optimizer = make(model, history=history, **OPTIONS)
    train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for _ in range(12):
            backward(model, optimizer)
            next(model.parameters()).grad.fill_(torch.nan)
            optimizer.step()
    assert [(r["step"], r["skipped_steps"]) for r in history.records] == [
        (1, 0), (1, 1), (1, 2), (1, 5), (1, 10)
    ]  # fmt: skip


@pytest.mark.parametrize("cause", ["loss", "gradient"])
@pytest.mark.parametrize("device_like", [False, True])
def test_a_step_that_is_given_up_is_recorded_with_its_loss_and_no_limit(
    cause, device_like, monkeypatch
):
    if device_like:  # where the device decides, and step() goes on
        monkeypatch.setattr(ConjSGD, "_given_up", lambda self, finite: False)
        monkeypatch.setattr(ConjSGD, "_gate", lambda self, finite: finite)
    history = History()
    model = network()
    optimizer = make(model, history=history, **OPTIONS)
    train(model, optimizer, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if cause == "loss":
            x, y = data(8)
            optimizer.zero_grad()
            criterion_of(optimizer)(model(x * math.nan), y).backward()
            loss = math.nan
        else:
            loss = backward(model, optimizer, 1)
            next(model.parameters()).grad.fill_(torch.nan)
        optimizer.step()
    taken, skipped = history.records
    assert taken["limited_by"] is not None
    assert skipped == {
        "step": 1, "limited_by": None, "skipped_steps": 1, "lr": 1, "data_floor": 0,
        "loss": pytest.approx(loss, rel=1e-6, nan_ok=True),
    }  # fmt: skip
    assert digest(history).runs[0].limits == {taken["limited_by"]: 1}


def test_a_run_whose_loss_is_no_number_is_not_reported_as_healthy():
    history = History()
    model = network()
    optimizer = make(model, history=history, warmup=5, measure_every=5)
    x, y = data(8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for step in range(30):
            optimizer.zero_grad()
            criterion_of(optimizer)(model(x * (math.nan if step >= 10 else 1)), y).backward()
            optimizer.step()
    found = digest(history)
    told = sentences(found)
    last = f"{history.records[6 - 1]['loss']:.4g}"
    assert told[1] == f"Loss is NaN at step 10. The last finite one was {last} at step 10."
    assert told[2] == "20 steps were skipped, all since step 10: something was not finite."
    assert told[3].startswith("The step size was ")
    said = headline(found.runs[0], before=15)
    assert said == (f"20 steps skipped (5 new), loss NaN, last finite {last} at step 10, step 10")
    assert "not a number: loss of the batch in 8 records" in page(found, "run")


class Full:
    """A history whose disk is full for some of its records."""

    def __init__(self, error):
        self.error, self.calls = error, 0

    def record(self, /, **values):
        self.calls += 1
        if self.calls in (2, 3):
            raise self.error


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("closed")])
def test_what_cannot_be_written_is_said_once_and_training_goes_on(error):
    model, twin = network(), network()
    optimizer, other = make(model, history=Full(error), warmup=5), make(twin, warmup=5)
    train(model, optimizer, 1)
    with pytest.warns(RuntimeWarning, match="could not write to its history") as said:
        train(model, optimizer, 4, 1)
    assert len(said) == 1
    assert str(error) in str(said[0].message)
    assert said[0].filename.endswith("loop.py")  # the line that called step()
    assert optimizer._journal.history.calls == 5
    train(twin, other, 5)
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_a_copy_has_no_history(how, tmp_path):
    path = tmp_path / "history.jsonl"
    model = network()
    optimizer = make(model, history=path, **OPTIONS)
    train(model, optimizer, 1)
    if how == "deepcopy":
        net, other = copy.deepcopy((model, optimizer))
    elif how == "pickle":
        net, other = pickle.loads(pickle.dumps((model, optimizer)))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        net, other = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
    train(net, other, 1, 1)
    assert len(History.read(path)) == 1
    train(model, optimizer, 1, 1)
    assert len(History.read(path)) == 2


def test_a_step_that_is_recorded_cannot_be_captured():
    optimizer = make(network(), history=History(), step_rule="constant", **OPTIONS)
    assert optimizer.measures_next
    assert not make(network(), step_rule="constant").measures_next


def test_what_is_no_history_is_refused(tmp_path):
    with pytest.raises(TypeError, match="got a list as history="):
        make(network(), history=[])
    with pytest.raises(ValueError, match=r"got an empty path for a history; give a file"):
        make(network(), history="")
    with pytest.raises(IsADirectoryError, match=r"give a file, such as history\.jsonl in it"):
        make(network(), history=tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no history"):
        make(network(), history=tmp_path / "notes.txt")
    with pytest.raises(OSError, match=r"notes\.txt"):
        make(network(), history=tmp_path / "notes.txt" / "history.jsonl")


@pytest.mark.parametrize("rank", [0, 1])
def test_of_several_processes_the_first_has_the_history(rank, monkeypatch, tmp_path):
    monkeypatch.setattr(journal.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(journal.distributed, "get_rank", lambda group: rank)
    path = tmp_path / "history.jsonl"
    assert (journal.Journal(path, 1, 0).history is None) == (rank > 0)
    assert path.exists() == (rank == 0)


def on_a_rank(path):
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    wrapped = DistributedDataParallel(model)
    optimizer = ConjSGD(wrapped.parameters(), model=wrapped, loss=criterion, history=path)
    rank = torch.distributed.get_rank()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(rank))
    for _ in range(3):
        optimizer.zero_grad()
        criterion(wrapped(x), torch.arange(8) % 3).backward()
        optimizer.step()
    return optimizer._journal.history is not None


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed")
def test_the_first_rank_alone_writes(two, tmp_path):
    assert two(on_a_rank, str(tmp_path / "history.jsonl")) == [True, False]
    records = History.read(tmp_path / "history.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[0]["batch_size"] == 16
