"""What a history shows: thinned series, the digest, sentences, the figure and the page."""

from __future__ import annotations

import html.parser
import json
import math
import os
import re
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conjopt import ConjSGD
from conjopt.report import History, plot, write_html
from conjopt.report import html as page_module
from conjopt.report.digest import Digest, digest, run_file
from conjopt.report.lines import HEADER
from conjopt.report.panels import panels
from conjopt.report.series import Series
from conjopt.report.words import headline, sentences

NASTY = "<script>alert('ü & \"x\"')</script>"


def of(records):
    found = Digest()
    found.add(records)
    return found


def record(step, **values):
    """A record as ConjSGD makes it."""
    return {
        "step": step,
        "limited_by": "edge",
        "loss": 1.0 / step,
        "data_floor": 0.25,
        "excess_loss": 1.0 / step,
        "step_size": 0.1,
        "limits/edge": 0.1,
        "limits/Polyak cap": 0.3,
        "slope": 0.5,
        "raw_slope": 0.7,
        "curvature": 2.0,
        "correlation": 0.4,
        "batch_size": 64,
        "noise_scale": 20.0,
        "gradient_energy": 3.0,
        "lo": 1.0,
        "hi": 9.0,
        "skipped_steps": 0,
        "conditions/C1": "holds",
        "conditions/C2": "unknown",
    } | values


# Series


@given(
    st.lists(st.lists(st.floats(-1e6, 1e6), max_size=60), min_size=1, max_size=12),
    st.integers(3, 40),
)
def test_a_series_keeps_its_extremes_and_its_ends_in_bounded_memory(pieces, points):
    series = Series(points)
    start = 0
    for piece in pieces:
        series.add(np.arange(start, start + len(piece), dtype=float), np.array(piece, dtype=float))
        start += len(piece)
        assert series._held <= 4 * points
    values = [value for piece in pieces for value in piece]
    assert series.count == len(values)
    assert len(series.x) == len(series.y) <= points
    assert (np.diff(series.x) > 0).all()
    for x, y in zip(series.x, series.y):
        assert values[int(x)] == y  # real points, none made up
    if values:
        assert {min(values), max(values)} <= set(series.y)
        assert series.x[-1] == len(values) - 1


def test_thinning_is_even_over_the_run():
    # Each tenth of the run keeps its share of the points, however often it was thinned.
    series = Series(300)
    generator = np.random.default_rng(0)
    for start in range(0, 100_000, 500):
        series.add(np.arange(start, start + 500.0), generator.normal(size=500))
    counts, _ = np.histogram(series.x, bins=10, range=(0, 100_000))
    assert counts.min() >= 15
    assert counts.max() <= 1.3 * counts.min()


