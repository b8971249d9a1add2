"""What a run leaves behind: records in JSON lines, pictures, a page, scalars for TensorBoard.

Callbacks are imported from where they are, as this imports their library:
`conjopt.report.lightning.LightningStatus` and `conjopt.report.transformers.TransformersStatus`.
"""

from __future__ import annotations

from conjopt.report.figure import plot
from conjopt.report.history import History
from conjopt.report.html import write_html
from conjopt.report.plots import plot_runs
from conjopt.report.scalars import scalars
from conjopt.report.tensorboard import TensorBoard

__all__ = ["History", "TensorBoard", "plot", "plot_runs", "scalars", "write_html"]
