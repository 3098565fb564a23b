"""Saving and loading checkpoints: speed beside plain copying of the same files, and what saving adds to the peak memory.

    python benchmarks/checkpoint_io.py [--shape tiny] [--homes device disk] [--rounds 3] [--dir DIRECTORY]

Random bfloat16 weights in the shape of TinyLlama (1.1 B parameters, 2.2 GB) with AdaLomo's state, on a CPU; each home in a fresh
process, which trains one step on 2 x 64 tokens first. Then, in turn, ``rounds`` times: a checkpoint is written; its files are copied
(``shutil.copyfile``, then fsync), once from the disk and once from the page cache; it is checked (every byte) and its model
loaded, from the disk (on a CPU its weights are mapped then, as in training; for the home on disk a working copy is written). Both are
held against the faster of the two ways to copy: 0.8 of its speed at least. Saving may add at most one block to the peak of training.
"""

import argparse
import datetime
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bigger_than_memory import SHAPES, random_model, write

FIELDS = (
    "date", "torch", "home", "num_bytes", "save_s", "copy_cached_s", "copy_s", "load_s", "save_ratio", "load_ratio",
    "block_bytes", "resident_bytes", "save_added_bytes", "training_peak_bytes", "save_peak_bytes",
)  # fmt: skip


class NoTokenizer:
    """In the place of a tokenizer: random weights have none."""

    def save_pretrained(self, directory: Path) -> None:
        """Nothing to save."""


def drop_cache(directory: Path) -> None:
    """Files are read from the disk the next time."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def fill_cache(directory: Path) -> None:
    """Files are in memory."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(2**24):
                    pass


def copy(source: Path, target: Path) -> float:
    """Seconds to copy all files and to have them on the disk."""
    start = time.perf_counter()
    shutil.copytree(source, target)
    for path in target.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    drop_cache(target)
    shutil.rmtree(target)
    return seconds


def measure(home: str, options: argparse.Namespace) -> dict:
    """One home, in this process."""
    import torch

    import lowtide
    from lowtide.models import load_model
    from lowtide.models.saving import write_model
    from lowtide.optim.named_state import named_state
    from lowtide.planning import peak_resident_bytes, resident_bytes
    from lowtide.training.checkpoint import read_checkpoint, write_checkpoint

    torch.set_num_threads(options.threads)
    folder = Path(tempfile.mkdtemp(dir=options.dir, prefix="lowtide-bench-"))
    try:
        model = random_model(options.shape, torch.bfloat16)
        optimizer = lowtide.AdaLomo(model.parameters(), lr=1e-3)
        weights = folder / "weights" if home == "disk" else "device"
        engine = lowtide.fuse(model, optimizer, weights=weights, device="cpu")
        ids = torch.randint(3, 32000, (2, 64))
        engine.backward(model(input_ids=ids, labels=ids).loss)
        optimizer.step()
        training_peak = peak_resident_bytes()
        names = {param: name for name, param in model.named_parameters()}
        block = max(sum(p.nbytes for p in layer.parameters()) for layer in model.model.layers)
        times: dict[str, list[float]] = {name: [] for name in ("save_s", "copy_cached_s", "copy_s", "load_s")}
        added, save_peak = 0, 0
        for number in range(options.rounds):
            resident = resident_bytes()
            Path("/proc/self/clear_refs").write_text("5")
            start = time.perf_counter()
            tensors, plain = named_state(optimizer, names)
            parts = engine.parts_of_model()

            def write_files(directory: Path, parts=parts) -> dict:
                return write_model(model, NoTokenizer(), directory, parts)

            path = write_checkpoint(folder / "checkpoints", number, write_files, tensors, {"step": number, "o": plain})
            times["save_s"].append(time.perf_counter() - start)
            save_peak = save_peak or peak_resident_bytes()  # later ones have remains of loading in them
            added = max(added, peak_resident_bytes() - resident)
            fill_cache(path)
            times["copy_cached_s"].append(copy(path, folder / "copy"))
            drop_cache(path)
            times["copy_s"].append(copy(path, folder / "copy"))
            drop_cache(path)
            start = time.perf_counter()
            checkpoint = read_checkpoint(path)
            loaded = load_model(str(path), dtype=torch.bfloat16, lazy=home == "disk")
            if home == "disk":
                again = lowtide.AdaLomo(loaded.parameters(), lr=1e-3)
                second = lowtide.fuse(loaded, again, weights=folder / "again", device="cpu")
            for load in checkpoint.optimizer_tensors().values():
                load()
            times["load_s"].append(time.perf_counter() - start)
            if home == "disk":
                second.remove(keep_copy=False)
            num_bytes = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            del loaded
            shutil.rmtree(path)
        median = {name: round(statistics.median(values), 3) for name, values in times.items()}
        copying = min(median["copy_s"], median["copy_cached_s"])
        return {
            "home": home, "num_bytes": num_bytes, **median,
            "save_ratio": round(copying / median["save_s"], 3), "load_ratio": round(copying / median["load_s"], 3),
            "block_bytes": block, "resident_bytes": resident, "save_added_bytes": added,
            "training_peak_bytes": training_peak, "save_peak_bytes": save_peak,
        }  # fmt: skip
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="tiny", choices=tuple(SHAPES))
    parser.add_argument("--homes", nargs="+", default=["device", "disk"], choices=("device", "disk"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dir", default=tempfile.gettempdir())
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.homes[0], options)))
        return
    import torch

    for home in options.homes:
        command = [sys.executable, __file__, "--one", "--homes", home, "--shape", options.shape, "--dir", options.dir]
        command += ["--rounds", str(options.rounds), "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{home}: did not finish, exit {done.returncode}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        size = found["num_bytes"] / 1e9
        print(
            f"{home}: {size:.2f} GB; saved in {found['save_s']:.2f} s ({size / found['save_s']:.2f} GB/s), checked and loaded in "
            f"{found['load_s']:.2f} s; copied from the cache in {found['copy_cached_s']:.2f} s, from the disk in {found['copy_s']:.2f} s\n"
            f"  saving has {found['save_ratio']:.2f}, loading {found['load_ratio']:.2f} of the speed of copying (bound 0.8)\n"
            f"  saving added {found['save_added_bytes'] / 1e6:.0f} MB to a resident set of {found['resident_bytes'] / 1e9:.2f} GB "
            f"(a block: {found['block_bytes'] / 1e6:.0f} MB); peak in training {found['training_peak_bytes'] / 1e9:.2f} GB, "
            f"in saving {found['save_peak_bytes'] / 1e9:.2f} GB",
            flush=True,
        )
        row = {"date": datetime.date.today(), "torch": torch.__version__, **found}
        write(Path(__file__).parent / "results" / "checkpoint_io.csv", {field: row[field] for field in FIELDS})


if __name__ == "__main__":
    main()
