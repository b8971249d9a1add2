"""Checks at the door of `ConjSGD`: what was given, what was expected, what to do."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from conjopt.bounds import ConvergenceLedger
from conjopt.measure.process_group import Ranks
from conjopt.measure.shards import group_of, reshard
from conjopt.optim.directions import Direction, Momentum, Spectral
from conjopt.optim.gradient_rules import GradientEdge, PolyakStep, Smoothness
from conjopt.optim.statistics import SAVED
from conjopt.optim.step_size import Constant, Edge, StepRule

__all__ = [
    "belong",
    "controller",
    "count",
    "data_floor",
    "dense",
    "direction",
    "fitting",
    "given_parameters",
    "group",
    "ledger",
    "modules",
    "number",
    "outside_backward",
    "positive",
    "ranks",
    "shared",
    "some",
    "step_rule",
    "still_in",
]

DIRECTIONS: dict[str, type[Direction]] = {"spectral": Spectral, "sgd": Momentum}


def modules(
    model: object, loss: object
) -> tuple[nn.Module, nn.Module, DistributedDataParallel | None]:
    """The two modules, if they can be watched, and what wraps the model."""
    use = "ConjSGD(model.parameters(), model=model, loss=criterion)"
    for name, value in (("model", model), ("loss", loss)):
        if not isinstance(value, nn.Module):
            what = "nothing" if value is None else f"a {type(value).__name__}"
            raise TypeError(
                f"ConjSGD: got {what} as {name}=, expected the torch.nn.Module that the training "
                f"loop calls: {use}"
            )
    assert isinstance(model, nn.Module)
    assert isinstance(loss, nn.Module)
    if isinstance(model, DataParallel):
        raise TypeError(
            "ConjSGD: got a DataParallel as model=, whose copies of the model cannot be watched; "
            "use torch.nn.parallel.DistributedDataParallel, or train the inner module on one device"
        )
    first = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", None)
    if first is not None and any(isinstance(part, first) for part in model.modules()):
        raise TypeError(
            "ConjSGD: the model has a FullyShardedDataParallel, whose flat shards hide the layers' "
            "matrices; shard with torch.distributed.fsdp.fully_shard (FSDP2)"
        )
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, DistributedDataParallel):  # whose module is watched as ever
        model = compiled
    if isinstance(model, DistributedDataParallel):
        return model.module, loss, model
    return model, loss, None


def ranks(group: Any, model: nn.Module, rule: StepRule) -> Ranks:
    """The processes of a group, None for those of a sharded model or a single one."""
    sharding = group_of(model.parameters())
    if sharding is not None and isinstance(rule, GradientEdge | Smoothness):
        raise ValueError(
            f"ConjSGD: step_rule={rule.name!r} of direction='sgd' goes by curvature products, "
            "which cannot be measured on sharded parameters; use direction='spectral', or "
            "step_rule='polyak' or 'constant'"
        )
    if group is None:
        return Ranks(sharding)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            f"ConjSGD: process_group={group!r}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first, or leave process_group out"
        )
    return Ranks(group)


def shared(model: nn.Module, of: Ranks) -> None:
    """Refuse what several ranks cannot measure together."""
    if of.several and any(isinstance(m, nn.SyncBatchNorm) for m in model.modules()):
        raise RuntimeError(
            "ConjSGD: the model has a SyncBatchNorm, whose forward waits for the other ranks and "
            "cannot be run again for a measurement; use BatchNorm, or step_rule='constant'"
        )


def direction(given: str | Direction, known: Mapping[str, Direction] | None = None) -> Direction:
    """The direction of a name, or the given one; those that are known come first."""
    known = {} if known is None else known
    if isinstance(given, Direction):
        if known.get(given.name, given) is not given:
            raise ValueError(
                f"ConjSGD: two groups have directions of the name {given.name!r} that are not the "
                "same object; give both the same one, or give the class of one another name"
            )
        return given
    if given in known:
        return known[given]
    if given not in DIRECTIONS:
        raise ValueError(
            f"ConjSGD: direction={given!r}, expected one of {sorted(DIRECTIONS)} or a Direction"
        )
    return DIRECTIONS[given]()


ALONG_GRADIENT: dict[str, type[StepRule]] = {
    "edge": GradientEdge,
    "polyak": PolyakStep,
    "smoothness": Smoothness,
}


def step_rule(given: str | StepRule, of: Direction) -> StepRule:
    """The step rule of a name for a direction, or the given one."""
    rules: dict[str, type[StepRule]] = {"constant": Constant}
    rules |= {"edge": Edge} if of.held_out else ALONG_GRADIENT
    if isinstance(given, StepRule):
        if isinstance(given, Edge | GradientEdge | PolyakStep | Smoothness) and not isinstance(
            given, tuple(rules.values())
        ):
            raise ValueError(
                f"ConjSGD: step_rule={type(given).__name__} does not go with "
                f"direction={of.name!r}; use Edge with held-out directions such as 'spectral', "
                "GradientEdge, Smoothness or PolyakStep with 'sgd'"
            )
        return given
    if given not in rules:
        only = "; 'smoothness' and 'polyak' go with direction='sgd'" if of.held_out else ""
        raise ValueError(
            f"ConjSGD: step_rule={given!r}, expected one of {sorted(rules)} or a StepRule{only}"
        )
    return rules[given]()


def data_floor(given: float | str) -> float | None:
    """The floor as a number, None for automatic."""
    if isinstance(given, str):
        if given != "auto":
            raise ValueError(f"ConjSGD: data_floor={given!r}, expected 'auto' or a number")
        return None
    if given is None or not math.isfinite(given):
        raise ValueError(f"ConjSGD: data_floor={given}, expected 'auto' or a finite number")
    return float(given)


def ledger(given: object) -> ConvergenceLedger | None:
    """The ledger, if it is one."""
    if given is not None and not isinstance(given, ConvergenceLedger):
        raise TypeError(
            f"ConjSGD: got a {type(given).__name__} as ledger=, expected a "
            "conjopt.bounds.ConvergenceLedger(model, criterion, inputs, targets, whole=...)"
        )
    return given


def number(
    name: str, value: Any, least: float, most: float = math.inf, *, open_end: bool = False
) -> None:
    """Refuse what is no finite number in a range."""
    try:
        real = float(value)
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor of several numbers
        real = math.nan
    if not math.isfinite(real) or real < least or real > most or (open_end and real == most):
        end = "" if math.isinf(most) else f" and {'<' if open_end else '<='} {most:g}"
        raise ValueError(f"ConjSGD: {name}={value!r}, expected a finite number >= {least:g}{end}")


def count(name: str, value: Any, least: int) -> None:
    """Refuse what is no whole number from some least one on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"ConjSGD: {name}={value!r}, expected a whole number >= {least}")


