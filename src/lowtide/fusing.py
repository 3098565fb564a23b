"""The public entry: joins a model, its optimizers, the fused engine and the home of the weights."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .fused import AdaptiveClip, LossScale
from .fused import Engine as _Engine
from .fused.checks import check_model, check_optimizers
from .fused.matmul16 import computes_16bit
from .models.blocks import find_blocks, outer_modules, resolve_blocks
from .models.chunked_loss import ChunkedLoss, HeadForward
from .models.lora import adapted_layers, bare_model
from .models.shards import parts_of
from .models.vocabulary import VocabularySlices
from .optim.base import SIXTEEN_BIT
from .optim.shards import compute_device, is_sharded
from .weights import HostInputs, MixedHome, by_name, place
from .weights.home import keep_free_memory
from .weights.layout import Part


class Engine(_Engine):
    """What :func:`fuse` returns: the fused engine of one model, and what was changed on the model for it."""

    chunked_loss: ChunkedLoss | None = None
    head: HeadForward | None = None
    vocabulary: VocabularySlices | None = None
    home: MixedHome
    num_kept = 0  # blocks whose activations are kept

    def state_dict_of_model(self) -> dict[str, Tensor]:
        """What ``model.state_dict()`` gives for an ordinary model, while weights are away: each where it lives.

        Tensors of streamed blocks are in host memory, or mapped from the working copy on disk, and are to be read only and
        before the next step: ``model.save_pretrained(directory, state_dict=engine.state_dict_of_model())``.
        """
        return {**self.model.state_dict(), **_with_aliases(self.model, self.home.tensors())}

    def parts_of_model(self) -> list[Part]:
        """The same, tied weights once, in parts that are loaded one by one: a decoder layer each, and one for the rest.

        Saving with these takes the memory of one part. They are valid until the next step. Of a sharded model every rank loads every
        part, in this order, and the first one gets the tensors, the others nothing.
        """
        return parts_of(self.model, self.home.parts())

    def remove(self, keep_copy: bool = True) -> None:
        """Take all hooks away: model and optimizers are ordinary again. Calling it twice does no harm.

        Weights that lived in host memory are there then, and so is the rest of the model; weights on disk are mapped from the
        working copy, which must stay as long as the model is used.

        Args:
            keep_copy: False to remove the working copy on disk: the model was saved, and will not be used any more.

        Raises:
            OSError: the last weights could not be written to the disk.
        """
        if not self._runners and not self._slots:
            return
        whole = not self._open  # no step was broken off in the middle
        super().remove()
        if self.chunked_loss is not None:
            self.chunked_loss.remove()
            self.chunked_loss = None
        if self.head is not None:
            self.head.remove()
        if self.vocabulary is not None:
            self.vocabulary.remove()
        if isinstance(self._block_inputs, HostInputs):
            self._block_inputs.close()
        if self.home.streamed:
            self.home.close(whole and keep_copy)
            self.model.to("cpu")
        if not keep_copy:
            self.home.discard()


def _with_aliases(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tied parameters under all their names."""
    names = {id(param): name for name, param in model.named_parameters()}
    aliases = {
        name: tensors[names[id(param)]]
        for name, param in model.named_parameters(remove_duplicate=False)
        if names[id(param)] in tensors
    }
    return {**tensors, **aliases}