@pytest.mark.parametrize("kind", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_counted_and_placed(kind):
    series = Series(30)
    for start in range(0, 10_000, 100):
        y = np.ones(100)
        y[50] = kind
        series.add(np.arange(start, start + 100.0), y)
    assert series.bad == {str(kind): 100}
    places = series.bad_places(str(kind))
    assert (places[0], places[-1]) == (50, 9950)
    assert len(places) <= 200
    assert set(series.y) == {1.0}


# The digest


def test_a_missing_number_is_no_nan():
    found = of([{"step": 1, "a": None, "b": 1.0}, {"step": 2, "b": math.nan}, {"step": 3, "c": 1}])
    (run,) = found.runs
    assert "a" not in run.series
    assert run.series["b"].count == 2
    assert run.series["b"].bad == {"nan": 1}
    assert run.series["c"].x.tolist() == [3]
    assert run.latest == {"step": 3, "a": None, "b": pytest.approx(math.nan, nan_ok=True), "c": 1}


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_a_text_among_numbers_leaves_out_no_more_than_itself(block):
    records = [{"step": i, "test_accuracy": i / 10, "note": "a"} for i in range(10)]
    for place, value in ((0, "pending"), (4, [1]), (9, "failed")):
        records[place]["test_accuracy"] = value
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    (run,) = found.runs
    assert list(run.series) == ["test_accuracy"]
    series = run.series["test_accuracy"]
    assert series.x.tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert series.y.tolist() == [0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8]
    assert (series.count, series.bad) == (7, {})


def test_numbers_that_no_float_can_hold_and_values_of_other_kinds():
    found = of([{"step": 1, "a": 10**400, "b": [1], "c": {}, "run": [1], "limited_by": []}])
    (run,) = found.runs
    assert run.series["a"].bad == {"inf": 1}
    assert list(run.series) == ["a"]
    assert run.name == "[1]"


@pytest.mark.parametrize("block", [1, 1000])
@pytest.mark.parametrize("step", [[1], {"a": 1}, [], "one"])
def test_a_step_that_is_no_number_is_as_none(step, block):
    records = [{"step": 3, "loss": 1.0}, {"step": step, "loss": 2.0}, {"step": step, "loss": 4.0}]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    (run,) = found.runs
    assert run.series["loss"].x.tolist() == [3, 3, 3]
    assert of(records[1:]).runs[0].x == "record"


@pytest.mark.parametrize("block", [1, 3, 1000])
def test_runs_are_told_apart_by_their_labels_and_by_steps_that_go_back(block):
    records = [
        {"model": model, "seed": seed, "step": step, "loss": 1.0}
        for model in ("mlp", "cnn")
        for seed in (0, 1)
        for step in range(5)
    ]
    records += [{"model": "cnn", "seed": 1, "step": step, "loss": 2.0} for step in (2, 3, 9)]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    names = [f"{model}, seed {seed}" for model in ("mlp", "cnn") for seed in (0, 1)]
    assert [run.name for run in found.runs] == [*names, "cnn, seed 1, part 2"]
    assert [run.records for run in found.runs] == [5, 5, 5, 5, 3]
    assert found.runs[-1].series["loss"].x.tolist() == [2, 3, 9]
    assert {run.style for run in found.runs} == {"mlp", "cnn"}
    assert found.latest is found.runs[-1]


@pytest.mark.parametrize("block", [1, 4, 1000])
def test_a_loop_that_counts_from_zero_beside_an_optimizer_that_counts_from_one(block):
    one = [r for step in range(6) for r in (record(step + 1), {"step": step, "test_loss": 2.0})]
    found = Digest()
    records = one + one[4:]  # and goes on from a checkpoint
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    assert [run.records for run in found.runs] == [12, 8]


def in_blocks(records, block):
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    return found


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_numbers_of_an_earlier_step_than_the_record_before_make_no_part(block):
    # As those of a test that takes its time, whether or not each record has all keys.
    for empty in ({}, {"loss": None}):
        records = []
        for step in range(1, 101):
            records.append({"step": step, "loss": 1 / step, "phase": "train"})
            if step % 10 == 0:
                later = {"step": step - 5, "test_accuracy": step / 100, "phase": "test"}
                records.append(later | empty)
        found = in_blocks(records, block)
        (run,) = found.runs
        assert (run.first, run.last, run.records) == (1, 100, 110)
        assert run.series["loss"].x.tolist() == list(range(1, 101))
        assert run.series["test_accuracy"].x.tolist() == list(range(5, 100, 10))
        found = in_blocks(records + records[55:], block)  # and goes on from a checkpoint
        assert [run.records for run in found.runs] == [110, 55]
        assert found.runs[1].series["test_accuracy"].x.tolist() == [55, 65, 75, 85, 95]


@pytest.mark.parametrize("block", [1, 7, 1000])
@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_begin_anew_in_each_epoch_are_counted_on(first, block):
    one = []
    for epoch in range(30):
        for step in range(first, first + 10):
            values = {"test_accuracy": 0.5} if step in (5, 5 - epoch % 3) else {}
            one.append({"epoch": epoch, "step": step, "loss": 1.0} | values)
            one.append(record(epoch * 10 + step + 1 - first))
            one.append({"note": "without a step"})
    found = in_blocks(one, block)
    (run,) = found.runs
    expected = range(first, first + 300)
    loop = run.series["epoch"]
    assert (loop.x.tolist(), loop.y.tolist()) == ([*expected], [i // 10 for i in range(300)])
    assert run.series["step_size"].x.tolist() == list(range(1, 301))
    assert run.records == 900
    found = in_blocks(one + one[600:], block)  # and goes on from a checkpoint
    assert [run.records for run in found.runs] == [900, 300]


def test_steps_in_no_order_do_not_make_a_run_of_each():
    generator = np.random.default_rng(0)
    found = of([{"step": int(step), "loss": 1.0} for step in generator.integers(0, 1000, 5000)])
    assert len(found.runs) == 20
    assert sum(run.records for run in found.runs) == 5000


def test_records_without_steps_are_drawn_where_they_are():
    found = of([{"loss": 1.0}, {"loss": 2.0}])
    assert found.runs[0].series["loss"].x.tolist() == [0, 1]
    assert found.runs[0].x == "record"
    found = of([{"step": 5, "loss": 1.0}, {"loss": 2.0}, {"step": math.nan, "loss": 3.0}])
    assert found.runs[0].series["loss"].x.tolist() == [5, 5, 5]


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_epochs_stand_for_steps_where_there_are_none(block):
    records = [{"epoch": epoch, "loss": 1.0} for epoch in (0.5, 10, 20)] + [{"loss": 3.0}]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    (run,) = found.runs
    assert (run.x, run.series["loss"].x.tolist()) == ("epoch", [0.5, 10, 20, 20])
    assert sentences(found)[:2] == ["4 records, epochs 0.5 to 20.", "Loss 3 at epoch 20."]
    found.add(records[1:3])
    assert [run.series["loss"].x.tolist() for run in found.runs] == [[0.5, 10, 20, 20], [10, 20]]
    found = of([{"step": 100, "epoch": 1, "loss": 1.0}, {"epoch": 2, "loss": 2.0}])
    assert (found.runs[0].x, found.runs[0].series["loss"].x.tolist()) == ("step", [100, 100])


@pytest.mark.parametrize("block", [1, 1000])
def test_limits_and_conditions_are_counted_exactly(block):
    states = ["unknown", "holds", "fails", "holds", "fails", "fails"]
    limits = ["nothing measured", "edge", "edge", "trust region", "edge", "edge"]
    records = [
        record(i, limited_by=limit, **{"conditions/C1": state})
        for i, (limit, state) in enumerate(zip(limits, states), start=1)
    ]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    (run,) = found.runs
    assert run.limits == {"edge": 4, "trust region": 1}
    assert run.series["step_size"].code.tolist() == [-1, 0, 0, 1, 0, 0]
    condition = run.conditions["conditions/C1"]
    assert (condition.state, condition.since, condition.failed) == ("fails", 5, 3)
    assert run.conditions["conditions/C2"].since == 1


def test_series_beyond_a_number_are_left_out_and_told():
    found = of([{"step": 1} | {f"k{i}": 1.0 for i in range(1500)}])
    assert len(found.runs[0].series) == 1000
    assert "500 series were left out" in " ".join(sentences(found))
    found = of([{"run": i, "loss": 1.0} for i in range(5000)])
    assert sum(len(run.series) for run in found.runs) <= 1000


@pytest.mark.parametrize("block", [1, 100])
def test_what_is_left_out_is_counted_once_and_by_its_name(block):
    records = [{"run": i, "step": step, "loss": 1.0} for step in range(3) for i in range(300)]
    told = sentences(in_blocks(records, block))
    assert told[0] == "900 records of more than 201 runs."
    assert told[-1] == "99 runs were left out: there are too many of them."
    told = sentences(in_blocks(records[:202], block))
    assert told[-1] == "1 run was left out: there are too many of them."
    many = [{"step": step} | {f"k{i}": 1.0 for i in range(1001)} for step in range(3)]
    assert "1 series was left out: there are too many of them." in sentences(in_blocks(many, block))
    many = [{"run": i, "loss": 1.0} for i in range(12_000)]
    assert "10,000 or more runs were left out" in sentences(in_blocks(many, 1000))[-1]


@pytest.mark.slow
def test_a_million_records_are_read_in_bounded_memory(tmp_path):
    path = tmp_path / "history.jsonl"
    with path.open("wb") as file:
        file.write(HEADER)
        for step in range(1_000_000):
            loss = 100.0 if step == 765_432 else 1.0
            file.write(b'{"step": %d, "loss": %r, "step_size": 0.5}\n' % (step, loss))
    kept = Digest.add

    def add(self, records):
        assert len(records) < 100_000
        kept(self, records)
        assert all(s._held <= 8000 for run in self.runs for s in run.series.values())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Digest, "add", add)
        figure = plot(path)
        write_html(path, tmp_path / "report.html")
    (line,) = figure.axes[0].lines
    assert len(line.get_xdata()) <= 2000
    assert 765_432 in line.get_xdata()
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page) < 200_000
    assert "1,000,000 records" in page
    assert "between 1 and 100" in page


def test_of_a_large_file_some_records_are_read_and_it_says_so(tmp_path, monkeypatch):
    path = written(tmp_path / "history.jsonl", *({"step": i, "loss": 1.0} for i in range(1000)))
    size = path.stat().st_size
    monkeypatch.setattr("conjopt.report.lines.LARGE", size // 4)
    monkeypatch.setattr("conjopt.report.lines.BLOCK", 4096)
    found = digest(path)
    assert found.every == 5
    assert 200 <= found.records <= 220
    (run,) = found.runs
    assert (run.first, run.last) == (0, 999)
    assert run.series["loss"].x[:3].tolist() == [0, 5, 10]
    assert "one in 5 of its records was read" in " ".join(sentences(found))
    assert len(History.read(path)) == 1000
    lines = path.read_bytes().split(b"\n")
    lines[6] = b"[]".ljust(len(lines[6]))
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(ValueError, match="line 7: expected one JSON object"):
        digest(path)


def test_records_one_by_one_are_taken_in_blocks(monkeypatch):
    sizes = []
    monkeypatch.setattr(Digest, "add", lambda self, records: sizes.append(len(records)))
    digest({"step": step} for step in range(10_000))
    assert sum(sizes) == 10_000
    assert max(sizes) < 5000


# Files


def written(path, *records):
    with History(path) as history:
        for values in records:
            history.record(**values)
    return path


def test_a_folder_leads_to_its_history(tmp_path):
    with pytest.raises(ValueError, match="holds no history"):
        run_file(tmp_path)
    one = written(tmp_path / "my run ü.jsonl", {"step": 1})
    assert run_file(tmp_path) == run_file(one) == one
    written(tmp_path / "other.jsonl", {"step": 1})
    with pytest.raises(ValueError, match=r"2 files.*my run ü.jsonl, other.jsonl"):
        run_file(tmp_path)
    for name in ("metrics.jsonl", "history.jsonl"):
        assert run_file(written(tmp_path / name, {"step": 1})).name == name
    with pytest.raises(FileNotFoundError):
        run_file(tmp_path / "nowhere")


def test_a_file_cut_in_the_middle_of_a_line_is_read_up_to_it_and_this_is_told(tmp_path):
    path = written(tmp_path / "history.jsonl", record(1), record(2))
    path.write_bytes(path.read_bytes()[:-9])
    found = digest(path)
    assert found.records == 1
    assert found.cut
    write_html(path, tmp_path / "page.html")
    assert "ends in the middle of a line" in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "middle" not in " ".join(sentences(of([record(1)])))


@pytest.mark.parametrize("content", [b"", HEADER[:20], HEADER], ids=["empty", "cut", "header"])
def test_a_history_without_records_says_so(tmp_path, content):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    write_html(path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No records yet." in page
    assert "Nothing to draw" in page
    (axes,) = plot(path).axes
    assert axes.texts[0].get_text() == "The history has no records yet."


def test_records_without_numbers_say_so():
    (axes,) = plot([{"note": "a"}]).axes
    assert axes.texts[0].get_text() == "The 1 records hold no numbers to draw."


@pytest.mark.parametrize("use", [digest, plot, lambda path: write_html(path, path.with_name("p"))])
@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"schema": "conjopt.history", "version": 7}\n', "version 7"),
        (bytes(range(256)) * 40, "is no history"),
        (b"\0" * 3_000_000, "is no history"),
        (HEADER + b'{"step": 1}\n{"step"\n{"step": 3}\n', "line 3"),
        (HEADER + b'{"step": 1}\n' + b"x" * 20_000_000, "longer than"),
        (HEADER + b"[" * 100_000 + b"\n", "line 2"),
    ],
    ids=["version", "binary", "zeros", "damaged", "endless", "deep"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, use, content, match):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=match):
        use(path)
    assert [p.name for p in tmp_path.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize("use", [digest, plot, lambda some: write_html(some, "unused.html")])
def test_what_is_no_history_says_what_is_expected(tmp_path, use, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in (None, 3, b"history.jsonl"):
        with pytest.raises(TypeError, match=rf"got a {type(other).__name__} as history, expected"):
            use(other)
    with pytest.raises(TypeError, match=r"got a dict as history.*a list of records.*list of one"):
        use({"step": 1})
    for one in (tmp_path, "history.jsonl", History()):
        with pytest.raises(TypeError, match=rf"a {type(one).__name__} in it.*give one history"):
            use([one])
    with pytest.raises(TypeError, match=r"a tuple in it, expected dicts whose keys are strings$"):
        use([{"step": 1}, ("step", 2)])
    with pytest.raises(TypeError, match="with the key 1 in it, expected dicts whose keys are str"):
        use([{1: 2.0}])
    with pytest.raises(ValueError, match="got an empty path; give a history"):
        use("")
    assert not any(tmp_path.iterdir())


def test_a_page_without_a_file_is_refused():
    with pytest.raises(TypeError, match="got a NoneType as file, expected the path of the page"):
        write_html([record(1)], None)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="no regular file"):
        digest(tmp_path / "pipe")


# Sentences


def test_the_sentences_of_a_run():
    records = [record(i, limited_by="edge" if i < 4 else "trust region") for i in range(1, 6)]
    records[3] |= {"conditions/C1": "fails", "loss": math.nan}
    records[4] |= {"conditions/C1": "fails", "skipped_steps": 2, "limits/edge": math.inf}
    records.append({"step": 5, "test_loss": 0.5})  # what a loop records beside it hides nothing
    assert sentences(of(records)) == [
        "6 records, steps 1 to 5.",
        "Loss 0.2 at step 5, 0.05 below the data floor.",
        "2 steps were skipped: something was not finite.",
        "The step size is 0.1, set by trust region. "
        "Over the records: edge 60 %, trust region 40 %.",
        "C1 fails since step 4.",
        "Loss of the batch was NaN in 1 record, first at step 4.",
    ]


def test_a_share_is_not_told_as_none_or_all_unless_it_is():
    limits = ["edge"] * 498 + ["trust region", "Polyak cap"]
    told = sentences(of([record(i, limited_by=by) for i, by in enumerate(limits, start=1)]))
    shares = "edge over 99 %, trust region under 1 %, Polyak cap under 1 %."
    assert told[2].endswith(f"Over the records: {shares}")


def test_a_loss_is_told_at_the_step_that_it_is_of():
    found = of([{"step": 1, "loss": 0.5}, {"step": 1000, "test_accuracy": 0.9}])
    assert sentences(found)[1] == "Loss 0.5 at step 1."
    found = of([{"step": 1, "loss": math.nan}, {"step": 2, "loss": math.inf}])
    assert sentences(found)[1] == "Loss is infinite at step 2, and was never finite."
    assert headline(found.runs[0]) == "loss infinite, step 2"


@pytest.mark.parametrize("block", [1, 2, 1000])
def test_steps_that_were_skipped_since_the_last_one_that_was_taken(block):
    skip = {"step": 4, "limited_by": None}
    records = [
        record(3, skipped_steps=1),
        record(4, skipped_steps=1),
        {"step": 4, "test_loss": 2.0},
        skip | {"skipped_steps": 2, "loss": math.nan},
        skip | {"skipped_steps": 4, "loss": math.nan},
    ]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    (run,) = found.runs
    assert (run.skipped, run.skipped_since, run.taken) == (4, 3, (4, 1))
    assert run.limits == {"edge": 2}
    told = sentences(found)
    assert "4 steps were skipped, 3 of them since step 4: something was not finite." in told
    found.add([record(5, skipped_steps=4)])
    assert run.skipped_since == 0
    assert "4 steps were skipped: something was not finite." in sentences(found)


def test_a_floor_that_says_nothing_is_not_told_of():
    for floor in (0.0, math.nan, 10**400):
        assert sentences(of([record(2, data_floor=floor)]))[1] == "Loss 0.5 at step 2."


def test_a_condition_that_holds_again_has_failed():
    states = ["fails", "fails", "holds", "holds"]
    found = of([record(i, **{"conditions/C1": s}) for i, s in enumerate(states, start=1)])
    told = sentences(found)
    assert "C1 failed in 2 records, and holds since step 3." in told
    assert "No condition of Thm 3.1 fails now; unknown: C2." in told


def test_the_sentences_of_several_runs():
    found = of([{"run": name, "step": 3, "loss": 0.5} for name in ("a", "b")])
    assert sentences(found) == [
        "2 records of 2 runs.",
        "a: loss 0.5, step 3.",
        "b: loss 0.5, step 3.",
    ]


# The figure


def test_every_panel_of_a_run_is_drawn():
    records = [record(i, lower=0.1, upper=2.0, risk=1.0, mine=i) for i in range(1, 4)]
    figure = plot(records, title="$x$ run")
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "loss",
        "step size",
        "slope",
        "curvature",
        "gradient correlation",
        "samples",
        "loss between its bounds",
        "eigenvalues",
        "gradient energy",
        "conditions",
        "mine",
    ]
    _, names = figure.axes[1].get_legend_handles_labels()
    assert names == ["edge", "Polyak cap", "step size", "set by edge"]
    figure.canvas.draw()


