"""Samples of a run: the same few held-out prompts, answered before the first step and after the last. They change nothing."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ..evaluation.samples import answer_samples, choose_samples, texts_of
from ..log import get_logger
from ..models.context import context_length
from .rng import random_state, set_random_state

if TYPE_CHECKING:
    from .run import Run

DEFAULT_SAMPLES = 3
_logger = get_logger(__name__)


def num_samples(run: Run) -> int:
    """As the settings say; by default none where weights visit the device or are gathered: every token of an answer needs all of them."""
    wanted = run.config.samples
    if wanted is None:
        return 0 if run.engine.home.streamed or run.ranks.size > 1 else DEFAULT_SAMPLES
    return wanted


def take_samples(run: Run) -> None:
    """Let the model answer, and report it. The random state is as it was, and a model that cannot generate is no reason to stop.

    Raises:
        OSError: weights that live on disk could not be read.
    """
    held_out, count = run.data.held_out, num_samples(run)
    if held_out is None or count == 0:
        return
    limit = context_length(run.model.config)
    chosen = choose_samples(held_out, count, limit)
    if not chosen:
        _logger.info("no samples: the held-out prompts are too long")
        return
    start, state = time.perf_counter(), random_state()
    try:
        answers = answer_samples(run.model, run.tokenizer, chosen, run.device)
    except OSError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:300]
        _logger.warning("no samples, the training goes on: %s: %s", type(error).__name__, text)
        return
    finally:
        set_random_state(state)
    samples = [
        {**texts_of(run.tokenizer, sample), "answer": answer} for sample, answer in zip(chosen, answers, strict=True)
    ]
    run.report.samples(samples, time.perf_counter() - start)