def group(options: Mapping[str, Any], rule: StepRule, of: Direction) -> None:
    """Refuse hyperparameters of a group that are out of range."""
    number("lr", options["lr"], 0)
    number("momentum", options["momentum"], 0, 1, open_end=True)
    number("weight_decay", options["weight_decay"], 0)
    number("dampening", options["dampening"], 0, 1)
    if options["max_step"] is not None:
        number("max_step", options["max_step"], 0)
    if options["nesterov"] and options["momentum"] > 0 and options["dampening"] != 0:
        raise ValueError(
            f"ConjSGD: dampening={options['dampening']} with nesterov=True; Nesterov's look-ahead "
            "needs dampening=0, or pass nesterov=False"
        )
    own = options["direction"]
    if own != of.name and rule.measures and not of.held_out:
        raise ValueError(
            f"ConjSGD: a group has direction={own!r} while the rule {rule.name!r} of "
            f"direction={of.name!r} goes by the gradient alone; make 'spectral' the direction of "
            "the optimizer and give the groups that differ direction='sgd', or use "
            "step_rule='constant'"
        )
    if options["coupled_weight_decay"] and rule.measures and of.held_out:
        raise ValueError(
            f"ConjSGD: coupled_weight_decay=True with direction={of.name!r}, whose two halves of a "
            "batch would share it unequally; leave weight decay decoupled, or use direction='sgd'"
        )
    if options["maximize"] and rule.measures:
        raise ValueError(
            "ConjSGD: maximize=True, but the step rule measures how far a loss is above its floor; "
            "minimize the criterion, or use step_rule='constant'"
        )


def given_parameters(params: Any) -> list[Any]:
    """The parameters or groups as a list, if there are any."""
    if isinstance(params, Tensor | Mapping):
        raise TypeError(
            f"ConjSGD: got a {type(params).__name__} as params, expected an iterable of parameters "
            "or of dicts: pass model.parameters()"
        )
    listed = list(params)
    some(listed)
    return listed


def some(parameters: Sequence[Any]) -> None:
    """Refuse an empty list, also if it came from groups that are all empty."""
    if not parameters:
        raise ValueError(
            "ConjSGD: got an empty parameter list (a generator that was used up, or a model "
            "without parameters?); pass model.parameters()"
        )


def belong(params: Iterable[Tensor], names: Mapping[int, str], model: nn.Module) -> None:
    """Refuse parameters that are not the model's, or complex."""
    for parameter in params:
        if id(parameter) not in names:
            raise ValueError(
                f"ConjSGD: a parameter of shape {tuple(parameter.shape)} is not one of the "
                f"parameters of model={type(model).__name__}; pass the module that holds all of "
                "them as model=, or its parameters() as params"
            )
        if parameter.is_complex():
            raise ValueError(
                f"ConjSGD: parameter {names[id(parameter)]!r} is complex, expected real; hold real "
                "and imaginary parts in two real parameters"
            )


