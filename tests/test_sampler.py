"""AdaptiveBatchSampler against lists of indices: every sample once an epoch, and exact resumes."""

import dataclasses
import io
import math
import socket

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler, SubsetRandomSampler

import conjopt
from conjopt import AdaptiveBatchSampler, ConjSGD
from conjopt.optim import Part, Recommendation


class Advised:
    """Gives the answers of a script in turn, then none; it counts steps as an optimizer does."""

    def __init__(self, *script, urgent=False):
        self.script, self.urgent, self.asked = list(script), urgent, []

    def batch_advice(self, population, *, least, most):
        number = len(self.asked)
        self.asked.append((population, least, most))
        answer = self.script[number] if number < len(self.script) else None
        return Recommendation(answer, f"answer {number}", self.urgent)


class ByStep:
    """Advises by its number of steps alone, as a ConjSGD does by its state."""

    def __init__(self, script, step=0):
        self.script, self.step = script, step

    def batch_advice(self, population, *, least, most):
        return Recommendation(self.script[self.step % len(self.script)], f"step {self.step}")


@dataclasses.dataclass
class Case:
    n: int
    ranks: int
    batch_size: int
    script: list[int | None]
    options: dict

    def sampler(self, rank=0, optimizer=None):
        optimizer = Advised(*self.script) if optimizer is None else optimizer
        return AdaptiveBatchSampler(
            range(self.n),
            optimizer,
            self.batch_size,
            num_replicas=self.ranks,
            rank=rank,
            **self.options,
        )


@st.composite
def cases(draw, most_ranks=3, longest=60):
    ranks = draw(st.integers(1, most_ranks))
    n = draw(st.integers(ranks, longest))
    batch_size = ranks * draw(st.integers(1, 8))
    drop_last = draw(st.booleans()) and n >= batch_size
    least = draw(st.integers(1, batch_size))
    most = draw(st.none() | st.integers(batch_size, 2 * batch_size + 20))
    micro = draw(st.none() | st.integers(1, most or max(n, batch_size)))
    return Case(
        n,
        ranks,
        batch_size,
        draw(st.lists(st.none() | st.integers(1, 100), max_size=12)),
        {
            "drop_last": drop_last,
            "min_batch_size": least,
            "max_batch_size": most,
            "micro_batch_size": micro,
            "shuffle": draw(st.booleans()),
            "seed": draw(st.integers(0, 3)),
            "factor": draw(st.sampled_from([1.0, 1.5, 2.0])),
            "patience": draw(st.integers(1, 3)),
            "every": draw(st.integers(1, 4)),
        },
    )


def reference_sizes(case: Case, epochs: int) -> list[list[int]]:
    """Sizes of all batches as the docstring says, with a memory of all answers."""
    options, size, asked, since = case.options, case.batch_size, [], 0
    most = options["max_batch_size"] or max(case.n, case.batch_size)
    allowed = [m for m in range(options["min_batch_size"], most + 1) if m % case.ranks == 0]
    epochs_of_sizes = []
    begun = questions = 0
    for _ in range(epochs):
        left, sizes = case.n, []
        while left:
            if begun == questions * options["every"]:
                answer = case.script[questions] if questions < len(case.script) else None
                questions += 1
                if answer is not None:
                    answer = max((m for m in allowed if m <= answer), default=allowed[0])
                asked.append(answer)
                row = asked[since:][-options["patience"] :]
                for up in (True, False):
                    far = [
                        a is not None
                        and (a > size if up else a < size)
                        and max(a / size, size / a) >= options["factor"]
                        for a in row
                    ]
                    if len(row) == options["patience"] and all(far):
                        size, since = (min(row) if up else max(row)), len(asked)
                        break
            if options["drop_last"] and left < size:
                break
            takes = left if not options["drop_last"] and left - size < case.ranks else size
            left -= takes
            begun += 1
            sizes.append(takes)
        epochs_of_sizes.append(sizes)
    return epochs_of_sizes


def flat(lists):
    return [i for indices in lists for i in indices]


def whole_batches(lists, sampler):
    """Joins the lists of each batch."""
    parts = sampler._pass.parts[-len(lists) :] if lists else []
    batches, current = [], []
    for indices, part in zip(lists, parts, strict=True):
        current += indices
        if part.last:
            batches.append(current)
            current = []
    assert not current
    return batches


