import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch
from model_helpers import tiny_tokenizer

from helpers import tiny_model
from lowtide.models.hub import save_model


@pytest.fixture
def saved(tmp_path):
    """A saved model and what it was saved from."""
    model = tiny_model("llama", torch.bfloat16, tie_word_embeddings=False)
    save_model(model, tiny_tokenizer(), tmp_path / "model")
    return tmp_path / "model", model