def still_in(model: nn.Module, names: Mapping[int, str]) -> None:
    """Refuse parameters that the model has replaced, whose gradients nobody will make."""
    reshard(model)
    now = {id(p) for p in model.parameters()}
    if now.isdisjoint(names):
        raise RuntimeError(
            f"ConjSGD: the parameters of {type(model).__name__} are others than when the optimizer "
            "was made; make the optimizer after fully_shard, or whatever replaced them"
        )


def dense(parameters: Iterable[Tensor]) -> None:
    """Refuse sparse and complex gradients."""
    for parameter in parameters:
        gradient = parameter.grad
        assert gradient is not None
        if gradient.layout != torch.strided:
            raise RuntimeError(
                f"ConjSGD: the gradient of a parameter of shape {tuple(parameter.shape)} is sparse "
                f"({gradient.layout}), expected dense; use nn.Embedding(..., sparse=False)"
            )
        if gradient.is_complex():
            raise RuntimeError(
                f"ConjSGD: the gradient of a parameter of shape {tuple(parameter.shape)} is "
                "complex, expected real"
            )


def outside_backward() -> None:
    """Refuse a step from a hook of the very backward pass whose batch is to be measured."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "ConjSGD.step was called inside a backward pass, as optimizers in hooks that wait for "
            "gradients to accumulate do; the batch is not known before its end. Call step() after "
            "backward(), or use step_rule='constant'"
        )


def positive(weight: Tensor) -> None:
    """Refuse a criterion that enters the loss negated; a device is not asked."""
    if weight.device.type == "cpu" and bool(weight < 0):
        raise RuntimeError(
            f"ConjSGD: the criterion enters the loss with the factor {float(weight):g}, expected a "
            "positive one: the step rule brings the criterion down to its floor. Minimize the "
            "criterion itself, or use step_rule='constant'"
        )


def controller(state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a state that the base class does not know, if it is whole."""
    load = "load a state that ConjSGD.state_dict() made"
    groups = state_dict.get("param_groups") if isinstance(state_dict, Mapping) else None
    if not groups or not isinstance(state_dict.get("state"), Mapping):
        what = sorted(state_dict) if isinstance(state_dict, Mapping) else type(state_dict).__name__
        raise ValueError(
            "ConjSGD.load_state_dict: expected the state of a ConjSGD with 'state' and "
            f"'param_groups', got {what}; {load}"
        )
    found = groups[0].get("controller")
    if not isinstance(found, Mapping) or found.get("version") != 1:
        raise ValueError(
            "ConjSGD.load_state_dict: expected the state of a ConjSGD with a 'controller' of "
            f"version 1, got a first group with {sorted(groups[0])}; {load}"
        )
    missing = {"calls", "trust_only", "statistics"} - set(found)
    statistics = found.get("statistics", dict.fromkeys(SAVED, 0))
    missing |= SAVED - set(statistics)
    if "batches" in found:
        missing |= {"times", "batch_size"} - set(found["batches"])
    if missing:
        raise ValueError(f"ConjSGD.load_state_dict: the controller lacks {sorted(missing)}; {load}")
    kinds = {"calls": int, "trust_only": bool, "statistics": dict, "batches": dict, "chunks": int}
    damaged = [
        name for name, kind in kinds.items() if not isinstance(found.get(name, kind()), kind)
    ]
    if damaged or not isinstance(statistics["measured"], int):
        raise ValueError(
            f"ConjSGD.load_state_dict: {damaged or ['measured']} of the controller are of another "
            f"kind than they were saved; {load}"
        )
    for name in SAVED - {"measured"}:
        if not isinstance(statistics[name], Tensor) or statistics[name].numel() != 1:
            raise ValueError(
                f"ConjSGD.load_state_dict: {name}={statistics[name]!r}, expected a tensor of one "
                f"number; {load}"
            )
    return found


def fitting(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the state of other parameters, as far as their shapes tell."""
    for ours, saved in zip(groups, state_dict["param_groups"], strict=False):
        for parameter, number in zip(ours["params"], saved["params"], strict=False):
            shapes = {"momentum_buffer": parameter.shape, "average": parameter.shape}
            shapes |= {"slopes": (2,), "shrinkage": (), "square": (), "square_weight": ()}
            for key, value in state_dict["state"].get(number, {}).items():
                expected = tuple(shapes.get(key, getattr(value, "shape", ())))
                if not isinstance(value, Tensor) or value.shape != expected:
                    got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
                    raise ValueError(
                        f"ConjSGD.load_state_dict: {key} of parameter {number} is {got}, expected "
                        f"a tensor of shape {expected} for a parameter of shape "
                        f"{tuple(parameter.shape)}; load the state of the same model, with its "
                        "parameters in the same order"
                    )
