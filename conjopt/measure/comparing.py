"""What self_check compares: two samples through the model, one at a time, by plain autograd."""

from __future__ import annotations

import contextvars
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from conjopt.measure.energy import per_sample_gradient_norms
from conjopt.measure.graph_hooks import without_multi_grad_hooks
from conjopt.measure.layers.layout import Samples
from conjopt.measure.layers.pieces import sample_gram
from conjopt.measure.layers.tape import (
    Arguments,
    Tape,
    as_arguments,
    number_of_samples,
    places_of_inputs,
)
from conjopt.measure.replay import RandomState, Replay
from conjopt.measure.structure import structure_matrix

__all__ = ["CHECKING", "Check"]

MOST_OUTPUTS = 32  # of a sample, whose structure matrices are compared
CHECKING: contextvars.ContextVar[bool] = contextvars.ContextVar("CHECKING", default=False)


@dataclasses.dataclass
class Check:
    """One comparison; see `conjopt.measure.self_check`.

    Attributes:
        model: The module.
        loss: The criterion, or `None`.
        inputs: Of the model.
        targets: Of the criterion.
        allow_random: Whether random numbers such as dropout are no problem.
    """

    model: nn.Module
    loss: Any
    inputs: Any
    targets: Any
    allow_random: bool = False

    _places: list[Samples | None] | None = None

    def problems(self) -> list[str]:
        """Return everything that is wrong, in words."""
        self.found: list[str] = []
        token = CHECKING.set(True)
        try:
            with torch.enable_grad():
                self._run()
        finally:
            CHECKING.reset(token)
        return self.found

    def _run(self) -> None:
        if torch.is_inference_mode_enabled():
            self.found.append("Inference mode is on, where there are no gradients: leave it.")
            return
        model = getattr(self.model, "_orig_mod", self.model)
        self.plain = model
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.args, self.kwargs = as_arguments(self.inputs)
        tensors = [t for t in tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        if not self.parameters:
            self.found.append("No parameter requires a gradient: there is nothing to measure.")
        try:
            self.m = number_of_samples(tensors)
        except ValueError as error:
            self.found.append(str(error))
            return
        if self.m == 0:
            self.found.append("The batch has no samples: pass at least one.")
            return
        if not self._devices_agree(tensors):
            return
        self._values_are_finite("parameter", dict(model.named_parameters()))
        self._values_are_finite("buffer", dict(model.named_buffers()))
        self._values_are_finite("input", {str(i): t for i, t in enumerate(tensors)})
        outputs = self._outputs()
        tape = self._tape()
        if outputs is None:
            return
        cotangents = self._cotangents(outputs)
        if cotangents is not None and not self._random and self.parameters:
            self._compare(outputs, cotangents, tape)

    def _devices_agree(self, tensors: list[Tensor]) -> bool:
        places: dict[str, set[str]] = {
            "parameters": {str(p.device) for p in self.plain.parameters()},
            "buffers": {str(b.device) for b in self.plain.buffers()},
            "inputs": {str(t.device) for t in tensors},
            "targets": {str(t.device) for t in tree_leaves(self.targets) if isinstance(t, Tensor)},
        }
        if len(set().union(*places.values())) > 1:
            where = ", ".join(
                f"{name} on {' and '.join(sorted(devices))}"
                for name, devices in places.items()
                if devices
            )
            self.found.append(
                f"The model and the batch are on several devices: {where}. Move all of them to one "
                "with .to(device)."
            )
            return False
        return True

    def _values_are_finite(self, what: str, tensors: dict[str, Tensor]) -> None:
        wrong = [
            name
            for name, tensor in tensors.items()
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
        ]
        if wrong:
            self.found.append(
                f"{_count(what, wrong)} {_names(wrong)} {'has' if len(wrong) == 1 else 'have'} "
                "values that are not finite: look for what made them."
            )

    def _forward(self, args: Any, kwargs: Any, state: RandomState) -> list[Tensor | None]:
        return Replay(self.plain, args, kwargs, state).run({})

    def _outputs(self) -> Tensor | None:
        """Run the model twice and look at what it returns."""
        self._random = False
        state = Replay.random_state(self.plain)
        try:
            found = self._forward(self.args, self.kwargs, state)
            again = self._forward(self.args, self.kwargs, _other(state))
        except Exception as error:
            self.found.append(f"The model fails on this batch: {_said(error)}")
            return None
        if len(found) != 1 or found[0] is None:
            shapes = [None if t is None else tuple(t.shape) for t in found]
            self.found.append(
                f"The model returned {len(found)} values, {shapes}, expected one floating-point "
                "tensor: wrap it in a module that returns the tensor that the loss is given."
            )
            return None
        outputs = found[0]
        self.eps = _eps([outputs, *self.parameters.values()])
        if not _same(outputs, again[0], self.eps):
            self._random = True
            if not self.allow_random:
                drawing = [
                    f"{name!r} ({type(module).__name__})"
                    for name, module in self.plain.named_modules()
                    if module.training and _drops_out(module)
                ]
                self.found.append(
                    f"Two runs differ: {' and '.join(drawing) or 'the model'} draws random "
                    "numbers. Call model.eval() first, or set the probability of dropout to 0."
                )
        if not bool(torch.isfinite(outputs).all()):
            self.found.append("The outputs have values that are not finite.")
        if outputs.ndim == 0 or outputs.shape[0] != self.m:
            self.found.append(
                f"The outputs have the shape {tuple(outputs.shape)} for {self.m} samples: expected "
                "samples along dimension 0; transpose them, or keep a dimension for them."
            )
            return None
        return outputs

    def _tape(self) -> Tape | None:
        if not self.parameters:
            return None
        try:
            return Tape(self.model, self.inputs)
        except Exception as error:
            text = str(error)
            if not any(text in problem for problem in self.found):
                self.found.append(_said(error) if not isinstance(error, RuntimeError) else text)
            return None

    def _cotangents(self, outputs: Tensor) -> Tensor | None:
        """Return the loss's gradient in the outputs by sample, and a random one, `(2, m, ...)`."""
        generator = torch.Generator().manual_seed(0)
        other = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(outputs)
        if self.loss is None:
            return torch.stack([other.flip(0), other])
        try:
            value, own = self._pull_loss(outputs)
        except Exception as error:
            self.found.append(f"The criterion fails on this batch: {_said(error)}")
            return None
        finite = bool(torch.isfinite(value)) and bool(torch.isfinite(own).all())
        if not finite:
            self.found.append("The loss or its gradient in the outputs is not finite.")
        elif self.m > 1 and bool(torch.isfinite(outputs).all()):
            moved = outputs.detach() + other / 16 * outputs.detach().abs().mean().clamp(min=1)
            moved[0] = outputs[0].detach()
            try:
                _, again = self._pull_loss(moved)
            except Exception:
                again = own  # outputs outside of what the criterion takes
            if not _same(own[0], again[0], self.eps):
                self.found.append(
                    "The criterion couples samples: the gradient of a sample's output changes with "
                    "the outputs of others. Per-sample gradients need a mean or a sum of one loss "
                    "for each sample."
                )
        if not finite or not bool(torch.isfinite(outputs).all()):
            return None
        factor = self.m if getattr(self.loss, "reduction", "mean") == "mean" else 1
        return torch.stack([factor * own, other])

    def _pull_loss(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        leaf = outputs.detach().requires_grad_()
        value = self.loss(leaf, self.targets)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.detach(), gradient.to(outputs.dtype)

    def _compare(self, outputs: Tensor, cotangents: Tensor, tape: Tape | None) -> None:
        if tape is not None and not any(output.requires_grad for output in tape.outputs):
            return  # they depend on no parameter
        rows = [0, self.m - 1] if self.m > 1 else [0]
        coupled = self._coupling_modules()
        alone, failure = self._all_alone(rows, cotangents)
        if failure is not None and not coupled:
            self.found.append(f"The model fails on a single sample: {_said(failure)}")
            return
        if not self._agree(outputs, alone, rows):
            by = f" through {' and '.join(coupled)}" if coupled else ""
            self.found.append(
                f"The model couples samples{by}: a sample alone has other outputs than in the "
                "batch. Call model.eval() first, or use group or layer normalisation."
            )
            return
        single = [gradients for _, gradients in alone.values()]
        if self._gradients_are_finite(single):
            self._compare_gradient(outputs, cotangents[0], rows, single)
            if tape is not None:
                self._compare_engine(tape, cotangents, rows, single)

    def _all_alone(
        self, rows: list[int], cotangents: Tensor
    ) -> tuple[dict[int, tuple[Tensor, list[dict[str, Tensor]]]], Exception | None]:
        alone = {}
        for row in rows:
            try:
                alone[row] = self._alone(row, cotangents[:, row])
            except Exception as error:
                return alone, error
        return alone, None

    def _agree(self, outputs: Tensor, alone: dict[int, Any], rows: list[int]) -> bool:
        return len(alone) == len(rows) and all(
            _same(outputs[row], one, self.eps) for row, (one, _) in alone.items()
        )

    def _alone(self, row: int, cotangents: Tensor) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Return a sample's output, and for each cotangent its gradients by parameter."""
        args, kwargs = self._select([row])
        (output,) = self._forward(args, kwargs, Replay.random_state(self.plain))
        assert output is not None
        if output.shape != (1, *cotangents.shape[1:]):
            raise RuntimeError(f"its output has the shape {tuple(output.shape)}")
        gradients: list[dict[str, Tensor]] = []
        for cotangent in cotangents:
            with without_multi_grad_hooks(self.parameters.values()):
                found = torch.autograd.grad(
                    output,
                    list(self.parameters.values()),
                    cotangent.unsqueeze(0),
                    retain_graph=True,
                    allow_unused=True,
                )
            gradients.append(
                {
                    name: _dense(gradient)
                    for name, gradient in zip(self.parameters, found, strict=True)
                    if gradient is not None
                }
            )
        return output[0].detach(), gradients

    def _select(self, rows: list[int]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._places is None:
            self._places = places_of_inputs(self.model, self.args, self.kwargs, self.m)
        leaves, spec = tree_flatten((self.args, self.kwargs))
        places = iter(self._places)
        selected: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(
            [
                _rows_of(x, next(places), self.m, rows) if isinstance(x, Tensor) else x
                for x in leaves
            ],
            spec,
        )
        return selected

    def _coupling_modules(self) -> list[str]:
        return [
            f"{name!r} ({type(module).__name__})"
            for name, module in self.plain.named_modules()
            if isinstance(module, _BatchNorm)
            and (module.training or (module.running_mean is None and module.running_var is None))
        ]

    def _gradients_are_finite(self, single: list[list[dict[str, Tensor]]]) -> bool:
        wrong = sorted(
            {
                name
                for gradients in single
                for name, gradient in gradients[0].items()
                if not bool(torch.isfinite(gradient).all())
            }
        )
        if wrong:
            self.found.append(f"The gradients of {_names(wrong)} are not finite.")
        return not wrong

    def _compare_gradient(
        self,
        outputs: Tensor,
        cotangent: Tensor,
        rows: list[int],
        single: list[list[dict[str, Tensor]]],
    ) -> None:
        """The batch's gradient, of these samples' outputs alone, is the sum of theirs."""
        only = torch.zeros_like(cotangent)
        only[rows] = cotangent[rows]
        with without_multi_grad_hooks(self.parameters.values()):
            found = torch.autograd.grad(
                outputs, list(self.parameters.values()), only, allow_unused=True
            )
        total = math.sqrt(sum(_square(g) for gradients in single for g in gradients[0].values()))
        wrong = []
        for name, gradient in zip(self.parameters, found, strict=True):
            parts = [gradients[0][name] for gradients in single if name in gradients[0]]
            expected = sum(parts, torch.zeros_like(self.parameters[name]))
            found_here = torch.zeros_like(expected) if gradient is None else _dense(gradient)
            size = math.sqrt(sum(_square(part) for part in parts))
            if not math.sqrt(_square(found_here - expected)) <= _slack(size, total, self.eps):
                wrong.append(name)
        if wrong:
            self.found.append(
                f"The gradient of the batch is not made of the gradients of its samples for "
                f"{_names(wrong)}: look for state that a forward leaves behind, hooks that change "
                "gradients, and custom autograd functions."
            )

    def _compare_engine(
        self,
        tape: Tape,
        cotangents: Tensor,
        rows: list[int],
        single: list[list[dict[str, Tensor]]],
    ) -> None:
        expected = {
            name: torch.stack([_gram(gradients, name, parameter) for gradients in single])
            for name, parameter in self.parameters.items()
        }
        beyond = [name for name, gram in expected.items() if not bool(gram.isfinite().all())]
        if beyond:
            self.found.append(
                f"The gradients of {_names(beyond)} are so large that their squares are infinite."
            )
            return
        largest = [gram.diagonal(dim1=1, dim2=2).amax(0) for gram in expected.values()]
        total = torch.stack(largest).sum(0).sqrt()  # (2,), of all parameters
        try:
            (root,) = tape.outputs
            pulled = dict(self._pulled(tape, root, cotangents, rows))
            norms = None
            if self.loss is not None:
                norms = per_sample_gradient_norms(self.model, self.loss, self.inputs, self.targets)
        except Exception as error:
            text = str(error) if isinstance(error, RuntimeError) else _said(error)
            self.found.append(text)
            return
        wrong, worst = [], 0.0
        for name, gram in expected.items():
            mine = pulled.get(name, torch.zeros_like(gram)).double()
            sizes = gram.diagonal(dim1=1, dim2=2).sqrt()  # (rows, 2)
            slack = _slack(sizes, total, self.eps)
            off = (mine - gram).abs() > 2 * slack.unsqueeze(2) * sizes.unsqueeze(1) + (
                slack.unsqueeze(2) * slack.unsqueeze(1)
            )
            if bool(off.any()) or not bool(torch.isfinite(mine).all()):
                wrong.append(name)
                share = (mine - gram).abs().amax() / gram.abs().amax()
                worst = max(worst, float(share))
        if wrong:
            self.found.append(
                f"The per-sample gradients of {_names(wrong)} are measured wrong (squared norms "
                f"and inner products by up to {worst:.2g} of themselves): a module or a function "
                "uses them in a way that the engine misreads. Register a rule for it "
                "(conjopt.measure.layers.register_rule), or freeze these parameters."
            )
            return
        if norms is not None:
            plain = torch.stack([gram[:, 0, 0] for gram in expected.values()]).sum(0).sqrt()
            if not _same(plain, norms[rows].double(), self.eps):
                self.found.append(
                    f"per_sample_gradient_norms gives {norms[rows].tolist()} for the samples "
                    f"{rows}, and autograd {plain.tolist()}."
                )
        self._compare_structure(rows)

    def _pulled(
        self, tape: Tape, root: Tensor, cotangents: Tensor, rows: list[int]
    ) -> Iterator[tuple[str, Tensor]]:
        picked = torch.tensor(rows, device=root.device)
        for name, pieces in tape.pull([root], [[cotangent] for cotangent in cotangents]):
            with torch.no_grad():  # the inputs of layers have graphs
                gram = sample_gram([piece.select(picked) for piece in pieces])
            yield name, gram

    def _compare_structure(self, rows: list[int]) -> None:
        inputs = Arguments(*self._select(rows))
        expected: list[Tensor] = []
        for row in rows:
            one, named = self._select([row])
            (output,) = self._forward(one, named, Replay.random_state(self.plain))
            assert output is not None
            if output.numel() > MOST_OUTPUTS:
                return
            parameters = list(self.parameters.values())
            with without_multi_grad_hooks(parameters):
                jacobian = [
                    torch.autograd.grad(f, parameters, retain_graph=True, materialize_grads=True)
                    for f in output.flatten()
                ]
            J = torch.stack(
                [torch.cat([_dense(g).flatten().double() for g in row]) for row in jacobian]
            )
            expected.append(J @ J.T)
        try:
            mine = structure_matrix(self.model, inputs)
        except Exception as error:
            self.found.append(f"The structure matrix cannot be measured: {_said(error)}")
            return
        if not _same(torch.stack(expected), mine.double(), self.eps):
            self.found.append(
                "The structure matrices of two samples are measured wrong: they differ from "
                "products of autograd's Jacobians."
            )


def _rows_of(tensor: Tensor, at: Samples | None, samples: int, rows: list[int]) -> Tensor:
    if at is None:
        return tensor
    index = torch.tensor(rows, device=tensor.device)
    if tensor.shape[at.dim] == samples:
        return tensor.index_select(at.dim, index)
    split = tensor.unflatten(at.dim, (samples, -1)).index_select(at.dim, index)
    return split.flatten(at.dim, at.dim + 1)


def _gram(gradients: list[dict[str, Tensor]], name: str, like: Tensor) -> Tensor:
    """Inner products of a parameter's gradients for the cotangents, in float64."""
    k = len(gradients)
    if name not in gradients[0]:
        return like.new_zeros(k, k, dtype=torch.float64)
    x = torch.stack([gradient[name].flatten().double() for gradient in gradients])
    return x @ x.T


def _dense(gradient: Tensor) -> Tensor:
    """Fill in what a table with sparse gradients leaves out."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def _same(expected: Tensor, found: Tensor | None, eps: float) -> bool:
    if found is None or expected.shape != found.shape:
        return False
    a, b = expected.detach().double(), found.detach().double()
    both = torch.isfinite(a) & torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), torch.isfinite(b)):
        return False
    a, b = torch.where(both, a, 0), torch.where(both, b, 0)
    size = float(a.abs().amax()) if a.numel() else 0.0
    return not a.numel() or float((a - b).abs().amax()) <= 3 * math.sqrt(eps) * size


def _slack(size: Any, total: Any, eps: float) -> Any:
    """How far gradients of a parameter may be off by rounding."""
    return 3 * math.sqrt(eps) * size + 100 * eps * total


def _square(tensor: Tensor) -> float:
    return float(tensor.detach().double().square().sum())


def _eps(tensors: list[Tensor]) -> float:
    """The coarsest rounding that goes into outputs and gradients."""
    eps = max(torch.finfo(tensor.dtype).eps for tensor in tensors)
    coarse = torch.backends.cudnn.allow_tf32 or torch.backends.cuda.matmul.allow_tf32
    if coarse and any(t.is_cuda and t.dtype == torch.float32 for t in tensors):
        eps = max(eps, 2.0**-10)  # of TF32
    return eps


def _drops_out(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    dropout = getattr(module, "dropout", 0)
    return isinstance(dropout, float) and dropout > 0


def _other(state: RandomState) -> RandomState:
    """Another state of the same generators."""
    cpu = torch.Generator().manual_seed(int(state[0].sum()) + 1)
    others = {}
    for device, found in state[1].items():
        generator = torch.Generator(device).manual_seed(int(found.sum()) + 1)
        others[device] = generator.get_state()
    return cpu.get_state(), others


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _count(what: str, names: list[str]) -> str:
    return f"The {what}" if len(names) == 1 else f"The {what}s"


def _names(names: list[str]) -> str:
    shown = [repr(name) for name in names[:8]]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(shown) + more
