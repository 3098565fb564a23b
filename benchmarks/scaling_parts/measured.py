"""The model beside what this project has measured, which was on CPUs only.

Each group of rows is of one machine as far as the CSV files say. One constant of a group (FLOP/s in products) is fitted to one of its rows, marked so;
the others are predicted. The bandwidth of memory is fitted once, to the time of an update without forward and backward.
"""

from __future__ import annotations

import csv
import dataclasses
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from lowtide.planning import Speeds, StepShape, step_time
from lowtide.planning.speeds import NAMES
from lowtide.planning.updates import update_traffic

from .shapes import MODELS, homes, step_shape
from .tables import error, number, table

RESULTS = Path(__file__).resolve().parents[1] / "results"
# Of the disk in bigger_than_memory.csv, as docs/homes.md gives it.
DISK_READ, DISK_WRITE = 0.7e9, 1.3e9
# What the planner counts for Lomo where the head's gradient is whole: in other packages, and in rows of before it came in slices.
WHOLE_HEAD = "sgd"
MANY_TOKENS = 512  # a step; below, products of a CPU do not run at full speed


@dataclasses.dataclass(frozen=True)
class Row:
    """A measured step.

    Attributes:
        case: for people.
        seconds: of a step, measured.
        shape: of the step.
        home: of the weights.
        share: of the operations that the planner counts, which are done: 3/4 where nothing is recomputed.
        updates: weights are updated.
    """

    case: str
    seconds: float
    shape: StepShape
    home: str = "device"
    share: float = 1.0
    updates: bool = True


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows of one machine and dtype.

    Attributes:
        title: for people; what is special about it.
        rows: the first is fitted, unless ``flops`` says otherwise.
        flops: FLOP/s from elsewhere, with its source; None to fit.
        tokens_known: False where the tokens of a step were not recorded: then the fitted constant is no speed.
    """

    title: str
    rows: Sequence[Row]
    flops: tuple[float, str] | None = None
    tokens_known: bool = True


def read(name: str, results: Path = RESULTS) -> list[dict[str, str]]:
    """Rows of a CSV; none if there is no such file."""
    path = results / name
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def memory_bandwidth() -> float:
    """Bytes a second of a CPU's memory, from the update of all weights of the TinyLlama shape, rounded to nearest."""
    rows = [row for row in read("clip_cost.csv") if row["way"] == "update, nearest"]
    shape = step_shape("tinyllama", 1, 2, device="cpu")
    moved = sum(update_traffic(param, "lomo", None) for param in shape.model.parameters())
    return moved / statistics.median(float(row["step_s"]) for row in rows)


def predict(row: Row, flops: float, memory: float) -> float:
    """Seconds of a step."""
    speeds = Speeds(
        flops=flops / row.share, to_device=1e9, from_device=1e9, disk_read=DISK_READ, disk_write=DISK_WRITE,
        sources=dict.fromkeys(NAMES, "given"), memory=memory if row.updates else None,
    )  # fmt: skip
    return step_time(row.shape, homes(row.shape, row.home), "device", speeds).step_s


def fit(row: Row, memory: float) -> float:
    """FLOP/s with which the model gives this row, whose weights are in memory."""
    operations = predict(dataclasses.replace(row, updates=False), 1.0, memory)
    return operations / (row.seconds - predict(row, float("inf"), memory))


def groups() -> list[Group]:
    """All that there are rows for."""
    found = [_clipping(), _memory(), _float32(), _from_disk(), _trec("float32"), _trec("bfloat16"), _curves(), _tiny()]
    return [group for group in (*found, *peers()) if group.rows]


def _on_cpu(model: str, batch: int, seq: int, optimizer: str, dtype: str, clipped: bool = False) -> StepShape:
    return step_shape(model, batch, seq, optimizer=optimizer, dtype=dtype, device="cpu", exact_clipping=clipped)


