"""The page: tables, pictures, and what was not measured. Every number in it is computed from the rows."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable
from pathlib import Path

from . import abilities, plots
from .methods import METHODS
from .shapes import GROWTH, SHAPES
from .summary import BASE, GROUP, InTurn, Result, Row, groups, in_turn, is_only_growth, results, update_cost

HEAD = """# Benchmarks on a CPU

This page is made by `benchmarks/cpu_peers_page.py` from `benchmarks/results/cpu_peers.csv`, and those rows by `benchmarks/cpu_peers.py`, one command that anybody can
run again (`benchmarks/README.md`). Every run is a fresh process; rounds are interleaved, and the figures are medians over the rounds.

**The same for all**: a Llama shape with random weights, the same random tokens, bfloat16 weights unless the name says float32, no clipping, activations recomputed a
decoder layer at a time (lowtide's blocks; transformers' gradient checkpointing for the others). **Not the same**: lowtide computes the loss in slices of the vocabulary
and its own way, where the others use transformers' loss with all logits; this is part of what is compared. lowtide's optimizers compute an update in float32 and round it stochastically into the bfloat16 weight, and PerParameter(AdamW) keeps float32 states;
torch's AdamW and SGD compute and keep everything in bfloat16. Adafactor is that of transformers, with float32 states.

**Columns.** *Peak*: largest resident set of the process. *Above imports*: less what the process held with everything imported, before the model existed. *Of the weights*:
that divided by two bytes a parameter, which are the weights in bfloat16; for float32, too. *Step*: median of the steps after the first. *Of Lomo's*: step time divided by that of lowtide
Lomo in the same round; median, lowest and highest. *Trains*: which parameters a step updates.

**Nothing updated.** Two passes that drop every gradient as soon as it is there: lowtide's own, in which all is the same as with Lomo but norm and update, and torch's, with transformers' checkpointing and a hook that drops it, which is
what a loop without lowtide has before any optimizer.

**Single methods.** BAdam trains the block in the middle, and its backward pass ends there, so it stands for the mean of its blocks. GaLore makes its projections anew every 200
steps; here that is the first step alone, which the median leaves out. The Trainer's steps are timed between its callbacks, without fetching the batch. Code of libraries that is read
when it first runs counts as "above imports", for all alike.

Rates of learning and quality are not measured here: the methods differ in what they learn in a step (`quality.md`)."""
TRAINS = {"ours": "all", "full": "all", "part": "a part", "nothing": "nothing"}
GROWN = {
    "parameters": "With the number of parameters (1 sequence of 64 tokens)",
    "tokens": "With tokens a step (SmolLM2-135M's shape, sequences of 128)",
    "tensors": "With the number of tensors (about 0.1 B parameters in more and more layers, 4 x 64 tokens)",
}


IN_TURN = """The processes of one model are alive side by side, and one at a time takes a step (`benchmarks/steps_in_turn.py`): the clock of a machine moves by more than a few percent
between one process and the next, and less from step to step. *Lomo's of it*: the step time of lowtide Lomo divided by that of the method in the same turn; the median over all turns, and the lowest and
highest median of a round, whose processes are fresh. *User* and *system*: seconds of all threads in a step. All other columns are medians, too.
On a virtual machine the same program may run a third slower in one process than in another, by where its memory lies (`docs/LOG.md`), so a single round says nothing about differences of a few percent;
what an update adds is told by pairs in one process, too, below. Shown is the code that was measured last on each machine; `benchmarks/results/steps_in_turn.csv` has the rows of older code, too, which `docs/LOG.md` speaks of.
From d71bd9f on lowtide's weights are in huge pages; those of the others would be with `THP_MEM_ALLOC_ENABLE=1`."""


UPDATES = """Steps that update and steps that drop every gradient, in turn in one process (`benchmarks/update_cost.py`); the ratio is that of two steps one after the other. *Norm and update*: timed
inside of the step, without the slices of the vocabulary matrix, and from 59bb27c on without what is applied while it is made (AMX). What else there is in the ratio is not explained but for page faults.
All are medians of pairs, with the lowest and the highest."""


