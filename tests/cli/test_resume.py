"""Interrupting ``lowtide train`` as people do, and what it says."""

import os
import signal
import subprocess
import sys

import pytest
import yaml

SETTINGS = {
    "optimizer": "lomo", "lr": 0.05, "max-steps": 4000, "dtype": "float32", "max-seq-len": 32, "device": "cpu", "threads": 1,
    "eval-fraction": 0, "log-every": 1,
}  # fmt: skip


def flags(**settings):
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on(number, model_dir, task, tmp_path):
    arguments = ["--model", model_dir, "--data", task, "--output", tmp_path / "out", *flags(**SETTINGS)]
    process = subprocess.Popen(
        [sys.executable, "-m", "lowtide", "train", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("step 3/"):
            process.send_signal(number)
            break
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert f"Stopped by {'Ctrl-C' if number == signal.SIGINT else 'SIGTERM'} after step " in out
    assert f"lowtide train --config {tmp_path / 'out' / 'config.yaml'} --resume" in out
    assert "checkpoints/step-0000" in out and "Traceback" not in err


def test_what_it_said_works(lowtide, model_dir, task, tmp_path):
    output = tmp_path / "out"
    arguments = ["--model", model_dir, "--data", task, "--output", output, *flags(**{**SETTINGS, "max-steps": 8})]
    assert lowtide("train", *arguments, "--save-every", "4").code == 0
    # As if it had been killed behind its checkpoint.
    import shutil

    shutil.rmtree(output / "model")
    result = lowtide("train", "--config", output / "config.yaml", "--resume")
    assert result.code == 0 and result.err == []
    assert (
        f"going on from {output / 'checkpoints' / 'step-00000004'}, step 4" in result.out and "step 8/8" in result.out
    )
    again = lowtide("train", "--config", output / "config.yaml", "--resume", "auto")
    assert again.code == 0 and "had come to its end, after 8 steps: its model is in" in again.out
    settings = yaml.safe_load((output / "config.yaml").read_text())
    assert settings["save_every"] == "4" and not {"resume", "allow_changes"} & settings.keys()


def test_without_resume_a_run_is_not_overwritten_and_the_way_on_is_named(lowtide, model_dir, task, tmp_path):
    arguments = [
        "--model",
        model_dir,
        "--data",
        task,
        "--output",
        tmp_path / "out",
        *flags(**{**SETTINGS, "max-steps": 1}),
    ]
    assert lowtide("train", *arguments).code == 0
    result = lowtide("train", *arguments)
    assert result.code == 2 and "or go on with the run that is in it with --resume" in result.err[0]


def test_another_setting_is_one_clear_line(lowtide, model_dir, task, tmp_path):
    arguments = ["--model", model_dir, "--data", task, "--output", tmp_path / "out"]
    assert lowtide("train", *arguments, *flags(**{**SETTINGS, "max-steps": 3, "save-every": 2})).code == 0
    (tmp_path / "out" / "model").rename(tmp_path / "elsewhere")
    result = lowtide(
        "train", *arguments, *flags(**{**SETTINGS, "max-steps": 3, "save-every": 2, "lr": 0.01}), "--resume"
    )
    assert result.code == 2 and len(result.err) == 1
    assert "lr was 0.05 and is 0.01; set them back, or allow the change with --allow-changes" in result.err[0]


def test_a_number_in_the_config_file_is_steps(lowtide, model_dir, task, tmp_path):
    config = tmp_path / "run.yaml"
    settings = {
        "model": str(model_dir),
        "data": [str(task)],
        "output": str(tmp_path / "out"),
        **SETTINGS,
        "max-steps": 3,
    }
    config.write_text(yaml.safe_dump({**settings, "save_every": 2}))
    assert lowtide("train", "--config", config).code == 0
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000002"]
    assert lowtide("train", "--config", config, "--save-every", "soon").code == 2
