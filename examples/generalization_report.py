"""What held-out digits certify of a network that was trained on noisy labels, and why.

A fifth of the labels is wrong, in training and held-out samples alike, so that both are draws of
one law. The network is trained on cross-entropy alone, and with the `ConditionalEntropy` of its
outputs. With --plot PREFIX, the reports are drawn to PREFIX-nothing.png and so on.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conjopt.bounds import GeneralizationReport, generalization_report
from conjopt.regularizers import ConditionalEntropy

CLIP = 4.0  # chosen beforehand: the greatest loss is then log(1 + 9 exp(8)) = 10.2


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1,000 training and 797 held-out digits, a fifth of them with another label."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels))
    x = torch.tensor(images, dtype=torch.float32)[order] / 16
    y = torch.tensor(labels)[order]
    wrong = torch.rand(len(y)) < 0.2
    y = torch.where(wrong, (y + torch.randint(1, 10, y.shape)) % 10, y)
    return TensorDataset(x[:1000], y[:1000]), TensorDataset(x[1000:], y[1000:])


def train(dataset: TensorDataset, term: nn.Module | None, epochs: int) -> nn.Module:
    """Train a small network, and clip what it returns."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    criterion = nn.CrossEntropyLoss()
    for _ in range(epochs):
        for inputs, targets in DataLoader(dataset, batch_size=128, shuffle=True):
            optimizer.zero_grad()
            outputs = network(inputs)
            loss = criterion(outputs, targets)
            if term is not None:
                loss = loss + term(outputs, targets)
            loss.backward()
            optimizer.step()
    return nn.Sequential(network, nn.Hardtanh(-CLIP, CLIP))


def main() -> None:
    """Print a report of each network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--plot", metavar="PREFIX")
    options = parser.parse_args()
    training, heldout = digits()
    for name, term in (("nothing", None), ("ConditionalEntropy", ConditionalEntropy(0.3))):
        report: GeneralizationReport = generalization_report(
            train(training, term, options.epochs),
            nn.CrossEntropyLoss(),
            DataLoader(training, batch_size=500),
            DataLoader(heldout, batch_size=500),
            max_output=CLIP,
        )
        print(f"--- {name}\n{report}\n")
        if options.plot:
            report.plot(f"{options.plot}-{name}.png")


if __name__ == "__main__":
    main()