@given(cases())
def test_every_sample_comes_once_an_epoch_in_the_sizes_of_the_rule(case: Case):
    samplers = [case.sampler(rank) for rank in range(case.ranks)]
    micro = case.options["micro_batch_size"]
    for sizes in reference_sizes(case, 3):
        lists = [list(sampler) for sampler in samplers]
        assert len({len(of_one) for of_one in lists}) == 1  # as many backward passes on each rank
        batches = [whole_batches(of_one, sampler) for of_one, sampler in zip(lists, samplers)]
        found = [sum(map(len, of_all)) for of_all in zip(*batches)]
        assert found == sizes
        seen = [i for of_one in lists for indices in of_one for i in indices]
        assert len(seen) == len(set(seen))
        if case.options["drop_last"]:
            assert case.n - len(seen) < samplers[0].batch_size
        else:
            assert sorted(seen) == list(range(case.n))
        assert all(indices for of_one in lists for indices in of_one)
        for of_all in zip(*batches):
            assert max(map(len, of_all)) - min(map(len, of_all)) <= 1
        if micro is not None:
            longest = max((len(indices) for of_one in lists for indices in of_one), default=0)
            assert longest <= micro or (case.ranks > 1 and micro == 1 and longest == 2)
    assert len({tuple(sampler.history) for sampler in samplers}) == 1


@given(cases(most_ranks=1))
def test_order_is_that_of_the_data_or_one_for_each_epoch(case: Case):
    sampler = dataclasses.replace(case, options={**case.options, "drop_last": False}).sampler()
    epochs = [flat(sampler) for _ in range(2)]
    if case.options["shuffle"]:
        assert case.n < 8 or epochs[0] != epochs[1]
    else:
        assert epochs == [list(range(case.n))] * 2
    for epoch in (1, 0, 1):
        sampler.set_epoch(epoch)
        assert flat(sampler) == epochs[epoch]  # though the sizes may be others


