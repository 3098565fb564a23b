import signal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowtide.training import TrainConfig, read_events, train, trainer
from lowtide.training import run as run_module
from tiny_files import save_tiny_model, write_jsonl


def run(config, **options):
    return train(config, show_progress=False, **options)


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.model_dir).state_dict()


def test_learns_and_leaves_a_model_that_transformers_opens(make_config, tmp_path):
    config = make_config(max_steps=30, eval_every=10)
    seen = []
    result = run(config, on_event=seen.append)

    assert (result.num_steps, result.num_skipped, result.interrupted) == (30, 0, False)
    assert result.loss_after.loss < 0.5 * result.loss_before.loss
    assert result.loss_after.num_tokens == result.loss_before.num_tokens > 0
    assert result.peak_memory_bytes > 0
    assert sorted(path.name for path in result.output.iterdir()) == ["config.yaml", "metrics.jsonl", "model"]

    events = read_events(result.output / "metrics.jsonl")
    assert [event["event"] for event in seen] == [event["event"] for event in events]
    assert [event["event"] for event in events[:3]] == ["config", "eval", "train"]
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 10, 20, 30]
    steps = [event for event in events if event["event"] == "train"]
    assert [event["step"] for event in steps] == list(range(1, 31))
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]
    assert all(event["tokens_per_s"] > 0 and event["memory_bytes"] > 0 and event["grad_norm"] > 0 for event in steps)
    # warm-up over 6 % of 30 steps, that is 2
    assert [event["lr"] for event in steps[:4]] == pytest.approx([0.2 / 3, 0.4 / 3, 0.2, 0.2 * 27 / 28])
    assert events[-1]["event"] == "end"
    assert events[-1]["loss_after"] == pytest.approx(result.loss_after.loss)

    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    tokenizer = AutoTokenizer.from_pretrained(result.model_dir)
    prompt = tokenizer("say a:", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    assert tokenizer.decode(answer[0], skip_special_tokens=True) == "say a: aa"
    assert model.config.use_cache is True


def test_the_written_config_is_the_whole_config(make_config):
    config = make_config()
    result = run(config)
    assert TrainConfig(**yaml.safe_load((result.output / "config.yaml").read_text())) == config


@pytest.mark.parametrize("changes", [{"optimizer": "adalomo"}, {"optimizer": "lomo", "dtype": "bfloat16"}])
def test_same_seed_same_run_bit_for_bit(make_config, tmp_path, changes):
    results = [run(make_config(output=str(tmp_path / name), **changes)) for name in ("one", "two")]
    losses = [[e["loss"] for e in read_events(r.output / "metrics.jsonl", "train")] for r in results]
    assert losses[0] == losses[1]
    one, two = map(weights_of, results)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = run(make_config(output=str(tmp_path / "other"), seed=1, **changes))
    assert [e["loss"] for e in read_events(other.output / "metrics.jsonl", "train")] != losses[0]


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw", "sgd"])
def test_micro_batches_change_nothing_for_any_optimizer(make_config, tmp_path, optimizer):
    whole, parts = (
        run(make_config(optimizer=optimizer, lr=1e-2, micro_batch_size=size, output=str(tmp_path / str(size))))
        for size in (None, 1)
    )
    assert parts.loss_after.loss == pytest.approx(whole.loss_after.loss, abs=1e-4)
    assert whole.loss_after.loss < whole.loss_before.loss


def test_packed_documents_do_not_see_each_other(make_config, tmp_path):
    """Two texts packed into one sequence have the loss that each of them has alone."""
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "abcabcabc"}, {"text": "xyzxyzxyz"}])
    losses = {}
    for packing in (True, False):
        config = make_config(
            data=[str(texts)], packing=packing, max_steps=1, eval_fraction=0, output=str(tmp_path / str(packing))
        )
        result = run(config)
        (event,) = read_events(result.output / "metrics.jsonl", "train")
        losses[packing] = event["loss"]
        assert result.loss_before is None
        assert result.loss_after is None
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)


