"""Where per-sample gradients could be wrong without a word: exact, or refused in words.

The layers and models themselves are in `tests/test_per_sample_gradients.py`.
"""

import copy
import functools
from typing import Any

import pytest
import torch
from per_sample import (
    F,
    Function,
    M,
    agree,
    case_table,
    images,
    jacobians,
    sequences,
    tokens,
    vectors,
)
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conjopt.measure import (
    curvature_along,
    gradient_noise,
    per_sample_gradient_norms,
    self_check,
    structure_matrix,
    top_curvature,
    top_structure,
)
from conjopt.measure.layers.pieces import squared_norms
from conjopt.measure.layers.tape import Tape
from conjopt.potentials import Softmax

case, CASES = case_table()
refuse, REFUSED = case_table()

# Where the samples are


@case("two views of the samples joined, views first")
def _():
    def forward(self: Any, a: Tensor, b: Tensor) -> Tensor:
        a, b = torch.tanh(self.m[0](torch.cat([a, b]))).chunk(2)
        return self.m[1](a * b)

    return Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), (vectors(), vectors())


@case("two views joined, and taken apart by slices")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.tanh(self.m[0](torch.cat([x, 2 * x])) * self.g)
        return z[: len(x)] - z[len(x) :] ** 2

    return Function(forward, nn.Linear(6, 4), g=torch.randn(4)), vectors()


@case("two views joined, taken apart by slices, and used")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.cat([x, 2 * x]).tanh()
        return self.m[0](z[: len(x)]) * self.m[1](z[len(x) :]) + self.m[0](z)[len(x) :]

    return Function(forward, nn.Linear(6, 4), nn.Linear(6, 4)), vectors()


@case("samples repeated as a whole, and each")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.tanh(self.m[0](x.repeat(2, 1)))
        y = torch.tanh(self.m[0](x.repeat_interleave(2, 0)))
        return z[: len(x)] + z[len(x) :] ** 2 + y.unflatten(0, (-1, 2)).prod(1)

    return Function(forward, nn.Linear(6, 4)), vectors()


@case("samples joined with as many constants")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.tanh(self.m[0](torch.cat([x, torch.ones_like(x).cos()])))
        return z[: len(x)] * z[len(x) :]

    return Function(forward, nn.Linear(6, 4)), vectors()


@pytest.mark.parametrize("places", [2, M])
@pytest.mark.parametrize("dim", [0, 1, -2])
def test_places_stacked(places: int, dim: int):
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.stack([self.m[0](x[:, t]) for t in range(places)], dim).tanh()
        return self.m[1](y).prod(0 if dim == 0 else 1)

    agree(Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), sequences(places))


@case("a new tensor of places, as many as samples")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        places = x.new_ones(x.shape[1], 4).cumsum(0)
        return torch.tanh(x + self.m[0](places)).sum(1)

    return Function(forward, nn.Linear(4, 6)), sequences(M)


@case("two views of images joined, with convolution and normalisation")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = self.m[1](self.m[0](torch.cat([x, x.flip(3)], 0))) * self.g
        return self.m[2](z).mean((2, 3)).unflatten(0, (2, -1)).prod(0)

    return Function(
        forward, nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(4), g=torch.randn(4, 1, 1)
    ), images()


@pytest.mark.parametrize("places", [2, 3, M])
@pytest.mark.parametrize("first", [True, False])
def test_places_and_samples_joined(places: int, first: bool):
    def forward(self: Any, x: Tensor) -> Tensor:
        y = (x if first else x.transpose(0, 1)).reshape(-1, 6)
        y = torch.tanh(self.m[1](self.m[0](y)) * self.g + self.b)
        shape = (len(x), places, 6) if first else (places, len(x), 6)
        return y.reshape(shape).sum(1 if first else 0)

    model = Function(
        forward, nn.Linear(6, 6), nn.LayerNorm(6), g=torch.randn(6), b=torch.randn(1, 6)
    )
    agree(model, sequences(places))


@case("as many channels, places and classes as samples")
def _():
    return nn.Sequential(
        nn.Conv1d(M, M, 3, padding=1), nn.GroupNorm(1, M), nn.Linear(M, M), nn.PReLU(M)
    ), torch.randn(M, M, M)


@case("samples last")
def _():
    return Function(
        lambda self, x: (self.w @ x.T + self.b).T, w=torch.randn(4, 6), b=torch.randn(4, 1)
    ), vectors()


