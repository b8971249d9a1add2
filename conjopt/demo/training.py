"""One run of the demo: an ordinary training loop, timed, with its evaluations."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from typing import TypeAlias

import torch
from torch import Tensor, nn

import conjopt
from conjopt.demo.data import Split, make_model
from conjopt.report.history import Value

__all__ = ["BATCH_SIZE", "OPTIMIZERS", "Record", "steps_per_epoch", "train"]

BATCH_SIZE = 64
EVALUATIONS_PER_EPOCH = 4
# ConjSGD measures at each of its first steps: some of both kinds, so that no run pays for what
# torch does once in a process.
WARMUP_STEPS = 3

Record: TypeAlias = "dict[str, Value]"


def _conj_sgd(model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    return conjopt.ConjSGD(model.parameters(), model=model, loss=criterion)


def _sgd(model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _adamw(model: nn.Module, criterion: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=3e-3)


OPTIMIZERS: dict[str, Callable[[nn.Module, nn.Module], torch.optim.Optimizer]] = {
    "ConjSGD": _conj_sgd,
    "SGD": _sgd,
    "AdamW": _adamw,
}


def steps_per_epoch(split: Split) -> int:
    """Batches in an epoch, the last and smaller one included.

    Args:
        split: its training part is meant.

    Returns:
        the number of steps.

    Example:
        >>> from conjopt.demo.data import load_split
        >>> steps_per_epoch(load_split(seed=0))
        23
    """
    return math.ceil(len(split.train_targets) / BATCH_SIZE)


def train(
    model_name: str,
    optimizer_name: str,
    seed: int,
    *,
    split: Split,
    epochs: int,
    on_record: Callable[[Record], None],
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Train one network by one optimizer.

    The seed fixes initialisation and batches, whatever the optimizer. The global random state is
    left as it was. Seconds are those of the process's CPU, over all its threads, without the
    evaluations and without whatever the two callbacks do.

    Args:
        model_name: see `make_model`.
        optimizer_name: one of `OPTIMIZERS`.
        seed: of initialisation and batches.
        split: the data.
        epochs: passes through the training images.
        on_record: gets each evaluation, at the start and four times an epoch: the ``model``,
            ``optimizer`` and ``seed``, ``epoch`` and ``step``, ``cpu_seconds``, ``train_loss`` over
            all the training images, ``test_loss``, ``test_accuracy`` (a share), and ``step_size``
            (of the last step; None before the first).
        on_step: called before each step; to end the run it may raise.

    Example:
        >>> from conjopt.demo.data import load_split
        >>> records = []
        >>> train("mlp", "SGD", 0, split=load_split(0), epochs=1, on_record=records.append)
        >>> [record["step"] for record in records]
        [0, 6, 12, 18, 23]
        >>> records[0]["train_loss"] > records[-1]["train_loss"]
        True
    """
    steps = steps_per_epoch(split)
    evaluated = {
        math.ceil(steps * part / EVALUATIONS_PER_EPOCH)
        for part in range(1, EVALUATIONS_PER_EPOCH + 1)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make_model(model_name, seed)
        _warm_up(model, optimizer_name, split)
        criterion = nn.CrossEntropyLoss()
        optimizer = OPTIMIZERS[optimizer_name](model, criterion)
        torch.manual_seed(seed)
        step, seconds = 0, 0.0

        def evaluate() -> None:
            on_record(
                {
                    "model": model_name,
                    "optimizer": optimizer_name,
                    "seed": seed,
                    "epoch": step / steps,
                    "step": step,
                    "cpu_seconds": seconds,
                    **_evaluate(model, split),
                    "step_size": _step_size(optimizer) if step else None,
                }
            )

        evaluate()
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for number, batch in enumerate(_batches(split, generator), start=1):
                on_step()
                start = time.process_time()
                _step(model, criterion, optimizer, split, batch)
                seconds += time.process_time() - start
                step += 1
                if number in evaluated:
                    evaluate()


def _step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: torch.optim.Optimizer,
    split: Split,
    batch: Tensor,
) -> None:
    optimizer.zero_grad()
    criterion(model(split.train_inputs[batch]), split.train_targets[batch]).backward()
    optimizer.step()


def _warm_up(model: nn.Module, optimizer_name: str, split: Split) -> None:
    model, criterion = copy.deepcopy(model), nn.CrossEntropyLoss()
    optimizer = OPTIMIZERS[optimizer_name](model, criterion)
    for _ in range(WARMUP_STEPS):
        _step(model, criterion, optimizer, split, torch.arange(BATCH_SIZE))
    _evaluate(model, split)


def _batches(split: Split, generator: torch.Generator) -> Iterator[Tensor]:
    order = torch.randperm(len(split.train_targets), generator=generator)
    yield from order.split(BATCH_SIZE)


@torch.no_grad()
def _evaluate(model: nn.Module, split: Split) -> Record:
    model.eval()
    train_outputs, test_outputs = model(split.train_inputs), model(split.test_inputs)
    model.train()
    correct = (test_outputs.argmax(1) == split.test_targets).double().mean()
    return {
        "train_loss": _mean_loss(train_outputs, split.train_targets),
        "test_loss": _mean_loss(test_outputs, split.test_targets),
        "test_accuracy": correct.item(),
    }


def _mean_loss(outputs: Tensor, targets: Tensor) -> float:
    return nn.functional.cross_entropy(outputs.double(), targets).item()


def _step_size(optimizer: torch.optim.Optimizer) -> float:
    group = optimizer.param_groups[0]
    return float(group.get("step_size", group["lr"]))
