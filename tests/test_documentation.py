"""What README.md and docs/ tell people to type works: every command and every program is run, on a tiny model.

What is not run stands in ``NOT_RUN`` with its reason; a command that is in neither is an error of this test.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser

import lowtide
from lowtide.cli import COMMANDS, build_parser, main
from lowtide.models import load_model, load_tokenizer, save_model
from lowtide.training import range_test
from superglue_files import OFFICIAL, write_rte
from tiny_files import save_tiny_model, write_jsonl, write_task

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")]

# The beginning of a line of a shell block, and why it is not run.
NOT_RUN = {
    "make demo": "trains a model of 135M parameters for minutes; `lowtide demo` below is the same with a tiny one",
    "make test": "is what runs this",
    ". .venv/bin/activate": "is for a shell that stays",
    "pip install .": "installs; tests/test_packaging.py builds what it installs",
    "git clone": "needs a network",
    "#!/bin/bash": "the head of a script for SLURM",
    "#SBATCH": "needs a cluster with SLURM",
    "head=$(scontrol": "needs a cluster with SLURM",
    "srun torchrun": "needs a cluster with SLURM; tests/sharded/test_torchrun.py has two agents on one machine",
    "pytest -m gpu": "needs a GPU",
    "python benchmarks/gpu/run.py": "needs a GPU; tests/gpu/test_runner.py runs its rehearsal",
    "lowtide eval --model runs/first/model --lm-eval": "downloads; tests/cli/test_eval.py runs a task of its own",
    "lowtide train --model M --data D --output runs/b --track wandb mlflow": "these packages are not installed here; "
    "tests/training/test_trackers.py has stand-ins for them",
}
# Programs that are run where more can be said of them.
RUN_ELSEWHERE = {
    "from-lomo-optim.md": "tests/integrations/test_migration_page.py",
    "transformers.md": "tests/integrations/test_documentation.py",
}
# What stands for something else, and what is put in its place. Checkpoints of a run of three steps are those of steps 1 and 2.
PUT_IN_PLACE = {
    "...": "--model DIR --data train.jsonl --output runs/any",
    "15m": "1",
    "step-00000400": "step-00000001",
    "org/name": "",  # a data set of the hub
    "/fast/disk/run1": "disk/run1",
}
# What torchrun puts in the environment of a process that has no others.
ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
MODELS = ("DIR", "DIR_OR_HUB_ID", "DIR_OR_HUB_ID_OR_GGUF", "MODEL", "M", "my-model")
# Smaller than what the page says, so that it takes seconds. Settings of a file cannot be changed, and need not be.
SMALL = {
    "train": "--max-steps 3 --batch-size 4 --max-seq-len 32 --dtype float32 --device cpu --data-cache none",
    "generate": "--max-new-tokens 4 --device cpu",  # the tiny model has a short context
    "plan": "--device cpu",
    "eval": "--limit 1 --device cpu --max-seq-len 128",
    "demo": "--model DIR --data train.jsonl --steps 2 --batch-size 4 --no-adamw",
    "doctor": "--no-measure",
}


def all_blocks(page):
    """(language, text) of every block between fences."""
    parts = re.split(r"^```(.*)\n", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return list(zip(parts[1::4], parts[2::4], strict=True))


def blocks(page, wanted):
    return [text for language, text in all_blocks(page) if language == wanted]


def lines(page):
    """Of a page's shell blocks, without their comments."""
    found = "".join(blocks(page, "sh")).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in found if line.strip()]


def not_run(line):
    return any(line.startswith(beginning) for beginning in NOT_RUN)


def of_one_process(line):
    """What every process runs that torchrun starts, whose own options are looked at; tests/sharded/test_torchrun.py starts several."""
    before, _, after = line.partition(" -m lowtide ")
    options = get_args_parser().parse_args([*shlex.split(before)[1:], "-m", "lowtide"])
    assert options.module and options.training_script == "lowtide"
    return f"lowtide {after}"


def words_of(line):
    """The arguments of a command, with everything in place."""
    if line.startswith("torchrun "):
        line = of_one_process(line)
    words = shlex.split(line.split(" > ")[0])[1:]
    for before, after in PUT_IN_PLACE.items():
        words = [
            part for word in words for part in (after.split() if word == before else [word.replace(before, after)])
        ]
    return words


def smaller(words):
    """The same command for a tiny model."""
    if words[0] == "train" and "--config" in words:
        return words
    more = SMALL.get(words[0], "")
    if "--task" in words:  # its prompts are longer
        more = more.replace("--max-seq-len 32", "--max-seq-len 128")
    return [*words, *more.split()]


