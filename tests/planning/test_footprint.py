import pytest
import torch
from transformers import BertConfig, LlamaConfig, T5Config

from helpers import tiny_config, tiny_model
from lowtide.planning import num_parameters, weights_bytes

FAMILIES = ["llama", "qwen3", "gemma3", "gpt_neox", "gpt2", "mixtral", "qwen3_moe"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_built_model(family, dtype):
    model = tiny_model(family, dtype)
    config = tiny_config(family)
    assert num_parameters(config) == sum(param.numel() for param in model.parameters())
    assert weights_bytes(config, dtype) == sum(param.nbytes for param in model.parameters())


def test_tied_parameters_count_once():
    tied = num_parameters(tiny_config(tie_word_embeddings=True))
    untied = num_parameters(tiny_config(tie_word_embeddings=False))
    assert untied - tied == 97 * 32


def test_a_model_far_larger_than_any_memory_is_counted():
    config = LlamaConfig(
        hidden_size=16384,
        intermediate_size=53248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    # the published size of Llama 3.1 405B
    assert num_parameters(config) == 405_853_388_800
    assert weights_bytes(config, torch.bfloat16) == 2 * 405_853_388_800


def test_counting_leaves_the_config_and_the_random_state_alone():
    config = tiny_config()
    before, state = config.to_dict(), torch.get_rng_state()
    weights_bytes(config, torch.bfloat16)
    assert config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_a_config_without_a_causal_model_is_refused():
    with pytest.raises(ValueError):
        num_parameters(T5Config())
    assert num_parameters(BertConfig(num_hidden_layers=1, is_decoder=True)) > 0
