"""Five ways in which training gets stuck, each planted on digits, diagnosed, and remedied.

For each, `conjopt.diagnose` says which of the five causes of Thm 2.3 holds the loss up; then its
remedy is applied, and the loss before and after is printed.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import conjopt

digits = load_digits()
X = torch.tensor(digits.data, dtype=torch.float32) / 16
Y = torch.tensor(digits.target)
criterion = nn.CrossEntropyLoss()


def network(depth: int = 1, activation: type[nn.Module] = nn.ReLU, width: int = 32) -> nn.Module:
    """Fully connected layers on the 64 pixels."""
    layers: list[nn.Module] = [nn.Linear(64, width), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), activation()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def train(model, x, y, steps: int, lr: float, batch: int = 64, momentum: float = 0.9):
    """Train with plain SGD; return the optimizer."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    for _ in range(steps):
        rows = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        criterion(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return optimizer


def loss_of(model, x, y) -> float:
    """The loss on all samples."""
    with torch.no_grad():
        return float(criterion(model(x), y))


def report(title: str, model, x, y, optimizer, batch: int = 64) -> float:
    """Print the diagnosis, and return the loss."""
    loader = DataLoader(TensorDataset(x, y), batch_size=batch, shuffle=True)
    found = conjopt.diagnose(model, criterion, loader, optimizer=optimizer)
    print(f"--- planted: {title}\n{found}")
    return loss_of(model, x, y)


def remedied(what: str, before: float, after: float) -> None:
    """Print what the remedy did."""
    print(f"remedy applied: {what}\nloss {before:.3f} -> {after:.3f}\n")


def twice(x, y, apart: float):
    """Each sample and a copy of it with another label."""
    copies = x + apart * torch.randn_like(x)
    return torch.cat([x, copies]), torch.cat([y, (y + 1 + torch.randint(9, y.shape)) % 10])


def main() -> None:
    """Plant, diagnose and remedy."""
    torch.manual_seed(0)
    order = torch.randperm(len(X))
    x, y = X[order[:512]], Y[order[:512]]

    few_x, few_y = x[:64], y[:64]
    for title, apart in (("data floor", 0.0), ("conflicting samples", 1e-4)):
        both_x, both_y = twice(few_x, few_y, apart)
        model = network()
        optimizer = train(model, both_x, both_y, 1500, lr=0.1, batch=128)
        train(model, both_x, both_y, 500, lr=0.02, batch=128)
        before = report(title, model, both_x, both_y, optimizer)
        train(model, few_x, few_y, 300, lr=0.1)
        remedied(
            "drop the copies with wrong labels (loss on the rest)",
            before,
            loss_of(model, few_x, few_y),
        )

    model = network(6, nn.Sigmoid)
    optimizer = train(model, x, y, 500, lr=0.1)
    before = report("collapsed structure", model, x, y, optimizer)
    model = network(1, nn.ReLU)
    train(model, x, y, 500, lr=0.1)
    remedied("one hidden layer of ReLU, for as many steps", before, loss_of(model, x, y))

    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    before = report("gradient energy", model, x, y, optimizer)
    train(model, x, y, 300, lr=0.1)
    remedied("keep training", before, loss_of(model, x, y))

    noisy = torch.where(torch.rand(len(y)) < 0.1, torch.randint(10, y.shape), y)
    model = network(width=64)
    optimizer = train(model, x, noisy, 3000, lr=0.2, batch=2, momentum=0)
    before = report("batch noise", model, x, noisy, optimizer, batch=2)
    train(model, x, noisy, 500, lr=0.1, batch=128, momentum=0)
    remedied("larger batches, smaller steps", before, loss_of(model, x, noisy))


if __name__ == "__main__":
    main()