def test_a_missing_matplotlib_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "conjopt\[plot\]"'):
        plot([record(1)])


@given(
    st.lists(
        st.dictionaries(
            st.sampled_from(["step", "loss", "step_size", "limited_by", "run", "mine", NASTY])
            | st.sampled_from(["limits/edge", "conditions/C1", "skipped_steps", "conditions/x"]),
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        ),
        max_size=8,
    )
)
def test_any_records_make_a_page(records):
    page = page_module.page(of(records), "any")
    checked(page)


def test_any_magnitude_is_drawn():
    usual = ([0.0, 0.0], [-3.0, -3.0], [7.0])
    least = ([1e-320] * 2, [-5e-324], [-5e-324, 1e-323, 0.0])
    for values in ([1e308, -1e308], [5e-324, 1e308], *least, *usual):
        records = [{"step": i, "loss": v, "mine": v} for i, v in enumerate(values)]
        page = checked(page_module.page(of(records), "any"))
        assert "nan" not in "".join(re.findall(r' d="([^"]*)"', page))
        plot(records).canvas.draw()


# The page


def checked(page):
    """The page, if it is well-formed, holds nothing that would be fetched, and no script."""
    fetching = re.compile(r"""<(script|img|iframe|object|embed)|src=|url\(|@import|https?:""")
    assert not fetching.search(page)
    Tags().check(page)
    for svg in re.findall(r"<svg.*?</svg>", page, flags=re.S):
        ElementTree.fromstring(svg)
    ids = re.findall(r' id="([^"]*)"', page)
    assert len(ids) == len(set(ids))
    for labels in re.findall(r'aria-labelledby="([^"]*)"', page):
        assert set(labels.split()) <= set(ids)
    return page