def test_epochs_visit_everything_in_a_new_order_each_time(make_config):
    result = run(make_config(max_steps=None, epochs=2, batch_size=16, eval_fraction=0))
    epochs = [event["epoch"] for event in read_events(result.output / "metrics.jsonl", "train")]
    assert epochs == [0] * 4 + [1] * 4


def test_an_output_with_something_in_it_is_refused_before_anything_is_read(make_config, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("precious")
    with pytest.raises(FileExistsError, match="not empty"):
        run(make_config(data=["there-is-no-such-file.jsonl"]))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["keep"]


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"data": ["missing.jsonl"]}, FileNotFoundError),
        ({"model": "missing-model"}, (FileNotFoundError, ValueError, OSError)),
        ({"batch_size": 0}, ValueError),
    ],
)
def test_nothing_is_written_when_the_run_cannot_start(make_config, changes, error):
    config = make_config(**changes)
    with pytest.raises(error):
        run(config)
    assert not trainer.Path(config.output).exists()


def test_a_loss_that_is_not_finite_updates_nothing_and_is_counted(make_config, monkeypatch):
    weights = _break_loss(monkeypatch, lambda step: step == 2)
    result = run(make_config(max_steps=4))
    assert (result.num_steps, result.num_skipped) == (4, 1)
    events = read_events(result.output / "metrics.jsonl", "train")
    assert [event["skipped"] for event in events] == [False, True, False, False]
    assert events[1]["loss"] is None
    unchanged = {
        step: all(torch.equal(before[name], after[name]) for name in before)
        for step, (before, after) in weights.items()
    }
    assert unchanged == {1: False, 2: True, 3: False, 4: False}


def test_it_gives_up_when_the_loss_stays_broken(make_config, monkeypatch):
    _break_loss(monkeypatch, lambda step: step > 1)
    config = make_config(max_steps=100)
    with pytest.raises(RuntimeError, match=r"not finite in 10 steps in a row, up to step 11; .* lower lr than 0\.2"):
        run(config)
    assert not (trainer.Path(config.output) / "model").exists()


def _break_loss(monkeypatch, is_broken):
    """Make the loss NaN in some steps; returns {step: (weights before, weights after)} of all steps."""
    seen = {}
    real = run_module.fuse

    def fuse(model, optimizer, **options):
        engine = real(model, optimizer, **options)
        forward, backward = model.forward, engine.backward

        def broken_forward(**batch):
            output = forward(**batch)
            if model.training and is_broken(len(seen) + 1):
                output.loss = output.loss * float("nan")
            return output

        def watched_backward(loss):
            before = {name: value.clone() for name, value in model.state_dict().items()}
            backward(loss)
            seen[len(seen) + 1] = (before, {name: value.clone() for name, value in model.state_dict().items()})

        model.forward, engine.backward = broken_forward, watched_backward
        return engine

    monkeypatch.setattr(run_module, "fuse", fuse)
    return seen


def test_ctrl_c_finishes_the_step_and_saves(make_config):
    def interrupt(event):
        if event["event"] == "train" and event["step"] == 3:
            signal.raise_signal(signal.SIGINT)

    result = run(make_config(max_steps=50), on_event=interrupt)
    assert result.interrupted
    assert result.num_steps == 3
    assert result.loss_before is not None
    assert result.loss_after is None
    assert read_events(result.output / "metrics.jsonl")[-1]["interrupted"] is True
    AutoModelForCausalLM.from_pretrained(result.model_dir)


def test_dropout_is_decided_by_the_seed(make_config, tmp_path):
    model = save_tiny_model(tmp_path / "dropout", attention_dropout=0.5)
    losses = []
    for name, seed in (("a", 0), ("b", 0)):
        result = run(make_config(model=str(model), output=str(tmp_path / name), seed=seed, max_steps=3))
        torch.rand(3)  # whatever happens between two runs
        losses.append([event["loss"] for event in read_events(result.output / "metrics.jsonl", "train")])
    assert losses[0] == losses[1]
