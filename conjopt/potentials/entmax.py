"""The Tsallis potentials of sparse predictions (docs/theory.md, section 0)."""

from typing import Any, final

import torch
from torch import Tensor

from conjopt.potentials.base import Potential, largest_coordinate, positive_minimum
from conjopt.potentials.threshold import power, solve, tsallis_log


class Entmax(Potential):
    """The Tsallis potential of an order in (1, 2]: `Phi(y) = (sum_j y_j^a - 1) / (a (a - 1))`.

    The link is `a`-entmax: the distribution `p_j = max(0, 1 + (a - 1)(f_j - c))^(1 / (a - 1))`
    with the `c` that makes it sum to 1. It gives exact zeros, the more the greater the order.
    Order 2 is `Sparsemax`, and `Softmax` is the limit of order 1. The link is 1-Lipschitz, the
    best constant for all `k` at once. Logits of `-inf` (masked classes) have probability 0.

    Values and gradients are exact to rounding at every order, and the conjugate, the link and the
    loss are differentiable in `f` as often as one likes, but not in forward mode twice (torch takes
    the second derivative of any custom function for 0 there). Where the support of the link
    changes, derivatives of the link are those of one side. Derivatives of the loss in the target
    hold along the simplex.

    Args:
        order: The order `a`, in (1, 2].

    Raises:
        ValueError: For an order outside of (1, 2].

    Reference:
        docs/theory.md, section 0. Peters, Niculae and Martins, *Sparse Sequence-to-Sequence
        Models*, ACL 2019; Blondel, Martins and Niculae, *Learning with Fenchel-Young Losses*,
        JMLR 2020.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Entmax
        >>> entmax, f = Entmax(1.5), torch.tensor([0.0, 1.0, 2.0])
        >>> entmax.link(f)
        tensor([0.0000, 0.1693, 0.8307])
        >>> entmax.loss(torch.tensor([0.0, 0.0, 1.0]), f)
        tensor(0.0617)
    """

    smoothness = 1.0
    on_simplex = True
    domain = "probabilities that sum to 1 over the classes"
    order: float

    def __init__(self, order: float = 1.5) -> None:
        if not isinstance(order, int | float) or not 1 < order <= 2:
            raise ValueError(
                f"order={order!r}: expected a number in (1, 2]. The limit of order 1 is `Softmax`."
            )
        self.order = float(order)

    def value(self, y: Tensor) -> Tensor:
        """Return `(sum_j y_j^a - 1) / (a (a - 1))`, `(..., k) -> (...)`."""
        return (y * tsallis_log(y, self.order)).sum(-1) / self.order

    def conjugate(self, f: Tensor) -> Tensor:
        """Return `<p, f> - Phi(p)` for `p` the link of `f`, `(..., k) -> (...)`."""
        return _fenchel(f, None, self.order)[0]

    def link(self, f: Tensor) -> Tensor:
        """Return the `a`-entmax of `f`, `(..., k) -> (..., k)`."""
        return _fenchel(f, None, self.order)[1]

    def hessian_product(self, f: Tensor, v: Tensor) -> Tensor:
        """Return `(diag(w) - w w^T / sum w) v`, `w = p^(2 - a)` on the support of `p`, else 0.

        Shapes `(..., k) -> (..., k)`. At the outputs where the support changes it is an element of
        the generalized Jacobian.
        """
        f, v = torch.broadcast_tensors(f, v)
        return _jacobian_product(self.link(f), v, self.order)

    def loss(self, y: Tensor, f: Tensor) -> Tensor:
        """Return `Phi(y) + Phi*(f) - <y, f>`, `(..., k), (..., k) -> (...)`.

        It is computed as a sum of terms that are not negative: the divergence of `y` from the link
        and, for each coordinate outside of the support, `y_j` times what its output lacks to enter.
        """
        y, f = torch.broadcast_tensors(y.to(torch.promote_types(y.dtype, f.dtype)), f)
        return _fenchel(f, y, self.order)[0]

    def class_loss(self, index: Tensor, f: Tensor) -> Tensor:
        """Return the loss of one-hot targets, `(...), (..., k) -> (...)`, without their matrix."""
        return _fenchel(f, index.long(), self.order)[0]

    def divergence(self, y: Tensor, mean: Tensor) -> Tensor:
        """Return `sum_j [y_j^a - m_j^a - a m_j^(a - 1) (y_j - m_j)] / (a (a - 1))`, `m = mean`."""
        return _divergence(y, mean, self.order).sum(-1)

    def _bounds(
        self, norm: Tensor, target: Tensor, prediction: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        a = self.order
        lower = super()._bounds(norm, target, prediction)[0]
        # yhat_j >= y_j - rho on the support of y, and yhat_j = e_j elsewhere, so the loss is at
        # most (s c + zeros^(1 - a/2) w^(a/2)) / a with w = norm^2 - s the part of the zeros.
        rho = largest_coordinate(norm, target.shape[-1])
        room = positive_minimum(target) - rho
        steep = torch.where(room > 0, room, 1) ** (a - 2)
        spread = (target == 0).sum(-1).to(norm.dtype) ** (1 - a / 2)
        square = norm.square()
        if a < 2:
            off = torch.minimum(square, (a * spread / (2 * steep)) ** (2 / (2 - a)))
        else:
            off = square
        bound = ((square - off) * steep + spread * off ** (a / 2)) / a
        upper = torch.where(room > 8 * torch.finfo(room.dtype).eps, bound, torch.inf)
        upper = torch.where(target.amax(-1) == 1, torch.minimum(upper, _hard_upper(rho, a)), upper)
        if prediction is not None:
            inside = ((target == 0) | (prediction > 0)).all(-1)
            support = torch.where(prediction > 0, prediction, 1)
            terms = ((prediction - target) * support ** (a / 2 - 1)).square()
            direct = torch.where(prediction > 0, terms, 0).sum(-1) / a
            upper = torch.where(inside, torch.minimum(upper, direct), upper)
        return lower, upper


@final
class Sparsemax(Entmax):
    """The Gini potential `Phi(y) = (||y||^2 - 1) / 2` on the simplex, `Entmax` of order 2.

    The link is the Euclidean projection of the outputs on the simplex, 1-Lipschitz. The loss is
    half the squared distance of target and link, plus a term linear in the margin once the link
    gives a target class probability 0.

    Reference:
        docs/theory.md, section 0. Martins and Astudillo, *From Softmax to Sparsemax*, ICML 2016.

    Example:
        >>> import torch
        >>> from conjopt.potentials import Sparsemax
        >>> sparsemax, f = Sparsemax(), torch.tensor([0.0, 1.0, 1.5])
        >>> sparsemax.link(f)
        tensor([0.0000, 0.2500, 0.7500])
        >>> sparsemax.loss(torch.tensor([0.0, 0.0, 1.0]), f)
        tensor(0.0625)
    """

    order = 2.0

    def __init__(self) -> None:
        pass


def _hard_upper(rho: Tensor, a: float) -> Tensor:
    """Return the loss at one-hot targets of a link `1 - rho` at the target and `rho` elsewhere."""
    p = (1 - rho).clamp(min=0)
    y = torch.ones_like(p)
    loss = _divergence(y, p, a) + rho**a / a
    return torch.where(rho < 1 - 8 * torch.finfo(rho.dtype).eps, loss, torch.inf)


def _divergence(y: Tensor, mean: Tensor, a: float, log_mean: Tensor | None = None) -> Tensor:
    """Return the terms of the Bregman divergence, non-negative and without cancellation.

    With `L` the Tsallis logarithm they are `[y (L(y) - L(m)) - m^(a - 1) (y - m)] / a`. `L(m)` is
    finite where `m` underflows; where `m` is near `y` the difference is taken by `expm1`.
    """
    if a == 2:
        return (y - mean).square() / 2
    if a == 1.5:
        root, other = y.sqrt(), mean.sqrt()
        return (root - other).square() * (2 * root + other) / 1.5
    if log_mean is None:
        log_mean = tsallis_log(mean, a)
    x = 1 + (a - 1) * log_mean
    far = y * (tsallis_log(y, a) - log_mean) - x * (y - mean)
    near = (y > 0) & ((y - mean).abs() < mean / 2)
    base = torch.where(near, mean, 1)
    step = torch.where(near, y - mean, 0)
    rise = torch.expm1((a - 1) * (step / base).log1p()) / (a - 1)
    close = power(base, a - 1) * (torch.where(near, y, 1) * rise - step)
    return torch.where(near, close, far) / a


def _jacobian_product(p: Tensor, v: Tensor, a: float) -> Tensor:
    if a == 2:
        w = (p > 0).to(p.dtype)
    else:
        w = torch.where(p > 0, power(torch.where(p > 0, p, 1), 2 - a), 0)
    # The Jacobian maps constants to 0: measured from the likeliest class, v keeps its digits.
    v = v - v.gather(-1, p.argmax(-1, keepdim=True))
    return w * (v - (w * v).sum(-1, keepdim=True) / w.sum(-1, keepdim=True))


def _fenchel(f: Tensor, target: Tensor | None, order: float) -> tuple[Tensor, Tensor]:
    if f.dtype in (torch.float16, torch.bfloat16):  # whose sums over classes are off by percents
        target = target if target is None or not target.is_floating_point() else target.float()
        value, p = _fenchel(f.float(), target, order)
        return value.to(f.dtype), p.to(f.dtype)
    # torch.compile refuses functions with a rule for forward mode.
    if torch.compiler.is_compiling():
        return _Fenchel.apply(f, target, float.fromhex(order.hex()))
    return _FenchelWithForwardMode.apply(f, target, order)


class _Fenchel(torch.autograd.Function):
    """Conjugate or loss, with the link, which is what every derivative is made of.

    `target` is `None` (the value is the conjugate), classes `(...)`, or points `(..., k)` (the
    value is the loss).
    """

    @staticmethod
    def forward(f: Tensor, target: Tensor | None, a: float) -> tuple[Tensor, Tensor]:
        p, g, s, top = solve(f, a)
        if target is None:  # stationary in s: rounding of s does not matter
            return ((p * power(p, a - 1)).sum(-1) - 1) / a + (s + top).squeeze(-1), p
        edge = s - 1 / (a - 1)  # the outputs above it are in the support
        if target.is_floating_point():
            outside = torch.where(target > 0, target * (edge - g).clamp(min=0), 0)
            return (_divergence(target, p, a, (g - s).clamp(min=-1 / (a - 1))) + outside).sum(-1), p
        index = target.unsqueeze(-1)
        hit = p.gather(-1, index)
        log_hit = g.gather(-1, index) - s
        own = _divergence(torch.ones_like(hit), hit, a, log_hit.clamp(min=-1 / (a - 1)))
        own = own + (edge - g.gather(-1, index)).clamp(min=0)
        del g  # a matrix less at the peak
        others = power(p, a).scatter_(-1, index, 0).sum(-1) / a
        return others + own.squeeze(-1), p

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        f, target, ctx.order = inputs
        wanted = target is not None and target.is_floating_point() and ctx.needs_input_grad[1]
        ctx.save_for_backward(output[1], target, f if wanted else None)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, by_value: Tensor | None, by_link: Tensor | None) -> Any:
        p, target, f = ctx.saved_tensors
        to_f = to_target = None
        if by_value is not None:
            by_value = by_value.unsqueeze(-1)
            if target is None:
                to_f = by_value * p
            elif target.is_floating_point():
                to_f = by_value * (p - target)
            else:
                to_f = (by_value * p).scatter_add_(-1, target.unsqueeze(-1), -by_value)
            if f is not None:
                to_target = by_value * (tsallis_log(target, ctx.order) - f)
        if by_link is not None:
            second = _jacobian_product(p, by_link, ctx.order)
            to_f = second if to_f is None else to_f + second
        return to_f, to_target, None


