"""The command ``conjopt report``: what it prints and writes, how it follows a run, how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conjopt.cli import main
from conjopt.report import History, command
from conjopt.report.lines import HEADER

ROOT = Path(__file__).parents[1]


def write(path, steps, **values):
    with History(path) as history:
        for step in steps:
            history.record(step=step, loss=1 / step, **values)
    return path


@pytest.mark.parametrize("name", ["history.jsonl", "metrics.jsonl", "my run ü.jsonl"])
def test_a_run_is_summed_up_and_nothing_is_written(name, tmp_path, capsys):
    path = write(tmp_path / "a folder ü" / name, range(1, 5), step_size=0.5, limited_by="edge")
    for run in (path, path.parent):
        assert main(["report", str(run)]) == 0
        assert capsys.readouterr().out.splitlines() == [
            "4 records, steps 1 to 4.",
            "Loss 0.25 at step 4.",
            "The step size is 0.5, set by edge. Over the records: edge 100 %.",
        ]
    assert list(tmp_path.rglob("*")) == [path.parent, path]


def test_the_page_is_written_and_replaced(tmp_path, capsys):
    path = write(tmp_path / "history.jsonl", [1])
    page = tmp_path / ("page ü" + "x" * 240 + ".html")  # as long as a name may be
    page.write_text("the one before")
    assert main(["report", str(path), "--html", str(page)]) == 0
    assert f"The page is {page}." in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl", page.name}


def test_orders_to_the_terminal_are_not_passed_on(tmp_path, capsys):
    write(tmp_path / "history.jsonl", [1], run="\x1b[2J\x07 red\nnext line \ud800")
    assert main(["report", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "red" in out
    assert not {"\x1b", "\x07", "\ud800"} & set(out)
    assert out.count("\n") == 2


def test_a_number_and_its_percent_sign_stay_on_one_line(tmp_path, capsys):
    for length in range(1, 40):
        path = tmp_path / f"{length}.jsonl"
        write(path, [1], step_size=0.5, limited_by="x" * length)
        write(path, [2, 3], step_size=0.5, limited_by="edge")
        assert main(["report", str(path)]) == 0
        out = capsys.readouterr().out
        assert "67 %" in out
        assert "33 %" in out
        assert max(map(len, out.splitlines())) <= 100
        assert "\N{NO-BREAK SPACE}" not in out


# Refusals


def refused(arguments, capsys, status=2):
    assert main(["report", *map(str, arguments)]) == status
    output = capsys.readouterr()
    assert output.err.count("\n") == 1
    assert output.err.startswith("conjopt: error: ")
    return output.err


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b'{"schema": "conjopt.history", "version": 2}\n', "is a history of version 2"),
        (b"\x7fELF\0\0\n\0", "is no history"),
        (HEADER + b"{\n{}\n", "line 2: expected one JSON object"),
    ],
)
def test_a_file_of_another_kind_is_one_line(content, match, tmp_path, capsys):
    path = tmp_path / "history.jsonl"
    path.write_bytes(content)
    assert match in refused([path, "--html", tmp_path / "page.html"], capsys)
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert "nowhere: No such file" in refused([tmp_path / "nowhere"], capsys)
    assert "holds no history" in refused([tmp_path], capsys)
    assert "no regular file" in refused(["/dev/null"], capsys)
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "no regular file" in refused([tmp_path], capsys)
    write(tmp_path / "file", [1])
    assert "Not a directory" in refused([tmp_path / "file" / "below"], capsys)
    assert main(["report", ""]) == 2
    assert main(["report", str(tmp_path), "--html", ""]) == 2
    assert main(["report"]) == 2
    assert "required: RUN" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", HEADER], ids=["empty", "header"])
def test_a_run_that_has_not_begun(content, tmp_path, capsys):
    (tmp_path / "history.jsonl").write_bytes(content)
    assert main(["report", str(tmp_path), "--html", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert out.startswith("No records yet.\n")
    assert "No record holds a number yet. An optimizer records by" in out
    assert "Nothing to draw" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_history_without_numbers_says_how_to_record_some(tmp_path, capsys):
    path = write(tmp_path / "history.jsonl", [])
    with path.open("ab") as file:
        file.write(b'{"note": "a"}\n')
    assert main(["report", str(path)]) == 0
    assert "history.record(step=..., loss=...)" in capsys.readouterr().out.replace("\n", " ")
    with path.open("ab") as file:
        file.write(b'{"step": 1, "loss": 1}\n')
    assert main(["report", str(path)]) == 0
    assert "history.record" not in capsys.readouterr().out


def test_a_history_that_cannot_be_read_is_one_line(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "history.jsonl", [1])

    def refuse(self, *arguments):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # a root may open everything
    assert "history.jsonl: Permission denied" in refused([path], capsys)


def test_a_page_that_cannot_be_written_is_one_line_and_no_half_of_it(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "history.jsonl", [1])
    (tmp_path / "folder").mkdir()
    for page, why in (
        (path / "below.html", "Not a directory"),
        (tmp_path / "nowhere" / "page.html", "No such file"),
        (tmp_path / "folder", "Is a directory"),
        (Path("."), "Is a directory"),
        (Path(".."), "Is a directory"),
    ):
        error = refused([path, "--html", page], capsys, status=1)
        assert f"{page}: {why}" in error
    write_bytes = Path.write_bytes

    def full(self, content):
        write_bytes(self, content[:100])
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", full)
    page = tmp_path / "page.html"
    assert f"{page}: No space left" in refused([path, "--html", page], capsys, status=1)
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl", "folder"}


def test_the_page_does_not_take_the_place_of_the_history(tmp_path, capsys):
    path = write(tmp_path / "history.jsonl", [1])
    before = path.read_bytes()
    assert "is the history itself" in refused([tmp_path, "--html", path], capsys)
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_device_is_written_to_and_not_replaced(tmp_path, capsys):
    path = write(tmp_path / "history.jsonl", [1])
    assert "No space left" in refused([path, "--html", "/dev/full"], capsys, status=1)
    assert not os.path.isfile("/dev/full")


# Following


@pytest.fixture
def follow(monkeypatch, capsys):
    """Follow a run through some moments, each a function, and then interrupt."""

    def follow(path, *moments, arguments=()):
        left = iter(moments)

        def sleep(seconds):
            assert seconds == command.POLL
            told.append(capsys.readouterr().out.splitlines())
            if (moment := next(left, None)) is None:
                raise KeyboardInterrupt
            moment()

        told: list[list[str]] = []
        monkeypatch.setattr(command.time, "sleep", sleep)
        status = main(["report", str(path), "--follow", *arguments])
        return status, told

    return follow


def test_a_run_is_followed_until_it_is_interrupted(follow, tmp_path):
    path, page = tmp_path / "history.jsonl", tmp_path / "page.html"
    write(path, [1])
    pages = []

    def grow(content):
        def act():
            pages.append(page.read_text(encoding="utf-8"))
            with path.open("ab") as file:
                file.write(content)

        return act

    status, told = follow(
        path,
        grow(b'{"step": 2, "loss": 0.5}\n{"step": 3, "loss": 0.25}\n{"step": 4, '),
        grow(b'"lo'),
        grow(b'ss": 0.125}\n'),
        grow(b""),
        arguments=["--html", str(page)],
    )
    assert status == 130
    assert told == [
        [
            "1 record, steps 1 to 1.",
            "Loss 1 at step 1.",
            f"The page is {page}.",
            f"Following {path}; Ctrl-C ends it.",
        ],
        ["loss 0.25, step 3; 2 new records"],
        [],
        ["loss 0.125, step 4; 1 new record"],
        [],
    ]
    assert "1 record, steps 1 to 1" in pages[0]
    assert "3 records, steps 1 to 3" in pages[1]
    assert "4 records, steps 1 to 4" in pages[3]
    assert "middle of a line" not in pages[1]  # a line that is being written is no crash
    assert {p.name for p in tmp_path.iterdir()} == {"history.jsonl", "page.html"}


def test_following_tells_of_steps_that_are_skipped(follow, tmp_path):
    path = tmp_path / "history.jsonl"
    write(path, [1], limited_by="edge", skipped_steps=0)

    def skip(count):
        def act():
            with path.open("ab") as file:
                file.write(
                    b'{"step": 1, "limited_by": null, "skipped_steps": %d, "loss": "nan"}\n' % count
                )

        return act

    _, told = follow(path, skip(10), skip(25))
    ill = "loss NaN, last finite 1 at step 1, step 1; 1 new record"
    assert told[1:] == [
        [f"10 steps skipped (10 new), {ill}"],
        [f"25 steps skipped (15 new), {ill}"],
    ]


def test_a_file_that_is_cut_or_replaced_is_read_anew(follow, tmp_path):
    path, other = write(tmp_path / "history.jsonl", range(1, 9)), tmp_path / "other.jsonl"

    def cut():
        path.write_bytes(HEADER + b'{"step": 1, "loss": 3.0}\n')

    def replace():
        write(other, [7], note="x" * 1000)
        os.replace(other, path)

    def cut_and_grown():
        path.write_bytes(HEADER + b'{"step": 5, "loss": 2.0, "note": "%s"}\n' % (b"y" * 3000))

    status, told = follow(path, cut, replace, cut_and_grown)
    assert status == 130
    anew = "The file was cut or replaced; reading it anew."
    assert told[1:] == [
        [anew, "loss 3, step 1; 1 new record"],
        [anew, "loss 0.1429, step 7; 1 new record"],
        [anew, "loss 2, step 5; 1 new record"],
    ]


def test_a_file_that_is_gone_is_waited_for(follow, tmp_path):
    path = write(tmp_path / "history.jsonl", [1])
    status, told = follow(path, path.unlink, lambda: write(path, [2]))
    assert status == 130
    assert told[1:] == [
        [],
        ["The file was cut or replaced; reading it anew.", "loss 0.5, step 2; 1 new record"],
    ]


def test_another_file_in_its_place_ends_it(follow, tmp_path, capsys):
    path = write(tmp_path / "history.jsonl", [1])
    status, _ = follow(path, lambda: path.write_text("not any more"))
    assert status == 2
    assert "is no history" in capsys.readouterr().err


def test_ctrl_c_in_a_process_of_its_own(tmp_path):
    path = write(tmp_path / "history.jsonl", [1])
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from conjopt.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "report", str(path), "--follow"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in process.stdout:
            if line.startswith("Following"):
                break
        write(path, [2])
        assert "loss 0.5, step 2; 1 new record" in process.stdout.readline()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "")
    finally:
        process.kill()
        process.communicate()
