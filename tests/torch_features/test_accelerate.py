"""Accelerate: prepared model, optimizer, schedule and loader; accumulation, clipping, states."""

import os
import socket

import pytest
import torch
from loop import RULES, any_rule, data, equal, make, network, parameters, same
from snippets import snippet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("accelerate")

from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DataLoaderConfiguration

OPTIONS = {"warmup": 3, "measure_every": 4}


@pytest.fixture(autouse=True)
def _forget():
    """An Accelerator shares its state with later ones."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Run:
    """What is prepared, or with no accelerator the same objects bare."""

    def __init__(
        self,
        rule="spectral",
        accelerator=None,
        dropout=0.0,
        size=8,
        dtype=torch.float32,
        halves=False,
        **options,
    ):
        self.accelerator, self.model = accelerator, network(dtype, dropout)
        self.criterion = nn.CrossEntropyLoss()
        self.conj_sgd = make(self.model, self.criterion, **OPTIONS, **RULES[rule], **options)
        rate = torch.optim.lr_scheduler.ExponentialLR(self.conj_sgd, 0.95)
        samples = data(dtype=dtype)
        if halves:  # the even rows first
            samples = [torch.cat([part[::2], part[1::2]]) for part in samples]
        loader = DataLoader(TensorDataset(*samples), batch_size=size)
        parts = (self.model, self.conj_sgd, loader, rate)
        if accelerator is not None:
            parts = accelerator.prepare(*parts)
        self.called, self.optimizer, self.loader, self.rate = parts

    def go(self, epochs, clip=None, start=0):
        """Accelerate's loop."""
        for epoch in range(start, start + epochs):
            torch.manual_seed(epoch)
            for x, y in self.loader:
                with self.accelerator.accumulate(self.called):
                    self.accelerator.backward(self.criterion(self.called(x), y))
                    if clip is not None and self.accelerator.sync_gradients:
                        self.accelerator.clip_grad_norm_(self.called.parameters(), clip)
                    self.optimizer.step()
                    self.rate.step()
                    self.optimizer.zero_grad()
        return self

    def by_hand(self, epochs, clip=None, parts=1, autocast=None):
        """torch's loop."""
        batches = list(self.loader)
        for epoch in range(epochs):
            torch.manual_seed(epoch)
            for start in range(0, len(batches), parts):
                for x, y in batches[start : start + parts]:
                    with torch.autocast("cpu", autocast, enabled=autocast is not None):
                        outputs = self.model(x)
                    outputs = outputs if autocast is None else outputs.float()
                    (self.criterion(outputs, y) / parts).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), clip)
                self.optimizer.step()
                self.rate.step()
                self.optimizer.zero_grad()
        return self


def the_same(run, other):
    assert equal(parameters(run.model), parameters(other.model))
    assert same(run.optimizer.state_dict(), other.optimizer.state_dict())
    assert str(run.conj_sgd.status()) == str(other.conj_sgd.status())


@any_rule
def test_a_prepared_run_is_the_plain_loop(rule):
    run = Run(rule, Accelerator(cpu=True)).go(4)
    other = Run(rule).by_hand(4)
    the_same(run, other)
    assert run.conj_sgd.status().step == 12


@any_rule
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_and_clipping(rule, clip):
    run = Run(rule, Accelerator(cpu=True, gradient_accumulation_steps=2), size=6).go(4, clip)
    other = Run(rule, size=6).by_hand(4, clip, parts=2)
    the_same(run, other)
    assert run.conj_sgd.status().step == 8


@any_rule
def test_mixed_precision(rule):
    """Accelerate's autocast is inside of the forward, and so that of measuring passes, too."""
    run, other = (
        Run(rule, Accelerator(cpu=True, mixed_precision="bf16"), size=24),
        Run(rule, size=24),
    )
    found, expected = run.go(1).conj_sgd.status(), other.by_hand(1).conj_sgd.status()
    tolerance = 4 * torch.finfo(torch.bfloat16).eps
    for name in ("loss", "slope", "raw_slope", "curvature", "output_change", "step_size"):
        value = getattr(expected, name)
        assert getattr(found, name) == pytest.approx(value, rel=tolerance, nan_ok=True), name
    x, y = data()
    before = run.criterion(run.model(x), y).item()
    run.go(40)
    assert run.criterion(run.model(x), y).item() < 0.8 * before
    assert run.conj_sgd.status().skipped_steps == 0


@any_rule
@pytest.mark.parametrize("epochs", [1, 2])
def test_a_loaded_state_goes_on_bit_for_bit(rule, epochs, tmp_path):
    options = {"dropout": 0.3, "average": 0.1}
    run = Run(rule, Accelerator(cpu=True), **options).go(epochs)
    run.accelerator.save_state(tmp_path)
    run.go(3, start=epochs)
    again = Run(rule, Accelerator(cpu=True), **options)
    again.accelerator.load_state(tmp_path)
    again.go(3, start=epochs)
    the_same(again, run)


def test_the_status_is_reached_through_the_wrapper():
    run = Run("spectral", Accelerator(cpu=True)).go(1)
    assert run.optimizer.optimizer is run.conj_sgd
    assert run.optimizer.optimizer.status().step == 3
    assert run.optimizer.param_groups[0]["step_size"] > 0


def of_rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    loading = DataLoaderConfiguration(split_batches=True)
    accelerator = Accelerator(cpu=True, dataloader_config=loading)
    run = Run(accelerator=accelerator, size=24, dtype=torch.float64, halves=True)
    run.go(6, clip=0.5)
    torch.save((run.model.state_dict(), run.optimizer.state_dict()), f"{folder}/{rank}")
    torch.distributed.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    """Two ranks with the even and the odd rows, and one process with all of them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(of_rank, (port, str(tmp_path)), nprocs=2)
    model, optimizer = torch.load(tmp_path / "0", weights_only=True)
    assert same((model, optimizer), torch.load(tmp_path / "1", weights_only=True))
    other = Run(size=24, dtype=torch.float64).by_hand(6, clip=0.5)
    torch.testing.assert_close(model, other.model.state_dict(), rtol=1e-9, atol=1e-11)
    assert optimizer["param_groups"][0]["controller"]["calls"] == 6


def test_the_code_of_the_documentation_runs(capsys):
    loader = DataLoader(TensorDataset(*data()), batch_size=4)
    exec(
        snippet("integrations.md", "Accelerate"),
        {"torch": torch, "net": network(), "loader": loader},
    )
    assert "step             3, 0 skipped" in capsys.readouterr().out
