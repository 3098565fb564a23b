"""A run that is resumed ends bit for bit as if it had not been interrupted, and refuses to become another one."""

import datetime
import json
import signal

import pytest
import torch
from safetensors.torch import load_file

from lowtide.training import TrainConfig, read_events, train
from lowtide.training.checkpoint import list_checkpoints
from lowtide.training.resume import changed_settings
from streaming_cpu import stream_on_cpu
from tiny_files import save_tiny_model, write_jsonl

NUM_STEPS = 8
NEVER_THE_SAME = ("time", "tokens_per_s", "memory_bytes", "peak_memory_bytes")


def run(config, stop_after=None, **options):
    """Train; with ``stop_after`` interrupted behind that step."""

    def interrupt(event):
        if event["event"] == "train" and event["step"] == stop_after:
            signal.raise_signal(signal.SIGINT)

    return train(config, on_event=interrupt, show_progress=False, **options)


def weights(directory):
    return {path.name: load_file(path) for path in sorted(directory.glob("model*.safetensors"))}


def same_weights(a, b):
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys() and first
    return all(torch.equal(first[f][name], second[f][name]) for f in first for name in first[f])


def steps_of(output):
    """What the metrics say of every step and evaluation, times and memory aside."""
    events = read_events(output / "metrics.jsonl")
    return [
        {key: value for key, value in event.items() if key not in NEVER_THE_SAME}
        for event in events
        if event["event"] in ("train", "eval")
    ]


@pytest.fixture
def make(make_config, tmp_path):
    """Settings with shuffling, dropout and a schedule, in a directory of their own."""
    model = save_tiny_model(tmp_path / "dropout", attention_dropout=0.2)

    def make(name, **changes):
        defaults = {
            "model": str(model),
            "max_steps": NUM_STEPS,
            "output": str(tmp_path / name),
            "eval_every": 3,
            "batch_size": 6,
        }
        return make_config(**{**defaults, **changes})

    return make


def interrupted_and_whole(make, after=4, **changes):
    """(output of a run in two parts, of one in one part)."""
    whole = run(make("whole", **changes))
    config = make("parts", **changes)
    first = run(config, stop_after=after)
    assert first.interrupted and first.num_steps == after
    second = run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))
    assert not second.interrupted and second.num_steps == NUM_STEPS
    assert second.loss_before == whole.loss_before and second.loss_after == whole.loss_after
    return second.output, whole.output


@pytest.mark.parametrize("optimizer", ["lomo", "adalomo", "adamw"])
@pytest.mark.parametrize("home", ["device", "cpu", "disk"])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [("float32", None), ("bfloat16", "nearest"), ("bfloat16", "stochastic"), ("bfloat16", "compensated")],
)
def test_two_parts_are_the_whole(optimizer, home, dtype, rounding, make, tmp_path, monkeypatch):
    stream_on_cpu(monkeypatch)
    clips = {
        "lomo": {"clip_grad_norm": 0.5},
        "adalomo": {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 3},
        "adamw": {},
    }
    where = str(tmp_path / "w") if home == "disk" else home
    parts, whole = interrupted_and_whole(
        make,
        optimizer=optimizer,
        dtype=dtype,
        rounding=rounding,
        weights=where,
        micro_batch_size=4,
        packing=True,
        **clips[optimizer],
    )
    assert same_weights(parts / "model", whole / "model")
    assert steps_of(parts) == steps_of(whole)
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("changes", [
    {"clip_grad_value": 0.01},
    {"clip_grad_norm": 0.5, "clip_memory": "1GB"},
    {"clip_grad_norm": 0.5, "clip": "adaptive", "clip_warmup_steps": 6},
    {"packing": False, "micro_batch_size": 1, "schedule": "cosine"},
    {"optimizer": "sgd", "epochs": 1, "max_steps": 8},
    {"dtype": "float16", "optimizer": "adalomo"},
    {"spike_factor": 1.5},
], ids=lambda changes: "-".join(changes))  # fmt: skip
def test_other_settings(changes, make):
    parts, whole = interrupted_and_whole(make, **changes)
    assert same_weights(parts / "model", whole / "model")
    assert steps_of(parts) == steps_of(whole)


