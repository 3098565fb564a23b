"""Cross entropy of a language model without ever holding the logits of all tokens in float32.

The logits are made vocabulary slice by vocabulary slice. Forward keeps a running log-sum-exp (the "online softmax" of
Milakov & Gimelshein 2018); backward takes the slices that were kept, makes the others again, and a slice of the weight's
gradient is then complete in one matrix product. Memory is bounded whatever the number of tokens and the size of the
vocabulary; the price, where 128 MiB do not hold the logits, is up to one more product with the head. torch's own
``linear_cross_entropy`` (2.13) computes the same (a parity test says so); on a 2-core CPU it took 2.1 times (float32) and 4.9
times (bfloat16) as long as plain logits, this one 1.00 and 0.89 times (``benchmarks/loss_cpu.py``), so torch's is not used.

Shape letters: T = tokens that count, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ..fused.matmul16 import fast_matmuls
from ..fused.slices import SliceIntake, Use
from ..fused.turned import transposed_product
from ..optim.base import SIXTEEN_BIT
from ..optim.kernels.product import TiledProduct
from ..optim.sliced import SlicedGradient, rows_at_a_time

IGNORE_INDEX = -100
# Float32 logits alive at a time: 4 Mi elements are 16 MiB.
_MAX_LOGITS = 2**22
_MIN_SLICE = 1024
# Logits that wait for the backward pass, in the dtype of the hidden states.
_MAX_KEPT_BYTES = 2**27


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
    reduction: str = "mean",
    intake: SliceIntake | None = None,
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
        intake: takes the weight's gradient in slices; None to return it to autograd as a whole.

    Returns:
        float32, zero-dimensional.

    Raises:
        ValueError: shapes do not fit, a label is no entry of the vocabulary, or ``reduction`` is unknown.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    if hidden.shape[:-1] != labels.shape or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"shapes do not fit: hidden {tuple(hidden.shape)}, labels {tuple(labels.shape)}, weight {tuple(weight.shape)}"
        )
    counted = (labels != IGNORE_INDEX).reshape(-1).nonzero().squeeze(1)
    labels = labels.reshape(-1)[counted]
    unknown = (labels < 0) | (labels >= weight.shape[0])
    if bool(unknown.any()):
        raise ValueError(
            f"labels hold {int(labels[unknown][0])}, and the vocabulary has {weight.shape[0]} entries, from 0 on: what is not to be learnt has "
            f"the label {IGNORE_INDEX}"
        )
    # Tokens that do not count need no logits at all: with short answers after long prompts that is most of them.
    hidden = hidden.reshape(-1, hidden.shape[-1]).index_select(0, counted)
    if torch.is_autocast_enabled(hidden.device.type):  # backward runs outside autocast: decide the dtype here, once
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    follows = torch.is_grad_enabled()  # a backward pass may
    use = intake.begin(weight) if intake is not None and follows and weight.requires_grad else None
    trained = any(each is not None and each.requires_grad for each in (hidden, weight, bias))
    kept = _KeptLogits(_MAX_KEPT_BYTES if follows and trained else 0)
    total = _LinearCrossEntropy.apply(hidden, weight, bias, labels, scale, softcap, intake, use, kept)
    return total if reduction == "sum" else total / counted.numel()


class _KeptLogits:
    """Products of hidden states and slices of the weight, each [T, r] in the dtype of the hidden states, for the backward pass.

    Args:
        room: bytes that they may take together; slices for which there is none are not kept.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._slices: dict[tuple[int, int], Tensor] = {}

    def put(self, vocab: slice, tokens: slice, num_tokens: int, product: Tensor) -> None:
        """Keep what was made for some tokens; those of one slice come one after the other."""
        key, width = (vocab.start, vocab.stop), product.shape[1]
        if tokens.start == 0:
            num_bytes = num_tokens * width * product.element_size()
            if num_bytes > self._room:
                return
            self._room -= num_bytes
            if product.shape[0] == num_tokens and product.dtype in SIXTEEN_BIT:
                self._slices[key] = product
                return
            self._slices[key] = product.new_empty((num_tokens, width))
        if key in self._slices:
            self._slices[key][tokens] = product

    def take(self, vocab: slice) -> Tensor | None:
        """The products [T, r] of a slice, which are kept no longer, or None."""
        return self._slices.pop((vocab.start, vocab.stop), None)

    def move(self) -> _KeptLogits:
        """All of them, which are not here any longer."""
        moved = _KeptLogits(0)
        moved._slices, self._slices = self._slices, {}
        return moved


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
        intake: SliceIntake | None,
        use: Use | None,
        kept: _KeptLogits,
    ) -> Tensor:
        highest = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)
        total = torch.zeros_like(highest)
        target = torch.zeros_like(highest)
        with fast_matmuls(weight):
            for vocab, tokens in _slices(hidden.shape[0], weight):
                product = _product(hidden[tokens], weight[vocab], None if bias is None else bias[vocab])
                kept.put(vocab, tokens, hidden.shape[0], product)
                logits = _logits(product, scale, softcap)
                new_highest = torch.maximum(highest[tokens], logits.amax(dim=1))
                inside, columns = _targets(labels[tokens], vocab)
                target[tokens] += logits.gather(1, columns).squeeze(1).masked_fill_(~inside, 0.0)
                total[tokens] *= (highest[tokens] - new_highest).exp_()
                total[tokens] += logits.sub_(new_highest.unsqueeze(1)).exp_().sum(dim=1)
                highest[tokens] = new_highest
        log_sum_exp = highest.add_(total.log_())
        ctx.save_for_backward(hidden, weight, labels, log_sum_exp, *(() if bias is None else (bias,)))
        ctx.scale, ctx.softcap, ctx.intake, ctx.use, ctx.kept = scale, softcap, intake, use, kept
        return (log_sum_exp - target).sum()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, log_sum_exp, *rest = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        bias = rest[0] if rest else None
        gradient = _HeadGradient(
            hidden,
            weight,
            bias,
            labels,
            log_sum_exp,
            grad_output,
            ctx.scale,
            ctx.softcap,
            need_hidden,
            need_bias,
            ctx.kept.move(),
        )
        grad_weight: Tensor | None = None
        if need_weight and (ctx.use is None or not ctx.intake.take(ctx.use, gradient, grad_output)):
            grad_weight = torch.empty_like(weight)
            for rows in gradient.row_slices():
                grad_weight[rows] = gradient.part(rows)
        gradient.finish()
        grad_hidden, grad_bias = gradient.grad_hidden, gradient.grad_bias
        gradient.grad_hidden = gradient.grad_bias = None  # it may wait for the end of the pass
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None, None, None


