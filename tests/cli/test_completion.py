"""Completion of the command line: bash completes for real; the scripts for zsh and fish hold the same and, where these are installed, work."""

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from lowtide.cli import COMMANDS, build_parser
from lowtide.cli.completion import _TASKS, SHELLS, all_options, bash, fish, zsh
from lowtide.data.superglue import TASKS

SCRIPTS = {"bash": bash, "zsh": zsh, "fish": fish}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A directory with the scripts, some files and a directory with a blank in its name."""
    here = tmp_path_factory.mktemp("completion")
    for shell, make in SCRIPTS.items():
        (here / f"script.{shell}").write_text(make(all_options()))
    for name in ("train one.jsonl", "training.jsonl"):
        (here / name).write_text("{}\n")
    (here / "runs").mkdir()
    return here


def completed(folder, *words):
    """What bash offers for the last word."""
    program = (
        'source script.bash; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _lowtide; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    command = ["bash", "--norc", "--noprofile", "-c", program, "bash", "lowtide", *words]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True, timeout=60)
    assert ended.stderr == ""
    return [line for line in ended.stdout.splitlines() if line]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tr"], ["train"]),
        (["train", "--optim"], ["--optimizer"]),
        (["train", "--optimizer", ""], ["adalomo", "lomo", "adamw", "sgd"]),
        (["train", "--optimizer", "=", "ad"], ["adalomo", "adamw"]),
        (["train", "--optimizer", "="], ["adalomo", "lomo", "adamw", "sgd"]),
        (["train", "--no-pack"], ["--no-packing"]),
        (["train", "--weights", ""], ["device", "cpu", "auto", "runs"]),
        (["train", "--data", "train"], ["train one.jsonl", "training.jsonl"]),
        (["train", "--data", "training.jsonl", "ru"], ["runs"]),
        (["train", "--output", "tr"], []),
        (["train", "--track", "tensorboard", "m"], ["mlflow"]),
        (["train", "--lr", ""], []),
        (["train", "--lr", "1", "--model", "r"], ["runs"]),
        (["eval", "--task", "superglue/w"], ["superglue/wic", "superglue/wsc"]),
        (["data", ""], ["preview"]),
        (["data", "preview", "--bad-records", "s"], ["skip"]),
        (["report", ""], ["runs"]),
        (["completion", ""], list(SHELLS)),
        (["unknown", "--op"], []),
    ],
)
def test_bash(folder, words, expected):
    assert completed(folder, *words) == expected


def test_all_commands_and_all_flags(folder):
    assert set(completed(folder, "")) == {*COMMANDS, "--help", "--version"}
    for name in COMMANDS:
        flags = {flag for flag in build_parser(name)[1][name].flags() if flag != "--"}
        assert set(completed(folder, name, "--")) == flags, name


def test_the_tab_key(folder):
    """A real bash on a terminal: what is typed, what Tab makes of it, and what the command gets."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(PS1="> ", TERM="dumb", INPUTRC="/dev/null", HISTFILE="/dev/null")
        os.execvp("bash", ["bash", "--norc", "--noprofile", "-i"])
    try:
        os.write(terminal, b"source script.bash; lowtide() { printf 'got:%s;' \"$@\"; echo end; }\n")
        os.write(terminal, b"lowtide tra\t--opti\tadal\t--data train\\ \t--outp\tru\t\n")
        seen = _read_until(terminal, "got:runs/;end")
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)
    assert "got:train;got:--optimizer;got:adalomo;got:--data;got:train one.jsonl;got:--output;got:runs/;end" in seen


def _read_until(terminal, text, limit_s=60):
    seen, end = "", time.monotonic() + limit_s
    while text not in seen and time.monotonic() < end:
        if select.select([terminal], [], [], 1)[0]:
            try:
                seen += os.read(terminal, 4096).decode(errors="replace")
            except OSError:
                break
    return seen


def test_nothing_heavy_is_imported():
    script = (
        "import sys\nfrom lowtide.cli import main\nassert main(['completion', 'bash']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules), 'heavy import'\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "complete -F _lowtide lowtide" in ended.stdout


def test_an_unknown_shell_is_refused(lowtide):
    result = lowtide("completion", "csh")
    assert result.code == 2 and "invalid choice: 'csh'" in result.err[0]


def test_the_tasks_are_those_there_are():
    assert set(_TASKS) == set(TASKS)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_the_same_flags(shell, folder):
    """Every flag, and quotes in pairs. Where the shell is installed, it reads its script, and fish completes."""
    lines = (folder / f"script.{shell}").read_text().splitlines()
    for name, options in all_options().items():
        start = (
            f"            {name})" if shell == "zsh" else f"complete -c lowtide -n '__fish_seen_subcommand_from {name}'"
        )
        if shell == "zsh":
            first = lines.index(start)
            own = lines[first : lines.index("                ;;", first)]
        else:
            own = [line for line in lines if line.startswith(start)]
        found = {word.split("=")[0].split("[")[0] for line in own for word in shlex.split(line.rstrip("\\"))}
        flags = [flag for option in options for flag in option.flags if flag.startswith("--")]
        wanted = flags if shell == "zsh" else [flag[2:] for flag in flags]
        assert wanted and set(wanted) <= found, name
    command = {"zsh": "-n script.zsh", "fish": "-c 'source script.fish; complete -C \"lowtide train --optimizer \"'"}[
        shell
    ]
    if shutil.which(shell):
        ended = subprocess.run([shell, *shlex.split(command)], cwd=folder, capture_output=True, text=True, check=True)
        words = [line.split("\t")[0] for line in ended.stdout.splitlines()]
        assert ended.stderr == "" and words == ([] if shell == "zsh" else ["adalomo", "adamw", "lomo", "sgd"])