@case("a scale for each place, as many places as samples, places first")
def _():
    return Function(
        lambda self, x: torch.tanh(x.transpose(0, 1) * self.w).sum(0), w=torch.randn(M, 1, 6)
    ), sequences(M)


@case("a token for each sample, after as many places")
def _():
    return Function(
        lambda self, x: torch.tanh(torch.cat([x, self.t.expand(len(x), 1, 6)], 1) @ self.w).sum(1),
        t=torch.randn(6),
        w=torch.randn(6, 3),
    ), sequences(M)


@case("queries repeated for attention")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        q = self.q.unsqueeze(1).repeat(1, len(x), 1)
        return self.m[0](q, x.transpose(0, 1), x.transpose(0, 1))[0].sum(0)

    return Function(forward, nn.MultiheadAttention(6, 2), q=torch.randn(2, 6)), sequences()


@case("queries of attention computed from parameters")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        q = (self.q.expand(len(x), -1, -1) + 1).tanh()
        return self.m[0](q, x, x)[0].sum(1)

    return Function(
        forward, nn.MultiheadAttention(6, 2, batch_first=True), q=torch.randn(1, 2, 6)
    ), sequences()


@case("the last token of each sample by its number")
def _():
    def forward(self: Any, x: Tensor, length: Tensor) -> Tensor:
        return self.m[0](torch.tanh(self.m[0](x))[torch.arange(len(x)), length])

    return Function(forward, nn.Linear(6, 6)), (sequences(M), torch.tensor([0, 2, 1, 1, 4]))


@case("a plain tensor kept by the model, as long as there are samples")
def _():
    model = Function(lambda self, x: torch.tanh(x + self.m[0](self.kept)).sum(1), nn.Linear(4, 6))
    model.kept = torch.randn(M, 4, dtype=torch.float64)
    return model, sequences(M)


@case("a second input of places")
def _():
    model = Function(lambda self, x, p: torch.tanh(x + self.m[0](p)).sum(1), nn.Linear(4, 6))
    return model, (sequences(M), torch.randn(M, 4)), lambda x, p: (x, p)


@case("a second input of samples")
def _():
    model = Function(
        lambda self, x, p: torch.tanh(x + self.m[0](p)[:, None]).sum(1), nn.Linear(4, 6)
    )
    return model, (sequences(M), torch.randn(M, 4))


@case("inputs of places and samples, by name")
def _():
    model = Function(
        lambda self, x, scale=None: torch.tanh(x * self.m[0](scale)).sum(1), nn.Linear(6, 6)
    )
    return model, (sequences(), torch.randn(M, 1, 6))


@case("a table of classes among the inputs, of twice as many rows")
def _():
    model = Function(lambda self, x, table: self.m[0](x) @ self.m[0](table).T, nn.Linear(6, 3))
    return model, (vectors(), torch.randn(2 * M, 6)), lambda x, table: (x, table)


@case("a parameter as queries of plain attention")
def _():
    return Function(
        lambda self, x: F.scaled_dot_product_attention(self.q.expand(len(x), -1, -1), x, x).sum(1),
        q=torch.randn(1, M, 6),
    ), sequences(M)


@case("noise on weights, for each sample")
def _():
    noise = torch.randn(M, 6, dtype=torch.float64)
    model = Function(
        lambda self, x: (x * (self.w * self.noise)) @ self.v, w=torch.randn(6), v=torch.randn(6, 2)
    )
    model.noise = noise
    return model, vectors(), "masked"


@case("a parameter for each sample")
def _():
    return (
        Function(
            lambda self, x: torch.tanh(self.m[0](x) + self.codes) * self.codes.sum(1, keepdim=True),
            nn.Linear(6, 4),
            codes=torch.randn(M, 4),
        ),
        vectors(),
        "masked",
    )


@case("bags of joined samples, by offsets")
def _():
    def forward(self: Any, t: Tensor) -> Tensor:
        return self.m[0](t.flatten(), torch.arange(0, t.numel(), t.shape[1]))

    return Function(forward, nn.EmbeddingBag(7, 3)), torch.randint(7, (M, 4))


# Gradients that arrive in several ways


