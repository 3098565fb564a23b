"""TRL's SFTTrainer on the fused engine."""

import copy

import pytest
import torch
from transformers import AutoTokenizer

from lowtide.integrations.transformers import fuse_trainer
from lowtide.models import load_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

PAIRS = [{"prompt": f"{number} + 1 =", "completion": f" {number + 1}" + "!" * (number % 5)} for number in range(10, 34)]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"Is {number} odd?"},
            {"role": "assistant", "content": "yes" if number % 2 else "no, it is not"},
        ]
    }
    for number in range(24)
]
TEXTS = [{"text": f"The tide is low, {number} times. " * (1 + number % 3)} for number in range(24)]


def make(model_dir, folder, rows, *, sgd=False, **changes):
    model = load_model(str(model_dir), dtype=torch.float32)
    settings = {
        "output_dir": str(folder), "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.05, "max_steps": 4,
        "logging_steps": 1, "report_to": [], "use_cpu": True, "save_strategy": "no", "lr_scheduler_type": "constant", "disable_tqdm": True,
        "max_grad_norm": 1.0, "max_length": 64, "bf16": False, "seed": 3,
    }  # fmt: skip
    return trl.SFTTrainer(
        model=model, args=trl.SFTConfig(**settings | changes), train_dataset=datasets.Dataset.from_list(copy.deepcopy(rows)),
        processing_class=AutoTokenizer.from_pretrained(model_dir),
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.05), None) if sgd else (None, None),
    )  # fmt: skip


def logged(trainer):
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("kind", ["pairs", "chats", "texts"])
def test_it_is_sgd_under_the_same_trainer(model_dir, tmp_path, kind):
    rows = {"pairs": PAIRS, "chats": CHATS, "texts": TEXTS}[kind]
    plain = make(model_dir, tmp_path / "plain", rows, sgd=True)
    wanted = logged(plain)
    trainer = make(model_dir, tmp_path / "fused", rows)
    fuse_trainer(trainer, "lomo")
    found = logged(trainer)
    assert len(found) == len(wanted) == 4
    for name in ("loss", "grad_norm", "num_tokens", "learning_rate"):
        assert [e[name] for e in found] == pytest.approx([e[name] for e in wanted], rel=1e-4), name
    for param, expected in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(param, expected, rtol=1e-5, atol=1e-6)
    # What TRL measures on the way is there, once for a step and not for every part of it.
    assert all(0 <= entry["mean_token_accuracy"] <= 1 and entry["entropy"] > 0 for entry in found)


def test_resume(model_dir, tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 0.01}

    def run(name, max_steps, resume=None):
        trainer = make(model_dir, tmp_path / name, PAIRS, **settings, max_steps=max_steps)
        fuse_trainer(trainer, "adalomo")
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    whole = run("whole", 4)
    run("parts", 2)
    resumed = run("parts", 4, str(tmp_path / "parts" / "checkpoint-2"))
    for param, expected in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(param, expected)


def test_packing_in_whole_rows_works_and_in_one_row_is_refused(model_dir, tmp_path):
    trainer = make(model_dir, tmp_path / "a", TEXTS, packing=True, packing_strategy="wrapped")
    fuse_trainer(trainer, "adalomo")
    losses = [entry["loss"] for entry in logged(trainer)]
    assert len(losses) == 4 and losses[-1] < losses[0]
    trainer = make(model_dir, tmp_path / "b", TEXTS, packing=True, packing_strategy="bfd")
    with pytest.raises(ValueError, match="padding_free=False"):
        fuse_trainer(trainer, "adalomo")
