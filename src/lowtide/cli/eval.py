"""``lowtide eval``: how good a model is, on a task with right answers or on text."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..training.choices import BAD_RECORDS, DTYPES, TRUNCATIONS
from .arguments import UsageError, positive_int, whole_number
from .scores_file import ScoresFile

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ..data import Batches, TaskData

_EPILOG = """\
examples:
  lowtide eval --model tuned/model --task superglue/rte superglue/copa --data SuperGLUE
  lowtide eval --model tuned/model --data held-out.jsonl
  lowtide eval --model tuned/model --lm-eval arc_easy hellaswag

A task is multiple choice: the answer is the choice that the model finds likeliest after the prompt. The log-likelihoods of
its tokens are added up (sum), or divided by their number as well (per_token, as in the LOMO paper). Both are shown.
docs/evaluation.md says what the prompts and the splits are."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.epilog = _EPILOG
    parser.add_argument(
        "--model", required=True, help="a Hugging Face directory, a name on the Hugging Face hub, or a .gguf file"
    )
    parser.add_argument(
        "--task",
        nargs="+",
        metavar="superglue/NAME",
        help="tasks: superglue/rte, boolq, wsc, wic, multirc, copa or cb; --data is the directory with the official files",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="FILE|DIR",
        help="with --task: the directory of its files, default: the Hugging Face hub; without: files, directories or data sets of the hub "
        "(org/name[:config][@split]) to measure the loss on, in any format of lowtide train",
    )
    parser.add_argument(
        "--scoring", choices=("sum", "per_token"), help="of a task: the accuracy that counts (default: per_token)"
    )
    parser.add_argument(
        "--split",
        choices=("test", "dev", "train"),
        help="of a task: test is its validation file, dev is what lowtide train --task holds out, train what it learns (default: test)",
    )
    parser.add_argument(
        "--limit",
        type=positive_int,
        metavar="N",
        help="examples at most: of a --task drawn by --data-seed (default: 1000), of every task of --lm-eval its first ones (default: all)",
    )
    parser.add_argument(
        "--data-seed",
        type=whole_number,
        metavar="N",
        help="of a task: that of lowtide train, which decides the splits and what is drawn of them (default: that of the run whose model it is, "
        "or 0)",
    )
    parser.add_argument(
        "--lm-eval", nargs="+", metavar="TASK", help="tasks of the lm-evaluation-harness (pip install 'lowtide[eval]')"
    )
    parser.add_argument(
        "--lm-eval-include", metavar="DIR", help="a directory with task files of your own for --lm-eval; works offline"
    )
    parser.add_argument(
        "--num-fewshot",
        type=whole_number,
        metavar="N",
        help="solved examples in front of every question of --lm-eval (default: what its task says)",
    )
    parser.add_argument(
        "--apply-chat-template",
        action="store_true",
        help="write the questions of --lm-eval as the model's chat template has them",
    )
    parser.add_argument(
        "--max-seq-len",
        type=positive_int,
        default=512,
        metavar="N",
        help="tokens in a sequence of --data (default: 512)",
    )
    parser.add_argument(
        "--batch-size",
        type=positive_int,
        default=8,
        metavar="N",
        help="sequences at a time, but for tasks (default: 8)",
    )
    parser.add_argument(
        "--data-cache",
        metavar="DIR|none",
        help="where tokens of --data are kept, as in lowtide train (default: in the user's cache directory)",
    )
    parser.add_argument("--truncation", choices=TRUNCATIONS, help="of --data, as in lowtide train (default: end)")
    parser.add_argument("--bad-records", choices=BAD_RECORDS, help="of --data, as in lowtide train (default: refuse)")
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="for --data, as in lowtide train, and for --apply-chat-template (default: the one of the model)",
    )
    parser.add_argument(
        "--output", metavar="FILE", help="write the scores there as JSON, after every part; it must not exist"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES[:3],
        help="number format (default: bfloat16, or float32 on a processor that is slow with it)",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the model"
    )


