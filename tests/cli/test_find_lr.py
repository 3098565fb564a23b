import importlib.util
import json
import shlex

import pytest
import yaml

from lowtide.cli import find_lr
from lowtide.training import range_test

SETTINGS = ["--dtype", "float32", "--max-seq-len", "32", "--device", "cpu", "--eval-fraction", "0.1"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(range_test, "STEPS_PER_DECADE", 5)


@pytest.fixture
def typed(model_dir, task, tmp_path):
    return ["--model", model_dir, "--data", task, "--output", tmp_path / "runs" / "out", *SETTINGS]


def test_recommends_and_writes_beside_the_output(lowtide, typed, tmp_path):
    result = lowtide("train", "--find-lr", *typed, "--lr", "3")
    assert result.code == 0, result.err
    assert "Trying learning rates from 1e-05 to 1 with adalomo" in result.out
    assert "Recommended learning rate: " in result.out
    assert "held-out sequences fell from " in result.out
    assert "step 10/25  loss " in result.out
    files = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert files == ["out.find-lr.json", "out.find-lr.png"]
    assert (tmp_path / "runs" / "out.find-lr.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "runs" / "out.find-lr.json").read_text())
    assert found["config"]["optimizer"] == "adalomo"
    assert found["recommended"] == float(result.out.split("Recommended learning rate: ")[1].split()[0])

    # What it says to type next works as it is, and trains with that rate.
    command = shlex.split(result.out.splitlines()[-1])
    assert command[:2] == ["lowtide", "train"]
    assert "--find-lr" not in command
    done = lowtide(*command[1:], "--max-steps", "2")
    assert done.code == 0, done.err
    assert yaml.safe_load((tmp_path / "runs" / "out" / "config.yaml").read_text())["lr"] == found["recommended"]


def test_nothing_is_overwritten(lowtide, typed, tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    (folder / "out.find-lr.png").write_text("precious")
    (folder / "out.find-lr-2.json").write_text("precious too")
    assert lowtide("train", "--find-lr", *typed).code == 0
    assert (folder / "out.find-lr.png").read_text() == "precious"
    assert (folder / "out.find-lr-2.json").read_text() == "precious too"
    assert (folder / "out.find-lr-3.json").exists()
    assert (folder / "out.find-lr-3.png").exists()
    assert len(list(folder.iterdir())) == 4


def test_without_matplotlib_the_numbers_remain(lowtide, typed, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest)
    )
    result = lowtide("train", "--find-lr", *typed)
    assert result.code == 0, result.err
    assert "matplotlib is not installed" in result.out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["out.find-lr.json"]


def test_no_recommendation_is_exit_code_1(lowtide, typed, tmp_path, monkeypatch):
    monkeypatch.setattr(range_test, "default_range", lambda config: (1e-9, 1e-8))
    result = lowtide("train", "--find-lr", *typed)
    assert result.code == 1
    assert "No learning rate can be recommended.\nThe loss never fell" in result.out
    assert "Next:" not in result.out
    assert json.loads((tmp_path / "runs" / "out.find-lr.json").read_text())["recommended"] is None


def test_a_rate_that_is_not_trustworthy_says_so(lowtide, typed, monkeypatch):
    monkeypatch.setattr(range_test, "default_range", lambda config: (1e-4, 1e-2))
    result = lowtide("train", "--find-lr", *typed)
    assert result.code == 0
    assert "Take it as a first guess only:\n  The loss never diverged up to 0.01" in result.out


def test_ctrl_c_is_130_and_leaves_nothing(lowtide, typed, tmp_path, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(range_test._Sweep, "_step", interrupted)
    result = lowtide("train", "--find-lr", *typed)
    assert result.code == 130
    assert result.err == ["lowtide: error: interrupted"]
    assert not (tmp_path / "runs").exists()


def test_it_is_a_flag_and_no_setting(lowtide, typed, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("find_lr: true\n")
    result = lowtide("train", "--config", config, *typed)
    assert result.code == 2
    assert "unknown key 'find_lr'" in result.err[0]


def test_the_next_command_repeats_what_was_typed():
    from lowtide.cli import build_parser

    parser, _ = build_parser("train")
    words = "train --config a.yaml --find-lr --data 'x y' z --no-packing --trust-remote-code --lr 4 --rounding none"
    args = parser.parse_args(shlex.split(words))
    assert find_lr.next_command(args, 2e-3) == (
        "lowtide train --config a.yaml --data 'x y' z --no-packing --trust-remote-code --rounding None --lr 0.002"
    )


@pytest.mark.parametrize(
    ("output", "name"), [("runs/a/", "runs/a.find-lr.json"), ("a", "a.find-lr.json"), ("a.b", "a.b.find-lr.json")]
)
def test_names(output, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_lr.free_files(output)[1].as_posix() == name


def test_here_is_written_beside_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_lr.free_files(".")[1] == tmp_path.with_name(f"{tmp_path.name}.find-lr.json")
