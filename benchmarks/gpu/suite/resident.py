"""LLaMA 7B with its weights on the card: speed, memory, what the update costs, what clipping costs, and other ways to train it."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .context import Context
from .measure import RULES, Setup, Training, planned, step_shape
from .models import flops_per_token, llama_config, num_parameters, peak_flops, random_model


def resident(context: Context) -> None:
    """Steps with each rule and without any update, in turn; then the paper's batch of one sequence."""
    config = llama_config(context, "7b")
    batch, seq = (2, 32) if context.rehearse else (8, 1024)
    plans = {
        rule: planned(
            step_shape(context, config, batch, seq, optimizer="adalomo" if rule == "adalomo" else "lomo").footprint(
                "device"
            )
        )
        for rule in RULES
    }
    model = random_model(context, config)
    times: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(2 if context.rehearse else 4):
        for rule in RULES:
            training = Training(context, model, Setup(batch, seq), rule)
            training.step()
            times[rule].append(training.step())
            context.row(
                f"7b, {rule}, {batch} x {seq}", **training.speed(times[rule]), **training.memory(), **plans[rule],
                note=f"{len(times[rule])} rounds",
            )  # fmt: skip
            model = training.close()
        for rule in RULES:
            ratio = statistics.median(a / b for a, b in zip(times[rule], times["no update"], strict=True))
            context.row(
                f"7b, {rule} beside no update",
                ratio=f"{ratio:.3f}",
                note=f"median of {len(times[rule])} rounds, in turn",
            )
        if context.seconds_left() < 15:
            break
    training = Training(context, model, Setup(1, seq))
    for seconds in training.steps(5):
        plan = step_shape(context, config, 1, seq).footprint("device")
        context.row(
            f"7b, lomo, 1 x {seq}", **training.speed(seconds), **training.memory(), **planned(plan),
            note="the paper's batch: 770 tokens/s and 13.61 GB on one RTX 3090",
        )  # fmt: skip


def clipping(context: Context) -> None:
    """The cost of clipping by norm: two passes, gradients kept between them, and the one-pass control, each beside no clipping."""
    config = llama_config(context, "7b")
    batch, seq = (2, 32) if context.rehearse else (8, 1024)
    spare = 2**16 if context.rehearse else 6 * 1024**3
    ways: dict[str, dict[str, Any]] = {
        "none": {},
        "exact, two passes": {"clip_grad_norm": 1.0},
        "exact, 6 GiB of gradients kept": {"clip_grad_norm": 1.0, "clip_memory_bytes": spare},
        "exact, all gradients kept": {"clip_grad_norm": 1.0, "clip_memory_bytes": 2**40},
        "adaptive, one pass": {"clip_grad_norm": 1.0, "clip": "adaptive", "clip_warmup_steps": 1},
    }
    model = random_model(context, config)
    ratios: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(2 if context.rehearse else 3):
        base = 0.0
        for way, options in ways.items():
            training = Training(context, model, Setup(batch, seq, options=options))
            training.step()
            seconds = training.step()
            base = base or seconds
            ratios[way].append(seconds / base)
            context.row(
                f"7b, {way}", **training.speed([seconds]), **training.memory(), ratio=f"{statistics.median(ratios[way]):.3f}",
                note=f"ratio: to no clipping in the same round, median of {len(ratios[way])}",
            )  # fmt: skip
            model = training.close()
        if context.seconds_left() < 20:
            break


def others(context: Context) -> None:
    """The same model in plain PyTorch with gradient checkpointing, and other optimizers, where they are installed and fit."""
    for name, make in _OTHERS.items():
        if context.seconds_left() < 15:
            context.row(f"7b, {name}", status="not run", note="no time left")
            continue
        try:
            _train_other(context, name, make)
        except ImportError as error:
            context.row(f"7b, {name}", status="not run", note=str(error))
        except torch.OutOfMemoryError:
            context.row(f"7b, {name}", status="out of memory", reserved=torch.cuda.max_memory_reserved())
        except Exception as error:
            context.row(f"7b, {name}", status="failed", note=f"{type(error).__name__}: {error}"[:200])
        context.free()


def _train_other(context: Context, name: str, make: Callable[[Any], Any]) -> None:
    config = llama_config(context, "7b")
    batch, seq = (2, 32) if context.rehearse else (8, 1024)
    model = random_model(context, config)
    optimizer = make(model)  # before the weights are there: a package that is missing costs no time
    for param_name, param in model.named_parameters():
        param.data = model.lowtide_source(param_name)
    model.to(context.device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    context.free()
    seconds: list[float] = []
    for number in range(4):
        ids = torch.randint(3, config.vocab_size, (batch, seq), device=context.device)
        context.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        if hasattr(optimizer, "fused_backward"):
            optimizer.fused_backward(loss, 1e-3)
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        del loss
        context.synchronize()
        if number:
            seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds)
    found: dict[str, Any] = {}
    if not context.rehearse:
        found = {"allocated": torch.cuda.max_memory_allocated(), "reserved": torch.cuda.max_memory_reserved()}
        if (peak := peak_flops(context)) is not None:
            found["mfu"] = f"{flops_per_token(config, seq) * batch * seq / step_s / peak:.3f}"
    context.row(
        f"7b, {name}", parameters=num_parameters(config), tokens=batch * seq, step_s=f"{step_s:.4f}", tokens_per_s=f"{batch * seq / step_s:.1f}",
        note=f"{batch} x {seq}, gradient checkpointing", **found,
    )  # fmt: skip


def _adamw(model: Any) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)


def _adamw_8bit(model: Any) -> Any:
    return importlib.import_module("bitsandbytes").optim.AdamW8bit(model.parameters(), lr=1e-5)


def _adamw_8bit_torchao(model: Any) -> Any:
    return importlib.import_module("torchao.optim").AdamW8bit(model.parameters(), lr=1e-5)


def _lomo_optim(model: Any) -> Any:
    return importlib.import_module("lomo_optim").Lomo(model, lr=1e-3)


_OTHERS: dict[str, Callable[[Any], Any]] = {
    "torch AdamW bf16, fused": _adamw,
    "bitsandbytes AdamW 8-bit": _adamw_8bit,
    "torchao AdamW 8-bit": _adamw_8bit_torchao,
    "lomo-optim": _lomo_optim,
}
