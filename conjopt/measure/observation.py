"""Watching an ordinary training loop: which batch the gradients at hand came from, and how.

Hooks on the model and on the criterion read the loss, its targets and the factor that multiplies
it in what is differentiated; nothing is inferred from gradients. The units of docs/theory.md,
section 0, follow: with the criterion ``c mean l + offset`` and the factor ``kappa`` that its value
is multiplied by, ``.grad / sum(kappa c)`` is the gradient of the mean Fenchel-Young loss.
"""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.losses import PotentialOf, potential_of
from conjopt.measure.replay import Replay

__all__ = ["Batch", "Observation", "Watch"]

Marks = list[tuple[int, int] | None]


@dataclasses.dataclass(eq=False)
class Forward:
    """One training forward of the model, with what it takes to run it again.

    Attributes:
        replay: runs it again; None unless the watch was armed.
        gradients: by place among the output's tensors, the gradients that reached them.
        samples: by place, their sizes along dimension 0.
    """

    replay: Replay | None
    gradients: dict[int, Tensor]
    samples: dict[int, int]

    @property
    def batch_size(self) -> int | None:
        """Samples along dimension 0 of the outputs, None if they disagree or have none."""
        sizes = {self.samples[place] for place in self.gradients}
        return sizes.pop() if len(sizes) == 1 and min(sizes) > 0 else None


@dataclasses.dataclass(eq=False)
class Observation:
    """One call of the criterion whose value a backward pass went through.

    Attributes:
        loss: () value of the criterion.
        kappa: () gradient that reached this value: AMP scale, accumulation factor, and so on.
        scale: () ``c`` of the reduction.
        offset: () entropy of the targets in the criterion's value.
        outputs: what the criterion was given, in its own shape; None unless armed.
        targets: what they were compared with.
        forward: the model's forward that the outputs came from.
        place: which of its output tensors the outputs are, or None if they were made from them.
        pull: for outputs made from the model's, their vector-Jacobian product, linear in a
            cotangent of the outputs: (cotangent, {place: product}).
    """

    loss: Tensor
    kappa: Tensor
    scale: Tensor
    offset: Tensor
    outputs: Tensor | None
    targets: Tensor
    forward: Forward
    place: int | None
    pull: tuple[Tensor, dict[int, Tensor]] | None

    def push(self, tangents: Mapping[int, Tensor]) -> Tensor:
        """Carry a change of the model's output tensors to the criterion's input."""
        if self.place is not None:
            return tangents[self.place]
        assert self.pull is not None
        cotangent, products = self.pull
        places = [place for place in products if place in tangents]
        (change,) = torch.autograd.grad(
            [products[place] for place in places],
            [cotangent],
            [tangents[place].to(products[place].dtype) for place in places],
            retain_graph=True,
        )
        return change


@dataclasses.dataclass(eq=False)
class Batch:
    """What the gradients at hand came from: all observations since the last step.

    Attributes:
        observations: in the order of their backward passes.
        potential_of: the reading of the criterion.
        marks: the state of every gradient when the last backward pass ended; None unless armed.
    """

    observations: list[Observation]
    potential_of: PotentialOf
    marks: Marks | None

    @property
    def weight(self) -> Tensor:
        """() ``sum kappa c``: ``.grad`` over this is in per-sample Fenchel-Young units."""
        return sum_of([o.kappa * o.scale for o in self.observations])

    def loss(self, floor: float | None) -> Tensor:
        """() mean loss over the floor, in Fenchel-Young units.

        Args:
            floor: in the criterion's units; None for the entropy of the targets.
        """
        excess = [
            o.kappa * (o.loss - (o.offset if floor is None else floor)) for o in self.observations
        ]
        return sum_of(excess) / self.weight

    @property
    def forwards(self) -> list[Forward]:
        """The model's forwards behind the observations, each once."""
        return list(dict.fromkeys(o.forward for o in self.observations))


