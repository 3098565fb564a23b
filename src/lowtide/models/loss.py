"""Cross entropy of a language model without ever holding the logits of all tokens in float32.

The logits are made vocabulary slice by vocabulary slice. Forward keeps a running log-sum-exp (the "online softmax" of
Milakov & Gimelshein 2018); backward makes each slice again, and a slice of the weight's gradient is then complete in one
matrix product. Memory is bounded whatever the number of tokens and the size of the vocabulary; the price is one more
product with the head. torch's own ``linear_cross_entropy`` (2.13) computes the same (a parity test says so); on a 2-core CPU
it took 2.0 (float32) to 5.2 times (bfloat16) as long as plain logits, this one 1.3 and 1.15 times
(``benchmarks/loss_cpu.py``), so torch's is not used.

Shape letters: T = tokens that count, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..log import get_logger

_logger = get_logger(__name__)

IGNORE_INDEX = -100
# Float32 logits alive at a time: 4 Mi elements are 16 MiB.
_MAX_LOGITS = 2**22
_MIN_SLICE = 1024


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Cross entropy of ``logits = cap(scale * (hidden @ weight.T + bias))`` against ``labels``, in slices.

    Args:
        hidden: [..., H], any floating dtype; logits are rounded to it, as an ordinary head would, then used in float32.
        weight: [V, H].
        labels: int64, the leading shape of ``hidden``; -100 is not counted.
        bias: [V] or None.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``; None for none.
        reduction: "mean" over counted labels (NaN if there are none, as in torch) or "sum".

    Returns:
        float32, zero-dimensional.

    Raises:
        ValueError: shapes do not fit, or ``reduction`` is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, weight {tuple(weight.shape)}"
        )
    counted = (labels != IGNORE_INDEX).reshape(-1).nonzero().squeeze(1)
    # Tokens that do not count need no logits at all: with short answers after long prompts that is most of them.
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, counted)
    if torch.is_autocast_enabled(hidden.device.type):  # backward runs outside autocast: decide the dtype here, once
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    total = _LinearCrossEntropy.apply(hidden, weight, bias, labels.reshape(-1)[counted], scale, softcap)
    return total if reduction == "sum" else total / counted.numel()


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed cross entropy; see :func:`linear_cross_entropy`. ``hidden`` is [T, H] and all labels count."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        highest = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)
        total = torch.zeros_like(highest)
        target = torch.zeros_like(highest)
        for vocab, tokens in _slices(hidden.shape[0], weight.shape[0]):
            logits = _logits(hidden[tokens], weight[vocab], None if bias is None else bias[vocab], scale, softcap)
            new_highest = torch.maximum(highest[tokens], logits.amax(dim=1))
            inside, columns = _targets(labels[tokens], vocab)
            target[tokens] += logits.gather(1, columns).squeeze(1).masked_fill_(~inside, 0.0)
            total[tokens] *= (highest[tokens] - new_highest).exp_()
            total[tokens] += logits.sub_(new_highest.unsqueeze(1)).exp_().sum(dim=1)
            highest[tokens] = new_highest
        log_sum_exp = highest.add_(total.log_())
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp, *(() if bias is None else (bias,)))
        ctx.scale, ctx.softcap = scale, softcap
        return (log_sum_exp - target).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum_exp, *rest = ctx.saved_tensors
        bias = rest[0] if rest else None
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        grad_weight = torch.empty_like(weight) if need_weight else None
        grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        part: Tensor | None = None
        for vocab, tokens in _slices(hidden.shape[0], weight.shape[0]):
            part_bias = None if bias is None else bias[vocab]
            logits = _logits(hidden[tokens], weight[vocab], part_bias, ctx.scale, ctx.softcap)
            grad = _grad_logits(
                logits, labels[tokens], log_sum_exp[tokens], vocab, grad_output * ctx.scale, ctx.softcap
            )
            if grad_bias is not None:
                grad_bias[vocab] += grad.sum(dim=0)
            grad = grad.to(hidden.dtype)
            if grad_hidden is not None:
                grad_hidden[tokens] += grad @ weight[vocab].to(hidden.dtype)
            if grad_weight is not None:
                product = grad.t() @ hidden[tokens]
                if tokens.start == 0:
                    part = product if tokens.stop >= hidden.shape[0] else product.float()
                else:
                    part += product
                if tokens.stop >= hidden.shape[0]:
                    grad_weight[vocab] = part
        if grad_weight is not None and hidden.shape[0] == 0:
            grad_weight.zero_()
        return None if grad_hidden is None else grad_hidden.to(hidden.dtype), grad_weight, grad_bias, None, None, None


def _slices(num_tokens: int, vocab_size: int) -> Iterator[tuple[slice, slice]]:
    """(vocabulary, tokens), all tokens of one vocabulary slice before the next."""
    width = min(vocab_size, max(_MIN_SLICE, _MAX_LOGITS // max(1, num_tokens)))
    height = max(1, min(num_tokens, _MAX_LOGITS // width))
    for start in range(0, vocab_size, width):
        for token in range(0, num_tokens, height):
            yield slice(start, min(start + width, vocab_size)), slice(token, min(token + height, num_tokens))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    weight = weight.to(hidden.dtype)
    logits = functional.linear(hidden, weight, None if bias is None else bias.to(hidden.dtype)).float()
    if scale != 1.0:
        logits.mul_(scale)
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def _targets(labels: Tensor, vocab: slice) -> tuple[Tensor, Tensor]:
    """Which tokens [T] have their label in this slice of the vocabulary, and where in it [T, 1]; no host synchronisation."""
    inside = (labels >= vocab.start) & (labels < vocab.stop)
    return inside, (labels - vocab.start).clamp_(0, vocab.stop - vocab.start - 1).unsqueeze(1)


def _grad_logits(
    logits: Tensor, labels: Tensor, log_sum_exp: Tensor, vocab: slice, factor: Tensor, softcap: float | None
) -> Tensor:
    """Gradient with respect to ``hidden @ weight.T + bias``; ``factor`` is the incoming one times the scale."""
    slope = None if softcap is None else 1.0 - (logits / softcap).square_()
    inside, columns = _targets(labels, vocab)
    grad = logits.sub_(log_sum_exp.unsqueeze(1)).exp_()
    grad.scatter_add_(1, columns, inside.to(grad.dtype).neg_().unsqueeze(1))
    if slope is not None:
        grad.mul_(slope)
    return grad.mul_(factor)


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
        self.original = model.forward
        self._replaced = model.__dict__.get("forward")
        self._parameters = inspect.signature(self.original).parameters

    @classmethod
    def of(cls, model: Any) -> ChunkedLoss | None:
        """The chunked loss for this model, or None if its own loss cannot be reproduced (then it must be left alone)."""
        head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
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

    def install(self) -> None:
        """Use this loss whenever the model is called with labels in training."""
        self.model.forward = self._forward

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
        head = self.model.get_output_embeddings()
        total = linear_cross_entropy(
            hidden,
            head.weight,
            shifted.to(hidden.device),
            bias=head.bias,
            scale=self.scale,
            softcap=self.softcap,
            reduction="mean" if num_items_in_batch is None else "sum",
        )
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
                spread = functional.linear(hidden, head.weight).float().std().clamp_(min=1e-6)
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


class _HeadInput(dict[str, Any]):
    """Stands in for the output of a base model: made-up hidden states, and None for anything else that is asked for."""

    def __getattr__(self, name: str) -> Any:
        return self.get(name)

    def __getitem__(self, key: Any) -> Any:
        return self["last_hidden_state"] if key == 0 else super().__getitem__(key)
