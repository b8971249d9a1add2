"""The loss of a transformers Trainer, computed by a criterion that can be watched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from conjopt.losses.reading import ClassTargets
from conjopt.losses.recognise import potential_of

__all__ = ["trainer_loss"]


def trainer_loss(criterion: nn.Module, *, shift: bool) -> Callable[..., Tensor]:
    """A ``compute_loss_func`` for transformers' Trainer that calls a criterion module.

    Models of transformers compute their loss inside, by a function, where `ConjSGD` sees neither
    the targets nor the scale. With this the Trainer hands logits and labels to a module, and
    divides by the labels of all accumulated micro-batches, as transformers' own losses do.

    Args:
        criterion: `torch.nn.CrossEntropyLoss(reduction="sum")` or a Fenchel-Young loss of this
            package for classes; the one that the optimizer was given. It takes logits of shape
            (N, classes) and N labels, of which it ignores -100.
        shift: whether the logits of a place predict the label of the next one, as in causal
            language models; False for masked ones, and for labels of tokens or sequences.

    Returns:
        A function of outputs with ``logits``, labels, and ``num_items_in_batch``.

    Raises:
        TypeError: If the criterion is not one for classes.
        ValueError: If its reduction is not "sum", as a mean over each micro-batch would weigh
            short ones more, or if it does not ignore -100, which the Trainer does not count.

    Example:
        >>> from types import SimpleNamespace
        >>> loss = trainer_loss(nn.CrossEntropyLoss(reduction="sum"), shift=True)
        >>> outputs = SimpleNamespace(logits=torch.zeros(1, 4, 2))
        >>> loss(outputs, torch.tensor([[0, 1, 1, -100]]), num_items_in_batch=2)
        tensor(0.6931)
    """
    if not isinstance(potential_of(criterion), ClassTargets):
        raise TypeError(
            f"trainer_loss: got a {type(criterion).__name__}, expected a criterion for classes, "
            "such as CrossEntropyLoss; for other targets write the function yourself: it calls the "
            "criterion on outputs and labels"
        )
    if (reduction := getattr(criterion, "reduction", None)) != "sum":
        raise ValueError(
            f"trainer_loss: the criterion has reduction={reduction!r}, expected 'sum': the Trainer "
            'divides by the labels of all micro-batches; use CrossEntropyLoss(reduction="sum")'
        )
    if (ignored := getattr(criterion, "ignore_index", None)) != -100:
        raise ValueError(
            f"trainer_loss: the criterion has ignore_index={ignored!r}, expected -100: the Trainer "
            "counts all other labels"
        )

    def loss(
        outputs: Any, labels: Tensor | None, num_items_in_batch: Tensor | float | None = None
    ) -> Tensor:
        if labels is None:
            raise ValueError(
                "trainer_loss: the batch has no labels; name them 'labels' in the data set"
            )
        logits = outputs.logits
        if shift:
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        labels = labels.flatten().to(logits.device)
        if num_items_in_batch is None:
            num_items_in_batch = (labels != ignored).sum()
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(logits.device)
        return criterion(logits.flatten(0, -2), labels) / num_items_in_batch

    return loss