@given(cases())
def test_ranks_see_together_what_one_process_sees(case: Case):
    """The batches of one process, in order, up to the rest that leaves no sample for a rank."""
    # Sizes of ranks are multiples of their number; let one process have such ones, too.
    script = [None if a is None else max(1, a // case.ranks) * case.ranks for a in case.script]
    options = {**case.options, "micro_batch_size": None, "min_batch_size": case.ranks}
    options["max_batch_size"] = 3 * case.batch_size
    case = dataclasses.replace(case, script=script, options=options)
    single = dataclasses.replace(case, ranks=1).sampler()
    samplers = [case.sampler(rank) for rank in range(case.ranks)]
    expected = list(single)
    joined = [sorted(flat(of_all)) for of_all in zip(*samplers, strict=True)]
    if len(expected) > 1 and len(expected[-1]) < case.ranks and not options["drop_last"]:
        expected[-2:] = [expected[-2] + expected[-1]]
    assert joined == [sorted(batch) for batch in expected]


# Resumes.


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


@settings(max_examples=60)
@given(cases(longest=40), st.booleans())
def test_a_resumed_run_equals_the_unbroken_one_from_every_point(case: Case, sets_epoch: bool):
    """As with no workers: what was given was used."""
    advised = ByStep(case.script or [None])
    sampler, seen, states = case.sampler(case.ranks - 1, advised), [], []
    for epoch in range(2):
        if sets_epoch:
            sampler.set_epoch(epoch)
        states.append((len(seen), epoch, 0, sampler.state_dict(consumed=0)))
        for number, indices in enumerate(sampler, 1):
            seen.append(indices)
            if sampler._pass.parts[-1].last:
                advised.step += 1
                states.append((len(seen), epoch, advised.step, sampler.state_dict(number)))
    history, end = sampler.history, sampler.state_dict(len(list(sampler)))
    for position, epoch, step, state in states:
        again = case.sampler(case.ranks - 1, ByStep(case.script or [None], step))
        if position and not step:
            again._optimizer.step = advised.step  # a state from between the epochs
            continue
        again.load_state_dict(through_a_file(state))
        assert again.state_dict() == state
        rest = []
        for number in range(epoch, 2):
            again.set_epoch(number)
            for indices in again:
                rest.append(indices)
                again._optimizer.step += again._pass.parts[-1].last
        assert rest == seen[position:]
        assert again.history == history[: len(again.history)]
    assert end["epoch"] == 2


@settings(max_examples=40)
@given(cases(longest=40), st.integers(1, 6))
def test_what_workers_took_ahead_comes_again(case: Case, ahead: int):
    """A loader that takes lists ahead: the sizes of those on their way are part of the state."""

    def loaded(sampler):
        """Gives lists in turn, with `ahead` more taken, as a loader with workers does."""
        iterator, queue = iter(sampler), []
        for indices in iterator:
            queue.append(indices)
            if len(queue) > ahead:
                yield queue.pop(0)
        yield from queue

    advised = ByStep(case.script or [None])
    sampler, seen, states = case.sampler(0, advised), [], []
    for number, indices in enumerate(loaded(sampler), 1):
        seen.append(indices)
        if sampler._pass.parts[number - 1].last:
            advised.step += 1
            states.append((number, advised.step, sampler.state_dict(consumed=number)))
    for position, step, state in states:
        again = case.sampler(0, ByStep(case.script or [None], step))
        again.load_state_dict(through_a_file(state))
        again.set_epoch(0)
        rest = []
        for number, indices in enumerate(loaded(again), 1):
            rest.append(indices)
            again._optimizer.step += again._pass.parts[number - 1].last
        assert rest == seen[position:]


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 60

    def __getitem__(self, i):
        return i


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("micro", [None, 3])
def test_loaders_resume(workers, micro):
    script = [None, 8, 8, 8, 3, 3, 3, 20]

    def start(step=0):
        sampler = AdaptiveBatchSampler(
            Tokens(), ByStep(script, step), 4, every=2, patience=1, micro_batch_size=micro
        )
        return sampler, DataLoader(Tokens(), batch_sampler=sampler, num_workers=workers)

    def run(sampler, loader, epochs):
        for _ in epochs:
            for x, part in sampler.parts(loader):
                sampler._optimizer.step += part.last
                yield x.tolist(), part, sampler.state_dict(), sampler._optimizer.step

    unbroken = list(run(*start(), range(2)))
    lists = [x for x, *_ in unbroken]
    assert sorted(flat(lists)) == sorted([*range(60), *range(60)])
    assert len(start()[0].history) == 0
    assert unbroken[-1][2]["history"]  # the size did change
    assert unbroken[-1][2]["epoch"] == 1
    complete = [k for k, (_, part, *_) in enumerate(unbroken) if part.last]
    ends = [k for k in complete if sum(map(len, lists[: k + 1])) in (60, 120)]
    for k in {*complete[:5:2], ends[0] - 1, ends[0], ends[0] + 3} & {*complete}:
        state, step = unbroken[k][2:]
        sampler, loader = start(step)
        sampler.load_state_dict(state)
        rest = []
        for epoch in range(sampler.epoch, 2):
            sampler.set_epoch(epoch)
            rest += [x for x, *_ in run(sampler, loader, range(1))]
        assert rest == lists[k + 1 :], f"after {k + 1} lists"


def test_a_batch_that_is_not_complete_comes_again():
    data = torch.arange(12)
    sampler = AdaptiveBatchSampler(data, Advised(), 6, micro_batch_size=2, shuffle=False)
    loader = DataLoader(data, batch_sampler=sampler)
    for number, (_, _) in enumerate(sampler.parts(loader), 1):
        if number == 5:
            break
    again = AdaptiveBatchSampler(data, Advised(), 6, micro_batch_size=2, shuffle=False)
    again.load_state_dict(sampler.state_dict())
    assert list(again) == [[6, 7], [8, 9], [10, 11]]


def test_after_a_finished_epoch_comes_the_next():
    sampler = AdaptiveBatchSampler(range(20), Advised(), 5)
    first, second = list(sampler), list(sampler)
    assert sorted(flat(first)) == sorted(flat(second))
    assert first != second
    once = AdaptiveBatchSampler(range(20), Advised(), 5)
    list(once)
    state = once.state_dict(consumed=4)
    again = AdaptiveBatchSampler(range(20), Advised(), 5, seed=7)  # the state's seed counts
    again.load_state_dict(state)
    assert list(again) == second
    again.load_state_dict(state)
    again.set_epoch(0)  # asked for, it is what is left of it
    assert list(again) == []
    again.load_state_dict(state)
    again.set_epoch(1)
    assert list(again) == second


def test_a_broken_off_pass_is_followed_by_a_whole_one():
    sampler = AdaptiveBatchSampler(range(20), Advised(), 5)
    for _ in sampler:
        break
    assert sorted(flat(sampler)) == list(range(20))
    assert sampler.epoch == 1


def test_an_own_sampler_resumes_with_the_order_it_had():
    indices = [3, 1, 4, 15, 9, 2, 6, 5]
    torch.manual_seed(0)
    sampler = AdaptiveBatchSampler(range(20), Advised(), 3, sampler=SubsetRandomSampler(indices))
    batches = list(sampler)
    assert sorted(flat(batches)) == sorted(indices)
    again = AdaptiveBatchSampler(range(20), Advised(), 3, sampler=SubsetRandomSampler(indices))
    again.load_state_dict(through_a_file(sampler.state_dict(consumed=1)))
    assert list(again) == batches[1:]
    assert sampler._optimizer.asked[0][0] == 8  # the samples that it can choose from


def test_an_own_sampler_is_told_the_epoch():
    epochs = []

    class Told(SequentialSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)

    sampler = AdaptiveBatchSampler(range(9), Advised(), 3, sampler=Told(range(9)))
    list(sampler)
    list(sampler)
    sampler.set_epoch(5)
    assert list(sampler) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert epochs == [0, 1, 5]


def test_orders_of_seeds_and_epochs_differ():
    orders = set()
    for seed in range(4):
        sampler = AdaptiveBatchSampler(range(30), Advised(), 30, seed=seed)
        orders |= {tuple(batch) for _ in range(4) for batch in sampler}
    assert len(orders) == 16


# Hysteresis.


def sizes_after(*script, **options):
    options = {"every": 1, "patience": 2, **options}
    sampler = AdaptiveBatchSampler(range(10**4), Advised(*script), 64, **options)
    iterator = iter(sampler)
    for _ in range(len(script) + 1):
        next(iterator)
    return sampler.batch_size, sampler.history


def test_a_change_needs_answers_in_a_row_to_one_side():
    assert sizes_after(200, 200)[0] == 200
    assert sizes_after(200)[0] == 64
    assert sizes_after(200, None, 200)[0] == 64
    assert sizes_after(200, 64, 200)[0] == 64
    assert sizes_after(200, 10, 200, 10)[0] == 64
    assert sizes_after(200, 95, 200)[0] == 64  # 95 is less than 1.5 times 64
    assert sizes_after(200, 96)[0] == 96  # the nearest that both support
    assert sizes_after(96, 200)[0] == 96
    assert sizes_after(20, 42)[0] == 42
    assert sizes_after(42, 20)[0] == 42
    assert sizes_after(20, 43)[0] == 64
    assert sizes_after(200, 200, 90, 90)[1] == [
        (0, 1, 64, 200, "answer 1"),
        (0, 3, 200, 90, "answer 3"),
    ]


def test_urgent_answers_are_acted_on_at_once():
    sampler = AdaptiveBatchSampler(range(1000), Advised(70, 35, urgent=True), 64, every=25)
    sizes = [len(batch) for batch in sampler]
    assert sizes[:11] == [70] * 10 + [35]  # asked again after 10


def test_a_size_keeps_to_its_range():
    assert sizes_after(900, 900, max_batch_size=128)[0] == 128
    assert sizes_after(1, 1, min_batch_size=16)[0] == 16
    assert sizes_after(900, 900, min_batch_size=64, max_batch_size=64)[1] == []
    asked = Advised(5)
    next(iter(AdaptiveBatchSampler(range(99), asked, 8, num_replicas=4, rank=1, min_batch_size=6)))
    assert asked.asked == [(99, 8, 96)]


# Lengths.


@given(cases())
def test_length_is_that_of_a_pass_whose_size_stays(case: Case):
    sampler = dataclasses.replace(case, script=[]).sampler()
    for _ in range(2):
        assert len(sampler) == len(list(sampler))
    iterator = iter(sampler)
    total = len(sampler)
    next(iterator, None)
    assert len(sampler) == total
    state = sampler.state_dict(consumed=0)
    again = dataclasses.replace(case, script=[]).sampler()
    again.load_state_dict(state)
    again.set_epoch(state["epoch"])
    assert len(again) == total == len(list(again))


# Micro-batches.


@pytest.mark.parametrize("micro", [1, 3, 5, 16])
def test_micro_batches_are_the_batch(micro):
    """Plain SGD in float64: the weights after two epochs are those of whole batches."""
    x = torch.randn(37, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
    after = []
    for size in (None, micro):
        torch.manual_seed(1)
        model = nn.Linear(4, 3).double()
        criterion = nn.CrossEntropyLoss()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        sampler = AdaptiveBatchSampler(
            data, Advised(None, 16, 16), 8, max_batch_size=16, every=1, micro_batch_size=size
        )
        loader = DataLoader(data, batch_sampler=sampler)
        steps = 0
        for _ in range(2):
            for (inputs, targets), part in sampler.parts(loader):
                assert size is None or len(inputs) <= size
                (criterion(model(inputs), targets) * part.share).backward()
                if part.last:
                    optimizer.step()
                    optimizer.zero_grad()
                    steps += 1
        assert steps == 2 + 2 + 3  # 8, 8, then of 16
        after.append(model.weight.detach().clone())
    torch.testing.assert_close(after[1], after[0], rtol=1e-13, atol=1e-14)


@given(cases())
def test_every_sample_of_a_batch_counts_alike(case: Case):
    """Averaged over ranks, as their gradients are: 1/m of a batch of m."""
    samplers = [case.sampler(rank) for rank in range(case.ranks)]
    lists = [list(sampler) for sampler in samplers]
    counts = {}
    for number, pieces in enumerate(zip(*lists)):
        parts = [sampler._pass.parts[number] for sampler in samplers]
        batch = sum(part.last for part in samplers[0]._pass.parts[:number])
        for indices, part in zip(pieces, parts):
            counts.setdefault(batch, []).extend([part.share / len(indices)] * len(indices))
    for of_samples in counts.values():
        expected = [case.ranks / len(of_samples)] * len(of_samples)
        assert of_samples == pytest.approx(expected, rel=1e-12)


# With the optimizer, and on several processes.


@pytest.mark.parametrize("rule", ["correlation", "work", "fixed", None])
def test_training_with_each_rule(rule):
    torch.manual_seed(0)
    x = torch.randn(400, 4)
    data = torch.utils.data.TensorDataset(x, (x[:, :3] + torch.randn(400, 3)).argmax(1))
    model, criterion = nn.Linear(4, 3), nn.CrossEntropyLoss()
    optimizer = ConjSGD(
        model.parameters(), model=model, loss=criterion, batch_rule=rule, measure_every=5, warmup=5
    )
    sampler = AdaptiveBatchSampler(
        data, optimizer, 8, min_batch_size=4, max_batch_size=128, every=10
    )
    loader = DataLoader(data, batch_sampler=sampler)
    for _ in range(6):
        for inputs, targets in loader:
            optimizer.zero_grad()
            criterion(model(inputs), targets).backward()
            optimizer.step()
    assert all(4 <= change.new <= 128 for change in sampler.history)
    if rule == "correlation":
        assert sampler.batch_size > 8
        assert "noise scale" in sampler.history[-1].reason
    elif rule == "work":
        assert sampler.history[0].reason.startswith("exploring")
        assert any(change.reason.startswith("noise scale") for change in sampler.history)
    else:
        assert sampler.history == []


def on_a_rank(rank, port, results):
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    script = [12, 12, 12] if rank == 0 else [2, 2, 2]  # ranks that would go apart
    sampler = AdaptiveBatchSampler(range(50), Advised(*script), 6, every=1)
    results.put((rank, [list(sampler) for _ in range(2)], [tuple(c) for c in sampler.history]))
    torch.distributed.destroy_process_group()


def test_processes_do_what_the_first_is_advised():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=on_a_rank, args=(r, port, results)) for r in range(2)]
    for process in processes:
        process.start()
    found = {rank: rest for rank, *rest in (results.get(timeout=120) for _ in range(2))}
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert found[0][1] == found[1][1] == [(0, 1, 6, 12, "answer 1")]
    for first, second in zip(found[0][0], found[1][0]):
        assert sorted(flat(first + second)) == list(range(50))
    assert [len(own) for own in found[0][0][0]] == [3, 6, 6, 6, 4]


# Bad input.


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


class Lengthless(torch.utils.data.Dataset):
    def __getitem__(self, i):
        return i


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"data_source": Endless()}, TypeError, "iterable data set Endless.*read it into a list"),
        ({"data_source": Lengthless()}, TypeError, "data_source is a Lengthless without a length"),
        ({"data_source": iter([1])}, TypeError, "without a length.*read it into a list first"),
        ({"data_source": []}, ValueError, "data_source has no samples"),
        ({"sampler": iter([1, 2])}, TypeError, "sampler is a list_iterator without a length"),
        ({"sampler": []}, ValueError, "sampler has no samples"),
        ({"optimizer": None}, TypeError, "a NoneType gives no batch_advice.*batch_rule="),
        ({"batch_size": 0}, ValueError, "batch_size=0, expected a whole number >= 1"),
        ({"batch_size": 2.0}, ValueError, "batch_size=2.0, expected a whole number >= 1"),
        ({"batch_size": True}, ValueError, "batch_size=True, expected a whole number >= 1"),
        ({"min_batch_size": 0}, ValueError, "min_batch_size=0, expected"),
        ({"min_batch_size": 9, "max_batch_size": 8}, ValueError, "max_batch_size=8, .* >= 9"),
        ({"max_batch_size": 3}, ValueError, "batch_size=4, expected .* >= 1 and <= 3"),
        ({"min_batch_size": 5}, ValueError, "batch_size=4, expected .* >= 5"),
        ({"micro_batch_size": 0}, ValueError, "micro_batch_size=0, expected"),
        ({"micro_batch_size": 9, "max_batch_size": 8}, ValueError, "micro_batch_size=9, .*<= 8"),
        ({"factor": 0.5}, ValueError, "factor=0.5, expected a finite number >= 1"),
        ({"factor": math.nan}, ValueError, "factor=nan, expected a finite number >= 1"),
        ({"patience": 0}, ValueError, "patience=0, expected a whole number >= 1"),
        ({"every": 0}, ValueError, "every=0, expected a whole number >= 1"),
        ({"seed": -1}, ValueError, "seed=-1, expected a whole number >= 0"),
        ({"num_replicas": 3}, ValueError, "batch_size=4 is that of all 3 ranks.*use 6"),
        ({"num_replicas": 2, "rank": 2}, ValueError, "rank=2, expected .* >= 0 and <= 1"),
        ({"num_replicas": 0}, ValueError, "num_replicas=0, expected"),
        ({"batch_size": 16, "drop_last": True}, ValueError, "10 samples make no batch of 16"),
        (
            {"batch_size": 12, "num_replicas": 12},
            ValueError,
            "10 samples make no batch .*fewer ranks",
        ),
    ],
)
def test_what_cannot_work_is_refused(options, error, says):
    given = {"data_source": range(10), "optimizer": Advised(), "batch_size": 4, **options}
    with pytest.raises(error, match=says):
        AdaptiveBatchSampler(**given)


