"""The examples run as a user runs them, and say what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {
        "architecture.py",
        "batch_size.py",
        "ten_lines.py",
        "beyond_the_plain_loop.py",
        "choosing_a_potential.py",
        "label_noise.py",
        "generalization_report.py",
        "why_is_it_stuck.py",
    }


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("ten_lines", 95),
        ("beyond_the_plain_loop", 90),
        ("choosing_a_potential", 95),
        ("batch_size", 95),
    ],
)
def test_example(name, least, tmp_path):
    run = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    accuracy = float(re.search(r"accuracy +([\d.]+) %", run.stdout).group(1))
    assert accuracy > least
    assert "step size" in run.stdout
    assert not list(tmp_path.iterdir())


def test_potentials_are_drawn(tmp_path):
    script = EXAMPLES / "choosing_a_potential.py"
    code = f"import runpy; runpy.run_path({str(script)!r})['draw']('potentials.png')"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "potentials.png").stat().st_size > 20_000


def test_architectures_are_measured_and_drawn(tmp_path):
    script = EXAMPLES / "architecture.py"
    run = subprocess.run(
        [sys.executable, "-W", "error", script, "--epochs", "1", "--plot", "picture.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^(.*?)  +([\d.]+) -> .*\[([\d.e-]+), ([\d.e-]+|inf)\]$", run.stdout, re.M)
    assert len(rows) == 6
    least = {name: float(lo) for name, lo, _, _ in rows}
    assert least["deep residual (12 layers of 64)"] > 2 * least["deep plain (12 layers of 64)"]
    assert least["wide (3 layers of 512)"] > 2 * least["wide, 95 % pruned"]
    assert (tmp_path / "picture.png").stat().st_size > 20_000


def test_two_networks_are_certified_and_drawn(tmp_path):
    script = EXAMPLES / "generalization_report.py"
    run = subprocess.run(
        [sys.executable, "-W", "error", script, "--epochs", "20", "--plot", "picture"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    losses = re.findall(r"^loss +[\d.]+ +([\d.]+) +", run.stdout, re.M)
    certified = re.findall(r"^with 95 % confidence the loss .* at most ([\d.]+)$", run.stdout, re.M)
    assert len(losses) == len(certified) == 2
    assert all(0 < float(top) - float(loss) < 0.3 for loss, top in zip(losses, certified))
    for name in ("nothing", "ConditionalEntropy"):
        assert (tmp_path / f"picture-{name}.png").stat().st_size > 20_000


def test_planted_faults_are_diagnosed_and_remedied(tmp_path):
    script = EXAMPLES / "why_is_it_stuck.py"
    run = subprocess.run(
        [sys.executable, "-W", "error", script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    found = re.findall(r"^--- planted: (.*)\n(.*?): ", run.stdout, re.M)
    assert len(found) == 5
    assert all(planted == cause for planted, cause in found)
    losses = re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", run.stdout, re.M)
    assert len(losses) == 5
    assert all(float(after) < 0.8 * float(before) for before, after in losses)


def test_regularizers_are_compared_under_label_noise(tmp_path):
    script = EXAMPLES / "label_noise.py"
    run = subprocess.run(
        [sys.executable, "-W", "error", script, "--seeds", "2", "--steps", "40", "--out", "it.png"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| (.*?) \| ([\d.]+) % \| ([+-][\d.]+) ± ([\d.]+) \|", run.stdout, re.M)
    assert len(rows) == 10
    accuracy = {name: float(mean) for name, mean, _, _ in rows}
    assert accuracy["nothing"] > 70
    assert all(mean > 30 for mean in accuracy.values())  # chance is 10
    for name, mean, gain, _ in rows:
        assert float(mean) - accuracy["nothing"] == pytest.approx(float(gain), abs=0.16), name
    gains = re.findall(r"^ConditionalEntropy against (.*): ([+-][\d.]+) ±", run.stdout, re.M)
    assert [name for name, _ in gains] == [name for name, *_ in rows[:7]]
    for name, gain in gains:
        ours = accuracy["ConditionalEntropy"]
        assert ours - accuracy[name] == pytest.approx(float(gain), abs=0.16), name
    assert (tmp_path / "it.png").stat().st_size > 20_000
