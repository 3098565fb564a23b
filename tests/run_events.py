"""Events as a run writes them, made up."""

import json


def config_event(step=0, **changes):
    event = {
        "event": "config",
        "step": step,
        "time": 0.1,
        "config": {"model": "tiny", "optimizer": "lomo", "lr": 0.1, "lora_rank": 0},
        "num_parameters": 30_000,
        "num_steps": 10,
        "device": "cpu",
        "clip_grad_norm": 1.0,
        "predicted_memory": {"weights": 2**20, "gradients": 2**18, "kept block inputs": 2**17, "other": 7},
        "program_bytes": 2**29,
        "versions": {"lowtide": "0.1.0", "torch": "2.13.0"},
    }
    return event | changes


def train_event(step, **changes):
    event = {
        "event": "train",
        "step": step,
        "time": float(step),
        "loss": 3.0 / step,
        "num_tokens": 100,
        "tokens_per_s": 50.0,
        "memory_bytes": 2**29 + 2**20,
        "peak_memory_bytes": 2**29 + 2**21,
        "lr": 0.1,
        "grad_norm": 2.0 / step,
        "skipped": False,
        "partial": False,
        "lost_updates": 0.25,
        "spike": False,
    }
    return event | changes


def eval_event(step, loss=2.0, **changes):
    return {
        "event": "eval",
        "step": step,
        "time": float(step),
        "loss": loss,
        "perplexity": 7.4,
        "num_tokens": 9,
    } | changes


def memory_event(step=2, **changes):
    """Four moments of a step, one MiB of weights, above half a GiB of the process."""
    weights, program = 2**20, 2**29
    event = {
        "event": "memory",
        "step": step,
        "time": float(step),
        "num_tokens": 96,
        "seconds": [0.0, 0.1, 0.2, 0.3],
        "where": ["before the step", "forward, layers.0", "backward, layers.0", "after the step"],
        "total_bytes": [program + weights, program + weights + 5000, program + weights + 9000, program + weights],
        "bytes": {
            "weights": [weights] * 4,
            "optimizer state": [0] * 4,
            "gradients": [0, 0, 4000, 0],
            "kept block inputs": [0, 2000, 2000, 0],
        },
        "most_bytes": {"weights": weights, "optimizer state": 0, "gradients": 4096, "kept block inputs": 2000},
    }
    return event | changes


def samples_event(step, *answers, prompt="say a:", expected=" aa", **changes):
    """Prompts that differ in their number, each with an answer."""
    samples = [
        {"prompt": f"{prompt}{number or ''}", "expected": expected, "answer": answer}
        for number, answer in enumerate(answers)
    ]
    return {"event": "samples", "step": step, "time": float(step), "seconds": 0.5, "samples": samples} | changes


def end_event(step, **changes):
    return {
        "event": "end",
        "step": step,
        "time": float(step),
        "peak_memory_bytes": 2**30,
        "interrupted": False,
    } | changes


def whole_run(num_steps=10):
    steps = [train_event(step) for step in range(1, num_steps + 1)]
    return [config_event(), eval_event(0), *steps, eval_event(num_steps, 1.0, perplexity=2.7), end_event(num_steps)]


def write_run(directory, events, settings="model: tiny\noptimizer: lomo\nlr: 0.1\n"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    if settings is not None:
        (directory / "config.yaml").write_text(settings)
    return directory