def _clipping() -> Group:
    rows = [row for row in read("clip_cost.csv") if row["layers"] == "22" and not row["way"].startswith("update")]
    made = [
        Row(
            f"{row['way']}, 8 x {row['seq_len']}", float(row["step_s"]),
            _on_cpu("tinyllama", 8, int(row["seq_len"]), "lomo", row["dtype"], row["way"] == "exact"),
        )
        for row in rows
    ]  # fmt: skip
    return Group(
        "`clip_cost.csv`: TinyLlama shape, float32, Lomo, ways to clip (kept gradients and adaptive count as none)",
        made,
    )


def _memory() -> Group:
    rows = [row for row in read("memory_cpu.csv") if row["method"] != "adamw-fp32"]
    made = [
        Row(
            row["method"],
            float(row["step_s"]),
            _on_cpu("tinyllama", 8, 128, row["method"].removesuffix("-bf16"), "bfloat16"),
        )
        for row in rows
    ]
    return Group("`memory_cpu.csv`: TinyLlama shape, bfloat16, 8 x 128 tokens", made)


def _float32() -> Group:
    rows = [row for row in read("memory_cpu.csv") if row["method"] == "adamw-fp32"]
    made = [Row(row["method"], float(row["step_s"]), _on_cpu("tinyllama", 8, 128, "adamw", "float32")) for row in rows]
    first = _clipping().rows[0]
    return Group(
        "`memory_cpu.csv`: the same in float32; perhaps another machine than that of the constant",
        made,
        (fit(first, memory_bandwidth()), "that of `clip_cost.csv`"),
    )


