"""``lowtide data preview``: what was found in files of data, and what of it a model would be trained on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..training.choices import BAD_RECORDS, TRUNCATIONS
from ..training.config import TrainConfig
from .quantities import at_least

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..data import Example, Record
    from ..data.inputs import Input
    from ..training.data import TrainData

_RULE = "-" * 80
_EPILOG = """\
examples:
  lowtide data preview --data train.csv --model ./my-model
  lowtide data preview --data chats/ --model ./my-model --num 3 --max-seq-len 1024 > preview.txt

The text that is trained on is coloured on a terminal, and stands between marks elsewhere. Formats and file types are
explained in docs/data.md."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this command."""
    parser.epilog = _EPILOG
    parser.add_argument("action", choices=("preview",), help="what to do with the data")
    parser.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="FILE",
        help="files, directories or data sets of the hub (org/name[:config][@split]), as in lowtide train",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="whose tokenizer and chat template are used: a Hugging Face directory, a name on its hub or a .gguf file",
    )
    parser.add_argument("--num", type=at_least(0), default=1, metavar="N", help="examples to show (default: 1)")
    parser.add_argument(
        "--max-seq-len",
        type=at_least(2),
        default=TrainConfig.max_seq_len,
        metavar="N",
        help=f"tokens in a sequence at most (default: {TrainConfig.max_seq_len})",
    )
    parser.add_argument(
        "--truncation", choices=TRUNCATIONS, default=TrainConfig.truncation, help="as in lowtide train (default: end)"
    )
    parser.add_argument(
        "--batch-size",
        type=at_least(1),
        default=TrainConfig.batch_size,
        metavar="N",
        help=f"sequences in a step, for what padding wastes (default: {TrainConfig.batch_size})",
    )
    parser.add_argument(
        "--packing", action=argparse.BooleanOptionalAction, help="as in lowtide train (default: for text only)"
    )
    parser.add_argument(
        "--bad-records", choices=BAD_RECORDS, default="refuse", help="as in lowtide train (default: refuse)"
    )
    parser.add_argument("--chat-template", metavar="FILE", help="as in lowtide train (default: the one of the model)")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the Python code that comes with the tokenizer"
    )


def run(args: argparse.Namespace) -> int:
    """Show what training would see. Returns the exit code."""
    from .quiet import quiet_libraries

    quiet_libraries(tell_data=True)
    from ..training.data import find_data, load_data
    from ..training.tokenizer import tokenizer_of

    config = TrainConfig(
        model=args.model,
        data=args.data,
        output="",
        eval_fraction=0.0,
        max_seq_len=args.max_seq_len,
        truncation=args.truncation,
        batch_size=args.batch_size,
        packing=args.packing,
        bad_records=args.bad_records,
        chat_template=args.chat_template,
        trust_remote_code=args.trust_remote_code,
    )
    found = find_data(config)
    tokenizer = tokenizer_of(config)
    data = load_data(config, tokenizer, found, show_progress=sys.stdout.isatty())
    for number, (record, example) in enumerate(_shown(found.train, tokenizer, args), start=1):
        _print_example(number, record, example, tokenizer)
    print("\n".join(describe_data(data)))
    return 0


def _shown(
    inputs: Sequence[Input], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> Iterator[tuple[Record, Example]]:
    """The first examples, each with the record that it was made from."""
    from ..data import encode_records
    from ..data.records import stream_records

    left = args.num
    records = (record for each in inputs for record in stream_records(each, lambda error: None, tell=False))
    for record in records:
        if not left:
            return
        try:
            examples, _ = encode_records([record], tokenizer, args.max_seq_len, truncation=args.truncation)
        except ValueError:  # it has nothing to train on within this length; encoding the whole raised nothing
            continue
        for example in examples[:left]:
            yield record, example
            left -= 1


def _print_example(number: int, record: Record, example: Example, tokenizer: PreTrainedTokenizerBase) -> None:
    from rich.console import Console
    from rich.text import Text

    from ..data.preview import example_spans, mark_trained
    from ..data.tokens import IGNORED

    spans = example_spans(example, tokenizer)
    marked, marks = mark_trained(spans)
    num_trained = len(example.labels) - example.labels.count(IGNORED)
    console = Console(file=sys.stdout, highlight=False)
    coloured = console.is_terminal and console.color_system is not None and not console.no_color
    how = "in colour" if coloured else f"between {marks[0]} and {marks[1]}"
    print(
        f"\nExample {number}, from {record.where}: {len(example.labels)} tokens, trained on the {num_trained} {how}\n{_RULE}"
    )
    if coloured:
        styles = {(True, False): "bold green", (True, True): "bold green underline", (False, True): "dim underline"}
        parts = [(span.text, styles.get((span.trained, span.special), "")) for span in spans]
        console.print(Text.assemble(*parts), soft_wrap=True)
    else:
        print(marked)
    print(_RULE)


def describe_data(data: TrainData) -> list[str]:
    """Counts over all of the data, a line each."""
    stats, train = data.stats, data.train
    skipped = f", {data.num_skipped:,} skipped" if data.num_skipped else ""
    how = (
        f"packed into sequences of {train.max_seq_len}" if train.packing else f"padded in batches of {train.batch_size}"
    )
    rows = {
        "records": f"{stats.num_records:,}{skipped}",
        "tokens": f"{stats.num_tokens:,}",
        "trained on": f"{stats.num_trained_tokens:,} ({stats.num_trained_tokens / stats.num_tokens:.1%} of the tokens)",
        "truncated": f"{stats.num_truncated:,} of the examples, at {train.max_seq_len} tokens",
        "dropped": f"{stats.num_dropped:,} of the examples, for having nothing to train on within {train.max_seq_len} tokens",
        "steps": f"{len(train):,} in an epoch, {train.batch_size} sequences each",
        "padding": f"{train.packing_waste:.1%} of all positions ({how})",
    }
    width = max(map(len, rows))
    return ["", *(f"{name:{width}}  {value}" for name, value in rows.items())]
