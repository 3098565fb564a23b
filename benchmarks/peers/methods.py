"""The methods: how each one trains a model, as its own documentation shows it.

Every function takes the model, the batches (int64 [batch, tokens] each, labels are the same) and a :class:`Clock`, and takes one step a batch.
Peers recompute activations by transformers' gradient checkpointing, lowtide by its blocks. Nobody clips.
"""

from __future__ import annotations

import collections
import contextlib
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch


class Clock:
    """Seconds and loss of every step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.loss: float | None = None
        self._start = 0.0

    def begin(self) -> None:
        self._start = time.perf_counter()

    def end(self) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def run(self, batches: Sequence[Any], step: Callable[[Any], Any]) -> None:
        """One timed step a batch.

        Args:
            batches: token ids.
            step: takes a batch and gives the loss.
        """
        for batch in batches:
            self.begin()
            loss = step(batch)
            self.end()
            self.loss = float(loss.detach())


Train = Callable[[Any, Sequence[Any], Clock], None]


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        title: for people.
        train: see the module.
        kind: ``"ours"``, ``"full"`` (trains every parameter in every step), ``"part"`` (does not) or ``"nothing"``.
        package: the distribution it comes from, besides torch and transformers.
        dtype: of the weights.
        extra_bytes: for every parameter besides its weight, at the peak, roughly; see ``needed_bytes``.
        growth: it is one of those whose growth is measured.
    """

    title: str
    train: Train
    kind: str = "full"
    package: str = ""
    dtype: str = "bfloat16"
    extra_bytes: float = 0
    growth: bool = False


def checkpoint(model: Any) -> None:
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def loss_of(model: Any, ids: Any) -> Any:
    return model(input_ids=ids, labels=ids).loss


# lowtide ------------------------------------------------------------------------------------------------------------------


def fused(make: Callable[[Any, Any], Any]) -> Train:
    """By ``lowtide.fuse``.

    Args:
        make: takes the package and the model and gives an optimizer.
    """

    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        import lowtide

        optimizer = make(lowtide, model)
        engine = lowtide.fuse(model, optimizer)

        def step(ids: Any) -> Any:
            loss = loss_of(model, ids)
            engine.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        clock.run(batches, step)

    return train


def lowtide_adamw(lowtide: Any, model: Any) -> Any:
    import torch

    return lowtide.PerParameter(torch.optim.AdamW, model.parameters(), lr=1e-5)


@contextlib.contextmanager
def nothing_updated() -> Iterator[None]:
    """lowtide's backward pass, where a gradient that is complete is only dropped: no norm, no update. For 16-bit weights; small float32 ones have a shorter way."""
    from lowtide.fused.slot import Slot

    def drop(slot: Any, grad: Any) -> None:
        pass

    # Slices are made and dropped one by one, as Lomo would use them.
    def drop_slices(slot: Any, gradient: Any, again: bool = False) -> None:
        collections.deque(gradient.parts(all_rows=False), maxlen=0)

    # Where a gradient can be applied while it is made, it is made and dropped.
    def make(slot: Any, product: Any) -> bool:
        return False

    with (
        patch.object(Slot, "apply", drop),
        patch.object(Slot, "apply_slices", drop_slices),
        patch.object(Slot, "take_product", make),
    ):
        yield


def nothing(model: Any, batches: Sequence[Any], clock: Clock) -> None:
    """The steps of Lomo, but :func:`nothing_updated`."""
    with nothing_updated():
        fused(lambda ours, m: ours.Lomo(m.parameters(), lr=1e-3))(model, batches, clock)


# Gradients of all parameters, then a step ---------------------------------------------------------------------------------


