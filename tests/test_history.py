from __future__ import annotations

import errno
import json
import math
import os
from io import FileIO

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conjopt.report import History, history

NON_FINITE_NAMES = ("nan", "inf", "-inf")
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text().filter(lambda text: text not in NON_FINITE_NAMES),
)


def same(a: object, b: object) -> bool:
    """Equal and of one type; NaN equals NaN, and zeros keep their signs."""
    if isinstance(a, float) and isinstance(b, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    return type(a) is type(b) and a == b


@given(records=st.lists(st.dictionaries(st.text(), values)))
def test_records_come_back_as_they_were(tmp_path_factory, records):
    path = tmp_path_factory.mktemp("history") / "metrics.jsonl"
    with History(path) as run:
        for record in records:
            run.record(**record)
    for found in (History.read(path), run.records):
        assert len(found) == len(records)
        for record, original in zip(found, records, strict=True):
            assert record.keys() == original.keys()
            assert all(same(record[key], original[key]) for key in record)


def test_any_string_is_a_key():
    run = History()
    run.record(**{"self": 1, "values": 2, "": 3})
    assert run.records == [{"self": 1, "values": 2, "": 3}]


def test_every_line_is_strict_json(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with History(path) as run:
        run.record(a=math.nan, b=math.inf, c=-math.inf, d=1e-300)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    lines = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert lines == [
        {"schema": "conjopt.history", "version": 1},
        {"a": "nan", "b": "inf", "c": "-inf", "d": 1e-300},
    ]


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (torch.tensor(0.5), 0.5),
        (torch.tensor(3), 3),
        (torch.tensor(True), True),
        (np.float32(0.25), 0.25),
        (np.array(7), 7),
        (np.bool_(False), False),
    ],
)
def test_scalars_of_torch_and_numpy_become_pythons(value, plain):
    run = History()
    run.record(value=value)
    assert same(run.records[0]["value"], plain)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (torch.zeros(2), TypeError, r"'loss'.*Tensor of shape \(2,\)"),
        ([1.0], TypeError, "got a list"),
        (1j, TypeError, "got a complex"),
        (torch.tensor(1j), TypeError, "got a complex"),
        ("nan", ValueError, r"float\('nan'\)"),
    ],
)
def test_other_values_are_refused_and_nothing_is_recorded(tmp_path, value, error, match):
    path = tmp_path / "metrics.jsonl"
    with History(path) as run:
        with pytest.raises(error, match=match):
            run.record(step=1, loss=value)
        run.record(step=2)
    assert run.records == History.read(path) == [{"step": 2}]


def test_a_file_cut_anywhere_is_read_up_to_its_last_whole_record_and_appended_to(tmp_path):
    path, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    records = [{"step": 1, "note": "é\n"}, {"step": 2, "loss": math.inf}, {"step": 3}]
    with History(path) as run:
        for record in records:
            run.record(**record)
    content = path.read_bytes()
    ends = [len(line) for line in content.splitlines(keepends=True)]
    for size in range(len(content) + 1):
        cut.write_bytes(content[:size])
        # A record is whole once its last brace is there.
        whole = sum(size >= sum(ends[: number + 2]) - 1 for number in range(len(records)))
        assert History.read(cut) == records[:whole]
        with History(cut) as run:
            run.record(step=4)
        assert History.read(cut) == [*records[:whole], {"step": 4}]


def test_an_existing_history_is_appended_to(tmp_path):
    path = tmp_path / "folder" / "metrics.jsonl"
    for step in (1, 2):
        with History(path) as run:
            run.record(step=step)
        assert run.records == [{"step": step}]
    assert History.read(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (
            b'{"schema": "conjopt.history", "version": 2}\n{"step": 1}\n',
            "version 2.*knows version 1",
        ),
        (b'{"schema": "other", "version": 1}\n', "is no history"),
        (b'{"step": 1}\n', "is no history"),
        (b"\xff\xfe binary", "is no history"),
        (b"[]\n", "is no history"),
    ],
)
def test_a_file_of_another_kind_is_refused_and_left_alone(tmp_path, content, match):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(content)
    for use in (History, History.read):
        with pytest.raises(ValueError, match=match):
            use(path)
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with History(path) as run:
        run.record(step=1)
    path.write_bytes(path.read_bytes() + b'{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 3"):
        History.read(path)


@pytest.mark.parametrize("room", [0, 1, 7])
def test_a_failed_write_leaves_whole_records(tmp_path, monkeypatch, room):
    path = tmp_path / "metrics.jsonl"
    left: list[int] = []

    class Disk(FileIO):
        def write(self, data):
            if not left:
                return super().write(data)
            if not left[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            written = super().write(data[: left[0]])
            left[0] -= written
            return written

    monkeypatch.setattr(history, "FileIO", Disk)
    with History(path) as run:
        run.record(step=1)
        left.append(room)
        with pytest.raises(OSError, match="No space left"):
            run.record(step=2)
        assert run.records == History.read(path) == [{"step": 1}]
        left.clear()
        run.record(step=3)
    assert path.read_bytes().splitlines()[1:] == [b'{"step": 1}', b'{"step": 3}']


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_an_error_at_opening():
    with pytest.raises(OSError, match="No space left"):
        History("/dev/full")


def test_records_given_out_are_copies():
    run = History()
    run.record(step=1)
    run.records[0]["step"] = 2
    assert run.records == [{"step": 1}]


def test_a_closed_history_refuses_records(tmp_path):
    with History(tmp_path / "metrics.jsonl") as run:
        pass
    with pytest.raises(ValueError, match="closed"):
        run.record(step=1)
