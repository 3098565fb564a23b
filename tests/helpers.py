"""Helpers of the tests: tolerances in one place, tiny models of real architectures, comparisons."""

import copy

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

# Largest absolute difference allowed where the arithmetic is the same but for the order of sums; by dtype, on the CPU.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}
VOCAB_SIZE = 97


def tiny_config(family: str = "llama", **changes):
    """A random model of a real architecture, a few thousand parameters."""
    import transformers

    common = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        return transformers.LlamaConfig(**{**common, "tie_word_embeddings": True, **changes})
    if family == "qwen3":
        return transformers.Qwen3Config(**{**common, "head_dim": 8, **changes})
    if family == "gemma2":
        return transformers.Gemma2Config(**{**common, "head_dim": 8, "sliding_window": 4, **changes})
    if family == "gemma3":
        return transformers.Gemma3TextConfig(**{**common, "head_dim": 8, "sliding_window": 4, **changes})
    if family == "gpt_neox":
        common.pop("num_key_value_heads")
        return transformers.GPTNeoXConfig(**{**common, "attention_bias": False, **changes})
    if family == "gpt2":
        common.pop("num_key_value_heads")
        return transformers.GPT2Config(
            n_embd=32,
            n_layer=3,
            n_head=4,
            vocab_size=VOCAB_SIZE,
            n_positions=64,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **changes,
        )
    if family == "qwen3_moe":
        experts = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        return transformers.Qwen3MoeConfig(**{**common, **experts, "decoder_sparse_step": 1, **changes})
    if family == "mixtral":
        return transformers.MixtralConfig(**{**common, "num_local_experts": 4, "num_experts_per_tok": 2, **changes})
    if family == "cohere":
        return transformers.CohereConfig(**{**common, "logit_scale": 0.25, **changes})
    if family == "granite":
        return transformers.GraniteConfig(**{**common, "logits_scaling": 3.0, **changes})
    raise ValueError(family)


def tiny_model(family: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """A model from :func:`tiny_config`, in training mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype).train()


def dropout_model():
    """GPT-2 with dropout everywhere and tied embeddings."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    dropout = {"attn_pdrop": 0.2, "embd_pdrop": 0.2, "resid_pdrop": 0.2}
    config = GPT2Config(
        n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB_SIZE, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **dropout
    )  # fmt: skip
    return GPT2LMHeadModel(config).train()


def tiny_batch(seed: int = 0, batch_size: int = 8, seq_len: int = 10, padded: bool = True):
    """Random tokens; labels begin late, and two rows are padded to the right."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, VOCAB_SIZE, (batch_size, seq_len), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    if padded:
        attention_mask[0, 6:] = 0
        attention_mask[-1, 4:] = 0
    labels = input_ids.masked_fill(attention_mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def twin(model):
    """An independent copy with the same weights."""
    return copy.deepcopy(model)


def largest_difference(first, second):
    """Over all parameters of two modules."""
    pairs = zip(first.parameters(), second.parameters(), strict=True)
    return max((a.detach().float() - b.detach().float()).abs().max().item() for a, b in pairs)


def same_weights(first, second):
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


class Snapshot:
    """The weights of a module as they are now; also of a fused one, which cannot be copied."""

    def __init__(self, module):
        self._weights = [parameter.detach().clone() for parameter in module.parameters()]

    def parameters(self):
        return iter(self._weights)


class FlopCount(TorchDispatchMode):
    """Floating-point operations of matrix products that are computed; unlike torch's own counter it installs no hooks.

    Attributes:
        total: so far.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket in flop_registry:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out
