"""Samples: what a model says to a few prompts of the held-out data, to be read beside what the data says.

Always the likeliest token (no chance is drawn), all prompts in one batch. Shapes: B prompts, S tokens of the longest of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data import Batches
from ..models.padding import padding_id

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MAX_NEW_TOKENS = 40
_MAX_PROMPT_TOKENS = 512
_TEXT_PROMPT_TOKENS = 24  # of plain text, where everything is learnt: half of it, but no more than this
_NUM_LOOKED_AT = 1000  # held-out examples


@dataclasses.dataclass(frozen=True)
class Sample:
    """A prompt, and what the data has behind it.

    Attributes:
        prompt: token ids, at least one.
        expected: token ids.
    """

    prompt: list[int]
    expected: list[int]


def choose_samples(held_out: Batches, count: int, max_tokens: int | None = None) -> list[Sample]:
    """The first different held-out examples that leave room for an answer: always the same ones of the same data.

    Of an example that is learnt in parts (an answer, the turns of an assistant) the prompt is what comes before the first part, and
    expected is that part. Of plain text it is the first half, 24 tokens at most.

    Args:
        held_out: batches of the examples.
        count: how many, at most.
        max_tokens: of prompt and answer together; None for no limit but that of a prompt, 512.
    """
    longest = _MAX_PROMPT_TOKENS if max_tokens is None else min(_MAX_PROMPT_TOKENS, max_tokens - MAX_NEW_TOKENS)
    found: list[Sample] = []
    for number in range(min(held_out.num_examples, _NUM_LOOKED_AT)):
        if len(found) == count:
            break
        sample = _split(*held_out.example(number))
        if len(sample.prompt) <= longest and sample not in found:
            found.append(sample)
    return found


def _split(ids: Sequence[int], learnt: Sequence[bool]) -> Sample:
    first = next(index for index, each in enumerate(learnt) if each and index)
    if first == 1:  # plain text: the first token is never learnt
        first = max(1, min(_TEXT_PROMPT_TOKENS, len(ids) // 2))
    behind = next((index for index in range(first, len(ids)) if not learnt[index]), len(ids))
    return Sample(list(ids[:first]), list(ids[first : min(behind, first + MAX_NEW_TOKENS)]))


def answer_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], device: torch.device | str
) -> list[str]:
    """What the model says, 40 tokens at most, special tokens left out. Its mode is restored afterwards.

    Args:
        model: a causal language model of transformers; may be fused.
        tokenizer: its tokenizer.
        samples: at least one.
        device: where it computes.

    Raises:
        Whatever the model's own code raises: not every model can generate.
    """
    padding = padding_id(tokenizer, model)
    width = max(len(sample.prompt) for sample in samples)
    input_ids = torch.full((len(samples), width), padding)  # [B, S], padded on the left
    attention_mask = torch.zeros_like(input_ids)
    for row, sample in enumerate(samples):
        input_ids[row, width - len(sample.prompt) :] = torch.tensor(sample.prompt)
        attention_mask[row, width - len(sample.prompt) :] = 1
    generate: Any = model.generate
    with _evaluating(model), torch.no_grad():
        output = generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=padding,
            use_cache=True,
            do_sample=False,  # a generation config of the model may ask for sampling; these undo all of it
            temperature=None,
            top_p=None,
            top_k=None,
        )
    return [str(text) for text in tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)]


def texts_of(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> dict[str, str]:
    """``prompt``, with its special tokens, and ``expected``, without."""
    return {
        "prompt": str(tokenizer.decode(sample.prompt)),
        "expected": str(tokenizer.decode(sample.expected, skip_special_tokens=True)),
    }


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
