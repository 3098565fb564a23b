"""Shapes of a step that the tests of this folder share."""

import pytest
import torch

from helpers import tiny_config
from lowtide.models import find_blocks
from lowtide.planning import StepShape


@pytest.fixture
def tiny_shape():
    """Makes the step of a tiny model; keywords of StepShape, and ``family`` and ``changes`` of its config."""

    def make(family="llama", changes=None, **options):
        defaults = {"dtype": torch.float32, "batch_size": 4, "seq_len": 16, "masked": False}
        config = tiny_config(family, **(changes or {}))
        return StepShape(config, find_blocks=find_blocks, **{**defaults, **options})

    return make


@pytest.fixture(scope="session")
def llama_7b():
    """The shape of the LOMO paper's Table 1: LLaMA-7B, 8 sequences of 512 tokens, bfloat16."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32, vocab_size=32000,
        tie_word_embeddings=False,
    )  # fmt: skip
    return StepShape(
        config, find_blocks=find_blocks, dtype=torch.bfloat16, batch_size=8, seq_len=512, masked=False, device="cuda"
    )
