"""`GGN_B u` from an ordinary loop, against the dense Gauss-Newton matrix in float64 (Thm 2.6)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import entmax
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from conjopt import ConjSGD
from conjopt.losses import EntmaxLoss, SparsemaxLoss
from conjopt.measure.parts import curvature_product
from conjopt.measure.process_group import Ranks
from conjopt.optim.blocks import Blocks
from conjopt.optim.measuring import _changes, _top
from conjopt.optim.memory import Memory

LABELS = torch.tensor([0, 2, 1, 2, 0, 1, 1])
WEIGHTS = torch.tensor([1.0, 0.3, 2.5]).double()


def network(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def inputs(size: int = 7) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(1)).double()


def values(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(2)).double()


@dataclasses.dataclass
class Case:
    """What a loop does, and the factor ``c`` of its criterion: value ``= c mean l + offset``."""

    criterion: nn.Module
    targets: Tensor
    scale: float
    make: Callable[[Tensor], Tensor] = lambda outputs: outputs
    factor: float = 1.0
    outputs: int = 3


def through(model: nn.Module, case: Case, x: Tensor) -> Callable[[dict[str, Tensor]], Tensor]:
    return lambda at: case.make(functional_call(model, at, (x,)))


def dense(model: nn.Module, case: Case, x: Tensor, y: Tensor, hessian: Tensor | None) -> Tensor:
    """(P, P), with the criterion's Hessian by automatic differentiation unless it is given.

    Before the model is watched: hooks cannot go through function transforms.
    """
    at = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    run = through(model, case, x)
    outputs = run(at).detach()
    if hessian is None:
        hessian = torch.autograd.functional.hessian(lambda o: case.criterion(o, y), outputs)
        hessian = hessian.reshape(outputs.numel(), outputs.numel()) / case.scale
    jacobians = jacrev(run)(at)
    J = torch.cat([jacobians[name].reshape(outputs.numel(), -1) for name in at], 1)
    return J.T @ hessian @ J


def prepared(
    model: nn.Module, case: Case, batches: list[tuple[Tensor, Tensor]], observe: bool = False
) -> tuple[ConjSGD, Any, Blocks]:
    """The optimizer after the backward passes of a loop, before its step."""
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=case.criterion, direction="sgd", momentum=0
    )
    for x, y in batches:
        outputs = case.make(model(x))
        if observe:
            optimizer.observe(outputs, y, scale=case.factor)
            loss = type(case.criterion).forward(case.criterion, outputs, y)
        else:
            loss = case.criterion(outputs, y)
        (case.factor * loss).backward()
    batch = optimizer._watch.batch()
    return optimizer, batch, Blocks.of(optimizer.param_groups, optimizer.state, optimizer._names)


def product(optimizer: ConjSGD, batch: Any, blocks: Blocks, u: Tensor) -> Tensor:
    sizes = [p.numel() for p in blocks.parameters]
    along = [part.reshape(p.shape) for part, p in zip(u.split(sizes), blocks.parameters)]
    forward = batch.forwards[-1]
    with torch.no_grad():
        _, changes = _changes(optimizer._product, forward, forward.replay, blocks, along)
        own = [o.kappa * o.scale for o in batch.observations if o.forward is forward]
        pull = forward.replay.adjoint(blocks.by_name)
        bent = curvature_product(batch, forward, changes, pull, sum(own))
    assert [tuple(t.shape) for t in bent] == [tuple(p.shape) for p in blocks.parameters]
    return torch.cat([t.flatten() for t in bent])


def check(
    model: nn.Module,
    case: Case,
    batches: list[tuple[Tensor, Tensor]],
    *,
    observe: bool = False,
    hessian: Tensor | None = None,
    tolerance: float = 1e-10,
) -> None:
    """Five directions through the product and through the matrix."""
    matrix = dense(model, case, *batches[-1], hessian)
    optimizer, batch, blocks = prepared(model, case, batches, observe)
    scale = matrix.norm()
    assert scale > 1e-3
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(matrix.shape[0], generator=generator).double()
        bent = product(optimizer, batch, blocks, u)
        assert (bent - matrix @ u).norm() <= tolerance * scale * u.norm()


SMOOTHED = torch.softmax(2 * values(7, 3), 1)
COUNTS = torch.tensor([0.0, 3, 1, 250, 7, 2, 40]).double()[:, None] * torch.ones(3).double()
SEQUENCE = torch.tensor([[0, 2], [1, -100], [2, 2], [0, 1], [1, 1], [-100, -100], [2, 0]])

CASES = {
    "softmax": Case(nn.CrossEntropyLoss(), LABELS, 1),
    "softmax, soft targets": Case(nn.CrossEntropyLoss(), SMOOTHED, 1),
    "softmax, smoothed": Case(nn.CrossEntropyLoss(label_smoothing=0.2), LABELS, 1),
    "softmax, sum": Case(nn.CrossEntropyLoss(reduction="sum"), LABELS, 7),
    "softmax, class weights": Case(nn.CrossEntropyLoss(weight=WEIGHTS), LABELS, 1),
    "softmax, class weights, sum": Case(
        nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), LABELS, float(WEIGHTS[LABELS].sum())
    ),
    "softmax, ignored": Case(nn.CrossEntropyLoss(ignore_index=2), LABELS, 1),
    "softmax, ignored, sum": Case(nn.CrossEntropyLoss(ignore_index=2, reduction="sum"), LABELS, 5),
    "softmax, scaled loss": Case(nn.CrossEntropyLoss(), LABELS, 1, factor=1024.0),
    "squared": Case(nn.MSELoss(), values(7, 3), 2 / 3),
    "squared, sum": Case(nn.MSELoss(reduction="sum"), values(7, 3), 2 * 7),
    "logistic": Case(nn.BCEWithLogitsLoss(), values(7, 3).round(), 1 / 3),
    "logistic, sum": Case(nn.BCEWithLogitsLoss(reduction="sum"), values(7, 3), 7),
    "Poisson": Case(nn.PoissonNLLLoss(), COUNTS, 1 / 3),
    "Poisson, sum": Case(nn.PoissonNLLLoss(reduction="sum"), COUNTS, 7),
    "sequences": Case(nn.CrossEntropyLoss(), SEQUENCE, 1, lambda o: o.reshape(-1, 3, 2), outputs=6),
    "sequences, class weights": Case(
        nn.CrossEntropyLoss(weight=WEIGHTS), SEQUENCE, 1, lambda o: o.reshape(-1, 3, 2), outputs=6
    ),
    "sliced and scaled": Case(nn.CrossEntropyLoss(), LABELS, 1, lambda o: o[:, :3] * 2, outputs=5),
    "normalised": Case(nn.CrossEntropyLoss(), LABELS, 1, lambda o: 3 * o / o.norm(dim=1)[:, None]),
}


@pytest.mark.parametrize("observe", [False, True], ids=["criterion called", "observed"])
@pytest.mark.parametrize("name", CASES)
def test_the_product_is_that_of_the_dense_matrix(name: str, observe: bool):
    case = CASES[name]
    model, x = network(case.outputs), inputs()
    check(model, case, [(x, case.targets)], observe=observe)


@pytest.mark.parametrize("order", [1.5, 2.0])
def test_entmax_whose_hessian_is_known(order: float):
    model, x = network(), inputs()
    criterion = EntmaxLoss(order) if order < 2 else SparsemaxLoss()
    case = Case(criterion, LABELS, 1)
    link = entmax.entmax15 if order < 2 else entmax.sparsemax
    with torch.no_grad():
        p = link(3 * model(x), dim=1)  # some outside of the support
        s = torch.where(p > 0, p ** (2 - order), 0.0)
    assert (p == 0).any()
    blocks = torch.diag_embed(s) - s[:, :, None] * s[:, None] / s.sum(1)[:, None, None]
    case.make = lambda outputs: 3 * outputs
    check(model, case, [(x, LABELS)], hessian=torch.block_diag(*blocks) / len(x))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_last_of_accumulated_batches_counts(reduction: str):
    model, x = network(), inputs()
    last = 3
    criterion = nn.CrossEntropyLoss(weight=WEIGHTS, reduction=reduction)
    scale = 1.0 if reduction == "mean" else float(WEIGHTS[LABELS[-last:]].sum())
    case = Case(criterion, LABELS, scale, factor=0.5)
    batches = [(x[:-last], LABELS[:-last]), (x[-last:], LABELS[-last:])]
    alone, other = (dense(model, case, *batch, None) for batch in batches)
    assert (alone - other).norm() > 0.1 * other.norm()  # scaled as the last batch alone
    check(model, case, batches)


def test_two_calls_of_the_criterion_on_one_forward():
    model, x, y = network(6), inputs(), LABELS
    criterion = nn.CrossEntropyLoss()
    parts = [
        dense(model, Case(criterion, y, 1, lambda o, s=s: o[:, s]), x, t, None)
        for s, t in ((slice(0, 3), y), (slice(3, 6), y.flip(0)))
    ]
    matrix = (parts[0] + 3 * parts[1]) / 4  # by their weights in what is differentiated
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, direction="sgd", momentum=0
    )
    outputs = model(x)
    (criterion(outputs[:, :3], y) + 3 * criterion(outputs[:, 3:], y.flip(0))).backward()
    batch = optimizer._watch.batch()
    blocks = Blocks.of(optimizer.param_groups, optimizer.state, optimizer._names)
    u = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0)).double()
    bent = product(optimizer, batch, blocks, u)
    assert (bent - matrix @ u).norm() <= 1e-10 * matrix.norm() * u.norm()


def test_frozen_parameters_are_left_out():
    model, x = network(), inputs()
    model[0].weight.requires_grad_(False)
    model[2].bias.requires_grad_(False)
    check(model, Case(nn.CrossEntropyLoss(), LABELS, 1), [(x, LABELS)])


class Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.EmbeddingBag(9, 4, mode="mean"), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.table(tokens).tanh())


def test_an_embedding_bag_goes_by_differences():
    model = Bag().double()
    tokens = torch.randint(9, (7, 5), generator=torch.Generator().manual_seed(0))
    case = Case(nn.CrossEntropyLoss(), LABELS, 1)
    # jacrev has no rule for the bag: the same function by the table's rows.
    reference = Bag().double()
    reference.load_state_dict(model.state_dict())
    reference.forward = lambda t: reference.head(reference.table.weight[t].mean(1).tanh())
    matrix = dense(reference, case, tokens, LABELS, None)
    optimizer, batch, blocks = prepared(model, case, [(tokens, LABELS)])
    u = torch.randn(matrix.shape[0], generator=torch.Generator().manual_seed(0)).double()
    bent = product(optimizer, batch, blocks, u)
    assert optimizer._product.method == "differences"
    # Central differences of float64 are right to about eps^(2/3).
    assert (bent - matrix @ u).norm() <= 1e-8 * matrix.norm() * u.norm()


@pytest.mark.parametrize("name", ["softmax", "squared, sum", "Poisson", "sliced and scaled"])
def test_the_power_method_comes_from_below_to_the_greatest_eigenvalue(name: str):
    case = CASES[name]
    model, x = network(case.outputs), inputs()
    matrix = dense(model, case, x, case.targets, None)
    optimizer, batch, blocks = prepared(model, case, [(x, case.targets)])
    blocks.scale(batch.weight, False)
    vector = torch.cat([g.flatten() for g in blocks.gradients])
    before, greatest = 0.0, float(torch.linalg.eigvalsh(matrix)[-1])
    for products in range(1, 7):
        with torch.no_grad():
            top, lost = _top(
                batch,
                batch.forwards[-1],
                None,
                blocks,
                optimizer._product,
                products,
                batch.weight,
                Ranks(),
                Memory(),
            )
        top = top.item()
        assert not lost
        vector = matrix @ (vector / vector.norm())
        assert top == pytest.approx(float(vector.norm()), rel=1e-9)
        assert before * (1 - 1e-9) <= top <= greatest * (1 + 1e-9)
        before = top


def test_the_product_changes_nothing():
    case, x = CASES["softmax"], inputs()
    model = network()
    optimizer, batch, blocks = prepared(model, case, [(x, LABELS)])
    before = [p.grad.clone() for p in model.parameters()]
    torch.manual_seed(5)
    product(
        optimizer, batch, blocks, torch.ones(sum(p.numel() for p in model.parameters())).double()
    )
    drawn = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))
    assert all(torch.equal(b, p.grad) for b, p in zip(before, model.parameters()))
