"""The settings of a training run: one dataclass, whose field descriptions are also the help of ``lowtide train``.

This file imports neither torch nor transformers, so that ``lowtide train --help`` answers at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..units import parse_bytes, parse_duration
from .choices import (
    ADAPTERS,
    ATTENTIONS,
    BAD_RECORDS,
    CLIPS,
    DEFAULT_CLIP_GRAD_NORM,
    DEFAULT_LR,
    DTYPES,
    MEMORY,
    MODEL_AND_DATA,
    ON_BAD_STEPS,
    ON_SAVE_ERROR,
    OPTIMISATION,
    OPTIMIZERS,
    OUTPUT,
    RANKS,
    REDUCE_DTYPES,
    ROUNDINGS,
    SAFETY,
    SCHEDULES,
    TRACKERS,
    TRUNCATIONS,
    option,
)

# They may differ from those of the checkpoint that is resumed: the weights and losses are the same.
FREE_TO_CHANGE = (
    "output", "data_cache", "data_cache_size", "eval_every", "samples", "log_every", "weights", "clip_memory", "keep_activations", "save_every", "keep_checkpoints", "on_save_error", "resume",
    "allow_changes", "max_bad_steps", "on_bad_steps", "trust_remote_code", "track", "ranks_per_node", "rank_timeout",
)  # fmt: skip
ABOUT_RESUMING = ("resume", "allow_changes")  # how a process began, not a setting of the run


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """What to train, on what, how and where to. Names are the same here, in a config file and (with dashes) as flags.

    The description of every field is in its declaration below; ``validate`` says what is refused.
    """

    model: str = option(
        MODEL_AND_DATA, "the model: a Hugging Face directory, a name on the Hugging Face hub, or a .gguf file"
    )
    data: Sequence[str] = option(
        MODEL_AND_DATA,
        "training data, one or more files, directories or data sets of the hub (org/name[:config][@split]): plain text (.txt, .md), or JSONL, JSON, CSV, TSV "
        "or Parquet with `text`, `messages` or ShareGPT's `conversations` (only the assistant's turns are learnt), `prompt` and "
        "`completion` (only the completion is), or Alpaca's `instruction`, `input` and `output` (only the output is)",
        metavar="FILE",
    )
    eval_data: Sequence[str] | None = option(
        MODEL_AND_DATA,
        "held-out data in the same formats; without it a part of the training data is held out",
        metavar="FILE",
        default=None,
    )
    eval_fraction: float = option(
        MODEL_AND_DATA,
        "the share of the training records that is held out when there is no eval_data; 0 trains on all of them and "
        "evaluates nothing",
        default=0.05,
    )
    task: str | None = option(
        MODEL_AND_DATA,
        "a multiple-choice task instead of records, like superglue/rte: data is then the directory with its official files, or "
        "aps/super_glue for the hub. Trained on the answers of at most 1000 examples; of others the accuracy is measured too. What is "
        "to be reported is not touched: see lowtide eval",
        metavar="superglue/NAME",
        default=None,
    )
    data_seed: int = option(
        MODEL_AND_DATA,
        "decides what is held out of the data, and which examples of a task are drawn; runs that are to be compared or averaged have the "
        "same one, whatever their seed",
        default=0,
    )
    bad_records: str = option(
        MODEL_AND_DATA,
        "lines and rows of the data that are no usable record: refuse the file, or skip them, count them and say where they are",
        BAD_RECORDS,
        default="refuse",
    )
    chat_template: str | None = option(
        MODEL_AND_DATA,
        "a file with a chat template in Jinja, used instead of the model's own and saved with the trained model; default: the "
        "model's own",
        metavar="FILE",
        default=None,
    )
    max_seq_len: int = option(
        MODEL_AND_DATA, "tokens in a sequence at most; what is longer is cut into several or truncated", default=512
    )
    truncation: str = option(
        MODEL_AND_DATA,
        "where prompts with completions and conversations that are too long are cut: at their end, which may cost the answer, or at their start",
        TRUNCATIONS,
        default="end",
    )
    packing: bool | None = option(
        MODEL_AND_DATA,
        "fill every sequence with several documents, without attention from one to the other, instead of padding each; "
        "default: packing for text, padding for messages and prompts",
        default=None,
    )
    data_cache: str | None = option(
        MODEL_AND_DATA,
        "where tokenised data is kept for the next start, found again by its content: a directory, or none to keep it in memory; "
        "default: $LOWTIDE_CACHE, or lowtide's folder in the user's cache directory",
        metavar="DIR|none",
        words=("none",),
        default=None,
    )
    data_cache_size: str = option(
        MODEL_AND_DATA,
        "when the tokens kept in that directory take more than this, those used longest ago are removed; nothing else in it is touched",
        metavar="SIZE",
        default="20GiB",
    )
    trust_remote_code: bool = option(
        MODEL_AND_DATA, "run the Python code that comes with the model; only for sources that you trust", default=False
    )

    optimizer: str = option(
        OPTIMISATION,
        "adalomo and lomo keep next to no state; adamw and sgd are torch's own, run parameter by parameter in the "
        "backward pass",
        OPTIMIZERS,
        default="adalomo",
    )
    lr: float | None = option(
        OPTIMISATION,
        "highest learning rate; default: " + ", ".join(f"{rate:g} for {name}" for name, rate in DEFAULT_LR.items()),
        default=None,
    )
    weight_decay: float = option(
        OPTIMISATION, "decoupled weight decay of the matrices (never of biases and norms)", default=0.0
    )
    epochs: int | None = option(
        OPTIMISATION,
        "passes over the data; with max_steps too, training ends at whichever comes first; default: 1, or as many as "
        "max_steps needs",
        default=None,
    )
    max_steps: int | None = option(
        OPTIMISATION, "steps in all; without epochs the data is repeated as often as that takes", default=None
    )
    batch_size: int = option(OPTIMISATION, "sequences in a step", default=8)
    schedule: str = option(
        OPTIMISATION,
        "the learning rate after the warm-up: falls to 0 in a line or a half cosine, or stays",
        SCHEDULES,
        default="linear",
    )
    warmup_ratio: float = option(
        OPTIMISATION, "the share of the steps in which the learning rate rises from 0 in a line", default=0.06
    )
    clip_grad_norm: float | None = option(
        OPTIMISATION,
        "the largest norm of the gradient over all parameters, 0 for no limit; default: "
        + ", ".join(f"{norm:g} for {name}" for name, norm in DEFAULT_CLIP_GRAD_NORM.items())
        + ", no limit for the others",
        default=None,
    )
    clip: str = option(
        OPTIMISATION,
        "how clip_grad_norm is kept: exact measures the norm first, in a backward pass of its own; adaptive does so in the "
        "first steps, and then holds each gradient to a little more than its own running norm, at no cost",
        CLIPS,
        default="exact",
    )
    clip_warmup_steps: int = option(OPTIMISATION, "steps that clip adaptive clips exactly", default=20)
    clip_grad_value: float | None = option(
        OPTIMISATION, "the largest absolute value of a gradient's element; default: no limit", default=None
    )
    seed: int = option(OPTIMISATION, "decides the order of the data, dropout and stochastic rounding", default=0)

    lora_rank: int = option(
        ADAPTERS,
        "add LoRA adapters of this rank, which adamw trains in the same backward pass as the optimizer trains the model's own weights "
        "(LoRA + LOMO); 0 for none. Needs pip install 'lowtide[lora]'",
        default=0,
    )
    lora_alpha: int = option(ADAPTERS, "what an adapter adds is multiplied with lora_alpha / lora_rank", default=16)
    lora_dropout: float = option(
        ADAPTERS, "probability with which an input of an adapter is left out in training", default=0.0
    )
    lora_targets: Sequence[str] | None = option(
        ADAPTERS,
        "layers that get an adapter, by the ends of their names, or all-linear; default: peft's for the architecture, mostly "
        "q_proj and v_proj",
        metavar="NAME",
        default=None,
    )
    lora_lr: float = option(
        ADAPTERS, "highest learning rate of the adapters; they follow the same schedule", default=5e-4
    )
    lora_only: bool = option(
        ADAPTERS,
        "train the adapters alone (plain LoRA): the model's own weights are frozen, so optimizer and lr are not used",
        default=False,
    )

    weights: str = option(
        MEMORY,
        "where the weights live: device; cpu, host memory, from which they visit the GPU layer by layer; or a new or empty directory "
        "for a working copy on disk, from which they visit whatever computes; auto asks the planner (see lowtide plan)",
        default="device",
        metavar="device|cpu|auto|DIR",
    )
    micro_batch_size: int | None = option(
        MEMORY,
        "sequences that go through a layer at once; smaller needs less memory and changes nothing in the result; "
        "default: the whole batch",
        default=None,
    )
    keep_activations: int | None = option(
        MEMORY,
        "layers whose activations are kept instead of being computed again: a step is up to a quarter shorter and takes their memory; a large "
        "number for all; default: none, or with weights auto as many as the planner finds room for",
        default=None,
        metavar="N",
    )
    dtype: str = option(MEMORY, "number format of the weights and of the computation", DTYPES[:3], default="bfloat16")
    rounding: str | None = option(
        MEMORY,
        "of updated 16-bit weights: stochastic, so that small updates count on average; compensated, exact at 2 more bytes a "
        "parameter; nearest, which loses small updates; default: stochastic",
        ROUNDINGS,
        default=None,
    )
    clip_memory: str = option(
        MEMORY,
        "spare memory for gradients that exact clipping keeps between its two passes instead of computing them again, as a "
        "size like 2GiB; with room for all of them there is a single pass",
        default="0",
        metavar="SIZE",
    )
    attention: str | None = option(
        MEMORY,
        "how attention is computed, in the words of transformers; default: its choice, mostly sdpa. The flash ones have to be installed, "
        "and take packed sequences one at a time (micro_batch_size 1)",
        ATTENTIONS,
        default=None,
    )
    device: str = option(MEMORY, "auto (the GPU if there is one), cpu, cuda or cuda:N", default="auto")
    threads: int | None = option(MEMORY, "processor threads for the computation; default: torch decides", default=None)

    output: str = option(
        OUTPUT,
        "a new or empty directory: the model is saved in its subdirectory model/, beside metrics.jsonl and config.yaml",
        metavar="DIR",
    )
    eval_every: int | None = option(
        OUTPUT,
        "evaluate every that many steps too; default: only before the first and after the last step",
        default=None,
    )
    samples: int | None = option(
        OUTPUT,
        "held-out prompts that the model answers before the first step and after the last, to be read in the report; default: 3, and "
        "none where weights live elsewhere, because every token of an answer reads all of them",
        default=None,
    )
    log_every: int = option(
        OUTPUT, "steps between two lines of progress where the output is not a terminal", default=10
    )
    track: Sequence[str] | None = option(
        OUTPUT,
        "where the numbers of the run go beside metrics.jsonl, one or more of "
        + ", ".join(TRACKERS)
        + "; each is a package of its "
        "own, as in pip install 'lowtide[tensorboard]'",
        metavar="TRACKER",
        default=None,
    )

    save_every: str | None = option(
        SAFETY,
        "write a checkpoint after every so many steps, or after every such time, like 15m or 2h; default: only when the run is "
        "interrupted",
        default=None,
        metavar="STEPS|TIME",
        numbers=True,
    )
    keep_checkpoints: int = option(
        SAFETY, "so many of the newest checkpoints are kept; an older one goes when a new one is on the disk", default=2
    )
    on_save_error: str = option(
        SAFETY,
        "when a checkpoint cannot be written (disk full): go on without it, or stop",
        ON_SAVE_ERROR,
        default="continue",
    )
    resume: str | None = option(
        SAFETY,
        "go on from a checkpoint, bit for bit: latest is the newest whole one in the output directory; auto is the same, or the "
        "beginning if there is none; or the directory of a checkpoint; the flag alone means latest",
        default=None,
        metavar="latest|auto|DIR",
        alone="latest",
    )
    allow_changes: bool = option(
        SAFETY, "resume although settings differ from those of the checkpoint, with the new ones", default=False
    )
    spike_factor: float | None = option(
        SAFETY,
        "skip a step whose loss is more than so many times the average of the last 20 good ones; default: only steps that are "
        "not finite are skipped",
        default=None,
    )
    max_bad_steps: int = option(SAFETY, "so many skipped steps in a row are too many", default=10)
    on_bad_steps: str = option(
        SAFETY,
        "what then: stop, or rollback to the last checkpoint and go on with the data behind the bad steps, three times at most",
        ON_BAD_STEPS,
        default="stop",
    )

    ranks_per_node: int | None = option(
        RANKS,
        "spread the weights within groups of so many processes only, each with a whole copy; for machines that are connected slowly. "
        "Default: over all of them",
        default=None,
    )
    reduce_dtype: str = option(
        RANKS,
        "in which gradients are added up over processes and micro-batches: float32, or weights for their own dtype, which is half as "
        "much to send where they are 16-bit",
        REDUCE_DTYPES,
        default="float32",
    )
    rank_timeout: str = option(
        RANKS,
        "how long a process waits for one that does not answer, like 10m; tokenising and saving must fit in it",
        default="30m",
    )

    @property
    def rank_timeout_seconds(self) -> float:
        """``rank_timeout`` in seconds."""
        try:
            return parse_duration(self.rank_timeout)
        except ValueError as error:
            raise ValueError(f"rank_timeout: {error}") from None

    @property
    def save_steps(self) -> int | None:
        """Steps between two checkpoints, if ``save_every`` says so."""
        return int(self.save_every) if self.save_every is not None and self.save_every.isdigit() else None

    @property
    def save_seconds(self) -> float | None:
        """Seconds between two checkpoints, if ``save_every`` says so."""
        if self.save_every is None or self.save_every.isdigit():
            return None
        try:
            return parse_duration(self.save_every)
        except ValueError as error:
            raise ValueError(f"save_every: {error}") from None

    @property
    def num_checkpoints_at_once(self) -> int:
        """The most checkpoints that are on the disk at a time; one more than are kept, while it is written."""
        return 0 if self.save_every is None else self.keep_checkpoints + 1

    @property
    def effective_lr(self) -> float:
        """The highest learning rate: ``lr``, or the default of the optimizer; with ``lora_only`` that of the adapters."""
        if self.lora_only:
            return self.lora_lr
        return DEFAULT_LR[self.optimizer] if self.lr is None else self.lr

    @property
    def effective_clip_grad_norm(self) -> float | None:
        """The largest norm of the gradient: ``clip_grad_norm``, or the default of the optimizer; None for no limit."""
        default = None if self.lora_only else DEFAULT_CLIP_GRAD_NORM.get(self.optimizer)
        norm = default if self.clip_grad_norm is None else self.clip_grad_norm
        return norm or None

    @property
    def data_cache_size_bytes(self) -> int:
        """``data_cache_size`` in bytes."""
        return self._bytes("data_cache_size")

    @property
    def clip_memory_bytes(self) -> int:
        """``clip_memory`` in bytes."""
        return self._bytes("clip_memory")

    def _bytes(self, name: str) -> int:
        try:
            return parse_bytes(getattr(self, name))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    def rows_at_once(self, packing: bool) -> int | None:
        """``micro_batch_size``; 1 if sequences are packed for flash attention, which transformers lets see documents in a single row only.

        Raises:
            ValueError: another one is set.
        """
        if not packing or "flash" not in (self.attention or ""):
            return self.micro_batch_size
        if self.micro_batch_size not in (None, 1):
            raise ValueError(
                f"with attention {self.attention} packed sequences go through a layer one at a time, or documents would see each other: set "
                f"micro_batch_size to 1 instead of {self.micro_batch_size}, or packing to false"
            )
        return 1

    def validate(self) -> None:
        """Check every field on its own and the combinations.

        Raises:
            ValueError: a value that cannot work; the message starts with the field's name.
        """
        from .config_checks import check

        check(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as YAML and JSON can hold them; ``TrainConfig(**config.to_dict())`` is the same again."""
        values = dataclasses.asdict(self)
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
