"""What this machine has, and which sizes of model it could train: counted and predicted, nothing is trained."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import torch

from ..planning import (
    Limits,
    Plan,
    Speeds,
    StepShape,
    available_host_bytes,
    computes_bfloat16,
    device_available_bytes,
    find_speeds,
)
from ..planning.planner import find_plan

# Optional packages: what for, and how to get them.
OPTIONAL = {
    "peft": ("LoRA and LoRA + LOMO", "lora"),
    "lm_eval": ("lowtide eval --lm-eval", "eval"),
    "matplotlib": ("plots of lowtide plan and --find-lr", "demo"),
}
# Least versions, as pyproject.toml has them. With torch 2.11 and 2.12 the engine works, but was tested less.
NEEDED = {"torch": "2.13", "transformers": "5.17"}
_USABLE = 0.9  # of what is free now, as in `lowtide train --weights auto`

# Sizes that people ask about; the larger ones are the shapes of LLaMA (arXiv 2302.13971, table 2), the second is TinyLlama's.
SIZES: dict[str, dict[str, Any]] = {
    "0.1B": {
        "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "1.1B": {
        "hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632,
    },
    "7B": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008},
    "13B": {"hidden_size": 5120, "num_hidden_layers": 40, "num_attention_heads": 40, "intermediate_size": 13824},
    "30B": {"hidden_size": 6656, "num_hidden_layers": 60, "num_attention_heads": 52, "intermediate_size": 17920},
    "65B": {"hidden_size": 8192, "num_hidden_layers": 80, "num_attention_heads": 64, "intermediate_size": 22016},
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A CUDA device.

    Attributes:
        name: of the product.
        total_bytes: its memory.
        free_bytes: of it, now.
        capability: as "9.0".
    """

    name: str
    total_bytes: int
    free_bytes: int
    capability: str


@dataclasses.dataclass(frozen=True)
class Machine:
    """What there is.

    Attributes:
        versions: of Python, lowtide and the packages that it needs, by name.
        too_old: of those in ``versions`` that are, the least version.
        optional: by package: version, or None if it is not installed.
        processor: its architecture.
        num_processors: that this process may use.
        bfloat16: the processor multiplies bfloat16 matrices at a useful speed.
        host_bytes: memory of the machine.
        host_free_bytes: memory that this process can still take, control groups considered.
        disk_free_bytes: of the disk of ``directory``.
        directory: where a working copy would be.
        gpus: all that torch sees.
    """

    versions: dict[str, str]
    too_old: dict[str, str]
    optional: dict[str, str | None]
    processor: str
    num_processors: int
    bfloat16: bool
    host_bytes: int
    host_free_bytes: int
    disk_free_bytes: int
    directory: str
    gpus: list[Gpu]


@dataclasses.dataclass(frozen=True)
class Size:
    """One size of model on this machine.

    Attributes:
        name: as people call it.
        num_parameters: exactly.
        plan: the fastest that fits, or None.
    """

    name: str
    num_parameters: int
    plan: Plan | None


def look_at_machine(directory: Path) -> Machine:
    """Everything that can be found out without measuring.

    Args:
        directory: an existing one, on the disk that a working copy of the weights would be on.
    """
    names = ("lowtide", "torch", "transformers", "safetensors", "datasets", "accelerate")
    found = {name: _version(name) or "missing" for name in names}
    too_old = {
        name: least for name, least in NEEDED.items() if found[name] == "missing" or _is_older(found[name], least)
    }
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        facts = torch.cuda.get_device_properties(index)
        free = device_available_bytes(f"cuda:{index}")
        gpus.append(Gpu(facts.name, facts.total_memory, free, f"{facts.major}.{facts.minor}"))
    return Machine(
        versions={"Python": platform.python_version(), **found},
        too_old=too_old,
        optional={name: _version(name) for name in OPTIONAL},
        processor=platform.machine(),
        num_processors=len(psutil.Process().cpu_affinity() or []) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count() or 1,
        bfloat16=computes_bfloat16(),
        host_bytes=psutil.virtual_memory().total,
        host_free_bytes=available_host_bytes(),
        disk_free_bytes=shutil.disk_usage(directory).free,
        directory=str(directory),
        gpus=gpus,
    )  # fmt: skip


def machine_speeds(machine: Machine, *, measure: bool = True) -> Speeds:
    """Measured in a second or two: products in the format that training would use, the bus if there is a GPU, and the disk."""
    device = "cuda" if machine.gpus else "cpu"
    return find_speeds(dtype=torch.bfloat16, device=device, directory=Path(machine.directory), measure=measure)


def possible_sizes(
    machine: Machine, speeds: Speeds, *, batch_size: int = 8, seq_len: int = 512, optimizer: str = "adalomo"
) -> Iterator[Size]:
    """What of ``SIZES`` could be trained here in bfloat16, one after the other: each takes about a second to work out."""
    from transformers import LlamaConfig

    from ..models import find_blocks

    limits = Limits(
        device=int((machine.gpus[0].free_bytes if machine.gpus else machine.host_free_bytes) * _USABLE),
        host=int(machine.host_free_bytes * _USABLE),
        disk=int(machine.disk_free_bytes * _USABLE),
    )
    for name, shape in SIZES.items():
        config = LlamaConfig(**{"vocab_size": 32000, "max_position_embeddings": max(2048, seq_len), **shape})
        step = StepShape(
            config, find_blocks=find_blocks, dtype=torch.bfloat16, batch_size=batch_size, seq_len=seq_len, optimizer=optimizer,
            device="cuda" if machine.gpus else "cpu",
        )  # fmt: skip
        yield Size(name, step.num_parameters, find_plan(step, limits=limits, speeds=speeds, keep_activations=0))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is_older(version: str, least: str) -> bool:
    from packaging.version import Version

    return Version(version).release < Version(least).release  # a release candidate will do
