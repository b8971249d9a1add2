"""Where the step rule is weak, or was: tiny batches, deep plain networks, scaled data.

ConjSGD at its defaults, and with lr=0.3, beside AdamW at 3e-3 (1e-2 for regression), 600 steps each
on synthetic data: the final loss of each seed on all samples, and the greatest loss of a batch over
the first.

    python tests/benchmarks/weak_spots.py [--seeds 3]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

from conjopt import ConjSGD

STEPS = 600


def network(depth: int, width: int, outputs: int) -> nn.Module:
    """A plain ReLU network of some hidden layers."""
    layers: list[nn.Module] = [nn.Linear(10, width), nn.ReLU()]
    for _ in range(depth - 1):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, outputs))


def run(
    seed: int,
    method: str,
    *,
    batch: int = 64,
    depth: int = 2,
    width: int = 64,
    inputs: float = 1.0,
    targets: float | None = None,
) -> tuple[float, float]:
    """Final loss on all samples, and the greatest batch loss over the first."""
    torch.manual_seed(seed)
    x = torch.randn(1024, 10)
    y = x[:, :3].argmax(1)
    criterion: nn.Module = nn.CrossEntropyLoss()
    if targets is not None:
        y = targets * torch.stack([x[:, 0].sin() + x[:, 1], x[:, 2] * x[:, 3], x[:, 4].abs()], 1)
        criterion = nn.MSELoss()
    x = inputs * x
    model = network(depth, width, 3)
    if method == "AdamW":
        rate = 3e-3 if targets is None else 1e-2
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    else:
        factor = 0.3 if method.endswith("0.3") else 1.0
        optimizer = ConjSGD(model.parameters(), model=model, loss=criterion, lr=factor)
    losses = []
    for _ in range(STEPS):
        chosen = torch.randint(len(x), (batch,))
        optimizer.zero_grad()
        loss = criterion(model(x[chosen]), y[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        return criterion(model(x), y).item(), max(losses) / losses[0]


CASES = {
    **{f"batches of {size}": {"batch": size} for size in (1, 2, 4, 8, 16)},
    "10 hidden layers of 64": {"depth": 10},
    "20 hidden layers of 64": {"depth": 20},
    "20 hidden layers of 32": {"depth": 20, "width": 32},
    "regression, targets times 1000": {"batch": 32, "targets": 1000.0},
    "inputs times 0.01": {"inputs": 0.01},
    "inputs times 100": {"inputs": 100.0},
}


def main() -> None:
    """Run everything and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="seeds from 0 (default 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| case | optimizer | final loss of each seed | greatest over first loss |")
    print("|---|---|---|---|")
    for case, options in CASES.items():
        for method in ("ConjSGD", "ConjSGD, lr 0.3", "AdamW"):
            found = [run(seed, method, **options) for seed in range(arguments.seeds)]
            finals = ", ".join(f"{final:.3g}" for final, _ in found)
            print(f"| {case} | {method} | {finals} | {max(m for _, m in found):.2g} |", flush=True)


if __name__ == "__main__":
    main()