def sum_of(values: Sequence[Tensor]) -> Tensor:
    """The sum of a non-empty list of tensors."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


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

    Attributes:
        armed: whether the next batch will be measured: then inputs, outputs, their gradients and
            the state of the random number generators are kept as well.

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
        self, model: nn.Module, criterion: nn.Module, parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self.model = model
        self.criterion = criterion
        self.parameters = dict(parameters)
        self.potential_of = potential_of(criterion)
        self.armed = False
        self._paused = False
        self._observations: list[Observation] = []
        self._marks: Marks | None = None
        self._last: tuple[Forward, list[tuple[int, Tensor, int, GradientEdge]]] | None = None
        self._kept: tuple[Any, Any, Any] | None = None
        self._in_backward: tuple[int, Marks, list[Observation]] | None = None
        self._forward_seen = self._criterion_seen = self._unrelated = False
        handles = [
            model.register_forward_pre_hook(Hook(self, "_before_forward"), with_kwargs=True),
            model.register_forward_hook(Hook(self, "_after_forward"), with_kwargs=True),
            criterion.register_forward_hook(Hook(self, "_after_criterion"), with_kwargs=True),
        ]
        weakref.finalize(self, _remove, handles)

    def batch(self) -> Batch:
        """What was observed since the last `clear`.

        Raises:
            RuntimeError: if no observation belongs to the gradients at hand; it says what was
                seen and what to do.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> model(torch.ones(4, 2)).square().mean().backward()
            >>> watch.batch()
            Traceback (most recent call last):
                ...
            RuntimeError: the gradients do not come from the criterion: MSELoss was not called ...
        """
        if not self._observations:
            raise RuntimeError(self._what_is_missing())
        return Batch(list(self._observations), self.potential_of, self._marks)

    def observe(self, outputs: Tensor, targets: Tensor, scale: float = 1.0) -> None:
        """Say what the loss is made of, where the criterion module is not called itself.

        Call it between the model's forward and the backward pass.

        Args:
            outputs: what the criterion would be given; part of the graph of the loss.
            targets: as the criterion takes them.
            scale: the factor of the criterion's value in what is differentiated, such as one over
                the number of accumulated micro-batches.

        Raises:
            RuntimeError: if the outputs do not come from the last training forward of the model.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> outputs, targets = model(torch.ones(4, 2)), torch.zeros(4, 1)
            >>> watch.observe(outputs, targets)
            >>> nn.functional.mse_loss(outputs, targets).backward()
            >>> len(watch.batch().observations)
            1
        """
        origin = self._origin(outputs)
        if origin is None:
            raise RuntimeError(
                "observe(outputs, targets): the outputs do not come from the last training forward "
                "of the model; call observe after model(...) and before backward(), with a tensor "
                "that was computed from its output"
            )
        with torch.no_grad():
            value = self.criterion(outputs.detach(), targets)
        factor = torch.full_like(value, scale)
        self._await(outputs, value, outputs, targets, origin, factor)

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
        self._marks = None

    def release(self) -> None:
        """Forget the last forward as well: the step was taken.

        Example:
            >>> model, criterion = nn.Linear(2, 1), nn.MSELoss()
            >>> watch = Watch(model, criterion, dict(model.named_parameters()))
            >>> outputs = model(torch.ones(4, 2))
            >>> watch.release()
        """
        self.clear()
        self._last = self._kept = None
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

        Args:
            marks: of a `Batch` that was observed while armed.

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
        return self._gradient_marks() != marks

    # Hooks, in the order in which a training step meets them.

    def _before_forward(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if not self._watching(module) or not self.armed:
            return
        # Copies, as the model or the loop may write to them before they are needed.
        copied = tree_map(_copied, (args, kwargs))
        self._kept = (*copied, Replay.random_state(self.model))

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
        replay = None
        if self._kept is not None:
            replay = Replay(self.model, *self._kept, paused=self.paused)
            self._kept = None
        samples = {place: tensor.shape[0] if tensor.ndim else 0 for place, tensor in tensors}
        forward = Forward(replay, {}, samples)
        if replay is not None:
            for place, tensor in tensors:
                tensor.register_hook(_keeper(self, forward, place))
        self._last = (
            forward,
            [(place, t, t._version, get_gradient_edge(t)) for place, t in tensors],
        )

    def _after_criterion(self, module: nn.Module, args: Any, kwargs: Any, value: Any) -> None:
        if self._paused or module is not self.criterion or not torch.is_grad_enabled():
            return
        if not isinstance(value, Tensor) or not value.requires_grad:
            return
        outputs, targets = _criterion_arguments(args, kwargs)
        self._criterion_seen = True
        origin = self._origin(outputs)
        if origin is None:
            self._unrelated = True
            return
        self._await(value, value.detach().clone(), outputs, targets, origin, None)

    def _await(
        self,
        trigger: Tensor,
        value: Tensor,
        outputs: Tensor,
        targets: Tensor,
        origin: tuple[Forward, int | None],
        factor: Tensor | None,
    ) -> None:
        """Make an observation once a backward pass goes through the trigger."""
        forward, place = origin
        armed = forward.replay is not None
        pull = self._pull(outputs) if armed and place is None else None
        kept = outputs.detach().clone() if armed else None
        reference = weakref.ref(self)
        shaped = outputs.detach()

        def hook(gradient: Tensor) -> None:
            watch = reference()
            if watch is None or watch._paused:
                return
            reading = watch.potential_of
            watch._enter_backward(
                Observation(
                    loss=value,
                    kappa=gradient.detach().reshape(()) if factor is None else factor,
                    scale=reading.scale(shaped, targets),
                    offset=reading.offset(shaped, targets),
                    outputs=kept,
                    targets=targets,
                    forward=forward,
                    place=place,
                    pull=pull,
                )
            )

        trigger.register_hook(hook)

    def _enter_backward(self, observation: Observation) -> None:
        task = torch._C._current_graph_task_id()
        if self._in_backward is None or self._in_backward[0] != task:  # a failed one leaves its own
            marks = self._gradient_marks()
            self._in_backward = (task, marks, [])
            if self._observations and all(mark is None for mark in marks):
                self.clear()  # their gradients were thrown away by model.zero_grad()
            torch.autograd.Variable._execution_engine.queue_callback(self._leave_backward)
        self._in_backward[2].append(observation)

    def _leave_backward(self) -> None:
        if self._in_backward is None:
            return
        _, before, observations = self._in_backward
        self._in_backward = None
        marks = self._gradient_marks()
        if marks == before:
            return  # torch.autograd.grad: nothing was accumulated
        self._observations += observations
        if any(o.forward.replay is not None for o in observations):
            self._marks = marks

    # Where the criterion's input comes from.

    def _origin(self, outputs: Any) -> tuple[Forward, int | None] | None:
        """The forward that the outputs come from and their place in it, or None."""
        if self._last is None or not isinstance(outputs, Tensor) or outputs.grad_fn is None:
            return None
        forward, tensors = self._last
        for place, tensor, version, _ in tensors:
            if outputs is tensor and outputs._version == version:
                return forward, place
        nodes = {edge.node for *_, edge in tensors}
        return (forward, None) if _reaches(outputs.grad_fn, nodes) else None

    def _pull(self, outputs: Tensor) -> tuple[Tensor, dict[int, Tensor]]:
        """The vector-Jacobian product of what was done between the model and the criterion."""
        assert self._last is not None
        _, tensors = self._last
        with torch.enable_grad(), self.paused():
            cotangent = torch.zeros_like(outputs, requires_grad=True)
            products = torch.autograd.grad(
                outputs,
                [edge for *_, edge in tensors],
                cotangent,
                create_graph=True,
                allow_unused=True,
            )
        places = [place for place, *_ in tensors]
        return cotangent, {
            place: product
            for place, product in zip(places, products, strict=True)
            if product is not None and product.requires_grad
        }

    def _watching(self, module: nn.Module) -> bool:
        return (
            module is self.model
            and not self._paused
            and torch.is_grad_enabled()
            # Checkpointing calls the model again inside the backward pass.
            and torch._C._current_graph_task_id() == -1
        )

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
                f"{criterion} was called on a tensor that does not come from the last forward of "
                f"{model}: the model's output was not consumed; give the criterion what the model "
                "returned, or what was computed from it"
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

    def __call__(self, *arguments: Any) -> None:
        watch = None if self._watch is None else self._watch()
        if watch is not None:
            getattr(watch, self._method)(*arguments)

    def __reduce__(self) -> tuple[type[Hook], tuple[()]]:
        return Hook, ()


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

    def keep(gradient: Tensor) -> None:
        alive = reference()
        if alive is not None and not alive._paused:
            kept = forward.gradients.get(place)
            gradient = gradient.detach()
            forward.gradients[place] = gradient if kept is None else kept + gradient

    return keep


def _criterion_arguments(args: Any, kwargs: Any) -> tuple[Any, Any]:
    """The first two arguments of a loss, whatever their names."""
    given = [*args, *kwargs.values()]
    if "input" in kwargs:
        given = [kwargs["input"], kwargs["target"] if "target" in kwargs else args[0]]
    return given[0], given[1]


def _reaches(start: Any, nodes: set[Any]) -> bool:
    """Whether the graph behind a node meets one of the nodes."""
    seen, stack = set(), [start]
    while stack:
        node = stack.pop()
        if node in nodes:
            return True
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False
