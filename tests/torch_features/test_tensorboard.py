"""TensorBoard: what `TensorBoard` records is what an event file holds."""

import math
import sys
import time

import pytest
import torch
from loop import RULES, any_rule, data, make, network, train
from snippets import snippet

from conjopt.report import History, TensorBoard, scalars

pytest.importorskip("tensorboard")

from tensorboard.backend.event_processing.event_accumulator import (
    SCALARS,
    EventAccumulator,
)
from tensorboard.summary.writer.record_writer import RecordWriter


def read(folder):
    """Steps and values of every scalar, by name."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
    names = events.Tags()["scalars"]
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in names}


@any_rule
def test_statuses_are_scalars(rule, tmp_path):
    model = network()
    optimizer = make(model, warmup=3, measure_every=4, **RULES[rule])
    expected = {}
    with TensorBoard(tmp_path) as board:
        for step in (2, 4, 6):
            train(model, optimizer, 2, step - 2)
            status = optimizer.status()
            board.record(status)
            expected |= {(name, step): value for name, value in scalars(status).items()}
    found = {(n, step): value for n, pairs in read(tmp_path).items() for step, value in pairs}
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in expected.items()}
    assert found["conjopt/step_size", 6] == pytest.approx(status.step_size)
    for name, limit in status.limits.items():
        plain = {"Polyak cap": "Polyak_cap", "1/(2L)": "1_2L"}.get(name, name.replace(" ", "_"))
        assert found[f"conjopt/limits/{plain}", 6] == pytest.approx(limit)


def test_what_a_status_does_not_know_is_left_out():
    model = network()
    optimizer = make(model, warmup=3)
    before = scalars(optimizer.status())
    train(model, optimizer, 3)
    status = optimizer.status()
    after = scalars(status)
    assert before.keys() < after.keys()
    assert all(map(math.isfinite, after.values()))
    assert "conjopt/curvature" in after
    assert "conjopt/top_curvature" not in after  # not measured in this direction
    states = {condition.name: condition.state for condition in status.conditions}
    assert states["C1"] != "unknown"
    assert states["C2"] == "unknown"
    assert after["conjopt/conditions/C1"] == (states["C1"] == "holds")
    assert "conjopt/conditions/C2" not in after


def test_records_of_a_history_are_scalars(tmp_path):
    with History(tmp_path / "metrics.jsonl") as history:
        history.record(step=1, loss=2.5, rule="edge", accuracy=None, done=False)
        history.record(step=4, loss=torch.tensor(0.5), limit=math.inf, gap=math.nan)
    with TensorBoard(tmp_path / "board") as board:
        for record in History.read(tmp_path / "metrics.jsonl"):
            board.record(record)
        board.record({"test": torch.tensor(2)}, step=7)
    expected = {"loss": [(1, 2.5), (4, 0.5)], "done": [(1, 0.0)], "test": [(7, 2.0)]}
    assert read(tmp_path / "board") == expected


def test_a_record_is_on_disk_at_once_and_an_exception_closes(tmp_path, monkeypatch):
    write = RecordWriter.write

    def slowly(self, event):  # in the writer's thread
        time.sleep(0.1)
        write(self, event)

    monkeypatch.setattr(RecordWriter, "write", slowly)
    board = TensorBoard(tmp_path)
    board.record({"loss": 1.0}, step=1)
    assert read(tmp_path) == {"loss": [(1, 1.0)]}  # of a run that is still going on

    def crash():
        with board:
            board.record({"loss": 2.0}, step=2)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        crash()
    board.close()
    assert read(tmp_path) == {"loss": [(1, 1.0), (2, 2.0)]}
    with pytest.raises(ValueError, match="closed"):
        board.record({"loss": 3.0}, step=3)


def test_a_given_writer_stays_open(tmp_path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        with TensorBoard(writer) as board:
            board.record({"loss": 1.0}, step=1)
        writer.add_scalar("other", 3.0, 2)
    assert read(tmp_path) == {"loss": [(1, 1.0)], "other": [(2, 3.0)]}
    assert len(list(tmp_path.iterdir())) == 1  # a closed writer would have begun another file


def test_bad_input(tmp_path, monkeypatch):
    with TensorBoard(tmp_path) as board, pytest.raises(ValueError, match="no step"):
        board.record({"loss": 1.0})
    with pytest.raises(TypeError, match="got a int, expected the folder"):
        TensorBoard(3)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "conjopt\[tensorboard\]"'):
        TensorBoard(tmp_path)


def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    loader = list(zip(*(part.split(4) for part in data())))
    exec(
        snippet("integrations.md", "TensorBoard"),
        {"torch": torch, "net": network(), "loader": loader},
    )
    found = read(tmp_path / "run")
    assert [step for step, _ in found["conjopt/step_size"]] == [2, 4, 6]
    assert [step for step, _ in found["train_loss"]] == [2, 4, 6]
