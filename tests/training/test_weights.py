"""Training with weights that live on disk: the same run, the same model, and nothing left behind."""

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from lowtide.training import find_lr, train
from lowtide.training.events import read_events
from lowtide.weights import TornWorkingCopyError


def run(config, **options):
    return train(config, show_progress=False, **options)


def weights_of(result):
    return AutoModelForCausalLM.from_pretrained(result.model_dir).state_dict()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_run_from_disk(make_config, tmp_path, dtype):
    options = {"dtype": dtype, "eval_every": 3, "clip_grad_norm": 1.0, "micro_batch_size": 3}
    here = run(make_config(output=str(tmp_path / "here"), **options))
    there = run(make_config(output=str(tmp_path / "there"), weights=str(tmp_path / "weights"), **options))
    losses = [[e["loss"] for e in read_events(r.output / "metrics.jsonl", "train")] for r in (here, there)]
    assert losses[0] == losses[1] and here.loss_after == there.loss_after
    one, two = weights_of(here), weights_of(there)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert not (tmp_path / "weights").exists(), "the model was saved, so its working copy is not needed"


def test_an_empty_directory_of_the_users_stays(make_config, tmp_path):
    (tmp_path / "weights").mkdir()
    run(make_config(weights=str(tmp_path / "weights"), max_steps=1))
    assert list((tmp_path / "weights").iterdir()) == []


def test_a_run_that_breaks_leaves_a_torn_copy_and_the_next_one_says_so(make_config, tmp_path):
    def fail(event):
        if event["event"] == "train":
            raise SystemError("made up")

    options = {"weights": str(tmp_path / "weights")}
    with pytest.raises(SystemError):
        run(make_config(output=str(tmp_path / "one"), **options), on_event=fail)
    marker = tmp_path / "weights" / "lowtide-working-copy.json"
    assert json.loads(marker.read_text())["status"] == "complete"  # it broke between two steps
    with pytest.raises(FileExistsError, match="ended in good order"):
        run(make_config(output=str(tmp_path / "two"), **options))
    marker.write_text(marker.read_text().replace("complete", "in use"))
    with pytest.raises(TornWorkingCopyError, match="torn"):
        run(make_config(output=str(tmp_path / "two"), **options))
    assert not (tmp_path / "two").exists()


def test_room_for_the_copy_and_the_saved_model_is_checked_first(make_config, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="the trained model and its working copy take"):
        run(make_config(weights=str(tmp_path / "weights")))
    assert not (tmp_path / "weights").exists() and not (tmp_path / "out").exists()


def test_the_range_test_leaves_no_copy_behind(make_config, tmp_path):
    found = find_lr(make_config(weights=str(tmp_path / "weights")), num_steps=10, show_progress=False)
    assert found.points and not (tmp_path / "weights").exists()
