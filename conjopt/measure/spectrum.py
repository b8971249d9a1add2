"""Extreme eigenvalues without the matrices: curvature, structure matrices, spectral density.

Lanczos from products alone. `hi` of the Gauss-Newton matrix and of the batch structure matrix (Thm
2.6, and the eigenvalue form of Thm 3.6), `hi` of the structure matrices of all samples at once
(Thm 2.1), and the spectral density of the Gauss-Newton matrix.

The *least* eigenvalue is not offered from products: from below, Lanczos comes to within 10 % of it
only after about as many products as the matrix has rows as soon as its condition is that of a
trained network (67 products for 80 rows in a residual network), and LOBPCG was off by a factor of
3 after 100 products. Its value would be an upper bound of `lo` that says nothing. Form the matrix,
or use the bound of Thm 2.5.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from conjopt.measure.chunks import ran_out_of_memory
from conjopt.measure.krylov import ROUNDING, Ritz, lanczos
from conjopt.measure.layers.tape import Tape
from conjopt.measure.linearised import (
    AllSamples,
    Linearised,
    Projection,
    plain_kernels,
    trainable,
)
from conjopt.measure.structure import extreme_eigenvalues, structure_matrix
from conjopt.potentials import Potential

__all__ = [
    "Eigenvalue",
    "Ritz",
    "SpectralDensity",
    "lanczos",
    "sample_top_eigenvalues",
    "spectral_density",
    "top_curvature",
    "top_structure",
]


class Eigenvalue(NamedTuple):
    """A lower bound of the greatest eigenvalue, and how far it may be from an eigenvalue.

    `float(...)` gives the value.

    Attributes:
        value: At most `hi`, shape `()`, or `(m,)` for the samples of a batch.
        residual: Some eigenvalue is within `residual` of `value`, of the same shape. It need not
            be the greatest: where the greatest ones cluster, take more steps.

    Reference:
        docs/theory.md, Thm 2.6.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import Eigenvalue
        >>> float(Eigenvalue(torch.tensor(2.0), torch.tensor(0.5)))
        2.0
    """

    value: Tensor
    residual: Tensor

    def __float__(self) -> float:
        return float(self.value)


@dataclasses.dataclass(frozen=True, eq=False)
class SpectralDensity:
    """A smoothed picture of a spectrum, made by `spectral_density`.

    Attributes:
        grid: Eigenvalues, shape `(n,)`.
        density: Share of the eigenvalues per unit, shape `(n,)`; its trapezoidal integral over the
            grid is 1.
        nodes: Ritz values before smoothing, shape `(probes, s)`.
        weights: Their shares, shape `(probes, s)`; they sum to 1 for each probe.
        moments: Estimates of the means of the eigenvalues and of their squares, shape `(2,)`, from
            `nodes`. Each probe's are exact for what it estimates, `u^T C u` and `u^T C^2 u` (the
            second from 2 steps on): no error but that of drawing probes.
        errors: Standard errors of `moments` over the probes, shape `(2,)`; NaN for one probe.

    Reference:
        docs/theory.md, Thm 2.6.

    Example:
        >>> import torch
        >>> from conjopt.measure import spectrum
        >>> from conjopt.potentials import Squared
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> picture = spectrum.spectral_density(model, Squared(), torch.eye(2), steps=2, probes=1)
        >>> torch.trapezoid(picture.density, picture.grid).round(decimals=6)
        tensor(1., dtype=torch.float64)
    """

    grid: Tensor
    density: Tensor
    nodes: Tensor
    weights: Tensor
    moments: Tensor
    errors: Tensor


def top_curvature(
    model: nn.Module,
    potential: Potential,
    inputs: Any,
    *,
    steps: int = 15,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """Return `hi(GGN)`, the greatest curvature of the mean loss along a unit step (Thm 2.6).

    By Lanczos on `(1/R) J^T H J`, `R` the number of loss terms; no targets enter. The value is a
    lower bound of `hi`: 3 to 9 products came within 1 % in small networks, but where the greatest
    eigenvalues cluster it takes 15 or more. A product costs about two plain training steps, and
    `steps` vectors of the parameters' size are stored. The model runs in the mode it is in, on
    copies of its buffers, with the same random numbers at every product, and draws none itself.

    Args:
        model: Returns one tensor, read as `conjopt.losses.FenchelYoungLoss` reads it: samples along
            dimension 0; on the simplex the classes along dimension 1 and one term for each token.
        potential: Of the loss, for the output Hessians `H`.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        steps: Products, at least 1.
        generator: Draws the start; by default it is the same at every call.

    Returns:
        Value and residual, shape `()`, in units of the loss per squared unit of the parameters.

    Raises:
        TypeError: If `potential` is none.
        ValueError: For fewer than one step, a model without trainable parameters, several outputs
            or outputs that do not fit the potential, or products that are not finite.
        RuntimeError: Under reentrant activation checkpointing.

    Reference:
        docs/theory.md, Thm 2.6.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import top_curvature
        >>> from conjopt.potentials import Squared
        >>> inputs = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> top_curvature(torch.nn.Linear(2, 1), Squared(), inputs).value  # ||x||^2 + 1
        tensor(26.)
    """
    linear = Linearised(model, inputs, _checked(potential))
    rows = linear.rows(linear.outputs)
    bent = potential.hessian_product(rows, _drawn(rows, generator))
    return _top(linear.solve(linear.gauss_newton, linear.pull_rows(bent), steps), linear.zero)


def top_structure(
    model: nn.Module,
    inputs: Any,
    *,
    potential: Potential | None = None,
    steps: int = 15,
    generator: torch.Generator | None = None,
) -> Eigenvalue:
    """Return `hi(K_B)`, the greatest eigenvalue of the batch structure matrix, without the matrix.

    By Lanczos on `J J^T`, on `V^m` if a potential is given. The value is a lower bound of `hi`,
    within 1 % after 3 to 14 products in small networks; where eigenvalues cluster take 15 or more.
    A product costs about two plain training steps; `steps` vectors of the outputs' size are stored.

    Args:
        model: Returns one tensor.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        potential: Whose tangent space `V` the outputs' changes are projected on; `None` for all.
        steps: Products, at least 1.
        generator: Draws the start; by default it is the same at every call.

    Returns:
        Value and residual, shape `()`, in squared units of the outputs per parameter.

    Raises:
        TypeError: If `potential` is no potential.
        ValueError: For fewer than one step, a model without trainable parameters, several outputs
            or outputs that do not fit the potential, or products that are not finite.
        RuntimeError: Under reentrant activation checkpointing.

    Reference:
        docs/theory.md, Thm 2.4 and Thm 3.6.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import top_structure
        >>> inputs = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
        >>> top_structure(torch.nn.Linear(2, 1), inputs).value  # 2 (||x||^2 + 1)
        tensor(52.)
    """
    linear = Linearised(model, inputs, None if potential is None else _checked(potential))

    start = linear.project(_drawn(linear.outputs, generator)).to(linear.zero.dtype)
    return _top(linear.solve(linear.structure, start.flatten(), steps), linear.zero)


def sample_top_eigenvalues(
    model: nn.Module,
    inputs: Any,
    *,
    potential: Potential | None = None,
    steps: int = 15,
    generator: torch.Generator | None = None,
    exact_up_to: int = 32,
) -> Eigenvalue:
    """Return `hi(A_i)` of every sample, the greatest eigenvalues of the structure matrices.

    Samples of few outputs have their matrices formed, exactly. With more, Lanczos runs on all
    matrices at once: one backward and one injected forward of the batch give `A_i u_i` for all
    `i`, and per-sample gradients are held for one layer at a time, in the form of `layers` (for
    convolutions, as `m` gradients of that layer). The values are then lower bounds: 15 steps or
    more where eigenvalues cluster. Where a function of the model cannot be differentiated twice,
    the matrices are formed in any case, at the price of one backward for each output.

    Args:
        model: Returns one tensor, samples along dimension 0, that do not depend on one another.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        potential: Whose tangent space `V` the outputs' changes are projected on; `None` for all.
        steps: Products, at least 1.
        generator: Draws the starts; by default they are the same at every call.
        exact_up_to: The greatest number of a sample's outputs for which matrices are formed.

    Returns:
        Values and residuals, shape `(m,)`, in squared units of the outputs per parameter.

    Raises:
        TypeError: If `potential` is no potential.
        ValueError: For fewer than one step, a model without trainable parameters, several outputs
            or outputs that do not fit the potential, or products that are not finite.
        RuntimeError: Where samples are coupled, or a use of a parameter cannot be seen.

    Reference:
        docs/theory.md, Thm 2.1.

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import sample_top_eigenvalues
        >>> inputs = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
        >>> sample_top_eigenvalues(torch.nn.Linear(2, 3), inputs).value  # ||x||^2 + 1
        tensor([26.,  2.])
    """
    if steps < 1:
        raise ValueError(f"Got steps={steps}: expected at least 1 product; 15 is the default.")
    trainable(model)
    with torch.inference_mode(False), plain_kernels(model):
        tape = Tape(model, inputs)
        outputs = tape.only_output()
        project = Projection(None if potential is None else _checked(potential), outputs)
        many = outputs.numel() > exact_up_to * max(1, tape.samples)
        if many and outputs.requires_grad:
            start = project(_drawn(outputs, generator)).flatten(1)
            try:
                product = AllSamples(tape, outputs, project)
                found = _top(lanczos(product, start, steps=steps), outputs)
                if not product.agreement.fails():
                    return found
            except RuntimeError as error:
                if ran_out_of_memory(error):
                    raise
                # what is the model's own fault is said again below
        if not tape.samples:
            empty = outputs.new_zeros(0)
            return Eigenvalue(empty, empty)
        A = structure_matrix(model, inputs, potential=potential)
    value = extreme_eigenvalues(A)[1]
    return Eigenvalue(value, ROUNDING * torch.finfo(value.dtype).eps * value)


def spectral_density(
    model: nn.Module,
    potential: Potential,
    inputs: Any,
    *,
    steps: int = 30,
    probes: int = 8,
    grid: Tensor | None = None,
    width: float | None = None,
    generator: torch.Generator | None = None,
) -> SpectralDensity:
    """Return the spectral density of the Gauss-Newton matrix, for a picture.

    Stochastic Lanczos quadrature: random unit vectors see the spectrum through as many nodes as
    there are steps, and the nodes are smeared by Gaussians. What to trust: total mass, mean and
    mean square, up to `errors`, and isolated great eigenvalues, whose nodes converge. What not:
    the shape of the bulk below the width, how the mass near 0 is spread over small eigenvalues (in
    prototypes the mean logarithm was off by 0.01 to 0.4), and single eigenvalues' heights, whose
    relative error over probes is about `sqrt(2 / probes)`. With more parameters than outputs in
    the batch nearly all mass is at 0: draw the density on a logarithmic axis.

    Args:
        model: As for `top_curvature`.
        potential: Of the loss.
        inputs: Of the model: a tensor, or a tuple or a dict of its arguments.
        steps: Products for each probe, at least 1. As many vectors of the parameters' size are
            stored.
        probes: Random vectors, at least 1.
        grid: Where to draw, shape `(n,)`, ascending; by default 1000 points that hold everything.
            Nodes whose Gaussians lie outside of it are missing in the integral.
        width: Standard deviation of the Gaussians; a hundredth of the greatest node by default. On
            a grid wider than that it is the grid's greatest gap.
        generator: Draws the probes; by default they are the same at every call.

    Returns:
        Grid and density with nodes, weights and moments.

    Raises:
        TypeError: If `potential` is none.
        ValueError: For fewer than one step or probe, a grid that does not ascend, a width that is
            not positive, and for what `top_curvature` raises it.
        RuntimeError: Under reentrant activation checkpointing.

    Reference:
        docs/theory.md, Thm 2.6. S. Ubaru, J. Chen and Y. Saad, Fast estimation of tr(f(A)) via
        stochastic Lanczos quadrature, SIAM J. Matrix Anal. Appl. 38 (2017).

    Example:
        >>> import torch
        >>> from conjopt.measure.spectrum import spectral_density
        >>> from conjopt.potentials import Squared
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> inputs = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
        >>> spectral_density(model, Squared(), inputs).moments.round(decimals=4)  # GGN = 2 I
        tensor([2., 4.], dtype=torch.float64)
    """
    if probes < 1:
        raise ValueError(f"Got probes={probes}: expected at least 1 random vector.")
    if width is not None and not width > 0:
        raise ValueError(f"Got width={width}: expected a positive standard deviation.")
    if grid is not None and (grid.ndim != 1 or len(grid) < 2 or not (grid.diff() > 0).all()):
        raise ValueError(
            f"Got a grid of shape {tuple(grid.shape)}: expected two or more ascending eigenvalues, "
            "such as torch.linspace(0, 1, 100)."
        )
    linear = Linearised(model, inputs, _checked(potential))
    generator = _or_seeded(generator, linear.outputs.device)
    starts = [_drawn(linear.zero, generator) for _ in range(probes)]
    found = [linear.solve(linear.gauss_newton, start, steps) for start in starts]
    nodes = torch.stack([ritz.values for ritz in found]).clamp_min(0)
    weights = torch.stack([ritz.weights for ritz in found])
    by_probe = torch.stack([(weights * nodes**power).sum(-1) for power in (1, 2)])
    errors = (
        (by_probe.var(-1) / probes).sqrt() if probes > 1 else by_probe.new_full((2,), torch.nan)
    )
    top = nodes.max()
    sigma = torch.where(top > 0, top / 100, 1) if width is None else top.new_full((), width)
    if grid is None:
        along = torch.linspace(0, 1, 1000, dtype=nodes.dtype, device=nodes.device)
        grid = -6 * sigma + (top + 12 * sigma) * along
    else:
        grid = grid.to(nodes)
    sigma = torch.maximum(sigma, grid.diff().max())
    bumps = (-(((grid - nodes.reshape(-1, 1)) / sigma) ** 2) / 2).exp()
    area = torch.trapezoid(bumps, grid)
    shares = torch.where(area > 0, weights.flatten() / probes / area.clamp_min(1e-300), 0)
    return SpectralDensity(grid, shares @ bumps, nodes, weights, by_probe.mean(-1), errors)


def _checked(potential: Potential) -> Potential:
    if not isinstance(potential, Potential):
        raise TypeError(
            f"Got a potential of type {type(potential).__name__}: expected a "
            "conjopt.potentials.Potential, such as Softmax(); that of a criterion is "
            "conjopt.losses.potential_of(criterion).potential."
        )
    return potential


def _or_seeded(generator: torch.Generator | None, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0) if generator is None else generator


def _drawn(like: Tensor, generator: torch.Generator | None) -> Tensor:
    generator = _or_seeded(generator, like.device)
    drawn = torch.randn(like.shape, dtype=like.dtype, device=generator.device, generator=generator)
    return drawn.to(like.device)


def _top(ritz: Ritz, like: Tensor) -> Eigenvalue:
    dtype = torch.promote_types(like.dtype, torch.float32)
    value, residual = ritz.values[..., -1], ritz.residuals[..., -1]
    return Eigenvalue(value.clamp_min(0).to(dtype), residual.to(dtype))
