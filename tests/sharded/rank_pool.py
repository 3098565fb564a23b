"""Processes that form a gloo process group on this machine and run functions for the tests."""

import multiprocessing
import os
import tempfile
import traceback
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PRELOAD = ["torch", "torch.distributed.fsdp", "transformers.models.llama.modeling_llama"]
PATIENCE_S = 240  # for one function; a hang is a failure


def serve(rank, size, store, pipe):
    import datetime

    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, size),
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=PATIENCE_S // 2),
    )
    while (job := pipe.recv()) is not None:
        function, args, kwargs = job
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*args, **kwargs)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    torch.distributed.destroy_process_group()


class RankPool:
    """A process a rank. A function that fails on one rank fails the test; what it returned on each rank comes back."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        # Imported once, by the server that forks the ranks. It does not take over this process's path.
        paths = [str(TESTS), str(TESTS / "sharded"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        context.set_forkserver_preload(PRELOAD)
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            arguments = (rank, size, str(Path(self.folder.name) / "store"), there)
            process = context.Process(target=serve, args=arguments, daemon=True)
            process.start()
            self.pipes.append(here)
            self.processes.append(process)

    def run(self, function, *args, **kwargs):
        """Call it on every rank; a list of what it returned."""
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))
        answers = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE_S):
                raise TimeoutError(f"rank {rank} did not answer within {PATIENCE_S} s")
            answers.append(pipe.recv())
        failed = [f"rank {rank}: {answer}" for rank, (fine, answer) in enumerate(answers) if not fine]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()
        self.folder.cleanup()
