"""How depth, width, skip connections and pruning move the structure matrix, on digits.

Six networks train alike. Before each epoch, the extreme eigenvalues of the structure matrices, the
gradient energy and the bounds of Thm 2.3 are measured on 64 training images. --plot draws them.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.utils import prune

from conjopt.bounds import risk_sandwich

PROBED = 64  # images that are measured


class Residual(nn.Module):
    """`h + F(h)` with one hidden layer, and nothing after the sum."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        """Map `(m, width)` to `(m, width)`."""
        return h + self.outer(torch.relu(self.inner(h)))


def plain(depth: int, width: int) -> nn.Sequential:
    """Fully connected layers with ReLU between them."""
    layers: list[nn.Module] = [nn.Linear(64, width), nn.ReLU()]
    for _ in range(depth - 2):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def residual(depth: int, width: int) -> nn.Sequential:
    """As many layers, in residual blocks of two."""
    blocks = [Residual(width) for _ in range((depth - 2) // 2)]
    return nn.Sequential(nn.Linear(64, width), *blocks, nn.Linear(width, 10))


def pruned(share: float, depth: int, width: int) -> nn.Sequential:
    """A plain network without the smallest share of each layer's weights, which stay 0."""
    network = plain(depth, width)
    for module in network:
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", share)
    return network


NETWORKS = {
    "shallow (3 layers of 64)": lambda: plain(3, 64),
    "deep plain (12 layers of 64)": lambda: plain(12, 64),
    "deep residual (12 layers of 64)": lambda: residual(12, 64),
    "narrow (3 layers of 16)": lambda: plain(3, 16),
    "wide (3 layers of 512)": lambda: plain(3, 512),
    "wide, 95 % pruned": lambda: pruned(0.95, 3, 512),
}


def run(make, x: torch.Tensor, y: torch.Tensor, epochs: int) -> list[dict[str, float]]:
    """Train one network; return what was measured before each epoch and after the last."""
    torch.manual_seed(0)
    model, criterion = make(), nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train_set = torch.utils.data.TensorDataset(x, y)
    loader = torch.utils.data.DataLoader(train_set, batch_size=64, shuffle=True)
    measured = []
    for epoch in range(epochs + 1):
        sandwich = risk_sandwich(model, criterion, x[:PROBED], y[:PROBED])
        means = sandwich.mean()
        measured.append(
            {
                "lo": float(sandwich.lo.median()),
                "hi": float(sandwich.hi.median()),
                "energy": float(sandwich.gradient_norms.square().mean()),
                "lower": float(means.lower),
                "risk": float(means.losses),
                "upper": float(means.upper),
            }
        )
        for inputs, targets in loader if epoch < epochs else ():
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    return measured


def draw(runs: dict[str, list[dict[str, float]]], path: str) -> None:
    """Draw eigenvalues, gradient energy and the sandwich over the epochs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7), layout="constrained")
    titles = {
        "lo": "least eigenvalue of $A_x$ on $V$ (median)",
        "hi": "greatest eigenvalue of $A_x$ on $V$ (median)",
        "energy": "gradient energy $E$",
        "risk": "mean loss, between the bounds of Thm 2.3",
    }
    for axis, (key, title) in zip(axes.flat, titles.items(), strict=True):
        for name, measured in runs.items():
            values = [row[key] for row in measured]
            (line,) = axis.semilogy(values, label=name)
            if key == "risk":
                low, high = ([row[side] for row in measured] for side in ("lower", "upper"))
                axis.semilogy(low, color=line.get_color(), ls=":", lw=1)
                axis.semilogy(high, color=line.get_color(), ls="--", lw=1)
        axis.set_title(title)
        axis.set_xlabel("epoch")
        axis.grid(alpha=0.3)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train all, print a table, and draw if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12, help="default 12")
    parser.add_argument("--plot", metavar="FILE", help="where to draw the picture")
    arguments = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float64) / 16, torch.tensor(labels)
    torch.set_default_dtype(torch.float64)
    runs = {name: run(make, x, y, arguments.epochs) for name, make in NETWORKS.items()}
    print(f"{'first -> last':32} {'lo':14} {'hi':15} {'energy':15} {'loss':14} bounds")
    for name, measured in runs.items():
        first, last = measured[0], measured[-1]
        keys = ("lo", "hi", "energy", "risk")
        moves = "  ".join(f"{first[k]:5.3g} -> {last[k]:<5.3g}" for k in keys)
        print(f"{name:32} {moves}   [{last['lower']:.2g}, {last['upper']:.2g}]")
    if arguments.plot:
        draw(runs, arguments.plot)


if __name__ == "__main__":
    main()
