"""transformers' Trainer on the fused engine, against itself with ordinary optimizers and against lowtide's own trainer."""

import copy
import json
import pickle

import pytest
import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from lowtide import AdaLomo, Lomo, PerParameter
from lowtide.integrations.transformers import ENGINE_FILE, fuse_trainer
from lowtide.models import load_model
from lowtide.training import train
from lowtide.training.data import load_data

LR = 0.05


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def pad(rows):
    """Rows of different lengths as a batch."""
    width = max(len(row["input_ids"]) for row in rows)
    return {
        "input_ids": torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows]),
        "labels": torch.tensor([row["labels"] + [-100] * (width - len(row["labels"])) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
        ),
    }


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return SequentialSampler(self.train_dataset)


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(1)
    made = []
    for number in range(48):
        ids = torch.randint(3, 200, (6 + number % 7,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100] * (1 + number % 4) + ids[1 + number % 4 :]})
    return Rows(made)


@pytest.fixture
def model(model_dir):
    return load_model(str(model_dir), dtype=torch.float32)


@pytest.fixture
def arguments(tmp_path):
    def make(name="out", **changes):
        settings = {
            "output_dir": str(tmp_path / name), "per_device_train_batch_size": 4, "learning_rate": LR, "max_steps": 6, "logging_steps": 1,
            "report_to": [], "use_cpu": True, "save_strategy": "no", "lr_scheduler_type": "constant", "disable_tqdm": True, "max_grad_norm": 0.0,
        }  # fmt: skip
        return TrainingArguments(**settings | changes)

    return make


def run(model, args, rows, fused=None, *, resume=None, trainer_class=InOrder, **options):
    """Train a copy of the model; returns it and what was logged."""
    model = copy.deepcopy(model)
    trainer = trainer_class(model=model, args=args, train_dataset=rows, data_collator=pad, **options)
    if fused is not None:
        fuse_trainer(trainer, **fused)
    trainer.train(resume_from_checkpoint=resume)
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return model, logged


def assert_same(model, other, **tolerance):
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-6}
    for (name, param), expected in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(param, expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def sgd(model):
    return (torch.optim.SGD(model.parameters(), lr=LR), None)


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_is_sgd_with_accumulation_and_clipping(model, arguments, rows, max_grad_norm, accumulation):
    settings = {"max_grad_norm": max_grad_norm, "gradient_accumulation_steps": accumulation, "max_steps": 4}
    plain = copy.deepcopy(model)
    trainer = InOrder(
        model=plain, args=arguments(**settings), train_dataset=rows, data_collator=pad, optimizers=sgd(plain)
    )
    trainer.train()
    expected = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained, logged = run(model, arguments(**settings), rows, {"optimizer": "lomo"})
    assert_same(trained, plain)
    assert len(logged) == len(expected) == 4
    for found, wanted in zip(logged, expected, strict=True):
        for name in ("loss", "grad_norm", "learning_rate", "epoch"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-4), name
    if max_grad_norm:
        assert any(entry["grad_norm"] > max_grad_norm for entry in logged)  # it was clipped


def test_adamw_with_weight_decay_is_the_trainers_own(model, arguments, rows):
    settings = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
    }
    expected, wanted = run(model, arguments(**settings), rows)
    trained, logged = run(model, arguments(**settings), rows, {"optimizer": "adamw"})
    # The first steps of Adam are as long for a tiny gradient as for a large one, so rounding shows.
    assert_same(trained, expected, rtol=1e-3, atol=2e-5)
    assert [e["learning_rate"] for e in logged] == pytest.approx([e["learning_rate"] for e in wanted])
    assert [e["loss"] for e in logged] == pytest.approx([e["loss"] for e in wanted], rel=1e-4)


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo"])
def test_it_is_lowtides_own_trainer(model_dir, make_config, arguments, optimizer):
    config = make_config(
        optimizer=optimizer, schedule="constant", warmup_ratio=0.0, eval_fraction=0, clip_grad_norm=1.0, max_steps=5
    )
    losses = []
    result = train(
        config, on_event=lambda e: losses.append(e["loss"]) if e["event"] == "train" else None, show_progress=False
    )
    batches = load_data(config, AutoTokenizer.from_pretrained(model_dir)).train
    rows = []
    for batch in batches.epoch(0):
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            length = int(mask.sum())
            rows.append({"input_ids": ids[:length].tolist(), "labels": labels[:length].tolist()})
    args = arguments(
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        learning_rate=config.lr,
        max_grad_norm=1.0,
        max_steps=5,
    )
    model = load_model(config.model, dtype=torch.float32)
    trained, logged = run(model, args, Rows(rows), {"optimizer": optimizer})
    assert [entry["loss"] for entry in logged] == pytest.approx(losses, rel=1e-4)
    assert_same(trained, load_model(str(result.model_dir), dtype=torch.float32), rtol=2e-4, atol=2e-5)


