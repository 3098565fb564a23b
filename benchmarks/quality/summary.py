"""The results of run.py and cost.py as a table and a picture."""

from __future__ import annotations

import argparse
import dataclasses
import statistics
from collections.abc import Iterator
from pathlib import Path

from cost import CHECKPOINTED, costs_of
from run import GRID, TASKS, best_rate, rows_of

LEARNT_ERRORS = 2.0  # standard errors by which a task is learnt: above the most frequent answer and the untrained model


@dataclasses.dataclass(frozen=True)
class Result:
    """One method on one task.

    Attributes:
        lr: the best rate.
        scores: test accuracy of every seed, in percent.
        majority: accuracy of the most frequent answer, in percent.
        num_test: questions.
        peak: bytes above the baseline, or None.
        step_s: seconds a step, or None.
    """

    task: str
    method: str
    lr: float
    scores: list[float]
    majority: float
    num_test: int
    peak: float | None
    step_s: float | None

    @property
    def mean(self) -> float:
        return statistics.mean(self.scores)

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def results(options: argparse.Namespace) -> Iterator[Result]:
    """All that have a row, task by task."""
    for task in TASKS:
        costs = costs_of(task, options.batch_size)
        for method in GRID:
            if not rows_of(options, task, method):
                continue
            best = best_rate(task, method, None, options)
            rows = [row for row in rows_of(options, task, method) if float(row["lr"]) == best]
            scores = [100 * float(row["test_accuracy"]) for row in rows]
            peak, seconds = costs.get(method, (None, None))
            if peak is None and method != "zero-shot":  # of the run itself: other work beside it hardly changes a peak
                peak = float(max(int(row["peak_bytes"]) - int(row["baseline_bytes"]) for row in rows))
            majority, number = 100 * float(rows[0]["majority"]), int(rows[0]["num_test"])
            yield Result(task, method, best, scores, majority, number, peak, seconds)


def learnt_by(found: list[Result], task: str) -> list[str]:
    """The methods that, in the mean over several seeds, are better than always the most frequent answer, and than the model was before."""
    before = next((each.mean for each in found if (each.task, each.method) == (task, "zero-shot")), 0.0)
    methods = []
    for each in (each for each in found if each.task == task and each.spread is not None):
        share = each.mean / 100
        error = 100 * (share * (1 - share) / each.num_test) ** 0.5
        if each.mean > max(each.majority, before) + LEARNT_ERRORS * error:
            methods.append(each.method)
    return methods


def table(options: argparse.Namespace) -> str:
    """Mean and standard deviation over seeds, Markdown."""
    found = list(results(options))
    lines = [
        "| task | method | rate | accuracy, % | seeds | most frequent answer | memory, GB | of AdamW's | s a step |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        adamw = next((r.peak for r in found if (r.task, r.method) == (each.task, "adamw")), None)
        spread = "" if each.spread is None else f" ± {each.spread:.1f}"
        memory = "" if each.peak is None else f"{each.peak / 1e9:.2f}"
        share = "" if each.peak is None or adamw is None else f"{each.peak / adamw:.0%}"
        seconds = "" if each.step_s is None else f"{each.step_s:.2f}"
        lines.append(
            f"| {each.task} | {each.method} | {each.lr:g} | {each.mean:.1f}{spread} | {len(each.scores)} | {each.majority:.1f} | {memory} | "
            f"{share} | {seconds} |"
        )
    for task in dict.fromkeys(each.task for each in found):
        costs = costs_of(task, options.batch_size)
        if {CHECKPOINTED, "adamw"} <= costs.keys():
            peak, seconds = costs[CHECKPOINTED]
            lines.append(
                f"| {task} | {CHECKPOINTED} | | | | | {peak / 1e9:.2f} | {peak / costs['adamw'][0]:.0%} | {seconds:.2f} |"
            )
    tasks = dict.fromkeys(each.task for each in found if each.method == "adamw")
    by = {task: learnt_by(found, task) for task in tasks}
    lines += ["", *(f"- {task}: learnt by {', '.join(by[task]) or 'none'}" for task in tasks)]
    both = [task for task in tasks if compared(found, task)]
    learnt = [task for task in both if by[task]]
    lines += averages(found, learnt)
    if both != learnt:
        lines += averages(found, both)
    return "\n".join(lines)


def compared(found: list[Result], task: str) -> bool:
    """Whether AdamW has several seeds there, and another method, too; a first look has one."""
    methods = {each.method for each in found if each.task == task and each.spread is not None}
    return "adamw" in methods and len(methods) > 1


def averages(found: list[Result], tasks: list[str]) -> list[str]:
    """Methods with several seeds on every one of these tasks, over them; the deviation is that of the average."""
    lines = []
    for method in GRID:
        own = [each for each in found if each.method == method and each.task in tasks and each.spread is not None]
        if len(own) == len(tasks) > 1:
            mean = statistics.mean(each.mean for each in own)
            deviation = sum((each.spread or 0.0) ** 2 for each in own) ** 0.5 / len(own)
            lines.append(f"{method} {mean:.1f} ± {deviation:.1f}")
    return ["", f"Average over {' and '.join(tasks)}: {', '.join(lines)}."] if lines else []


def plot(options: argparse.Namespace, path: Path) -> None:
    """Accuracy over memory, a panel for each task with more than one seed."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    found = [each for each in results(options) if each.spread is not None and each.peak is not None]
    tasks = list(dict.fromkeys(each.task for each in found))
    if not tasks:
        raise SystemExit("no task has several seeds and a measured cost yet: nothing to draw")
    figure = Figure(figsize=(6.4 * len(tasks), 4.2), layout="constrained")
    FigureCanvasSVG(figure)
    for number, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(1, len(tasks), number)
        for each in (each for each in found if each.task == task):
            adamw = each.method == "adamw"
            colour = (
                "black"
                if adamw
                else "tab:orange"
                if "lora" in each.method
                else "tab:blue"
                if "lomo" in each.method
                else "grey"
            )
            axes.errorbar(each.peak / 1e9, each.mean, each.spread, fmt="s" if adamw else "o", color=colour, capsize=3)
            axes.annotate(
                each.method, (each.peak / 1e9, each.mean), xytext=(6, 5), textcoords="offset points", fontsize=9
            )
        axes.set_xlim(0, 1.15 * max(each.peak for each in found if each.task == task) / 1e9)
        axes.set_title(
            f"{task}: mean and standard deviation of {max(len(e.scores) for e in found if e.task == task)} seeds",
            fontsize=10,
        )
        axes.set_xlabel("peak memory above that of the imports, GB")
        axes.set_ylabel("test accuracy, %")
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