@case("both the outputs and the last state")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        out, (h, c) = self.m[0](x)
        return self.m[1](out.sum(1) + h[-1] * c[-1])

    return Function(forward, nn.LSTM(6, 4, 2, batch_first=True), nn.Linear(4, 2)), sequences()


@case("attention and its weights")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        out, weights = self.m[0](x, x, x)
        return torch.cat([out.sum(1), weights[:, 0]], 1)

    return Function(forward, nn.MultiheadAttention(6, 2, batch_first=True)), sequences()


@case("parts of a weight, and the weight")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        a, b = self.w.chunk(2)
        return x @ a * (x @ b.tanh()) + (x @ a).exp() + x @ (self.w[:6] + self.w[6:])

    return Function(forward, w=torch.randn(12, 3)), vectors()


@case("in place on a view")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        y[:, :2].mul_(2)
        y[:, 2:].relu_()
        return self.m[1](y)

    return Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), vectors()


@case("a buffer filled through views")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = torch.zeros(len(x), 4, 6, dtype=x.dtype)
        y[:, 1:].copy_(x)
        return torch.tanh(self.m[0](y)).sum(1)

    return Function(forward, nn.Linear(6, 3)), sequences()


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> Tensor:
        return 2 * b


@case("a custom function of activations")
def _():
    return Function(
        lambda self, x: self.m[1](torch.tanh(Doubled.apply(self.m[0](x)))),
        nn.Linear(6, 4),
        nn.Linear(4, 2),
    ), vectors()


@case("a custom function of inputs")
def _():
    return Function(lambda self, x: self.m[0](Doubled.apply(x)), nn.Linear(6, 4)), vectors()


@case("activation checkpointing")
def _():
    inner = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6))
    return Function(
        lambda self, x: self.m[1](checkpoint(self.m[0], x, use_reentrant=False)),
        inner,
        nn.Linear(6, 2),
    ), vectors()


@case("statistics of the batch that no gradient goes through")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        assert torch.isfinite(y).all()
        return self.m[1](y / y.detach().std(0) - x.mean(0)[:4])

    return Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), vectors(), None


@case("detached, and not")
def _():
    return Function(
        lambda self, x: self.m[0](x) + self.m[1](self.m[0](x).detach()) + self.w.detach() @ self.w,
        nn.Linear(6, 4),
        nn.Linear(4, 4),
        w=torch.randn(4),
    ), vectors()


@case("parameters without a gradient for the outputs")
def _():
    return Function(lambda self, x: self.m[0](x), nn.Linear(6, 4), nn.Linear(4, 4)), vectors()


@pytest.mark.parametrize("name", CASES)
def test_exact(name: str):
    torch.manual_seed(0)
    model, inputs, *rest = CASES[name]()
    if rest and rest[0] in (
        None,
        "masked",
    ):  # samples alone have other statistics: mask cotangents instead
        model.double()
        inputs = inputs.double()
        outputs = model(inputs)
        parameters = list(model.parameters())
        expected = torch.stack(
            [
                sum(
                    g.square().sum()
                    for g in torch.autograd.grad(o.sum(), parameters, retain_graph=True)
                )
                for o in outputs
            ]
        )
        tape = Tape(model, inputs)
        (out,) = tape.outputs
        pulled = tape.pull([out], [[torch.ones_like(out)]])
        found = sum(squared_norms(pieces) for _, pieces in pulled)
        assert torch.allclose(found, expected, rtol=1e-12, atol=0)
        return
    if rest:
        x, table = inputs
        agree(model, inputs, alone=lambda i: (x[i : i + 1], table))
    else:
        agree(model, inputs)


# What is refused


@refuse("meet each other")
def mean_over_the_batch():
    return Function(lambda self, x: (y := self.m[0](x)) - y.mean(0), nn.Linear(6, 4)), vectors()


@refuse("meet each other ")
def softmax_over_the_batch():
    return Function(
        lambda self, x: self.m[0](torch.softmax(self.m[0](x), 0)), nn.Linear(6, 6)
    ), vectors()


@refuse("meet each other  ")
def similarities():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        return self.m[1](y @ y.T @ y)

    return Function(forward, nn.Linear(6, M), nn.Linear(M, 2)), vectors()


@refuse("meet each other   ")
def permuted():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        return self.m[1](y + y[torch.arange(len(x) - 1, -1, -1)])

    return Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), vectors()


