"""Running the model once more as it ran before: same inputs, random numbers and buffers."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.measure.graph_hooks import without_multi_grad_hooks
from conjopt.measure.shards import is_sharded, moved_in_place
from conjopt.measure.writes import Backup, copies, notice, remember, told, versions

__all__ = [
    "Pull",
    "RandomState",
    "Replay",
    "changed_buffers",
    "compiled_parts",
    "refuse_reentrant",
    "with_tied",
]

# Whether the model runs for a measurement, which other measurements are to leave alone.
REPLAYING: contextvars.ContextVar[bool] = contextvars.ContextVar("REPLAYING", default=False)

Pull = Callable[[Mapping[int, Tensor]], list[Tensor]]  # cotangents by place, to parameters
RandomState = tuple[Tensor, dict[torch.device, Tensor]]  # of the CPU, and of each CUDA device


@dataclasses.dataclass(eq=False)
class Replay:
    """A forward of the model that can be run again, with other parameters if wanted.

    The copy of the inputs, the state of the random number generators before the forward, and
    copies of the buffers, those that it changed as they were before it, make it the same function;
    no parameter or buffer of the model is written to: a forward that writes to parameters gets
    copies of those (`conjopt.measure.writes`). Parts that `torch.compile` was called on run
    uncompiled.

    Attributes:
        model: the module.
        args: its positional arguments.
        kwargs: its keyword arguments.
        random: the state of the generators before the forward.
        paused: a context in which the hooks of the watch are off.
        buffers: by name, what to start from in place of the model's own, see `changed_buffers`.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5))
        >>> state = Replay.random_state(model)
        >>> inputs = torch.ones(4, 2)
        >>> outputs = model(inputs)
        >>> (again,) = Replay(model, (inputs,), {}, state).run({})
        >>> torch.equal(outputs, again)
        True
    """

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    random: RandomState
    paused: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
    buffers: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    @staticmethod
    def random_state(model: nn.Module) -> RandomState:
        """The state of the random number generators that the model may draw from.

        Args:
            model: its parameters and buffers tell the devices.

        Example:
            >>> cpu, others = Replay.random_state(nn.Linear(2, 3))
            >>> cpu.dtype, others
            (torch.uint8, {})
        """
        devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
        return (
            torch.get_rng_state(),
            {device: torch.cuda.get_rng_state(device) for device in devices},
        )

    def run(self, parameters: Mapping[str, Tensor], *, copy: bool = True) -> list[Tensor | None]:
        """The output's leaves, None for those that are no floating-point tensors.

        Args:
            parameters: by name, what to use in place of the model's own.
            copy: whether to copy those parameters that the forward writes to (`writes.copies`).

        Example:
            >>> model = nn.Linear(2, 3)
            >>> replay = Replay(model, (torch.ones(4, 2),), {}, Replay.random_state(model))
            >>> [output.shape for output in replay.run({"bias": torch.zeros(3)})]
            [torch.Size([4, 3])]
        """
        return self._run(parameters, copy)[0]

    def run_telling_draws(
        self, parameters: Mapping[str, Tensor], *, copy: bool = True
    ) -> tuple[list[Tensor | None], bool]:
        """The same as `run`, and whether the model drew random numbers.

        Args:
            parameters: see `run`.
            copy: see `run`.

        Example:
            >>> model, inputs = nn.Dropout(0.5), (torch.ones(4, 2),)
            >>> replay = Replay(model, inputs, {}, Replay.random_state(model))
            >>> _, draws = replay.run_telling_draws({})
            >>> draws
            True
        """
        outputs, draws = self._run(parameters, copy, tell_draws=True)
        return outputs, draws is True

    def _run(
        self, parameters: Mapping[str, Tensor], copy: bool, tell_draws: bool = False
    ) -> tuple[list[Tensor | None], bool | None]:
        # torch.compile's wrapper, if any, is taken off: forward mode cannot go through it.
        model: Any = self.model
        before = self.buffers
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
            parameters, before = (
                {name.removeprefix("_orig_mod."): t for name, t in tensors.items()}
                for tensors in (parameters, before)
            )
        given = parameters
        if copy:
            self.find_writes()
            given = copies(model, parameters)
        counted = versions(model)
        found = self._once(model, before, given, tell_draws)
        notice(model, counted)
        return found

    def find_writes(self) -> None:
        """Find out which parameters a forward writes to, by one that is undone, if that is unknown.

        Example:
            >>> model = nn.Linear(2, 3)
            >>> Replay(model, (torch.ones(4, 2),), {}, Replay.random_state(model)).find_writes()
            >>> told(model)
            True
        """
        model: Any = getattr(self.model, "_orig_mod", self.model)
        if told(model):
            return
        backup, names = self._undone(model)
        if names:  # what is not written again was set once, as by a first batch, and is to stay
            _, again = self._undone(model)
            backup.redo(names - again)
            names = again
        remember(model, names)

    def _undone(self, model: nn.Module) -> tuple[Backup, set[str]]:
        """Run the model, undo what it writes to parameters, and tell which those are."""
        backup, names = Backup(model), set[str]()
        before = {name.removeprefix("_orig_mod."): t for name, t in self.buffers.items()}
        try:
            self._once(model, before, copies(model, {}), tell_draws=False)
        finally:
            names = backup.undo()
        return backup, names

    def _once(
        self,
        model: Any,
        before: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor],
        tell_draws: bool,
    ) -> tuple[list[Tensor | None], bool | None]:
        """Run the model, which may be without torch.compile's wrapper."""
        # Copies, as the forward may write to them.
        buffers = {n: before.get(n, buffer).clone() for n, buffer in model.named_buffers()}
        cpu, others = self.random
        devices = [device.index for device in others]
        fork = torch.random.fork_rng(devices, enabled=True)
        with self.paused(), _uncompiled(), _uncached(), fork:
            torch.set_rng_state(cpu)
            for device, state in others.items():
                torch.cuda.set_rng_state(state, device)
            # Copies, as a model may write to its inputs.
            args, kwargs = tree_map(_cloned, (self.args, self.kwargs))
            token = REPLAYING.set(True)
            try:
                tensors = {**buffers, **parameters}
                with moved_in_place(model, tensors) as rest:
                    output = _called(model, dict(rest), args, kwargs)
            finally:
                REPLAYING.reset(token)
            draws = self._moved() if tell_draws else None
        leaves = [
            leaf if isinstance(leaf, Tensor) and leaf.is_floating_point() else None
            for leaf in tree_leaves(output)
        ]
        return leaves, draws

    def _moved(self) -> bool:
        """Whether the generators are in another state than before the forward."""
        cpu, others = self.random
        return not torch.equal(torch.get_rng_state(), cpu) or not all(
            torch.equal(torch.cuda.get_rng_state(device), state) for device, state in others.items()
        )

    def pull(
        self, cotangents: Mapping[int, Tensor], parameters: Mapping[str, Tensor]
    ) -> list[Tensor]:
        """Vector-Jacobian product ``J^T w``.

        Args:
            cotangents: by place among the output's leaves, w in the shape of that leaf.
            parameters: by name, the model's own parameters to differentiate by.

        Returns:
            a tensor in the shape of each parameter, in their order; zero where unused or frozen.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> replay = Replay(model, (torch.ones(4, 2),), {}, Replay.random_state(model))
            >>> weight, bias = replay.pull({0: torch.ones(4, 1)}, dict(model.named_parameters()))
            >>> bias
            tensor([4.])
        """
        return self._adjoint(parameters, keep=False)(cotangents)

    def adjoint(self, parameters: Mapping[str, Tensor]) -> Pull:
        """`pull` for any number of cotangents, by one forward; its graph lives as long as this.

        Args:
            parameters: see `pull`.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> replay = Replay(model, (torch.ones(4, 2),), {}, Replay.random_state(model))
            >>> pull = replay.adjoint(dict(model.named_parameters()))
            >>> [pull({0: torch.full((4, 1), w)})[1] for w in (1.0, 2.0)]
            [tensor([4.]), tensor([8.])]
        """
        return self._adjoint(parameters, keep=True)

    def _adjoint(self, parameters: Mapping[str, Tensor], keep: bool) -> Pull:
        with torch.enable_grad():
            leaves = self.run(parameters)
        wanted = {name: p for name, p in parameters.items() if p.requires_grad}

        def pull(cotangents: Mapping[int, Tensor]) -> list[Tensor]:
            outputs: Sequence[Tensor] = [_present(leaves[place]) for place in cotangents]
            with without_multi_grad_hooks(parameters.values()):
                products = torch.autograd.grad(
                    outputs,
                    list(wanted.values()),
                    [c.to(o.dtype) for c, o in zip(cotangents.values(), outputs, strict=True)],
                    retain_graph=keep,
                    allow_unused=True,
                )
            found = dict(zip(wanted, products, strict=True))
            return [
                torch.zeros_like(parameter)
                if (product := found.get(name)) is None
                else product.detach()
                for name, parameter in parameters.items()
            ]

        return pull