def write(rows: list[Row], page: Path, images: Path, turns: list[Row], updates: list[Row]) -> None:
    """The page and its pictures.

    Args:
        rows: of the CSV file.
        turns: of that of steps_in_turn.py.
        page: the Markdown file.
        images: the folder of the pictures.
        updates: the rows of update_cost.py.
    """
    rows = [row for row in rows if row["model"] in SHAPES and row["model"] != "tiny" and row["method"] in METHODS]
    images.mkdir(parents=True, exist_ok=True)
    link = Path(os.path.relpath(images, page.parent)).as_posix()
    parts, names = [HEAD], set()
    for key, own in groups(rows).items():
        if is_only_growth(own):
            continue
        name = f"benchmarks-{own[0]['model']}"
        while name in names:
            name += "-more"
        names.add(name)
        parts.append(section(dict(zip(GROUP, key, strict=True)), own, images / f"{name}.svg", f"{link}/{name}.svg"))
    if not names:
        parts.append("No comparison of all methods has been run yet.")
    parts += [steps_in_turn(turns), update_costs(updates)]
    parts.append(growth(rows, images / "benchmarks-growth.svg", f"{link}/benchmarks-growth.svg"))
    parts.append("## What each can do\n\nRead, not measured; the last column says where.\n\n" + abilities.table())
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def section(group: dict[str, str], rows: list[Row], picture: Path, link: str) -> str:
    """One model on one machine."""
    found, failed = results(rows)
    title = f"## {group['model']}, {group['batch_size']} x {group['seq_len']} tokens, {group['device'].split(',')[0]}"
    parts = [title, where(group, rows)]
    if found:
        parts += [table(found), "\n".join(f"- {line}" for line in says(found))]
        if len(found) > 1:
            plots.memory_time(found, group["model"], picture)
            parts.append(f"![Peak memory above imports over step time]({link})")
    if failed:
        lines = [f"- {METHODS[method].title}: `{status}`" for method, status in failed.items()]
        parts.append("**Could not do it**:\n\n" + "\n".join(lines))
    missing = [METHODS[name].title for name in METHODS if name not in failed and name not in {r.method for r in found}]
    if missing:
        parts.append(f"**Not measured**: {'; '.join(missing)}.")
    return "\n\n".join(parts)


def where(group: dict[str, str], rows: Iterable[Row]) -> str:
    """The machine, the versions and the code."""
    rows = list(rows)
    peers = sorted({row["peer"] for row in rows if row["peer"]})
    number = next((f"{int(row['num_parameters']):,} parameters" for row in rows if row["num_parameters"]), "")
    versions = [f"torch {each}" for each in sorted({row["torch"] for row in rows})]
    versions += [f"transformers {each}" for each in sorted({row["transformers"] for row in rows})]
    dates, commits = sorted({row["date"] for row in rows}), list(dict.fromkeys(row["commit"] for row in rows))
    shown = [number, group["device"], f"{group['threads']} threads", f"{group['steps']} steps a run", *versions, *peers]
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return "; ".join(filter(None, shown)) + f". Measured {when}, lowtide at {', '.join(commits)}."


def measured(group: dict[str, str], rows: list[Row]) -> str:
    """The same where every row is of one commit and of no package but lowtide."""
    versions = f"torch {rows[0]['torch']}; transformers {rows[0]['transformers']}"
    return f"{group['device']}; {group['threads']} threads; {versions}. Measured {rows[0]['date']}, lowtide at {group['commit']}."