@refuse("meet each other    ")
def tokens_that_are_masked_out():
    def forward(self: Any, x: Tensor) -> Tensor:
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        keep[0] = False  # 4 samples with 5 places: a multiple of the samples is left
        y = self.m[0](x)[keep]
        return self.m[1](y).reshape(5, -1)

    return Function(forward, nn.Linear(6, 4), nn.Linear(4, 2)), sequences(M)


MIXING: dict[str, Any] = {
    "a group norm over samples": lambda y: F.group_norm(y.T[None], 2)[0].T,
    "a slice across two copies": lambda y: torch.cat([y, y.exp()])[1 : M + 1],
    "taken by numbers": lambda y: y.take(torch.arange(4 * M).flip(0)).reshape(M, 4),
    "put by numbers": lambda y: y.index_put((torch.arange(M).flip(0),), y),
    "a mean, detached and not": lambda y: (y - y.detach().mean(0)) * (y - y.mean(0)),
    "joined with more rows": lambda y: (
        torch.cat([y, torch.ones(2 * M, 4, dtype=y.dtype)]).unflatten(0, (M, 3)).sum(1)
    ),
    "places and samples in chunks": lambda y: (c := y.repeat_interleave(2, 0).chunk(2))[0] * c[1],
    "normalised over the batch": lambda y: F.normalize(y, 2.0, 0),
    "rolled": lambda y: torch.roll(y, 1, 0),
    "rolled as one row": lambda y: torch.roll(y, 1),
    "flipped": lambda y: y.flip(0),
    "sorted": lambda y: y.sort(0)[0],
    "summed up": lambda y: y.cumsum(0),
    "a layer norm over all": lambda y: F.layer_norm(y, y.shape),
    "attention between samples": lambda y: F.scaled_dot_product_attention(y, y, y),
    "a convolution over samples": lambda y: (
        F.conv1d(y.T[None], torch.ones(4, 4, 3, dtype=y.dtype), padding=1)[0].T
    ),
    "a pool over samples": lambda y: F.avg_pool1d(y.T, 3, 1, 1).T,
    "neighbours in a graph": lambda y: torch.eye(M, dtype=y.dtype).roll(1, 0) @ y,
    "neighbours added": lambda y: torch.zeros_like(y).index_add(0, torch.arange(M).flip(0), y),
    "neighbours gathered": lambda y: y.gather(0, torch.arange(M).flip(0)[:, None].expand(M, 4)),
    "pairs": lambda y: torch.cat([y, y]).unflatten(0, (M, 2)).mean(1),
    "a mean, extended": lambda y: y + y.mean(0, keepdim=True).expand_as(y),
    "a greatest value": lambda y: y / y.abs().max(),
    "halves of the batch": lambda y: torch.cat([y[2:], y[:2]]),
    "halves written to": lambda y: torch.zeros_like(y).index_copy(0, torch.arange(M).flip(0), y),
    "distances": lambda y: torch.cdist(y, y)[:, :4],
    "covariance": lambda y: y @ (y.T @ y),
    "unbatched attention": lambda y: nn.MultiheadAttention(4, 2).to(y)(y, y, y)[0],
    "unbatched recurrence": lambda y: nn.GRU(4, 4).to(y)(y)[0],
}


@pytest.mark.parametrize("width", [4, M])
@pytest.mark.parametrize("name", MIXING)
def test_samples_that_meet_are_refused(name: str, width: int):
    if width == M and "attention" in name:
        width = 4
    model = Function(
        lambda self, x: self.m[1](MIXING[name](self.m[0](x)[:, :4])),
        nn.Linear(width, 4),
        nn.Linear(4, 2),
    )
    with pytest.raises(RuntimeError, match="meet each other"):
        pull(model.double(), torch.randn(M, width, dtype=torch.float64))


@refuse("training mode, which couples.*eval")
def batch_norm():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), vectors()


@refuse("meet each other.*eval")
def batch_norm_without_parameters():
    return nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4, affine=False)), vectors()


@refuse("scale_grad_by_freq")
def embedding_by_frequency():
    return nn.Embedding(7, 3, scale_grad_by_freq=True), torch.randint(7, (M,))


@refuse("drops out between")
def recurrent_dropout():
    return Function(
        lambda self, x: self.m[0](x)[0][:, -1], nn.LSTM(6, 4, 2, batch_first=True, dropout=0.5)
    ), sequences()


