"""An estimate for models that cannot be run on the meta device.

Activations of one layer with fused attention take ``34 * S * B * H`` bytes in 16 bits (Korthikanti et al. 2022, arXiv
2205.05198, equation 2 without the attention scores), which assumes an MLP of four times the hidden size.

Shape letters: B = samples, S = tokens of a sample, H = hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..optim.base import SIXTEEN_BIT
from .block_trace import BlockCall, WorkingSet
from .head_loss import kept_widths, slice_shape
from .moments import Moment, StepTrace
from .tracing import GRADIENTS, KEPT, LOGITS, OTHER, WORKING

_ELEMENTS_PER_INPUT = 17  # of activations for one of the layer's input: 34 bytes of 16-bit numbers


def untraced_working_set(
    call: BlockCall, micro_batch_size: int, *, gathered: bool = False, sums_dtype: torch.dtype | None = None
) -> WorkingSet:
    """Bytes that one block needs, from the size of its input and its parameters; the rest as for ``trace_block``."""
    hidden = call.tensors()[0]
    share = hidden.nbytes * min(micro_batch_size, hidden.shape[0]) // hidden.shape[0]
    params = list(call.block.parameters())
    itemsize = 4 if params[0].dtype in SIXTEEN_BIT else params[0].itemsize
    if micro_batch_size < hidden.shape[0]:
        gradients = sum(param.numel() for param in params) * itemsize + max(param.nbytes for param in params)
    else:
        gradients = max(param.nbytes for param in params)
    if gathered:
        gradients = sum(param.nbytes for param in params)
        if micro_batch_size < hidden.shape[0] and sums_dtype not in (None, params[0].dtype):
            gradients += sum(param.numel() for param in params) * sums_dtype.itemsize
    activations = _ELEMENTS_PER_INPUT * share
    return WorkingSet(
        {WORKING: hidden.nbytes + activations // 3}, {WORKING: hidden.nbytes + activations, GRADIENTS: gradients}
    )


def untraced_step(
    model: nn.Module, blocks: Sequence[nn.Module], batch_size: int, seq_len: int, two_passes: bool
) -> StepTrace:
    """Kept inputs, logits and the largest gradient of embedding and head."""
    any_model: Any = model
    weight = any_model.get_output_embeddings().weight
    hidden = torch.empty((batch_size, seq_len, weight.shape[1]), dtype=weight.dtype, device="meta", requires_grad=True)
    num_tokens = batch_size * seq_len
    width, height = slice_shape(num_tokens, weight)
    waiting = sum(kept_widths(num_tokens, weight, hidden.element_size())) * num_tokens * hidden.element_size()
    kept = {KEPT: hidden.nbytes * len(blocks), OTHER: hidden.nbytes}
    outside = {**kept, OTHER: 4 * hidden.nbytes, LOGITS: 2 * 4 * width * height + waiting, GRADIENTS: weight.nbytes}
    phases = ("forward", "measure", "backward") if two_passes else ("forward", "backward")
    moments = [Moment(phase, index, kept, 0, outside, (0, 0)) for phase in phases for index in range(len(blocks))]
    calls = tuple(BlockCall(block, (hidden,), {}) for block in blocks)
    return StepTrace(outside, tuple(moments), calls, hidden.nbytes * len(blocks), hidden.nbytes)
