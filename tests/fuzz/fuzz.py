"""Fuzzes the parsers for as long as it is told to: python tests/fuzz/fuzz.py [--minutes 10] [--seed 0]."""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "models")]
import targets  # noqa: E402
from gguf_files import write_gguf  # noqa: E402

from helpers import tiny_model  # noqa: E402
from tiny_files import save_tiny_model, write_task  # noqa: E402

SLOWEST_S = 10.0  # for one input; more is a hang


def good_files(folder: Path) -> tuple[Path, Path, Path]:
    """(a model, a checkpoint, a GGUF file)."""
    from lowtide.training import TrainConfig, train

    model = save_tiny_model(folder / "good")
    config = TrainConfig(
        model=str(model), data=[str(write_task(folder / "task.jsonl"))], output=str(folder / "out"), max_steps=3, save_every="2",
        batch_size=4, max_seq_len=32, dtype="float32", device="cpu",
    )  # fmt: skip
    checkpoint = train(config, show_progress=False).output / "checkpoints" / "step-00000002"
    write_gguf(folder / "good.gguf", tiny_model("llama"), "llama")
    return model, checkpoint, folder / "good.gguf"


def make_targets(folder: Path):
    """name: (strategy of arguments, function)."""
    model, checkpoint, gguf = good_files(folder)
    work = folder / "work"
    work.mkdir()
    header = _header_end(model / "model.safetensors")

    def of(directory, names):
        return st.sampled_from(names).flatmap(
            lambda name: st.tuples(st.just(name), _mangled_file(directory / name, header))
        )

    model_files = ["model.safetensors", "config.json", "model.safetensors", "generation_config.json"]
    checkpoint_files = [
        "model.safetensors",
        "training/state.json",
        "training/manifest.json",
        "training/optimizer.safetensors",
        "config.json",
    ]
    return {
        "records": (st.tuples(targets.record_files), lambda data: targets.try_records(work, data)),
        "JSON": (st.tuples(targets.whole_files), lambda data: targets.try_records(work, data, ".json")),
        "CSV": (st.tuples(targets.table_files), lambda data: targets.try_records(work, data, ".csv")),
        "Parquet": (st.tuples(targets.parquet_files), lambda data: targets.try_records(work, data, ".parquet")),
        "texts": (st.tuples(targets.record_files), lambda data: targets.try_records(work, data, ".txt")),
        "config, YAML": (st.tuples(targets.config_files), lambda data: targets.try_config(work, data)),
        "config, JSON": (st.tuples(targets.config_files), lambda data: targets.try_config(work, data, ".json")),
        "GGUF": (st.tuples(_mangled_file(gguf, 2**14)), lambda data: targets.try_gguf(work, data)),
        "models": (of(model, model_files), lambda name, data: targets.try_model(work, model, name, data)),
        "model configs": (
            st.tuples(_changed_json(model / "config.json")), lambda data: targets.try_model(work, model, "config.json", data)
        ),
        "checkpoints": (of(checkpoint, checkpoint_files), lambda name, data: targets.try_checkpoint(work, checkpoint, name, data)),
    }  # fmt: skip


def _header_end(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _mangled_file(path: Path, most: int):
    """Changes in the first bytes, where the structure is; the rest as it was."""
    data = path.read_bytes()
    return targets.mangled(data[:most]).map(lambda start: start + data[most:])


def _changed_json(path: Path):
    """One entry of a JSON object is something else."""
    good = json.loads(path.read_text())
    return st.tuples(st.sampled_from(sorted(good)), targets.json_values).map(
        lambda change: targets.as_bytes({**good, change[0]: change[1]})
    )


def run(name: str, strategy, function, max_examples: int, number: int) -> int:
    """Try so many inputs; returns how many were tried."""
    count = 0

    @seed(number)
    @settings(
        max_examples=max_examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
    @given(strategy)
    def once(arguments):
        nonlocal count
        count += 1
        start = time.monotonic()
        function(*arguments)
        taken = time.monotonic() - start
        assert taken < SLOWEST_S, f"{name}: {taken:.1f} s for one input"

    once()
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="+")
    options = parser.parse_args()
    numbers, counts = random.Random(options.seed), {}
    with tempfile.TemporaryDirectory() as folder:
        all_targets = make_targets(Path(folder))
        chosen = {name: all_targets[name] for name in options.targets or all_targets}
        end = time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            for name, (strategy, function) in chosen.items():
                counts[name] = counts.get(name, 0) + run(
                    name, strategy, function, 60 if "odel" in name or name == "GGUF" else 300, numbers.getrandbits(32)
                )
                if time.monotonic() > end:
                    break
    print(
        f"{options.minutes:g} minutes, no unhandled error and no hang:",
        ", ".join(f"{n} {c}" for n, c in counts.items()),
    )


if __name__ == "__main__":
    main()
