"""Regularizers under label noise: digits of which a fifth of the training labels are wrong.

Every method has four values to choose from. Each seed takes the one of least loss on validation
labels, which are as noisy, so that clean labels serve for the test alone. The seeds are paired: one
seed means the same split, wrong labels, initialisation and batches for all methods.

    python examples/label_noise.py [--seeds 10] [--steps 500] [--raw] [--out label_noise.png]
"""

import argparse
import functools
import statistics
from collections.abc import Callable

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from conjopt.regularizers import ConditionalEntropy, PredictiveEntropy

NOISE, TRAIN, VALID, BATCH = 0.2, 500, 400, 64
ENTROPY, DROPOUT = (0.3, 1.0, 3.0, 10.0), (0.25, 0.5, 0.7, 0.85)
# Method, values of its one setting, weight decay of AdamW beside it; None: it is the setting.
METHODS = [
    ("nothing", (0.0,), 0.0),
    ("fewer steps", (0.12, 0.25, 0.5, 1.0), 0.0),  # early stopping, with a schedule of its length
    ("confidence penalty", (0.1, 0.3, 1.0, 3.0), 0.0),
    ("label smoothing", (0.03, 0.1, 0.3, 0.6), 0.0),
    ("mixup", (0.3, 1.0, 3.0, 10.0), 0.0),
    ("dropout", DROPOUT, 0.0),
    ("weight decay", (0.5, 1.5, 5.0, 15.0), None),
    ("ConditionalEntropy", ENTROPY, 0.0),
    ("dropout + weight decay", DROPOUT, 0.5),
    ("ConditionalEntropy + weight decay", ENTROPY, 0.5),
]


@functools.cache
def data(seed: int, raw: bool) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Images, true labels and given labels of the three parts.

    Raw images have pixels from 0 to 1, else those of the training images have mean 0, and standard
    deviation 1 over all pixels. With raw ones 500 steps end before many wrong labels are learned.
    """
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=generator)
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    if not raw:
        x = (x - x[:TRAIN].mean(0)) / x[:TRAIN].std()
    y = torch.tensor(labels)[order]
    wrong = torch.rand(len(y), generator=generator) < NOISE
    other = (y + torch.randint(1, 10, y.shape, generator=generator)) % 10
    given = torch.where(wrong, other, y)
    sizes = [TRAIN, VALID, len(y) - TRAIN - VALID]
    parts = zip(x.split(sizes), y.split(sizes), given.split(sizes), strict=True)
    return dict(zip(("train", "valid", "test"), parts, strict=True))


def objective(name: str, value: float, model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What a method minimises, for images and labels."""
    criterion: nn.Module = nn.CrossEntropyLoss()
    if name.startswith("ConditionalEntropy"):
        term = ConditionalEntropy(weight=value)
    elif name == "confidence penalty":
        term = PredictiveEntropy(weight=value, maximize=True)
    else:
        if name == "label smoothing":
            criterion = nn.CrossEntropyLoss(label_smoothing=value)
        if name == "mixup":
            mix = torch.distributions.Beta(value, value)
            return lambda x, y: _mixed(model, x, y, mix.sample())
        return lambda x, y: criterion(model(x), y)

    def with_term(x: Tensor, y: Tensor) -> Tensor:
        outputs = model(x)
        return criterion(outputs, y) + term(outputs, y)

    return with_term