@refuse("Attention drops out")
def attention_dropout():
    return Function(
        lambda self, x: self.m[0](x, x, x)[0], nn.MultiheadAttention(6, 2, 0.5, batch_first=True)
    ), sequences()


@refuse("Attention drops out ")
def attention_of_a_parameter_with_dropout():
    return Function(
        lambda self, x: F.scaled_dot_product_attention(self.q, x, x, dropout_p=0.5).sum(1),
        q=torch.randn(1, 2, 6),
    ), sequences()


@refuse("padded batch")
def packed_sequence():
    def forward(self: Any, x: Tensor) -> Tensor:
        packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 3, 2, 2, 1]), True)
        return self.m[0](packed)[1][0]

    return Function(forward, nn.GRU(6, 4, batch_first=True)), sequences()


@refuse("use_reentrant=False")
def reentrant_checkpointing():
    return Function(
        lambda self, x: checkpoint(self.m[1], self.m[0](x), use_reentrant=True),
        nn.Linear(6, 4),
        nn.Linear(4, 2),
    ), vectors()


@refuse("written to after")
def argument_written_to():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        x += 1
        return y

    return Function(forward, nn.Linear(6, 4)), vectors()


class Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, b: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return b @ weight.T, x.T @ b


@refuse(r"depend on w in a way")
def custom_function_of_a_weight():
    return Function(
        lambda self, x: self.m[0](Multiplied.apply(x, self.w)), nn.Linear(3, 2), w=torch.randn(6, 3)
    ), vectors()


@refuse(r"depend on w in a way ")
def custom_function_of_a_weight_with_another_use():
    return Function(
        lambda self, x: x @ self.w + Multiplied.apply(x, self.w), w=torch.randn(6, 3)
    ), vectors()


@refuse(r"depend on w in a way  ")
def custom_function_of_a_computed_weight_with_another_use():
    def forward(self: Any, x: Tensor) -> Tensor:
        weight = self.w.tanh()
        return x @ weight + Multiplied.apply(x, weight)

    return Function(forward, w=torch.randn(6, 3)), vectors()


# A linear layer on sequences returns a view, whose gradient arrives at its base once it is written
# to.


@case("a parameter added to a view in place")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        y += self.b
        return self.m[1](y.tanh())

    return Function(
        forward, nn.Linear(6, 4), nn.Linear(4, 2), b=torch.randn(3, 4)
    ), sequences()  # fmt: skip


@case("a view scaled, moved and clipped in place")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        y.mul_(self.a).add_(self.b)
        return self.m[1](F.relu(y, inplace=True))

    return Function(
        forward, nn.Linear(6, 4), nn.Linear(4, 2), a=torch.rand(4), b=torch.randn(4)
    ), sequences()  # fmt: skip


@case("activations in place after layers on sequences")
def _():
    layers = nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Linear(4, 4), nn.SiLU(inplace=True)
    return nn.Sequential(*layers, nn.Linear(4, 2)), sequences()


@case("a place overwritten by a parameter, in a transposed result")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = self.m[0](x).transpose(1, 2)
        z[:, 0] = self.c
        return self.m[1](z.tanh())

    layers = nn.Conv1d(6, 5, 1), nn.Linear(5, 2)
    return Function(forward, *layers, c=torch.randn(5)), sequences().mT


@case("weights that are made complex")
def _():
    def forward(self: Any, x: Tensor) -> Tensor:
        z = torch.fft.rfft(x) * torch.view_as_complex(self.a)
        return torch.fft.irfft(z @ torch.view_as_complex(self.b), n=6)

    return Function(forward, a=torch.randn(4, 2), b=torch.randn(4, 4, 2)), vectors()


@case("a table by function, with a padding row counted from behind")
def _():
    def forward(self: Any, index: Tensor) -> Tensor:
        return self.m[0](F.embedding(index, self.w, padding_idx=-3).mean(1))

    return Function(forward, nn.Linear(3, 2), w=torch.randn(7, 3)), tokens(5)


def test_tables_with_sparse_gradients():
    torch.manual_seed(0)
    sparse, dense = (
        nn.Sequential(nn.Embedding(7, 3, sparse=kind), nn.Flatten(), nn.Linear(15, 2)).double()
        for kind in (True, False)
    )
    dense.load_state_dict(sparse.state_dict())
    x, y, criterion = tokens(5), torch.zeros(M, 2).double(), nn.MSELoss()
    for measured in (
        lambda model: per_sample_gradient_norms(model, criterion, x, y),
        lambda model: structure_matrix(model, x),
        lambda model: top_structure(model, x).value,
    ):
        torch.testing.assert_close(measured(sparse), measured(dense))


