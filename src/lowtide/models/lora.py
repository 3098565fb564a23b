"""LoRA (arXiv 2106.09685) through peft, which does all of it: adapters are added to a model, saved, loaded and merged.

A linear layer with weight W [M, N] gets A [r, N] and B [M, r] of rank r and computes W x + (alpha / r) B A x; B starts at zero. With
plain LoRA W is frozen. In LoRA + LOMO (arXiv 2306.09782, section 4.3) it is trained, too: two optimizers in one backward pass,

    adapters = add_lora(model, rank=8, train_base=True)
    base = lowtide.Lomo(adapters.base_parameters(), lr=1e-3)
    added = lowtide.PerParameter(torch.optim.AdamW, adapters.parameters(), lr=5e-4)
    engine = lowtide.fuse(model, [base, added])

Layers are replaced inside the model, which stays the object that it was: its class, blocks, head and ``generate`` are those of
transformers. Adapters are float32, whatever the dtype of the weights. peft is imported when it is needed, never before.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..log import get_logger
from ..optim.base import SIXTEEN_BIT
from .lora_targets import check_layers, is_a, matching_layers, resolve_targets

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_logger = get_logger(__name__)

ADAPTER_FOLDER = "adapter"  # of a checkpoint, beside the weights
_ADAPTER = "default"  # peft's name of a model's first adapter
_WEIGHTS, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Adapters:
    """The LoRA adapters of one model. Made by :func:`add_lora`.

    Attributes:
        model: the model of transformers, whose layers hold the adapters until :meth:`merge`.
        peft_model: peft's wrapper around it.
        train_base: the model's own weights are trained, too.
    """

    def __init__(self, model: PreTrainedModel, peft_model: Any, train_base: bool) -> None:
        self.model, self.peft_model, self.train_base = model, peft_model, train_base

    def parameters(self) -> list[nn.Parameter]:
        """A and B of every adapted layer, float32."""
        return [
            param
            for layer in adapted_layers(self.model).values()
            for name, param in layer.named_parameters()
            if not name.startswith("base_layer.")
        ]

    def base_parameters(self) -> list[nn.Parameter]:
        """The model's own parameters that are trained: with plain LoRA none."""
        added = {id(param) for param in self.parameters()}
        return [param for param in self.model.parameters() if param.requires_grad and id(param) not in added]

    def save(self, directory: Path, base_model: str = "") -> None:
        """Write the adapters as peft does: ``adapter_model.safetensors`` and ``adapter_config.json``. A README.md stays as it is.

        Args:
            directory: it is made if need be.
            base_model: name of the model that the adapters belong to, for the config; empty where there is none by a name, as its
                weights were trained, too.

        Raises:
            OSError: the disk is full or failed.
        """
        self.peft_model.peft_config[_ADAPTER].base_model_name_or_path = base_model
        # peft's form for a model card, which nobody has filled in, or which would be put into a README.md that is there.
        self.peft_model.create_or_update_model_card = lambda *_, **__: None
        try:
            self.peft_model.save_pretrained(directory, save_embedding_layers=False)
        finally:
            del self.peft_model.create_or_update_model_card

    def load(self, directory: Path) -> None:
        """Put the values back that :meth:`save` wrote.

        Raises:
            FileNotFoundError: there are none.
            ValueError: they are those of another model, rank or targets.
        """
        from peft import load_peft_weights, set_peft_model_state_dict

        _check_saved(directory)
        try:
            found: Any = set_peft_model_state_dict(self.peft_model, load_peft_weights(str(directory), device="cpu"))
        except RuntimeError as error:  # of other shapes
            raise ValueError(f"the adapters in {directory} are not those of this model and rank: {error}") from None
        added = {id(param) for param in self.parameters()}
        names = {name for name, param in self.peft_model.named_parameters() if id(param) in added}
        wrong = sorted({*found.unexpected_keys, *names.intersection(found.missing_keys)})
        if wrong:
            raise ValueError(
                f"the adapters in {directory} are not those of this model and these targets: the first that differs is {wrong[0]}"
            )

    @torch.no_grad()
    def merge(self) -> PreTrainedModel:
        """Add (alpha / r) B A to each weight and take the adapters out: an ordinary model again, which is returned.

        The sum is computed in float32 and rounded once, to the nearest number of the weights' dtype. In float32 the model computes the
        same as before but for the order of sums. In 16 bits a change of less than half the distance between two numbers is lost (of 0.02
        in bfloat16 that is 6e-5), so the model differs a little from the one that was trained and evaluated; a warning says how many were.

        The model must not be fused (``engine.remove()``).
        """
        if getattr(self.model, "_lowtide_engine", None) is not None:
            raise RuntimeError("adapters of a fused model cannot be merged: call engine.remove() first")
        if (share := self.share_lost_by_merging()) is not None:
            _logger.warning(
                "the adapters are merged into 16-bit weights: %.0f %% of the changes are smaller than the distance of the numbers "
                "there and are lost; the adapters themselves have them all",
                100 * share,
            )
        merged = self.peft_model.merge_and_unload()
        assert merged is self.model
        return self.model

    @torch.no_grad()
    def share_lost_by_merging(self) -> float | None:
        """Share of the changes of 16-bit weights that rounding will undo in :meth:`merge`; None in float32, or if nothing changes."""
        changed = lost = 0
        for layer in adapted_layers(self.model).values():
            weight, delta = layer.get_base_layer().weight, layer.get_delta_weight(_ADAPTER)  # type: ignore[operator]
            if weight.dtype in SIXTEEN_BIT:
                changes = delta != 0
                changed += int(changes.sum())
                lost += int((changes & ((weight + delta).to(weight.dtype) == weight)).sum())
        return lost / changed if changed else None