def _from_disk() -> Group:
    """The ratio's rows are first: nothing else ran then."""
    made = []
    for row in read("bigger_than_memory_ratio.csv"):
        shape = _on_cpu("tinyllama", 4, 512, row["optimizer"], row["dtype"])
        made.append(Row("TinyLlama, 4 x 512, in memory", float(row["device_step_s"]), shape))
        made.append(Row("TinyLlama, 4 x 512, from disk", float(row["step_s"]), shape, "disk"))
    for row in read("bigger_than_memory.csv"):
        name, home = row["case"].split("-")
        model = {"tiny": "tinyllama", "7b": "LLaMA 7B", "30b": "LLaMA 30B"}[name]
        seq = 512 if name == "tiny" else int(row["tokens"])
        shape = _on_cpu(model, int(row["tokens"]) // seq, seq, row["optimizer"], row["dtype"])
        where = "from disk" if home == "disk" else "in memory"
        title = "TinyLlama" if name == "tiny" else model
        made.append(Row(f"{title}, {shape.batch_size} x {seq}, {where}", float(row["step_s"]), shape, home))
    title = (
        "`bigger_than_memory*.csv`: bfloat16 in float32 slices on a processor with AVX2, Lomo; disk "
        f"{DISK_READ / 1e9} and {DISK_WRITE / 1e9} GB/s; other work ran beside all but the first two"
    )
    return Group(title, made)


def _trec(dtype: str) -> Group:
    """Batches of 8 padded questions. How many tokens they have is not recorded, so the constant takes that in as well."""
    sixteen = dtype == "bfloat16"
    # optimizer, two passes, share of operations
    known = {
        "lomo": (WHOLE_HEAD, True, 1.0), "adalomo": ("adalomo", True, 1.0), "adamw": ("adamw", False, 0.75), "sgd": ("sgd", False, 0.75),
        "adamw, checkpointed": ("adamw", False, 1.0),
    }  # fmt: skip
    by_method: dict[str, list[float]] = {}
    for row in read("quality_cost.csv"):
        method = row["method"].removesuffix("-bf16")
        if row["task"] == "trec" and method in known and row["method"].endswith("-bf16") == sixteen:
            by_method.setdefault(method, []).append(float(row["step_s"]))
    made = []
    for method, seconds in by_method.items():
        optimizer, clipped, share = known[method]
        shape = _on_cpu("smollm2", 8, 64, optimizer, dtype, clipped)
        made.append(Row(method, statistics.median(seconds), shape, share=share))
    return Group(
        f"`quality_cost.csv`, TREC: SmolLM2-135M, {dtype}, clipped to norm 1; the tokens of a step are not known, so only ratios are tested",
        made,
        tokens_known=False,
    )


def _curves() -> Group:
    """Median of all steps of all seeds."""
    cases = {
        "none, lr 0.005": (False, "no clipping"),
        "exact, lr 0.2": (True, "exact"),
        "adaptive, lr 0.2": (False, "adaptive"),
    }
    rows = [row for row in read("numerics.csv") if row["what"] == "clipping"]
    made = []
    for way, (clipped, title) in cases.items():
        seconds = [float(row["step_s"]) for row in rows if row["way"] == way]
        if seconds:
            made.append(
                Row(title, statistics.median(seconds), _on_cpu("smollm2", 8, 64, WHOLE_HEAD, "float32", clipped))
            )
    return Group(
        "`numerics.csv`: SmolLM2-135M, float32, Lomo; the tokens of a step are not known here either",
        made,
        tokens_known=False,
    )


def _tiny() -> Group:
    rows = [row for row in read("numerics.csv") if row["what"] == "rounding" and row["way"] == "float32"]
    seconds = statistics.median(float(row["step_s"]) for row in rows)
    made = [Row("0.1 M parameters, 8 x 32", seconds, _on_cpu("0.1M", 8, 32, "adalomo", "float32"))]
    first = _clipping().rows[0]
    return Group(
        "`numerics.csv`: a model that is far too small",
        made,
        (fit(first, memory_bandwidth()), "that of `clip_cost.csv`"),
    )


# Methods of cpu_peers.csv that the planner has a rule for, all of which recompute; the others are counted.
PEERS = {
    "lowtide-lomo": "lomo", "lowtide-adalomo": "adalomo", "lowtide-adamw": "adamw", "lowtide-nothing": "lomo", "adamw-bf16": "adamw",
    "adamw-bf16-fused": "adamw", "trainer-adamw": "adamw", "tutorial-adamw": "adamw", "sgd-bf16": "sgd", "tutorial-sgd": "sgd",
    "lomo-optim": WHOLE_HEAD, "lomo-optim-adalomo": "adalomo", "pytorch-optimizer-lomo": WHOLE_HEAD, "pytorch-optimizer-adalomo": "adalomo",
    "adamw-fp32": "adamw",
}  # fmt: skip


def peers(results: Path = RESULTS) -> Iterable[Group]:
    """A group for each machine, number of threads and dtype; the constant is fitted to the first model's first known method.

    The time of a step is the median over rounds.
    """
    by_machine: dict[tuple[str, str, str], dict[tuple[str, int, int, str], list[float]]] = {}
    for row in read("cpu_peers.csv", results):
        if row["status"] != "ok" or not row["step_s"] or row["method"] not in PEERS or row["model"] not in MODELS:
            continue
        dtype = "float32" if row["method"].endswith("fp32") else "bfloat16"
        machine = (row.get("device", ""), row.get("threads", ""), dtype)
        case = (row["model"], int(row["batch_size"]), int(row["seq_len"]), row["method"])
        by_machine.setdefault(machine, {}).setdefault(case, []).append(float(row["step_s"]))
    order: Callable[[tuple[str, int, int, str]], tuple[int, int, int, int]] = lambda case: (  # noqa: E731
        list(MODELS).index(case[0]), case[1], case[2], list(PEERS).index(case[3]),
    )  # fmt: skip
    for (device, threads, dtype), cases in by_machine.items():
        made = []
        for case in sorted(cases, key=order):
            model, batch, seq, method = case
            shape = _on_cpu(model, batch, seq, PEERS[method], dtype)
            title = f"{model}, {batch} x {seq}, {method}"
            made.append(Row(title, statistics.median(cases[case]), shape, updates=method != "lowtide-nothing"))
        # what most of the rows have is fitted to the step that nobody would call small
        made.sort(key=lambda row: row.shape.batch_size * row.shape.seq_len < 1024)
        yield Group(f"`cpu_peers.csv`: {device}, {threads} threads, {dtype}", made)


def measured_tables(found: Sequence[Group] | None = None) -> str:
    """A table of groups, of all unless they are given, and what was fitted."""
    memory = memory_bandwidth()
    rows: list[list[str]] = []
    errors: list[tuple[int | None, float]] = []  # tokens of a step, error
    fitted: list[float] = []
    for group in groups() if found is None else found:
        flops, source = group.flops or (fit(group.rows[0], memory), "fitted to the first row")
        fitted += [flops] if group.flops is None and group.tokens_known else []
        rows.append([f"**{group.title}**", "", "", f"{flops / 1e9:.0f} GFLOP/s, {source}"])
        for index, row in enumerate(group.rows):
            seconds = predict(row, flops, memory)
            is_fit = group.flops is None and index == 0
            rows.append(
                [row.case, number(row.seconds), number(seconds), "fitted" if is_fit else error(seconds, row.seconds)]
            )
            tokens = row.shape.batch_size * row.shape.seq_len
            if not is_fit:
                errors.append((tokens if group.tokens_known else None, seconds / row.seconds - 1))
    text = table(["case", "measured, s", "predicted, s", "error"], rows)
    if not errors:
        return text if rows else "No rows."
    many = sorted(abs(size) for tokens, size in errors if tokens is not None and tokens >= MANY_TOKENS)
    few = sorted(abs(size) for tokens, size in errors if tokens is not None and tokens < MANY_TOKENS)
    unknown = sorted(abs(size) for tokens, size in errors if tokens is None)
    within = sum(size <= 0.2 for size in many)
    words = f"Of {len(many)} rows with {MANY_TOKENS} tokens a step or more that nothing was fitted to, {within} are within 20 %"
    words += (
        f"; the median of the absolute errors is {statistics.median(many):.0%}, the largest {many[-1]:.0%}."
        if many
        else "."
    )
    if few:
        words += f" The {len(few)} rows with fewer tokens are off by {few[0]:.0%} to {few[-1]:.0%}."
    if unknown:
        words += f" The {len(unknown)} ratios where the tokens are not known are off by {unknown[0]:.0%} to {unknown[-1]:.0%}."
    return f"{text}\n\n{words} FLOP/s that were fitted with known tokens lie between {min(fitted) / 1e9:.0f} and {max(fitted) / 1e9:.0f} GFLOP/s. Memory: {memory / 1e9:.1f} GB/s, fitted to `update, nearest` of `clip_cost.csv`."


def few_tokens() -> str:
    """What the largest errors have in common, as far as one row shows it."""
    group = _from_disk()
    row = next(row for row in group.rows if "LLaMA 7B" in row.case and row.home == "device")
    memory = memory_bandwidth()
    missing = row.seconds - predict(row, fit(group.rows[0], memory), memory)
    tokens = row.shape.batch_size * row.shape.seq_len
    return (
        f"With LLaMA 7B in memory and {tokens} tokens a step, {missing:.0f} s are missing, {missing / row.shape.num_parameters * 1e9:.0f} ns "
        f"a parameter and step. {_scatter()}"
    )


def _scatter() -> str:
    """What other work on the machine does to a time."""
    rows = [row for row in read("bigger_than_memory.csv") if row["case"] == "tiny-disk"]
    tokens = [int(row["tokens"]) for row in rows]
    same = [float(row["step_s"]) for row in rows if int(row["tokens"]) == max(tokens)]
    fewer = [float(row["step_s"]) for row in rows if int(row["tokens"]) < max(tokens)]
    return (
        f"Some rows were measured beside other work: the same case of {max(tokens)} tokens from disk took {min(same):.0f} to {max(same):.0f} s, "
        f"one of {min(tokens)} tokens {min(fewer):.0f} s."
    )


def memory_errors() -> str:
    """The planner's other half, which has a page of its own."""
    errors = [float(row["error"]) for row in read("plan_check.csv")]
    return (
        f"`plan_check.csv` has no times. Its {len(errors)} predictions of peak memory have a median absolute error of "
        f"{statistics.median(map(abs, errors)):.1%}, from {min(errors):+.1%} to {max(errors):+.1%} ([Planning](planning.md))."
    )