class Stop(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == 3


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [("adalomo", torch.float32), ("adalomo", torch.bfloat16), ("lomo", torch.bfloat16), ("lomo", torch.float16), ("adamw", torch.float32)],
)  # fmt: skip
def test_a_resumed_run_is_the_same_bit_for_bit(model_dir, arguments, rows, tmp_path, optimizer, dtype):
    model = load_model(str(model_dir), dtype=dtype)
    rate = 0.002 if optimizer == "adamw" else 0.01
    settings = {
        "save_strategy": "steps",
        "save_steps": 3,
        "learning_rate": rate,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
    }
    whole, wanted = run(model, arguments("whole", **settings), rows, {"optimizer": optimizer})
    run(model, arguments("parts", **settings), rows, {"optimizer": optimizer}, callbacks=[Stop()])
    checkpoint = tmp_path / "parts" / "checkpoint-3"
    assert json.loads((checkpoint / ENGINE_FILE).read_text())["num_steps"] == 3
    resumed, logged = run(model, arguments("parts", **settings), rows, {"optimizer": optimizer}, resume=str(checkpoint))
    assert [entry["loss"] for entry in logged] == [entry["loss"] for entry in wanted]
    for (name, param), expected in zip(resumed.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(param, expected), name


def test_evaluation_has_its_logits_before_within_and_after(model, arguments, rows):
    shapes = []

    def metrics(found):
        shapes.append(found.predictions.shape)
        return {"right": 1.0}

    expected = InOrder(model=copy.deepcopy(model), args=arguments(), data_collator=pad, eval_dataset=rows).evaluate()
    trainer = InOrder(
        model=copy.deepcopy(model), args=arguments(eval_strategy="steps", eval_steps=3), train_dataset=rows, data_collator=pad,
        eval_dataset=rows, compute_metrics=metrics,
    )  # fmt: skip
    fuse_trainer(trainer, "lomo")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < expected["eval_loss"]
    assert len(shapes) == 4 and {shape[0] for shape in shapes} == {48}
    assert {shape[2] for shape in shapes} == {trainer.model.config.vocab_size}


def test_the_model_is_an_ordinary_one_afterwards_and_can_be_trained_again(model, arguments, rows):
    model = copy.deepcopy(model)
    trainer = InOrder(model=model, args=arguments(max_steps=3), train_dataset=rows, data_collator=pad)
    fuse_trainer(trainer, "adalomo")
    trainer.train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    output = model(**pad([rows[0]]))
    assert output.logits is not None
    output.loss.backward()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.zero_grad()
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_after_an_error_the_model_is_an_ordinary_one(model, arguments, rows):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 2:
                raise KeyboardInterrupt

    trainer = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad, callbacks=[Fails()])
    fuse_trainer(trainer, "lomo")
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    copy.deepcopy(model)
    again = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad)
    fuse_trainer(again, "lomo")
    again.train()
    with pytest.raises(ValueError, match="on the fused engine already"):
        fuse_trainer(again, "lomo")


