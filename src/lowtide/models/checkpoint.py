"""Clear refusals: looking at a model directory before it is loaded, and one line for what goes wrong when it is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_GET_LOCAL = "give a local directory with the model instead"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def check_directory(directory: Path) -> None:
    """See that a directory is a Hugging Face model with whole safetensors files.

    Raises:
        FileNotFoundError: there is no config.json, or there are no weights, or a shard of them is missing.
        ValueError: there are only pickled weights, or a file is damaged.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"model directory {directory} has no config.json{_hint(directory)}")
    for path in weight_files(directory):
        _check_safetensors(path)


@contextmanager
def clear_errors(name: str, source: Path | str, what: str) -> Iterator[None]:
    """Say in one line what transformers and huggingface_hub say in many, and of which model."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # a config that nobody foresaw fails anywhere in transformers, in any way
        causes: list[BaseException] = [error]
        cause: BaseException = error
        while (cause := cause.__cause__ or cause.__context__) and cause not in causes:  # type: ignore[assignment]
            causes.append(cause)
        reason = first_line(error)
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"{name} comes with Python code of its own; if you trust it, allow it with trust_remote_code"
            ) from error
        if isinstance(source, Path):
            raise ValueError(f"the {what} of {name} cannot be loaded: {reason}") from error
        if any(isinstance(each, GatedRepoError) for each in causes):
            raise PermissionError(
                f"{name} on the hub is open only to those who were granted access; log in with `hf auth login`, or "
                f"{_GET_LOCAL}"
            ) from error
        if any(isinstance(each, RepositoryNotFoundError) for each in causes):
            raise FileNotFoundError(
                f"model {name} does not exist: there is no such directory and no such public model on the hub; check "
                f"the name, or {_GET_LOCAL}"
            ) from error
        if isinstance(error, OSError):
            raise ConnectionError(
                f"there is no directory {name}, and the {what} of that name could not be had from the hub ({reason}); "
                f"check the name and the network, or {_GET_LOCAL}"
            ) from error
        raise ValueError(f"the {what} of {name} cannot be loaded: {reason}") from error


def first_line(error: BaseException) -> str:
    """What a long message begins with; those of transformers run over many lines."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")


def _hint(directory: Path) -> str:
    if (directory / "adapter_config.json").is_file():
        return "; it holds an adapter, which must be merged into its base model first"
    for below in sorted(directory.iterdir()):
        if (below / "config.json").is_file():
            return f"; did you mean {below}?"
    models = sorted(directory.glob("*.gguf"))
    return f"; did you mean the file {models[0]}?" if models else ", so it is not a Hugging Face model directory"


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files with a model's weights.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: there are only pickled weights, or the index is damaged.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        return _shards(directory, index)
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        raise ValueError(
            f"model directory {directory} has its weights only as {pickles[0]}, a pickle, which can run any code when "
            "it is opened, so lowtide does not open it; if you trust its source, convert it once with transformers: "
            f"AutoModelForCausalLM.from_pretrained({str(directory)!r}).save_pretrained(NEW_DIRECTORY), and copy the "
            "tokenizer files"
        )
    raise FileNotFoundError(
        f"model directory {directory} has no weights: neither model.safetensors nor model.safetensors.index.json"
    )


def _shards(directory: Path, index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} is damaged ({error}); copy or download it again") from error
    outside = [name for name in names if not isinstance(name, str) or name != Path(name).name or name in ("..", ".")]
    if outside:
        raise ValueError(
            f"{index} names the file {outside[0]!r}, which does not lie beside it: a model that asks for other files of yours is not "
            "opened"
        )
    missing = [name for name in names if not (directory / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"model directory {directory} lacks {len(missing)} of {len(names)} weight files, first {missing[0]}; "
            "copy or download them again"
        )
    return [directory / name for name in names]


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        # Reads the header and compares it with the size of the file.
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"{path} is not a whole safetensors file ({error}); it is damaged or incomplete: copy or download it again"
        ) from error
