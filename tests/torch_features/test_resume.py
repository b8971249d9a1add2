"""A run that is killed at any step and resumed equals the unbroken one bit for bit."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import RULES, any_rule, criterion_of, equal, make, network, parameters, same, train
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from conjopt import AdaptiveBatchSampler
from conjopt.optim.saving import BLOCK_STATE

RESUMED = {
    "spectral": {},
    "spectral, averaged": {"average": 0.1, "max_step": 0.05},
    "spectral, half precision": {"dtype": torch.bfloat16, "average": 0.1},
    "spectral, double precision": {"dtype": torch.float64, "weight_decay": 0.03},
    "spectral, with a floor that is none": {"data_floor": 1.5},
    "spectral, batch norm": {"normalize": True},
    "sgd": {"direction": "sgd", "average": 0.2},
    "spectral constant": {"step_rule": "constant", "lr": 0.02, "average": 0.1},
    "sgd constant": {"step_rule": "constant", "direction": "sgd", "lr": 0.1},
}


@pytest.mark.filterwarnings("ignore:ConjSGD. losses stay below data_floor:RuntimeWarning")
@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_the_unbroken_one(kind):
    """Saved after every step: inside the warm-up, at measurements and between them."""
    options = {"warmup": 4, "measure_every": 5, **RESUMED[kind]}
    dtype, normalize = options.pop("dtype", torch.float32), options.pop("normalize", False)
    steps = 14

    def start():
        model = network(dtype, dropout=0.3)
        if normalize:
            model[1] = nn.BatchNorm1d(6)
        groups = [{"params": model[:3].parameters()}, {"params": model[3:].parameters()}]
        groups[0]["lr"] = 0.5 * options.get("lr", 1.0)
        optimizer = make(model, params=groups, **options)
        return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 6, gamma=0.5)

    def run(model, optimizer, scheduler, first, last):
        for step in range(first, last):
            loss = train(model, optimizer, 1, step)
            scheduler.step()
        return loss

    parts = start()
    saves = []
    for step in range(steps):
        file = io.BytesIO()
        torch.save([part.state_dict() for part in parts], file)
        saves.append(file.getvalue())
        run(*parts, step, step + 1)
    for step, save in enumerate(saves[:-1]):
        again = start()
        again[0].eval()
        train(again[0], again[1], 2, 50)  # what is there before is forgotten
        again[0].train()
        for part, state in zip(again, torch.load(io.BytesIO(save), weights_only=True)):
            part.load_state_dict(state)
        later = min(step + 6, steps - 1)
        run(*again, step, later)
        expected = torch.load(io.BytesIO(saves[later]), weights_only=True)
        found = [part.state_dict() for part in again]
        assert same(found, expected), f"saved after {step} steps"


def test_a_state_holds_its_own_precision():
    model = network(torch.bfloat16)
    optimizer = make(model, average=0.1)
    train(model, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    assert set().union(*before["state"].values()) == {*BLOCK_STATE, "momentum_buffer", "average"}
    optimizer.load_state_dict(before)
    after = optimizer.state_dict()
    for number, state in before["state"].items():
        for key, value in state.items():
            assert value.dtype == after["state"][number][key].dtype
    assert after["state"][0]["slopes"].dtype == torch.float32


# Whole runs, killed anywhere.


SIZE, STEPS = 50, 14


def dense():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def normalized():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


class Attention(nn.Module):
    """A table of words, one head, and their mean; `tanh` for a factor without dimensions."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lift, self.factor = nn.Linear(1, 8), nn.Parameter(torch.tensor(1.0))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        tokens = self.lift(x.unsqueeze(-1))
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        return self.head((self.factor.tanh() * mixed + tokens).mean(1))


MODELS = [dense, convolutional, normalized, Attention]
SCHEDULES = {
    "none": None,
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 12),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, o.defaults["lr"], total_steps=40),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=1),
}