def changed_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those copies of buffers that a forward has made differ from the buffers themselves.

    Waits for no device: on one, and where they cannot be compared, all count as changed.

    Args:
        model: after the forward.
        before: by name, copies of its buffers from before.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        >>> _ = model.eval()(torch.ones(4, 2))
        >>> list(changed_buffers(model, before))
        []
        >>> _ = model.train()(torch.ones(4, 2))
        >>> list(changed_buffers(model, before))
        ['1.running_mean', '1.running_var', '1.num_batches_tracked']
    """
    now = dict(model.named_buffers())
    return {n: copy for n, copy in before.items() if n in now and not _same(now[n], copy)}


def with_tied(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the other names of tied parameters and buffers, each module under one of its names.

    `torch.func.functional_call(..., tie_weights=True)` does so too, but for a module with several
    names it takes each, and leaves the replacement in the module (torch 2.13).

    Args:
        model: a module.
        tensors: by name, what to use in place of its parameters and buffers.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> model[1].weight = model[0].weight
        >>> list(with_tied(model, {"0.weight": torch.zeros(2, 2)}))
        ['0.weight', '1.weight']
    """
    own = {
        f"{prefix}.{name}" if prefix else name: tensor
        for prefix, module in model.named_modules()
        for members in (module._parameters, module._buffers)
        for name, tensor in members.items()
        if tensor is not None
    }
    replaced = {id(own[name]): tensor for name, tensor in tensors.items() if name in own}
    return {n: replaced[id(t)] for n, t in own.items() if id(t) in replaced} | dict(tensors)


