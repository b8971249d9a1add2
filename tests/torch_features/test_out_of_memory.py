"""Memory that runs out in a measurement: it is left out, said once, and smaller the next time."""

import contextlib
import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loop import RULES, backward, criterion_of, data, equal, make, network, parameters, same, train
from torch import nn

from conjopt.bounds import ConvergenceLedger
from conjopt.measure.chunks import ChunkedReplay
from conjopt.measure.replay import REPLAYING, Replay
from conjopt.optim.measuring import Trial

OPTIONS = {"warmup": 3, "measure_every": 4}
MEASURING = [name for name in RULES if "constant" not in name]
SIZE = 8  # of a batch
SAID = "ConjSGD ran out of memory while it measured"


def of_cuda():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def of_the_host():
    torch.empty(1 << 55)  # torch's own error, as there is no such memory


class Greedy:
    """Hooks on a model whose measurements run out of memory above some number of samples."""

    def __init__(self, model, most=0, layer=3, after=0, raises=of_cuda):
        self.most, self.after, self.raises = most, after, raises
        self.asked, self.refused = [], 0
        model[layer].register_forward_pre_hook(self)

    def __call__(self, module, args):
        if not REPLAYING.get():
            return
        self.asked.append(len(args[0]))
        if len(args[0]) > self.most and len(self.asked) > self.after:
            self.refused += 1
            self.raises()


def started(rule, taken=0, dtype=torch.float32, **options):
    model = network(dtype)
    optimizer = make(model, **{**OPTIONS, **RULES[rule], **options})
    train(model, optimizer, taken)
    return model, optimizer


def state_of(optimizer):
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["controller"].pop("chunks", None)
    return state


@contextlib.contextmanager
def said(times=1):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    messages = [str(warning.message) for warning in caught]
    assert len(messages) == times, messages
    assert all(message.startswith(SAID) for message in messages)
    assert all(warning.category is RuntimeWarning for warning in caught)
    assert all("conjopt" not in warning.filename for warning in caught)


@settings(max_examples=40)
@given(
    rule=st.sampled_from(MEASURING),
    taken=st.sampled_from([0, 1, 2, 3, 7]),
    layer=st.sampled_from([0, 1, 3, 5]),
    after=st.integers(0, 1),
    raises=st.sampled_from([of_cuda, of_the_host]),
)
def test_the_step_is_an_ordinary_one(rule, taken, layer, after, raises):
    """Bit for bit that of a run which does not measure at this step."""
    (model, optimizer), (twin, other) = started(rule, taken), started(rule, taken)
    other._measure = lambda *args: None
    optimizer._calls = other._calls = 19  # 20 is a measuring one
    optimizer._watch.armed = True
    greedy = Greedy(model, 0, layer, after, raises)
    with said():
        train(model, optimizer, 1, taken)
    train(twin, other, 1, taken)
    assert greedy.refused == 1
    assert equal(parameters(model), parameters(twin))
    assert same(state_of(optimizer), state_of(other))
    assert optimizer.status().skipped_steps == 0


@pytest.mark.parametrize("rule", MEASURING)
def test_probes_shrink_until_they_fit_and_it_is_said_once(rule):
    model, optimizer = started(rule, warmup=6)
    greedy = Greedy(model, 2)
    with said():
        train(model, optimizer, 1, size=SIZE)
    assert not optimizer._statistics.measured
    with said(0):
        train(model, optimizer, 1, 1, size=SIZE)
    assert optimizer._statistics.measured == 1
    assert greedy.refused == 2
    refused = [size for size in greedy.asked if size > 2]
    # A half runs by itself at first, then all samples in two chunks.
    assert refused == [4, 4]
    before = len(greedy.asked)
    train(model, optimizer, 1, 2, size=SIZE)
    assert set(greedy.asked[before:]) == {2}
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("rule", MEASURING)
@pytest.mark.parametrize("size", [7, 8])
def test_chunks_measure_what_the_whole_does(rule, size):
    """To rounding, whether they are of one size or not."""
    (model, optimizer), (twin, other) = (started(rule, dtype=torch.float64) for _ in range(2))
    optimizer._memory.chunks = 3
    greedy = Greedy(model, 3)
    train(model, optimizer, 9, size=size)
    train(twin, other, 9, size=size)
    assert greedy.asked
    assert not greedy.refused
    for p, q in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    mine, theirs = optimizer._statistics.state_dict(), other._statistics.state_dict()
    for name, value in mine.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-8, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("rule", ["spectral"])
def test_a_step_that_could_not_be_tried_keeps_its_reach(rule, monkeypatch):
    (model, optimizer), (twin, other) = started(rule, 3), started(rule, 3)
    optimizer._statistics.reach = other._statistics.reach = torch.tensor(0.25)
    other._try = lambda *args: None
    for net in (model, twin):
        net.train()
    backward(model, optimizer, 3)
    backward(twin, other, 3)
    for o in (optimizer, other):
        o._calls = 19
    # The step before was an ordinary one, so the batch is to be watched anew.
    for net, o in ((model, optimizer), (twin, other)):
        o._watch.armed = True
        backward(net, o, 3)
    monkeypatch.setattr(Trial, "_try", lambda *args: of_cuda())
    with said():
        optimizer.step()
    other.step()
    assert float(optimizer._statistics.reach) == 0.25
    assert equal(parameters(model), parameters(twin))
    assert same(state_of(optimizer), state_of(other))


class Normed(nn.Module):
    """A model whose samples see one another."""

    def __init__(self, norm):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 6), norm, nn.Linear(6, 3)

    def __getitem__(self, layer):
        return self.last

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh())


