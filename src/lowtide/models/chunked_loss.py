"""The training loss of Hugging Face causal language models without their logits: puts ``loss.py`` in the place of their own."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..fused.slices import SliceIntake
from ..log import get_logger
from ..optim.shards import is_sharded
from ..ranks import ALONE, Ranks
from .lora import bare_model
from .loss import IGNORE_INDEX, linear_cross_entropy

_logger = get_logger(__name__)

_LOOKED_AT = "_lowtide_chunked_loss"  # attribute of a sharded model


def causal_lm_loss(model: nn.Module, *, num_items_in_batch: Any = None, **batch: Any) -> Tensor:
    """Next-token loss of a Hugging Face causal language model, without its logits. Works in training and evaluation.

    Labels are shifted by one inside; the mean is over counted labels of the whole batch (or over
    ``num_items_in_batch``, as transformers' Trainer passes it).

    Args:
        model: a causal language model that :class:`ChunkedLoss` accepts.
        batch: ``labels`` [B, S] and whatever the model's forward takes (``input_ids``, masks, positions).

    Raises:
        ValueError: the head of this model is not understood.
    """
    loss = ChunkedLoss.of(model)
    if loss is None:
        raise ValueError(f"{type(model).__name__} has a head that lowtide does not know how to compute in slices")
    return loss(num_items_in_batch=num_items_in_batch, **batch).loss


class ChunkedLoss:
    """Replaces a causal language model's training forward by one that returns the same loss and no logits.

    Args:
        model: a Hugging Face causal language model.
        scale: factor that its head puts on the logits.
        softcap: cap that its head puts on the logits.
    """

    def __init__(self, model: Any, scale: float = 1.0, softcap: float | None = None) -> None:
        self.model, self.scale, self.softcap = model, scale, softcap
        self.ranks: Ranks = ALONE  # over whose tokens the mean is taken
        self.intake: SliceIntake | None = None  # of the head's gradient in slices
        self.original = model.forward
        self._replaced = model.__dict__.get("forward")
        self._parameters = inspect.signature(self.original).parameters

    @classmethod
    def of(cls, model: Any) -> ChunkedLoss | None:
        """The chunked loss for this model, or None if its own loss cannot be reproduced (then it must be left alone)."""
        model = bare_model(model)
        if _LOOKED_AT in model.__dict__:  # a sharded model's head is whole only while the model runs
            known = model.__dict__[_LOOKED_AT]
            return None if known is None else cls(model, known.scale, known.softcap)
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        if any(is_sharded(param) for param in model.parameters()):
            _logger.warning(
                "the model was not sharded by lowtide.shard: its own loss is used, which is the mean over one rank's tokens"
            )
            return None
        base = getattr(model, "base_model", model)
        config = getattr(model, "config", None)
        if not isinstance(head, nn.Linear) or base is model or config is None:
            return None
        if getattr(config, "output_router_logits", False):
            return None  # the loss has a second term
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        scale = getattr(text, "logit_scale", None) or 1.0 / (getattr(text, "logits_scaling", None) or 1.0)
        candidate = cls(model, float(scale), getattr(text, "final_logit_softcapping", None))
        return candidate if candidate._agrees() else None

    @classmethod
    def look_at(cls, model: Any) -> None:
        """Remember what :meth:`of` says of a model that is about to be sharded."""
        model.__dict__[_LOOKED_AT] = cls.of(model)

    @contextmanager
    def through_model(self) -> Iterator[Callable[..., Any]]:
        """What gives the same as calling this, by a call of the model as a whole, in evaluation, too.

        A sharded model's weights are gathered only so.
        """
        head = None if isinstance(self.head.__dict__.get("_lowtide_loss"), HeadForward) else HeadForward(self.head)
        inner = self.model.__dict__.get("forward")
        if head is not None:
            head.install()
        self.model.forward = self
        try:
            yield self.model
        finally:
            if inner is None:
                del self.model.forward
            else:
                self.model.forward = inner
            if head is not None:
                head.remove()

    @property
    def head(self) -> nn.Linear:
        """The output head."""
        found: nn.Linear = self.model.get_output_embeddings()
        return found

    def install(self) -> None:
        """Use this loss whenever the model is called with labels in training."""

        @functools.wraps(self.original)  # the Trainer looks at the arguments, to leave out columns that are none
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        self.model.forward = forward

    def remove(self) -> None:
        """The model's own forward again."""
        if self._replaced is None:
            self.model.__dict__.pop("forward", None)
        else:
            self.model.forward = self._replaced

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        bound = dict(zip(self._parameters, args, strict=False), **kwargs)
        if bound.get("output_router_logits"):
            raise ValueError(
                "output_router_logits=True adds a router loss that gets no gradient from blocks: leave it off"
            )
        if self.model.training and bound.get("labels") is not None and torch.is_grad_enabled():
            return self(**bound)
        return self.original(*args, **kwargs)

    def __call__(self, labels: Tensor, num_items_in_batch: Any = None, **batch: Any) -> Any:
        """The model's output with ``loss`` and without ``logits``. Arguments as in :func:`causal_lm_loss`."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        shifted = batch.pop("shift_labels", None)
        for name in ("logits_to_keep", "return_dict", "use_cache"):
            batch.pop(name, None)
        outputs = self.model.base_model(**batch, use_cache=False, return_dict=True)
        hidden = outputs.last_hidden_state
        if shifted is None:
            hidden, shifted = hidden[:, :-1], labels[:, 1:]
        head = self.head
        options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
        over_ranks = num_items_in_batch is None and self.ranks.size > 1
        options["reduction"] = "mean" if num_items_in_batch is None and not over_ranks else "sum"
        shifted = shifted.to(hidden.device)
        if isinstance(head.__dict__.get("_lowtide_loss"), HeadForward):  # its weights may be away: it is a block
            total = head(hidden, shifted, **options)
        else:
            total = linear_cross_entropy(hidden, head.weight, shifted, bias=head.bias, intake=self.intake, **options)
        if over_ranks:
            loss = _MeanOverRanks.apply(total, (shifted != IGNORE_INDEX).sum())
        else:
            loss = total if num_items_in_batch is None else total / num_items_in_batch
        return CausalLMOutputWithPast(
            loss=loss,
            hidden_states=getattr(outputs, "hidden_states", None),
            attentions=getattr(outputs, "attentions", None),
        )

    def _agrees(self) -> bool:
        """Compare with the model's own loss on made-up hidden states: only the head runs, whatever the size of the model.

        Logits are made large enough (standard deviation 20) to tell caps and scales apart from plain heads.
        """
        model, base = self.model, self.model.base_model
        head = model.get_output_embeddings()
        if head.weight.is_meta:
            return False
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, 5, head.in_features, generator=generator).to(head.weight.device, head.weight.dtype)
        labels = torch.randint(head.out_features, (1, 5), generator=generator).to(head.weight.device)
        kept = base.__dict__.get("forward")
        was_training = model.training
        try:
            with torch.no_grad():
                spread = head(hidden).float().std().clamp_(min=1e-6)
                hidden = (hidden * (20.0 / spread)).to(head.weight.dtype)
                base.forward = lambda *args, **kwargs: _HeadInput(last_hidden_state=hidden)
                model.eval()
                expected = self.original(input_ids=labels, labels=labels).loss.float()
                found = self(labels=labels, input_ids=labels).loss
        except Exception as error:  # whatever a model of someone else's does with made-up input: then leave it alone
            _logger.info("the head of %s could not be checked (%s): its own loss is used", type(model).__name__, error)
            return False
        finally:
            model.train(was_training)
            if kept is None:
                base.__dict__.pop("forward", None)
            else:
                base.forward = kept
        return torch.allclose(expected, found, rtol=1e-2, atol=1e-3)


class _MeanOverRanks(torch.autograd.Function):
    """Of sums and counts, one on each rank, the quotient of their totals, everywhere; one collective call.

    Its gradient is that of the quotient times the number of ranks, because FSDP2 takes the mean of the ranks' gradients.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, count: Tensor) -> Tensor:
        both = torch.stack((total.double(), count.double()))
        torch.distributed.all_reduce(both)
        ctx.factor = torch.distributed.get_world_size() / both[1]
        return (both[0] / both[1]).to(total.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad * ctx.factor).to(grad.dtype), None


class HeadForward:
    """The forward of an output head that also computes the loss, so that a head whose weights move is a block like others.

    Args:
        head: a linear layer; :meth:`install` replaces its forward.
    """

    def __init__(self, head: nn.Linear) -> None:
        self.head, self.original = head, head.forward
        self.intake: SliceIntake | None = None  # as in ChunkedLoss
        self._replaced = head.__dict__.get("forward")

    def install(self) -> None:
        """Replace the head's forward."""
        self.head.__dict__["forward"] = self
        self.head.__dict__["_lowtide_loss"] = self

    def remove(self) -> None:
        """The head's own forward again."""
        self.head.__dict__.pop("_lowtide_loss", None)
        self.head.__dict__.pop("forward", None)
        if self._replaced is not None:
            self.head.__dict__["forward"] = self._replaced

    def __call__(self, hidden: Tensor, labels: Tensor | None = None, **options: Any) -> Tensor:
        """The logits; with labels the loss, see :func:`linear_cross_entropy`."""
        if labels is None:
            return self.original(hidden)
        return linear_cross_entropy(
            hidden, self.head.weight, labels, bias=self.head.bias, intake=self.intake, **options
        )


class _HeadInput(dict[str, Any]):
    """Stands in for the output of a base model: made-up hidden states, and None for anything else that is asked for."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else super().__getitem__(key)
