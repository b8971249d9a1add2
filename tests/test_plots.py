from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import pytest

from conjopt.report import plot_runs, plots

PNG = b"\x89PNG\r\n\x1a\n"


def run(model="mlp", optimizer="ConjSGD", seed=0, losses=(2.3, 0.5, 0.1)):
    return [
        {
            "model": model,
            "optimizer": optimizer,
            "seed": seed,
            "epoch": float(number),
            "cpu_seconds": 0.5 * number,
            "train_loss": loss,
            "step_size": 0.1 * number if number else None,
        }
        for number, loss in enumerate(losses)
    ]


@pytest.fixture
def lines(monkeypatch):
    """What is drawn: (x, y, width) of every line, in order."""
    from matplotlib.axes import Axes

    drawn = []
    plot = Axes.plot

    def note(self, xs, ys, **options):
        drawn.append((list(xs), list(ys), options["linewidth"]))
        return plot(self, xs, ys, **options)

    monkeypatch.setattr(Axes, "plot", note)
    return drawn


def test_every_run_is_a_thin_line_and_their_median_a_thick_one(tmp_path, lines):
    records = run(losses=(2, 1)) + run(seed=1, losses=(4, 3)) + run(seed=2, losses=(6, 2))
    plot_runs(records, tmp_path / "plot.png")
    by_epoch = lines[:4]
    assert [ys for _, ys, width in by_epoch if width < 1] == [[2, 1], [4, 3], [6, 2]]
    assert [(xs, ys) for xs, ys, width in by_epoch if width > 1] == [([0, 1], [4, 2])]


def test_the_median_runs_over_the_epochs_that_all_seeds_have(tmp_path, lines):
    plot_runs(run(losses=(4, 3, 2)) + run(seed=1, losses=(2, 1)), tmp_path / "plot.png")
    assert lines[2][:2] == ([0, 1], [3, 2])


def test_seeds_without_a_common_epoch_have_no_median(tmp_path, lines):
    later = [record | {"epoch": record["epoch"] + 0.5} for record in run(seed=1)]
    plot_runs(run() + later, tmp_path / "plot.png")
    assert sum(width > 1 for xs, _, width in lines if xs) == 0


def test_losses_that_are_no_numbers_are_gaps_and_rank_as_the_largest(tmp_path, lines):
    records = run(losses=(2, math.nan)) + run(seed=1, losses=(2, 5)) + run(seed=2, losses=(2, 7))
    plot_runs(records, tmp_path / "plot.png")
    assert math.isnan(lines[0][1][1])
    assert lines[3][1] == [2, 7]


def test_a_run_of_nothing_but_nan_is_drawn_without_a_warning(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_runs(run(losses=(math.nan, math.inf)), tmp_path / "plot.png")
        plot_runs(run(losses=(2.3,)), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(PNG)


def test_models_and_optimizers_of_different_sets_fit_one_picture(tmp_path):
    path = tmp_path / "plot.png"
    plot_runs(run() + run(model="cnn", optimizer="SGD"), path, targets=(0.1, 0.01))
    assert path.read_bytes().startswith(PNG)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_the_file_appears_whole_or_not_at_all(tmp_path, monkeypatch, error):
    from matplotlib.figure import Figure

    path = tmp_path / "plot.png"
    path.write_bytes(b"the one before")

    def save(self, name, **options):
        Path(name).write_bytes(PNG)
        raise error

    monkeypatch.setattr(Figure, "savefig", save)
    with pytest.raises(type(error)):
        plot_runs(run(), path)
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_to_draw_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no records"):
        plot_runs([], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_a_missing_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "conjopt\[plot\]"'):
        plot_runs(run(), tmp_path / "plot.png")


def test_more_optimizers_than_colours(tmp_path):
    records = [r for i in range(len(plots.COLOURS) + 1) for r in run(optimizer=f"o{i}")]
    plot_runs(records, tmp_path / "plot.svg", rule_of="none")
    assert "no none run" in (tmp_path / "plot.svg").read_text()
