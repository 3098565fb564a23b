"""The events of a run, in the order of its steps: what a report draws and counts.

Events may come from an older version, and from a file that was cut off: whatever is missing or of another type is None.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

Curve = tuple[list[float], list[float | None]]  # steps and values; None where a step has none

_WINDOW = 20  # steps that the smoothed loss averages over, at most
_MAX_POINTS = 1600  # of a curve; what has more is thinned out


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclasses.dataclass(frozen=True)
class MemoryOfStep:
    """Memory inside of one step, at moments; lists of one length.

    Attributes:
        step, num_tokens: which step, and how large it was.
        seconds: since it began.
        where: in the step, in words.
        total: bytes.
        by_kind: bytes that were counted, by the planner's name of the kind.
        most: the most of each kind, at any moment of the step.
    """

    step: int
    num_tokens: float | None
    seconds: list[float]
    where: list[str]
    total: list[float]
    by_kind: dict[str, list[float]]
    most: dict[str, float]

    @property
    def fullest(self) -> int:
        """Index of the moment with the most bytes."""
        return max(range(len(self.total)), key=self.total.__getitem__)


@dataclasses.dataclass(frozen=True)
class AnsweredSample:
    """A prompt of the held-out data, what the data says to it, and what the model did: (step, answer) in their order."""

    prompt: str
    expected: str
    answers: list[tuple[int, str]]


class History:
    """One run. Steps that a rollback has taken anew are there once, as they were taken last.

    Args:
        name: what the run is called in the report.
        settings: of config.yaml; those of the last ``config`` event stand in where there are none.
        events: in the order of the file.
        num_unreadable: lines of the file that are no event.

    Attributes:
        facts: the last ``config`` event.
        steps: ``train`` events in the order of their steps.
        evals: ``eval`` events, one for each step.
        parts: a list of events for each time that the run was begun or went on.
        end: the ``end`` event, if there is one of the last part.
        memory_of_step: of the step that was followed, if one was.
        samples: prompts with the answers to them.
        others: as above.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, Any] | None,
        events: Sequence[Mapping[str, Any]],
        num_unreadable: int = 0,
    ) -> None:
        self.name = name
        self.num_unreadable = num_unreadable
        self._curves: dict[tuple[str, str], Curve] = {}
        self.parts = _parts([event for event in events if number(event.get("step")) is not None])
        self.facts: Mapping[str, Any] = next((event for event in reversed(events) if event["event"] == "config"), {})
        recorded = self.facts.get("config")
        self.settings: Mapping[str, Any] = settings or (recorded if isinstance(recorded, dict) else {})
        every = [event for part in self.parts for event in part]
        taken = [event for event in every if event["event"] == "train"]
        self.steps = _by_step(taken)
        self.num_taken_anew = len(taken) - len(self.steps)
        self.evals = _by_step([event for event in every if event["event"] == "eval"])
        last = self.parts[-1] if self.parts else []
        self.end = next((event for event in reversed(last) if event["event"] == "end"), None)
        self.memory_of_step = next((found for event in reversed(every) if (found := _memory_of_step(event))), None)
        self.samples = _samples([event for event in every if event["event"] == "samples"])
        self.skipped = [event for event in taken if event.get("skipped") is True or event.get("partial") is True]
        self.failed_saves = [event for event in every if event["event"] == "checkpoint" and "error" in event]

    @property
    def state(self) -> str:
        """How the run stands: finished, interrupted, open (no end is recorded), or empty (no step is)."""
        if self.end is not None:
            return "interrupted" if self.end.get("interrupted") is True else "finished"
        return "open" if self.steps or self.evals else "empty"

    @property
    def num_steps(self) -> int:
        """Steps taken so far."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    def curve(self, name: str, kind: str = "train") -> Curve:
        """A value of every step, or of every evaluation."""
        if (name, kind) not in self._curves:
            events = self.steps if kind == "train" else self.evals
            steps = [float(event["step"]) for event in events]
            self._curves[name, kind] = steps, [number(event.get(name)) for event in events]
        return self._curves[name, kind]

    def has(self, name: str, kind: str = "train") -> bool:
        """Some step (or evaluation) has such a value."""
        return any(value is not None for value in self.curve(name, kind)[1])

    def values(self, name: str, kind: str = "train") -> list[float]:
        """The values that are there."""
        return [value for value in self.curve(name, kind)[1] if value is not None]

    def smooth_loss(self) -> Curve:
        """The mean of the training loss over the last steps: a tenth of the run, 20 steps at most. Null losses do not count."""
        return self._smooth_loss

    @cached_property
    def _smooth_loss(self) -> Curve:
        steps, values = self.curve("loss")
        return steps, running_means(values, max(1, min(_WINDOW, len(values) // 10)))

    @property
    def clip_limit(self) -> float | None:
        """The largest norm of the gradient that the settings allow, as far as it is known."""
        return number(self.facts.get("clip_grad_norm", self.settings.get("clip_grad_norm"))) or None

    def clipped(self) -> list[Mapping[str, Any]]:
        """Steps whose gradient was longer than that."""
        limit = self.clip_limit
        if limit is None:
            return []
        return [event for event in self.steps if (number(event.get("grad_norm")) or 0.0) > limit]

    @property
    def seconds(self) -> float | None:
        """Of the run so far, all of its parts."""
        times = [number(event.get("time")) for event in (self.parts[-1] if self.parts else [])]
        known = [time for time in times if time is not None]
        return max(known) if known else None

    @cached_property
    def peak_bytes(self) -> float | None:
        """The most memory measured; of older runs without an end the most between two steps."""
        ends = (event for part in self.parts for event in part if event["event"] == "end")
        known = [value for event in ends if (value := number(event.get("peak_memory_bytes")))]
        known += self.values("peak_memory_bytes") + self.values("memory_bytes") + self.values("memory_bytes", "eval")
        return max(known) if known else None

    @property
    def predicted(self) -> dict[str, float]:
        """The planner's bytes by kind; empty where they were not recorded."""
        found = self.facts.get("predicted_memory")
        if not isinstance(found, dict):
            return {}
        return {str(kind): value for kind, raw in found.items() if (value := number(raw)) is not None and value >= 0}

    @property
    def program_bytes(self) -> float:
        """What the process held besides weights before the first step."""
        return number(self.facts.get("program_bytes")) or 0.0


