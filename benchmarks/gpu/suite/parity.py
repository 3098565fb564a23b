"""The same bits on the card whatever the home, and whether the update is fused or not; kernels beside their PyTorch twins.

``tests/gpu`` runs the same checks under ``pytest -m gpu``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lowtide
from lowtide.models.chunked_loss import causal_lm_loss
from lowtide.optim import FusibleOptimizer, kernels
from lowtide.optim.shards import local_part
from lowtide.planning import computes_bfloat16
from lowtide.weights.sharding import check_offload

from .context import Context, copies_on_a_cpu

Check = tuple[str, bool, str]  # what, whether it holds, remark
_VOCABULARY, _STEPS = 1000, 10


def parity(context: Context) -> None:
    """All checks, one row each."""
    for what, holds, note in all_checks(context):
        context.row(what, status="ok" if holds else "FAILED", note=note)


def all_checks(context: Context) -> Iterator[Check]:
    """One after the other."""
    for check in CHECKS:
        yield from check(context)


def homes_agree(context: Context) -> Iterator[Check]:
    """Ten steps end with the same bits wherever weights and block inputs live."""
    with tempfile.TemporaryDirectory(dir=context.directory) as folder:
        cases: dict[str, dict[str, Any]] = {
            "weights on the device, again": {},
            "weights in host memory": {"weights": "cpu"},
            "weights on disk": {"weights": Path(folder) / "disk"},
            "weights in three homes": {
                "weights": {"": "cpu", "model.layers.0": "device", "model.layers.1": str(Path(folder) / "mix")}
            },
            "block inputs in host memory": {"block_inputs": "cpu"},
        }
        rules: dict[str, Callable[[Any], FusibleOptimizer]] = {
            "lomo": lambda params: lowtide.Lomo(params, lr=0.01),
            "adalomo": lambda params: lowtide.AdaLomo(params, lr=1e-3),
        }
        for dtype in (torch.float32, torch.bfloat16):
            for rule, make in rules.items():
                expected = train(context, dtype, make)
                for case, where in cases.items():
                    if "disk" in case or "three" in case:
                        where = {"weights": _fresh(where["weights"], f"{rule}-{dtype}".replace(".", "-"))}
                    got = train(context, dtype, make, **where)
                    yield f"{case}, {rule}, {_name(dtype)}", all(map(torch.equal, expected, got)), "bits after 10 steps"


def fused_agrees_with_step(context: Context) -> Iterator[Check]:
    """The fused update gives the bits of an ordinary backward pass and ``step()``."""
    # Blocks compute bfloat16 products in their own way on a processor without instructions for them.
    for dtype in (torch.float32, torch.bfloat16) if computes_bfloat16(context.device) else (torch.float32,):
        for name, make in (
            ("lomo", lambda params: lowtide.Lomo(params, lr=0.01)),
            ("adalomo", lambda params: lowtide.AdaLomo(params, lr=1e-3)),
        ):
            # Slices of vocabulary matrices are added up in another order, an embedding's rows in float32.
            options = {"clip_grad_norm": None, "micro_batch_size": None, "vocabulary_slices": False}
            fused = train(context, dtype, make, **options)
            plain = train(context, dtype, make, fused=False)
            yield (
                f"fused = backward and step, {name}, {_name(dtype)}",
                all(map(torch.equal, fused, plain)),
                "bits after 10 steps",
            )


def clipping_agrees_with_torch(context: Context) -> Iterator[Check]:
    """Exact clipping gives what ``clip_grad_norm_`` and SGD give, in float32."""
    ours = train(
        context, torch.float32, lambda params: lowtide.Lomo(params, lr=0.05), clip_grad_norm=0.5, micro_batch_size=None
    )
    theirs = train(context, torch.float32, lambda params: torch.optim.SGD(params, lr=0.05), fused=False, clip=0.5)
    worst = max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    yield "exact clipping = clip_grad_norm_ and SGD", worst < 1e-5, f"largest difference {worst:.1e}"


def kernels_agree(context: Context) -> Iterator[Check]:
    """One update by each Triton kernel and by its twin."""
    if not kernels.available(context.device):
        yield "kernels", context.rehearse, "no kernels here: triton is missing, or the card is older than 7.0"
        return
    for dtype in (torch.bfloat16, torch.float16):
        for rounding in ("nearest", "stochastic", "compensated"):
            for name, rule in (("lomo", lowtide.Lomo), ("adalomo", lowtide.AdaLomo)):
                fast, slow = (updated(context, rule, rounding, dtype, use) for use in (True, False))
                differs = torch.cat([(a != b).view(-1) for a, b in zip(fast, slow, strict=True)]).float().mean().item()
                close = all(
                    torch.allclose(a.float(), b.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
                    for a, b in zip(fast, slow, strict=True)
                )
                yield (
                    f"kernel = twin, {name}, {rounding}, {_name(dtype)}",
                    close and differs < 1e-2,
                    f"{differs:.1e} of the weights differ by one rounding",
                )


def updated(context: Context, rule: Any, rounding: str, dtype: torch.dtype, use_kernels: bool) -> list[torch.Tensor]:
    """Weights of several shapes after three updates, with kernels or with their twins."""
    generator = torch.Generator(context.device).manual_seed(0)
    size = 32 if context.rehearse else 1024
    shapes = ((size, 2 * size + 3), (size + 1,), (3, size, 5))
    params = [
        torch.nn.Parameter(torch.randn(shape, generator=generator, device=context.device).to(dtype)) for shape in shapes
    ]
    optimizer = rule(params, lr=0.01, rounding=rounding)
    real, kernels.wanted = kernels.wanted, (lambda *tensors: use_kernels and kernels.fits(*tensors))
    try:
        for _ in range(3):
            for param in params:
                param.grad = torch.randn(param.shape, generator=generator, device=context.device).to(dtype)
            optimizer.step()
    finally:
        kernels.wanted = real
    return [param.detach() for param in params]


def pinned_memory_is_registered(context: Context) -> Iterator[Check]:
    """Host memory of a home is known to CUDA as page-locked, and copies come out right."""
    if context.rehearse:
        yield "pinned host memory", True, "not on a CPU"
        return
    from lowtide.weights.pinned import pinned_buffer

    buffer = pinned_buffer(3 * 2**20 + 17)
    values = torch.randint(0, 255, buffer.shape, dtype=torch.uint8, device=context.device)
    buffer.copy_(values, non_blocking=True)
    torch.cuda.synchronize()
    same = torch.equal(buffer, values.cpu()) and torch.equal(buffer.to(context.device, non_blocking=True), values)
    yield "pinned host memory", buffer.is_pinned() and same, f"is_pinned() says {buffer.is_pinned()}"


def sharded_agrees(context: Context) -> Iterator[Check]:
    """FSDP2 around every block, with one process: its hooks, streams and, where torch has it right, weights in host memory."""
    backend = "gloo" if context.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    with tempfile.TemporaryDirectory(dir=context.directory) as folder:
        store = torch.distributed.FileStore(str(Path(folder) / "store"), 1)
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        try:
            yield from _sharded_cases(context)
        finally:
            torch.distributed.destroy_process_group()


def _sharded_cases(context: Context) -> Iterator[Check]:
    try:
        check_offload()
        places = (False, True)
    except RuntimeError as error:
        places = (False,)
        yield "sharded, weights in host memory", True, f"not tried: {error}"
    for name, make in (
        ("lomo", lambda params: lowtide.Lomo(params, lr=0.01)),
        ("adalomo", lambda params: lowtide.AdaLomo(params, lr=1e-3)),
    ):
        expected = train(context, torch.float32, make)
        for offload in places:
            got = train(context, torch.float32, make, shard={"offload": offload})
            worst = max((a - b).abs().max().item() for a, b in zip(expected, got, strict=True))
            where = ", weights in host memory" if offload else ""
            yield f"sharded = whole, {name}{where}", worst < 1e-5, f"largest difference {worst:.1e}"


def train(
    context: Context, dtype: torch.dtype, make: Callable[[Any], Any], *, fused: bool = True, clip: float | None = None,
    shard: dict[str, Any] | None = None, **options: Any
) -> list[torch.Tensor]:  # fmt: skip
    """Parameters of a small Llama after ten steps.

    Args:
        make: the optimizer.
        fused: False for an ordinary backward pass and step.
        clip: largest norm of the gradients, for ``fused=False``.
        shard: options of ``shard``; None for a model that is not sharded.
        options: of ``fuse``.
    """
    torch.manual_seed(0)
    size = 64 if context.rehearse else 256
    config = LlamaConfig(
        hidden_size=size, intermediate_size=2 * size, num_hidden_layers=3, num_attention_heads=4, vocab_size=_VOCABULARY, use_cache=False,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(context.device, dtype).train()
    if shard is not None:
        lowtide.shard(model, **shard)
    optimizer = make(model.parameters())
    if fused:
        with copies_on_a_cpu(context):
            options = {"clip_grad_norm": 1.0, "micro_batch_size": 2, **options}
            engine = lowtide.fuse(model, optimizer, device=context.device if "weights" in options else None, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 if context.rehearse else _STEPS):
        ids = torch.randint(3, _VOCABULARY, (4, 8 if context.rehearse else 64), generator=generator).to(context.device)
        if fused:
            engine.backward(model(input_ids=ids, labels=ids).loss)
            optimizer.step()
        else:
            causal_lm_loss(model, input_ids=ids, labels=ids).backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    if fused:
        engine.remove()
    return [local_part(param.detach()).cpu().clone() for param in model.parameters()]


def _fresh(weights: Any, suffix: str) -> Any:
    """The same homes in directories that no other case has used."""
    if isinstance(weights, dict):
        return {name: f"{place}-{suffix}" if "/" in place else place for name, place in weights.items()}
    return Path(f"{weights}-{suffix}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


CHECKS: tuple[Callable[[Context], Iterator[Check]], ...] = (
    pinned_memory_is_registered,
    kernels_agree,
    fused_agrees_with_step,
    clipping_agrees_with_torch,
    homes_agree,
    sharded_agrees,
)
