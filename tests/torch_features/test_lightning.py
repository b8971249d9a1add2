"""Lightning: closures, precision, accumulation, clipping, schedules, exact resume, the callback."""

import copy
import sys

import pytest
import torch
from loop import RULES, any_rule, data, equal, make, network, parameters, same
from snippets import snippet
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from conjopt.report import scalars
from conjopt.report.lightning import LightningStatus

# Of Lightning's own.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

OPTIONS = {"warmup": 3, "measure_every": 4}


class Module(LightningModule):
    """As in the guide: the network and the criterion are attributes, and the optimizer sees them.

    With `whole`, the module itself is what the optimizer watches.
    """

    def __init__(self, rule="spectral", dropout=0.0, dtype=torch.float32, whole=False, **options):
        super().__init__()
        self.net, self.criterion = network(dtype, dropout), nn.CrossEntropyLoss()
        self.options = {**OPTIONS, **RULES[rule], **options}
        self.whole = whole
        self.losses = []

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, number):
        x, y = batch
        loss = self.criterion(self(x) if self.whole else self.net(x), y)
        self.losses.append(loss.item())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        watched = self if self.whole else self.net
        optimizer = make(watched, self.criterion, self.parameters(), **self.options)
        rate = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rate, "interval": "step"}}


class Validated(Module):
    def validation_step(self, batch, number):
        x, y = batch
        self.log("val_loss", self.criterion(self.net(x), y))


def loader(dtype=torch.float32, size=8):
    return DataLoader(TensorDataset(*data(dtype=dtype)), batch_size=size)


def trainer(**options):
    quiet = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(**{**quiet, **options})


def by_hand(module, epochs, dtype=torch.float32, parts=1, clip=None, size=8, autocast=None):
    """The loop that Lightning should be equal to."""
    configured = module.configure_optimizers()
    optimizer, rate = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batches = list(loader(dtype, size))
    for _ in range(epochs):
        for start in range(0, len(batches), parts):
            optimizer.zero_grad()
            for x, y in batches[start : start + parts]:
                with torch.autocast("cpu", autocast, enabled=autocast is not None):
                    loss = module.criterion((module if module.whole else module.net)(x), y)
                (loss / parts).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            optimizer.step()
            rate.step()
    return optimizer


@any_rule
@pytest.mark.parametrize("whole", [False, True])
def test_a_fit_is_the_plain_loop(rule, whole):
    """Bit for bit: the closure, the schedule, and validation in between."""
    module, twin = Validated(rule, whole=whole), Module(rule, whole=whole)
    fit = trainer(max_epochs=4)
    fit.fit(module, loader(), loader())
    optimizer = by_hand(twin, 4)
    assert equal(parameters(module), parameters(twin))
    assert same(fit.optimizers[0].state_dict(), optimizer.state_dict())
    assert optimizer.status().step == 12


@any_rule
def test_accumulation_and_clipping(rule):
    module, twin = Module(rule), Module(rule)
    fit = trainer(max_epochs=4, accumulate_grad_batches=2, gradient_clip_val=0.1)
    fit.fit(module, loader(size=6))
    optimizer = by_hand(twin, 4, parts=2, clip=0.1, size=6)
    # Lightning's clipping multiplies by the same factor, and may round it otherwise.
    for p, q in zip(parameters(module), parameters(twin), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    assert fit.optimizers[0].status().step == optimizer.status().step == 8


@any_rule
def test_mixed_precision(rule):
    module, twin = Module(rule), Module(rule)
    fit = trainer(max_epochs=3, precision="bf16-mixed")
    fit.fit(module, loader())
    by_hand(twin, 3, autocast=torch.bfloat16)
    assert equal(parameters(module), parameters(twin))
    assert all(p.dtype == torch.float32 for p in module.parameters())
    assert fit.optimizers[0].status().skipped_steps == 0


def test_double_precision():
    module, twin = Module(dtype=torch.float64), Module(dtype=torch.float64)
    trainer(max_epochs=3, precision="64-true").fit(module, loader(torch.float64))
    by_hand(twin, 3, dtype=torch.float64)
    assert equal(parameters(module), parameters(twin))


class Seeded(Callback):
    """Makes dropout a function of the step."""

    def on_train_batch_start(self, trainer, module, *args):
        torch.manual_seed(trainer.global_step)


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used")
@any_rule
def test_a_resumed_fit_equals_the_unbroken_one(rule, tmp_path):
    """Bit for bit, with dropout, from the checkpoint of any epoch."""

    def run(*callbacks, **options):
        module = Module(rule, dropout=0.3, average=0.1, warmup=5)
        return module, trainer(max_epochs=7, callbacks=[Seeded(), *callbacks], **options)

    keep = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    whole, fit = run(keep, enable_checkpointing=True)
    fit.fit(whole, loader())
    for epoch in (0, 1, 4):
        again, resumed = run()
        resumed.fit(again, loader(), ckpt_path=tmp_path / f"epoch={epoch}.ckpt")
        assert again.losses == whole.losses[3 * (epoch + 1) :]
        assert equal(parameters(again), parameters(whole))
        assert same(resumed.optimizers[0].state_dict(), fit.optimizers[0].state_dict())
        assert str(resumed.optimizers[0].status()) == str(fit.optimizers[0].status())


class Stateful:
    """Batches that go on within an epoch, as Lightning asks of a loader that can."""

    def __init__(self):
        self.batches, self.place = list(loader()), 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        self.place %= len(self.batches)
        while self.place < len(self.batches):
            self.place += 1
            yield self.batches[self.place - 1]

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.filterwarnings("ignore:Be aware that when using .ckpt_path., callbacks used")
@any_rule
def test_a_fit_resumed_within_an_epoch_equals_the_unbroken_one(rule, tmp_path):
    """Bit for bit, from the checkpoint of any step, where the loader keeps its place."""

    def run(*callbacks, **options):
        module = Module(rule, dropout=0.3, average=0.1, warmup=5)
        return module, trainer(max_epochs=5, callbacks=[Seeded(), *callbacks], **options)

    keep = ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=1)
    whole, fit = run(keep, enable_checkpointing=True)
    fit.fit(whole, Stateful())
    for step in (1, 5, 8, 13):
        again, resumed = run()
        resumed.fit(again, Stateful(), ckpt_path=tmp_path / f"step={step}.ckpt")
        assert again.losses == whole.losses[step:]
        assert equal(parameters(again), parameters(whole))
        assert same(resumed.optimizers[0].state_dict(), fit.optimizers[0].state_dict())


