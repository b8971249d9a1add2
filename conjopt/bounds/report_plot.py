"""The picture of a report on unseen samples."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from conjopt.report.plots import COLOURS

if TYPE_CHECKING:
    from conjopt.bounds.report import GeneralizationReport

__all__ = ["draw"]

RED, BLUE, GREEN = COLOURS[:3]


def draw(report: GeneralizationReport) -> Any:
    """Draw risks and certificate, the bounds on the gap, and the factors.

    Args:
        report: The report.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ImportError: If matplotlib is missing; it names the extra to install.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f'GeneralizationReport.plot needs matplotlib ({error}): pip install "conjopt[plot]"'
        ) from error
    figure = Figure(figsize=(15.0, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1.4, 1.6))
    of_error = report.certified == "error rate"
    shown_of = "error rate" if of_error else "loss"
    risks = (
        (report.training_error, report.heldout_error)
        if of_error
        else (report.training_risk, report.heldout_risk)
    )
    left.bar(["training", "held out"], risks, color=[BLUE, RED])
    if not math.isnan(report.certificate):
        label = f"certificate, {100 * report.confidence:.4g} % confidence"
        left.axhline(report.certificate, color="black", linestyle="--", label=label)
        left.set_ylim(top=1.2 * max(report.certificate, *risks))  # room for the legend
        left.legend(frameon=False, fontsize=9)
    left.set_title(shown_of, loc="left", fontsize=11)

    of_gap = [b for b in report.bounds if b.of == shown_of and "Rhat" in b.bounds]
    gaps = [b for b in of_gap if math.isfinite(b.value)]
    names = [f"{b.statement}: {b.bounds}" for b in gaps]
    colours = [GREEN if b.kind == "guarantee" else "0.6" for b in gaps]
    middle.barh(range(len(gaps)), [b.value for b in gaps], color=colours)
    middle.set_yticks(range(len(gaps)), names, fontsize=8)
    middle.axvline(risks[1] - risks[0], color="black", linestyle=":", label="measured gap")
    middle.legend(frameon=False, fontsize=9)
    middle.set_title(
        "bounds on the gap: guarantee (green), diagnostic (grey)", loc="left", fontsize=11
    )

    shown = [f for f in report.factors if math.isfinite(f.training) or math.isfinite(f.heldout)]
    for shift, colour, name in ((-0.2, BLUE, "training"), (0.2, RED, "heldout")):
        values = [getattr(f, name) for f in shown]
        places = [i + shift for i in range(len(shown))]
        finite = [v if math.isfinite(v) else 0.0 for v in values]
        label = "held out" if name == "heldout" else name
        right.barh(places, finite, height=0.38, color=colour, label=label)
    right.set_yticks(range(len(shown)), [f"{f.group}:\n{f.name}" for f in shown], fontsize=7)
    right.legend(frameon=False, fontsize=9)
    right.set_title("factors", loc="left", fontsize=11)
    for axis in (middle, right):
        axis.invert_yaxis()
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(axis="x", labelsize=9)
    return figure
