"""Kills one of several ranks at random moments, and resumes the run, until so many kills are survived.

    python tests/sharded/kill_ranks.py [--kills 20] [--ranks 4] [--seed 0]

After each kill the other ranks must end by themselves, soon, with a message that says what happened and what to do; the run is then
started again with ``--resume auto``. In the end its weights and metrics must be those of a run that nobody killed. The ranks run the
command line itself, in processes forked from one that has imported everything, with the environment that torchrun gives.
"""

import argparse
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from rank_pool import PRELOAD
from safetensors.torch import load_file

from tiny_files import save_tiny_model, write_task

NUM_STEPS = 24
DIFFERENT = ("time", "tokens_per_s", "memory_bytes", "peak_memory_bytes")
PATIENCE_S = 60  # until the ranks that are left must have ended; they end in a second or so
LOST = "another process of this run is gone"


def rank_main(rank, size, port, log, arguments):
    """One rank, as torchrun would start it."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    from lowtide.cli import main

    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def free_port():
    with contextlib.closing(socket.socket()) as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Torture:
    def __init__(self, folder, size, seed):
        self.folder, self.size, self.random = folder, size, random.Random(seed)
        # The server that the ranks are forked from does not take over this process's path.
        os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, sys.path[:2]), os.environ.get("PYTHONPATH", "")])
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload([*PRELOAD, "lowtide.training.trainer"])
        self.model = save_tiny_model(folder / "model", attention_dropout=0.1)
        self.data = write_task(folder / "task.jsonl")
        self.num_starts = 0
        self.logs = []  # of the ranks that were started last
        self.slowest = 0.0  # seconds from a kill to the end of all others
        first = self.context.Process(target=os.getpid)  # ends when the server has imported everything
        first.start()
        first.join()
        start = time.monotonic()
        codes = self.wait(self.start("reference"))
        assert codes == [0] * size, (codes, self.said())
        self.duration = time.monotonic() - start
        self.expected = self.outcome("reference")

    def start(self, name):
        arguments = [
            "train", "--model", str(self.model), "--data", str(self.data), "--output", str(self.folder / name), "--optimizer", "adalomo",
            "--lr", "0.05", "--max-steps", str(NUM_STEPS), "--batch-size", "6", "--micro-batch-size", "1", "--max-seq-len", "32",
            "--dtype", "bfloat16", "--eval-every", "7", "--save-every", "3", "--resume", "auto", "--device", "cpu", "--threads", "1",
        ]  # fmt: skip
        port = free_port()
        self.num_starts += 1
        logs = [self.folder / f"{name}-{self.num_starts}-{rank}.log" for rank in range(self.size)]
        ranks = [
            self.context.Process(target=rank_main, args=(rank, self.size, port, str(logs[rank]), arguments))
            for rank in range(self.size)
        ]
        for process in ranks:
            process.start()
        self.logs = logs
        return ranks

    def wait(self, ranks, patience=240.0):
        """Exit codes; None of one that had to be killed because it hung."""
        end = time.monotonic() + patience
        for process in ranks:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in ranks]
        for process in ranks:
            process.kill()
        return codes

    def said(self):
        """What each rank said that was started last."""
        return [path.read_text() if path.exists() else "" for path in self.logs]

    def outcome(self, name):
        from lowtide.training import read_events

        events = [e for e in read_events(self.folder / name / "metrics.jsonl") if e["event"] in ("train", "eval")]
        weights = {path.name: load_file(path) for path in (self.folder / name / "model").glob("*.safetensors")}
        return weights, [{key: value for key, value in event.items() if key not in DIFFERENT} for event in events]

    def kill_one_run(self, name, most):
        """Returns how many kills it took; between two of them, and in the end, everything is checked."""
        kills = 0
        while True:
            ranks = self.start(name)
            if kills < most:
                victim = ranks[self.random.randrange(self.size)]
                time.sleep(self.random.uniform(0.1, 1.0) * self.duration)
                if all(process.is_alive() for process in ranks):
                    os.kill(victim.pid, signal.SIGKILL)
                    kills += 1
                    before = time.monotonic()
                    codes = self.wait(ranks, PATIENCE_S)
                    self.slowest = max(self.slowest, time.monotonic() - before)
                    for process, code, text in zip(ranks, codes, self.said(), strict=True):
                        if process is victim:
                            continue
                        assert code is not None, f"a rank hangs: {codes}\n{text}"
                        # One that had come to its end in this moment has nothing to complain of.
                        assert code == 0 or (code == 1 and LOST in text), (codes, text)
                    continue
            codes = self.wait(ranks)
            assert codes == [0] * self.size, (codes, self.said())
            break
        weights, events = self.outcome(name)
        assert events == self.expected[1], "the metrics are not those of the run that nobody killed"
        for file, tensors in self.expected[0].items():
            for key, value in tensors.items():
                assert value.equal(weights[file][key]), f"{key} is not that of the run that nobody killed"
        return kills


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        torture = Torture(Path(folder), options.ranks, options.seed)
        kills = num_runs = 0
        while kills < options.kills:
            kills += torture.kill_one_run(f"run-{num_runs}", min(5, options.kills - kills))
            num_runs += 1
    print(
        f"{kills} kills of one of {options.ranks} ranks in {num_runs} runs of {NUM_STEPS} steps: every run ended as if nobody had been killed; "
        f"the other ranks had ended after {torture.slowest:.1f} s at most. {time.monotonic() - start:.0f} s in all"
    )


if __name__ == "__main__":
    main()