class Notes(Logger):
    """Keeps what is logged."""

    name, version = "notes", 0

    def __init__(self):
        super().__init__()
        self.found = []

    def log_metrics(self, metrics, step=None):
        self.found.append((step, metrics))

    def log_hyperparams(self, *args, **kwargs):
        pass


class Statuses(Callback):
    """The status after every step, and by which optimizers it can be reached."""

    def __init__(self):
        self.found = {}

    def on_train_batch_end(self, trainer, module, *args):
        wrapped, bare = module.optimizers(), trainer.optimizers[0]
        assert str(wrapped.status()) == str(bare.status())
        assert wrapped.optimizer is bare
        assert wrapped.param_groups[0]["step_size"] == bare.param_groups[0]["step_size"]
        self.found[trainer.global_step] = bare.status()


def test_the_callback_logs_through_any_logger(tmp_path):
    notes, statuses = Notes(), Statuses()
    fit = trainer(
        max_epochs=4,
        accumulate_grad_batches=2,
        logger=[notes, CSVLogger(tmp_path)],
        callbacks=[statuses, LightningStatus(every=3)],
        log_every_n_steps=2,
    )
    fit.fit(Module(), loader(size=4))
    logged = [(step, m) for step, m in notes.found if "conjopt/step_size" in m]
    assert logged == [(step, scalars(statuses.found[step])) for step in (3, 6, 9, 12)]
    assert "conjopt/step_size" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()


def test_the_callback_follows_the_trainer_by_default():
    notes = Notes()
    callback = LightningStatus()
    fit = trainer(max_epochs=2, logger=notes, callbacks=[callback], log_every_n_steps=2)
    fit.fit(Module(), loader())
    assert [step for step, m in notes.found if "conjopt/step_size" in m] == [2, 4, 6]
    assert isinstance(copy.deepcopy(callback), LightningStatus)


def test_several_optimizers_have_names_of_their_own():
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.nets = nn.ModuleList([network(), network()])
            self.criterion = nn.CrossEntropyLoss()

        def training_step(self, batch, number):
            x, y = batch
            for net, optimizer in zip(self.nets, self.optimizers()):
                optimizer.zero_grad()
                self.manual_backward(self.criterion(net(x), y))
                optimizer.step()

        def configure_optimizers(self):
            return [make(net, self.criterion, **OPTIONS) for net in self.nets]

    notes = Notes()
    fit = trainer(
        max_epochs=1, logger=notes, callbacks=[LightningStatus(every=6)], log_every_n_steps=1
    )
    fit.fit(Two(), loader())
    ((step, metrics),) = [(s, m) for s, m in notes.found if "conjopt/0/loss" in m]
    assert step == 6
    assert metrics["conjopt/0/step_size"] == fit.optimizers[0].status().step_size
    assert metrics["conjopt/1/loss"] == fit.optimizers[1].status().loss


def test_bad_input(monkeypatch):
    class Plain(Module):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ValueError, match="LightningStatus: got SGD, expected a"):
        trainer(max_epochs=1, callbacks=[LightningStatus()]).fit(Plain(), loader())
    with pytest.raises(ValueError, match="every=0"):
        LightningStatus(every=0)
    monkeypatch.delitem(sys.modules, "conjopt.report.lightning")
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r'pip install "conjopt\[lightning\]"'):
        import conjopt.report.lightning  # noqa: F401


@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging")
def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "net": network(), "loader": loader(size=4)}
    exec(snippet("integrations.md", "Lightning"), names)
    assert "step             18, 0 skipped" in capsys.readouterr().out
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"conjopt/step_size" in path.read_bytes() for path in files)
