"""The state of a `ConjSGD`: what is saved, what is admitted, and what a copy takes along."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from conjopt.measure.watch import Watch
from conjopt.optim import checks
from conjopt.optim.batch_rule import BatchAdvisor
from conjopt.optim.directions import Direction
from conjopt.optim.memory import Memory
from conjopt.optim.statistics import Statistics
from conjopt.optim.step_size import StepRule

__all__ = ["Saved"]

BLOCK_STATE = ("square", "square_weight", "slopes", "shrinkage")  # of statistics' precision


class Saved(Optimizer):
    """An optimizer whose state is that of its parameters and of the controller over them.

    Example:
        >>> from conjopt import ConjSGD
        >>> issubclass(ConjSGD, Saved)
        True
    """

    _model: nn.Module
    _watch: Watch
    _rule: StepRule
    _direction: Direction
    _directions: dict[str, Direction]
    _batches: BatchAdvisor
    _memory: Memory
    _statistics: Statistics
    _names: dict[int, str]
    _calls: int
    _trust_only: bool

    def state_dict(self) -> dict[str, Any]:
        """The state for an exact resume, as in torch, with the statistics in its first group.

        Example:
            >>> from conjopt import ConjSGD
            >>> model = nn.Linear(2, 1)
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
            >>> state = optimizer.state_dict()
            >>> sorted(state), sorted(state["param_groups"][0]["controller"])
            (['param_groups', 'state'], ['calls', 'statistics', 'trust_only', 'version'])
        """
        own = self.register_state_dict_post_hook(
            lambda _, state: self._add_controller(state), prepend=True
        )
        try:
            return super().state_dict()
        finally:
            own.remove()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state; a run that goes on from it equals the unbroken one.

        Args:
            state_dict: from `state_dict` of a ConjSGD over the same parameters.

        Raises:
            ValueError: if it is of another optimizer or version, or does not fit; nothing is
                loaded then.

        Example:
            >>> from conjopt import ConjSGD
            >>> model = nn.Linear(2, 1)
            >>> optimizer = ConjSGD(model.parameters(), model=model, loss=nn.MSELoss())
            >>> optimizer.load_state_dict(optimizer.state_dict())
        """
        # After the hooks that others registered to adapt a state, and before those that read it.
        given: dict[str, Any] = {}
        own = [
            self.register_load_state_dict_pre_hook(lambda _, state: self._admit(state, given)),
            self.register_load_state_dict_post_hook(lambda _: self._take_up(given), prepend=True),
        ]
        kept = {name: value for name, value in self.__dict__.items() if not name.endswith("_hooks")}
        before = self._statistics.state_dict(), self._batches.state_dict()
        try:
            super().load_state_dict(state_dict)
        except Exception as error:
            self.__dict__.update(kept)  # torch makes new groups and states
            self._statistics.load_state_dict(before[0])
            self._batches.load_state_dict(before[1])
            if isinstance(error, ValueError):
                raise
            raise ValueError(
                f"ConjSGD.load_state_dict: the state is damaged ({error}); load a state that "
                "ConjSGD.state_dict() made"
            ) from error
        finally:
            for handle in own:
                handle.remove()

    def _add_controller(self, state: dict[str, Any]) -> dict[str, Any]:
        """Put what is no parameter's own into the first group, as more is lost on some ways.

        `torch.distributed.checkpoint.state_dict` and FSDP know "state" and "param_groups" alone.
        """
        controller = {
            "version": 1,
            "calls": self._calls,
            "trust_only": self._trust_only,
            "statistics": self._statistics.state_dict(),
        }
        if self._batches.rule is not None:
            controller["batches"] = self._batches.state_dict()
        if self._memory.chunks > 1:
            controller["chunks"] = self._memory.chunks
        state["param_groups"][0]["controller"] = controller
        return state

    def _admit(self, state: dict[str, Any], given: dict[str, Any]) -> None:
        """Refuse a state that does not fit; keep it for `_take_up`."""
        given["controller"], given["directions"] = checks.controller(state), {}
        checks.fitting(state, self.param_groups)
        for saved in state["param_groups"]:
            options = {**self.defaults, **saved}
            checks.group(options, self._rule, self._direction)
            given["directions"][options["direction"]] = checks.direction(
                options["direction"], self._directions
            )
        given.update(state)

    def _take_up(self, given: dict[str, Any]) -> None:
        """What torch leaves to do of loading a state."""
        self.param_groups[0].pop("controller", None)
        self._directions.update(given["directions"])
        controller = given["controller"]
        self._statistics.load_state_dict(controller["statistics"])
        self._calls, self._trust_only = controller["calls"], controller["trust_only"]
        self._batches.load_state_dict(controller.get("batches"))
        # torch casts a parameter's state to its type, and shares it where that changes nothing;
        # these keep their own type, and all of them their own memory.
        ordered = [p for group in self.param_groups for p in group["params"]]
        numbers = [i for group in given["param_groups"] for i in group["params"]]
        for parameter, number in zip(ordered, numbers, strict=True):
            for key, saved in given["state"].get(number, {}).items():
                value = saved if key in BLOCK_STATE else self.state[parameter][key]
                self.state[parameter][key] = value.clone().to(parameter.device)
        self._memory.chunks = controller.get("chunks", 1)
        self._watch.armed = self._needs_watch()

    def __getstate__(self) -> dict[str, Any]:
        """All but what others hung on this very object, as in torch: hooks, schedulers' wrappers.

        The model and the criterion belong to it, and are copied or pickled along.
        """
        left = {"step", "_names"} | {name for name in self.__dict__ if name.endswith("_hooks")}
        return {name: value for name, value in self.__dict__.items() if name not in left}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copied, pickled or loaded state; older ones get the defaults of newer options.

        Raises:
            TypeError: if the model itself holds the optimizer, and is not whole yet.
        """
        super().__setstate__(state)
        self._names = {id(p): name for name, p in self._model.named_parameters()}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                if name != "differentiable":  # torch's own, of no group here
                    group.setdefault(name, value)

    def _needs_watch(self) -> bool:
        """Whether the next step needs more of the loop than its losses."""
        raise NotImplementedError