class Run:
    """Model, optimizer, schedule and batches, with the state of the random number generator."""

    def __init__(self, model, rule, schedule, batch_rule, workers, average):
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(SIZE, 6, generator=generator)
        y = x[:, :3].argmax(1)
        self.model, self.losses = model(), []
        options = {"warmup": 3, "measure_every": 4, "average": average, **RULES[rule]}
        self.optimizer = make(self.model, batch_rule=batch_rule, **options)
        make_schedule = SCHEDULES[schedule]
        self.schedule = None if make_schedule is None else make_schedule(self.optimizer)
        samples = TensorDataset(x, y)
        self.sampler = AdaptiveBatchSampler(
            samples, self.optimizer, 10, every=3, patience=1, max_batch_size=20
        )
        self.loader = DataLoader(
            samples,
            batch_sampler=self.sampler,
            num_workers=workers,
            generator=torch.Generator(),  # else each pass draws from the one that dropout uses
        )

    def go(self, saves):
        """Go on to the end of the run, saving after every step."""
        while len(self.losses) < STEPS:
            for (x, y), _ in self.sampler.parts(self.loader):
                if len(self.losses) == STEPS:
                    return
                self.optimizer.zero_grad()
                loss = criterion_of(self.optimizer)(self.model(x), y)
                loss.backward()
                self.optimizer.step()
                if self.schedule is not None:
                    on = (loss.item(),) if "Plateau" in type(self.schedule).__name__ else ()
                    self.schedule.step(*on)
                self.losses.append(loss.item())
                saves[len(self.losses)] = self.save()

    def save(self):
        parts = (self.model, self.optimizer, self.sampler, self.schedule)
        file = io.BytesIO()
        states = [None if part is None else part.state_dict() for part in parts]
        torch.save([states, self.losses, torch.get_rng_state()], file)
        return file.getvalue()

    def load(self, saved):
        states, self.losses, random = torch.load(io.BytesIO(saved), weights_only=True)
        for part, state in zip((self.model, self.optimizer, self.sampler, self.schedule), states):
            if part is not None:
                part.load_state_dict(state)
        torch.set_rng_state(random)


@settings(max_examples=12)
@given(
    model=st.sampled_from(MODELS),
    rule=st.sampled_from(list(RULES)),
    schedule=st.sampled_from(list(SCHEDULES)),
    batch_rule=st.sampled_from([None, "correlation", "fixed"]),
    workers=st.sampled_from([0, 0, 2]),
    average=st.sampled_from([0.0, 0.1]),
    killed=st.integers(1, STEPS - 1),
)
def test_a_run_killed_anywhere_goes_on_bit_for_bit(
    model, rule, schedule, batch_rule, workers, average, killed
):
    def start():
        torch.manual_seed(2)
        return Run(model, rule, schedule, batch_rule, workers, average)

    saves = {}
    whole = start()
    whole.go(saves)
    again = start()
    again.load(saves[killed])
    again.go({})
    assert again.losses == whole.losses
    assert equal(parameters(again.model), parameters(whole.model))
    states = [run.optimizer.state_dict() for run in (again, whole)]
    for state in states:  # seconds are never the same twice
        state["param_groups"][0]["controller"].pop("batches", None)
    assert same(*states)
    assert again.sampler.history == whole.sampler.history


@any_rule
def test_a_state_is_a_plain_one(rule):
    """What `torch.load(weights_only=True)` takes: tensors, numbers, strings, lists and dicts."""
    model = network()
    optimizer = make(model, average=0.1, batch_rule="work", **RULES[rule])
    train(model, optimizer, 3)
    plain = (torch.Tensor, int, float, bool, str, type(None))

    def check(value):
        if isinstance(value, dict):
            assert all(isinstance(key, int | str) for key in value)
            return all(map(check, value.values()))
        if isinstance(value, list | tuple):
            return all(map(check, value))
        return isinstance(value, plain)

    assert check(optimizer.state_dict())
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    loaded = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    assert same(loaded, optimizer.state_dict())


@any_rule
def test_loading_copies(rule):
    """A state that is loaded into two optimizers, or kept, is not written to."""
    model, twin = network(), network()
    optimizer, other = make(model, **RULES[rule]), make(twin, **RULES[rule])
    train(model, optimizer, 3)
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    other.load_state_dict(kept)
    before = copy.deepcopy(kept)
    train(twin, other, 3)
    assert same(before, kept)
