"""One run in this process: everything is imported, then the model is made and trained."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any

from .methods import METHODS, Clock
from .shapes import SHAPES, build


def memory(field: str) -> int:
    """Bytes of this process as Linux counts them; read without lowtide, which a peer's process does not import.

    Args:
        field: ``"VmRSS"``, resident now, or ``"VmHWM"``, the most it ever was.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def find_imports(method: str, threads: int) -> dict[str, Any]:
    """Train a tiny model and name every module that was imported for it, in their order: many are imported on first use."""
    found = attempt(method, "tiny", 2, 16, 2, threads)
    return {"status": found["status"], "modules": [name for name in sys.modules if name != "__main__"]}


def import_all(modules: list[str]) -> None:
    """Import them and run nothing; names that stand for no file are passed over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def attempt(method: str, model: str, batch_size: int, seq_len: int, steps: int, threads: int) -> dict[str, Any]:
    """Train, or say in one line why it cannot be done.

    Args:
        method: a key of ``METHODS``.
        model: a key of ``SHAPES``.
        batch_size: sequences a step.
        seq_len: tokens a sequence.
        steps: training steps.
        threads: that torch computes with.
    """
    try:
        return {**train(method, model, batch_size, seq_len, steps, threads), "status": "ok"}
    except Exception as error:
        traceback.print_exc(file=sys.stderr)
        return {"status": one_line(error)}


def one_line(error: BaseException) -> str:
    message = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {message}"[:200]


def train(method: str, model_name: str, batch_size: int, seq_len: int, steps: int, threads: int) -> dict[str, Any]:
    """The columns that are measured."""
    import torch
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(threads)
    baseline = memory("VmRSS")
    model = build(SHAPES[model_name], METHODS[method].dtype)
    params = list(model.parameters())
    counts = {
        "num_parameters": sum(param.numel() for param in params),
        "num_tensors": len(params),
        "weights_bytes": sum(param.numel() * param.element_size() for param in params),
        "baseline_bytes": baseline,
    }
    del params
    generator = torch.Generator().manual_seed(1)
    vocab = SHAPES[model_name].vocab
    batches = [torch.randint(vocab, (batch_size, seq_len), generator=generator) for _ in range(steps)]
    clock = Clock()
    METHODS[method].train(model, batches, clock)
    if len(clock.seconds) != steps or clock.loss is None:
        raise RuntimeError(f"{len(clock.seconds)} of {steps} steps were taken")
    later = statistics.median(clock.seconds[1:]) if steps > 1 else None
    return {
        **counts,
        "peak_bytes": max(memory("VmHWM"), baseline),  # the kernel counts both to some dozens of pages
        "first_step_s": round(clock.seconds[0], 4),
        "step_s": "" if later is None else round(later, 4),
        "tokens_per_s": round(batch_size * seq_len / (later or clock.seconds[0]), 2),
        "loss": round(clock.loss, 4),
    }