def fuse(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    micro_batch_size: int | None = None,
    clip_grad_norm: float | None = None,
    clip_grad_value: float | None = None,
    clip: str = "exact",
    clip_warmup_steps: int = 20,
    clip_memory_bytes: int = 0,
    loss_scale: LossScale | float | str | None = "auto",
    weights: str | os.PathLike[str] | Mapping[str, str] = "device",
    device: torch.device | str | None = None,
    block_inputs: str = "device",
    blocks: Iterable[nn.Module | str] | None = None,
    chunked_loss: bool = True,
    vocabulary_slices: bool | None = None,
    keep_activations: int = 0,
) -> Engine:
    """Update every parameter inside the backward pass, the moment its gradient is complete.

    After this, a training step is ``loss = model(**batch).loss; engine.backward(loss); optimizer.step()``, where ``step()``
    only closes the step. Gradients of at most one tensor exist at a time, or of one block with micro-batches.

    Args:
        model: any module. The decoder layers of Hugging Face models become blocks: only their inputs are kept, and
            activations are recomputed. Other models can name their blocks; without blocks only the update is fused. Of a
            model that peft has wrapped, the model inside is fused; its adapters and its own weights may have optimizers each.
        optimizer: one or several of lowtide's optimizers, which together hold all trainable parameters.
        micro_batch_size: samples that go through a block at a time, or None for the whole batch. The result does not depend
            on it (a sum in another order aside); peak memory does. Needs blocks.
        clip_grad_norm: largest 2-norm of all gradients together; use ``engine.backward(loss)``.
        clip: how: ``"exact"`` walks the graph twice in every step. ``"adaptive"`` does so for ``clip_warmup_steps`` steps, and
            then clips each gradient to 1.05 times the running norm of its own parameter, in one pass (AdaGC, arXiv 2502.11034).
        clip_warmup_steps: see ``clip``.
        clip_memory_bytes: spare memory for gradients that exact clipping keeps between its passes, so that less has to be
            computed twice; with room for all of them there is one pass.
        clip_grad_value: every element of a gradient is clamped to plus or minus this, before clipping by norm.
        loss_scale: ``"dynamic"``, a :class:`LossScale`, a number for a fixed scale, or None. ``"auto"`` is dynamic for float16
            weights and None otherwise. Float16 autocast over other weights needs ``"dynamic"``.
        weights: where the weights live between uses. ``"device"``: where they are computed on. ``"cpu"``: in host memory, pinned
            where there is a GPU. A path, which is not a bare word: a new or empty directory for a working copy on disk. Blocks
            then visit the device one after the other, and embeddings and head are blocks of their own. Or a mapping from
            names of modules to these, where ``""`` stands for all and what is not named lives on the device.
        device: where blocks are computed when weights live elsewhere; None for the first GPU, or the CPU if there is none.
        block_inputs: where the inputs of blocks wait for the backward pass: ``"device"`` or ``"cpu"``, host memory.
        blocks: modules, or their names; the name of a ModuleList stands for its children. None finds those of Hugging Face
            models; an empty list turns blocks off.
        chunked_loss: a Hugging Face causal language model computes its training loss in slices of the vocabulary, and returns
            ``logits=None`` then. Models whose head is not understood keep their own loss. False leaves the model's forward alone.
        vocabulary_slices: the gradients of head and embedding of such a model come in slices of rows and are never whole, as they would
            be the largest of a small model. None does so for embeddings, and for heads where it costs little, which is with Lomo
            and without adaptive clipping or a loss scale. True does so with AdaLomo, too, whose three walks make the products of the
            head three times. False for whole gradients. Optimizers of :class:`PerParameter` and ``clip_memory_bytes`` need whole ones.
        keep_activations: blocks, the last ones of the model, whose activations are kept instead of being computed again: a step of
            such a block is a quarter shorter, and its activations take the memory that they take without checkpointing. The results are the
            same bits, on processors with AMX but for a last one now and then (``docs/how-it-works.md``). On a CPU with glibc the process keeps memory that it frees, for the next step. For whole batches, weights on the device, and not for 16-bit weights on a CPU without instructions for them. A number larger than that of the blocks is all of them.

    Raises:
        ValueError, TypeError, RuntimeError: something here cannot be fused; the message says what to do instead.
    """
    for name, value in (
        ("micro_batch_size", micro_batch_size),
        ("clip_grad_norm", clip_grad_norm),
        ("clip_grad_value", clip_grad_value),
    ):
        if value is not None and value <= 0:
            raise ValueError(f"{name} must be positive or None, got {value}")
    if clip not in ("exact", "adaptive"):
        raise ValueError(f"clip must be exact or adaptive, got {clip!r}")
    if clip == "adaptive" and clip_grad_norm is None:
        raise ValueError("clip='adaptive' needs clip_grad_norm, the bound of its warm-up: 1.0 is usual")
    if clip_warmup_steps < 1 or clip_memory_bytes < 0:
        raise ValueError(
            f"clip_warmup_steps must be at least 1 and clip_memory_bytes at least 0, got {clip_warmup_steps}, {clip_memory_bytes}"
        )
    if keep_activations < 0:
        raise ValueError(f"keep_activations must be at least 0, got {keep_activations}")
    if keep_activations and micro_batch_size is not None:
        raise ValueError(
            "keep_activations keeps those of the whole batch, and micro_batch_size is for want of memory: leave one of them out"
        )
    model = bare_model(model)
    found = find_blocks(model) if blocks is None else resolve_blocks(model, blocks)
    if keep_activations and not found:
        raise ValueError(
            "keep_activations is a number of blocks, and none were found in this model: without blocks all activations are kept"
        )
    if micro_batch_size is not None and not found:
        raise ValueError(
            "micro_batch_size needs blocks, and none were found in this model: name them with fuse(..., blocks=['layers'])"
        )
    if keep_activations and _in_float32_slices(model):
        raise ValueError(
            "keep_activations: this processor has no instructions for 16-bit products, and only layers that are computed again make them in "
            "float32: leave it out, or use float32"
        )
    num_kept = min(keep_activations, len(found))
    found = found[: len(found) - num_kept]
    if found and getattr(getattr(model, "config", None), "output_router_logits", False):
        raise ValueError(
            "output_router_logits=True adds a router loss that reads inside the blocks, which would get no gradient: set "
            "model.config.output_router_logits = False"
        )
    if found and (shared := _kv_shared_layers(model)):
        raise ValueError(
            f"{shared} layers of this model reuse the keys and values of earlier ones, which recomputed blocks cannot pass on: "
            "use fuse(..., blocks=[])"
        )
    optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer)
    check_model(model)
    check_optimizers(model, optimizers, scaled=loss_scale is not None)  # type: ignore[arg-type]
    compute_device = _compute_device(weights != "device", device)
    sharded = any(is_sharded(param) for param in model.parameters())
    if sharded and weights != "device":
        raise ValueError(
            "a sharded model's weights live on its ranks: use weights='device', or lowtide.shard(..., offload=True)"
        )
    wanted = {} if sharded else _only_real_moves(_wanted_homes(weights), compute_device)
    if keep_activations and (sharded or wanted):
        where = "a model that is spread over ranks" if sharded else "weights that live elsewhere"
        raise ValueError(f"keep_activations is for weights='device' in one process, not for {where}: leave it out")
    if wanted and adapted_layers(model):
        raise ValueError("a model with adapters of peft must live where it is computed: use weights='device'")
    outer, head = _outer_blocks(model, found) if wanted else ([], None)
    found = [*outer[:1], *found, *outer[1:]]
    home = place(model, found, by_name(model, found, wanted), compute_device)
    kept_inputs = HostInputs(compute_device or _device_of(model)) if _inputs_move(block_inputs, model, found) else None
    if head is not None:
        head.install()
    try:
        engine = Engine(
            model,
            optimizers,  # type: ignore[arg-type]  # checked by the engine, with a message for users
            blocks=found,
            whole_batch=outer,
            home=home,
            block_inputs=kept_inputs,
            micro_batch_size=micro_batch_size,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            adaptive=AdaptiveClip(clip_warmup_steps) if clip == "adaptive" else None,
            loss_scale=_loss_scale(loss_scale, model),
            kept_gradients_bytes=clip_memory_bytes,
        )
    except BaseException:
        if head is not None:
            head.remove()
        home.close()
        raise
    engine.home, engine.head, engine.num_kept = home, head, num_kept
    if num_kept and _device_of(model).type == "cpu":
        keep_free_memory()
    if chunked_loss and (loss := ChunkedLoss.of(model)) is not None:
        loss.install()
        engine.chunked_loss, loss.ranks = loss, engine.ranks
        if sharded:  # only a call of the head gathers its weights
            engine.head = HeadForward(loss.head)
            engine.head.install()
    if vocabulary_slices is not False:
        engine.vocabulary = VocabularySlices.install(engine, model, engine.chunked_loss, engine.head, vocabulary_slices)
        if vocabulary_slices and not engine.vocabulary.head:
            engine.remove()
            raise ValueError(
                "vocabulary_slices=True: this head's gradient has to be whole. It can come in slices where a Hugging Face model's loss is "
                "computed in slices (chunked_loss=True), with Lomo or AdaLomo, on one rank, and without clip_memory_bytes"
            )
    return engine


