"""LoRA and LoRA + LOMO as a training run: what is trained, what is saved, and going on from a checkpoint."""

import json
import signal
import sys

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowtide.cli import main
from lowtide.models import add_lora, load_model
from lowtide.models.lora import adapted_layers
from lowtide.training import TrainConfig, dry_run, find_lr, make_schedule, read_events, train
from lowtide.training.run import prepare
from tiny_files import save_tiny_model, write_task

LORA = {"lora_rank": 4, "optimizer": "lomo", "lr": 0.05, "lora_lr": 1e-2}
ONLY = {"lora_rank": 4, "lora_only": True, "lr": None, "lora_lr": 3e-2}
GENERATE = ["--prompt", "say b:", "--device", "cpu", "--max-new-tokens", "8", "--temperature", "0"]
NEVER_THE_SAME = ("time", "tokens_per_s", "memory_bytes", "peak_memory_bytes")


def run(config, stop_after=None):
    """Train; with ``stop_after`` interrupted behind that step."""

    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(config, on_event=interrupt, show_progress=False)


def opened(directory):
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def same(first, second):
    a, b = dict(first.named_parameters()), dict(second.named_parameters())
    assert a.keys() == b.keys() and a
    return all(torch.equal(a[name], b[name]) for name in a)


def steps_of(output):
    """What the metrics say of every step and evaluation, times and memory aside."""
    return [
        {key: value for key, value in event.items() if key not in NEVER_THE_SAME}
        for event in read_events(output / "metrics.jsonl")
        if event["event"] in ("train", "eval")
    ]


