"""The command ``lowtide``: one module for each sub-command, imported only when it is the one that was asked for.

Such a module has ``add_arguments(parser)`` and ``run(args) -> int``, the exit code. Exit codes: 0 done, 1 failed while
running, 2 wrong usage or bad input, 130 ended by Ctrl-C. An error is one line on standard error; with LOWTIDE_DEBUG=1
in the environment the traceback is shown as well.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
import traceback
from collections.abc import Sequence

from .arguments import Parser, UsageError, nearest, unknown_arguments

# Name: (one line for the list of commands, opening of the command's own help)
COMMANDS = {
    "train": (
        "fine-tune every parameter of a model",
        "Fine-tune every parameter of a language model. The update is fused into the backward pass: every weight\n"
        "changes the moment its gradient is known, and the gradient is dropped, so neither gradients nor (with lomo\n"
        "and adalomo) optimizer states fill the memory.",
    ),
    "plan": (
        "say whether a model fits, where its weights should live, and how long a step takes",
        "Count what a training step takes in memory and on disk, choose where the weights live and how many sequences go\n"
        "through a layer at once, and estimate the time of a step. Only the model's config is read, never its weights.",
    ),
    "eval": (
        "measure a model: accuracy on tasks, loss on text, or the lm-evaluation-harness",
        "Measure how good a model is, before or after training.",
    ),
    "data": (
        "look at data as training would see it",
        "Show what was found in files of data, an example exactly as a model would be trained on it, with the part that is\n"
        "learnt made visible, and what the data comes to in tokens. Only the model's tokenizer is loaded, never its weights.",
    ),
    "generate": (
        "let a model answer a prompt, or chat with it",
        "Generate text with a model, streamed to the terminal. Without --prompt and --chat the prompt is read from\n"
        "standard input.",
    ),
    "doctor": (
        "say what this machine has and which models that allows",
        "Look at the software, processor, memory, GPUs and disk, and work out which sizes of model could be trained here,\n"
        "where their weights would live and how long a step would take.",
    ),
    "report": (
        "show a run as a page: curves, memory, settings",
        "Write one HTML page about a run, or about two side by side: loss, learning rate, gradient norm, speed, memory beside what\n"
        "the planner said, and all settings. It needs no connection. The run may still be going on.",
    ),
    "completion": (
        "print a script with which bash, zsh or fish completes lowtide's commands and flags",
        "Print a script with which a shell completes commands, flags and their values when Tab is pressed.",
    ),
    "demo": (
        "see it work: fine-tune a small real model in a few minutes",
        "Fine-tune a small pretrained model, offline and without a GPU, and show what it learned and what memory it\n"
        "took.",
    ),
}

_EPILOG = """\
examples:
  lowtide demo
  lowtide train --model ./my-model --data train.jsonl --output ./tuned --max-steps 200
  lowtide plan --model ./my-model --max-seq-len 1024 --batch-size 8
  lowtide data preview --data train.jsonl --model ./my-model
  lowtide generate --model ./tuned/model --chat

`lowtide COMMAND --help` explains a command and all of its settings."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments without the program's name; default: those of the process.

    Returns:
        The exit code.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        # Whoever read our output has left (`| head`). Python would complain once more when it flushes on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError, IsADirectoryError) as error:
        return _fail(str(error), 2)
    except (OSError, MemoryError) as error:
        return _fail(str(error) or type(error).__name__, 1)
    except (RuntimeError, ModuleNotFoundError) as error:
        return _fail(f"{error} (LOWTIDE_DEBUG=1 shows where)", 1)


def build_parser(command: str | None) -> tuple[Parser, dict[str, Parser]]:
    """The parser, and those of the sub-commands; only the one of ``command`` knows its flags."""
    parser = Parser(
        prog="lowtide",
        description="Fine-tune every parameter of a large language model on the machine you have.",
        epilog=_EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"lowtide {importlib.metadata.version('lowtide')}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND", parser_class=Parser)
    parsers = {}
    for name, (summary, description) in COMMANDS.items():
        parsers[name] = commands.add_parser(name, help=summary, description=description)
        if name == command:
            module = importlib.import_module(f".{name}", __name__)
            module.add_arguments(parsers[name])
            parsers[name].set_defaults(run=module.run)
    return parser, parsers


def _run(arguments: list[str]) -> int:
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if command is not None and command not in COMMANDS:
        raise UsageError(f"unknown command {command!r}{nearest(command, COMMANDS)}; see lowtide --help")
    parser, parsers = build_parser(command)
    if not arguments:
        parser.print_help()
        return 0
    args, extra = parser.parse_known_args(arguments)
    if extra:
        raise unknown_arguments(parsers[command] if command else parser, extra)
    if command is None:
        raise UsageError("no command given; see lowtide --help")
    run = args.run
    return int(run(args))


def _fail(message: str, code: int) -> int:
    if os.environ.get("LOWTIDE_DEBUG", "0") not in ("", "0"):
        traceback.print_exc()
    several = os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ  # torchrun started us
    who = f"lowtide (rank {os.environ['RANK']}): error:" if several else "lowtide: error:"
    print(who, " ".join(message.split()) or "unknown", file=sys.stderr, flush=True)
    return code
