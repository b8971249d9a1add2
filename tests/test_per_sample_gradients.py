"""Per-sample gradients of every kind of layer and of whole models, against each sample alone.

The reference runs the model on one sample after the other and differentiates each output, in
float64: from that dense Jacobian follow norms of gradients, Gram matrices within samples, and of
the whole batch. `tests/test_per_sample_gradients_traps.py` has what could go wrong silently.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_sample import F, Function, M, agree, case_table, images, sequences, tokens, vectors
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

case, CASES = case_table()


# Convolutions, and what follows them


def head(*modules: nn.Module) -> nn.Module:
    """Few outputs, for the dense reference."""
    return nn.Sequential(*modules, nn.Flatten(), nn.LazyLinear(3))


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "stride, padding, dilation, groups": lambda: nn.Conv2d(
        4, 6, 3, stride=2, padding=1, dilation=2, groups=2
    ),
    "one group per channel": lambda: nn.Conv2d(4, 8, 3, groups=4),
    "rectangular": lambda: nn.Conv2d(4, 3, (1, 3), stride=(2, 1), padding=(0, 2), bias=False),
    "same": lambda: nn.Conv2d(4, 3, (3, 5), padding="same"),
    "same, dilated": lambda: nn.Conv2d(4, 3, 3, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(4, 3, 3, padding="valid"),
    "circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "reflect": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"),
    "one by one": lambda: nn.Conv2d(4, 3, 1),
    "one by one, padded, dilated": lambda: nn.Conv2d(4, 3, 1, 2, padding=(1, 2), dilation=2),
    "few places, many channels": lambda: nn.Conv2d(4, 16, 5, padding=0),
    "more stride than kernel": lambda: nn.Conv2d(4, 3, 1, stride=3),
    "rows left over": lambda: nn.Conv2d(4, 3, 2, stride=4),
    "transposed": lambda: nn.ConvTranspose2d(
        4, 6, 3, stride=2, padding=1, output_padding=1, groups=2
    ),
    "transposed, few places, many channels": lambda: nn.Sequential(
        nn.Conv2d(4, 16, 6), nn.ConvTranspose2d(16, 16, 2)
    ),
    "grouped, few places, many channels": lambda: nn.Conv2d(4, 32, 5, groups=2),
    "transposed, dilated": lambda: nn.ConvTranspose2d(4, 2, 2, dilation=2),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str):
    agree(head(CONVOLUTIONS[name](), nn.Tanh()), images())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2),
        nn.Conv1d(4, 2, 4, padding="same"),
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
    ],
    ids=str,
)
def test_convolution_in_one_dimension(layer: nn.Module):
    agree(head(layer, nn.Tanh()), torch.randn(M, 4, 7))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv3d(2, 4, 2, stride=2, groups=2),
        nn.Conv3d(2, 2, 3, padding="same"),
        nn.ConvTranspose3d(2, 2, 2),
    ],
    ids=str,
)
def test_convolution_in_three_dimensions(layer: nn.Module):
    agree(head(layer, nn.Tanh()), torch.randn(M, 2, 4, 4, 4))


# Normalisations, activations with parameters, linear layers


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(2, 4, eps=0.3),
        nn.InstanceNorm2d(4, affine=True),
        nn.InstanceNorm2d(4, affine=True, track_running_stats=True).eval(),
        nn.BatchNorm2d(4).eval(),
        nn.LayerNorm([4, 6, 6]),
        nn.LayerNorm(6),
        nn.LayerNorm(6, eps=0.3, bias=False),
        nn.RMSNorm(6),
        nn.RMSNorm([6, 6], eps=1e-3),
        nn.PReLU(4),
        nn.PReLU(),
    ],
    ids=str,
)
def test_normalisation_and_activation(layer: nn.Module):
    for parameter in layer.parameters():  # away from 1 and 0
        nn.init.normal_(parameter)
    agree(head(nn.Conv2d(4, 4, 1), layer, nn.Tanh()), images())


@pytest.mark.parametrize(
    "layer", [nn.BatchNorm1d(5).eval(), nn.PReLU(5), nn.PReLU(), nn.GroupNorm(1, 5)], ids=str
)
def test_normalisation_and_activation_of_vectors(layer: nn.Module):
    agree(nn.Sequential(nn.Linear(6, 5), layer, nn.Linear(5, 3)), vectors())


def test_batch_norm_of_sequences():
    agree(nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4).eval()), torch.randn(M, 4, 3))


def test_linear_on_vectors_and_sequences():
    agree(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, 4)), vectors())
    agree(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2, bias=False)), sequences())
    agree(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(M, 2, 3, 6))
    agree(nn.Bilinear(6, 6, 3), (vectors(), vectors()))
    agree(nn.Linear(6, 3), vectors())


# Embeddings


@pytest.mark.parametrize("padding", [None, 0, -2])
@pytest.mark.parametrize("places", [1, 3, 20])
def test_embedding(padding: int | None, places: int):
    model = Function(
        lambda self, t: self.m[1](torch.tanh(self.m[0](t)).mean(1)),
        nn.Embedding(7, 6, padding_idx=padding),
        nn.Linear(6, 3),
    )
    agree(model, tokens(places))


@pytest.mark.parametrize("mode", ["mean", "sum", "max"])
@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_bag(mode: str, padding: int | None):
    agree(nn.Sequential(nn.EmbeddingBag(7, 3, mode=mode, padding_idx=padding)), tokens(4))


def test_embedding_bag_with_weights():
    model = Function(
        lambda self, t, w: self.m[0](t, per_sample_weights=w), nn.EmbeddingBag(7, 3, mode="sum")
    )
    agree(model, (tokens(4), torch.randn(M, 4)))


def test_embedding_counted_by_frequency():
    model = nn.Embedding(7, 3, scale_grad_by_freq=True)
    with pytest.raises(RuntimeError, match="scale_grad_by_freq"):
        agree(Function(lambda self, t: self.m[0](t).mean(1), model), tokens(4))


# Attention


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False},
        {"add_bias_kv": True},
        {"add_zero_attn": True},
        {"kdim": 5, "vdim": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("places", [3, M])
def test_attention(batch_first: bool, options: dict[str, Any], places: int):
    def forward(self: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if not batch_first:
            q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        out = self.m[0](q, k, v)[0]
        return self.m[1](out.mean(1 if batch_first else 0))

    sizes = [6, options.get("kdim", 6), options.get("vdim", 6)]
    inputs = tuple(torch.randn(M, places, size) for size in sizes)
    agree(
        Function(
            forward,
            nn.MultiheadAttention(6, 2, batch_first=batch_first, **options),
            nn.Linear(6, 2),
        ),
        inputs,
        alone=lambda i: tuple(t[i : i + 1] for t in inputs),
    )


@pytest.mark.parametrize("kind", ["bool", "float", "per head"])
@pytest.mark.parametrize("places", [3, M])
@pytest.mark.parametrize("weights", [True, False])
def test_attention_with_masks(kind: str, places: int, weights: bool):
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    future = torch.ones(places, places, dtype=torch.bool).triu(1)
    mask: Tensor = {
        "bool": future,
        "float": torch.zeros(places, places, dtype=torch.float64).masked_fill(future, -1.5),
        "per head": torch.randn(2 * M, places, places, dtype=torch.float64),
    }[kind]
    padding = torch.zeros(M, places, dtype=torch.bool)
    padding[1, -1] = padding[0, -2:] = True

    def forward(self: Any, x: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
        pad = padding if kind == "bool" else torch.where(padding, -2.0, 0.0).to(x)
        return self.m[1](self.m[0](x, x, x, pad, need_weights=weights, attn_mask=mask)[0].mean(1))

    x = sequences(places)
    agree(
        Function(forward, attention, nn.Linear(6, 2)),
        (x, padding, mask),
        alone=lambda i: (
            x[i : i + 1],
            padding[i : i + 1],
            mask[2 * i : 2 * i + 2] if kind == "per head" else mask,
        ),
    )


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("places", [3, M])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_transformer_encoder_layer(norm_first: bool, places: int, mode: str):
    layer = nn.TransformerEncoderLayer(
        6, 2, 8, 0.0 if mode == "train" else 0.1, batch_first=True, norm_first=norm_first
    ).train(mode == "train")
    agree(Function(lambda self, x: self.m[0](x)[:, :1], layer), sequences(places))


@pytest.mark.parametrize("places", [3, M])
def test_transformer_with_places_first(places: int):
    layer = nn.TransformerDecoderLayer(6, 2, 8, 0.0)

    def forward(self: Any, x: Tensor, memory: Tensor) -> Tensor:
        return self.m[1](self.m[0](x.transpose(0, 1), memory.transpose(0, 1))[0])

    agree(
        Function(forward, layer, nn.Linear(6, 2)),
        (sequences(places), sequences(places)),
    )


# Recurrent networks


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("places", [1, 3, M])
def test_recurrent(kind: Any, batch_first: bool, options: dict[str, Any], places: int):
    def forward(self: Any, x: Tensor) -> Tensor:
        out, _ = self.m[0](x if batch_first else x.transpose(0, 1))
        return self.m[1](out[:, -1] if batch_first else out[-1])

    width = 8 if options else 4
    layer = kind(6, 4, batch_first=batch_first, **options)
    agree(Function(forward, layer, nn.Linear(width, 2)), sequences(places))


def test_recurrent_with_projections_and_relu():
    for layer, width in ((nn.LSTM(6, 4, proj_size=2), 2), (nn.RNN(6, 4, nonlinearity="relu"), 4)):
        agree(
            Function(
                lambda self, x: (
                    self.m[1](self.m[0](x.transpose(0, 1))[1][0][-1])
                    if isinstance(self.m[0], nn.LSTM)
                    else self.m[1](self.m[0](x.transpose(0, 1))[1][-1])
                ),
                layer,
                nn.Linear(width, 2),
            ),
            sequences(),
        )


@pytest.mark.parametrize("layers", [1, 2, M])
def test_recurrent_from_a_given_state(layers: int):
    x, h, c = sequences(M), torch.randn(M, layers, 4), torch.randn(M, layers, 4)

    def forward(self: Any, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        h, c = h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()
        out, (last, _) = self.m[0](x, (h, c))
        return self.m[1](out[:, 0] + last[0])

    agree(
        Function(forward, nn.LSTM(6, 4, layers, batch_first=True), nn.Linear(4, 2)),
        (x, h, c),
        alone=lambda i: (x[i : i + 1], h[i : i + 1], c[i : i + 1]),
    )


@pytest.mark.parametrize("places", [3, M])
def test_recurrent_with_the_state_as_an_input_of_layers_first(places: int):
    x, h = sequences(places), torch.randn(2, M, 4)
    model = Function(
        lambda self, x, h: self.m[0](x, h)[0][:, -1], nn.GRU(6, 4, 2, batch_first=True)
    )
    agree(model, (x, h), alone=lambda i: (x[i : i + 1], h[:, i : i + 1]))


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
@pytest.mark.parametrize("places", [2, M])
@pytest.mark.parametrize("start", ["none", "zeros", "trained"])
def test_recurrent_cell_in_a_loop(cell: Any, places: int, start: str):
    def forward(self: Any, x: Tensor) -> Tensor:
        h = {
            "none": lambda: None,
            "zeros": lambda: torch.zeros(len(x), 4, dtype=x.dtype),
            "trained": lambda: self.h.expand(len(x), -1),
        }[start]()
        if h is not None and cell is nn.LSTMCell:
            h = (h, h)
        for step in x.transpose(0, 1):
            h = self.m[0](step, h)
        return self.m[1](h[0] if cell is nn.LSTMCell else h)

    parameters = {"h": torch.randn(1, 4)} if start == "trained" else {}
    agree(Function(forward, cell(6, 4), nn.Linear(4, 2), **parameters), sequences(places))


@pytest.mark.parametrize("start", ["zeros", "trained"])
def test_recurrent_cell_by_hand(start: str):
    def forward(self: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4) if start == "zeros" else self.h.repeat(len(x), 1)
        for t in range(x.shape[1]):
            h = torch.tanh(self.m[0](x[:, t]) + self.m[1](h))
        return h

    agree(Function(forward, nn.Linear(6, 4), nn.Linear(4, 4), h=torch.randn(1, 4)), sequences())


# Parameters without a module


@case("scaled, shifted, divided")
def _():
    return Function(
        lambda self, x: self.m[0](x * self.g + self.b - (self.c @ self.d).sum()) / self.s,
        nn.Linear(6, 4),
        g=torch.randn(6),
        b=torch.randn(1, 6),
        c=torch.randn(2, 3),
        d=torch.randn(3, 2),
        s=torch.rand(4) + 1,
    ), vectors()


@case("on the left of operators")
def _():
    return Function(
        lambda self, x: 2 - self.b * (self.b - x) ** 2 + self.s.exp() * x.sum(1, keepdim=True),
        b=torch.randn(6),
        s=torch.randn(()),
    ), vectors()


@case("added and subtracted, with a factor")
def _():
    return Function(
        lambda self, x: (
            torch.add(x, self.b, alpha=2) * torch.sub(x, self.b, alpha=0.5)
            + (x - self.b) * (1 + self.b)
            + (self.b - x) * self.b
        ),
        b=torch.randn(6),
    ), vectors()


@case("class token and positions")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        x = torch.cat([self.t.expand(len(x), -1, -1), x], 1) + self.p
        return self.m[0](torch.tanh(x))[:, 0]

    return Function(
        forward, nn.Linear(6, 3), t=torch.randn(1, 1, 6), p=torch.randn(1, 4, 6)
    ), sequences()


@case("repeated tokens, shifted first")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        tokens = self.t.repeat(len(x), 1, 1) + self.p[:, :1]
        return torch.tanh(torch.cat([tokens, x], 1)).sum(1)

    return Function(forward, t=torch.randn(1, 1, 6), p=torch.randn(1, 4, 6)), sequences()


@case("a token with as many places as samples")
def _():
    return Function(
        lambda self, x: (torch.tanh(x + self.t.expand(x.shape[1], -1)) * x).sum(1),
        t=torch.randn(1, 6),
    ), sequences(M)


@case("positions with as many places as samples")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1])
        return torch.tanh(x + self.m[0](places) + self.p[: x.shape[1]]).sum(1)

    return Function(forward, nn.Embedding(9, 6), p=torch.randn(9, 6)), sequences(M)


@case("einsum and matmul")
def _():
    return Function(
        lambda self, x: torch.einsum("nd,dk->nk", x, self.w) + x @ self.w.tanh() + (self.v @ x.T).T,
        w=torch.randn(6, 4),
        v=torch.randn(4, 6),
    ), vectors()


@case("indexed, sliced and transposed")
def _():
    return Function(
        lambda self, x: x @ self.w[1:, [0, 2]] + F.linear(x, self.w.mT[:2, :6]) + self.w[0, 0],
        w=torch.randn(7, 4),
    ), vectors()


@case("rows of a table by an index")
def _():
    return Function(
        lambda self, x: (
            self.w[(x[:, 0] > 0).long()]
            * torch.gather(self.v.expand(len(x), -1), 1, (x > 0).long())
        ),
        w=torch.randn(2, 6),
        v=torch.randn(6),
    ), vectors()


@case("in place")
def _():
    return Function(
        lambda self, x: self.m[0](F.relu_(x.clone().mul_(self.g).add_(self.b))),
        nn.Linear(6, 4),
        g=torch.randn(6),
        b=torch.randn(6),
    ), vectors()


@case("in place, on what is made of parameters")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.w.clone()
        weight += self.b @ self.a
        start = self.h.repeat(len(x), 1)
        start += x @ weight
        return start

    return Function(
        forward,
        w=torch.randn(6, 4),
        b=torch.randn(6, 2),
        a=torch.randn(2, 4),
        h=torch.randn(1, 4),
    ), vectors()


@case("assigned to parts of a buffer")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), 4, 6)
        h[:, 0] = self.t
        h[:, 1:] = self.m[0](x)
        return torch.tanh(self.m[0](h)).sum(1)

    return Function(forward, nn.Linear(6, 6), t=torch.randn(6)), sequences()


@case("outputs collected along the places")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        out = torch.zeros(x.shape[1], len(x), 6, dtype=x.dtype)
        for t in range(x.shape[1]):
            out[t] = self.m[0](x[:, t])
        return self.m[1](torch.tanh(out)).sum(0)

    return Function(forward, nn.Linear(6, 6), nn.Linear(6, 2)), sequences(M)


# One parameter, several uses


@case("a module called twice")
def _():
    return Function(
        lambda self, x: self.m[1](self.m[0](torch.tanh(self.m[0](x)))),
        nn.Linear(6, 6),
        nn.Linear(6, 4),
    ), vectors()


@case("a convolution called twice")
def _():
    return Function(
        lambda self, x: self.m[0](torch.tanh(self.m[0](x))).mean((2, 3)), nn.Conv2d(4, 4, 3)
    ), images()


@case("two modules with one weight")
def _():
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    return model, vectors()


@case("a weight and its transpose")
def _():
    return Function(
        lambda self, x: F.linear(torch.tanh(self.m[0](x)), self.m[0].weight.t()), nn.Linear(6, 4)
    ), vectors()


@case("linear and convolution with one weight")
def _():
    return Function(
        lambda self, x: self.m[0](torch.tanh(F.conv1d(x, self.m[0].weight[..., None]))[:, :, 0]),
        nn.Linear(4, 4),
    ), torch.randn(M, 4, 3)


@case("a table that is also the head, dense and looked up")
def _():
    return Function(
        lambda self, t: (torch.tanh(self.m[0](t)) @ self.m[0].weight.T + self.m[0].weight.sum())[
            :, :2
        ],
        nn.Embedding(7, 3),
    ), tokens(2)


# Parametrizations


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.Linear(6, 4)),
        parametrizations.spectral_norm(nn.Linear(6, 4)).eval(),
        parametrizations.orthogonal(nn.Linear(6, 4)),
        prune.l1_unstructured(nn.Linear(6, 4), "weight", amount=0.4),
        prune.random_unstructured(nn.Linear(6, 4), "bias", amount=0.5),
    ],
)
def test_parametrization(layer: nn.Module):
    agree(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer), vectors())


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_parametrization_of_a_convolution():
    agree(head(parametrizations.weight_norm(nn.Conv2d(4, 3, 3)), nn.Tanh()), images())
    agree(head(torch.nn.utils.weight_norm(nn.Conv2d(4, 3, 3)), nn.Tanh()), images())


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


@pytest.mark.parametrize("frozen", [True, False])
def test_low_rank_adaptation(frozen: bool):
    layer = nn.Linear(6, 4)
    layer.weight.requires_grad_(not frozen)
    register_parametrization(layer, "weight", LowRank(), unsafe=True)
    agree(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), layer), vectors())


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "2.weight", "2.bias"])
def test_frozen_parameters(frozen: str):
    for first in (nn.Linear(6, 6), nn.LayerNorm(6), nn.Embedding(6, 4)):
        model = nn.Sequential(first, nn.Tanh(), nn.LazyLinear(3))
        inputs = tokens(2, 6) if isinstance(first, nn.Embedding) else vectors()
        agree(model, inputs, frozen=frozen)


# Whole models


@case("LeNet")
def _():
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 4),
    ), torch.randn(M, 1, 12, 12)


class Block(nn.Module):
    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.GroupNorm(2, after), nn.GroupNorm(2, after)])
        self.short = nn.Conv2d(before, after, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norms[0](self.first(x)), inplace=True)
        return F.relu(self.norms[1](self.second(y)) + self.short(x))


@case("residual network")
def _():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        Block(4, 4),
        Block(4, 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 4),
    ), torch.randn(M, 3, 10, 10)


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.layers(x))[:, 0])


@case("vision transformer")
def _():
    return VisionTransformer(), torch.randn(M, 3, 8, 8)


@case("LSTM tagger")
def _():
    return Function(
        lambda self, t: self.m[2](self.m[1](self.m[0](t))[0]).mT,
        nn.Embedding(7, 4, padding_idx=0),
        nn.LSTM(4, 3, batch_first=True, bidirectional=True),
        nn.Linear(6, 2),
    ), tokens(3)


class LanguageModel(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.table, self.places = nn.Embedding(7, 8), nn.Embedding(9, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=batch_first)
        self.head = nn.Linear(8, 7, bias=False)
        self.head.weight = self.table.weight

    def forward(self, t: Tensor) -> Tensor:
        places = torch.arange(t.shape[1], device=t.device)
        mask = nn.Transformer.generate_square_subsequent_mask(len(places), dtype=torch.float64)
        x = self.table(t) + self.places(places)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.layer(x, src_mask=mask, is_causal=True)
        return self.head(x if self.batch_first else x.transpose(0, 1)).mT


for first in (True, False):
    for length in (3, M):
        case(f"tied language model, batch first {first}, {length} places")(
            lambda first=first, length=length: (LanguageModel(first), tokens(length))
        )


@pytest.mark.parametrize("name", CASES)
def test_model(name: str):
    agree(*CASES[name]())


# Shapes


@settings(max_examples=25)
@given(
    m=st.integers(1, 6),
    places=st.integers(1, 6),
    width=st.integers(1, 6),
    first=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_any_shape(m: int, places: int, width: int, first: bool, seed: int):
    torch.manual_seed(seed)

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x if first else x.transpose(0, 1)
        x = torch.tanh(self.m[2](self.m[1](self.m[0](x)))) * self.s
        return (x if first else x.transpose(0, 1))[:, -1]

    model = Function(
        forward,
        nn.Linear(width, 3),
        nn.LayerNorm(3),
        nn.Linear(3, width),
        s=torch.randn(width),
    )
    agree(model, torch.randn(m, places, width))


@settings(max_examples=25)
@given(
    m=st.integers(1, 5),
    size=st.integers(3, 7),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2]),
    transposed=st.booleans(),
)
def test_any_convolution(m, size, kernel, stride, padding, dilation, groups, transposed):
    torch.manual_seed(0)
    if transposed:
        padding = min(padding, dilation * (kernel - 1) // 2)
        layer = nn.ConvTranspose2d(2, 4, kernel, stride, padding, groups=groups, dilation=dilation)
    else:
        padding = max(padding, dilation * (kernel - 1) // 2)
        layer = nn.Conv2d(2, 4, kernel, stride, padding, dilation, groups)
    agree(
        Function(lambda self, x: self.m[0](x).square().mean((2, 3)), layer),
        torch.randn(m, 2, size, size),
    )
