"""transformers' Trainer with `optimizers=(ConjSGD, schedule)` on tiny models made from a config."""

import sys

import pytest
import torch
from loop import RULES, any_rule, equal, make, parameters, same
from snippets import snippet
from torch import nn
from torch.utils.data import SequentialSampler

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from conjopt.losses import SoftmaxLoss, trainer_loss
from conjopt.report import scalars
from conjopt.report.transformers import TransformersStatus

WORDS, LENGTH, SAMPLES = 11, 7, 12


def gpt2(dropout=0.0, dtype=torch.float32, **options):
    torch.manual_seed(0)
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    sizes = {"vocab_size": WORDS, "n_positions": LENGTH, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **rates, **ends, **options)).to(dtype)
    model.loss_type = "ForCausalLM"  # else the Trainer counts the first labels, of which none is
    return model


def texts():
    """Random words, each a function of the one before; ends of different length are ignored."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(WORDS, (SAMPLES, 1), generator=generator)
    for _ in range(LENGTH - 1):
        words = torch.cat([words, (3 * words[:, -1:] + 2) % WORDS], 1)
    labels = words.clone()
    for number, row in enumerate(labels):
        row[LENGTH - number % 4 :] = -100
    return [{"input_ids": w, "labels": of} for w, of in zip(words, labels)]


class InOrder(Trainer):
    """Batches in the order of the data set, so that a plain loop can have the same ones."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


def schedule(optimizer):
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)


def trainer(folder, rule="spectral", model=None, options=None, callbacks=None, **arguments):
    model = gpt2() if model is None else model
    criterion = nn.CrossEntropyLoss(reduction="sum")
    options = {"warmup": 3, "measure_every": 4, **RULES[rule], **(options or {})}
    optimizer = make(model, criterion, **options)
    quiet = {"report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True}
    return InOrder(
        model,
        TrainingArguments(
            str(folder), per_device_train_batch_size=4, **{**quiet, "max_steps": 6, **arguments}
        ),
        train_dataset=texts(),
        eval_dataset=texts()[:5],
        optimizers=(optimizer, schedule(optimizer)),
        compute_loss_func=trainer_loss(criterion, shift=True),
        callbacks=callbacks,
    )


def by_hand(rule, steps, parts, clip, dtype):
    """The loop that the Trainer should be equal to."""
    model, criterion = gpt2(dtype=dtype), nn.CrossEntropyLoss(reduction="sum")
    model.train()
    optimizer = make(model, criterion, warmup=3, measure_every=4, **RULES[rule])
    rate = schedule(optimizer)
    samples = texts()
    micro = [samples[start : start + 4] for start in range(0, SAMPLES, 4)]
    # The last step of an epoch has the micro-batches that are left.
    epoch = [micro[start : start + parts] for start in range(0, len(micro), parts)]
    for step in range(steps):
        batches = epoch[step % len(epoch)]
        inputs = [torch.stack([s["input_ids"] for s in batch]) for batch in batches]
        labels = [torch.stack([s["labels"] for s in batch])[:, 1:] for batch in batches]
        count = sum((of != -100).sum() for of in labels)
        for words, of in zip(inputs, labels):
            logits = model(words).logits[:, :-1]
            (criterion(logits.flatten(0, 1), of.flatten()) / count).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
    return model, optimizer


@any_rule
@pytest.mark.parametrize(("parts", "clip"), [(1, 0.0), (2, 0.1)])
def test_the_trainer_is_the_plain_loop(rule, parts, clip, tmp_path):
    """With its evaluations in between, whose losses are not watched."""
    run = trainer(
        tmp_path,
        rule,
        gpt2(dtype=torch.float64),
        gradient_accumulation_steps=parts,
        max_grad_norm=clip,
        eval_strategy="steps",
        eval_steps=3,
    )
    run.train()
    model, optimizer = by_hand(rule, 6, parts, clip, torch.float64)
    for p, q in zip(run.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)
    assert run.optimizer.optimizer.status().step == 6
    assert run.lr_scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


@any_rule
def test_a_resumed_run_equals_the_unbroken_one(rule, tmp_path):
    """Bit for bit, with dropout, from the warm-up and from the middle of an epoch."""

    def run(**arguments):
        return trainer(tmp_path, rule, gpt2(dropout=0.2), {"average": 0.1}, **arguments)

    whole = run(save_strategy="steps", save_steps=2)
    whole.train()
    for step in (2, 4):
        again = run()
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert again.state.global_step == 6
        assert equal(parameters(again.model), parameters(whole.model))
        assert same(again.optimizer.state_dict(), whole.optimizer.state_dict())
        statuses = [str(found.optimizer.optimizer.status()) for found in (again, whole)]
        assert statuses[0] == statuses[1]


class Statuses(TrainerCallback):
    """What reporters are told, and the status after every step."""

    def __init__(self):
        self.logged, self.found = [], {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append((state.global_step, dict(logs)))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.found[state.global_step] = optimizer.optimizer.status()


def test_the_callback_logs_through_the_trainer(tmp_path):
    statuses = Statuses()
    run = trainer(
        tmp_path,
        callbacks=[statuses],
        logging_steps=3,
        eval_strategy="steps",
        eval_steps=2,
    )
    run.add_callback(TransformersStatus(run))
    run.train()
    for told in (statuses.logged, [(r["step"], r) for r in run.state.log_history]):
        rows = [(step, logs) for step, logs in told if "conjopt/step_size" in logs]
        assert [step for step, _ in rows] == [3, 6]
        for step, logs in rows:
            expected = scalars(statuses.found[step])
            assert {n: v for n, v in logs.items() if n.startswith("conjopt/")} == expected
    assert [step for step, logs in statuses.logged if "loss" in logs] == [3, 6]
    assert [step for step, logs in statuses.logged if "eval_loss" in logs] == [2, 4, 6]


def bert(kind, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(
        vocab_size=WORDS, intermediate_size=8, max_position_embeddings=LENGTH, **sizes, **options
    )
    return getattr(transformers, kind)(config).eval()


@pytest.mark.parametrize(
    ("model", "shift", "labels"),
    [
        (lambda: gpt2().eval(), True, lambda tokens: tokens),
        (lambda: bert("BertForMaskedLM"), False, lambda tokens: tokens),
        (lambda: bert("BertForTokenClassification", num_labels=3), False, lambda t: t.clamp(max=2)),
        (
            lambda: bert("BertForSequenceClassification", num_labels=3),
            False,
            lambda tokens: tokens[:, 0].clamp(min=0, max=2),
        ),
    ],
    ids=["causal", "masked", "tokens", "sequences"],
)
def test_the_loss_is_that_of_the_model(model, shift, labels):
    model = model()
    words = torch.stack([sample["input_ids"] for sample in texts()])
    of = labels(torch.stack([sample["labels"] for sample in texts()]))
    loss = trainer_loss(nn.CrossEntropyLoss(reduction="sum"), shift=shift)
    expected = model(input_ids=words, labels=of).loss
    outputs = model(input_ids=words)
    torch.testing.assert_close(loss(outputs, of), expected)
    counted = of[:, 1:] if shift else of
    count = (counted != -100).sum()
    torch.testing.assert_close(loss(outputs, of, num_items_in_batch=count), expected)
    torch.testing.assert_close(loss(outputs, of, num_items_in_batch=2 * count), expected / 2)
    softmax = trainer_loss(SoftmaxLoss(reduction="sum"), shift=shift)
    torch.testing.assert_close(softmax(outputs, of), expected)
    outputs.logits = outputs.logits.bfloat16()
    assert loss(outputs, of).dtype == torch.float32


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"model": {"attn_implementation": "eager"}},
        {"checkpointing": True},
        {"options": {"direction": "sgd"}},
        {"gradient_accumulation_steps": 3},
    ],
    ids=str,
)
def test_it_learns(arguments, tmp_path):
    arguments = dict(arguments)
    model = gpt2(**arguments.pop("model", {}))
    if arguments.pop("checkpointing", False):
        # Of two names, as the older one is deprecated in transformers 5.
        enable = getattr(model, "activation_checkpointing_enable", None)
        (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    run = trainer(tmp_path, model=model, **arguments, max_steps=24, logging_steps=1)
    run.train()
    losses = [record["loss"] for record in run.state.log_history if "loss" in record]
    assert len(losses) == 24
    assert losses[-1] < 0.7 * losses[0]
    assert run.optimizer.optimizer.status().skipped_steps == 0


def test_a_loss_inside_of_the_model_is_refused_with_a_remedy(tmp_path):
    run = trainer(tmp_path)
    run.compute_loss_func = None
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match="CrossEntropyLoss was not called"):
        run.train()
    assert equal(before, parameters(run.model))