class Tags(html.parser.HTMLParser):
    """Checks that tags are closed in order."""

    def check(self, page):
        self.open = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_of_a_run(tmp_path):
    path = tmp_path / "my run ü" / "history.jsonl"
    written(path, *(record(i) for i in range(1, 30)))
    write_html(path, path.with_name("report.html"))
    page = checked(path.with_name("report.html").read_text(encoding="utf-8"))
    assert "<title>my run ü</title>" in page
    assert re.findall(r"<h2[^>]*>([^<]*)", page) == [
        "Loss and data floor",
        "Step size and what limits it",
        "Slope and curvature",
        "Gradient correlation and batch size",
        "The sandwich: energy, lo and hi",
        "Conditions of convergence",
        "The last values",
    ]
    for needed in ('lang="en"', 'name="viewport"', "prefers-color-scheme: dark", "Thm 3.6"):
        assert needed in page
    drawn = re.findall(r"<svg viewBox.*?</svg>", page, flags=re.S)
    assert all("<title" in svg and "<desc" in svg for svg in drawn)
    write_html(path, path.with_name("report.html"), title="another")
    assert "<title>another</title>" in path.with_name("report.html").read_text(encoding="utf-8")


def test_text_of_records_is_text_on_the_page():
    records = [
        {"step": 1, "loss": 0.5, NASTY: 1.5, "limited_by": NASTY, "step_size": 0.1, "run": NASTY},
        {"step": 2, "loss": 0.5, NASTY: 2.5, f"limits/{NASTY}": 0.1, f"conditions/{NASTY}": NASTY},
        {"step": 3, "note": "\x1b[31m\0\ud800"},
    ]
    apart = [{"run": NASTY, "loss": 0.0}, {"run": "b", "loss": 1.0}, {"run": "b", "loss": 2.0}]
    assert "is 0 throughout" in page_module.page(of(apart), "in a note as well")
    for some in (records, [r | {"run": i} for i, r in enumerate(records)], apart):
        page = checked(page_module.page(of(some), NASTY))
        assert "<script" not in page
        assert "&lt;script&gt;alert" in page
        assert not re.search("[\x00-\x08\x1b\ud800]", page)