def test_a_checkpoint_is_a_model(make):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(make("out"), stop_after=4)
    assert result.model_dir == result.output / "checkpoints" / "step-00000004"
    model = AutoModelForCausalLM.from_pretrained(result.model_dir)
    assert model.config.use_cache, "as its makers set it, not as training does"
    assert AutoTokenizer.from_pretrained(result.model_dir).encode("a")
    assert not (result.output / "model").exists()


def test_a_home_may_change(make, tmp_path, monkeypatch):
    """The weights are the same wherever they live."""
    stream_on_cpu(monkeypatch)
    whole = run(make("whole", dtype="bfloat16"))
    config = make("parts", dtype="bfloat16", weights=str(tmp_path / "w"))
    run(config, stop_after=3)
    for stop, home in ((5, "cpu"), (None, "device")):
        result = run(TrainConfig(**{**config.to_dict(), "weights": home, "resume": "latest"}), stop_after=stop)
    assert same_weights(result.model_dir, whole.model_dir)
    assert steps_of(result.output) == steps_of(whole.output)


def test_checkpoints_on_the_way(make):
    result = run(make("out", save_every="2", keep_checkpoints=2))
    assert [path.name for path in list_checkpoints(result.output / "checkpoints")] == ["step-00000006", "step-00000004"]
    events = read_events(result.output / "metrics.jsonl", "checkpoint")
    assert [event["step"] for event in events] == [2, 4, 6]
    assert all(event["num_bytes"] > 1000 and not event["interrupted"] for event in events)


def test_by_time(make, monkeypatch):
    from lowtide.training import saver

    now = iter(range(0, 10**6, 10))
    monkeypatch.setattr(saver.time, "monotonic", lambda: next(now))
    result = run(make("out", save_every="25s", keep_checkpoints=9))
    steps = [event["step"] for event in read_events(result.output / "metrics.jsonl", "checkpoint")]
    assert steps == [3, 6] or steps == [3, 5, 7], "every third step or so, as a look at the clock takes ten seconds"


@pytest.mark.parametrize(("changes", "named"), [
    ({"lr": 0.1}, "lr was 0.2 and is 0.1"),
    ({"batch_size": 4}, "batch_size was 6 and is 4"),
    ({"max_steps": 20}, "max_steps was 8 and is 20"),
    ({"micro_batch_size": 2}, "micro_batch_size was None and is 2"),
    ({"data_seed": 1}, "data_seed was 0 and is 1"),
])  # fmt: skip
def test_another_setting_is_named_and_refused(changes, named, make):
    config = make("out")
    run(config, stop_after=4)
    other = {**config.to_dict(), **changes, "resume": "latest"}
    with pytest.raises(ValueError, match=named):
        run(TrainConfig(**other))
    result = run(
        TrainConfig(**other, allow_changes=True)
        if "allow_changes" not in other
        else TrainConfig(**{**other, "allow_changes": True})
    )
    assert result.num_steps == (changes.get("max_steps") or NUM_STEPS)


@pytest.mark.parametrize(
    ("changes", "data_seed"),
    [
        ({}, 3),
        ({"task": "superglue/rte"}, 3),
        ({"task": "superglue/rte", "eval_fraction": 0.0}, 3),
        ({"eval_data": ["held-out.jsonl"]}, 0),
        ({"eval_fraction": 0.0}, 0),
    ],
)
def test_a_run_of_before_there_was_a_data_seed_keeps_its_split_or_is_refused(changes, data_seed, make):
    """Its splits, where it made any, were drawn by its seed."""
    config = make("out", seed=3, **changes)
    saved = {name: value for name, value in config.to_dict().items() if name != "data_seed"}
    assert changed_settings(make("out", seed=3, data_seed=data_seed, **changes), saved) == {}
    refused = changed_settings(make("out", seed=3, data_seed=5, **changes), saved)
    assert refused == {"data_seed": f"data_seed was {data_seed} and is 5"}
    saved["data_seed"] = 0  # a new one says what it was
    assert changed_settings(config, saved) == {}


@pytest.mark.parametrize("changes", [{"optimizer": "lomo"}, {"dtype": "bfloat16"}])
def test_some_settings_can_never_change(changes, make):
    config = make("out")
    run(config, stop_after=4)
    with pytest.raises(ValueError, match=f"{next(iter(changes))} was .* and is"):
        run(TrainConfig(**{**config.to_dict(), **changes, "resume": "latest", "allow_changes": True}))


