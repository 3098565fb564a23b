import subprocess
import sys

import pytest

from lowtide import cli
from lowtide.cli import COMMANDS, main


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["train", "--help"], ["generate", "--help"], ["data", "--help"], []]
)
def test_help_does_not_wait_for_torch(arguments):
    script = (
        "import sys\nfrom lowtide.cli import main\n"
        f"try:\n    main({arguments})\nexcept SystemExit as e:\n    assert e.code == 0\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "lowtide" in done.stdout


def test_the_list_of_commands(capsys):
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert "examples:" in text


def test_python_dash_m():
    done = subprocess.run([sys.executable, "-m", "lowtide", "tarin"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "lowtide: error: unknown command 'tarin' (did you mean train?); see lowtide --help\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["zzz"], "unknown command 'zzz'; see lowtide --help"),
        (["--verison"], "unknown flag --verison (did you mean --version?); see lowtide --help"),
        (
            ["train", "--btach-size=3"],
            "unknown flag --btach-size (did you mean --batch-size?); see lowtide train --help",
        ),
        (
            ["train", "data.jsonl"],
            "unexpected argument 'data.jsonl'; every setting is a flag, see lowtide train --help",
        ),
        (
            ["train", "--batch-siz", "3"],
            "unknown flag --batch-siz (did you mean --batch-size?); see lowtide train --help",
        ),
        (["train", "--seed", "x"], "argument --seed: expected a whole number, got 'x'"),
        (["train", "--model", "m"], "data is missing: give --data, or data in a file for --config"),
        (["generate"], "the following arguments are required: --model"),
    ],
)
def test_wrong_usage_is_one_line(lowtide, arguments, message):
    result = lowtide(*arguments)
    assert (result.code, result.out) == (2, "")
    assert result.err == [f"lowtide: error: {message}"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("wrong\n  in  two lines"), 2, "wrong in two lines"),
        (FileNotFoundError("no such"), 2, "no such"),
        (FileExistsError("full"), 2, "full"),
        (MemoryError("too big"), 1, "too big"),
        (MemoryError(), 1, "MemoryError"),
        (PermissionError("not yours"), 1, "not yours"),
        (RuntimeError("broken"), 1, "broken (LOWTIDE_DEBUG=1 shows where)"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_what_fails_is_one_line_and_an_exit_code(lowtide, monkeypatch, error, code, line):
    def fail(arguments):
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    result = lowtide("train")
    assert result.code == code
    assert result.err == [f"lowtide: error: {line}"]


def test_a_bug_keeps_its_traceback(lowtide, monkeypatch):
    monkeypatch.setattr(cli, "_run", lambda arguments: {}["x"])
    with pytest.raises(KeyError):
        lowtide("train")


def test_debugging_prints_the_traceback(monkeypatch, capsys):
    monkeypatch.setenv("LOWTIDE_DEBUG", "1")
    assert main(["zzz"]) == 2
    assert "Traceback" in capsys.readouterr().err
