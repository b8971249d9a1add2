"""Watching an ordinary training loop: which batch the gradients at hand came from, and how.

Hooks on the model and on the criterion read the loss, its targets and the factor that multiplies
it in what is differentiated; nothing is inferred from gradients.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

from conjopt.losses import potential_of
from conjopt.measure.observation import Batch, Forward, Marks, Observation
from conjopt.measure.process_group import Ranks
from conjopt.measure.replay import Replay, changed_buffers, refuse_reentrant
from conjopt.measure.shards import holds_back, is_sharded

__all__ = ["Hook", "Watch"]


Pair = tuple[object, int, int]  # tells outputs and targets, as long as they live

NODE = object()  # the key of what tells a node of the graph in its metadata


@dataclasses.dataclass(eq=False)
class Backward:
    """What one backward pass met, to be kept if it accumulates into ``.grad``."""

    task: int
    marks: Marks  # before it
    observations: list[Observation] = dataclasses.field(default_factory=list)
    gradients: list[tuple[Forward, int, Tensor]] = dataclasses.field(default_factory=list)
    local: list[tuple[str, Tensor]] = dataclasses.field(default_factory=list)
    called: dict[Pair, Tensor] = dataclasses.field(default_factory=dict)  # on what targets
    joined: bool = False


class Watch:
    """Hooks on a model and its criterion that keep what the gradients at hand came from.

    Only what a backward pass went through, and what it accumulated into ``.grad``, counts:
    evaluation, other models that share the criterion, `torch.autograd.grad`, and recomputation
    under checkpointing leave no trace. Between two calls of `clear` observations accumulate.

    Args:
        model: the module whose outputs the criterion is given, by itself or after more
            operations.
        criterion: a loss that `conjopt.losses.potential_of` recognises.
        parameters: by their names in the model, those that are trained.
        ranks: that the gradients are averaged over; those of the DistributedDataParallel that is
            found to call the model, if there is one.

    Attributes:
        armed: whether the next batch will be measured: then inputs, targets, outputs, their
            gradients, the state of the random number generators and the buffers that a forward
            changes are kept as well, and what each backward adds to ``.grad`` before it is averaged
            over ranks.

    Raises:
        TypeError: if the criterion is not recognised.

    Example:
        >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
        >>> watch = Watch(model, criterion, dict(model.named_parameters()))
        >>> loss = criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)) / 2
        >>> loss.backward()
        >>> (observation,) = watch.batch().observations
        >>> observation.kappa.item(), observation.scale.item()
        (0.5, 2.0)
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        ranks: Ranks | None = None,
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.parameters = dict(parameters)
        self.potential_of = potential_of(criterion)
        self.armed = False
        self.ranks = Ranks() if ranks is None else ranks
        self._wrapper: weakref.ref[nn.Module] | None = None  # that averages the gradients
        self._local: dict[str, Tensor] = {}  # gradients before they are averaged, by parameter
        self._local_hooks: dict[str, RemovableHandle] = {}
        self._latest: weakref.ref[Forward] | None = None
        self._paused = False
        self._observations: list[Observation] = []
        self._marks: Marks = []
        self._token = object()  # marks the nodes of the graph that made the model's outputs
        self._kept: tuple[Any, Any, Any] | None = None
        self._buffers: dict[str, Tensor] = {}  # copies from before the forward that is under way
        self._in_backward: Backward | None = None
        self._sharded = any(is_sharded(p) for p in self.parameters.values())
        self._explicit: dict[Pair, RemovableHandle] = {}
        self._forward_seen = self._criterion_seen = self._unrelated = self._joined = False
        handles = [
            model.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            model.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True),
            criterion.register_forward_hook(Hook(self, "_after_criterion"), with_kwargs=True),
        ]
        self._handles = handles
        weakref.finalize(self, _remove, handles)

    def wrapped_by(self, wrapper: nn.Module) -> None:
        """Take note of the DistributedDataParallel around the model, whose group then counts.

        Args:
            wrapper: that the loop calls.
        """
        self._wrapper = weakref.ref(wrapper)
        if getattr(wrapper, "module", None) is self.model:  # else its outputs are others
            self._handles.append(wrapper.register_forward_hook(Hook(self, "_after_wrapper")))
        group = getattr(wrapper, "process_group", None)
        if self.ranks.group is None and group is not None:
            self.ranks = Ranks(group)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy watches the copies of model and criterion; nothing was observed of them yet."""
        return _again, (self.model, self.criterion, self.parameters), {"armed": self.armed}

    @property
    def empty(self) -> bool:
        """Whether nothing was observed since the last `clear`.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> Watch(model, criterion, dict(model.named_parameters())).empty
            True
        """
        return not self._observations and not self._joined

    def batch(self) -> Batch:
        """What was observed since the last `clear`.

        Raises:
            RuntimeError: if no observation belongs to the gradients at hand, or one that comes
                from several forwards, or if ranks may stop before others; it says what was seen
                and what to do.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> model(torch.ones(4, 2)).square().mean().backward()
            >>> watch.batch()
            Traceback (most recent call last):
                ...
            RuntimeError: the gradients do not come from the criterion: MSELoss was not called ...
        """
        if self.ranks.several and _join_is_on(self._wrapper):
            raise RuntimeError(
                "the model runs under torch.distributed.algorithms.Join, whose ranks take "
                "different numbers of steps; the statistics of a step need all ranks: give them "
                "as many batches each, such as those of conjopt.AdaptiveBatchSampler or a "
                "DistributedSampler"
            )
        if self._joined:
            raise RuntimeError(
                f"{type(self.criterion).__name__} was given a tensor made from several forwards of "
                f"{type(self.model).__name__}, which is then no function that can be run again; "
                "give as model= the module whose one forward makes the outputs, or call the model "
                "once on the joined inputs"
            )
        if not self._observations:
            raise RuntimeError(self._what_is_missing())
        return Batch(list(self._observations), self.potential_of, self._marks)

    def observe(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        """Say what the loss is made of, where the criterion module is not called itself.

        Call it between the model's forward and the backward pass. The same outputs and targets
        count once: as in the last call, or as the criterion itself was called on them.

        Args:
            outputs: what the criterion would be given; part of the graph of the loss.
            targets: as the criterion takes them.
            scale: the factor of the criterion's value in what is differentiated, such as one over
                the number of accumulated micro-batches.

        Raises:
            RuntimeError: if the outputs do not come from a training forward of the model since
                the last step.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> outputs, targets = model(torch.ones(4, 2)), torch.zeros(4, 1)
            >>> watch.observe(outputs, targets)
            >>> nn.functional.mse_loss(outputs, targets).backward()
            >>> len(watch.batch().observations)
            1
        """
        origins = self._origins(outputs)
        if not origins:
            raise RuntimeError(
                "observe(outputs, targets): the outputs do not come from a training forward of the "
                "model since the last step; call observe after model(...) and before backward(), "
                "with a tensor that was computed from its output"
            )
        with torch.no_grad():
            value = self.criterion(outputs.detach(), targets)
        factor = torch.full_like(value, scale)
        pair = _pair(outputs, targets)
        if pair in self._explicit:
            self._explicit.pop(pair).remove()
        self._explicit[pair] = self._await(outputs, value, outputs, targets, origins, factor)

    def clear(self) -> None:
        """Forget what was observed; what is still to be differentiated stays known.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            >>> watch.clear()
            >>> watch.batch()
            Traceback (most recent call last):
                ...
            RuntimeError: the gradients do not come from the criterion: no backward pass went ...
        """
        self._observations.clear()
        self._local = {}
        self._marks = []
        self._joined = False

    def release(self) -> None:
        """Forget the forwards as well: the step was taken.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> outputs = model(torch.ones(4, 2))
            >>> watch.release()
        """
        self.clear()
        self._token, self._kept, self._buffers, self._latest = object(), None, {}, None
        self.take_local()
        for handle in self._explicit.values():  # they hold what holds them
            handle.remove()
        self._explicit.clear()
        self._forward_seen = self._criterion_seen = self._unrelated = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave forwards inside the block unwatched.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> with watch.paused():
            ...     outputs = model(torch.ones(4, 2))
        """
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def changed_since_backward(self, marks: Marks) -> bool:
        """Whether any gradient was written to since the marks were taken (clipping, unscaling).

        Or may have been by a hook on its accumulation, which is before the marks are taken.

        Args:
            marks: of a `Batch`.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> watch.armed = True
            >>> criterion(model(torch.ones(4, 2)), torch.zeros(4, 1)).backward()
            >>> marks = watch.batch().marks
            >>> watch.changed_since_backward(marks)
            False
            >>> _ = nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            >>> watch.changed_since_backward(marks)
            True
        """
        hooked = any(
            getattr(parameter, "_post_accumulate_grad_hooks", None)
            for parameter in self.parameters.values()
        )
        return hooked or self._gradient_marks() != marks

    def take_local(self) -> dict[str, Tensor]:
        """What this rank added to ``.grad`` by name; kept if armed, and given away once.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> Watch(model, criterion, dict(model.named_parameters())).take_local()
            {}
        """
        for handle in self._local_hooks.values():
            handle.remove()
        self._local_hooks.clear()
        local, self._local = self._local, {}
        return local

    # Hooks, in the order in which a training step meets them.

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching(module):
            return
        self._kept, self._buffers = None, {}  # of a forward that failed
        wrapper = _active_wrapper()
        if wrapper is not None and (self._wrapper is None or self._wrapper() is not wrapper):
            self.wrapped_by(wrapper)
        if not self.armed:
            return
        if self.ranks.several and not self._sharded:
            for name, parameter in self.parameters.items():
                if parameter.requires_grad and name not in self._local_hooks:
                    self._local_hooks[name] = parameter.register_hook(_local_keeper(self, name))
        # Copies, as the model or the loop may write to them before they are needed.
        copied = tree_map(_copied, (args, kwargs))
        self._kept = (*copied, Replay.random_state(self.model))
        self._buffers = {n: b.detach().clone() for n, b in self.model.named_buffers()}

    def _after_forward(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self._watching(module):
            return
        tensors = [
            (place, leaf)
            for place, leaf in enumerate(tree_leaves(output))
            if isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
        ]
        if not tensors:
            return
        self._forward_seen = True
        self._criterion_seen = self._unrelated = False
        replay = None
        if self._kept is not None:
            paused = functools.partial(_paused, weakref.ref(self))  # else the graph would hold it
            before = changed_buffers(self.model, self._buffers)
            replay = Replay(self.model, *self._kept, paused=paused, buffers=before)
            self._kept, self._buffers = None, {}
            refuse_reentrant(tensor for _, tensor in tensors)
        samples = {place: tensor.shape[0] if tensor.ndim else 0 for place, tensor in tensors}
        forward = Forward(replay, {}, samples)
        if replay is not None:
            for place, tensor in tensors:
                forward.outputs[place] = tensor.detach()
                tensor.register_hook(_keeper(self, forward, place))
        self._latest = weakref.ref(forward)
        self._mark(forward, tensors)

    def _after_wrapper(self, module: nn.Module, args: Any, output: Any) -> None:
        """The same for what the wrapper made of the outputs: it may have passed them on."""
        forward = None if self._latest is None else self._latest()
        if forward is not None and not self._paused:
            leaves = enumerate(tree_leaves(output))
            passed = [(p, t) for p, t in leaves if p in forward.samples and isinstance(t, Tensor)]
            self._mark(forward, passed)

    def _mark(self, forward: Forward, tensors: Sequence[tuple[int, Tensor]]) -> None:
        for place, tensor in tensors:
            if tensor.grad_fn is not None:
                node: Any = tensor.grad_fn
                marked = node.metadata.setdefault(self._token, {})
                marked[tensor.output_nr] = (forward, place)

    def _after_criterion(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if self._paused or module is not self.criterion or not torch.is_grad_enabled():
            return
        if _inside_functorch():
            return
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        outputs, targets = _criterion_arguments(args, kwargs)
        self._criterion_seen = True
        origins = self._origins(outputs)
        if not origins:
            self._unrelated = True
            return
        self._await(value, value.detach().clone(), outputs, targets, origins, None)

    def _await(
        self,
        trigger: Tensor,
        value: Tensor,
        outputs: Tensor,
        targets: Tensor,
        origins: list[tuple[Forward, int, GradientEdge]],
        factor: Tensor | None,
    ) -> RemovableHandle:
        """Make an observation once a backward pass goes through the trigger."""
        forward, place, edge = origins[0]
        joined = any(other is not forward for other, *_ in origins)
        itself = len(origins) == 1 and edge[:2] == (outputs.grad_fn, outputs.output_nr)
        armed = forward.replay is not None
        pull = None if itself or joined or not armed else self._pull(outputs, origins)
        pair, given, kept = _pair(outputs, targets), targets, None
        if armed:  # copies, as the loop may write to them before the step
            kept, targets = outputs.detach().clone(), targets.detach().clone()
        reference = weakref.ref(self)
        shaped = outputs.detach()

        def hook(gradient: Tensor) -> None:
            watch = reference()
            if watch is None or watch._paused:
                return
            backward = watch._enter_backward()
            if joined:
                backward.joined = True
                return
            if factor is None:
                backward.called[pair] = given  # which lives as long as the hook does
            elif pair in backward.called:  # by the criterion, whose value comes before its input
                return
            reading = watch.potential_of
            backward.observations.append(
                Observation(
                    loss=value,
                    kappa=gradient.detach().reshape(()) if factor is None else factor,
                    scale=reading.scale(shaped, targets),
                    offset=reading.offset(shaped, targets),
                    outputs=kept,
                    targets=targets,
                    forward=forward,
                    place=place if itself else None,
                    pull=pull,
                )
            )

        return trigger.register_hook(hook)

    def _enter_backward(self) -> Backward:
        """What the backward pass that is running has met so far."""
        task = torch._C._current_graph_task_id()
        if self._in_backward is None or self._in_backward.task != task:  # a failed one leaves its
            marks = self._gradient_marks()
            self._in_backward = Backward(task, marks)
            if self._observations and marks != self._marks and self._no_gradients():
                self.clear()  # their gradients were thrown away by model.zero_grad()
            # Sharded gradients are made in a callback that is queued after this one.
            leave = self._leave_later if self._sharded else self._leave_backward
            torch.autograd.Variable._execution_engine.queue_callback(leave)
        return self._in_backward

    def _leave_later(self) -> None:
        torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)

    def _leave_backward(self) -> None:
        backward, self._in_backward = self._in_backward, None
        if backward is None:
            return
        marks = self._gradient_marks()
        if marks == backward.marks and not (self._sharded and holds_back(self.model)):
            return  # torch.autograd.grad: nothing was accumulated
        for forward, place, gradient in backward.gradients:
            kept = forward.gradients.get(place)
            forward.gradients[place] = gradient if kept is None else kept + gradient
        for name, gradient in backward.local:
            before = self._local.get(name)
            self._local[name] = gradient if before is None else before + gradient
        self._joined |= backward.joined
        self._observations += backward.observations
        self._marks = marks
        if self._wrapper is not None:  # which averages in a callback of its own
            torch.autograd.Variable._execution_engine.queue_callback(self._mark_averaged)

    def _mark_averaged(self) -> None:
        self._marks = self._gradient_marks()

    # Where the criterion's input comes from.

    def _origins(self, outputs: Any) -> list[tuple[Forward, int, GradientEdge]]:
        """The outputs of forwards that the criterion's input was made from, with their places."""
        if not isinstance(outputs, Tensor) or outputs.grad_fn is None:
            return []
        found = []
        start: tuple[Any, int] = (outputs.grad_fn, outputs.output_nr)
        seen, stack = {start}, [start]
        while stack:
            node, number = stack.pop()
            origin = node.metadata.get(self._token, {}).get(number)
            if origin is not None:
                found.append((*origin, GradientEdge(node, number)))
                continue
            new = [edge for edge in node.next_functions if edge[0] and edge not in seen]
            seen.update(new)
            stack.extend(new)
        return found

    def _pull(
        self, outputs: Tensor, origins: Sequence[tuple[Forward, int, GradientEdge]]
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """The vector-Jacobian product of what was done between the model and the criterion."""
        with torch.enable_grad(), self.paused():
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            products = torch.autograd.grad(
                outputs,
                [edge for *_, edge in origins],
                cotangent,
                create_graph=True,
                allow_unused=True,
            )
        return cotangent, {
            place: product
            for (_, place, _), product in zip(origins, products, strict=True)
            if product is not None and product.requires_grad
        }

    def _watching(self, module: nn.Module) -> bool:
        return (
            module is self.model
            and not self._paused
            and torch.is_grad_enabled()
            # Checkpointing calls the model again inside the backward pass.
            and torch._C._current_graph_task_id() == -1
            and not _inside_functorch()
        )

    def _no_gradients(self) -> bool:
        """Whether all gradients are missing or zero; waits for a device if there are any."""
        gradients = (parameter.grad for parameter in self.parameters.values())
        return not any(bool(g.any()) for g in gradients if g is not None)

    def _gradient_marks(self) -> Marks:
        gradients = [parameter.grad for parameter in self.parameters.values()]
        return [None if g is None else (id(g), g._version) for g in gradients]

    def _what_is_missing(self) -> str:
        model, criterion = type(self.model).__name__, type(self.criterion).__name__
        explicit = "or call optimizer.observe(outputs, targets) before backward()"
        if not self._forward_seen:
            return (
                f"no training forward of {model} was seen since the last step; call the very "
                "module that was given as model=, with gradients enabled (a module compiled or "
                "wrapped afterwards is another one: give that one as model=)"
            )
        if self._unrelated:
            return (
                f"{criterion} was called on a tensor that does not come from a training forward of "
                f"{model} since the last step: the model's output was not consumed; give the "
                "criterion what the model returned, or what was computed from it (if that is a "
                "view and was edited in place, edit a copy)"
            )
        if not self._criterion_seen:
            return (
                f"the gradients do not come from the criterion: {criterion} was not called between "
                f"the forward of {model} and backward(); call the very module that was given as "
                f"loss=, {explicit}"
            )
        return (
            f"the gradients do not come from the criterion: no backward pass went through the "
            f"value of {criterion}; call backward() on it or on what was computed from it, "
            f"{explicit}"
        )


class Hook:
    """A hook that neither keeps its watch alive nor follows the module into its copies."""

    def __init__(self, watch: Watch | None = None, method: str = "") -> None:
        self._watch = None if watch is None else weakref.ref(watch)
        self._method = method

    @property
    def dead(self) -> bool:
        """Whether there is no watch any more, or none yet."""
        return self._watch is None or self._watch() is None

    @torch._disable_dynamo  # it looks at the graph, of which torch.compile shows it an image
    def __call__(self, *arguments: Any) -> None:
        """Call the method of the watch, if it is still there."""
        watch = None if self._watch is None else self._watch()
        if watch is not None:
            getattr(watch, self._method)(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


def _again(model: nn.Module, criterion: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Watch:
    """The watch of a copied or unpickled model."""
    if "_forward_hooks" not in model.__dict__:
        raise TypeError(
            f"a {type(model).__name__} that holds its own optimizer cannot be copied or pickled: "
            "it is not whole yet when the optimizer is to watch it; keep the optimizer outside of "
            "the model, and copy both together: copy.deepcopy((model, optimizer))"
        )
    for module in (model, criterion):
        for hooks, others in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        ):
            for number, hook in list(hooks.items()):
                if isinstance(hook, Hook) and hook.dead:  # came along with the copy
                    del hooks[number]
                    others.pop(number, None)
    return Watch(model, criterion, parameters)


def _paused(reference: weakref.ref[Watch]) -> contextlib.AbstractContextManager[None]:
    watch = reference()
    return contextlib.nullcontext() if watch is None else watch.paused()


def _remove(handles: Sequence[Any]) -> None:
    for handle in handles:
        handle.remove()


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    return leaf.detach().clone().requires_grad_(leaf.requires_grad)


def _keeper(watch: Watch, forward: Forward, place: int) -> Any:
    """A tensor hook that adds up the gradients that reach one output of a forward."""
    reference = weakref.ref(watch)

    def keep(gradient: Tensor | None) -> None:
        alive = reference()
        # None: a node of several outputs of which this one was not used.
        if alive is not None and not alive._paused and gradient is not None:
            alive._enter_backward().gradients.append((forward, place, gradient.detach()))

    return keep


def _local_keeper(watch: Watch, name: str) -> Any:
    """A hook on a parameter that sees its gradient before a wrapper averages it."""
    reference = weakref.ref(watch)

    def keep(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None and not alive._paused:
            # A copy, as the gradient itself may become `.grad`, which is averaged in place.
            alive._enter_backward().local.append((name, gradient.detach().clone()))

    return keep


def _active_wrapper() -> DistributedDataParallel | None:
    """The DistributedDataParallel whose forward is running, if torch tells."""
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def _join_is_on(wrapper: weakref.ref[nn.Module] | None) -> bool:
    config = getattr(None if wrapper is None else wrapper(), "_join_config", None)
    return bool(getattr(config, "enable", False))


def _pair(outputs: Tensor, targets: Tensor) -> Pair:
    node: Any = outputs.grad_fn
    return node.metadata.setdefault(NODE, object()), outputs.output_nr, id(targets)


def _inside_functorch() -> bool:
    """Whether a transform of torch.func runs, whose gradients it hands out instead of ``.grad``."""
    peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return peek is not None and peek() is not None


def _criterion_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The first two arguments of a loss, whatever their names."""
    names = ("input", "outputs"), ("target", "targets")
    named = [next((kwargs[name] for name in pair if name in kwargs), None) for pair in names]
    given = [*args, *named[len(args) :]]
    return given[0], given[1]