def test_other_data_is_noticed(make, tmp_path):
    config = make("out")
    run(config, stop_after=4)
    path = tmp_path / "task.jsonl"
    path.write_text(path.read_text().replace("a", "b"))
    with pytest.raises(ValueError, match="training data is not what"):
        run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))


def test_a_run_whose_template_writes_the_date_goes_on_tomorrow(make, tmp_path, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d') }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}")
    rows = [
        {"messages": [{"role": "user", "content": f"{n}"}, {"role": "assistant", "content": "a"}]} for n in range(30)
    ]
    settings = {"data": [str(write_jsonl(tmp_path / "chats.jsonl", rows))], "chat_template": str(template)}
    whole = run(make("whole", **settings))
    config = make("parts", **settings)
    run(config, stop_after=3)
    now = datetime.date.today()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return now + datetime.timedelta(days=1)

    monkeypatch.setattr(datetime, "date", Tomorrow)
    result = run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))
    assert same_weights(result.model_dir, whole.model_dir)
    with pytest.raises(AssertionError):  # the test would see it
        assert same_weights(run(make("tomorrow", **settings)).model_dir, whole.model_dir)


def test_a_corrupt_checkpoint_is_passed_over(make, caplog):
    """The one before it is used, and the run ends the same."""
    whole = run(make("whole"))
    config = make("parts", save_every="2")
    run(config, stop_after=5)
    newest = list_checkpoints(config_output := whole.output.parent / "parts" / "checkpoints")[0]
    assert newest.name == "step-00000005"
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\x00\xff\x01")
    result = run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))
    assert "step-00000005 is corrupt: model.safetensors is not what was written" in caplog.text
    assert (config_output / "step-00000005.corrupt").is_dir(), "nothing is deleted"
    assert read_events(result.output / "metrics.jsonl", "resume")[0]["step"] == 4
    assert same_weights(result.model_dir, whole.model_dir) and steps_of(result.output) == steps_of(whole.output)


@pytest.mark.parametrize("damage", ["a missing file", "a shorter file", "a broken manifest", "a path that leads out"])
def test_damage_is_named(damage, make):
    config = make("out")
    path = run(config, stop_after=2).model_dir
    manifest = path / "training" / "manifest.json"
    expected = "is torn"
    if damage == "a missing file":
        (path / "training" / "optimizer.safetensors").unlink()
    elif damage == "a shorter file":
        file = path / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "a broken manifest":
        manifest.write_text(manifest.read_text()[:-20])
        expected = "manifest.json is damaged"
    else:
        facts = json.loads(manifest.read_text())
        facts["files"]["../../config.yaml"] = {"bytes": 1, "sha256": "0"}
        manifest.write_text(json.dumps(facts))
        expected = "lies elsewhere"
    with pytest.raises(ValueError, match=expected):
        run(TrainConfig(**{**config.to_dict(), "resume": str(path)}))


def test_auto_begins_anew_and_latest_does_not(make):
    with pytest.raises(FileNotFoundError, match="no checkpoint in .*where the run was begun.*--resume auto"):
        run(make("out", resume="latest"))
    assert run(make("out", resume="auto")).num_steps == NUM_STEPS


def test_a_finished_run_is_left_alone(make):
    result = run(make("out"))
    before = (result.output / "metrics.jsonl").read_bytes()
    again = run(make("out", resume="auto"))
    assert again.finished_before and again.num_steps == NUM_STEPS and again.model_dir == result.model_dir
    assert again.loss_before == result.loss_before and again.loss_after == result.loss_after
    assert (result.output / "metrics.jsonl").read_bytes() == before


def test_more_steps_than_before(make):
    config = make("out", save_every="4", schedule="constant")
    run(config)
    longer = {**config.to_dict(), "max_steps": 12, "resume": "latest"}
    with pytest.raises(ValueError, match="max_steps"):
        run(TrainConfig(**longer))
    result = run(TrainConfig(**{**longer, "allow_changes": True}))
    assert result.num_steps == 12 and (result.output / "model.replaced").is_dir()
    whole = run(make("whole", schedule="constant", max_steps=12, warmup_ratio=config.warmup_ratio))
    assert whole.num_steps == 12