def test_an_ordinary_optimizer_is_refused():
    optimizer = torch.optim.SGD(nn.Linear(2, 1).parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"a SGD gives no batch_advice\(\); pass a conjopt.ConjSGD"):
        conjopt.AdaptiveBatchSampler(range(10), optimizer, 4)


def test_a_state_needs_to_know_what_was_used():
    sampler = AdaptiveBatchSampler(range(10), Advised(), 4)
    sampler.state_dict()  # nothing was begun
    iterator = iter(sampler)
    next(iterator)
    with pytest.raises(ValueError, match="or give consumed="):
        sampler.state_dict()
    with pytest.raises(ValueError, match="consumed=2, expected 0 to 1"):
        sampler.state_dict(consumed=2)
    sampler.set_epoch(3)
    assert sampler.state_dict()["epoch"] == 3


def test_other_states_are_refused():
    sampler = AdaptiveBatchSampler(range(10), Advised(), 4)
    before = sampler.state_dict()
    for wrong, says in [
        ({}, "got version None"),
        ({**before, "version": 2}, "expected a state of version 1, got version 2"),
        ({k: v for k, v in before.items() if k != "planned"}, r"without \['planned'\]"),
        ({**before, "total": 11}, "the state has total=11, this sampler 10"),
        ({**before, "num_replicas": 2}, "num_replicas=2, this sampler 1; resume with the same"),
    ]:
        with pytest.raises(ValueError, match=says):
            sampler.load_state_dict(wrong)
        assert sampler.state_dict() == before
    with pytest.raises(ValueError, match="epoch=-1, expected a whole number >= 0"):
        sampler.set_epoch(-1)


def test_parts_need_a_loader_of_the_sampler():
    sampler = AdaptiveBatchSampler(range(10), Advised(), 4)
    with pytest.raises(ValueError, match="batch_sampler=sampler"):
        next(sampler.parts(DataLoader(range(10), batch_size=4)))


def test_an_older_pass_does_not_go_on_beside_a_newer():
    sampler = AdaptiveBatchSampler(range(10), Advised(), 4)
    older = iter(sampler)
    next(older)
    assert len(list(sampler)) == 3
    with pytest.raises(RuntimeError, match="a newer pass has begun"):
        next(older)


def test_parts_are_named():
    assert Part(0.5, True)._asdict() == {"share": 0.5, "last": True}
