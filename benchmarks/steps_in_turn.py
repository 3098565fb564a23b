"""Small differences between the steps of methods: one process each, which take their steps in turn.

    python benchmarks/steps_in_turn.py                     Lomo, a backward pass that updates nothing, and three peers, TinyLlama shape
    python benchmarks/steps_in_turn.py --model smollm2 --steps 10
    python benchmarks/steps_in_turn.py --model tiny --threads 1 --rounds 1 --methods lowtide-lomo lowtide-nothing    a rehearsal, seconds

cpu_peers.py times one process after the other, and the clock of a machine that others use moves by more than a few percent in between. Here all processes of a
round live side by side, and only one computes at a time: a turn is one step of each, in an order that is shuffled for every turn (whoever computed before leaves
caches and memory in some state, and should not always be the same). So the steps of a turn are at most two minutes apart, and each turn gives a ratio. Rounds have fresh processes, started in a shuffled order, since where memory lies makes a difference, too:
on a virtual machine whole processes can be a third slower than others, so a ratio is that of many rounds. The first step of a process is taken and not counted.

A row of benchmarks/results/steps_in_turn.csv is one step: wall time, user and system time of the process, page faults. benchmarks/cpu_peers_page.py makes a table
of them in docs/benchmarks.md. Methods, models and the environment are those of cpu_peers.py (its docstring); memory must hold all methods at once, which is checked.
A round of five methods at the TinyLlama shape takes twelve minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from peers.methods import METHODS, Clock
from peers.rows import TURN_FIELDS, TURN_RESULTS, append, device_name, facts
from peers.shapes import SHAPES, build, needed_bytes

DEFAULT = ("lowtide-lomo", "lowtide-nothing", "sgd-bf16", "tutorial-sgd", "lomo-optim")


class Worker:
    """A process that trains by one method, one step whenever it is told to.

    Args:
        method: a key of ``METHODS``.
        options: of the command line.
    """

    def __init__(self, method: str, options: argparse.Namespace) -> None:
        self.method = method
        words = [sys.executable, __file__, "--one", method]
        for name in ("model", "batch_size", "seq_len", "steps", "threads"):
            words += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
        threads = {name: str(options.threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def step(self) -> dict[str, float]:
        """One step; what it took.

        Raises:
            SystemExit: the process ended.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            sys.exit(f"{self.method} ended with {self.process.wait()}; what it wrote stands above")
        found: dict[str, float] = json.loads(line)
        return found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class TurnClock(Clock):
    """Waits for a line before each step, and writes what the step took after it."""

    def __init__(self, out: Any) -> None:
        super().__init__()
        self._out = out

    def begin(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)  # nobody is there who would ask
        self._used = resource.getrusage(resource.RUSAGE_SELF)
        super().begin()

    def end(self) -> None:
        super().end()
        used, before = resource.getrusage(resource.RUSAGE_SELF), self._used
        found = {
            "seconds": round(self.seconds[-1], 5), "user_s": round(used.ru_utime - before.ru_utime, 3),
            "system_s": round(used.ru_stime - before.ru_stime, 3), "minor_faults": used.ru_minflt - before.ru_minflt,
        }  # fmt: skip
        self._out.write(json.dumps(found) + "\n")
        self._out.flush()


def in_this_process(options: argparse.Namespace) -> None:
    """What a worker does: an answer for every line of its standard input."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)  # whatever a library prints must not stand among the answers
        import torch

        torch.set_num_threads(options.threads)
        model = build(SHAPES[options.model], METHODS[options.one].dtype)
        generator = torch.Generator().manual_seed(1)
        shape = (options.batch_size, options.seq_len)
        batches = [
            torch.randint(SHAPES[options.model].vocab, shape, generator=generator) for _ in range(options.steps + 1)
        ]
        METHODS[options.one].train(model, batches, TurnClock(out))


def one_round(number: int, options: argparse.Namespace) -> None:
    """Fresh processes, and ``options.steps`` turns."""
    workers: list[Worker] = []
    common = {name: getattr(options, name) for name in ("model", "batch_size", "seq_len", "threads")}
    common.update(device=device_name(), round=number)
    try:
        for method in random.Random(number).sample(options.methods, len(options.methods)):
            workers.append(Worker(method, options))
            workers[-1].step()
        for turn in range(1, options.steps + 1):
            order = random.Random(f"{number} {turn}").sample(workers, len(workers))
            taken = {}
            for place, worker in enumerate(order, 1):
                found = worker.step()
                taken[worker.method] = found["seconds"]
                row = {**common, **facts(worker.method), **found, "method": worker.method, "turn": turn, "place": place}
                append(options.results, {name: row.get(name, "") for name in TURN_FIELDS}, TURN_FIELDS)
            shown = ", ".join(f"{method} {taken[method]:.4g} s" for method in options.methods)
            print(f"{options.model}, round {number}, turn {turn}: {shown}", flush=True)
    finally:
        for worker in workers:
            worker.end()


def refuse_too_much(options: argparse.Namespace) -> None:
    """Several models are in memory at once."""
    from lowtide.planning import available_host_bytes

    shape, tokens = SHAPES[options.model], options.batch_size * options.seq_len
    needed = sum(
        needed_bytes(shape, tokens, 4 if METHODS[name].dtype == "float32" else 2, METHODS[name].extra_bytes)
        for name in options.methods
    )
    if needed > available_host_bytes():
        sys.exit(
            f"these methods need about {needed / 1e9:.0f} GB side by side, and {available_host_bytes() / 1e9:.0f} GB are free: name fewer with --methods"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=list(SHAPES), default="tinyllama")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(DEFAULT))
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--steps", type=int, default=5, help="turns of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--first-round", type=int, default=1, help="its number in the rows, to go on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--results", type=Path, default=TURN_RESULTS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        in_this_process(options)
        return
    refuse_too_much(options)
    for number in range(options.first_round, options.first_round + options.rounds):
        one_round(number, options)


if __name__ == "__main__":
    main()
