"""Time and memory of the losses, as ratios to torch's cross-entropy and to the `entmax` package.

Forward and backward of the mean loss of class targets. Every pair takes turns in one process; a
ratio is taken within each turn, and its median over the turns is reported with quartiles. Seconds
are those of the process's CPU on one thread, and freed memory stays with the process (glibc's
mallopt): else which of the two returns its pages to the system, and waits to get them again, is
luck, and outweighs the arithmetic. Memory is the most that tensors hold at once beyond the outputs
and the targets, counted by torch's profiler.

    python tests/benchmarks/loss_time.py [--turns 21] [--rows 4096] [--classes 1000] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from conjopt.losses import EntmaxLoss, SoftmaxLoss, SparsemaxLoss

ORDER = 1.3


def keep_freed_memory() -> None:
    """Raise glibc's thresholds for returning memory, where the C library is glibc."""
    trim, mmap = -1, -3
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(trim, 2**31 - 1)
        libc.mallopt(mmap, 2**31 - 1)


def bisections(order: float) -> int:
    """Steps after which the bisection of `entmax` is as accurate as it gets, in float32.

    The error of a link is its greatest deviation from the link of float64 with 100 steps. As
    accurate as our link, or within a tenth of its own best where it never gets there.
    """
    from entmax import entmax_bisect

    from conjopt.potentials import Entmax

    torch.manual_seed(0)
    outputs = torch.randn(256, 1000)
    exact = entmax_bisect(outputs.double(), order, n_iter=100)
    ours = float((Entmax(order).link(outputs) - exact).abs().max())
    errors = [
        float((entmax_bisect(outputs, order, n_iter=steps) - exact).abs().max())
        for steps in range(1, 51)
    ]
    best = min(errors)
    print(f"Greatest error of a link at order {order}: ours {ours:.1e}, bisection {best:.1e}")
    return 1 + next(i for i, error in enumerate(errors) if error <= max(ours, 1.1 * best))


def pairs() -> dict[str, tuple[Callable, Callable]]:
    """Our losses with their peers; a loss maps outputs and classes to the mean."""
    import entmax

    steps = bisections(ORDER)
    return {
        "softmax / F.cross_entropy": (SoftmaxLoss(), nn.CrossEntropyLoss()),
        "sparsemax / entmax": (SparsemaxLoss(), entmax.SparsemaxLoss(reduction="elementwise_mean")),
        "entmax 1.5 / entmax": (
            EntmaxLoss(1.5),
            entmax.Entmax15Loss(reduction="elementwise_mean"),
        ),
        f"entmax {ORDER} / entmax, {steps} bisections": (
            EntmaxLoss(ORDER),
            entmax.EntmaxBisectLoss(ORDER, n_iter=steps, reduction="elementwise_mean"),
        ),
    }


def seconds(loss: Callable, outputs: Tensor, targets: Tensor) -> float:
    """CPU seconds of one forward and backward."""
    outputs.grad = None
    start = time.process_time()
    loss(outputs, targets).backward()
    return time.process_time() - start


def peak_bytes(loss: Callable, outputs: Tensor, targets: Tensor) -> int:
    """The most bytes held at once, beyond what was there before."""
    outputs.grad = None
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        loss(outputs, targets).backward()
    held = least = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            least = min(least, held)  # what is freed at first was there before
            peak = max(peak, held - least)
    return peak


def compare(rows: int, classes: int, turns: int) -> list[dict[str, object]]:
    """All pairs over logits of three spreads; a row for each."""
    torch.manual_seed(0)
    table, losses = [], pairs()
    for spread in (0.1, 1.0, 5.0):
        outputs = (spread * torch.randn(rows, classes)).requires_grad_()
        targets = torch.randint(classes, (rows,))
        for name, (ours, peer) in losses.items():
            seconds(ours, outputs, targets), seconds(peer, outputs, targets)
            times = np.array(
                [[seconds(loss, outputs, targets) for loss in (ours, peer)] for _ in range(turns)]
            )
            low, middle, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.5, 0.75])
            memory = [peak_bytes(loss, outputs, targets) for loss in (ours, peer)]
            table.append(
                {
                    "pair": name,
                    "spread": spread,
                    "milliseconds": 1e3 * float(np.median(times[:, 0])),
                    "ratio": float(middle),
                    "ratio_quartiles": [float(low), float(high)],
                    "memory_over_outputs": memory[0] / (outputs.numel() * 4),
                    "memory_ratio": memory[0] / memory[1],
                }
            )
    return table


def main() -> None:
    """Compare, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    table = compare(arguments.rows, arguments.classes, arguments.turns)
    print("| loss / peer | logits' spread | ms | time ratio | memory / outputs | memory ratio |")
    print("|---|---|---|---|---|---|")
    for row in table:
        low, high = row["ratio_quartiles"]
        print(
            f"| {row['pair']} | {row['spread']} | {row['milliseconds']:.1f} "
            f"| {row['ratio']:.2f} [{low:.2f}, {high:.2f}] | {row['memory_over_outputs']:.2f} "
            f"| {row['memory_ratio']:.2f} |"
        )
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": table}))


if __name__ == "__main__":
    main()