def run(args: argparse.Namespace) -> int:
    """Evaluate. Returns the exit code."""
    _check(args)
    output = ScoresFile(args.output)
    from .quiet import quiet_libraries

    quiet_libraries()
    from ..data.chat_template import set_chat_template
    from ..models import load_model, load_tokenizer, parse_dtype
    from ..planning import computes_bfloat16
    from ..training import resolve_device

    if args.task and args.data_seed is None:
        args.data_seed = _data_seed_of_run(args.model)
    device = resolve_device(args.device)
    args.dtype = args.dtype or ("bfloat16" if computes_bfloat16(device) else "float32")
    tasks = _load_tasks(args)  # what is wrong with them shows before the model is loaded
    harness = _find_harness_tasks(args)
    tokenizer = load_tokenizer(args.model, trust_remote_code=args.trust_remote_code)
    if args.chat_template is not None:
        set_chat_template(tokenizer, args.chat_template)
    if args.apply_chat_template and not tokenizer.chat_template:
        raise UsageError(
            f"--apply-chat-template: {args.model} has no chat template; leave the flag out, or give one with --chat-template FILE"
        )
    batches = None if args.task or not args.data else _read_text(args, tokenizer)
    model = load_model(
        args.model, dtype=parse_dtype(args.dtype), device=device, trust_remote_code=args.trust_remote_code
    )
    model.eval()
    output.begin(_settings(args))
    for name, data in tasks.items():
        output.add(name, _score_task(args, model, tokenizer, name, data))
    if batches is not None:
        output.add("text", _score_text(model, tokenizer, batches))
    found: dict[str, Any] = {}
    # One by one, so that a task whose data cannot be had takes no other's score with it.
    for name in args.lm_eval or ():
        found |= _score_with_harness(args, model, tokenizer, name, harness)
        output.add("lm_eval", found)
    output.complete()
    return 0


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the scores depend on, beside the data."""
    named = {"model": args.model, "dtype": args.dtype, "limit": args.limit}
    if args.data and not args.task:
        named |= {
            "data": [str(each) for each in args.data],
            "max_seq_len": args.max_seq_len,
            "truncation": args.truncation or "end",
        }
        named |= {"bad_records": args.bad_records or "refuse"}
    if args.chat_template is not None:
        named["chat_template"] = args.chat_template
    if args.task:
        named["data_seed"] = args.data_seed
    if args.lm_eval:
        named |= {"num_fewshot": args.num_fewshot, "apply_chat_template": args.apply_chat_template}
    return named


def _check(args: argparse.Namespace) -> None:
    if not (args.task or args.data or args.lm_eval):
        raise UsageError("nothing to evaluate: give --task, --data or --lm-eval")
    if args.task and args.data and len(args.data) != 1:
        raise UsageError("--task takes one directory as --data")
    for name in ("scoring", "split", "data_seed"):
        if getattr(args, name) is not None and not args.task:
            raise UsageError(f"--{name.replace('_', '-')} is for --task")
    if args.limit is not None and not (args.task or args.lm_eval):
        raise UsageError("--limit is for --task and --lm-eval")
    has_records = bool(args.data) and not args.task
    for name in ("truncation", "bad_records"):
        if getattr(args, name) is not None and not has_records:
            raise UsageError(f"--{name.replace('_', '-')} is for --data without --task")
    if args.chat_template is not None and not (has_records or args.apply_chat_template):
        raise UsageError("--chat-template is for --data without --task, and for --apply-chat-template")
    for name in ("lm_eval_include", "num_fewshot", "apply_chat_template"):
        value = getattr(args, name)
        if value is not None and value is not False and not args.lm_eval:  # 0 is a number of examples
            raise UsageError(f"--{name.replace('_', '-')} is for --lm-eval")
    for name in args.task or ():
        if not name.startswith("superglue/"):
            raise UsageError(f"--task {name}: a task is superglue/ and a name, as in superglue/rte")


def _data_seed_of_run(model: str) -> int:
    """Of the run that a model or checkpoint lies in, or 0: with another one, dev would have examples that it was trained on."""
    from ..training.resume import read_settings

    for folder in Path(model).expanduser().absolute().parents[:3]:
        settings = read_settings(folder) if (folder / "metrics.jsonl").is_file() else None
        if settings is not None:
            seed = settings.get(
                "data_seed", settings.get("seed", 0)
            )  # before there was one, the other decided the splits
            if type(seed) is int and seed > 0:
                print(f"--data-seed {seed}, as in {folder / 'config.yaml'}", flush=True)
                return seed
            break
    return 0


def _load_tasks(args: argparse.Namespace) -> dict[str, TaskData]:
    from ..data import load_superglue

    source, seed = args.data[0] if args.data else None, args.data_seed
    # The splits of a training run, whatever the limit is: a smaller dev set of its own would have examples that were trained on.
    return {
        name: load_superglue(name.removeprefix("superglue/"), source, num_test=args.limit or 1000, seed=seed)
        for name in args.task or ()
    }


def _find_harness_tasks(args: argparse.Namespace) -> Any:
    if not args.lm_eval:
        return None
    from ..evaluation.harness import find_harness_tasks

    return find_harness_tasks(args.lm_eval, args.lm_eval_include)


def _score_with_harness(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, manager: Any
) -> dict[str, dict[str, float]]:
    from ..evaluation import harness

    found = harness.evaluate_with_harness(
        model, tokenizer, [name], batch_size=args.batch_size, limit=args.limit, num_fewshot=args.num_fewshot,
        apply_chat_template=args.apply_chat_template, manager=manager,
    )  # fmt: skip
    for each, metrics in found.items():
        print(f"{each}: {', '.join(f'{metric} {value:.4f}' for metric, value in metrics.items())}", flush=True)
    return found


def _score_task(
    args: argparse.Namespace, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, data: TaskData
) -> dict[str, Any]:
    from ..data import majority_share
    from ..data.choices import sample
    from ..evaluation import choice_accuracies

    split, scoring = args.split or "test", args.scoring or "per_token"
    items = sample(data.split(split), args.limit or 1000, args.data_seed)
    found = choice_accuracies(model, tokenizer, items)
    majority = majority_share(items)
    other = next(each for each in found if each != scoring)
    print(
        f"{name}: accuracy {found[scoring].accuracy:.1%} ({scoring.replace('_', ' ')}; {other.replace('_', ' ')} "
        f"{found[other].accuracy:.1%}; always the most frequent answer {majority:.1%}), {len(items)} examples of {split}",
        flush=True,
    )
    return {
        "split": split, "num_items": len(items), "scoring": scoring, "accuracy": found[scoring].accuracy, "majority": majority,
        **{f"accuracy_{each}": result.accuracy for each, result in found.items()}, "predictions": found[scoring].predictions,
        "gold": [item.gold for item in items], "note": data.note,
    }  # fmt: skip


def _read_text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Batches:
    from ..cache_folder import default_cache_folder
    from ..data import Batches
    from ..data.cache import TokenCache
    from ..data.inputs import find_inputs
    from ..data.loading import load_tokens
    from ..models.padding import padding_id
    from ..training.data import tell_skipped

    cache = None
    if args.data_cache != "none":
        folder = default_cache_folder() if args.data_cache is None else Path(args.data_cache).expanduser()
        cache = TokenCache(folder, sys.maxsize)  # how large it may be is for training to say
    inputs, skip_bad = find_inputs(args.data, held_out=True), args.bad_records == "skip"
    store = load_tokens(
        inputs, tokenizer, args.max_seq_len, skip_bad=skip_bad, truncation=args.truncation or "end", cache=cache
    )
    tell_skipped(store)
    stats = store.all().stats()
    print(f"{stats.num_records} records, {stats.num_trained_tokens} tokens that count", flush=True)
    return Batches(
        store.all(), batch_size=args.batch_size, max_seq_len=args.max_seq_len, packing=store.info["only_text"], seed=0, shuffle=False,
        pad_token_id=padding_id(tokenizer),
    )  # fmt: skip


def _score_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batches: Batches) -> dict[str, Any]:
    from ..evaluation import evaluate_loss, keeps_documents_apart
    from ..models.context import check_context
    from ..models.padding import padding_id
    from ..training.setup import without_cache

    check_context(model, batches.num_positions, "set --max-seq-len to {limit}")
    batches.pad_token_id = padding_id(tokenizer, model)
    with without_cache(model):
        if batches.shares_rows and not keeps_documents_apart(model, tokenizer):
            batches = batches.padded()  # one text a row, or they would see each other
        found = evaluate_loss(model, batches.epoch(0))
    print(f"loss {found.loss:.4f}, perplexity {found.perplexity:.2f} ({found.num_tokens} tokens)", flush=True)
    return {"loss": found.loss, "perplexity": found.perplexity, "num_tokens": found.num_tokens}
