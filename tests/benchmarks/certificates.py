"""How tight the held-out certificates of Thm 4.4 are, on held-out losses of trained networks.

A small network is trained on some samples. Of the others, `n` are drawn without replacement, many
times, and each method certifies their losses: cross-entropy clipped at a maximum stated here, half
the squared distance of probabilities and target (at most 1), and 0/1 losses. A row has the medians
over the draws, the share of draws in which betting is no looser than kl and than empirical
Bernstein, and how often each bound was below the mean loss of *all* samples that were not trained
on, which stands for the risk. (Drawing without replacement makes that rarer than draws of a law.)

    python tests/benchmarks/certificates.py [--data DIR] [--networks 10] [--draws 20] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt import ConjSGD
from conjopt.bounds import heldout_certificate, uniform_gap_bound

METHODS = ["betting", "kl", "empirical-bernstein", "hoeffding"]
CLIP = 4.0
MAXIMA = {"cross-entropy": CLIP, "squared": 1.0, "0/1": 1.0}


def digits() -> tuple[Tensor, Tensor, int, list[int]]:
    """Inputs, classes, how many to train on, and sizes of held-out samples."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return torch.from_numpy(x / 16).float(), torch.from_numpy(y), 600, [100, 300, 1000]


def fashion(folder: Path) -> tuple[Tensor, Tensor, int, list[int]]:
    """As `digits`."""
    with np.load(folder / "fashion_mnist_30k.npz", allow_pickle=False) as file:
        x, y = file["x_train"].reshape(-1, 784), file["y_train"]
    return torch.from_numpy(x / 255).float(), torch.from_numpy(y), 10_000, [100, 1000, 10_000]


def train(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """Train two layers with the defaults."""
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.ReLU(), nn.Linear(64, 10))
    criterion = nn.CrossEntropyLoss()
    optimizer = ConjSGD(model.parameters(), model=model, loss=criterion)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            criterion(model(x[batch]), y[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def losses_of(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, np.ndarray]:
    """Each sample's loss in each of the three kinds."""
    f = model(x).double()
    squared = (f.softmax(1) - F.one_hot(y, 10)).square().sum(1) / 2
    return {
        "cross-entropy": F.cross_entropy(f, y, reduction="none").clamp(0, CLIP).numpy(),
        "squared": squared.clamp(0, 1).numpy(),
        "0/1": (f.argmax(1) != y).double().numpy(),
    }


def compare(name: str, data: tuple, networks: int, draws: int, epochs: int) -> list[dict]:
    """All methods on all draws; a row for each loss, size and form."""
    x, y, train_size, sizes = data
    found: dict[tuple, list] = {}
    for seed in range(networks):
        torch.manual_seed(seed)
        order = torch.randperm(len(x))
        own, rest = order[:train_size], order[train_size:]
        losses = losses_of(train(x[own], y[own], epochs), x[rest], y[rest])
        rng = np.random.default_rng(seed)
        for _ in range(draws):
            shuffled = rng.permutation(len(rest))
            for kind, values in losses.items():
                for n in sizes:
                    for anytime in (False, True):
                        options = {"max_loss": MAXIMA[kind], "anytime": anytime}
                        sample = values[shuffled[:n]]
                        bounds = [
                            heldout_certificate(sample, method=method, **options)
                            for method in METHODS
                        ]
                        row = [values.mean(), *bounds]
                        found.setdefault((kind, n, anytime), []).append(row)
    rows = []
    for (kind, n, anytime), values in found.items():
        table = np.array(values)
        risk, bounds = table[:, 0], table[:, 1:]
        betting, kl, bernstein = bounds[:, 0], bounds[:, 1], bounds[:, 2]
        rows.append(
            {
                "data": name,
                "loss": kind,
                "n": n,
                "anytime": anytime,
                "draws": len(table),
                "risk": float(np.median(risk)),
                **{m: float(b) for m, b in zip(METHODS, np.median(bounds, 0), strict=True)},
                "no_looser_than_kl": float((betting <= kl).mean()),
                "no_looser_than_bernstein": float((betting <= bernstein).mean()),
                "missed": [float(v) for v in (bounds < risk[:, None]).mean(0)],
            }
        )
    return rows


def times(count: int, turns: int = 5) -> dict[str, float]:
    """CPU seconds for so many losses; the median over turns that the methods take together."""
    losses = torch.from_numpy(np.random.default_rng(0).beta(0.1, 0.9, count))
    cells = torch.from_numpy(np.random.default_rng(0).integers(1000, size=count))
    ways = {
        f"{method}{', anytime' if anytime else ''}": (
            lambda method=method, anytime=anytime: heldout_certificate(
                losses, max_loss=1.0, method=method, anytime=anytime
            )
        )
        for anytime in (False, True)
        for method in METHODS
    }
    ways["uniform_gap_bound, 1000 cells"] = lambda: uniform_gap_bound(cells, max_loss=1.0)
    taken: dict[str, list[float]] = {}
    for _ in range(turns):
        for way, call in ways.items():
            start = time.process_time()
            call()
            taken.setdefault(way, []).append(time.process_time() - start)
    return {way: float(np.median(seconds)) for way, seconds in taken.items()}


def main() -> None:
    """Compare, print tables, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with fashion_mnist_30k.npz")
    parser.add_argument("--networks", type=int, default=10)
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--count", type=int, default=10**6, help="losses for the timing")
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare("digits", digits(), arguments.networks, arguments.draws, epochs=20)
    if arguments.data:
        networks = max(1, arguments.networks // 3)
        rows += compare("Fashion-MNIST", fashion(arguments.data), networks, arguments.draws, 3)
    for anytime in (False, True):
        print(f"\n{'Anytime-valid' if anytime else 'For n fixed beforehand'}, 95 %:\n")
        print(f"| data | loss | n | risk | {' | '.join(METHODS)} | <= kl | <= EB | missed |")
        print("|---|---|---|---|---|---|---|---|---|---|---|")
        for row in rows:
            if row["anytime"] == anytime:
                cells = [
                    f"{row['data']} | {row['loss']} | {row['n']} | {row['risk']:.4f}",
                    *(f"{row[method]:.4f}" for method in METHODS),
                    f"{row['no_looser_than_kl']:.0%} | {row['no_looser_than_bernstein']:.0%}",
                    " ".join(f"{share:.3f}" for share in row["missed"]),
                ]
                print(f"| {' | '.join(cells)} |")
    seconds = times(arguments.count)
    print(f"\nCPU seconds for {arguments.count} losses:\n")
    for way, second in seconds.items():
        print(f"| {way} | {second:.3f} |")
    if arguments.out:
        about = {"torch": torch.__version__, "python": platform.python_version()}
        arguments.out.write_text(json.dumps({**about, "rows": rows, "seconds": seconds}))


if __name__ == "__main__":
    main()