def test_nothing_hides_in_a_block_of_another_language():
    for page in PAGES:
        assert {language for language, _ in all_blocks(page)} <= {"sh", "python"}, page.name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_understood(page, capsys):
    """As it stands, also where it is not run."""
    for line in lines(page):
        if not line.startswith(("lowtide ", "torchrun ")):
            assert not_run(line), f"{page.name}: {line} is neither run nor in NOT_RUN"
            continue
        words = words_of(line)
        try:
            _, extra = build_parser(words[0])[0].parse_known_args(words)
        except SystemExit:
            pytest.fail(f"{page.name}: {line}: {capsys.readouterr().err}")
        assert extra == [], f"{page.name}: {line}"


def test_there_is_nothing_too_much_in_the_list_of_what_is_not_run():
    every = [line for page in PAGES for line in lines(page)]
    assert len(every) > 30
    for beginning in NOT_RUN:
        assert any(line.startswith(beginning) for line in every), beginning


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the pages take for granted: models, data, and two runs."""
    folder = tmp_path_factory.mktemp("desk")
    made = save_tiny_model(folder / "made", max_position_embeddings=512)
    for name in MODELS:
        shutil.copytree(made, folder / name)
    write_task(folder / "train.jsonl")
    for directory in ("D", "chats"):
        (folder / directory).mkdir()
        write_task(folder / directory / "train.jsonl")
    (folder / "train.csv").write_text("prompt,completion\n" + "say a:, aa\nsay b:, bb\n" * 20)
    (write_rte(folder / "SuperGLUE") / "COPA").mkdir()
    for name in ("train", "val"):
        write_jsonl(folder / "SuperGLUE" / "COPA" / f"{name}.jsonl", [OFFICIAL["copa"]] * 4)
    with contextlib.chdir(folder):
        for name in ("first", "second"):
            words = f"train --model DIR --data train.jsonl --output runs/{name} {SMALL['train']} --save-every 1"
            assert main([*words.split(), "--samples", "1"]) == 0
        settings = (folder / "runs" / "first" / "config.yaml").read_text()
        (folder / "run.yaml").write_text(settings.replace("runs/first", "runs/of-a-file"))
    return folder


@pytest.fixture
def desk(material, tmp_path, monkeypatch):
    """A folder of its own for every test."""
    shutil.copytree(material, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    monkeypatch.setattr(range_test, "STEPS_PER_DECADE", 5)
    monkeypatch.setattr("sys.stdin", io.StringIO("say a:\n"))  # of the one who chats
    return tmp_path / "desk"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(map(str.strip, lines(page)))], ids=lambda page: page.name
)
def test_every_command_runs(page, desk, capfd):
    num_run = 0
    for line in lines(page):
        if not_run(line):
            continue
        words = smaller(words_of(line))
        if words[0] == "train" and "--config" not in words:
            last = len(words) - words[::-1].index("--output")  # of several the last one counts
            shutil.rmtree(desk / words[last], ignore_errors=True)
        assert main(words) == 0, f"{page.name}: {line}: {capfd.readouterr().err}"
        num_run += 1
    assert num_run or all(map(not_run, lines(page)))
    assert (desk / "runs" / "first" / "model" / "config.json").is_file()


def test_every_flag_that_is_named_is_one_of_some_command():
    """Also in the middle of a sentence."""
    known = {flag for name in COMMANDS for flag in build_parser(name)[1][name].flags()} | {"--help", "--version"}
    others = {"--again", "--results", "--rehearse"}  # of benchmarks/gpu/run.py
    for page in PAGES:
        for span in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
            if not span.startswith(("lowtide ", "--")):
                continue  # another program's
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", span):
                assert flag in known | others, f"{page.name}: {span}"


# Programs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_every_program_runs(page, desk, monkeypatch):
    """One after the other, with what the page takes for granted: modules, a model and its tokenizer."""
    if page.name in RUN_ELSEWHERE:
        assert page.name in (ROOT / RUN_ELSEWHERE[page.name]).read_text(encoding="utf-8")
        return
    for name, value in ALONE.items():  # a process group of one
        monkeypatch.setenv(name, value)
    model = load_model("DIR", dtype=torch.float32).train()
    ids = torch.randint(3, 100, (4, 8))
    batches = [{"input_ids": ids, "labels": ids}] * 2
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    scope = {
        "lowtide": lowtide, "torch": torch, "model": model, "loader": batches, "load_model": load_model, "save_model": save_model,
        "tokenizer": load_tokenizer("DIR"), "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
    }  # fmt: skip
    for program in blocks(page, "python"):
        for before, after in PUT_IN_PLACE.items():
            program = program if before == "..." else program.replace(before, after)
        exec(compile(program.replace('"MODEL"', '"DIR"'), page.name, "exec"), scope)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


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