def test_rows_are_numbers_or_a_mask():
    torch.manual_seed(0)
    model, x, y = nn.Linear(6, 3), vectors(), torch.zeros(M).long()
    measure = functools.partial(per_sample_gradient_norms, model, nn.CrossEntropyLoss(), x, y)
    mask = torch.arange(M) % 2 == 1
    assert torch.equal(measure(rows=mask), measure()[mask])
    assert torch.equal(measure(rows=torch.tensor([1, 3])), measure()[[1, 3]])
    for rows in (mask[:2], torch.tensor(1), torch.tensor([1.0])):
        with pytest.raises(ValueError, match=f"a boolean for each of the {M} samples"):
            measure(rows=rows)


@refuse(r"Complex parameters are not measured: w")
def complex_parameters():
    def forward(self: Any, x: Tensor) -> Tensor:
        return torch.fft.irfft(torch.fft.rfft(x) * self.w, n=6)

    return Function(forward, w=torch.randn(4, dtype=torch.complex128)), vectors()


def rewritten(self: Any, x: Tensor) -> Tensor:
    y = self.m[0](x)[0]
    y.mul_(self.a)
    return self.m[1](y)


@refuse(r"is a view of something else and was written to")
def written_to_a_transposed_view():
    layers = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2)
    return Function(rewritten, *layers, a=torch.rand(4)), sequences()


def test_what_is_written_to_is_followed_under_dropout_too():
    """There two samples are not compared with plain autograd: the draws would be others."""
    torch.manual_seed(0)
    dropping = [nn.Linear(6, 4), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(4, 2)]
    model, x, y = nn.Sequential(*dropping).double(), sequences().double(), torch.zeros(M, 3).long()
    torch.manual_seed(1)
    losses = F.cross_entropy(model(x).mT, y, reduction="none").mean(1)
    parameters = list(model.parameters())
    rows = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in losses]
    expected = torch.stack([torch.cat([g.flatten() for g in row]).norm() for row in rows])
    torch.manual_seed(1)
    transposed = Function(lambda self, x: self.m[0](x).mT, model)
    found = per_sample_gradient_norms(transposed, nn.CrossEntropyLoss(), x, y)
    torch.testing.assert_close(found, expected)
    layers = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 2), nn.Dropout(0.3)
    model = Function(lambda self, x: self.m[2](rewritten(self, x)), *layers, a=torch.rand(4))
    with pytest.raises(RuntimeError, match="is a view of something else and was written to"):
        per_sample_gradient_norms(model.double(), nn.MSELoss(), x, torch.zeros(M, 3, 2).double())


@refuse(r"depend on b in a way")
def written_to_a_view():
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.m[0](x)
        y[:, :2].add_(self.b)
        return y

    return Function(forward, nn.Linear(6, 4), b=torch.randn(2)), vectors()


@pytest.mark.parametrize("words", REFUSED)
def test_refused(words: str):
    torch.manual_seed(0)
    model, inputs = REFUSED[words]()
    with pytest.raises(RuntimeError, match=words.rstrip()):
        pull(model, inputs)


def pull(model: nn.Module, inputs: Any) -> None:
    tape = Tape(model, inputs)
    (output,) = tape.outputs
    for _, pieces in tape.pull([output], [[torch.ones_like(output)]]):
        squared_norms(pieces)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_scripted_parts_are_refused_by_name():
    model = nn.Sequential(nn.Linear(6, 4), torch.jit.script(nn.Linear(4, 2)))
    with pytest.raises(RuntimeError, match=r"depend on 1\.bias, 1\.weight in a way"):
        pull(model, vectors())


def test_compiled_model_is_measured_plain():
    model = torch.compile(
        nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2)), backend="eager"
    )
    agree(model, vectors())