def test_a_directory_that_is_no_run_is_not_touched(make, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    for resume in ("auto", "latest"):
        with pytest.raises(FileExistsError, match="no run of lowtide in it"):
            run(make("out", resume=resume))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_two_processes_do_not_write_into_one_run(make):
    from lowtide.training import EventLog

    result = run(make("out"), stop_after=2)
    with (
        EventLog(result.output / "metrics.jsonl", existing=True),
        pytest.raises(FileExistsError, match="another process trains into"),
    ):
        run(make("out", resume="latest"))


def test_sigterm_saves_too(make):
    def terminate(event):
        if event["event"] == "train" and event["step"] == 2:
            signal.raise_signal(signal.SIGTERM)

    result = train(make("out"), on_event=terminate, show_progress=False)
    assert result.interrupted and result.signal_number == signal.SIGTERM and result.model_dir.is_dir()


def test_a_second_signal_stops_at_once(make):
    def twice(event):
        if event["event"] == "train" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(make("out", save_every="1"), on_event=twice, show_progress=False)
    assert run(make("out", save_every="1", resume="latest")).num_steps == NUM_STEPS


def test_going_back_to_an_earlier_checkpoint_begins_another_course(make):
    """Later checkpoints are kept under other names, and never chosen instead of those of the new course."""
    config = make("out", save_every="2", keep_checkpoints=3)
    whole = run(config)
    folder = whole.output / "checkpoints"
    result = run(TrainConfig(**{**config.to_dict(), "resume": str(folder / "step-00000002")}), stop_after=5)
    assert result.model_dir == folder / "step-00000005" and result.model_dir.is_dir()
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000005", "step-00000004", "step-00000002"]
    assert (folder / "step-00000006.replaced").is_dir() and (folder / "step-00000004.replaced").is_dir()
    assert (whole.output / "model.replaced").is_dir(), "the finished model of the old course"
    again = run(TrainConfig(**{**config.to_dict(), "resume": "auto"}))
    assert not again.finished_before and same_weights(again.model_dir, whole.output / "model.replaced")


def test_a_checkpoint_of_another_run_does_not_touch_this_one(make):
    first, second = run(make("first"), stop_after=2), run(make("second"), stop_after=3)
    before = (second.output / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match="checkpoint of another run"):
        run(make("second", resume=str(first.model_dir)))
    assert (second.output / "metrics.jsonl").read_bytes() == before
    result = run(make("third", resume=str(first.model_dir)))
    assert result.num_steps == NUM_STEPS and [
        e["step"] for e in read_events(result.output / "metrics.jsonl", "train")
    ] == [3, 4, 5, 6, 7, 8]


def test_an_extended_run_that_is_killed_is_not_taken_for_finished(make, monkeypatch):
    config = make("out", save_every="4", schedule="constant")
    run(config)
    longer = {**config.to_dict(), "max_steps": 12, "resume": "auto", "allow_changes": True}

    def die(event):
        if event["event"] == "train" and event["step"] == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**longer), on_event=die, show_progress=False)
    result = run(TrainConfig(**longer))
    assert not result.finished_before and result.num_steps == 12


def test_auto_does_not_overwrite_another_run(make):
    result = run(make("out"))
    before = {path: path.read_bytes() for path in result.output.rglob("*") if path.is_file()}
    with pytest.raises(FileExistsError, match="a run with other settings and no checkpoint"):
        run(make("out", resume="auto", lr=0.1))
    assert {path: path.read_bytes() for path in result.output.rglob("*") if path.is_file()} == before


def test_auto_does_not_begin_anew_when_all_checkpoints_are_damaged(make):
    result = run(make("out"), stop_after=2)
    (result.model_dir / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="none of the 1 checkpoints in .* is whole"):
        run(make("out", resume="auto"))


def test_the_planners_micro_batch_stays(make, monkeypatch):
    """Another one would add in another order; the free memory of a later process must not decide."""
    from lowtide.training import run as run_module

    asked, original = [], run_module.plan_placement

    def plan(config, *arguments):
        asked.append(config.micro_batch_size)
        return original(config, *arguments)

    monkeypatch.setattr(run_module, "plan_placement", plan)
    config = make("out", weights="auto")
    run(config, stop_after=2)
    run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))
    assert asked == [None, 6]


def few_at_a_time(monkeypatch, size):
    """A planner that lets so many sequences through a layer at once, unless it is told how many."""
    import dataclasses

    from lowtide.training import run as run_module

    original = run_module.plan_placement

    def plan(config, *arguments):
        found = original(config, *arguments)
        asked = config.micro_batch_size or size
        return dataclasses.replace(
            found, micro_batch_size=asked if asked < config.batch_size else None, keep_activations=0
        )

    monkeypatch.setattr(run_module, "plan_placement", plan)


