"""What settings may be: their choices and defaults, the groups of the help, and a field with its help text.

This file imports neither torch nor transformers, so that ``--help`` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

OPTIMIZERS = ("adalomo", "lomo", "adamw", "sgd")
SCHEDULES = ("linear", "cosine", "constant")
ROUNDINGS = ("stochastic", "compensated", "nearest")
CLIPS = ("exact", "adaptive")
BAD_RECORDS = ("refuse", "skip")
TRUNCATIONS = ("end", "start")
ON_SAVE_ERROR = ("continue", "stop")
ON_BAD_STEPS = ("stop", "rollback")
REDUCE_DTYPES = ("float32", "weights")
ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
TRACKERS = ("tensorboard", "trackio", "wandb", "mlflow")
DTYPES = ("float32", "bfloat16", "float16", "fp32", "bf16", "fp16")

# The same rates serve float32 and 16-bit weights, because 16-bit weights are rounded stochastically: an update that is
# smaller than the spacing of the numbers still counts on average. With rounding="nearest" it would be lost.
# The steps of lomo and sgd are as long as the gradient; their rate is one for gradients clipped to norm 1, as in the LOMO paper,
# and unclipped it diverges. Measured on SmolLM2-135M (docs/numerics.md); adamw's is the usual one and was not tuned.
DEFAULT_LR = {"adalomo": 1e-3, "lomo": 0.1, "adamw": 2e-5, "sgd": 0.1}
DEFAULT_CLIP_GRAD_NORM = {"lomo": 1.0, "sgd": 1.0}

MODEL_AND_DATA = "model and data"
OPTIMISATION = "optimisation"
ADAPTERS = "adapters (LoRA)"
MEMORY = "memory and speed"
OUTPUT = "output"
SAFETY = "checkpoints and bad steps"
RANKS = "several processes (torchrun)"
GROUPS = (MODEL_AND_DATA, OPTIMISATION, ADAPTERS, MEMORY, OUTPUT, SAFETY, RANKS)


def option(
    group: str,
    text: str,
    choices: Sequence[str] = (),
    metavar: str | None = None,
    alone: str | None = None,
    numbers: bool = False,
    words: Sequence[str] = (),
    **default: Any,
) -> Any:
    """A field with what ``--help`` says about it.

    Args:
        group: of the help.
        text: what it does.
        choices: values it may have.
        metavar: what stands for one.
        alone: the value of the flag without one.
        numbers: a number in a config file is taken for its text.
        words: text that is taken as it stands, where "none" would mean that there is no value.
        default: of the dataclass field.
    """
    metadata = {
        "group": group, "help": text, "choices": tuple(choices), "metavar": metavar, "alone": alone, "numbers": numbers,
        "words": tuple(words),
    }  # fmt: skip
    return dataclasses.field(metadata=metadata, **default)
