"""Strategies of hypothesis for what the theory speaks of."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from conjopt import losses as fenchel_young
from conjopt.losses import potential_of
from conjopt.losses.reading import PotentialOf
from conjopt.potentials import Entmax, Logistic, Poisson, Potential, Softmax, Sparsemax, Squared
from conjopt.testing.networks import Network

__all__ = [
    "Batch",
    "DiscreteLaw",
    "batches",
    "discrete_laws",
    "losses",
    "outputs",
    "potentials",
    "targets",
]

ROWS = 2  # of every drawn tensor
SCALES = (1.0, 1e-3, 30.0, 300.0)  # of outputs, the simplest first


def potentials(*, smooth: bool = False) -> st.SearchStrategy[Potential]:
    """Potentials of this package.

    Args:
        smooth: only those whose link has a Lipschitz constant.

    Example:
        >>> from hypothesis import given
        >>> @given(potentials(smooth=True))
        ... def test(potential):
        ...     assert potential.smoothness is not None
        >>> test()
    """
    orders = st.floats(1.01, 2.0, exclude_min=True).map(lambda a: Entmax(round(a, 2)))
    fixed: list[Potential] = [Softmax(), Sparsemax(), Squared(), Logistic()]
    if not smooth:
        fixed.append(Poisson())
    return st.one_of(st.sampled_from(fixed), orders)


@st.composite
def outputs(draw: st.DrawFn, *, k: int | None = None, largest: float = 300.0) -> Tensor:
    """Outputs ``f``, (2, k) in float64: equal, small, large, or one far above the others.

    Args:
        draw: given by hypothesis.
        k: number of outputs; None for 1 to 12.
        largest: of their sizes, from 0.001; among these are also 0.001, 1, 30 and 300, as far as
            that.

    Raises:
        ValueError: when drawn from, for options out of range.

    Example:
        >>> from hypothesis import given
        >>> @given(outputs(k=3))
        ... def test(f):
        ...     assert f.shape == (2, 3)
        >>> test()
    """
    _check("outputs", "k", k)
    if not min(SCALES) <= largest < math.inf:
        raise ValueError(f"outputs: got largest={largest}, expected a number from {min(SCALES)}")
    width = draw(st.integers(1, 12)) if k is None else k
    return draw(_scaled((ROWS, width), largest))


@st.composite
def _scaled(draw: st.DrawFn, shape: tuple[int, ...], largest: float) -> Tensor:
    scale = draw(st.sampled_from([s for s in dict.fromkeys((*SCALES, largest)) if s <= largest]))
    size = math.prod(shape)
    values = draw(st.lists(st.floats(-1, 1, width=32), min_size=size, max_size=size))
    return scale * torch.tensor(values, dtype=torch.float64).reshape(shape)


@st.composite
def targets(draw: st.DrawFn, potential: Potential, f: Tensor) -> Tensor:
    """Targets ``y`` in the domain of a potential, in the shape of outputs.

    Vertices, mixtures and zeros for potentials on the simplex; the link of other outputs for all,
    which is in the domain of every potential.

    Args:
        draw: given by hypothesis.
        potential: any.
        f: outputs (..., k).

    Raises:
        ValueError: when drawn from, if these are no outputs.

    Example:
        >>> from hypothesis import given
        >>> @given(targets(Softmax(), torch.zeros(2, 3, dtype=torch.float64)))
        ... def test(y):
        ...     assert bool((y.sum(-1) - 1).abs().max() < 1e-12)
        >>> test()
    """
    if not isinstance(f, Tensor) or f.ndim == 0 or not f.is_floating_point():
        raise ValueError(
            f"targets: got f={f!r}, expected outputs, a floating-point tensor (..., k)"
        )
    k, rows = f.shape[-1], f.shape[:-1].numel()
    kinds = ["link", "near"] + (["vertex", "mixture"] if potential.on_simplex else [])
    kind = draw(st.sampled_from(kinds))
    if kind == "vertex":
        classes = draw(st.lists(st.integers(0, k - 1), min_size=rows, max_size=rows))
        return torch.nn.functional.one_hot(torch.tensor(classes), k).to(f).reshape(f.shape)
    if kind == "mixture":
        parts = st.lists(st.integers(0, 4), min_size=f.numel(), max_size=f.numel())
        mass = torch.tensor(draw(parts), dtype=f.dtype).reshape(f.shape)
        mass[..., 0] += 1
        return mass / mass.sum(-1, keepdim=True)
    if kind == "near":
        return potential.link(f + 1e-2)
    return potential.link(draw(_scaled(tuple(f.shape), 1.0)).to(f))


@st.composite
def losses(
    draw: st.DrawFn,
    *,
    k: int | None = None,
    smooth: bool = False,
    one_term: bool = False,
    kinds: tuple[str, ...] | None = None,
) -> nn.Module:
    """Losses that `conjopt.losses.potential_of` reads, from ``CrossEntropyLoss()``.

    torch's cross-entropy, mean squared error, binary cross-entropy of logits and Poisson loss, and
    the losses of this package; reduced by mean or sum, with label smoothing, an ignored class and
    class or element weights where they make sense.

    Args:
        draw: given by hypothesis.
        k: number of outputs, for weights; None leaves them out.
        smooth: only those whose link has a Lipschitz constant.
        one_term: only those with one term for each sample whose outputs are ``(m, k)``, as
            `conjopt.bounds.risk_sandwich` needs: without weights of elements, one for each of k,
            which do not fit outputs of tokens.
        kinds: names of losses in ``torch.nn`` and `conjopt.losses`; None for all.

    Raises:
        ValueError: when drawn from, for options out of range, or if no loss is left.

    Example:
        >>> from hypothesis import given
        >>> @given(losses(k=3, smooth=True))
        ... def test(loss):
        ...     assert potential_of(loss).potential.smoothness is not None
        >>> test()
    """
    _check("losses", "k", k)
    unknown = [name for name in kinds or () if name not in _LOSSES]
    names = [n for n in (_LOSSES if kinds is None else kinds) if not (smooth and "Poisson" in n)]
    if unknown or not names:
        raise ValueError(
            f"losses: got kinds={kinds}, smooth={smooth}; expected some of {', '.join(_LOSSES)}, "
            "not those of Poisson alone where the link is to be smooth"
        )
    name = draw(st.sampled_from(names))
    kind = getattr(nn, name, None) or getattr(fenchel_young, name)
    # All of them for every loss: what needs fewer choices counts as simpler.
    reduction = draw(st.sampled_from(["mean", "sum"]))
    smoothing, ignored = draw(st.sampled_from([0.0, 0.1])), draw(st.sampled_from([-100, 0]))
    full, weighted = draw(st.booleans()), k is not None and draw(st.booleans())
    on_simplex = name in _CLASSES
    options: dict[str, Any] = {"reduction": reduction}
    if on_simplex:
        options |= {"label_smoothing": smoothing, "ignore_index": ignored if k != 1 else -100}
    if weighted and (on_simplex or (not one_term and name in _ELEMENT_WEIGHTS)):
        weights = draw(st.lists(st.sampled_from([1.0, 0.5, 3.0]), min_size=k or 0, max_size=k))
        options["weight"] = torch.tensor(weights, dtype=torch.float64)
        if name == "BCEWithLogitsLoss":
            options["pos_weight"] = options["weight"].flip(0)
    if name == "PoissonNLLLoss":
        options["full"] = full
    # As a call, which is what hypothesis prints of it.
    return draw(st.builds(kind, **{n: st.just(v) for n, v in options.items()}))


_CLASSES = ("CrossEntropyLoss", "SoftmaxLoss", "SparsemaxLoss", "EntmaxLoss")
_ELEMENT_WEIGHTS = ("BCEWithLogitsLoss", "SquaredLoss", "LogisticLoss", "PoissonLoss")
_LOSSES = (
    "CrossEntropyLoss",
    "MSELoss",
    "BCEWithLogitsLoss",
    "PoissonNLLLoss",
    "SoftmaxLoss",
    "SquaredLoss",
    "LogisticLoss",
    "SparsemaxLoss",
    "EntmaxLoss",
    "PoissonLoss",
)


class Batch(NamedTuple):
    """Inputs and targets of some samples.

    Attributes:
        inputs: of the model, ``(m, ...)``.
        targets: of the loss.

    Example:
        >>> Batch(torch.ones(2, 3), torch.tensor([0, 1])).targets
        tensor([0, 1])
    """

    inputs: Tensor
    targets: Tensor


@st.composite
def batches(
    draw: st.DrawFn,
    network: Network | tuple[int, ...],
    loss: nn.Module,
    *,
    outputs: tuple[int, ...] | None = None,
    max_samples: int = 5,
) -> Batch:
    """Batches that fit a network and a loss, from one sample of ones with the first target.

    Inputs are constant, normal, normal with samples that are repeated, or normal and very small or
    large. Targets are all alike, different hard ones, soft ones where the loss takes them, and
    some that it ignores; never all of them.

    Args:
        draw: given by hypothesis.
        network: whose inputs they are; or the shape of one sample of float64 inputs.
        loss: one that `conjopt.losses.potential_of` reads.
        outputs: shape of one sample of the outputs; needed with a shape, and known of a network.
        max_samples: of a batch.

    Raises:
        ValueError: when drawn from, for a shape without that of the outputs, or no samples.

    Example:
        >>> from hypothesis import given
        >>> from conjopt.testing import Network
        >>> network, loss = Network("convolution", k=3), nn.CrossEntropyLoss()
        >>> @given(batches(network, loss))
        ... def test(batch):
        ...     assert bool(loss(network(batch.inputs), batch.targets).isfinite())
        >>> test()
    """
    _check("batches", "max_samples", max_samples)
    if outputs is None:
        if not isinstance(network, Network):
            raise ValueError(
                f"batches: got the shape {network} of inputs, which needs outputs=, the shape of "
                "one sample of what the model returns"
            )
        outputs = network.outputs
    shape = network.shape if isinstance(network, Network) else network
    vocabulary = network.vocabulary if isinstance(network, Network) else None
    m = draw(st.integers(1, max_samples))
    kind = draw(st.sampled_from(["ones", "normal", "repeated", "small", "large"]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    if vocabulary is not None:
        inputs = torch.randint(vocabulary, (m, *shape), generator=generator)
        inputs = torch.zeros_like(inputs) if kind == "ones" else inputs
    else:
        inputs = torch.randn(m, *shape, generator=generator, dtype=torch.float64)
        inputs = inputs * {"small": 1e-3, "large": 30.0}.get(kind, 1.0)
        inputs = torch.ones_like(inputs) if kind == "ones" else inputs
    if kind == "repeated":
        inputs = inputs[torch.arange(m) // 2]
    view = potential_of(loss)
    found = torch.randn(m, *outputs, generator=generator, dtype=torch.float64)
    how = draw(st.sampled_from(["alike", "hard", "ignored", "soft"]))
    return Batch(inputs, fitting_targets(view, found, how, generator))


def _check(owner: str, name: str, value: int | None) -> None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"{owner}: got {name}={value!r}, expected a whole number, 1 or more")


def takes_probabilities(view: PotentialOf) -> bool:
    """Whether a loss on the simplex takes points of it as targets: unless a class is ignored."""
    return getattr(view.criterion, "ignore_index", -100) < 0


def fitting_targets(
    view: PotentialOf, f: Tensor, how: str, generator: torch.Generator, apart: float = 1.0
) -> Tensor:
    """Targets of a criterion, for outputs.

    Args:
        view: the criterion.
        f: outputs ``(m, ...)``.
        how: "alike", "hard", "ignored" (as hard, every other one ignored but the first), "soft"
            (the link of other outputs; hard for a loss that does not take it).
        generator: of random numbers.
        apart: how far the outputs, that soft targets are the link of, are from ``f``.
    """
    potential = view.potential
    noise = torch.randn(f.shape, generator=generator, dtype=torch.float64).to(f)
    if how == "soft" and (not potential.on_simplex or takes_probabilities(view)):
        f = f + apart * noise
        if potential.on_simplex:
            return potential.link(f.movedim(1, -1)).movedim(-1, 1)
        return (
            potential.link(f.unsqueeze(-1)).squeeze(-1) if potential.separable else _link(view, f)
        )
    if potential.on_simplex:
        ignored = view.criterion.ignore_index
        index = torch.zeros_like(noise[:, 0], dtype=torch.long)
        index = index if how == "alike" else noise.argmax(1)
        if 0 <= ignored < f.shape[1]:  # what counts
            index = torch.where(index == ignored, (ignored + 1) % f.shape[1], index)
        if how == "ignored":
            index.flatten()[1::2] = ignored
        return index
    if potential == Squared():
        return torch.ones_like(f) if how == "alike" else noise
    if potential == Poisson():
        return torch.ones_like(f) if how == "alike" else noise.exp().floor()
    if potential == Logistic():
        return torch.ones_like(f) if how == "alike" else (noise > 0).to(f)
    return _link(view, torch.zeros_like(f) if how == "alike" else noise)


def _link(view: PotentialOf, f: Tensor) -> Tensor:
    return view.potential.link(f.reshape(len(f), -1)).reshape(f.shape)


@dataclasses.dataclass(frozen=True)
class DiscreteLaw:
    """A discrete law of targets and what they are predicted from, as `conjopt.entropy` takes it.

    Attributes:
        potential: in whose domain the targets are.
        targets: ``(n, k)``, an atom in each row, in float64.
        weights: ``(n,)``, probabilities of the atoms; some may be 0.
        groups: ``(n,)``, the value of X at each atom, integers.
        coarser: ``(n,)``, the value of a function of X.

    Example:
        >>> ones = torch.ones(1)
        >>> law = DiscreteLaw(Softmax(), torch.tensor([[1.0]]), ones, ones.long(), ones.long())
        >>> law.targets.shape
        torch.Size([1, 1])
    """

    potential: Potential
    targets: Tensor
    weights: Tensor
    groups: Tensor
    coarser: Tensor


@st.composite
def discrete_laws(
    draw: st.DrawFn,
    potential: Potential | None = None,
    *,
    k: int | None = None,
    max_atoms: int = 6,
) -> DiscreteLaw:
    """Discrete laws, from a single atom.

    Atoms are vertices or other hard targets, all equal (degenerate), or points inside of the
    domain. Probabilities are uniform, different, nearly all of one atom, or 0 for some atoms.

    Args:
        draw: given by hypothesis.
        potential: of the targets; None for any of this package.
        k: of the targets; None for 1 to 4.
        max_atoms: of a law.

    Raises:
        ValueError: when drawn from, for options out of range.

    Example:
        >>> from hypothesis import given
        >>> from conjopt.entropy import conditional_entropy, generalized_entropy
        >>> @given(discrete_laws(Softmax()))
        ... def test(law):
        ...     whole = generalized_entropy(law.targets, Softmax(), weights=law.weights)
        ...     part = conditional_entropy(
        ...         law.targets, law.groups, Softmax(), weights=law.weights
        ...     )
        ...     assert part <= whole + 1e-12
        >>> test()
    """
    _check("discrete_laws", "k", k)
    _check("discrete_laws", "max_atoms", max_atoms)
    of = draw(potentials()) if potential is None else potential
    width = draw(st.integers(1, 4)) if k is None else k
    n = draw(st.integers(1, max_atoms))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    view = potential_of(fenchel_young.FenchelYoungLoss(of))
    f = torch.randn(n, width, generator=generator, dtype=torch.float64)
    atoms = draw(st.sampled_from(["alike", "hard", "soft"]))
    points = fitting_targets(view, f, atoms, generator, apart=3.0)
    if not points.is_floating_point():
        points = nn.functional.one_hot(points, width).double()
    parts = st.sampled_from([1.0, 0.0, 3.0, 1e-6])
    mass = torch.tensor(draw(st.lists(parts, min_size=n, max_size=n)), dtype=torch.float64)
    mass[0] = mass[0].clamp(min=1)
    groups = torch.tensor(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    return DiscreteLaw(of, points, mass / mass.sum(), groups, groups // 2)
