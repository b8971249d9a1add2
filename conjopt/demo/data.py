"""Scikit-learn's bundled digits and the networks trained on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "Split", "load_split", "make_model"]

MODELS = ("mlp", "cnn")
SIDE = 8  # pixels
CLASSES = 10


@dataclass(frozen=True)
class Split:
    """Images and labels to train on, and others to test with.

    Attributes:
        train_inputs: (n, 1, 8, 8), pixels between 0 and 1.
        train_targets: (n,), digits.
        test_inputs: (t, 1, 8, 8).
        test_targets: (t,).
    """

    train_inputs: Tensor
    train_targets: Tensor
    test_inputs: Tensor
    test_targets: Tensor


def load_split(seed: int) -> Split:
    """The 1797 digits, one in five held out for testing, each class in the same proportion.

    Args:
        seed: of the split.

    Returns:
        the split, in float32.

    Raises:
        ImportError: if scikit-learn is missing.

    Example:
        >>> split = load_split(seed=0)
        >>> split.train_inputs.shape, split.test_inputs.shape
        (torch.Size([1437, 1, 8, 8]), torch.Size([360, 1, 8, 8]))
        >>> split.train_inputs.min().item(), split.train_inputs.max().item()
        (0.0, 1.0)
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, digits = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16, digits, test_size=0.2, stratify=digits, random_state=seed)
    train_inputs, test_inputs = (
        torch.as_tensor(part, dtype=torch.float32).reshape(-1, 1, SIDE, SIDE) for part in parts[:2]
    )
    train_targets, test_targets = (torch.as_tensor(part, dtype=torch.long) for part in parts[2:])
    return Split(train_inputs, train_targets, test_inputs, test_targets)


def make_model(name: str, seed: int) -> nn.Module:
    """A network at torch's own initialisation; the global random state is left as it was.

    Args:
        name: one of `MODELS`: ``"mlp"`` has two hidden layers of 128 ReLU units, ``"cnn"`` two
            convolutions, a pooling and a linear layer. Neither normalises.
        seed: of the initialisation.

    Returns:
        the network, from (m, 1, 8, 8) to (m, 10).

    Raises:
        ValueError: if the name is not one of these.

    Example:
        >>> [sum(p.numel() for p in make_model(name, seed=0).parameters()) for name in MODELS]
        [26122, 9930]
        >>> torch.equal(*(make_model("mlp", seed=0)[1].weight for _ in range(2)))
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "mlp":
            return nn.Sequential(
                nn.Flatten(),
                nn.Linear(SIDE**2, 128),
                nn.ReLU(),
                nn.Linear(128, 128),
                nn.ReLU(),
                nn.Linear(128, CLASSES),
            )
        if name == "cnn":
            return nn.Sequential(
                nn.Conv2d(1, 16, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, kernel_size=3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(32 * (SIDE // 2) ** 2, CLASSES),
            )
    raise ValueError(f"make_model: expected one of {', '.join(MODELS)}, got {name!r}")