def test_the_arguments_of_the_user_stay_as_they_are(model, arguments, rows):
    args = arguments(gradient_accumulation_steps=3)
    expected, _ = run(model, args, rows, {"optimizer": "lomo"})
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 3)
    trained, _ = run(model, args, rows, {"optimizer": "lomo"})  # the same arguments once more
    assert_same(trained, expected, rtol=0, atol=0)


def test_a_new_accelerator_is_taken_over(model, arguments, rows):
    """As a hyperparameter search makes one for every trial."""
    trainer = InOrder(model=model, args=arguments(max_grad_norm=1.0), train_dataset=rows, data_collator=pad)
    fuse_trainer(trainer, "lomo")
    trainer.create_accelerator_and_postprocess()
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == 6 and all(entry["grad_norm"] > 0 for entry in logged)


def test_every_trial_of_a_search_begins_anew(model, arguments, rows):
    """With ``model_init`` the Trainer makes model and optimizer anew for every trial: nothing of the one before may be left."""
    args = arguments(max_grad_norm=0.1, learning_rate=LR)
    trainer = InOrder(model_init=lambda: copy.deepcopy(model), args=args, data_collator=pad, train_dataset=rows)
    fuse_trainer(trainer, "lomo", clip="adaptive", clip_warmup_steps=2)
    trials = []
    for _ in range(2):
        trainer.train()
        log = trainer.state.log_history
        trials.append([(entry["loss"], entry["grad_norm"]) for entry in log if "grad_norm" in entry])
    assert trials[0] == trials[1] and len(trials[0]) > 3


def test_a_loss_of_ones_own_with_accumulation_is_warned_of(model, arguments, rows, caplog):
    args = arguments(gradient_accumulation_steps=2, label_smoothing_factor=0.1)
    plain = copy.deepcopy(model)
    trainer = InOrder(model=plain, args=args, train_dataset=rows, data_collator=pad, optimizers=sgd(plain))
    trainer.train()
    trained, _ = run(model, args, rows, {"optimizer": "lomo"})
    assert "all 8 rows of a step at once" in caplog.text
    assert_same(trained, plain)


def test_another_optimizers_checkpoint_is_named(model, arguments, rows, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 3, "max_steps": 3, "learning_rate": 1e-3}
    run(model, arguments("a", **settings), rows, {"optimizer": "adamw"})
    with pytest.raises(ValueError, match="another optimizer than AdaLomo"):
        run(
            model, arguments("a", **settings), rows, {"optimizer": "adalomo"},
            resume=str(tmp_path / "a" / "checkpoint-3"),
        )  # fmt: skip


def test_optimizers_of_ones_own(model, arguments, rows):
    given = Lomo(model.parameters(), lr=LR)
    trainer = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad, optimizers=(given, None))
    fuse_trainer(trainer)
    trainer.train()
    assert trainer.optimizer.optimizer is given
    made = []

    def make(groups):
        made.append(PerParameter(torch.optim.RMSprop, groups, lr=1e-3))
        return made[0]

    trainer = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad)
    fuse_trainer(trainer, make)
    trainer.train()
    assert trainer.optimizer.optimizer is made[0]
    trainer = InOrder(model=model, args=arguments(optim="lomo"), train_dataset=rows, data_collator=pad)
    fuse_trainer(trainer)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is Lomo
    trainer = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad)
    fuse_trainer(trainer)
    trainer.train()
    assert type(trainer.optimizer.optimizer) is AdaLomo


def test_bf16_autocast(model, arguments, rows):
    trained, logged = run(model, arguments(bf16=True), rows, {"optimizer": "lomo"})
    pickle.dumps(trained)  # torch.save(model)
    assert next(trained.parameters()).dtype == torch.float32
    expected, wanted = run(model, arguments(), rows, {"optimizer": "lomo"})
    assert [e["loss"] for e in logged] == pytest.approx([e["loss"] for e in wanted], rel=0.02)
    assert logged[-1]["loss"] < logged[0]["loss"]
    del expected