class _FenchelWithForwardMode(_Fenchel):
    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        _Fenchel.setup_context(ctx, inputs, output)
        ctx.save_for_forward(output[1], inputs[1], inputs[0])

    @staticmethod
    def jvp(ctx: Any, f_t: Tensor | None, target_t: Tensor | None, _: None) -> Any:
        p, target, f = ctx.saved_tensors
        value_t, p_t = torch.zeros_like(p[..., 0]), torch.zeros_like(p)
        if f_t is not None:
            p_t = _jacobian_product(p, f_t, ctx.order)
            value_t = (p * f_t).sum(-1)
            if target is not None and target.is_floating_point():
                value_t = value_t - (target * f_t).sum(-1)
            elif target is not None:
                value_t = value_t - f_t.gather(-1, target.unsqueeze(-1)).squeeze(-1)
        if target_t is not None and target.is_floating_point():
            value_t = value_t + (target_t * (tsallis_log(target, ctx.order) - f)).sum(-1)
        return value_t, p_t

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], f: Tensor, target: Tensor | None, a: float
    ) -> Any:
        def batched(tensor: Tensor, dim: int | None) -> Tensor:
            if dim is None:
                return tensor.expand(info.batch_size, *tensor.shape)
            return tensor.movedim(dim, 0)

        f = batched(f, in_dims[0])
        target = None if target is None else batched(target, in_dims[1])
        return _FenchelWithForwardMode.apply(f, target, a), (0, 0)