@pytest.mark.slow
@pytest.mark.parametrize("how", ["part", "in place", "function"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_parts_are_measured_uncompiled(how: str):
    torch.compiler.reset()
    compilations = []

    def backend(graph: Any, examples: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    layers = nn.Linear(4, 8), nn.Linear(8, 2)
    part = Function(lambda self, h: self.m[1](self.m[0](h).tanh()), *layers)
    model = nn.Sequential(nn.Linear(6, 4), part).double()
    twin, x, y = copy.deepcopy(model), vectors().double(), torch.tensor([0, 1, 1, 0, 1])
    if how == "part":
        model[1] = torch.compile(part, backend=backend)
    elif how == "in place":
        part.compile(backend=backend)
    else:
        compiled = torch.compile(lambda h, w, b: torch.tanh(h @ w.mT + b), backend=backend)
        called = lambda self, h: self.m[1](compiled(h, *self.m[0].parameters()))  # noqa: E731
        model[1] = Function(called, *layers)
    loss = nn.CrossEntropyLoss()
    model(x)
    before = len(compilations)
    assert before
    for measured in (
        lambda model: per_sample_gradient_norms(model, loss, x, y),
        lambda model: structure_matrix(model, x),
        lambda model: gradient_noise(model, loss, x, y).noise,
        lambda model: top_curvature(model, Softmax(), x).value,
    ):
        assert torch.allclose(measured(model), measured(twin), rtol=1e-12, atol=0)
    assert len(compilations) == before
    model(x)
    assert len(compilations) == before  # and it is still compiled
    torch.compiler.reset()


def table_of(kind: type) -> nn.Module:
    def forward(self: Any, t: Tensor) -> Tensor:
        h = self.m[0](t) if kind is nn.EmbeddingBag else self.m[0](t).mean(1)
        return self.m[1](torch.tanh(h))

    model = Function(forward, kind(7, 4, max_norm=0.5), nn.Linear(4, 3)).double()
    with torch.no_grad():
        model.m[0].weight.mul_(3)
    return model


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_renormalised_tables_stay_as_they_are(kind: type):
    """A forward writes to a table with a max_norm; a measurement is not to."""
    model, x, y = table_of(kind), tokens(4), torch.tensor([0, 1, 2, 0, 1])
    once = copy.deepcopy(model)
    once(x)  # as a training step does first
    assert not torch.equal(once.m[0].weight, model.m[0].weight)
    loss, kept = nn.CrossEntropyLoss(), copy.deepcopy(model)
    u = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    for measured in (
        lambda model: per_sample_gradient_norms(model, loss, x, y),
        lambda model: structure_matrix(model, x),
        lambda model: gradient_noise(model, loss, x, y).noise,
        lambda model: top_curvature(model, Softmax(), x).value,
        lambda model: curvature_along(model, Softmax(), x, u),
        lambda model: self_check(model, loss, x, y),
    ):
        found = measured(model)
        for mine, other in zip(model.parameters(), kept.parameters()):
            assert torch.equal(mine, other)
            assert mine.grad is None
        # By differences, the curvature in a bag is that of what renormalises, too.
        if found is not None and (found.ndim or kind is nn.Embedding):
            assert torch.allclose(found, measured(once), rtol=1e-6, atol=0)  # norms + 1e-7
    expected = reference(once, loss, x, y)
    found = per_sample_gradient_norms(model, loss, x, y)
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)


def test_inputs_without_samples_or_several_outputs():
    with pytest.raises(ValueError, match="no tensor with a dimension of samples"):
        Tape(nn.Linear(6, 4), (torch.tensor(1.0),))
    with pytest.raises(ValueError, match="returned 2 floating-point tensors"):
        Tape(Function(lambda self, x: (x, x)), vectors()).only_output()
    with pytest.raises(ValueError, match="expected the samples along dimension 0"):
        Tape(nn.Sequential(nn.Linear(6, 4), nn.Flatten(0)), vectors()).only_output()


def test_no_samples_give_no_pieces():
    tape = Tape(nn.Linear(6, 4), torch.zeros(0, 6))
    output = tape.only_output()
    assert list(tape.pull([output], [[torch.ones_like(output)]])) == []


# Losses


def reference(model: nn.Module, loss: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Norms of the parts of the gradient that go through one sample's outputs, times `m`."""
    outputs = model(inputs)
    (whole,) = torch.autograd.grad(loss(outputs, targets), outputs, retain_graph=True)
    factor = len(inputs) if loss.reduction == "mean" else 1
    norms = []
    for i in range(len(inputs)):
        mine = torch.zeros_like(whole)
        mine[i] = whole[i]
        parts = torch.autograd.grad(outputs, list(model.parameters()), mine, retain_graph=True)
        norms.append(factor * sum(part.square().sum() for part in parts).sqrt())
    return torch.stack(norms)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("places", [None, 3, M])
def test_reductions_tokens_and_ignored_targets(reduction: str, places: int | None):
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 6)).double()
    if places is not None:
        model = Function(lambda self, t: self.m[0](t).mT, model)
    shape = (M,) if places is None else (M, places)
    tokens, targets = torch.randint(7, shape), torch.randint(6, shape)
    targets.view(-1)[0] = targets.view(-1)[-1] = -100
    weight = torch.rand(6, dtype=torch.float64)
    for loss in (
        nn.CrossEntropyLoss(reduction=reduction),
        nn.CrossEntropyLoss(weight, reduction=reduction, label_smoothing=0.1),
    ):
        found = per_sample_gradient_norms(model, loss, tokens, targets)
        expected = reference(model, loss, tokens, targets)
        assert torch.allclose(found, expected, rtol=1e-12, atol=1e-15)
        rows = torch.tensor([3, 1])
        found = per_sample_gradient_norms(model, loss, tokens, targets, rows=rows)
        assert torch.allclose(found, expected[rows], rtol=1e-12, atol=1e-15)


# What is left behind


class Kept(nn.Module):
    """A dropout, buffers, attributes; it can fail at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 4), nn.Linear(4, 2)
        self.drop, self.norm = nn.Dropout(0.5), nn.InstanceNorm1d(4, track_running_stats=True)
        self.register_buffer("calls", torch.zeros(()))
        self.kept = torch.ones(M, 4)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.drop(self.first(x)) * self.kept
        y = self.norm(y[..., None].expand(-1, -1, 3)).mean(2)
        if self.fails:
            raise KeyError("an error of the model")
        return self.last(y)


def traces(model: Kept, inputs: Tensor) -> list[Any]:
    tensors = [inputs, model.kept, *model.parameters(), *model.buffers()]
    return [
        *(copy.deepcopy(t.detach()) for t in tensors),
        *(sorted(vars(t)) for t in tensors),
        *(t._version for t in tensors),
        *(t._backward_hooks for t in tensors),
        *(getattr(t, "grad", None) for t in tensors),
        *(m.training for m in model.modules()),
        *(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()),
        torch.get_rng_state(),
        torch.is_grad_enabled(),
        len(torch.overrides._get_current_function_mode_stack()),
    ]


def test_nothing_is_left_behind():
    model, inputs = Kept(), vectors().requires_grad_()
    inputs.grad = torch.ones(M, 6)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for fails in (False, True):
        model.fails = fails
        before = traces(model, inputs)
        if fails:
            with pytest.raises(KeyError, match="an error of the model"):
                pull(model, inputs)
        else:
            pull(model, inputs)
            with torch.no_grad():
                pull(model, inputs)
        after = traces(model, inputs)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_dropout_as_it_would_be_drawn():
    model = nn.Sequential(nn.Linear(6, 40), nn.Dropout(0.5), nn.Linear(40, 2)).double()
    x = vectors().double()
    state = torch.get_rng_state()
    outputs = model(x)
    torch.set_rng_state(state)
    parameters = list(model.parameters())
    expected = torch.stack(
        [
            sum(
                g.square().sum()
                for g in torch.autograd.grad(o.sum(), parameters, retain_graph=True)
            )
            for o in outputs
        ]
    )
    tape = Tape(model, x)
    (output,) = tape.outputs
    found = sum(
        squared_norms(pieces) for _, pieces in tape.pull([output], [[torch.ones_like(output)]])
    )
    assert torch.allclose(found, expected, rtol=1e-12)


def test_narrow_autocast_is_close():
    model = nn.Sequential(nn.Linear(6, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))
    x = vectors()
    expected = jacobians(model, [(x[i : i + 1],) for i in range(M)]).sum(1).square().sum(1)
    with torch.autocast("cpu", torch.bfloat16):
        tape = Tape(model, x)
        (output,) = tape.outputs
        assert output.dtype == torch.bfloat16
        pulled = list(tape.pull([output], [[torch.ones_like(output)]]))
        found = sum(squared_norms(pieces).float() for _, pieces in pulled)
    assert torch.allclose(found, expected, rtol=5e-2)
