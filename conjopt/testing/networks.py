"""Small networks that a line describes, and a strategy of them."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

__all__ = ["KINDS", "Network", "networks"]

KINDS = ("linear", "mlp", "residual", "convolution", "embedding", "tokens", "tied", "reused")
ACTIVATIONS = ("Identity", "Tanh", "ReLU", "GELU")
NORMS = ("none", "layer", "batch")
VOCABULARY = 5


class Network(nn.Module):
    """A small network in float64 and eval mode that its arguments describe entirely.

    Args:
        kind: ``"linear"``, one layer; ``"mlp"``; ``"residual"``, blocks ``h + F(h)``;
            ``"convolution"``, over images, with a linear head; ``"embedding"``, the mean of the
            tokens' rows, and a head; ``"tokens"``, an embedding, a convolution along the sequence,
            and outputs for each token; ``"tied"``, an embedding whose table is the head's weight
            as well; ``"reused"``, one layer that is called once for each of ``depth``.
        k: number of outputs, of each token for ``"tokens"``.
        width: of hidden layers; of channels for each group of a convolution.
        depth: number of hidden layers.
        activation: name of a module of ``torch.nn``.
        norm: in front of activations: ``"none"``, ``"layer"`` (over all of a sample for images and
            tokens) or ``"batch"`` (in eval mode, with statistics that are not 0 and 1).
        bias: whether layers have one.
        stride: of a convolution.
        padding: of a convolution.
        groups: of a convolution.
        scale: factor of all parameters.
        seed: of parameters and statistics; the global generator is left alone.

    Attributes:
        shape: of one sample of its inputs.
        vocabulary: number of different tokens, where inputs are tokens; else None.
        outputs: shape of one sample of its outputs.

    Raises:
        ValueError: for a kind or a norm that there is not, or a number below 1.

    Example:
        >>> network = Network("mlp", k=2, width=3, activation="Tanh", seed=1)
        >>> network
        Network('mlp', k=2, width=3, activation='Tanh', seed=1)
        >>> network(torch.ones(4, *network.shape).double()).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        kind: str = "linear",
        *,
        k: int = 1,
        width: int = 1,
        depth: int = 1,
        activation: str = "Identity",
        norm: str = "none",
        bias: bool = True,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Network: got kind={kind!r}, expected one of {', '.join(KINDS)}")
        if norm not in NORMS:
            raise ValueError(f"Network: got norm={norm!r}, expected one of {', '.join(NORMS)}")
        counts = {"k": k, "width": width, "depth": depth, "stride": stride, "groups": groups}
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"Network: got {name}={count}, expected 1 or more")
        super().__init__()
        given = {"k": k, "width": width, "depth": depth, "activation": activation, "norm": norm}
        given |= {"bias": bias, "stride": stride, "padding": padding, "groups": groups}
        given |= {"scale": scale, "seed": seed}
        self._given = given
        self.kind, self.k, self.width, self.depth, self.norm = kind, k, width, depth, norm
        self.shape: tuple[int, ...] = (3,)
        self.vocabulary: int | None = None
        self.outputs: tuple[int, ...] = (k,)
        self.activation = getattr(nn, activation)()
        self.first: nn.Module
        self.convolution: nn.Module
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            if kind == "convolution":
                self._make_convolution(stride, padding, groups, bias)
            elif kind in ("embedding", "tokens", "tied"):
                self._make_embedding(bias)
            else:
                self._make_linear(bias)
            self.double()
            self._fill(scale)
        self.eval()

    def _make_linear(self, bias: bool) -> None:
        hidden = 0 if self.kind == "linear" else self.depth
        if self.kind == "mlp":
            sizes = [3, *[self.width] * hidden]
        else:
            sizes = [self.width] * (hidden + 1)
            if hidden:
                self.first = nn.Linear(3, self.width, bias=bias)
        layers = 1 if self.kind == "reused" else hidden
        self.hidden = nn.ModuleList(
            nn.Linear(a, b, bias=bias) for a, b in itertools.pairwise(sizes[: layers + 1])
        )
        self.norms = nn.ModuleList(_vector_norm(self.norm, self.width) for _ in range(layers))
        self.head = nn.Linear(self.width if hidden else 3, self.k, bias=bias)

    def _make_convolution(self, stride: int, padding: int, groups: int, bias: bool) -> None:
        self.shape = (2, 4, 3)
        channels = self.width * groups
        self.first = nn.Conv2d(2, channels, 1, bias=bias)
        self.convolution = nn.Conv2d(
            channels, channels, (2, 2), stride, padding, groups=groups, bias=bias
        )
        self.norms = nn.ModuleList([_channel_norm(self.norm, channels)])
        high, wide = ((size + 2 * padding - 2) // stride + 1 for size in self.shape[1:])
        self.head = nn.Linear(channels * high * wide, self.k, bias=bias)

    def _make_embedding(self, bias: bool) -> None:
        self.shape = (3,)
        self.vocabulary = self.k if self.kind == "tied" else VOCABULARY
        self.table = nn.Embedding(self.vocabulary, self.width)
        self.norms = nn.ModuleList([_channel_norm(self.norm, self.width)])
        if self.kind == "tokens":
            self.outputs = (self.k, self.shape[0])
            self.convolution = nn.Conv1d(self.width, self.width, 3, padding=1, bias=bias)
        self.head = nn.Linear(self.width, self.k, bias=bias)
        if self.kind == "tied":
            self.head.weight = self.table.weight

    def _fill(self, scale: float) -> None:
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    assert module.running_mean is not None
                    assert module.running_var is not None
                    module.running_mean.normal_()
                    module.running_var.uniform_(0.5, 2)
            for parameter in self.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                parameter.mul_(scale)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, ``(m, *outputs)``.

        Args:
            x: ``(m, *shape)``, float64 or, with a vocabulary, integers.
        """
        if self.kind == "convolution":
            h = self.convolution(self.activation(self.first(x)))
            return self.head(self.activation(self.norms[0](h)).flatten(1))
        if self.vocabulary is not None:
            h = self.table(x).mT  # (m, width, tokens)
            if self.kind == "tokens":
                h = self.activation(self.norms[0](self.convolution(h)))
                return self.head(h.mT).mT
            return self.head(self.activation(self.norms[0](h)).mean(2))
        h = self.first(x) if self.kind in ("residual", "reused") else x
        for number in range(self.depth if len(self.hidden) else 0):
            at = 0 if self.kind == "reused" else number
            new = self.activation(self.norms[at](self.hidden[at](h)))
            h = h + new if self.kind == "residual" else new
        return self.head(h)

    def __repr__(self) -> str:
        defaults = inspect.signature(Network).parameters
        others = [f"{n}={v!r}" for n, v in self._given.items() if v != defaults[n].default]
        return f"Network({', '.join([repr(self.kind), *others])})"


def _vector_norm(norm: str, width: int) -> nn.Module:
    kinds = {"none": nn.Identity, "layer": nn.LayerNorm, "batch": nn.BatchNorm1d}
    return kinds[norm](width)


def _channel_norm(norm: str, channels: int) -> nn.Module:
    if norm == "layer":
        return nn.GroupNorm(1, channels)
    if norm == "batch":
        return _ChannelBatchNorm(channels)
    return nn.Identity()


class _ChannelBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Of images and of sequences."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


@st.composite
def networks(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = KINDS,
    k: int | None = None,
    largest: float = 3.0,
) -> Network:
    """Small networks, from one linear layer with one output.

    Args:
        draw: given by hypothesis.
        kinds: of `Network`, the simplest first.
        k: number of outputs; None for 1 to 4.
        largest: of the factors of their parameters, among 1, 0.01, 3 and 10.

    Raises:
        ValueError: when drawn from, for kinds that do not exist, or none.

    Example:
        >>> from hypothesis import given
        >>> @given(networks(kinds=["mlp", "tied"], k=3))
        ... def test(network):
        ...     assert network.outputs == (3,)
        >>> test()
    """
    if isinstance(kinds, str) or not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(
            f"networks: got kinds={kinds!r}, expected a list of some of {', '.join(KINDS)}"
        )
    kind = draw(st.sampled_from(tuple(kinds)))
    options: dict[str, object] = {"k": draw(st.integers(1, 4)) if k is None else k}
    if kind != "linear":
        options["activation"] = draw(st.sampled_from(ACTIVATIONS))
        options["norm"] = draw(st.sampled_from(NORMS))
        # A single number is normalised to 0, with gradients that are rounding alone.
        options["width"] = draw(st.integers(2 if options["norm"] == "layer" else 1, 4))
    if kind in ("mlp", "residual", "reused"):
        options["depth"] = draw(st.integers(1, 3))
    if kind == "convolution":
        options["stride"] = draw(st.integers(1, 2))
        options["padding"] = draw(st.integers(0, 1))
        options["groups"] = draw(st.integers(1, 2))
    options["bias"] = draw(st.sampled_from([True, False]))
    options["scale"] = draw(st.sampled_from([s for s in (1.0, 0.01, 3.0, 10.0) if s <= largest]))
    options["seed"] = draw(st.integers(0, 2**16))
    return Network(kind, **options)  # type: ignore[arg-type]
