"""Models and tokenizers by name: a Hugging Face directory, a model on its hub, or a GGUF file; and saving them."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..log import get_logger
from ..planning import device_available_bytes, weights_bytes
from ..units import format_bytes
from .checkpoint import check_directory, clear_errors, first_line, weight_files
from .gguf import gguf_config, load_gguf, open_gguf, refusing_damage
from .gguf_tokenizer import load_gguf_tokenizer
from .lazy import lazy_model
from .lora import ADAPTER_FOLDER, has_adapters, merge_saved
from .saving import save_model

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

__all__ = ["load_config", "load_model", "load_tokenizer", "parse_dtype", "save_model", "set_attention"]

_logger = get_logger(__name__)

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
# "gpt2" or "owner/name", as huggingface_hub accepts it.
_HUB_ID = re.compile(r"(?!.*(--|\.\.))[\w](?:[\w.-]*[\w])?(/[\w](?:[\w.-]*[\w])?)?", re.ASCII)


def parse_dtype(name: str) -> torch.dtype:
    """The dtype that "float32", "bfloat16", "float16" or "fp32", "bf16", "fp16" stand for.

    Raises:
        ValueError: it is none of these.
    """
    if name not in _DTYPES:
        raise ValueError(f"unknown dtype {name!r}; use one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_model(
    name: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cpu",
    trust_remote_code: bool = False,
    lazy: bool = False,
    merge_adapters: bool = True,
) -> PreTrainedModel:
    """A causal language model with its weights in ``dtype`` on ``device``, in evaluation mode.

    The weights are never held in another dtype as a whole. On the CPU, weights that are stored in ``dtype`` are mapped
    from their file, copy on write: training them does not change the file, but the file must not change either.

    Args:
        name: a Hugging Face directory, a model on the hub, or a ``.gguf`` file.
        dtype: of the weights.
        device: a torch device.
        trust_remote_code: run Python code that comes with the model.
        lazy: leave the weights in their files until ``fuse(..., weights=...)`` gives them a home, so that the model may be
            larger than the memory. Where that is not possible (GGUF files, converted checkpoints), load them all the same.
        merge_adapters: a checkpoint of a run with LoRA has its adapters beside the weights, in ``adapter/``: merge them, so that the
            model is the one that was trained. Such a model is never lazy.

    Raises:
        FileNotFoundError: there is no such model, or a part of it is missing.
        ConnectionError: the hub cannot be reached.
        ValueError: the model cannot be used: damaged, pickled, quantised or incomplete weights, or no causal language
            model.
        MemoryError: the weights need more memory than the device has available.
        ModuleNotFoundError: adapters are to be merged, and peft is not installed.
    """
    name = os.fspath(name)
    adapters: Path | None = None
    if _is_gguf(name):
        header = open_gguf(name)
        config = gguf_config(header)
        _check_memory(name, config, dtype, device, trust_remote_code)
        model, info = load_gguf(header, config, dtype)
        model.to(device)  # type: ignore[arg-type]
    else:
        source = _source(name)
        if isinstance(source, Path):
            check_directory(source)
            if merge_adapters and has_adapters(source / ADAPTER_FOLDER):
                adapters = source / ADAPTER_FOLDER
        config = _load_config(name, source, trust_remote_code)
        if (
            lazy
            and adapters is None
            and (unloaded := _leave_unloaded(name, source, config, dtype, trust_remote_code)) is not None
        ):
            return unloaded
        _check_memory(name, config, dtype, device, trust_remote_code)
        model, info = _load_weights(name, source, config, dtype, device, trust_remote_code)
    _check_complete(name, info)
    return model if adapters is None else merge_saved(model, adapters)


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Choose how a model computes attention.

    Args:
        model: the model.
        name: as transformers has it: "sdpa", "eager", "flash_attention_2", ...

    Raises:
        ValueError: the model has no such implementation, or it is not installed.
    """
    try:
        model.set_attn_implementation(name)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"attention {name} cannot be used: {first_line(error)}; leave it out, or install it"
        ) from error


def load_config(name: str, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config of a model, without a look at its weights.

    Args:
        name: as for :func:`load_model`, or a config.json.
        trust_remote_code: run Python code that comes with the model.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: as for :func:`load_model`.
    """
    name = os.fspath(name)
    if _is_gguf(name):
        return gguf_config(open_gguf(name))
    path = Path(name).expanduser()
    source = path if path.suffix == ".json" and path.is_file() else _source(name)
    return _load_config(name, source, trust_remote_code)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Args:
        name: as for :func:`load_model`.
        trust_remote_code: run Python code that comes with the tokenizer.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer.
        ConnectionError: the hub cannot be reached.
        ValueError: the tokenizer cannot be read.
    """
    from transformers import AutoTokenizer

    name = os.fspath(name)
    if _is_gguf(name):
        header = open_gguf(name)
        with refusing_damage(header.path):
            return load_gguf_tokenizer(header)
    source = _source(name)
    if isinstance(source, Path) and not any(
        (source / file).is_file()
        for file in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    ):
        _refuse_other_directories(source)
        raise FileNotFoundError(
            f"model directory {source} has no tokenizer (tokenizer.json, or tokenizer.model); copy it there from the "
            "model it was made from"
        )
    with clear_errors(name, source, "tokenizer"):
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=trust_remote_code)


