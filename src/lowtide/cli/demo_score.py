"""How the demo tells what a model can do: a held-out score, and a few answers."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from ..data import Record, as_completion
from ..evaluation import ChoiceItem, choice_accuracy, evaluate_loss
from ..training import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .demo_material import Material

_NUM_EXAMPLES = 4
_ANSWER_TOKENS = 24
# Of a text that the model is to continue, so much is shown to it.
_PROMPT_CHARACTERS = 200


@dataclasses.dataclass(frozen=True)
class Score:
    """A held-out score.

    Attributes:
        metric: "accuracy" (0 to 1, higher is better) or "perplexity" (at least 1, lower is better).
        value: the score.
        count: items or tokens it was measured on.
        by_choice: accuracy among the items whose right answer is that choice; empty for a perplexity.
    """

    metric: str
    value: float
    count: int
    by_choice: dict[str, float]

    def __str__(self) -> str:
        return f"{self.value:.1%}" if self.metric == "accuracy" else f"{self.value:.2f}"


@dataclasses.dataclass(frozen=True)
class Example:
    """A held-out question, the right answer (or, of a text, how it goes on) and what the model said."""

    prompt: str
    expected: str
    answer: str


def score_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, material: Material, config: TrainConfig
) -> Score:
    """The held-out score of a model: accuracy where the material is a multiple choice, else perplexity."""
    if material.choices:
        items = [
            ChoiceItem(record.prompt or "", material.choices, material.choices.index(record.completion or ""))
            for record in material.held_out
        ]
        result = choice_accuracy(model, tokenizer, items, count_end=_needs_end(material.choices))
        right: dict[str, list[bool]] = {}
        for item, guess in zip(items, result.predictions, strict=True):
            right.setdefault(material.choices[item.gold].strip(), []).append(guess == item.gold)
        by_choice = {choice: sum(some) / len(some) for choice, some in sorted(right.items())}
        return Score("accuracy", result.accuracy, result.num_items, by_choice)
    from ..training.data import batches_of_records

    loss = evaluate_loss(model, batches_of_records(config, material.held_out, tokenizer).epoch(0))
    return Score("perplexity", loss.perplexity, loss.num_tokens, {})


def example_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, material: Material) -> list[Example]:
    """Greedy answers to a few held-out questions, the same ones for every model."""
    import torch

    model.eval()
    answers = []
    for record in _example_records(material):
        if tokenizer.chat_template is None:
            record = as_completion(record)
        shown, text, expected = _question(record, tokenizer)
        # A chat template has written its own first token.
        inputs = tokenizer(text, return_tensors="pt", add_special_tokens=record.messages is None)
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]
                input_ids=inputs["input_ids"],
                attention_mask=torch.ones_like(inputs["input_ids"]),
                max_new_tokens=_ANSWER_TOKENS,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=tokenizer.eos_token_id,
            )
        answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        answers.append(Example(shown, expected, str(answer)))
    return answers


def _needs_end(choices: tuple[str, ...]) -> bool:
    """Whether a choice is the beginning of another, so that only its end tells them apart."""
    return any(a != b and b.startswith(a) for a in choices for b in choices)


def _example_records(material: Material) -> list[Record]:
    """One for each of the first choices, if there are any, else the first."""
    if not material.choices:
        return material.held_out[: _NUM_EXAMPLES - 1]
    by_choice: dict[str, Record] = {}
    for record in material.held_out:
        by_choice.setdefault(record.completion or "", record)
    return list(by_choice.values())[:_NUM_EXAMPLES]


def _question(record: Record, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """(question to show, text that the model continues, what was expected) of a record."""
    if record.messages is not None:
        last = max(index for index, message in enumerate(record.messages) if message["role"] == "assistant")
        before = record.messages[:last]
        text = str(tokenizer.apply_chat_template(before, tokenize=False, add_generation_prompt=True))
        return before[-1]["content"], text, record.messages[last]["content"]
    if record.prompt is not None:
        return record.prompt, record.prompt, record.completion or ""
    text = record.text or ""
    at = min(_PROMPT_CHARACTERS, len(text) // 2)
    at = text.rfind(" ", 1, at) if text.rfind(" ", 1, at) > 0 else max(1, at)
    return text[:at], text[:at], text[at : at + _PROMPT_CHARACTERS // 2]