class Centred(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(6), nn.Dropout(0.4), Centred()], ids=str)
def test_models_that_no_chunks_serve_are_measured_whole_once_there_is_memory(norm):
    torch.manual_seed(0)
    model = Normed(norm)
    optimizer = make(model, warmup=6)
    greedy = Greedy(model, 0)
    with said():
        train(model, optimizer, 2, size=SIZE)
    assert not optimizer._statistics.measured
    greedy.most = SIZE
    before = len(greedy.asked)
    train(model, optimizer, 1, 2, size=SIZE)
    assert optimizer._statistics.measured == 1
    whole = [size for size in greedy.asked[before:] if size == SIZE]
    assert len(whole) >= 2
    again = copy.deepcopy(model)
    assert all(p.isfinite().all() for p in again.parameters())


class Tokens(nn.Module):
    """Outputs that the loop reshapes before it gives them to the criterion."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

    def __getitem__(self, layer):
        return self.head

    def forward(self, tokens, *, scale):
        return self.head(self.table(tokens).cumsum(1)) * scale


def tokens_run(chunks, accumulate=1, probe=None):
    torch.manual_seed(0)
    model, criterion = Tokens().double(), nn.CrossEntropyLoss()
    optimizer = make(model, criterion, **OPTIONS)
    optimizer._memory.chunks = chunks
    if probe is not None:
        probe.append(Greedy(model, 100))
    generator = torch.Generator().manual_seed(1)
    for _ in range(6):
        optimizer.zero_grad()
        for _ in range(accumulate):
            tokens = torch.randint(7, (6, 5), generator=generator)
            scale = torch.rand(6, 1, 1, generator=generator, dtype=torch.float64)
            outputs = model(tokens[:, :-1], scale=scale)
            loss = criterion(outputs.flatten(0, 1), tokens[:, 1:].flatten())
            (loss / accumulate).backward()
        optimizer.step()
    return parameters(model)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("chunks", [2, 4, 6])
def test_reshaped_outputs_keywords_and_accumulation_in_chunks(chunks, accumulate):
    probe = []
    found = tokens_run(chunks, accumulate, probe)
    assert max(probe[0].asked) <= max(2, -(-6 // chunks))
    for p, q in zip(found, tokens_run(1, accumulate)):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_run_goes_on_in_chunks_after_a_resume():
    model, optimizer = started("spectral", 3)
    greedy = Greedy(model, 3)
    with said():
        train(model, optimizer, 9, 3, size=SIZE)
    assert greedy.refused == 2  # a half, and the first of two chunks
    twin = network()
    again = make(twin, **OPTIONS)
    twin.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    probe = Greedy(twin, 3)
    train(model, optimizer, 8, 12)
    train(twin, again, 8, 12)
    assert probe.asked
    assert not probe.refused
    assert equal(parameters(model), parameters(twin))


def test_where_warnings_are_errors_the_step_is_whole():
    (model, optimizer), (twin, other) = started("sgd", 3), started("sgd", 3)
    for net in (model, twin):
        Greedy(net, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeWarning, match=SAID):
            train(model, optimizer, 1, 3)
    with said():
        train(twin, other, 1, 3)
    assert equal(parameters(model), parameters(twin))
    assert same(state_of(optimizer), state_of(other))
    train(model, optimizer, 2, 4)
    train(twin, other, 2, 4)
    assert equal(parameters(model), parameters(twin))


@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize("rule", ["spectral", "sgd constant"])
def test_a_record_of_the_ledger_is_left_out(where, rule, monkeypatch):
    model, criterion = network(), nn.CrossEntropyLoss()
    ledger = ConvergenceLedger(model, criterion, *data(), whole=True)
    optimizer = make(model, criterion, ledger=ledger, ledger_every=2, **RULES[rule])
    twin = network()
    other = make(twin, **RULES[rule])
    with monkeypatch.context() as patch, said():
        patch.setattr(ledger, where, lambda *args, **kwargs: of_cuda())
        train(model, optimizer, 3)
    assert not ledger.steps
    train(model, optimizer, 3, 3)
    assert [record.step for record in ledger.steps] == [4]
    train(twin, other, 6)
    assert equal(parameters(model), parameters(twin))


def test_other_errors_of_a_measurement_are_the_users_to_see():
    """And nothing was changed then."""
    model, optimizer = started("spectral", 3)

    def broken():
        raise RuntimeError("some error of the model")

    Greedy(model, 0, raises=broken)
    optimizer._calls = 19
    optimizer._watch.armed = True
    before, state = parameters(model), state_of(optimizer)
    with pytest.raises(RuntimeError, match="some error of the model"):
        train(model, optimizer, 1, 3)
    assert equal(before, parameters(model))
    assert same(state, state_of(optimizer))


def test_out_of_memory_in_the_training_itself_is_torchs_error():
    model, optimizer = started("spectral", 3)
    before = parameters(model)
    model[3].register_forward_pre_hook(lambda *_: of_cuda())
    with pytest.raises(torch.OutOfMemoryError):
        criterion_of(optimizer)(model(data()[0]), data()[1]).backward()
    optimizer.zero_grad()
    assert equal(before, parameters(model))


def test_chunks_start_from_the_buffers_of_the_whole():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x / self.calls

    model, x = Counting(), torch.randn(6, 2)
    replay = Replay(model, (x,), {}, Replay.random_state(model), buffers={"calls": torch.zeros(())})
    model(x)
    for chunks in (1, 2, 3):
        (again,) = ChunkedReplay(**vars(replay), samples=6, chunks=chunks).run({})
        assert torch.equal(again, x)
