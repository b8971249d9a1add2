from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from conjopt.cli import main
from conjopt.demo import command, training
from conjopt.demo.data import Split, load_split
from conjopt.report import History

PNG = b"\x89PNG\r\n\x1a\n"
FILES = {"metrics.jsonl", "plot.png", "report.html", "summary.json"}
ORDER = ["ConjSGD", "SGD", "AdamW"]
ROOT = Path(__file__).parents[1]

# The command in a process of its own, on little data and with SGD alone: what is tested is how the
# command ends, not what it trains.
SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # may be ignored in a background job
from conjopt.cli import main
from conjopt.demo import command, training
from conjopt.demo.data import Split
whole = command.load_split
command.load_split = lambda seed: Split(*(part[:130] for part in vars(whole(seed)).values()))
training.OPTIMIZERS["ConjSGD"] = training.OPTIMIZERS["SGD"]
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def interruptible():
    """Interrupts act, also where the tests are a background job, in which a shell ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other on busy cores would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny(monkeypatch):
    """Three steps an epoch, and SGD under all the names."""

    def split(seed):
        return Split(*(part[:130] for part in vars(load_split(seed)).values()))

    monkeypatch.setattr(command, "load_split", split)
    for name in ORDER:
        monkeypatch.setitem(training.OPTIMIZERS, name, training.OPTIMIZERS["SGD"])


@pytest.fixture
def no_training(monkeypatch):
    def train(*arguments, **options):
        raise AssertionError("trained")

    monkeypatch.setattr(command, "train", train)


def optimizer_that(monkeypatch, act):
    """Let the second of the three optimizers call `act` with its model at every step."""

    class Acting(torch.optim.SGD):
        def __init__(self, model):
            super().__init__(model.parameters(), lr=0.1)
            self.model = model

        def step(self):
            super().step()
            act(self.model)

    monkeypatch.setitem(training.OPTIMIZERS, "SGD", lambda model, criterion: Acting(model))


@pytest.fixture
def start():
    """Start the command on these arguments in a process that does not outlive the test."""
    processes = []

    def start(*arguments, **options):
        processes.append(_start(*arguments, **options))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()
        process.stderr.close()
        if process.stdout:
            process.stdout.close()


def _start(*arguments, **options):
    # With its streams buffered as they usually are, whatever the tests' own are.
    env = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, "demo", *map(str, arguments)],
        cwd=ROOT,
        env=env | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


# Arguments and refusals


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--version"], 0, "conjopt "),
        (["--help"], 0, "demo"),
        (["demo", "--help"], 0, "--quick"),
        ([], 2, "required: COMMAND"),
        (["train"], 2, "invalid choice"),
        (["demo", "--seeds", "0"], 2, "--seeds: expected a whole number of at least 1, got '0'"),
        (["demo", "--epochs", "-1"], 2, "--epochs: expected a whole number"),
        (["demo", "--epochs", "1.5"], 2, "got '1.5'"),
        (["demo", "--batch"], 2, "unrecognized"),
    ],
)
def test_arguments_and_exit_statuses(arguments, status, expected, capsys, no_training):
    assert main(arguments) == status
    output = capsys.readouterr()
    assert expected in (output.err if status else output.out)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from conjopt.cli import main; main(['demo', '--help']);"
        "sys.exit(any(name in sys.modules for name in ('sklearn', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=-3).returncode == 0


@pytest.mark.parametrize("module", ["sklearn", "tqdm", "matplotlib"])
def test_a_missing_extra_is_named_in_one_line(module, tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert f"needs {module}" in output.err
    assert 'pip install "conjopt[demo]"' in output.err
    assert output.err.count("\n") == 1
    assert not output.out
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_needed_for_files_only(tiny, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["demo", "--seeds", "1", "--epochs", "1"]) == 0


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path, capsys, no_training):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert main(["demo", "--out", str(out)]) == 2
        output = capsys.readouterr()
        assert f"--out {out}: " in output.err
        assert "give a folder that can be written" in output.err
        assert not output.out


@pytest.mark.parametrize("name", sorted(FILES))
def test_files_of_others_are_refused_and_left_alone(name, tmp_path, capsys, no_training):
    (tmp_path / name).write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert f"holds {name}, which this command did not write" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, "mine")]


def test_another_history_is_refused_and_left_alone(tmp_path, capsys, no_training):
    path = tmp_path / "metrics.jsonl"
    with History(path) as history:
        history.record(step=1, loss=0.5)
    content = path.read_bytes()
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert path.read_bytes() == content


# A whole demo


def test_the_demo_leaves_records_a_summary_and_a_picture(tmp_path, capsys, tiny):
    out = tmp_path / "new" / "folder"
    assert main(["demo", "--out", str(out), "--seeds", "2", "--epochs", "2"]) == 0
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "plot.png").read_bytes().startswith(PNG)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "84 records of 12 runs." in page
    assert "mlp, ConjSGD, seed 1" in page

    records = History.read(out / "metrics.jsonl")
    runs = {}
    for record in records:
        runs.setdefault((record["model"], record["seed"], record["optimizer"]), []).append(record)
    assert list(runs) == list(itertools.product(("mlp", "cnn"), (0, 1), ORDER))
    for of_run in runs.values():
        assert [record["step"] for record in of_run] == [0, 1, 2, 3, 4, 5, 6]
        assert [record["epoch"] for record in of_run] == [step / 3 for step in range(7)]
        assert [record["step_size"] for record in of_run] == [None] + [0.1] * 6
        seconds = [record["cpu_seconds"] for record in of_run]
        assert seconds == sorted(seconds)
        assert 0 == seconds[0] < seconds[-1]
        assert all(0 <= record["test_accuracy"] <= 1 for record in of_run)
    # One optimizer under three names: the same initialisation and the same batches.
    for model, seed in itertools.product(("mlp", "cnn"), (0, 1)):
        losses = {tuple(r["train_loss"] for r in runs[model, seed, name]) for name in ORDER}
        assert len(losses) == 1

    summary = json.loads((out / "summary.json").read_text())
    assert summary["interrupted"] is None
    assert summary["runs_finished"] == summary["runs_planned"] == len(summary["runs"]) == 12
    assert summary["command"] == f"conjopt demo --out {out} --seeds 2 --epochs 2"
    assert summary["environment"]["torch"] == torch.__version__
    assert summary["environment"]["threads"] == 1
    assert summary["settings"]["seeds"] == [0, 1]
    row = summary["table"][-1]
    last = [runs["cnn", seed, "AdamW"][-1] for seed in (0, 1)]
    assert (row["model"], row["optimizer"], row["seeds"]) == ("cnn", "AdamW", 2)
    assert row["test_loss"]["mean"] == pytest.approx(sum(r["test_loss"] for r in last) / 2)
    assert row["epochs_to"].keys() == {"0.1", "0.01"}

    printed = capsys.readouterr()
    found = " ".join(printed.out.split())
    assert all(sentence in found for sentence in summary["findings"])
    assert len(summary["findings"]) == 4
    assert max(map(len, printed.out.splitlines()[1:-2])) <= 84
    last = printed.out.splitlines()[-1]
    assert last == f"The records are in {out}. Open {out / 'report.html'} in a browser."
    assert not printed.err  # no bar where there is no terminal


def test_a_later_demo_takes_the_place_of_an_earlier_one(tmp_path, capsys, tiny):
    losses = []
    for epochs in (2, 1, 1):
        (tmp_path / "notes.txt").write_text("mine")
        assert main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", str(epochs)]) == 0
        records = History.read(tmp_path / "metrics.jsonl")
        assert len(records) == 6 * (3 * epochs + 1)
        losses.append([record["train_loss"] for record in records if record["epoch"] <= 1])
        told = f"The earlier demo in {tmp_path} was removed." in capsys.readouterr().out
        assert told == (len(losses) > 1)
        assert (tmp_path / "notes.txt").read_text() == "mine"
    assert losses[0] == losses[1] == losses[2]


def test_quick_says_so_and_gives_way_to_explicit_numbers(tiny, monkeypatch, capsys):
    monkeypatch.setattr(command, "QUICK_EPOCHS", 1)
    assert main(["demo", "--quick"]) == 0
    assert "This is the quick demo" in capsys.readouterr().out
    assert main(["demo", "--quick", "--epochs", "2"]) == 0
    assert "Seeds: 0; 2 epochs;" in capsys.readouterr().out


def test_runs_on_one_thread_and_leaves_the_number_as_it_was(tiny, monkeypatch):
    threads = []
    optimizer_that(monkeypatch, lambda model: threads.append(torch.get_num_threads()))
    torch.set_num_threads(2)
    assert main(["demo", "--seeds", "1", "--epochs", "1"]) == 0
    assert torch.get_num_threads() == 2
    assert set(threads) == {1}


def test_a_loss_that_is_no_number_is_recorded_and_told(tmp_path, capsys, monkeypatch, tiny):
    def spoil(model):
        with torch.no_grad():
            next(model.parameters()).fill_(math.nan)

    optimizer_that(monkeypatch, spoil)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1"]) == 0
    losses = [
        record["train_loss"]
        for record in History.read(tmp_path / "metrics.jsonl")
        if record["optimizer"] == "SGD"
    ]
    assert sum(map(math.isnan, losses)) == 6
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [run["train_loss"] for run in summary["runs"] if run["optimizer"] == "SGD"] == [
        "nan",
        "nan",
    ]
    assert "2 of 6 runs ended above twice" in capsys.readouterr().out


def test_a_run_changes_no_global_state(tiny):
    torch.manual_seed(7)
    before, handlers = torch.get_rng_state(), signal.getsignal(signal.SIGTERM)
    assert main(["demo", "--seeds", "1", "--epochs", "1"]) == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert signal.getsignal(signal.SIGTERM) is handlers


# Interruptions


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_what_was_recorded(number, status, tmp_path, capsys, monkeypatch, tiny):
    steps = itertools.count()
    warmup = training.WARMUP_STEPS
    optimizer_that(
        monkeypatch, lambda model: next(steps) == warmup + 1 and signal.raise_signal(number)
    )
    handler = signal.getsignal(number)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "3"]) == status
    assert signal.getsignal(number) is handler
    records = History.read(tmp_path / "metrics.jsonl")
    # All of the first run (steps 0 to 9), and the second one up to the step that was under way.
    assert [record["step"] for record in records] == [*range(10), 0, 1, 2]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["interrupted"] == f"Interrupted by {number.name}"
    assert (summary["runs_finished"], summary["runs_planned"]) == (1, 6)
    assert [run["optimizer"] for run in summary["runs"]] == ["ConjSGD"]
    assert (tmp_path / "plot.png").exists()
    assert f"Interrupted by {number.name}; 1 of 6 runs were finished." in capsys.readouterr().out


def test_a_second_signal_acts_at_once(tmp_path, monkeypatch, tiny):
    def twice(model):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("still there")

    monkeypatch.setattr(training, "WARMUP_STEPS", 0)
    optimizer_that(monkeypatch, twice)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1"]) == 130
    assert len(History.read(tmp_path / "metrics.jsonl")) == 5


def test_an_ignored_signal_stays_ignored(monkeypatch, tiny, capsys):
    monkeypatch.setattr(command, "MODELS", ("mlp",))
    optimizer_that(monkeypatch, lambda model: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert main(["demo", "--seeds", "1", "--epochs", "1"]) == 0
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_demo_runs_outside_of_the_main_thread(tiny, capsys):
    statuses = []
    thread = threading.Thread(
        target=lambda: statuses.append(main(["demo", "--seeds", "1", "--epochs", "1"]))
    )
    thread.start()
    thread.join()
    assert statuses == [0]


@pytest.mark.parametrize("full_at", ["record", "write_summary", "write_plot", "write_page"])
def test_a_full_disk_ends_it_with_what_was_recorded(full_at, tmp_path, capsys, monkeypatch, tiny):
    calls = itertools.count()

    def full(*arguments, **values):
        # Of the records, the third of the second run.
        if full_at == "record" and next(calls) < 6:
            return write(*arguments, **values)
        raise OSError(28, "No space left on device")

    owner = History if full_at == "record" else command.Output
    write = getattr(owner, full_at)
    monkeypatch.setattr(owner, full_at, full)
    assert main(["demo", "--out", str(tmp_path), "--seeds", "1", "--epochs", "1"]) == 1
    runs = 1 if full_at == "record" else 6
    printed = capsys.readouterr()
    why = f"Cannot write to {tmp_path}: No space left on device"
    assert f"{why}; {runs} of 6 runs were finished." in printed.out
    assert "ConjSGD" in printed.out.split("epochs to")[1]
    page = tmp_path / "report.html"
    assert (f"Open {page} in a browser." in printed.out) == page.exists()
    assert len(History.read(tmp_path / "metrics.jsonl")) == (6 if runs == 1 else 24)
    assert not [path for path in tmp_path.iterdir() if path.name not in FILES]
    if full_at == "record":
        assert json.loads((tmp_path / "summary.json").read_text())["interrupted"] == why


def test_a_summary_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    output = command.Output(tmp_path)
    output.write_summary({"old": 1})

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        output.write_summary({"new": 2})
    output.history.close()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"old": 1}
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.jsonl", "summary.json"}


def test_ctrl_c_in_a_process_of_its_own(start, tmp_path):
    process = start("--out", tmp_path, "--epochs", 10_000, stdout=subprocess.PIPE)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < 20:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert "Interrupted by SIGINT; 0 of 18 runs were finished." in out
    assert len(History.read(metrics)) >= 19
    assert metrics.read_bytes().endswith(b"}\n")
    assert json.loads((tmp_path / "summary.json").read_text())["runs"] == []


def test_a_broken_pipe_is_quiet_and_the_files_are_there(start, tmp_path):
    process = start("--out", tmp_path, "--seeds", 1, "--epochs", 1, stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith("Digits")
    process.stdout.close()
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (141, "")
    assert {path.name for path in tmp_path.iterdir()} == FILES


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_standard_output_is_one_line(start):
    with open("/dev/full", "w") as full:
        process = start("--seeds", 1, "--epochs", 1, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err == "conjopt: error: standard output: No space left on device\n"


def test_an_empty_name_is_no_folder(capsys):
    assert main(["demo", "--out", ""]) == 2
    assert "use . for the current one" in capsys.readouterr().err
