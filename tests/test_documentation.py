"""What README.md and docs/ tell people to type works: README's commands and programs are run, those of docs/ are parsed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lowtide
from lowtide.cli import build_parser, main
from lowtide.models import load_model
from tiny_files import save_tiny_model, write_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")]
# In place of "...", which stands for the settings of the reader's run.
ELLIPSIS = "--model DIR --data train.jsonl --max-steps 2 --batch-size 4 --max-seq-len 32 --dtype float32 --device cpu"
# Downloads, or needs data that is not part of the project.
ONLY_PARSED = ("--lm-eval", "--data SuperGLUE")


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page):
    """The lines of a page's shell blocks that call lowtide, without their comments."""
    lines = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("lowtide ")]


def arguments(command):
    """Of a command, with "..." spelt out; an --output that is given counts, and none that is missing."""
    spelt = command.replace(" ... ", f" {ELLIPSIS} ").removesuffix(" ...")
    return shlex.split(spelt)[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page, capsys):
    for command in commands(page):
        words = arguments(command)
        parser, _ = build_parser(words[0])
        try:
            _, extra = parser.parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {command}: {capsys.readouterr().err}")
        assert extra == [], f"{page.name}: {command}"


def test_there_are_commands_to_look_at():
    assert sum(len(commands(page)) for page in PAGES) > 12


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder as README has it: the model in the present directory, and data."""
    monkeypatch.chdir(tmp_path)
    made = save_tiny_model(tmp_path / "made")
    for name in ("DIR_OR_HUB_ID_OR_GGUF", "DIR_OR_HUB_ID", "DIR"):
        shutil.copytree(made, tmp_path / name)
    write_task(tmp_path / "train.jsonl")
    return tmp_path


def test_the_commands_in_readme_run(desk, capfd):
    ran = []
    for number, command in enumerate(commands(ROOT / "README.md")):
        if any(part in command for part in ONLY_PARSED):
            continue
        words = arguments(command)
        if words[0] == "train" and "--config" not in words:
            if "--output" not in words:
                words += ["--output", f"runs/{number}"]
            shutil.rmtree(desk / words[words.index("--output") + 1], ignore_errors=True)
            words += [
                "--max-steps",
                "2",
                "--batch-size",
                "4",
                "--max-seq-len",
                "32",
                "--dtype",
                "float32",
                "--device",
                "cpu",
            ]
        words = [str(desk / "disk" / word[1:]) if word.startswith("/") else word for word in words]
        if words[0] == "generate":
            words += ["--max-new-tokens", "4"]  # the tiny model has a short context
        if words[0] == "plan":
            words += ["--device", "cpu"]
        assert main(words) == 0, f"{command}: {capfd.readouterr().err}"
        ran.append(words[0])
    assert set(ran) == {"train", "generate", "plan", "data"}
    assert (desk / "runs" / "first" / "model" / "config.json").is_file()


def test_the_program_of_the_quickstart_runs(desk):
    (program,) = blocks(ROOT / "docs" / "index.md", "python")
    exec(compile(program.replace("MODEL", "DIR"), "docs/index.md", "exec"), {})


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    assert ended.returncode == 0, ended.stderr
    page = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    for name in ("lowtide.fuse", "lowtide.AdaLomo", "lowtide.integrations.transformers.fuse_trainer"):
        assert f'id="{name}"' in page
    assert "Update every parameter inside the backward pass" in page


def test_the_program_in_readme_runs(desk):
    (program,) = blocks(ROOT / "README.md", "python")
    model = load_model("DIR", dtype=torch.float32).train()
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    ids = torch.randint(3, 100, (4, 8))
    scope = {"model": model, "loader": [{"input_ids": ids, "labels": ids}] * 2}

    class Scheduler:
        num_steps = 0

        def step(self):
            self.num_steps += 1

    scope["scheduler"] = Scheduler()
    exec(compile(program, "README.md", "exec"), scope)
    assert scope["scheduler"].num_steps == 2
    assert not all(torch.equal(param, before[name]) for name, param in model.named_parameters())
    opening = re.search(r'"""(.*?)"""', Path(lowtide.__file__).read_text(), re.DOTALL)[1]
    assert "engine.backward(loss)" in opening  # the docstring of the package shows the same loop
