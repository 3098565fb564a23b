"""Writes small GGUF files for tests, with the package gguf and its table of tensor names: not with code of lowtide."""

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers

ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3", "gemma2": "GEMMA2", "mistral": "LLAMA"}


def byte_vocabulary():
    """(tokens, token types, merges) of a byte-level vocabulary with a few words, two control tokens and a plain one."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merged = ["he", "ll", "hell", "hello", "Ġhello", "20", "202", "2024"]
    merges = ["h e", "l l", "he ll", "hell o", "Ġ hello", "2 0", "20 2", "202 4"]
    tokens = ["<|end|>", "<|start|>", "<tool>", *alphabet, *merged]
    kinds = [3, 3, 4] + [1] * (len(tokens) - 3)
    return tokens, kinds, merges


def write_tokenizer(writer, pre="smollm", template=None, **flags):
    tokens, kinds, merges = byte_vocabulary()
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)
    if template:
        writer.add_chat_template(template)
    for name, value in flags.items():
        getattr(writer, name)(value)


def permute(weight, num_heads):
    """llama.cpp's order of the rows of queries and keys: first and second half of a head interleaved."""
    halves = weight.reshape(num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path, model, architecture, kind="F32", skip=(), extra=(), **tokenizer):
    """Write ``model``; matrices are stored as ``kind`` (F32, F16, BF16, Q8_0), vectors as F32."""
    config, name = model.config, ARCHITECTURES[architecture]
    written = "llama" if name == "LLAMA" else architecture
    writer = gguf.GGUFWriter(path, written)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if architecture in ("qwen3", "gemma2"):
        writer.add_key_length(config.head_dim)
    if architecture == "gemma2":
        writer.add_sliding_window(config.sliding_window)
    write_tokenizer(writer, **tokenizer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name), config.num_hidden_layers)
    for full_name, tensor in model.state_dict().items():
        stem, _, suffix = full_name.rpartition(".")
        if (full_name == "lm_head.weight" and config.tie_word_embeddings) or full_name in skip:
            continue
        values = tensor.float().numpy()
        if written == "llama" and "q_proj" in stem:
            values = permute(values, config.num_attention_heads)
        if written == "llama" and "k_proj" in stem:
            values = permute(values, config.num_key_value_heads)
        if architecture == "gemma2" and "norm" in stem:
            values = values + 1
        _add(writer, f"{names.get_name(stem)}.{suffix}", values, kind if values.ndim > 1 else "F32")
    for extra_name, shape in extra:
        _add(writer, extra_name, np.ones(shape, np.float32), "F32")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _add(writer, name, values, kind):
    quantised = gguf.GGMLQuantizationType[kind]
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), quantised), raw_dtype=quantised)


def rounded(model, kind):
    """The model's own weights as they are after being stored as ``kind``."""
    expected = {}
    for name, tensor in model.state_dict().items():
        values = tensor.float()
        if values.ndim > 1:
            quantised = gguf.GGMLQuantizationType[kind]
            values = torch.from_numpy(
                np.array(gguf.dequantize(gguf.quantize(values.numpy(), quantised), quantised))
            ).float()
        expected[name] = values
    return expected