def add_lora(
    model: PreTrainedModel,
    *,
    rank: int,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Sequence[str] | None = None,
    train_base: bool = False,
) -> Adapters:
    """Add LoRA adapters to linear layers of a model, in place. A is drawn from torch's global random numbers.

    Args:
        model: a loaded model of transformers, without adapters and not fused.
        rank: of the adapters; at most the smaller side of each weight.
        alpha: the adapters' output is multiplied with alpha / rank.
        dropout: probability with which an adapter's input is zeroed in training.
        targets: ends of the names of the layers, as ``"q_proj"``, or ``["all-linear"]`` for all but the head. None for what peft has
            for this architecture, else q_proj and v_proj.
        train_base: leave the parameters trainable that are; otherwise all but the adapters are frozen.

    Raises:
        ModuleNotFoundError: peft is not installed.
        ValueError: a number is out of range, no layer has such a name, or a layer cannot have an adapter. The model is unchanged.
        RuntimeError: the model is fused.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    if getattr(model, "_lowtide_engine", None) is not None:
        raise RuntimeError("this model is fused: add adapters before fuse(), or call engine.remove() first")
    if adapted_layers(model):
        raise ValueError("this model has adapters already: merge them first (peft's merge_and_unload)")
    if alpha < 1:
        raise ValueError(f"alpha must be at least 1, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and less than 1, got {dropout}")
    wanted = resolve_targets(model, targets)
    layers = matching_layers(model, wanted)
    check_layers(model, layers, rank)
    trainable = [param for param in model.parameters() if param.requires_grad]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=wanted if isinstance(wanted, str) else list(wanted),
        fan_in_fan_out=not all(isinstance(layer, nn.Linear) for layer in layers.values()),
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(model, config)
    if train_base:
        for param in trainable:
            param.requires_grad_(True)
    for layer in adapted_layers(model).values():
        layer.train(model.training)
    return Adapters(model, peft_model, train_base)


def require_peft() -> None:
    """See that peft is there.

    Raises:
        ModuleNotFoundError: it is not.
    """
    try:
        import peft  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ModuleNotFoundError("LoRA needs the package peft: pip install 'lowtide[lora]'", name="peft") from None


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model that hold adapters of peft, by name."""
    return {name: module for name, module in model.named_modules() if is_a(module, "BaseTunerLayer")}


def bare_model(model: nn.Module) -> nn.Module:
    """The model inside peft's wrapper, if the wrapper has no parameters of its own; else the model itself."""
    if not is_a(model, "PeftModel"):
        return model
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner if len(list(inner.parameters())) == len(list(model.parameters())) else model


def base_names(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Of these names of a model's state those of its own tensors, and what they would be called if it had no adapters."""
    layers = adapted_layers(model)
    if not layers:
        return {name: name for name in names}
    found = {}
    for name in names:
        ends = [index for index, letter in enumerate(name) if letter == "."]
        owner = next((name[:end] for end in ends if name[:end] in layers), None)
        if owner is None:
            found[name] = name
        elif (inside := name[len(owner) + 1 :]).startswith("base_layer."):
            found[name] = f"{owner}.{inside.removeprefix('base_layer.')}"
    return found


def merge_saved(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """Merge the adapters that :meth:`Adapters.save` wrote into the model that they belong to.

    Raises:
        ModuleNotFoundError: peft is not installed.
        FileNotFoundError: there are none.
    """
    require_peft()
    from peft import PeftModel

    _check_saved(directory)
    trainable = [param for param in model.parameters() if param.requires_grad]
    with torch.no_grad():
        merged: Any = PeftModel.from_pretrained(model, str(directory)).merge_and_unload()
    for param in trainable:  # which peft has frozen
        param.requires_grad_(True)
    return merged


def has_adapters(directory: Path) -> bool:
    """Whether :meth:`Adapters.save` wrote into this directory."""
    return (directory / _CONFIG).is_file()


def _check_saved(directory: Path) -> None:
    # Otherwise peft would look for a pickle, and then on the hub.
    for name in (_WEIGHTS, _CONFIG):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"there are no adapters in {directory}: it has no {name}")
