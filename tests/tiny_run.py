"""A tiny saved model and settings that train it in a second."""

import pytest

from lowtide.training import TrainConfig
from tiny_files import save_tiny_model, write_task


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def make_config(model_dir, tmp_path):
    """Settings for the tiny model and task; anything can be changed."""

    def make(**changes):
        defaults = {
            "model": str(model_dir),
            "data": [str(write_task(tmp_path / "task.jsonl"))],
            "output": str(tmp_path / "out"),
            "optimizer": "adalomo",
            "lr": 0.2,
            "max_steps": 6,
            "batch_size": 8,
            "max_seq_len": 32,
            "dtype": "float32",
            "eval_fraction": 0.1,
            "device": "cpu",
            "samples": 0,
        }
        return TrainConfig(**(defaults | changes))

    return make
