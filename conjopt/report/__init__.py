"""What a run leaves behind: records in JSON lines and pictures of them."""

from __future__ import annotations

from conjopt.report.history import History
from conjopt.report.plots import plot_runs

__all__ = ["History", "plot_runs"]