def compiled_parts(model: nn.Module) -> list[str]:
    """Names of modules that `torch.compile` or `Module.compile` was called on.

    Args:
        model: a module; its own name is the empty one.

    Example:
        >>> compiled_parts(nn.Sequential(nn.Linear(2, 2)))
        []
    """
    return [
        name.removesuffix("_orig_mod").removesuffix(".")
        for name, module in model.named_modules()
        if name.split(".")[-1] == "_orig_mod" or getattr(module, "_compiled_call_impl", None)
    ]


def refuse_reentrant(outputs: Iterable[Tensor]) -> None:
    """Refuse outputs of reentrant checkpointing, which hides parameters from all but `backward`.

    Args:
        outputs: with their graph.

    Raises:
        RuntimeError: if there is such a checkpoint behind them; it says what to do.

    Example:
        >>> refuse_reentrant([nn.Linear(2, 1)(torch.ones(4, 2))])
    """
    seen, stack = set(), [output.grad_fn for output in outputs]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            raise RuntimeError(
                "the model uses activation checkpointing with use_reentrant=True, through which "
                "nothing can be measured; pass use_reentrant=False to torch.utils.checkpoint"
            )
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)


def _uncompiled() -> contextlib.AbstractContextManager[Any]:
    """A context in which compiled functions run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


@contextlib.contextmanager
def _uncached() -> Iterator[None]:
    """A context in which parametrizations are evaluated anew.

    `torch.nn.utils.parametrize.cached` keeps what they made of the model's own parameters.
    """
    before, parametrize._cache_enabled = parametrize._cache_enabled, 0
    try:
        yield
    finally:
        parametrize._cache_enabled = before


def _called(
    model: nn.Module, tensors: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Call a model with other parameters and buffers than its own."""
    # With none to replace it is a plain call, but for those that functional_call refuses.
    if not tensors and not isinstance(model, torch.jit.ScriptModule | nn.DataParallel):
        return model(*args, **kwargs)
    try:
        tensors = with_tied(model, tensors)
        return functional_call(model, tensors, args, kwargs, tie_weights=False)
    except (TypeError, ValueError) as error:  # as nn.Module.__setattr__ says it
        if not re.match(r"cannot assign '.*' as parameter|Cannot assign non-leaf", str(error)):
            raise
        raise RuntimeError(
            f"The forward of {type(model).__name__} assigns to a parameter, as in `self.weight *= "
            "0.9`, and so cannot run with others: write to it, as in `self.weight.mul_(0.9)`"
        ) from error


def _same(now: Tensor, before: Tensor) -> bool:
    if now.device.type != "cpu" or is_sharded(now):
        return False
    try:
        return torch.equal(now, before)
    except RuntimeError:  # sparse, quantised, or of another type than before
        return False


def _cloned(leaf: Any) -> Any:
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def _present(leaf: Tensor | None) -> Tensor:
    assert leaf is not None, "the model returned other tensors than before"
    return leaf