def test_bad_input(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="reduction='mean', expected 'sum'"):
        trainer_loss(nn.CrossEntropyLoss(), shift=True)
    with pytest.raises(TypeError, match="MSELoss, expected a criterion for classes"):
        trainer_loss(nn.MSELoss(reduction="sum"), shift=True)
    with pytest.raises(ValueError, match="ignore_index=0, expected -100"):
        trainer_loss(nn.CrossEntropyLoss(reduction="sum", ignore_index=0), shift=False)
    with pytest.raises(ValueError, match="no labels"):
        trainer_loss(nn.CrossEntropyLoss(reduction="sum"), shift=False)(None, None)
    with pytest.raises(TypeError, match="got a list, expected the Trainer"):
        TransformersStatus([])
    run = trainer(tmp_path, logging_steps=1)
    run.optimizer = torch.optim.SGD(run.model.parameters(), 0.1)
    run.lr_scheduler = schedule(run.optimizer)
    run.add_callback(TransformersStatus(run))
    with pytest.raises(ValueError, match=r"got SGD, expected a conjopt\.ConjSGD"):
        run.train()
    monkeypatch.delitem(sys.modules, "conjopt.report.transformers")
    monkeypatch.setitem(sys.modules, "transformers.trainer_callback", None)
    with pytest.raises(ImportError, match=r'pip install "conjopt\[transformers\]"'):
        import conjopt.report.transformers  # noqa: F401


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_the_code_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"torch": torch, "model": gpt2(), "train_set": texts()}
    exec(snippet("integrations.md", "transformers"), names)
    assert "step             20, 0 skipped" in capsys.readouterr().out
    logged = names["trainer"].state.log_history
    assert [record["step"] for record in logged if "conjopt/step_size" in record] == [10, 20]
