"""lowtide on a CPU beside everything that a user would pick instead: peak memory and time of a step, in one run.

    python benchmarks/cpu_peers.py --model smollm2                 23 methods, 5 rounds
    python benchmarks/cpu_peers.py --model tinyllama               the same with 1.1 B parameters; AdamW in float32 needs 20 GB
    python benchmarks/cpu_peers.py --growth parameters tokens tensors     how a few of them grow, one round unless --rounds says more
    python benchmarks/cpu_peers.py --model tiny --threads 1 --rounds 1    a rehearsal, some minutes

A run of SmolLM2 takes about 35 s, one of TinyLlama 85 to 100 s (two cores). Each run is a fresh process, and a row of benchmarks/results/cpu_peers.csv when it is finished; rounds are
interleaved (all methods, then all again). Runs that have a row are not run again unless --again. A method that cannot do it gets one row
whose status says why. All methods: the same Llama shape with random weights, the same random tokens, activations recomputed a decoder layer at a time,
no clipping, bfloat16 weights unless the name says fp32. "adafactor" is that of transformers (``scale_parameter`` and ``relative_step`` off), as its
Trainer has it. The last step is the one whose loss is in the row. benchmarks/cpu_peers_page.py makes docs/benchmarks.md from the rows.

"baseline" is the resident set of the process with everything imported and before the model exists. Much is imported on first use, so first a process
of its own trains a tiny model by the method and lists its modules; processes that are measured import these, without running anything.

Environment (the peers are not part of the project's own; Linux):

    python -m venv /tmp/peers && . /tmp/peers/bin/activate
    pip install -c constraints.txt torch        # first: the small CPU build where the index has one
    pip install -c constraints.txt . matplotlib
    pip install -c constraints.txt -r benchmarks/requirements-peers.txt --no-deps
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.methods import METHODS
from peers.rows import FIELDS, RESULTS, append, device_name, facts, has, read
from peers.shapes import GROWTH, SHAPES, needed_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(SHAPES), default=["smollm2"])
    parser.add_argument("--growth", nargs="+", choices=list(GROWTH), help="in place of --model and its batches")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), help="default: all, or those of a growth")
    parser.add_argument("--without", nargs="+", choices=list(METHODS), default=[], help="methods to leave out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, help="default: what the model takes, see peers/shapes.py")
    parser.add_argument("--rounds", type=int, help="default: 5, or 1 for a growth")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=3600, help="seconds that one run may take")
    parser.add_argument("--again", action="store_true", help="also runs that have a row")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--list-imports", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        in_this_process(options)
        return
    if options.growth:
        work = [case for name in options.growth for case in GROWTH[name]]
        methods = options.methods or [name for name, method in METHODS.items() if method.growth]
    else:
        work = [(model, options.batch_size, options.seq_len) for model in options.model]
        methods = options.methods or list(METHODS)
    imports: dict[str, dict[str, Any]] = {}
    device = device_name()
    for case in dict.fromkeys(work):
        for number in range(1, (options.rounds or (1 if options.growth else 5)) + 1):
            for method in (name for name in methods if name not in options.without):
                one_run(case, method, number, device, imports, options)


def one_run(
    case: tuple[str, int, int],
    method: str,
    number: int,
    device: str,
    imports: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    """A run and its row, unless there is one.

    Args:
        case: model, batch size and tokens a sequence.
        method: a key of ``METHODS``.
        number: of the round, from 1.
        device: as rows have it.
        imports: what each method imports, as far as it is known; more is put in.
        options: of the command line.
    """
    model, batch_size, seq_len = case
    settings = {
        "device": device, "threads": options.threads, "model": model, "method": method, "batch_size": batch_size, "seq_len": seq_len,
        "steps": options.steps or SHAPES[model].steps,
    }  # fmt: skip
    if not options.again and has(read(options.results), settings, number):
        return
    found = does_not_fit(model, batch_size * seq_len, method)
    if found is None:
        if method not in imports:
            imports[method] = child([*command(settings), "--list-imports"], "[]", options)
        listed = imports[method]
        found = listed
        if listed["status"] == "ok":
            found = child(command(settings), json.dumps(listed["modules"]), options)
    row = {**settings, **facts(method), **found, "round": number}
    append(options.results, {name: row.get(name, "") for name in FIELDS})
    shown = found["status"]
    if shown == "ok":
        above = (found["peak_bytes"] - found["baseline_bytes"]) / 1e9
        shown = f"{above:.2f} GB above {found['baseline_bytes'] / 1e9:.2f} GB of imports, {found['step_s'] or found['first_step_s']} s a step, loss {found['loss']}"
    print(f"{model} {batch_size} x {seq_len}, round {number}, {method}: {shown}", flush=True)


def does_not_fit(model: str, tokens: int, method: str) -> dict[str, str] | None:
    """A status that says so, or None."""
    from lowtide.planning import available_host_bytes

    element_bytes = 4 if METHODS[method].dtype == "float32" else 2
    needed = needed_bytes(SHAPES[model], tokens, element_bytes, METHODS[method].extra_bytes)
    available = available_host_bytes()
    if needed <= available:
        return None
    return {"status": f"needs {needed / 1e9:.1f} GB (estimated), {available / 1e9:.1f} GB are free"}


def command(settings: dict[str, Any]) -> list[str]:
    """Of a process that does one run."""
    words = [sys.executable, __file__, "--one", settings["method"]]
    for name in ("model", "batch_size", "seq_len", "steps", "threads"):
        words += [f"--{name.replace('_', '-')}", str(settings[name])]
    return words


def child(words: list[str], given: str, options: argparse.Namespace) -> dict[str, Any]:
    """Start it, and what it found, or a status that says how it ended.

    Args:
        words: the command.
        given: to its standard input.
        options: of the command line.
    """
    threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    try:
        ended = subprocess.run(
            words, input=given, capture_output=True, text=True, env=environment, timeout=options.timeout, check=False
        )
    except subprocess.TimeoutExpired:
        return {"status": f"took longer than {options.timeout:.0f} s"}
    if ended.returncode < 0:
        return {"status": f"killed by signal {-ended.returncode}"}
    if ended.returncode:
        return {"status": f"exit {ended.returncode}: {(ended.stderr.strip().splitlines() or [''])[-1]}"}
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def in_this_process(options: argparse.Namespace) -> None:
    """What a child does: one line of JSON is its last word."""
    from peers.measure import attempt, find_imports, import_all

    modules = json.load(sys.stdin)
    if options.list_imports:
        found = find_imports(options.one, options.threads)
    else:
        import_all(modules)
        found = attempt(
            options.one, options.model[0], options.batch_size, options.seq_len, options.steps, options.threads
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