def _memory_of_step(event: Mapping[str, Any]) -> MemoryOfStep | None:
    kinds, where = event.get("bytes"), event.get("where")
    if event["event"] != "memory" or not isinstance(kinds, dict) or not isinstance(where, list) or not where:
        return None
    columns = [_numbers(values) for values in (event.get("seconds"), event.get("total_bytes"), *kinds.values())]
    if any(column is None or len(column) != len(where) for column in columns):
        return None
    seconds, total, *counted = [column for column in columns if column is not None]
    by_kind = dict(zip(map(str, kinds), counted, strict=True))
    told = event.get("most_bytes")
    at_any_moment = told if isinstance(told, dict) else {}
    return MemoryOfStep(
        step=int(event["step"]),
        num_tokens=number(event.get("num_tokens")),
        seconds=seconds,
        where=[str(each) for each in where],
        total=total,
        by_kind=by_kind,
        most={kind: max(number(at_any_moment.get(kind)) or 0.0, *values) for kind, values in by_kind.items()},
    )


def _numbers(values: Any) -> list[float] | None:
    if not isinstance(values, list):
        return None
    found = [value for raw in values if (value := number(raw)) is not None]
    return found if len(found) == len(values) else None


def _samples(events: Sequence[Mapping[str, Any]]) -> list[AnsweredSample]:
    """By prompt; of several answers the first and the last."""
    found: dict[tuple[str, str], dict[int, str]] = {}
    for event in events:
        listed = event.get("samples")
        for each in listed if isinstance(listed, list) else []:
            texts = [each.get(name) for name in ("prompt", "expected", "answer")] if isinstance(each, dict) else []
            if texts and all(isinstance(text, str) for text in texts):
                found.setdefault((str(texts[0]), str(texts[1])), {})[int(event["step"])] = str(texts[2])
    samples = []
    for (prompt, expected), answers in found.items():
        steps = sorted(answers)
        samples.append(
            AnsweredSample(prompt, expected, [(step, answers[step]) for step in {steps[0]: 0, steps[-1]: 0}])
        )
    return samples


def running_means(values: Sequence[float | None], window: int) -> list[float | None]:
    """Mean of each value and those before it, at most ``window`` of them; None where there is none."""
    means: list[float | None] = []
    for end in range(1, len(values) + 1):
        some = [value for value in values[max(0, end - window) : end] if value is not None]
        means.append(sum(some) / len(some) if some else None)
    return means


def thin(curve: Curve, most: int = _MAX_POINTS) -> Curve:
    """The same in at most so many points: of every stretch the lowest and the highest, so that no spike is lost."""
    steps, values = curve
    if len(steps) <= most:
        return curve
    kept: set[int] = {0, len(steps) - 1}
    num_stretches = max(1, (most - 2) // 2)
    for part in range(num_stretches):
        first, behind = part * len(steps) // num_stretches, (part + 1) * len(steps) // num_stretches
        there = [index for index in range(first, behind) if values[index] is not None] or [first]
        kept |= {min(there, key=lambda i: values[i] or 0.0), max(there, key=lambda i: values[i] or 0.0)}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def _parts(events: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    parts: list[list[Mapping[str, Any]]] = []
    for event in events:
        if event["event"] == "config" or not parts:
            parts.append([])
        parts[-1].append(event)
    return parts


def _by_step(events: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    last = {event["step"]: event for event in events}
    return [last[step] for step in sorted(last)]