def table(found: Iterable[Result]) -> str:
    head = ("method", "trains", "peak, GB", "above imports, GB", "of the weights", "step, s", "of Lomo's", "tokens/s", "rounds")  # fmt: skip
    lines = [head, ("---",) * len(head)]
    for each in found:
        ratio = "" if each.ratio is None else f"{each.ratio:.2f} ({min(each.ratios):.2f} to {max(each.ratios):.2f})"
        method = METHODS[each.method]
        lines.append(
            (
                f"**{method.title}**" if method.kind == "ours" else method.title, TRAINS[method.kind], f"{each.peak_bytes / 1e9:.2f}",
                f"{each.above_bytes / 1e9:.2f}", f"{each.weights:.2f}", f"{each.step_s:.3g}", ratio, f"{each.tokens_per_s:.0f}", str(each.rounds),
            )
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def says(found: Iterable[Result]) -> list[str]:
    """Sentences that follow from the table, whichever way it went."""
    by = {each.method: each for each in found}
    lines: list[str] = []
    ours = by.get(BASE)
    if ours is None:
        return lines
    lines.append(
        f"lowtide Lomo takes {ours.weights:.2f} times the weights above its imports, and {ours.peak_bytes / (2 * ours.parameters):.2f} times in all."
    )
    for other in ("lowtide-nothing", "torch-nothing", "lomo-optim"):
        if other in by and by[other].ratio:
            ratios = sorted(1 / ratio for ratio in by[other].ratios)
            middle = statistics.median(ratios)
            lines.append(
                f"Its step takes {middle:.3f} of that of {METHODS[other].title} ({ratios[0]:.3f} to {ratios[-1]:.3f} in {len(ratios)} rounds)."
            )
    full = [each for each in by.values() if METHODS[each.method].kind == "full" and each.ratio]
    if full:
        fast, small = min(full, key=lambda each: each.ratio or 0), min(full, key=lambda each: each.above_bytes)
        lines.append(
            f"Of the others that train all parameters, {METHODS[fast.method].title} has the shortest step, {fast.ratio:.2f} of lowtide Lomo's, and "
            f"{METHODS[small.method].title} takes the least memory, {small.weights:.2f} times the weights."
        )
    few = min(each.rounds for each in by.values())
    if few < 5:
        lines.append(f"Some have only {few} round{'s' if few > 1 else ''}: too few to tell small differences.")
    return lines


def steps_in_turn(rows: list[Row]) -> str:
    """Small differences between step times, of the code that was measured last on each machine."""
    rows = [row for row in rows if row["model"] in SHAPES and row["model"] != "tiny" and row["method"] in METHODS]
    parts = ["## Steps in turn"]
    names = ("device", "threads", "model", "batch_size", "seq_len")
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    for key, own in found.items():
        newest = [row for row in own if row["commit"] == own[-1]["commit"]]
        group = {**dict(zip(names, key, strict=True)), "commit": newest[-1]["commit"]}
        title = f"### {group['model']}, {group['batch_size']} x {group['seq_len']} tokens"
        parts += [title, measured(group, newest), turn_table(in_turn(newest))]
    if not found:
        parts.append("Not measured.")
    else:
        parts.insert(1, IN_TURN)
    return "\n\n".join(parts)


def update_costs(rows: list[Row]) -> str:
    """What the fused update adds to a step."""
    parts = ["## What the update costs"]
    names = ("device", "threads", "model", "batch_size", "seq_len", "commit", "method")
    kinds = {tuple(row[name] for name in names): None for row in rows if row["model"] != "tiny"}
    if not kinds:
        return f"{parts[0]}\n\nNot measured."
    lines = [["machine", "lowtide at", "model", "tokens", "rule", "step with updates", "norm and update alone", "page faults more", "pairs", "processes"]]  # fmt: skip
    lines.append(["---"] * len(lines[0]))
    notes = []
    for kind in kinds:
        own = [row for row in rows if tuple(row[name] for name in names) == kind]
        found, group = update_cost(own), dict(zip(names, kind, strict=True))
        spread = f"{statistics.median(found.ratios):.3f} ({min(found.ratios):.3f} to {max(found.ratios):.3f})"
        shares = f"{statistics.median(found.shares):.1%} ({min(found.shares):.1%} to {max(found.shares):.1%})"
        tokens = f"{group['batch_size']} x {group['seq_len']}"
        lines.append([group["device"], f"{group['commit']}, {own[-1]['date']}", group["model"], tokens, group["method"], spread, shares, f"{found.more_faults:,.0f}", str(len(own)), str(found.processes)])  # fmt: skip
        notes.append(f"{group['threads']} threads; torch {own[-1]['torch']}; transformers {own[-1]['transformers']}.")
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([*parts, UPDATES, table, *dict.fromkeys(notes)])


def turn_table(found: Iterable[InTurn]) -> str:
    head = ("method", "step, s", "Lomo's of it", "user, s", "system, s", "page faults", "steps", "rounds")
    lines = [head, ("---",) * len(head)]
    for each in found:
        ratio = ""
        if each.ratios:
            ratio = f"{statistics.median(each.ratios):.3f} ({min(each.by_round):.3f} to {max(each.by_round):.3f})"
        method = METHODS[each.method]
        lines.append(
            (
                f"**{method.title}**" if method.kind == "ours" else method.title, f"{each.seconds:.4g}", ratio, f"{each.user_s:.4g}", f"{each.system_s:.3g}",
                f"{each.minor_faults:,.0f}", str(len(each.ratios)), str(each.rounds),
            )
        )  # fmt: skip
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def growth(rows: list[Row], picture: Path, link: str) -> str:
    """How memory and time grow."""
    parts = [
        "## How they grow",
        "Times of one size belong together. Sizes were measured up to a day apart, on machines whose speed changes by factors, so how times grow is told only "
        "roughly; how memory grows does not depend on that.",
    ]
    drawn = {}
    for name, cases in GROWTH.items():
        own = [row for row in rows if (row["model"], int(row["batch_size"]), int(row["seq_len"])) in cases]
        own = [row for row in own if METHODS[row["method"]].growth]
        # One machine, the one with most rows: its curves are comparable.
        machines = [(row["device"], row["threads"]) for row in own]
        if not machines or len({row["model"] + row["batch_size"] for row in own}) < 2:
            parts.append(f"{GROWN[name]}: not measured.")
            continue
        machine = max(dict.fromkeys(machines), key=machines.count)
        own = [row for row in own if (row["device"], row["threads"]) == machine]
        drawn[name] = own
        parts.append(f"### {GROWN[name]}\n\n{machine[0]}, {machine[1]} threads.\n\n" + growth_table(name, own))
    if drawn:
        plots.growth(drawn, picture)
        parts.append(f"![How memory and step time grow]({link})")
    return "\n\n".join(parts)


def growth_table(name: str, rows: list[Row]) -> str:
    """A line for every method and size; a time in brackets is that of a first step, which also makes states and compiles."""
    head = ("method", plots.AXES[name], "above imports, GB", "of the weights", "step, s", "rounds")
    lines = [head, ("---",) * len(head)]
    failed = []
    for method in METHODS:
        for size in plots.sizes(name, rows):
            own = [row for row in rows if row["method"] == method and plots.size_of(name, row) == size]
            found, _ = results(own)
            for each in found:
                alone = any(not row["step_s"] for row in own)
                step = f"({each.step_s:.3g})" if alone else f"{each.step_s:.3g}"
                lines.append(
                    (METHODS[method].title, f"{size:.4g}", f"{each.above_bytes / 1e9:.2f}", f"{each.weights:.2f}", step, str(each.rounds))
                )  # fmt: skip
        failed += [
            f"- {METHODS[method].title}, {row['model']}: `{row['status']}`"
            for row in rows
            if row["method"] == method and row["status"] != "ok"
        ]
    text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    if any("(" in line[4] for line in lines[2:]):
        text += "\n\nA time in brackets is that of a run's first step, which also makes the optimizer's states."
    return text + ("\n\n**Could not do it**:\n\n" + "\n".join(dict.fromkeys(failed)) if failed else "")