def test_half_a_surrogate_pair_does_not_keep_a_page_from_being_written(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_bytes(
        HEADER + json.dumps({"step": 1, "loss": 1.0, "run": "\ud800"}).encode() + b"\n"
    )
    write_html(path, tmp_path / "page.html", title="\udfff")
    assert (tmp_path / "page.html").read_bytes()


def test_runs_of_one_history_share_charts_and_a_legend():
    records = [
        {"model": model, "seed": seed, "step": step, "loss": 1.0 + seed, "step_size": 0.1}
        for model in ("mlp", "cnn")
        for seed in (0, 1, 2)
        for step in range(3)
    ]
    found = of(records)
    charts = [chart for panel in panels(found) for chart in panel.charts]
    assert [chart.title for chart in charts] == ["loss of the batch", "step size"]
    assert [line.name for line in charts[0].lines] == [run.name for run in found.runs]
    page = checked(page_module.page(found, "runs"))
    legend = re.search(r'<ul class="legend">(.*?)</ul>', page, flags=re.S)[1]
    assert re.findall(r"</svg>([^<]*)", legend) == ["mlp", "cnn"]
    assert page.count("<tr>") == 7


@pytest.mark.parametrize("block", [1, 1000])
def test_a_run_that_goes_on_from_a_checkpoint_keeps_the_marks_of_its_limits(block):
    limits = ["edge", "trust region", "trust region", "edge", "Polyak cap"]
    records = [
        record(step, limited_by=by, step_size=0.1 * step)
        for step, by in zip((1, 2, 3, 2, 3), limits)
    ]
    found = Digest()
    for start in range(0, len(records), block):
        found.add(records[start : start + block])
    assert [run.name for run in found.runs] == ["part 1", "part 2"]
    assert found.runs[1].limits == {"edge": 1, "trust region": 0, "Polyak cap": 1}
    assert found.runs[1].series["step_size"].code.tolist() == [0, 2]
    assert sentences(found)[0] == "5 records of one run in 2 parts, as its steps go back."
    (step,) = [panel for panel in panels(found) if panel.name == "step"]
    assert "Marks show which limit set the step" in step.text
    page = checked(page_module.page(found, "run"))
    legend = page.split('id="step"')[1].split("</section>")[0].split('<ul class="legend">')[1]
    names = re.findall(r"</svg>([^<]*)</li>", legend)
    assert names == [
        "edge", "Polyak cap", "part 1", "part 2",
        "set by edge", "set by trust region", "set by Polyak cap",
    ]  # fmt: skip
    drawn = page.split('id="step"')[1].split('<ul class="legend">')[0]
    lines = re.findall(r'<path class="(l part d\d)" d="([^"]*)"/>', drawn)
    assert [(style, line.count("M")) for style, line in lines] == [
        ("l part d0", 1), ("l part d1", 1)
    ]  # fmt: skip
    assert all(f'<path class="{style}" d="M1 6H33"/>' in legend for style, _ in lines)
    axes = {axes.get_title(loc="left"): axes for axes in plot(records).axes}["step size"]
    assert [n for n in axes.get_legend_handles_labels()[1] if n.startswith("set")] == [
        "set by edge", "set by trust region", "set by Polyak cap"
    ]  # fmt: skip


def test_a_floor_of_zero_is_told_and_not_drawn():
    page = page_module.page(of([record(i, data_floor=0.0) for i in range(1, 5)]), "run")
    assert "data floor is 0 throughout: below a logarithmic axis" in page


def test_a_line_does_not_run_on_over_what_is_no_number():
    losses = [1.0, 2.0, math.nan, 3.0, 4.0]
    records = [{"step": i, "loss": v} for i, v in enumerate(losses)]
    (axes,) = plot(records).axes
    assert axes.lines[0].get_ydata().tolist() == pytest.approx(losses, nan_ok=True)
    page = page_module.page(of(records), "run")
    (line,) = re.findall(r'<path class="l s0 d0" d="([^"]*)"/><circle', page)
    assert line.count("M") == 2
    assert "not a number: loss of the batch in 1 record<" in page


def test_a_number_between_two_that_are_none_has_a_dot():
    losses = [1.0] * 50 + [math.nan, 7.0, math.nan] + [1.0] * 50 + [math.nan, 5.0]
    records = [{"step": i, "loss": v} for i, v in enumerate(losses)]
    (axes,) = plot(records).axes
    dots = next(line for line in axes.lines if line.get_marker() == ".")
    assert (dots.get_xdata().tolist(), dots.get_ydata().tolist()) == ([51, 104], [7, 5])
    page = page_module.page(of(records), "run").split('id="loss"')[1].split("</section>")[0]
    assert len(re.findall("<circle", page)) == 2


def test_an_axis_without_a_number_has_no_ticks():
    records = [{"step": i, "loss": math.nan} for i in range(3)]
    (axes,) = plot(records).axes
    assert axes.get_yticks().tolist() == []
    page = checked(page_module.page(of(records), "run"))
    assert 'text-anchor="end">' in page  # the name of the other axis
    assert 'class="grid"' not in page
    assert "not a number: loss of the batch in 3 records" in page


def test_short_failures_of_a_condition_stay_to_be_seen():
    records = [
        {"step": i, "conditions/C1": "fails" if i == 4321 else "holds"} for i in range(100_000)
    ]
    page = page_module.page(of(records), "run")
    (width,) = re.findall(r'<rect class="fails" x="[^"]*" y="[^"]*" width="([^"]*)"', page)[:1]
    assert float(width) >= 2


def test_the_page_does_not_take_the_place_of_the_history(tmp_path):
    path = written(tmp_path / "history.jsonl", record(1))
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is the history itself"):
        write_html(path, path)
    assert path.read_bytes() == before


def test_a_page_whose_folder_is_missing_says_what_to_do(tmp_path):
    file = tmp_path / "nodir" / "x.html"
    with pytest.raises(FileNotFoundError) as caught:
        write_html([record(1)], file)
    assert caught.value.filename == str(file)
    assert f"make the folder {file.parent} first" in str(caught.value)
    with pytest.raises(IsADirectoryError, match=r"give a file, such as report\.html in it"):
        write_html([record(1)], tmp_path)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_the_page_appears_whole_or_not_at_all(tmp_path, monkeypatch, error):
    path = written(tmp_path / "history.jsonl", record(1))
    page = tmp_path / "page.html"
    page.write_text("the one before")

    def fail(*arguments):
        raise error

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(type(error)):
        write_html(path, page)
    assert page.read_text() == "the one before"
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl", "page.html"}


def test_a_real_run_fills_every_panel(tmp_path):
    torch.manual_seed(0)
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss(label_smoothing=0.1)
    path = tmp_path / "history.jsonl"
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, history=path, batch_rule="correlation"
    )
    x = torch.randn(32, 4)
    for _ in range(30):
        optimizer.zero_grad()
        criterion(model(x), x[:, :3].argmax(1)).backward()
        optimizer.step()
    names = [panel.name for panel in panels(digest(path))]
    assert names == [
        "loss", "step", "curvature", "correlation", "sandwich", "conditions", "other"
    ]  # fmt: skip