def test_a_run_equals_two_optimizers_of_torch(make_config, tmp_path):
    """The run's own batches and schedule, an ordinary backward pass, SGD for the base and AdamW for the adapters."""
    config = make_config(**LORA, clip_grad_norm=0.5, micro_batch_size=3, max_steps=6, warmup_ratio=0.4)
    made = prepare(config, tmp_path)  # only for its batches
    made.engine.remove()
    batches = [batch for _, batch in made.batches()]

    model = load_model(config.model, dtype=torch.float32).train()
    torch.manual_seed(config.seed)
    adapters = add_lora(model, rank=4, train_base=True)
    pairs = [
        (torch.optim.SGD(adapters.base_parameters(), lr=0.05), 0.05),
        (torch.optim.AdamW(adapters.parameters(), lr=1e-2, weight_decay=0.0), 1e-2),
    ]
    factors = [make_schedule("linear", 6, 0.4)(step) for step in range(6)]
    assert len(set(factors)) > 3
    events = []
    result = train(config, on_event=events.append, show_progress=False)
    reported = [event for event in events if event["event"] == "train"]
    assert [event["lr"] for event in reported] == pytest.approx([0.05 * factor for factor in factors])
    assert [event["lora_lr"] for event in reported] == pytest.approx([1e-2 * factor for factor in factors])
    for batch, factor, event in zip(batches, factors, reported, strict=True):
        for optimizer, rate in pairs:
            optimizer.param_groups[0]["lr"] = factor * rate
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        assert event["loss"] == pytest.approx(loss.item(), abs=1e-5)
        assert event["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        for optimizer, _ in pairs:
            optimizer.step()
            optimizer.zero_grad()
    expected, found = adapters.merge(), opened(result.model_dir)
    differences = zip(expected.parameters(), found.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in differences) < 2e-5


def test_base_and_adapters_change_and_the_model_has_both(make_config, model_dir):
    result = run(make_config(**LORA, lora_targets=["q_proj", "o_proj"], lora_alpha=8))
    assert result.loss_after.loss < result.loss_before.loss
    original, trained = opened(model_dir), opened(result.model_dir)
    names = [name for name, _ in original.named_parameters()]
    assert [name for name, _ in trained.named_parameters()] == names
    unchanged = [
        name
        for (name, a), b in zip(original.named_parameters(), trained.parameters(), strict=True)
        if torch.equal(a, b)
    ]
    assert unchanged == []
    adapter = load_file(result.output / "adapter" / "adapter_model.safetensors")
    assert len(adapter) == 2 * 2 * 2
    assert all(value.dtype == torch.float32 and value.abs().sum() > 0 for value in adapter.values())
    settings = json.loads((result.output / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    assert settings["base_model_name_or_path"] == ""  # there is no such model by a name: its weights were trained, too


def test_lora_alone_is_the_base_bit_for_bit_and_its_adapters(make_config, model_dir):
    result = run(make_config(**ONLY, max_steps=30, save_every="7"))
    assert result.loss_after.loss < 0.97 * result.loss_before.loss  # there is little to adapt in random weights
    original = opened(model_dir)
    checkpoints = sorted((result.output / "checkpoints").iterdir())
    assert len(checkpoints) == 2
    assert all(same(original, opened(path)) for path in checkpoints)
    trained = opened(result.model_dir)
    changed = {
        name.rpartition(".weight")[0].rpartition(".")[2]
        for (name, a), b in zip(original.named_parameters(), trained.named_parameters(), strict=True)
        if not torch.equal(a, b[1])
    }
    assert changed == {"q_proj", "v_proj"}
    settings = json.loads((result.output / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(model_dir)
    with_peft = PeftModel.from_pretrained(opened(model_dir), result.output / "adapter")
    assert same(with_peft.merge_and_unload(), trained)
    (event,) = read_events(result.output / "metrics.jsonl", "config")
    assert event["lr"] == 3e-2 and event["num_adapter_parameters"] == 2 * 4 * (32 + 32 + 32 + 16)
    assert all("lora_lr" not in step for step in read_events(result.output / "metrics.jsonl", "train"))


@pytest.mark.parametrize("settings", [
    {**LORA, "clip_grad_norm": 0.5},
    {**LORA, "optimizer": "adalomo", "lr": 1e-2, "clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 3},
    {**LORA, "optimizer": "adamw", "lr": 1e-3, "packing": True},
    {**LORA, "dtype": "bfloat16"},
    {**LORA, "dtype": "bfloat16", "rounding": "compensated", "lora_targets": ["all-linear"]},
    {**LORA, "dtype": "float16", "optimizer": "adalomo", "lr": 1e-2},
    ONLY,
    {**ONLY, "dtype": "bfloat16", "weight_decay": 0.1},
], ids=lambda settings: "-".join(str(value) for value in settings.values()))  # fmt: skip
def test_two_parts_are_the_whole(settings, make_config, tmp_path):
    model = save_tiny_model(tmp_path / "dropout", attention_dropout=0.2)

    def make(name, **changes):
        common = {"model": str(model), "max_steps": 8, "batch_size": 6, "micro_batch_size": 4, "lora_dropout": 0.3}
        return make_config(**{**common, "eval_every": 3, "output": str(tmp_path / name), **settings, **changes})

    whole = run(make("whole"))
    first = run(make("parts"), stop_after=4)
    assert first.interrupted and first.num_steps == 4
    assert not (first.output / "adapter").exists() and not (first.output / "model").exists()
    second = run(TrainConfig(**{**make("parts").to_dict(), "resume": "latest"}))
    assert second.num_steps == 8 and second.loss_after == whole.loss_after
    assert steps_of(second.output) == steps_of(whole.output)
    assert same(opened(second.model_dir), opened(whole.model_dir))
    a, b = (load_file(each.output / "adapter" / "adapter_model.safetensors") for each in (second, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_that_is_over_can_be_given_more_steps(make_config):
    config = make_config(**LORA, max_steps=4, save_every="2")
    first = run(config)
    (first.output / ".adapter.123.tmp").mkdir()  # as a process leaves it that is killed while it saves
    more = run(TrainConfig(**{**config.to_dict(), "max_steps": 6, "resume": "latest", "allow_changes": True}))
    assert more.num_steps == 6
    assert not same(opened(more.model_dir), opened(more.output / "model.replaced")) and first.output == more.output
    assert (more.output / "adapter.replaced").is_dir() and (more.output / "adapter").is_dir()
    assert not (more.output / ".adapter.123.tmp").exists()
    again = run(TrainConfig(**{**config.to_dict(), "max_steps": 6, "resume": "latest"}))
    assert again.finished_before


def test_a_checkpoint_opens_as_what_was_trained(make_config, model_dir):
    """lowtide merges the adapters; plain transformers and peft have them on top."""
    result = run(make_config(**LORA, max_steps=8), stop_after=5)
    checkpoint = result.model_dir
    base = opened(checkpoint)
    assert not same(base, opened(model_dir))
    merged = load_model(str(checkpoint), dtype=torch.float32)
    assert not same(base, merged) and adapted_layers(merged) == {}
    tokens = AutoTokenizer.from_pretrained(checkpoint)("say a:", return_tensors="pt")
    with_peft = PeftModel.from_pretrained(base, checkpoint / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(**tokens).logits, with_peft(**tokens).logits, rtol=0, atol=1e-5)
    # and it can be where another run begins
    other = make_config(model=str(checkpoint), output=str(result.output.parent / "other"), max_steps=1)
    assert run(other).num_steps == 1


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rank": 2}, "lora_rank was 4 and is 2$"),
    ({"lora_rank": 0, "lora_lr": 5e-4}, "lora_rank was 4 and is 0"),
    ({"lora_targets": ["o_proj"]}, r"lora_targets was None and is \['o_proj'\]$"),
    ({"lora_only": True, "lr": None}, "lora_only was False and is True"),
])  # fmt: skip
def test_adapters_of_another_shape_cannot_go_on(changes, message, make_config):
    config = make_config(**LORA)
    run(config, stop_after=3)
    other = {**config.to_dict(), "resume": "latest", "allow_changes": True, **changes}
    with pytest.raises(ValueError, match=message):
        run(TrainConfig(**other))
    changed = {"lora_alpha": 8, "lora_dropout": 0.1, "lora_lr": 1e-3}
    with pytest.raises(ValueError, match=r"lora_alpha was 16 and is 8, .*allow the change with --allow-changes"):
        run(TrainConfig(**{**config.to_dict(), "resume": "latest", **changed}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rank": -1}, "lora_rank must be at least 0, got -1"),
    ({"lora_alpha": 0}, "lora_alpha must be at least 1, got 0"),
    ({"lora_dropout": 1.0}, "lora_dropout must be at least 0 and less than 1, got 1.0"),
    ({"lora_lr": 0.0}, "lora_lr must be a number above 0, got 0.0"),
    ({"lora_lr": float("nan")}, "lora_lr must be a number above 0"),
    ({"lora_targets": []}, "lora_targets must name at least one layer, or be left out"),
    ({"lora_targets": ["q_proj", ""]}, "lora_targets must not contain an empty name"),
    ({"lora_only": True, "lr": 1e-3}, "lr is of the model's own weights, which lora_only freezes: .* lora_lr"),
    ({"lora_only": True, "dtype": "bfloat16", "rounding": "nearest"}, "rounding is of the model's own weights"),
    ({"weights": "cpu"}, "lora_rank needs weights device, got 'cpu'"),
    ({"weights": "auto"}, "lora_rank needs weights device, got 'auto'"),
    ({"weights": "./w"}, r"lora_rank needs weights device, got './w': .* planner"),
])  # fmt: skip
def test_settings_are_refused(changes, message):
    given = {"model": "m", "data": ["d.txt"], "output": "o", "lora_rank": 4}
    TrainConfig(**given).validate()
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{**given, **changes}).validate()


@pytest.mark.parametrize(
    ("name", "value"),
    [("lora_alpha", 8), ("lora_dropout", 0.1), ("lora_targets", ["q_proj"]), ("lora_lr", 1e-3), ("lora_only", True)],
)
def test_adapter_settings_without_adapters_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name} means nothing without adapters: set lora_rank"):
        TrainConfig(model="m", data=["d.txt"], output="o", **{name: value}).validate()


def test_defaults_of_lora_alone():
    given = {"model": "m", "data": ["d.txt"], "output": "o", "lora_rank": 4, "optimizer": "lomo"}
    both, alone = TrainConfig(**given), TrainConfig(**given, lora_only=True)
    assert (both.effective_lr, both.effective_clip_grad_norm) == (0.1, 1.0)
    assert (alone.effective_lr, alone.effective_clip_grad_norm) == (5e-4, None)
    assert TrainConfig(**given, lora_only=True, clip_grad_norm=0.3).effective_clip_grad_norm == 0.3
    single = TrainConfig(**given, lora_targets="q_proj")
    single.validate()
    assert single.lora_targets == ["q_proj"]


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_rank": 17}, "^lora_rank must be at least 1 and at most 16, the smaller side of .*v_proj, got 17"),
    ({"lora_targets": ["vproj"]}, r"^lora_targets: no layer of the model is named 'vproj' \(did you mean v_proj\?\)"),
])  # fmt: skip
def test_what_the_model_cannot_have_is_refused_before_anything_is_written(changes, message, make_config, tmp_path):
    with pytest.raises(ValueError, match=message):
        run(make_config(**{**LORA, **changes}))
    assert not (tmp_path / "out").exists()


def test_the_planner_and_find_lr_say_that_they_do_not_know_adapters(make_config):
    with pytest.raises(ValueError, match="the planner does not know adapters: leave lora_rank out"):
        dry_run(make_config(**LORA))
    with pytest.raises(ValueError, match="the adapters have their own, lora_lr: leave lora_rank out"):
        find_lr(make_config(**LORA))


def flags(model, tmp_path, *more):
    return [
        "train", "--model", str(model), "--data", str(write_task(tmp_path / "task.jsonl")), "--output", str(tmp_path / "out"),
        "--max-steps", "60", "--max-seq-len", "32", "--dtype", "float32", "--device", "cpu", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("only", [False, True])
def test_command_line(only, model_dir, tmp_path, capsys):
    kind = ["--lora-only", "--lora-targets", "all-linear"] if only else ["--optimizer", "adalomo", "--lr", "0.2"]
    arguments = flags(model_dir, tmp_path, "--lora-rank", "8", "--lora-lr", "1e-2", "--micro-batch-size", "4", *kind)
    assert main(arguments) == 0
    out = capsys.readouterr().out
    if only:
        assert "Training 8.2k parameters of LoRA adapters (rank 8) over the 26.9k frozen ones of" in out
        assert "Optimizer: adamw for the adapters, learning rate up to 0.01, linear schedule." in out
    else:
        assert "Fine-tuning all 26.9k parameters and 1.8k of LoRA adapters (rank 8) beside them of" in out
        assert (
            "adalomo, learning rate up to 0.2; adamw for the adapters, learning rate up to 0.01, linear schedule" in out
        )
    assert f"The adapters alone are in {tmp_path / 'out' / 'adapter'}; the model has them merged." in out
    saved = yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())
    assert (saved["lora_rank"], saved["lora_only"]) == (8, only)
    assert main(["generate", "--model", str(tmp_path / "out" / "model"), *GENERATE]) == 0
    before, after = (event["loss"] for event in read_events(tmp_path / "out" / "metrics.jsonl", "eval"))
    assert after < (0.97 if only else 0.05) * before  # random weights that stay as they are learn little
    model, tokenizer = opened(tmp_path / "out" / "model"), AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    generated = model.generate(**tokenizer("say b:", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert only or tokenizer.decode(generated[0], skip_special_tokens=True) == "say b: bb"


def test_command_line_without_peft(model_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert main(flags(model_dir, tmp_path, "--lora-rank", "2")) == 1
    assert "lowtide: error: LoRA needs the package peft: pip install 'lowtide[lora]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