def _refuse_other_directories(directory: Path) -> None:
    """
    Raises:
        FileNotFoundError: it is no model's.
    """
    if (directory / "config.json").is_file():
        return
    inside = next((name for name in ("model", "training/model") if (directory / name / "config.json").is_file()), None)
    hint = f"; did you mean {directory / inside}?" if inside else ": give one that transformers has saved"
    raise FileNotFoundError(f"{directory.absolute()} is not the directory of a model, it has no config.json{hint}")


def _is_gguf(name: str) -> bool:
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def _source(name: str) -> Path | str:
    """The directory, or the hub id.

    Raises:
        FileNotFoundError: it is neither.
        ConnectionError: the hub cannot be reached to find out.
        ValueError: it is a file, or empty.
    """
    if not name.strip():
        raise ValueError("the name of the model is empty; give a directory, a name on the hub or a .gguf file")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model {name} is a file, and of files only .gguf can be opened; give the directory it is in")
    if _HUB_ID.fullmatch(name) is None:
        raise FileNotFoundError(
            f"model {name} does not exist: there is no such directory, and it is no name on the hub"
        )
    _ask_hub(name)
    return name


def _ask_hub(name: str) -> None:
    """See that the hub has this model, unless it was downloaded before.

    Without this, transformers tries again for most of a minute where there is no network, and says so every time.
    """
    from huggingface_hub import HfApi, try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return
    with clear_errors(name, name, "model"):
        try:
            HfApi().model_info(name, timeout=10)
        except (OSError, ValueError):
            raise
        except Exception as error:  # those of the library it speaks HTTP with, which changes from version to version
            raise ConnectionError(first_line(error)) from error


def _load_config(name: str, source: Path | str, trust_remote_code: bool) -> PreTrainedConfig:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with clear_errors(name, source, "config"):
        config = AutoConfig.from_pretrained(str(source), trust_remote_code=trust_remote_code)
        if not isinstance(config.architectures or [], list) or not all(
            isinstance(e, str) for e in config.architectures or []
        ):
            raise ValueError(f"architectures must be a list of names, got {config.architectures!r}")
    custom = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if custom and not trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{name} comes with Python code of its own; if you trust it, allow it with trust_remote_code")
    # "BertForMaskedLM" loads as a causal model without complaint, and is none.
    made_as = [each for each in config.architectures or [] if re.search("For(?!CausalLM|ConditionalGeneration)", each)]
    if not custom and (type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or config.is_encoder_decoder or made_as):
        kind = ", ".join(config.architectures or []) or config.model_type
        raise ValueError(f"{name} is a {kind}, not a causal language model, which is what lowtide trains")
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config
        method = method.get("quant_method", "?") if isinstance(method, dict) else "?"
        raise ValueError(
            f"the weights of {name} are quantised ({method}), so they cannot be trained; give the unquantised model"
        )
    return config


def _check_memory(
    name: str, config: PreTrainedConfig, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> None:
    with clear_errors(name, Path(name), "config"):
        needed = weights_bytes(config, dtype, trust_remote_code=trust_remote_code)
    available = device_available_bytes(device)
    if needed > available:
        smaller = "a smaller model, or bfloat16" if dtype == torch.float32 else "a smaller model"
        where = f"on {device}" if torch.device(device).type == "cuda" else "on this machine"
        raise MemoryError(
            f"{name} needs {format_bytes(needed)} for the weights in {str(dtype).removeprefix('torch.')}, and "
            f"{format_bytes(available)} is available {where}; use {smaller}, or free memory"
        )


def _load_weights(
    name: str, source: Path | str, config: PreTrainedConfig, dtype: torch.dtype, device: str, trust_remote_code: bool
) -> tuple[PreTrainedModel, dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    # With a device map each tensor goes straight to its device.
    placement = {} if torch.device(device).type == "cpu" else {"device_map": {"": device}}
    auto_class: Any = AutoModelForCausalLM
    with clear_errors(name, source, "model"):
        return auto_class.from_pretrained(
            str(source),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **placement,
        )


def _leave_unloaded(
    name: str, source: Path | str, config: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool
) -> PreTrainedModel | None:
    if isinstance(source, str):
        from huggingface_hub import snapshot_download

        with clear_errors(name, source, "model"):
            source = Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
        check_directory(source)
    with clear_errors(name, source, "model"):
        return lazy_model(source, weight_files(source), config, dtype, trust_remote_code)


def _check_complete(name: str, info: dict[str, Any]) -> None:
    """transformers fills weights that are missing with random numbers, and does little more than mention it."""
    missing = sorted(info["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} of the model's weights, the first is {missing[0]}; the checkpoint is "
            "incomplete or was made for another task"
        )
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        _logger.warning(
            "%s holds %d weights that the model has no use for, the first is %s", name, len(unexpected), unexpected[0]
        )
