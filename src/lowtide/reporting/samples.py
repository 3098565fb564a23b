"""What the model said to a few prompts before and after training, as HTML. All of it is text of the user or of a model: escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .charts import label
from .history import History

_MAX_PROMPT = 600  # characters; of a longer one the end is shown
_MAX_TEXT = 1000


def samples_list(runs: Sequence[History]) -> str:
    """Each prompt once, with the answers of every run and what the data says; empty where there are none."""
    prompts = dict.fromkeys((sample.prompt, sample.expected) for run in runs for sample in run.samples)
    return "".join(f'<article class="sample">{_sample(*each, runs)}</article>' for each in prompts)


def _sample(prompt: str, expected: str, runs: Sequence[History]) -> str:
    answers = [
        (label("before the first step" if step == 0 else f"after step {step}", run, runs), text)
        for run in runs
        for sample in run.samples
        if (sample.prompt, sample.expected) == (prompt, expected)
        for step, text in sample.answers
    ]
    shown = prompt if len(prompt) <= _MAX_PROMPT else f"… {prompt[-_MAX_PROMPT:]}"
    cells = "".join(_answer(name, text) for name, text in (*answers, ("in the data", expected)))
    return f'<h3 class="quiet">Prompt</h3><p class="prompt">{escape(shown)}</p><dl>{cells}</dl>'


def _answer(name: str, text: str) -> str:
    shown = text.strip() if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT].strip()} …"
    said = f"<dd>{escape(shown)}</dd>" if shown else '<dd class="nothing">nothing</dd>'
    return f"<div><dt>{escape(name)}</dt>{said}</div>"
