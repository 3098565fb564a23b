"""A tiny saved model, its task, and the command line called in this process."""

from types import SimpleNamespace

import pytest

from lowtide.cli import main
from tiny_files import save_tiny_model, write_task


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def task(tmp_path):
    return write_task(tmp_path / "task.jsonl")


@pytest.fixture
def lowtide(capfd, monkeypatch):
    """Call the command line; returns exit code, standard output and the lines of standard error."""
    monkeypatch.delenv("LOWTIDE_DEBUG", raising=False)

    def call(*arguments):
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return SimpleNamespace(code=code, out=out, err=err.splitlines())

    return call