def test_gradient_checkpointing_is_switched_off(model, arguments, rows):
    plain, _ = run(model, arguments(), rows, {"optimizer": "lomo"})
    trained, _ = run(model, arguments(gradient_checkpointing=True), rows, {"optimizer": "lomo"})
    assert_same(trained, plain)


def test_what_cannot_work_is_refused(model, arguments, rows, caplog):
    def refused(match, settings=None, **options):
        trainer = InOrder(model=model, args=arguments(**settings or {}), train_dataset=rows, data_collator=pad)
        with pytest.raises(ValueError, match=match):
            fuse_trainer(trainer, **options)

    refused("one of adalomo, lomo, adamw, sgd, got 'adam'", optimizer="adam")
    refused("lowtide train --weights", weights="cpu")
    refused("max_grad_norm", clip_grad_norm=1.0)
    refused("torch_compile=True", {"torch_compile": True})
    refused("dataloader_drop_last", {"dataloader_drop_last": True, "gradient_accumulation_steps": 2})
    refused("auto_find_batch_size=True", {"auto_find_batch_size": True})
    trainer = InOrder(model=model, args=arguments(), train_dataset=rows, data_collator=pad, optimizers=sgd(model))
    with pytest.raises(ValueError, match="given SGD, which cannot update in the backward pass"):
        fuse_trainer(trainer)
    trainer = InOrder(model=model, args=arguments(gradient_accumulation_steps=2), train_dataset=rows, data_collator=pad)
    with pytest.raises(ValueError, match="given Lomo and fuse_trainer 'adamw'"):
        given = (Lomo(model.parameters(), lr=LR), None)
        fuse_trainer(InOrder(model=model, args=arguments(), data_collator=pad, optimizers=given), "adamw")
    trainer.data_collator = type("Flat", (), {"padding_free": True})()
    with pytest.raises(ValueError, match="padding_free=False.*per_device_train_batch_size=8"):
        fuse_trainer(trainer)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="CUDA_VISIBLE_DEVICES"):
        fuse_trainer(trainer)


def test_the_default_rate_of_adamw_is_warned_of(model, arguments, rows, caplog):
    args = arguments(learning_rate=5e-5, max_steps=1)
    run(model, args, rows, {"optimizer": "adalomo"})
    assert "adalomo usually wants about 0.001" in caplog.text
    assert "second backward pass" not in caplog.text  # these arguments do not clip


@pytest.mark.parametrize(
    ("norm", "options", "warned"),
    [
        (1.0, {"optimizer": "adalomo"}, True),
        (1.0, {"optimizer": "adalomo", "clip": "adaptive"}, False),
        (0.5, {"optimizer": "adalomo"}, False),
        (1.0, {"optimizer": "lomo"}, False),
    ],
)
def test_the_second_pass_that_adalomo_does_not_need_is_warned_of(model, arguments, rows, caplog, norm, options, warned):
    run(model, arguments(max_grad_norm=norm, learning_rate=1e-3, max_steps=1), rows, options)
    assert ("max_grad_norm=0 spares it" in caplog.text) == warned


def test_accelerates_own_backward(model, rows):
    from accelerate import Accelerator

    from lowtide import fuse

    plain = copy.deepcopy(model)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=LR)
    accelerator = Accelerator(cpu=True)
    optimizer = Lomo(model.parameters(), lr=LR)
    engine = fuse(model, optimizer)
    model, optimizer = accelerator.prepare(model, optimizer)
    for number in range(3):
        batch = pad(rows.rows[4 * number : 4 * number + 4])
        plain(**batch).loss.backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    engine.remove()
    assert_same(model, plain)
