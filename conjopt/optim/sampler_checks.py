"""Checks at the door of `AdaptiveBatchSampler`: what was given, what was expected, what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.utils.data import IterableDataset

__all__ = ["advises", "length", "numbers", "ranks", "sizes", "state", "whole"]

VERSION = 1  # of a state
KEYS = {"total", "num_replicas", "seed", "epoch", "position", "number", "planned", "done"}
KEYS |= {"batch_size", "wait", "pending", "history"}


def length(data_source: Any, sampler: Any) -> int:
    """Samples of an epoch, if that is known."""
    if isinstance(data_source, IterableDataset):
        raise TypeError(
            f"AdaptiveBatchSampler: got the iterable data set {type(data_source).__name__}, "
            "expected a map-style one with __getitem__ and __len__: an iterable data set chooses "
            "its samples itself; read it into a list first, or use batches of one size"
        )
    found = 0
    for name, value in ("data_source", data_source), ("sampler", sampler):
        if value is None and name == "sampler":
            continue
        try:
            found = len(value)
        except (TypeError, NotImplementedError):
            raise TypeError(
                f"AdaptiveBatchSampler: {name} is a {type(value).__name__} without a length, so "
                "that an epoch has no end; give it a __len__, or read it into a list first"
            ) from None
        if found < 1:
            raise ValueError(
                f"AdaptiveBatchSampler: {name} has no samples, expected at least 1; was the right "
                "split loaded?"
            )
    return found


def advises(optimizer: object) -> None:
    """Refuse an optimizer without a batch rule's interface."""
    if not callable(getattr(optimizer, "batch_advice", None)):
        raise TypeError(
            f"AdaptiveBatchSampler: a {type(optimizer).__name__} gives no batch_advice(); pass a "
            'conjopt.ConjSGD with batch_rule="correlation", say, or use torch\'s own BatchSampler '
            "for batches of one size"
        )


def sizes(batch_size: Any, least: Any, most: Any, micro: Any) -> None:
    """Refuse sizes that contradict each other."""
    whole("batch_size", batch_size, 1)
    whole("min_batch_size", least, 1)
    whole("max_batch_size", most, least, why="which is min_batch_size")
    whole("batch_size", batch_size, least, most, why="min_batch_size and max_batch_size")
    if micro is not None:
        whole("micro_batch_size", micro, 1, most, why="max_batch_size")


def numbers(*, factor: Any, **counts: Any) -> None:
    """Refuse what is no factor or count."""
    for name, count in counts.items():
        whole(name, count, 0 if name == "seed" else 1)
    if not isinstance(factor, int | float) or not math.isfinite(factor) or factor < 1:
        raise ValueError(
            f"AdaptiveBatchSampler: factor={factor!r}, expected a finite number >= 1; 1.5, say, to "
            "leave changes of less than a half alone"
        )


def ranks(total: int, batch_size: int, drop_last: bool, number: Any, rank: Any) -> None:
    """Refuse batches that do not go over the ranks, or of which there is none."""
    whole("num_replicas", number, 1)
    whole("rank", rank, 0, number - 1, why="num_replicas - 1")
    if batch_size % number:
        raise ValueError(
            f"AdaptiveBatchSampler: batch_size={batch_size} is that of all {number} ranks together "
            f"and no multiple of their number; use {math.ceil(batch_size / number) * number}"
        )
    if total < (batch_size if drop_last else number):
        raise ValueError(
            f"AdaptiveBatchSampler: {total} samples make no batch of {batch_size} on {number} "
            f"rank(s) with drop_last={drop_last}; use a smaller batch_size, drop_last=False, or "
            "fewer ranks"
        )


def state(given: Mapping[str, Any], **own: int) -> None:
    """Refuse the state of something else."""
    missing = KEYS - set(given)
    if given.get("version") != VERSION or missing:
        raise ValueError(
            f"AdaptiveBatchSampler.load_state_dict: expected a state of version {VERSION}, got "
            f"version {given.get('version')!r} without {sorted(missing)}; load what state_dict() "
            "made"
        )
    for key, value in own.items():
        if given[key] != value:
            raise ValueError(
                f"AdaptiveBatchSampler.load_state_dict: the state has {key}={given[key]}, this "
                f"sampler {value}; resume with the same data set and number of ranks"
            )


def whole(name: str, value: Any, least: int, most: int | None = None, *, why: str = "") -> None:
    """Refuse what is no whole number in a range."""
    inside = isinstance(value, int) and not isinstance(value, bool)
    if not inside or value < least or (most is not None and value > most):
        end = "" if most is None else f" and <= {most}"
        why = f" ({why})" if why else ""
        raise ValueError(
            f"AdaptiveBatchSampler: {name}={value!r}, expected a whole number >= {least}{end}{why}"
        )
