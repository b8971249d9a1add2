"""Small training runs in float64, from a few numbers that hypothesis draws."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from conjopt.potentials import Logistic, Potential, Softmax, Squared

__all__ = [
    "NAMES",
    "MakeOptimizer",
    "Run",
    "Setting",
    "made",
    "needs_closure",
    "numbers",
    "settings",
    "state_of",
]

MakeOptimizer = Callable[[nn.Module, nn.Module], Optimizer]
NAMES = ("model", "loss", "scale", "samples", "taken", "seed")
INPUTS, OUTPUTS, HIDDEN = 3, 2, 4
CRITERIA: dict[str, tuple[Callable[[], nn.Module], Potential]] = {
    "MSELoss": (nn.MSELoss, Squared()),
    "CrossEntropyLoss": (nn.CrossEntropyLoss, Softmax()),
    "BCEWithLogitsLoss": (nn.BCEWithLogitsLoss, Logistic()),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is made from.

    Attributes:
        model: "linear", or "deep" for one with a hidden layer.
        loss: the name of a criterion of torch.
        scale: of the inputs.
        samples: of the set, each twice in a row.
        taken: steps before what is looked at.
        seed: of parameters and samples.
    """

    model: str
    loss: str
    scale: float
    samples: int
    taken: int
    seed: int

    @property
    def potential(self) -> Potential:
        """That of the loss."""
        return CRITERIA[self.loss][1]

    def network(self) -> nn.Module:
        """A model of its own; the same one at each call."""
        generator = torch.Generator().manual_seed(self.seed)
        if self.model == "linear":
            model: nn.Module = nn.Sequential(nn.Linear(INPUTS, OUTPUTS))
        else:
            model = nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))
        model = model.double()
        with torch.no_grad():
            for p in model.parameters():
                p.copy_(0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        return model

    def criterion(self) -> nn.Module:
        """The loss."""
        return CRITERIA[self.loss][0]()

    @functools.lru_cache(256)  # noqa: B019
    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs ``(2 samples, 3)`` and targets; halves by odd and even places are alike."""
        generator = torch.Generator().manual_seed(self.seed + 1)
        x = torch.randn(self.samples, INPUTS, generator=generator, dtype=torch.float64)
        labels = torch.randint(OUTPUTS, (self.samples,), generator=generator)
        y = labels
        if self.loss != "CrossEntropyLoss":
            y = nn.functional.one_hot(labels, OUTPUTS).double()
        return (self.scale * x).repeat_interleave(2, 0), y.repeat_interleave(2, 0)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """The samples of a step: all of them at the first, and others of them at others."""
        x, y = self.data()
        size = max(1, self.samples - step % 3)
        first = torch.arange(size) + step % (self.samples - size + 1)
        rows = torch.stack([2 * first, 2 * first + 1], 1).flatten()
        return x[rows], y[rows]


@st.composite
def settings(
    draw: st.DrawFn, *, model: str | None = None, scales: tuple[float, ...] = (1.0, 0.1, 3.0)
) -> tuple[Any, ...]:
    """Settings, in the order of `NAMES`.

    Args:
        draw: given by hypothesis.
        model: None for either.
        scales: of inputs.
    """
    return (
        draw(st.sampled_from(["linear", "deep"])) if model is None else model,
        draw(st.sampled_from(list(CRITERIA))),
        draw(st.sampled_from(scales)),
        draw(st.integers(1, 5)),
        draw(st.integers(0, 4)),
        draw(st.integers(0, 1000)),
    )


def made(make_optimizer: Any, model: nn.Module, loss: nn.Module) -> Optimizer:
    """Call what makes an optimizer.

    Raises:
        TypeError: if it cannot be called with a model and a loss, or returns no optimizer.
        ValueError: if the optimizer has no parameter of the model.
    """
    use = "check_optimizer(lambda model, loss: torch.optim.SGD(model.parameters(), lr=0.1))"
    if isinstance(make_optimizer, type) or not callable(make_optimizer):
        what = getattr(make_optimizer, "__name__", f"a {type(make_optimizer).__name__}")
        raise TypeError(
            f"check_optimizer: got {what}, expected a function of a model and a loss that returns "
            f"a new optimizer over the model's parameters: {use}"
        )
    try:
        inspect.signature(make_optimizer).bind(model, loss)
    except TypeError as error:
        raise TypeError(
            f"check_optimizer: make_optimizer(model, loss) cannot be called ({error}): {use}"
        ) from None
    optimizer = make_optimizer(model, loss)
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"check_optimizer: make_optimizer(model, loss) returned a {type(optimizer).__name__}, "
            f"expected a torch.optim.Optimizer: {use}"
        )
    own = {id(p) for p in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "check_optimizer: the optimizer has no parameter of the model that it was made for; "
            f"make a new one at each call: {use}"
        )
    return optimizer


class Run:
    """A model, its loss and its optimizer, which take the steps of a setting.

    Args:
        setting: what it is made from.
        make_optimizer: of a model and a loss.
        decays: whether the optimizer keeps its weight decay.
    """

    def __init__(
        self, setting: Setting, make_optimizer: MakeOptimizer, *, decays: bool = True
    ) -> None:
        self.setting = setting
        self.model, self.loss = setting.network(), setting.criterion()
        self.optimizer = made(make_optimizer, self.model, self.loss)
        self.needs_closure = needs_closure(self.optimizer)
        self.set_to_none = True
        if not decays:
            for group in self.optimizer.param_groups:
                if "weight_decay" in group:
                    group["weight_decay"] = 0.0

    @property
    def parameters(self) -> list[Tensor]:
        """Those of the model."""
        return list(self.model.parameters())

    @property
    def given(self) -> list[Tensor]:
        """Those of the optimizer."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def backward(self, step: int) -> Tensor:
        """The gradients of a step's batch; returns its loss."""
        x, y = self.setting.batch(step)
        self.optimizer.zero_grad(set_to_none=self.set_to_none)
        loss = self.loss(self.model(x), y)
        loss.backward()
        return loss

    def step(self, step: int, change: Callable[[Run], Any] | None = None) -> Any:
        """An ordinary step; ``change`` may touch the gradients before it."""

        def closure() -> Any:
            with torch.enable_grad():
                loss = self.backward(step)
            if change is not None:
                change(self)
            return loss.detach()

        if self.needs_closure:
            return self.optimizer.step(closure)
        closure()
        return self.optimizer.step()

    def steps(self, first: int, last: int) -> Run:
        """Take the steps from one number up to another."""
        for step in range(first, last):
            self.step(step)
        return self

    def flat(self) -> Tensor:
        """All parameters, one after the other, as they are now."""
        return torch.cat([p.detach().flatten() for p in self.parameters])

    def gradient(self, step: int) -> Tensor:
        """The gradient of a step's batch where the parameters are, by another model."""
        x, y = self.setting.batch(step)
        twin = self._twin()
        own = {name for name, p in self.model.named_parameters() for q in self.given if p is q}
        with torch.enable_grad():
            loss = self.setting.criterion()(twin(x), y)
        found = torch.autograd.grad(loss, list(twin.parameters()))
        return torch.cat(
            [
                (g if name in own else torch.zeros_like(g)).flatten()
                for (name, _), g in zip(twin.named_parameters(), found, strict=True)
            ]
        )

    def outputs(self) -> Tensor:
        """Of the whole set, by another model with the same parameters."""
        with torch.no_grad():
            return self._twin()(self.setting.data()[0])

    def _twin(self) -> nn.Module:
        """A model that nothing watches."""
        twin = self.setting.network()
        twin.load_state_dict(self.model.state_dict())
        return twin

    def risk(self) -> Tensor:
        """Mean loss over the whole set."""
        return self.setting.criterion()(self.outputs(), self.setting.data()[1]).detach()

    def saved(self) -> bytes:
        """Model and optimizer as a file holds them."""
        file = io.BytesIO()
        torch.save([self.model.state_dict(), self.optimizer.state_dict()], file)
        return file.getvalue()

    def load(self, saved: bytes) -> list[Any]:
        """Take up what `saved` holds; returns it."""
        states = torch.load(io.BytesIO(saved), weights_only=True)
        self.model.load_state_dict(states[0])
        self.optimizer.load_state_dict(states[1])
        return states

    def copied(self) -> Run:
        """A copy of all of it."""
        twin = copy.copy(self)
        twin.model, twin.loss, twin.optimizer = copy.deepcopy(
            (self.model, self.loss, self.optimizer)
        )
        return twin


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether its step evaluates the loss by itself, as that of LBFGS."""
    arguments = list(inspect.signature(optimizer.step).parameters.values())
    return bool(arguments) and arguments[0].default is inspect.Parameter.empty


def numbers(value: Any) -> Iterator[Tensor]:
    """All numbers in a nested state, each kind of NaN and infinity as a large number."""
    if isinstance(value, Tensor):
        yield value.detach().double().flatten().nan_to_num(1e300, 2e300, -2e300).clone()
    elif isinstance(value, bool | int | float):
        yield torch.tensor([float(value)], dtype=torch.float64).nan_to_num(1e300, 2e300, -2e300)
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from numbers(value[key])
    elif isinstance(value, list | tuple):
        for part in value:
            yield from numbers(part)


def state_of(optimizer: Optimizer) -> Tensor:
    """The numbers that an optimizer saves of its parameters."""
    return torch.cat([torch.zeros(0).double(), *numbers(optimizer.state_dict()["state"])])