@pytest.mark.parametrize("home", ["device", "cpu"])
def test_the_planners_micro_batch_stays_when_the_home_is_named(make, monkeypatch, home):
    stream_on_cpu(monkeypatch)
    few_at_a_time(monkeypatch, 2)
    whole = run(make("whole", weights="auto"))
    config = make("out", weights="auto")
    run(config, stop_after=2)
    result = run(TrainConfig(**{**config.to_dict(), "weights": home, "resume": "latest"}))
    assert same_weights(result.model_dir, whole.model_dir)


def test_another_micro_batch_may_be_asked_for(make, monkeypatch):
    """After a run that ran out of memory, say."""
    few_at_a_time(monkeypatch, 3)
    config = make("out", weights="auto", save_every="2")
    run(config, stop_after=4)
    changed = TrainConfig(
        **{**config.to_dict(), "resume": "latest", "allow_changes": True, "micro_batch_size": 1, "max_steps": 9}
    )
    result = run(changed, stop_after=8)
    state = json.loads((result.output / "checkpoints" / "step-00000008" / "training" / "state.json").read_text())
    assert state["micro_batch_size"] == 1


@pytest.mark.parametrize("changes", [{"max_steps": 2}, {"max_steps": None, "epochs": 1, "batch_size": 60}])
def test_a_run_that_would_have_ended_before_is_refused_and_nothing_is_touched(make, changes):
    config = make("out")
    result = run(config, stop_after=4)
    before = {path: path.read_bytes() for path in result.output.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="is that of step 4, and with these settings the whole run has"):
        run(TrainConfig(**{**config.to_dict(), "resume": "latest", "allow_changes": True, **changes}))
    assert {path: path.read_bytes() for path in result.output.rglob("*") if path.is_file()} == before


def test_a_working_copy_that_was_left_whole_is_kept_aside(make, tmp_path):
    """An error outside of a step leaves one; a resumed run needs the place, and deletes nothing."""

    def die(event):
        if event["event"] == "train" and event["step"] == 3:
            raise ZeroDivisionError

    config = make("out", weights=str(tmp_path / "w"), save_every="2")
    with pytest.raises(ZeroDivisionError):
        train(config, on_event=die, show_progress=False)
    assert (tmp_path / "w").is_dir()
    result = run(TrainConfig(**{**config.to_dict(), "resume": "latest"}))
    assert result.num_steps == NUM_STEPS and (tmp_path / "w.kept-0").is_dir() and not (tmp_path / "w").exists()


def test_a_resume_that_is_refused_leaves_no_working_copy(make, tmp_path):
    """It had been made before the data was compared; the checkpoint has the weights."""
    config = make("out", weights=str(tmp_path / "w"))
    run(config, stop_after=2)
    with pytest.raises(ValueError, match="the whole run has 1 "):
        run(TrainConfig(**{**config.to_dict(), "resume": "latest", "allow_changes": True, "max_steps": 1}))
    assert not list(tmp_path.glob("w*"))


def test_a_directory_that_a_killed_start_left_behind_is_taken(make, tmp_path):
    (tmp_path / "out" / "weights").mkdir(parents=True)
    assert run(make("out", resume="auto")).num_steps == NUM_STEPS


def test_a_run_that_was_killed_behind_its_last_save_leaves_no_working_copy(make, tmp_path, monkeypatch):
    """The model is saved, and then the process dies before its working copy is removed: the next one does it."""
    from lowtide.fusing import Engine
    from lowtide.weights.working_copy import MARKER

    config = make("out", weights=str(tmp_path / "w"))
    original = Engine.remove
    monkeypatch.setattr(Engine, "remove", lambda self, keep_copy=True: None)  # as if it had not come to that
    result = run(config)
    assert (tmp_path / "w" / MARKER).is_file() and result.model_dir.is_dir()
    monkeypatch.setattr(Engine, "remove", original)
    monkeypatch.setattr("lowtide.weights.working_copy._is_locked", lambda marker: False)  # that process is gone
    again = run(TrainConfig(**{**config.to_dict(), "resume": "auto"}))
    assert again.finished_before and not (tmp_path / "w").exists()