class _HeadGradient(SlicedGradient):
    """The gradient of the weight [V, H], a product for every slice; on the first walk those of hidden states and bias fall out of it.

    They are made before a slice is handed out, so that its weights may be changed then.

    Attributes:
        grad_hidden: float32 [T, H], or None if it is not needed.
        grad_bias: [V], or None.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        log_sum_exp: Tensor,
        grad_output: Tensor,
        scale: float,
        softcap: float | None,
        need_hidden: bool,
        need_bias: bool,
        kept: _KeptLogits,
    ) -> None:
        self.hidden, self.weight, self.labels = hidden, weight, labels
        self.bias = None if bias is None else bias.clone()  # it may be updated before the last walk
        self.log_sum_exp, self.factor, self.scale, self.softcap = log_sum_exp, grad_output * scale, scale, softcap
        self.num_rows = weight.shape[0]
        self.slice_rows = _slice_width(hidden.shape[0], weight)
        self._kept = kept
        self.grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if need_hidden else None
        self.grad_bias = torch.zeros_like(bias) if bias is not None and need_bias else None
        self._first_row = 0  # up to here hidden states and bias have had theirs

    def part(self, rows: slice) -> Tensor:
        """See :class:`SlicedGradient`."""
        found = self._visit(rows, of_weight=True)
        assert isinstance(found, Tensor)
        return found

    def unmade_parts(
        self, all_rows: bool, scratch: Callable[[int], Tensor]
    ) -> Iterator[tuple[slice | Tensor, Tensor | TiledProduct]]:
        """See :class:`SlicedGradient`."""
        for rows in self.row_slices():
            found = self._visit(rows, of_weight=True, scratch=scratch)
            assert found is not None
            yield rows, found

    def finish(self) -> None:
        """Complete the gradients of hidden states and bias, if nobody has walked over the slices."""
        if self.grad_hidden is not None or self.grad_bias is not None:
            for rows in self.row_slices():
                if rows.start >= self._first_row:
                    self._visit(rows, of_weight=False)
        self._kept.move()  # of slices that were cut otherwise

    def _visit(
        self, vocab: slice, of_weight: bool, scratch: Callable[[int], Tensor] | None = None
    ) -> Tensor | TiledProduct | None:
        first = vocab.start >= self._first_row
        if first:
            self._first_row = vocab.stop
        num_tokens = self.hidden.shape[0]
        height = max(1, _MAX_LOGITS // (vocab.stop - vocab.start))
        weight, bias = self.weight[vocab], None if self.bias is None else self.bias[vocab]
        products = self._kept.take(vocab)
        found: Tensor | None = None
        with fast_matmuls(self.weight):
            for start in range(0, num_tokens, height):
                tokens = slice(start, start + height)
                product = _product(self.hidden[tokens], weight, bias) if products is None else products[tokens]
                grad = self._grad_logits(product, tokens, vocab)
                if first and self.grad_bias is not None:
                    self.grad_bias[vocab] += grad.sum(dim=0)
                grad = grad.to(self.hidden.dtype)
                if first and self.grad_hidden is not None:
                    self.grad_hidden[tokens] += grad @ weight.to(self.hidden.dtype)
                if not of_weight:
                    continue
                if scratch is not None and num_tokens <= height:
                    unmade = TiledProduct.of(grad, self.hidden, scratch)
                    if unmade is not None:
                        return unmade
                part = transposed_product(grad, self.hidden[tokens])
                if found is None:
                    found = part if num_tokens <= height else part.float()
                else:
                    found += part
        return torch.zeros_like(weight) if of_weight and found is None else found

    def _grad_logits(self, product: Tensor, tokens: slice, vocab: slice) -> Tensor:
        logits = _logits(product, self.scale, self.softcap)
        return _grad_logits(logits, self.labels[tokens], self.log_sum_exp[tokens], vocab, self.factor, self.softcap)


def _slice_width(num_tokens: int, weight: Tensor) -> int:
    """Rows of the weight at a time, which are the same in both passes: what one keeps the other takes."""
    return min(rows_at_a_time(*weight.shape), max(_MIN_SLICE, _MAX_LOGITS // max(1, num_tokens)))


def _slices(num_tokens: int, weight: Tensor) -> Iterator[tuple[slice, slice]]:
    """(vocabulary, tokens), all tokens of one vocabulary slice before the next."""
    width = _slice_width(num_tokens, weight)
    height = max(1, min(num_tokens, _MAX_LOGITS // width))
    for start in range(0, weight.shape[0], width):
        for token in range(0, num_tokens, height):
            yield slice(start, min(start + width, weight.shape[0])), slice(token, min(token + height, num_tokens))


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(hidden, weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype))


def _logits(product: Tensor, scale: float, softcap: float | None) -> Tensor:
    """In float32, in the place of a product that is."""
    logits = product.float()
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