def _wanted_homes(weights: str | os.PathLike[str] | Mapping[str, str]) -> dict[str, str]:
    """By module name; empty if everything lives on the device."""
    named: Mapping[str, str | os.PathLike[str]] = weights if isinstance(weights, Mapping) else {"": weights}
    wanted: dict[str, str] = {}
    for name, place_name in named.items():
        if isinstance(place_name, str) and place_name not in ("device", "cpu") and not _is_path(place_name):
            raise ValueError(
                f"weights={place_name!r}: must be 'device', 'cpu', or a directory with a separator in its name, as './{place_name}'"
            )
        wanted[name] = os.fspath(place_name)
    return wanted


def _inputs_move(block_inputs: str, model: nn.Module, blocks: Sequence[nn.Module]) -> bool:
    if block_inputs not in ("device", "cpu"):
        raise ValueError(f"block_inputs must be device or cpu, got {block_inputs!r}")
    return block_inputs == "cpu" and bool(blocks) and _copies_needed(_device_of(model))


def _copies_needed(device: torch.device) -> bool:
    """On a CPU host memory is where everything is."""
    return device.type != "cpu"


def _device_of(model: nn.Module) -> torch.device:
    return next((compute_device(param) for param in model.parameters()), torch.device("cpu"))


def _only_real_moves(wanted: dict[str, str], device: torch.device | None) -> dict[str, str]:
    """On a CPU host memory is where weights are computed on: nothing is to be copied."""
    if device is not None and device.type == "cpu":
        wanted = {name: "device" if place_name == "cpu" else place_name for name, place_name in wanted.items()}
    return wanted if set(wanted.values()) - {"device"} else {}


