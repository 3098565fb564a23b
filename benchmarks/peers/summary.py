"""Medians over the rounds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .methods import METHODS
from .rows import SETTINGS
from .shapes import GROWTH

Row = dict[str, str]
BASE = "lowtide-lomo"  # step times are given as ratios to its
GROUP = tuple(name for name in SETTINGS if name != "method")


@dataclass(frozen=True)
class Result:
    """One method in one group.

    Attributes:
        ratios: of the step to lowtide Lomo's, one for every round that both have.
    """

    method: str
    rounds: int
    peak_bytes: float
    above_bytes: float
    parameters: int
    step_s: float
    tokens_per_s: float
    ratios: tuple[float, ...]

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def weights(self) -> float:
        """Memory above the imports, in units of the weights in bfloat16."""
        return self.above_bytes / (2 * self.parameters)


def groups(rows: Iterable[Row]) -> dict[tuple[str, ...], list[Row]]:
    """Rows that may be compared with each other, by what they have in common (``GROUP``)."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in GROUP), []).append(row)
    return found


def is_only_growth(rows: Iterable[Row]) -> bool:
    """They are those of a growth and of its few methods, and no comparison of all."""
    cases = {case for each in GROWTH.values() for case in each}
    return all(
        METHODS[row["method"]].growth and (row["model"], int(row["batch_size"]), int(row["seq_len"])) in cases
        for row in rows
    )


def seconds(row: Row) -> float:
    """Of a step; where there was one step only, its."""
    return float(row["step_s"] or row["first_step_s"])


def results(rows: list[Row]) -> tuple[list[Result], dict[str, str]]:
    """What was measured in one group, in the order of ``METHODS``, and what could not be, with its reason."""
    base = {row["round"]: seconds(row) for row in rows if row["method"] == BASE and row["status"] == "ok"}
    found, failed = [], {}
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        good = [row for row in own if row["status"] == "ok"]
        if own and not good:
            failed[method] = own[-1]["status"]
        if good:
            found.append(
                Result(
                    method,
                    len(good),
                    statistics.median(int(row["peak_bytes"]) for row in good),
                    statistics.median(int(row["peak_bytes"]) - int(row["baseline_bytes"]) for row in good),
                    int(good[-1]["num_parameters"]),
                    statistics.median(seconds(row) for row in good),
                    statistics.median(float(row["tokens_per_s"]) for row in good),
                    tuple(seconds(row) / base[row["round"]] for row in good if row["round"] in base),
                )
            )
    return found, failed


@dataclass(frozen=True)
class InTurn:
    """One method among those that took their steps in turn.

    Attributes:
        rounds: processes that it had.
        seconds: of its steps, the median.
        user_s: of the process and a step, all threads, the median.
        system_s: likewise, in the kernel.
        minor_faults: likewise, pages that it was given.
        ratios: step time of ``BASE`` over its, one for every turn that both have.
        by_round: the medians of these, one for every round.
    """

    method: str
    rounds: int
    seconds: float
    user_s: float
    system_s: float
    minor_faults: float
    ratios: tuple[float, ...]
    by_round: tuple[float, ...]


def in_turn(rows: list[Row]) -> list[InTurn]:
    """Of steps_in_turn.py's rows of one model on one machine, in the order of ``METHODS``."""
    base = {(row["round"], row["turn"]): float(row["seconds"]) for row in rows if row["method"] == BASE}
    found = []
    for method in METHODS:
        own = [row for row in rows if row["method"] == method]
        if not own:
            continue
        ratios: dict[str, list[float]] = {}
        for row in own:
            if (turn := (row["round"], row["turn"])) in base:
                ratios.setdefault(row["round"], []).append(base[turn] / float(row["seconds"]))
        medians = [statistics.median(float(row[name]) for row in own) for name in ("seconds", "user_s", "system_s", "minor_faults")]  # fmt: skip
        found.append(
            InTurn(
                method,
                len({row["round"] for row in own}),
                *medians,
                tuple(ratio for each in ratios.values() for ratio in each),
                tuple(statistics.median(each) for each in ratios.values()),
            )
        )
    return found


@dataclass(frozen=True)
class UpdateCost:
    """What norm and update add to a step, from rows of update_cost.py.

    Attributes:
        ratios: step with updates over the one of the same pair without.
        shares: norm and update, timed inside of the step, over the step without.
        more_faults: pages that the step with updates was given beyond those of the other, the median.
        processes: that the pairs come from.
    """

    ratios: tuple[float, ...]
    shares: tuple[float, ...]
    more_faults: float
    processes: int


def update_cost(rows: list[Row]) -> UpdateCost:
    """Of the rows of one model, method, machine and commit."""
    without = [float(row["nothing_s"]) for row in rows]
    return UpdateCost(
        tuple(float(row["updated_s"]) / seconds for row, seconds in zip(rows, without, strict=True)),
        tuple(float(row["norm_and_update_s"]) / seconds for row, seconds in zip(rows, without, strict=True)),
        statistics.median(int(row["updated_faults"]) - int(row["nothing_faults"]) for row in rows),
        len({(row["date"], row["process"]) for row in rows}),
    )