def plain(make: Callable[[Any], Any]) -> Train:
    """The loop that everybody writes.

    Args:
        make: takes the model and gives an optimizer.
    """

    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        checkpoint(model)
        optimizer = make(model)

        def step(ids: Any) -> Any:
            loss = loss_of(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        clock.run(batches, step)

    return train


def torch_optimizer(name: str, **settings: Any) -> Train:
    def make(model: Any) -> Any:
        import torch

        return getattr(torch.optim, name)(model.parameters(), **settings)

    return plain(make)


def adafactor(model: Any) -> Any:
    """The Adafactor of transformers, which its Trainer uses; its states and arithmetic are float32, its weights stay bfloat16."""
    from transformers.optimization import Adafactor

    return Adafactor(model.parameters(), lr=1e-5, scale_parameter=False, relative_step=False)


def adamw_8bit(model: Any) -> Any:
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(model.parameters(), lr=1e-5)


def badam(model: Any) -> Any:
    """The block in the middle of the model is trained: the backward pass ends there, so it stands for the mean of all blocks."""
    import torch
    from badam import BlockOptimizer

    base = torch.optim.AdamW(model.parameters(), lr=1e-5)
    middle = model.config.num_hidden_layers // 2
    return BlockOptimizer(base, list(model.named_parameters()), switch_block_every=100, start_block=middle)


def lora(model: Any, batches: Sequence[Any], clock: Clock) -> None:
    import peft
    import torch

    config = peft.LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(model, config)

    def make(model: Any) -> Any:
        return torch.optim.AdamW([param for param in model.parameters() if param.requires_grad], lr=1e-4)

    plain(make)(model, batches, clock)


def trainer(optim: str) -> Train:
    """transformers' Trainer; timed from its ``on_step_begin`` to its ``on_step_end``."""

    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        import torch
        from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

        class Timing(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                clock.begin()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                clock.end()

        class InOrder(Trainer):
            def _get_train_sampler(self, train_dataset: Any = None) -> Any:
                return torch.utils.data.SequentialSampler(rows)

            def compute_loss(self, *arguments: Any, **settings: Any) -> Any:
                found = super().compute_loss(*arguments, **settings)
                clock.loss = float((found[0] if isinstance(found, tuple) else found).detach())
                return found

        rows = [{"input_ids": row, "labels": row} for batch in batches for row in batch]
        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(
                folder, per_device_train_batch_size=len(batches[0]), max_steps=len(batches), optim=optim, learning_rate=1e-5,
                lr_scheduler_type="constant", max_grad_norm=0.0, gradient_checkpointing=True,
                gradient_checkpointing_kwargs={"use_reentrant": False}, use_cpu=True, report_to="none", save_strategy="no",
                logging_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            InOrder(
                model, arguments, train_dataset=rows, data_collator=default_data_collator, callbacks=[Timing()]
            ).train()

    return train


# Updates inside the backward pass -----------------------------------------------------------------------------------------


def in_hooks(model: Any, optimizers: dict[Any, Any], batches: Sequence[Any], clock: Clock) -> None:
    """One optimizer a parameter, stepped in a hook, as in PyTorch's tutorial on optimizer steps in the backward pass."""
    checkpoint(model)

    def update(param: Any) -> None:
        optimizers[param].step()
        optimizers[param].zero_grad()

    for param in optimizers:
        param.register_post_accumulate_grad_hook(update)

    def step(ids: Any) -> Any:
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    clock.run(batches, step)


def backward_alone(model: Any, batches: Sequence[Any], clock: Clock) -> None:
    """torch's own backward pass, where a hook drops every gradient as soon as it is there."""
    checkpoint(model)
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))

    def step(ids: Any) -> Any:
        loss = loss_of(model, ids)
        loss.backward()
        return loss

    clock.run(batches, step)


def tutorial(name: str, **settings: Any) -> Train:
    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        import torch

        rule = getattr(torch.optim, name)
        in_hooks(model, {p: rule([p], foreach=False, **settings) for p in model.parameters()}, batches, clock)

    return train


def galore(name: str) -> Train:
    """Layerwise: rank 128 for the matrices of attention and MLP, the ordinary rule for the rest."""

    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        import galore_torch

        rule = getattr(galore_torch, name)
        quiet = {"no_deprecation_warning": True} if name == "GaLoreAdamW" else {}
        optimizers = {}
        for key, param in model.named_parameters():
            group: dict[str, Any] = {"params": [param]}
            if param.dim() == 2 and (".self_attn." in key or ".mlp." in key):
                group |= {"rank": 128, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
            optimizers[param] = rule([group], lr=1e-5, **quiet)
        in_hooks(model, optimizers, batches, clock)

    return train


def lomo_like(module: str, name: str) -> Train:
    """Packages with ``fused_backward``."""

    def train(model: Any, batches: Sequence[Any], clock: Clock) -> None:
        import importlib

        checkpoint(model)
        optimizer = getattr(importlib.import_module(module), name)(model, lr=1e-3)

        def step(ids: Any) -> Any:
            loss = loss_of(model, ids)
            optimizer.fused_backward(loss, 1e-3)
            return loss

        clock.run(batches, step)

    return train


METHODS = {
    "lowtide-lomo": Method("lowtide Lomo", fused(lambda ours, m: ours.Lomo(m.parameters(), lr=1e-3)), "ours", growth=True),
    "lowtide-adalomo": Method(
        "lowtide AdaLomo", fused(lambda ours, m: ours.AdaLomo(m.parameters(), lr=1e-3)), "ours", growth=True
    ),
    "lowtide-adamw": Method("lowtide PerParameter(AdamW)", fused(lowtide_adamw), "ours", extra_bytes=8),
    "lowtide-nothing": Method("lowtide's backward, nothing updated", nothing, "nothing"),
    "torch-nothing": Method("torch's backward, nothing updated", backward_alone, "nothing"),
    "adamw-fp32": Method(
        "torch AdamW, float32", torch_optimizer("AdamW", lr=1e-5), dtype="float32", extra_bytes=12
    ),
    "adamw-bf16": Method("torch AdamW", torch_optimizer("AdamW", lr=1e-5), extra_bytes=6, growth=True),
    "adamw-bf16-fused": Method("torch AdamW(fused=True)", torch_optimizer("AdamW", lr=1e-5, fused=True), extra_bytes=6),
    "adafactor-bf16": Method("transformers' Adafactor", plain(adafactor), extra_bytes=2),
    "sgd-bf16": Method("torch SGD (control)", torch_optimizer("SGD", lr=1e-3), extra_bytes=2),
    "trainer-adamw": Method("HF Trainer, adamw_torch", trainer("adamw_torch"), package="accelerate", extra_bytes=6),
    "trainer-adafactor": Method("HF Trainer, adafactor", trainer("adafactor"), package="accelerate", extra_bytes=2),
    "tutorial-adamw": Method(
        "optimizer in backward, AdamW", tutorial("AdamW", lr=1e-5), extra_bytes=4, growth=True
    ),
    "tutorial-sgd": Method("optimizer in backward, SGD", tutorial("SGD", lr=1e-3)),
    "lomo-optim": Method(
        "lomo-optim Lomo", lomo_like("lomo_optim", "Lomo"), package="lomo-optim", growth=True
    ),
    "lomo-optim-adalomo": Method("lomo-optim AdaLomo", lomo_like("lomo_optim", "AdaLomo"), package="lomo-optim"),
    "pytorch-optimizer-lomo": Method(
        "pytorch-optimizer LOMO", lomo_like("pytorch_optimizer", "LOMO"), package="pytorch-optimizer"
    ),
    "pytorch-optimizer-adalomo": Method(
        "pytorch-optimizer AdaLOMO", lomo_like("pytorch_optimizer", "AdaLOMO"), package="pytorch-optimizer"
    ),
    "bitsandbytes-adamw8bit": Method(
        "bitsandbytes AdamW8bit", plain(adamw_8bit), package="bitsandbytes", extra_bytes=4
    ),
    "badam": Method("BAdam, one block of many", plain(badam), "part", "badam"),
    "galore-adamw": Method(
        "GaLore AdamW, layerwise, rank 128", galore("GaLoreAdamW"), package="galore-torch", extra_bytes=4
    ),
    "galore-adamw8bit": Method(
        "GaLore AdamW 8 bit, layerwise, rank 128", galore("GaLoreAdamW8bit"), package="galore-torch", extra_bytes=2
    ),
    "lora": Method("LoRA, rank 8 on q and v, AdamW", lora, "part", "peft"),
}  # fmt: skip
