"""``torchrun -m lowtide train``: two machines that find each other, and a rank that dies and is started again."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from kill_ranks import free_port
from safetensors.torch import load_file

from lowtide.training import TrainConfig, train
from tiny_files import save_tiny_model, write_task

PATIENCE_S = 240


@pytest.fixture
def settings(tmp_path):
    model, data = save_tiny_model(tmp_path / "model"), write_task(tmp_path / "task.jsonl")

    def make(name, **changes):
        defaults = {
            "model": str(model), "data": [str(data)], "output": str(tmp_path / name), "optimizer": "lomo", "lr": 0.5, "max_steps": 4,
            "batch_size": 6, "max_seq_len": 32, "dtype": "float32", "eval_fraction": 0.1, "device": "cpu", "threads": 1,
        }  # fmt: skip
        return {**defaults, **changes}

    return make


def torchrun(tmp_path, name, options, settings):
    flags = []
    for key, value in settings.items():
        flags += [f"--{key.replace('_', '-')}", *(value if isinstance(value, list) else [str(value)])]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "lowtide", "train", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (tmp_path / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def weights(output):
    return load_file(f"{output}/model/model.safetensors")


def test_two_machines_run_a_job_to_its_end(tmp_path, settings):
    """Two agents with a rendezvous on the loopback, a process each: as on two machines, but for the network between them."""
    wanted = settings("together")
    meeting = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "job"]
    meeting += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    agents = [torchrun(tmp_path, f"agent-{number}", meeting, wanted) for number in range(2)]
    codes = [agent.wait(PATIENCE_S) for agent in agents]
    logs = [(tmp_path / f"agent-{number}.log").read_text() for number in range(2)]
    assert codes == [0, 0], logs
    assert sum("The model is in" in log for log in logs) == 1  # one rank speaks
    alone = train(TrainConfig(**settings("alone")), show_progress=False)
    found, expected = weights(wanted["output"]), weights(alone.output)
    assert all((found[name] - value).abs().max() < 1e-6 for name, value in expected.items())


@pytest.mark.parametrize("num_machines", [1, 2])
def test_a_rank_that_dies_is_started_again_and_the_run_goes_on(tmp_path, settings, num_machines):
    wanted = settings("restarted", max_steps=80, save_every="5", lr=0.02)
    options = ["--max-restarts", "2", "--nproc-per-node", str(2 // num_machines)]
    if num_machines == 2:
        options += [
            "--nnodes",
            "2",
            "--rdzv-backend",
            "c10d",
            "--rdzv-id",
            "job",
            "--rdzv-endpoint",
            f"127.0.0.1:{free_port()}",
        ]
    agents = [torchrun(tmp_path, f"agent-{number}", options, wanted) for number in range(num_machines)]
    checkpoints = tmp_path / "restarted" / "checkpoints"
    end = time.monotonic() + PATIENCE_S

    def logs():
        return [(tmp_path / f"agent-{number}.log").read_text() for number in range(num_machines)]

    while not (checkpoints.is_dir() and any(path.name.startswith("step-") for path in checkpoints.iterdir())):
        assert all(agent.poll() is None for agent in agents) and time.monotonic() < end, logs()
        time.sleep(0.02)
    workers = [worker for agent in agents for worker in psutil.Process(agent.pid).children()]
    (victim,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
    os.kill(victim.pid, signal.SIGKILL)
    codes = [agent.wait(PATIENCE_S) for agent in agents]
    log = logs()
    assert codes == [0] * num_machines, log
    assert '"event": "resume"' in (tmp_path / "restarted" / "metrics.jsonl").read_text(), log
    whole = train(TrainConfig(**settings("whole", max_steps=80, lr=0.02)), show_progress=False)
    found, expected = weights(wanted["output"]), weights(whole.output)
    assert all(
        (found[name] - value).abs().max() < 1e-5 for name, value in expected.items()
    )  # 80 steps in another order of sums
