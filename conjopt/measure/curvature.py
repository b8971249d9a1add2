"""How outputs change along a direction in parameters, and the curvature that follows (Thm 2.6)."""

from __future__ import annotations

import contextlib
import functools
import importlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from conjopt.losses import FenchelYoungLoss, potential_of
from conjopt.measure.chunks import ran_out_of_memory
from conjopt.measure.replay import Replay, refuse_reentrant
from conjopt.measure.shards import total_norm
from conjopt.potentials import Potential

__all__ = ["JacobianProduct", "curvature_along"]

# Looked up once, as every call of a model that is differentiated forward is compared with them.
_embedding, _set_grad_enabled = F.embedding, torch._C._set_grad_enabled
_in_inference_mode = torch.is_inference_mode_enabled

Run = Callable[[Mapping[str, Tensor]], list[Tensor | None]]


class JacobianProduct:
    """``J u``: the change of a model's outputs per unit of a step along ``u``.

    Three ways, tried in this order until one works for the model, which is then kept: forward mode
    (about 1.3 plain training steps), two vector-Jacobian products (about 2 to 3.5; for modules
    without forward derivatives, such as weight and spectral norm), and central differences (last
    resort, with the rounding errors of one; for EmbeddingBag). What keeps forward mode from working
    is put aside meanwhile: fused attention, the fast path of `nn.MultiheadAttention` and
    `nn.TransformerEncoderLayer`, and the fused LSTM.

    The first two take for constant what the backward takes for constant: what is detached, what is
    computed under `torch.no_grad()`, `torch.set_grad_enabled(False)` or `torch.inference_mode()`,
    and rows at a `padding_idx`. Differences see the function alone, in which all of these move but
    the padding rows of embedding modules whose table no other module uses.

    Args:
        model: the module that is run, looked through for what needs such care.

    Attributes:
        method: the way that worked last: "forward", "two_vjps" or "differences".

    Example:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> product = JacobianProduct(model)
        >>> def run(parameters):
        ...     return [torch.func.functional_call(model, parameters, torch.eye(2))]
        >>> outputs, changes = product(
        ...     run, dict(model.named_parameters()), {"weight": torch.tensor([[3.0, 4.0]])}
        ... )
        >>> changes[0], product.method
        (tensor([[3.],
                [4.]]), 'forward')
    """

    def __init__(self, model: nn.Module) -> None:
        self.method = "forward"
        self._model = model
        modules = list(model.modules())
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
        self._fast_path = any(
            isinstance(module, nn.MultiheadAttention | nn.TransformerEncoderLayer)
            for module in modules
        )

    def __call__(
        self, run: Run, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Outputs and their changes.

        Args:
            run: the model as a function of any of its parameters, its output as a list.
            parameters: where to differentiate.
            direction: ``u``, in the shapes of these parameters; those it lacks stand still.

        Returns:
            the outputs, and ``J u`` in their shapes; None in both where the output is no
            floating-point tensor.

        Raises:
            RuntimeError: what the model itself raises.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> def run(parameters):
            ...     return [torch.func.functional_call(model, parameters, torch.eye(2))]
            >>> product = JacobianProduct(model)
            >>> _, (change,) = product(run, dict(model.named_parameters()), {"bias": torch.ones(1)})
            >>> change
            tensor([[1.],
                    [1.]])
        """
        with torch.inference_mode(False):  # in which nothing is differentiated
            direction = {name: _differentiable(u) for name, u in direction.items()}
            return self._product(run, parameters, direction)

    def _product(
        self, run: Run, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Any:
        moving = {name: _differentiable(parameters[name]) for name in direction}
        if self.method == "forward":
            try:
                return self._forward(run, moving, direction, self._still(parameters, direction))
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                # No forward derivative somewhere (NotImplementedError is a RuntimeError).
                run(moving)  # the model's own errors are the caller's to see
                self.method = "two_vjps"
        if self.method == "two_vjps":
            try:
                return self._two_vjps(run, moving, direction)
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                run(moving)
                self.method = "differences"
        return self._differences(run, moving, direction)

    def _still(
        self, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The model's parameters that stand still, such that none of them makes a graph."""
        moving = {id(parameters[name]) for name in direction}
        return {
            name: p.detach()
            for name, p in self._model.named_parameters()
            if p.requires_grad and id(p) not in moving and name not in direction
        }

    def _forward(
        self,
        run: Run,
        at: Mapping[str, Tensor],
        direction: Mapping[str, Tensor],
        still: Mapping[str, Tensor],
    ) -> Any:
        _load_forward_formulas()
        # Gradients are on, to tell what the model takes for constant; nothing here requires any.
        with torch.enable_grad(), forward_ad.dual_level(), self._plain_kernels():
            duals = {
                name: forward_ad.make_dual(tensor, direction[name].to(tensor.dtype))
                for name, tensor in at.items()
            }
            with _ConstantsOfTheBackward():
                found = run({**still, **duals})
            outputs: list[Tensor | None] = []
            changes: list[Tensor | None] = []
            for output in found:
                if output is None:
                    outputs.append(None)
                    changes.append(None)
                    continue
                dual = forward_ad.unpack_dual(output)
                outputs.append(dual.primal.detach())
                changes.append(_or_zeros(dual.tangent, outputs[-1]))
        return outputs, changes

    def _two_vjps(self, run: Run, at: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> Any:
        with torch.enable_grad(), self._plain_kernels():
            leaves = {name: tensor.requires_grad_() for name, tensor in at.items()}
            outputs = run(leaves)
            live = [i for i, output in enumerate(outputs) if output is not None]
            live = [i for i in live if _present(outputs[i]).requires_grad]
            cotangents = [torch.zeros_like(_present(outputs[i]), requires_grad=True) for i in live]
            pulled = torch.autograd.grad(
                [_present(outputs[i]) for i in live],
                list(leaves.values()),
                cotangents,
                create_graph=True,
                allow_unused=True,
            )
            along = [
                (p * direction[name].to(p.dtype)).sum()
                for name, p in zip(leaves, pulled, strict=True)
                if p is not None and p.requires_grad
            ]
            found = (
                torch.autograd.grad(sum(along), cotangents, allow_unused=True)  # type: ignore[arg-type]
                if along
                else [None] * len(live)
            )
        by_place = dict(zip(live, found, strict=True))
        detached = [None if output is None else output.detach() for output in outputs]
        changes = [
            None if output is None else _or_zeros(by_place.get(i), output)
            for i, output in enumerate(detached)
        ]
        return detached, changes

    def _differences(
        self, run: Run, at: Mapping[str, Tensor], direction: Mapping[str, Tensor]
    ) -> Any:
        padding = _padding_rows(self._model)
        direction = {
            name: _without_row(u, padding[name]) if name in padding else u
            for name, u in direction.items()
        }
        with torch.no_grad():
            outputs = run(at)
            step = relative_step(
                [at[name] for name in direction], list(direction.values()), power=1 / 3
            )
            ahead, behind = (
                run(
                    {
                        name: tensor + sign * step * direction[name].to(tensor.dtype)
                        for name, tensor in at.items()
                    }
                )
                for sign in (1, -1)
            )
        unit = torch.where(step > 0, 2 * step, 1.0)
        changes = [
            None if a is None else (a - _present(b)) / unit
            for a, b in zip(ahead, behind, strict=True)
        ]
        return outputs, changes

    @contextlib.contextmanager
    def _plain_kernels(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._recurrent:
                stack.enter_context(switched_off(torch.backends.mkldnn))
                stack.enter_context(switched_off(torch.backends.cudnn))
            if self._fast_path and torch.backends.mha.get_fastpath_enabled():
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, True)
            yield


def curvature_along(
    model: nn.Module, potential: Potential, inputs: Any, direction: Mapping[str, Tensor]
) -> Tensor:
    """``u^T GGN u``, the curvature of the mean loss along a direction (Thm 2.6).

    It is ``mean_i (J_i u)^T H_i (J_i u)``, from one forward-mode product and without targets. The
    model runs in the mode it is in, on copies of its buffers, and draws from the random number
    generators without moving them.

    Args:
        model: returns one tensor, which is read as `conjopt.losses.FenchelYoungLoss` reads it:
            samples along dimension 0; on the simplex the k classes along dimension 1 and one term
            for each token, otherwise all that a sample has are its k coordinates.
        potential: of the loss, for the output Hessians ``H``.
        inputs: of the model, a tensor, or a tuple or a dict of its arguments.
        direction: ``u``, by parameter name, in the parameters' shapes; parameters that are not
            named stand still.

    Returns:
        () the curvature, in units of the Fenchel-Young loss per squared unit of ``u``.

    Raises:
        ValueError: if a name or a shape does not fit the model, or if the model does not return
            one tensor.
        RuntimeError: if the model uses reentrant activation checkpointing.

    Example:
        >>> from conjopt.potentials import Squared
        >>> model = nn.Linear(2, 1, bias=False)
        >>> u = {"weight": torch.tensor([[3.0, 4.0]])}
        >>> curvature_along(model, Squared(), torch.eye(2), u)  # mean of 3^2 and 4^2
        tensor(12.5000)
    """
    parameters = dict(model.named_parameters())
    for name, tensor in direction.items():
        if name not in parameters:
            raise ValueError(
                f"curvature_along: the direction names {name!r}, which is no parameter of "
                f"{type(model).__name__}; use the names of model.named_parameters()"
            )
        if tensor.shape != parameters[name].shape:
            raise ValueError(
                f"curvature_along: the direction of {name!r} has shape {tuple(tensor.shape)}, "
                f"expected that of the parameter, {tuple(parameters[name].shape)}"
            )
    args, kwargs = (
        ((), inputs)
        if isinstance(inputs, dict)
        else (inputs, {})
        if isinstance(inputs, tuple)
        else ((inputs,), {})
    )
    replay = Replay(model, args, kwargs, Replay.random_state(model))
    with torch.enable_grad():
        refuse_reentrant([output for output in replay.run({}) if output is not None])
    outputs, changes = JacobianProduct(model)(replay.run, parameters, direction)
    if len(outputs) != 1 or outputs[0] is None or changes[0] is None:
        raise ValueError(
            f"curvature_along: {type(model).__name__} returned {len(outputs)} values, expected one "
            "tensor; wrap the model in a module that returns the tensor that the loss is given"
        )
    as_rows = potential_of(FenchelYoungLoss(potential)).rows
    rows, along = as_rows(outputs[0]), as_rows(changes[0])
    return (along * potential.hessian_product(rows, along)).sum(-1).mean()


class _ConstantsOfTheBackward(TorchFunctionMode):
    """Keeps tangents from what autograd has no gradients of, which forward mode alone would move.

    Forward mode heeds `detach` and `torch.inference_mode`, but not the grad mode, not even for
    views, and no padding rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self._stopped = False

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if self._stopped or _in_inference_mode():
            result = _without_views(result, args, kwargs)
        if func is _embedding:
            _stop_padding(result, *args, **(kwargs or {}))
        elif func is _set_grad_enabled:
            self._follow(args[0])
        return result

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self._follow(True)

    def _follow(self, grad: bool) -> None:
        """Stop tangents where gradients stop, but where they are stopped by others."""
        if self._stopped if grad else torch._C._is_fwd_grad_enabled():
            torch._C._set_fwd_grad_enabled(grad)
            self._stopped = not grad


def _without_views(result: Any, args: Any, kwargs: Any) -> Any:
    """New views cut off from what they are of: they would take its tangent when next used."""
    if not any(isinstance(leaf, Tensor) and leaf._is_view() for leaf in tree_leaves(result)):
        return result  # as it is: a torch.Size, say, would come back as a tuple
    given = {id(leaf) for leaf in tree_leaves((args, kwargs))}
    return tree_map(
        lambda leaf: (
            leaf.detach()
            if isinstance(leaf, Tensor) and leaf._is_view() and id(leaf) not in given
            else leaf
        ),
        result,
    )


def _stop_padding(
    result: Tensor,
    inputs: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *_: Any,
    **__: Any,
) -> None:
    """Let the rows that `F.embedding` has no gradient of stand still."""
    if padding_idx is None:
        return
    tangent = forward_ad.unpack_dual(result).tangent
    if tangent is not None:
        row = padding_idx % len(weight)  # negative ones count from the end
        tangent.masked_fill_((inputs == row).unsqueeze(-1), 0)


def _padding_rows(model: nn.Module) -> dict[str, int]:
    """Rows of embeddings that have no gradient, by the table's name; none of tied tables."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    rows = {
        id(module.weight): module.padding_idx
        for module in model.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.padding_idx is not None
    }
    return {names[table][0]: row for table, row in rows.items() if len(names.get(table, ())) == 1}


def _without_row(direction: Tensor, row: int) -> Tensor:
    moved = direction.clone()
    moved[row] = 0
    return moved


def relative_step(at: Sequence[Tensor], direction: Sequence[Tensor], *, power: float) -> Tensor:
    """A step for differences: ``eps^power (1 + ||theta||) / ||u||``, or 0 along no direction.

    Args:
        at: theta, in parts.
        direction: u, in the same parts.
        power: 1/2 for one-sided differences, 1/3 for central ones.

    Returns:
        () the step, on the device.

    Example:
        >>> relative_step([torch.zeros(1)], [torch.full((1,), 2.0)], power=1 / 2)
        tensor(0.0002)
    """
    size, length = (total_norm(list(parts)) for parts in (at, direction))
    eps = max(torch.finfo(tensor.dtype).eps for tensor in at) ** power
    return torch.where(length > 0, eps * (1 + size) / length, torch.zeros_like(length))


@contextlib.contextmanager
def switched_off(backend: Any) -> Iterator[None]:
    """Without a backend; the ``flags`` of torch would set its other options, too."""
    before, backend.enabled = backend.enabled, False
    try:
        yield
    finally:
        backend.enabled = before


@functools.cache
def _load_forward_formulas() -> None:
    """Import what torch imports at its first forward-mode product, without its own deprecations."""
    with warnings.catch_warnings(), contextlib.suppress(ImportError):
        warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
        importlib.import_module("torch._decomp.decompositions_for_jvp")


def _differentiable(tensor: Tensor) -> Tensor:
    """Without its graph, and not of inference mode, whose tensors have no derivatives."""
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def _present(output: Tensor | None) -> Tensor:
    assert output is not None, "the model returned other tensors than before"
    return output


def _or_zeros(change: Tensor | None, output: Tensor | None) -> Tensor:
    return torch.zeros_like(_present(output)) if change is None else change.detach()