def _is_path(text: str) -> bool:
    return os.sep in text or "/" in text or Path(text).is_dir()


def _outer_blocks(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[list[nn.Module], HeadForward | None]:
    """Embedding and head of a Hugging Face model, which are blocks of their own where weights move."""
    if not blocks:
        raise ValueError(
            "weights can only live elsewhere in blocks, and none were found in this model: name them with fuse(..., blocks=['layers'])"
        )
    outer = outer_modules(model, blocks)
    if len(outer) == 2:
        return outer, HeadForward(outer[1])  # type: ignore[arg-type]
    return [], None


def _compute_device(moves: bool, device: torch.device | str | None) -> torch.device | None:
    """None: where the parameters are."""
    if device is None and moves:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return None if device is None else _with_index(torch.device(device))


def _with_index(device: torch.device) -> torch.device:
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _in_float32_slices(model: nn.Module) -> bool:
    return any(param.is_cpu and param.dtype in SIXTEEN_BIT for param in model.parameters()) and not computes_16bit()


def _loss_scale(wanted: LossScale | float | str | None, model: nn.Module) -> LossScale | None:
    if wanted == "auto":
        has_float16 = any(param.dtype == torch.float16 for param in model.parameters() if param.requires_grad)
        return LossScale() if has_float16 else None
    if wanted == "dynamic":
        return LossScale()
    if isinstance(wanted, str):
        raise ValueError(f"loss_scale must be auto, dynamic, a number or None, got {wanted!r}")
    return LossScale.fixed(wanted) if isinstance(wanted, int | float) else wanted


def _kv_shared_layers(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_kv_shared_layers", None) or 0
