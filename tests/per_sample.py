"""What the tests of per-sample gradients share: a dense reference, and models in one line."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from conjopt.measure.layers.pieces import batch_gram, sample_gram, squared_norms
from conjopt.measure.layers.rules import pieces_of
from conjopt.measure.layers.tape import Tape

__all__ = ["F", "Function", "M", "agree", "case_table", "images", "sequences", "tokens", "vectors"]

M = 5  # samples


class Function(nn.Module):
    """A model by its forward, with modules `self.m` and parameters by name."""

    def __init__(self, forward: Any, *modules: nn.Module, **parameters: Tensor) -> None:
        super().__init__()
        self.call = forward
        self.m = nn.ModuleList(modules)
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self, *args, **kwargs)


def vectors() -> Tensor:
    return torch.randn(M, 6)


def sequences(places: int = 3) -> Tensor:
    return torch.randn(M, places, 6)


def images() -> Tensor:
    return torch.randn(M, 4, 6, 6)


def tokens(places: int, size: int = 7) -> Tensor:
    return torch.randint(size, (M, places))


def case_table() -> tuple[Callable[[str], Any], dict[str, Any]]:
    """A decorator that names functions, and the table that it fills."""
    cases: dict[str, Any] = {}

    def named(name: str) -> Any:
        def put(function: Any) -> Any:
            cases[name] = function
            return function

        return put

    return named, cases


def jacobians(model: nn.Module, alone: list[Any]) -> Tensor:
    """`(m, k, P)`, each sample alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for inputs in alone:
        outputs = model(*inputs).flatten()
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g).flatten()
                            for p, g in zip(
                                parameters,
                                torch.autograd.grad(
                                    output, parameters, retain_graph=True, allow_unused=True
                                ),
                            )
                        ]
                    )
                    for output in outputs
                ]
            )
        )
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor) -> None:
    error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error < 1e-12, f"relative error {error:.1e}"


def every_other(tape: Tape, outputs: Tensor, residuals: Tensor) -> None:
    """Half of the samples have the gradients that they have among all."""
    for use in tape.uses:
        edges = [edge for edge in use.edges if edge is not None]
        arriving = iter(
            torch.autograd.grad([outputs], edges, [residuals], retain_graph=True, allow_unused=True)
        )
        cotangents = [
            None if edge is None or (g := next(arriving)) is None else g.reshape(shape)
            for edge, shape in zip(use.edges, use.shapes, strict=True)
        ]
        if all(cotangent is None for cotangent in cotangents):
            continue
        part, fewer = use.take(slice(None, None, 2), cotangents)
        full = pieces_of(use, [None if c is None else c[None] for c in cotangents])
        half = pieces_of(part, [None if c is None else c[None] for c in fewer])
        assert [id(weight) for weight, _ in half] == [id(weight) for weight, _ in full]
        for (_, found), (_, among) in zip(half, full, strict=True):
            expected = among.slab(0, among.sizes[3])[:, ::2].flatten(2)
            close(found.slab(0, found.sizes[3]).flatten(2), expected)


def agree(
    model: nn.Module,
    inputs: Any,
    *,
    alone: Callable[[int], tuple[Any, ...]] | None = None,
    frozen: str | None = None,
) -> None:
    """Norms and Gram matrices are those of the dense Jacobian, and nothing is left behind."""
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    inputs = tree_map(lambda t: t.double() if t.is_floating_point() else t, inputs)
    m = len(inputs[0])
    alone = alone or (lambda i: tuple(t[i : i + 1] for t in inputs))
    model.double()
    if any(isinstance(p, nn.UninitializedParameter) for p in model.parameters()):
        model(*inputs)
        model.double()
    if frozen is not None:
        dict(model.named_parameters()).get(frozen, torch.zeros(())).requires_grad_(False)
    each = [
        tree_map(lambda t: t.double() if t.is_floating_point() else t, alone(i)) for i in range(m)
    ]
    dense = jacobians(model, each)  # (m, k, P)
    k = min(dense.shape[1], 6)
    tape = Tape(model, inputs)
    outputs = tape.only_output()
    residuals = outputs.detach().sin() + 0.1
    expected = torch.einsum("mkp,mk->mp", dense, residuals.reshape(m, -1)).square().sum(1)
    total = torch.zeros(m, dtype=torch.float64)
    for _, pieces in tape.pull([outputs], [[residuals]]):
        total = total + squared_norms(pieces)
    close(total, expected)
    every_other(tape, outputs, residuals)
    basis = []
    for j in range(k):
        unit = torch.zeros(m, dense.shape[1], dtype=torch.float64)
        unit[:, j] = 1
        basis.append([unit.reshape(outputs.shape)])
    within = torch.zeros(m, k, k, dtype=torch.float64)
    across = torch.zeros(m, k, m, k, dtype=torch.float64)
    for _, pieces in tape.pull([outputs], basis):
        within, across = within + sample_gram(pieces), across + batch_gram(pieces)
    dense = dense[:, :k]
    close(within, dense @ dense.mT)
    close(across, torch.einsum("mkp,nlp->mknl", dense, dense))