def _mixed(model: nn.Module, x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    other = torch.randperm(len(y))
    outputs = model(share * x + (1 - share) * x[other])
    return share * F.cross_entropy(outputs, y) + (1 - share) * F.cross_entropy(outputs, y[other])


def run(
    name: str, value: float, decay: float | None, seed: int, steps: int, raw: bool
) -> dict[str, float]:
    """Train one network, and measure it."""
    parts = data(seed, raw)
    if name == "fewer steps":
        steps = max(1, round(value * steps))
    torch.manual_seed(seed)
    drop = value if name.startswith("dropout") else 0.0
    model = nn.Sequential(
        nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(drop)),
        nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Dropout(drop)),
        nn.Linear(64, 10),
    )
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=2e-3, weight_decay=value if decay is None else decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    loss = objective(name, value, model)
    x, _, given = parts["train"]
    batches = torch.Generator().manual_seed(seed)
    order: list[Tensor] = []
    for _ in range(steps):
        if not order:
            order = list(torch.randperm(TRAIN, generator=batches).split(BATCH)[: TRAIN // BATCH])
        batch = order.pop()
        optimizer.zero_grad()
        loss(x[batch], given[batch]).backward()
        optimizer.step()
        schedule.step()

    model.eval()
    with torch.no_grad():
        outputs = {part: model(x) for part, (x, _, _) in parts.items()}
    _, y, given = parts["train"]
    fitted = outputs["train"].argmax(1) == given
    truth = parts["test"][1]
    # The expected loss of a test sample under the law of the given labels.
    law = F.one_hot(truth, 10) * (1 - NOISE - NOISE / 9) + NOISE / 9
    return {
        "valid": float(F.cross_entropy(outputs["valid"], parts["valid"][2])),
        "accuracy": 100 * float((outputs["test"].argmax(1) == truth).float().mean()),
        "loss": float(F.cross_entropy(outputs["test"], law)),
        "wrong labels learned": 100 * float(fitted[given != y].float().mean()),
    }


def compare(seeds: int, steps: int, raw: bool) -> dict[str, list[dict[str, float]]]:
    """All methods; for each seed the measures of the value chosen by validation."""
    chosen = {}
    for name, values, decay in METHODS:
        chosen[name] = [
            min(
                (run(name, value, decay, seed, steps, raw) | {"value": value} for value in values),
                key=lambda measured: measured["valid"],
            )
            for seed in range(seeds)
        ]
        print_row(name, chosen[name], chosen["nothing"])
    return chosen


def gain(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> tuple[float, float]:
    """Mean of the paired differences of accuracy, and its standard error (NaN for one seed)."""
    pairs = zip(ours, theirs, strict=True)
    gains = [one["accuracy"] - other["accuracy"] for one, other in pairs]
    error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
    return statistics.fmean(gains), error


def print_row(name: str, rows: list[dict[str, float]], nothing: list[dict[str, float]]) -> None:
    """One method's row of the table."""
    accuracy, loss, learned = (
        statistics.fmean(row[key] for row in rows)
        for key in ("accuracy", "loss", "wrong labels learned")
    )
    mean, error = gain(rows, nothing)
    values = [row["value"] for row in rows]
    picks = ", ".join(f"{value:g} x{values.count(value)}" for value in sorted(set(values)))
    print(
        f"| {name} | {accuracy:.1f} % | {mean:+.1f} ± {error:.1f} | {loss:.3f} "
        f"| {learned:.0f} % | {picks} |",
        flush=True,
    )


def draw(chosen: dict[str, list[dict[str, float]]], path: str) -> None:
    """Draw the accuracy of every seed, and how many wrong labels were learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    titles = {
        "accuracy": "accuracy on true labels, %",
        "wrong labels learned": "of wrong labels, %",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for place, (name, rows) in enumerate(chosen.items()):
            values = [row[key] for row in rows]
            color = "C1" if name.startswith("ConditionalEntropy") else "C0"
            axis.plot(values, [place] * len(values), "o", color=color, alpha=0.3, ms=4)
            axis.plot(statistics.fmean(values), place, "|", color=color, ms=18, mew=3)
        axis.set_yticks(range(len(chosen)), chosen)
        axis.set_xlabel(title)
        axis.grid(alpha=0.3)
    axes[0].set_title("test accuracy")
    axes[1].set_title("wrong training labels that were learned")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Compare, print the table and what ConditionalEntropy gains, and draw if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--raw", action="store_true", help="leave pixels between 0 and 1")
    parser.add_argument("--out", help="an image file for the plot")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| method | accuracy | gain over nothing | loss | wrong labels learned | chosen |")
    print("|---|---|---|---|---|---|")
    chosen = compare(arguments.seeds, arguments.steps, arguments.raw)
    entropy, with_decay = "ConditionalEntropy", "ConditionalEntropy + weight decay"
    print()
    for ours, theirs in [
        *((entropy, name) for name, _, decay in METHODS[:7]),
        *((with_decay, name) for name in ("weight decay", "dropout + weight decay")),
    ]:
        mean, error = gain(chosen[ours], chosen[theirs])
        print(f"{ours} against {theirs}: {mean:+.1f} ± {error:.1f} points of accuracy")
    if arguments.out:
        draw(chosen, arguments.out)
        print(f"drawn in {arguments.out}")


if __name__ == "__main__":
    main()
