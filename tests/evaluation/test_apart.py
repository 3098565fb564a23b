"""Packed rows: which architectures keep their documents apart, and that what is said of them is true."""

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from lowtide.data import Batches, Example
from lowtide.evaluation import evaluate_loss, keeps_documents_apart

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2,
}  # fmt: skip
GPT = {"vocab_size": 64, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
HEADS = {"head_dim": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
APART = {
    "LlamaConfig": SIZES,
    "GPT2Config": GPT,
    "GPTNeoXConfig": SIZES,
    "MistralConfig": {**SIZES, "sliding_window": 4},
    "Qwen3Config": {**SIZES, **HEADS},
    "Qwen3MoeConfig": {**SIZES, **HEADS, **EXPERTS},
    "Gemma3TextConfig": {**SIZES, **HEADS, "sliding_window": 4},
    "Phi3Config": {**SIZES, "pad_token_id": 0},
    "Olmo2Config": SIZES,
}
MIXED = {
    "GptOssConfig": {**SIZES, **HEADS, "num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 4},
    "OPTConfig": {**SIZES, "ffn_dim": 48, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "FalconConfig": {**SIZES, "alibi": False},
    "BloomConfig": {"vocab_size": 64, "hidden_size": 32, "n_head": 4, "n_layer": 2},
    "MptConfig": {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "MambaConfig": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    "Qwen3NextConfig": {**SIZES, **HEADS, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "Lfm2Config": {**SIZES, "layer_types": ["conv", "full_attention"]},
}  # fmt: skip


def make(name, dtype=torch.float32):
    torch.manual_seed(0)
    config = getattr(transformers, name)(**(APART | MIXED)[name])
    return AutoModelForCausalLM.from_config(config).to(dtype).train()


def loss(model, packing):
    lengths = (7, 5, 9, 4, 6, 8)
    examples = [Example(ids := list(range(i, i + n)), ids) for i, n in zip(range(1, 60, 9), lengths, strict=False)]
    batches = Batches(examples, batch_size=2, max_seq_len=20, pad_token_id=0, packing=packing, seed=0)
    assert batches.shares_rows == packing
    model.config.use_cache = False
    return evaluate_loss(model, batches.epoch(0)).loss


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", APART)
def test_models_that_keep_documents_apart(name, dtype):
    model, state = make(name, dtype), torch.get_rng_state()
    assert keeps_documents_apart(model, range(1, 64))
    assert keeps_documents_apart(model, range(1, 64), one_row_at_a_time=True)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    if dtype == torch.float32:
        assert loss(model, True) == pytest.approx(loss(model, False), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_documents(name, dtype):
    """If one of these begins to keep them apart in a later transformers, so much the better: move it up."""
    assert not keeps_documents_apart(make(name, dtype), range(1, 64))


def test_what_is_found_is_what_packing_does():
    model = make("GptOssConfig")
    assert abs(loss(model, True) / loss(model, False) - 1) > 1e-5


def test_a_model_without_positions_cannot_tell_documents_apart():
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = torch.nn.Embedding(8, 8)

        def forward(self, input_ids):
            raise AssertionError("is not asked")

    assert not keeps_documents_apart(Plain(), range(8))


def test_positions_that_do_not_begin_again_are_found():
    """A document that sees nothing of the one before it, but takes its positions from the row."""
    model = make("GPT2Config")
    model.transformer.wpe.register_forward_pre_hook(
        lambda module, args: (torch.arange(args[0].shape[1]).expand_as(args[0]),)
    )
    assert not keeps_documents_apart(model, range(1, 64))


def test_nothing_is_said_of_a_model_that_is_broken():
    model = make("LlamaConfig")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    assert keeps_documents_apart(model, range(1, 64))


def test_one_token_is_not_enough():
    with pytest.raises(ValueError, match="at least two different tokens"):
        keeps_documents_apart(make("LlamaConfig"), [3, 3])
