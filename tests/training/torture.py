"""Kills a training run with SIGKILL at random moments, saves included, and resumes it, until so many kills are survived.

    python tests/training/torture.py [--kills 100] [--seed 0]

Each run is resumed with ``resume="auto"`` until it comes to its end by itself. Its weights and its metrics must then be those of
a run that nobody killed. Half of the kills fall anywhere in a run, half of them into the writing of a checkpoint or of the model. Runs
take turns at living on the device and on disk. A run is forked from a process that has imported everything, so that the time
between two kills is spent in training and not in imports.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from lowtide.training import TrainConfig, read_events, train

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tiny_files import save_tiny_model, write_task

NUM_STEPS = 24
DIFFERENT = ("time", "tokens_per_s", "memory_bytes", "peak_memory_bytes")


class Torture:
    """A reference run, and runs that are killed.

    Args:
        folder: for everything; emptied by the caller.
        seed: of the moments.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.model = save_tiny_model(folder / "model", attention_dropout=0.1)
        self.data = write_task(folder / "task.jsonl")
        self.num_kills = self.num_kills_in_saves = self.num_runs = 0
        start = time.monotonic()
        code = self._wait(self._start("reference", "device"))
        assert code == 0, (
            f"the run that nobody kills ended with {code}:\n{(folder / 'reference.log').read_text()[-4000:]}"
        )
        self.duration = time.monotonic() - start
        self.expected = self.outcome("reference")

    def config(self, name: str, home: str) -> TrainConfig:
        """Settings of a run; dropout, packing and shuffling are on."""
        return TrainConfig(
            model=str(self.model), data=[str(self.data)], output=str(self.folder / name), optimizer="adalomo", lr=0.1,
            max_steps=NUM_STEPS, batch_size=4, micro_batch_size=2, max_seq_len=32, packing=True, dtype="bfloat16", eval_every=7,
            eval_fraction=0.1, device="cpu", threads=1, save_every="3", resume="auto", samples=1,
            weights=str(self.folder / f"{name}-weights") if home == "disk" else "device",
        )  # fmt: skip

    def _start(self, name: str, home: str) -> int:
        sys.stdout.flush()
        process = os.fork()
        if process:
            return process
        code = 1
        try:
            with (self.folder / f"{name}.log").open("a") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            train(self.config(name, home), show_progress=False)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    @staticmethod
    def _wait(process: int) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])

    def outcome(self, name: str) -> tuple[dict, list]:
        """Weights and metrics of a finished run."""
        output = self.folder / name
        weights = {path.name: load_file(path) for path in (output / "model").glob("*.safetensors")}
        events = [e for e in read_events(output / "metrics.jsonl") if e["event"] in ("train", "eval")]
        return weights, [{key: value for key, value in event.items() if key not in DIFFERENT} for event in events]

    def kill_one_run(self, most: int) -> int:
        """Begin a run and kill it again and again, at most so many times; check how it ends. Returns the number of kills."""
        name, home = f"run-{self.num_runs}", ("device", "disk")[self.num_runs % 2]
        self.num_runs += 1
        kills = 0
        while True:
            process = self._start(name, home)
            if kills < most and self._kill(process, self.folder / name):
                kills += 1
                continue
            code = self._wait(process) if kills >= most else self.code
            if code:
                raise AssertionError(
                    f"{name} ended with {code} after {kills} kills:\n{(self.folder / f'{name}.log').read_text()[-4000:]}"
                )
            break
        self._check(name)
        return kills

    def _kill(self, process: int, output: Path) -> bool:
        """Kill the process at a random moment; False if it was over before, and then its exit code is in ``code``."""
        into_save = self.random.random() < 0.5
        moment = time.monotonic() + self.random.uniform(0, self.duration)
        extra = self.random.uniform(0, 0.02)
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.code = os.waitstatus_to_exitcode(status)
                return False
            if time.monotonic() >= moment:
                saving = self._is_saving(output)
                if saving or not into_save:
                    if saving:
                        time.sleep(extra)
                    self.num_kills_in_saves += self._is_saving(output)
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.SIGKILL)
                    if (code := self._wait(process)) != -signal.SIGKILL:
                        self.code = code
                        return False
                    self.num_kills += 1
                    return True
            time.sleep(0.0005)

    @staticmethod
    def _is_saving(output: Path) -> bool:
        with contextlib.suppress(OSError):
            return any(output.glob(".*.tmp")) or any((output / "checkpoints").glob(".*"))
        return False

    def _check(self, name: str) -> None:
        weights, metrics = self.outcome(name)
        expected_weights, expected_metrics = self.expected
        assert weights.keys() == expected_weights.keys(), f"{name}: {sorted(weights)} was saved"
        for file, tensors in weights.items():
            for key, value in tensors.items():
                assert torch.equal(value, expected_weights[file][key]), f"{name}: {key} differs"
        assert metrics == expected_metrics, f"{name}: the metrics differ"
        output = self.folder / name
        left = [path.name for path in (*output.iterdir(), *(output / "checkpoints").iterdir()) if path.name[0] == "."]
        assert not left, f"{name}: left behind {left}"
        copy = self.folder / f"{name}-weights"
        assert not copy.exists(), f"{name}: left behind {[path.name for path in copy.iterdir()]}"
        shutil.rmtree(output)


def torture(folder: Path, kills: int, seed: int = 0, most_a_run: int = 10) -> Torture:
    """Kill until so many kills were survived."""
    torch.set_num_threads(1)
    # tqdm's lock is one for all forked processes: a run that is killed while it holds it would keep it, and the next one wait for ever.
    # And its thread must not hold the lock at the moment of a fork.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    found = Torture(folder, seed)
    while found.num_kills < kills:
        found.kill_one_run(min(most_a_run, kills - found.num_kills))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        found = torture(Path(folder), options.kills, options.seed)
    print(
        f"{found.num_kills} kills, {found.num_kills_in_saves} of them while saving, in {found.num_runs} runs of {NUM_STEPS} steps "
        f"({time.monotonic() - start:.0f} s): all ended as the run that was not killed"
    )


if __name__ == "__main__":
    main()
