import math

import pytest

from lowtide.planning import KINDS
from lowtide.reporting.history import History, number, running_means, thin
from lowtide.reporting.memory_chart import (
    ELSEWHERE,
    GROUPS,
    MEASURED,
    OTHER,
    PROGRAM,
    REST,
    by_group,
    measured_by_group,
    moments_by_group,
)
from run_events import config_event, end_event, eval_event, memory_event, samples_event, train_event, whole_run


def of(*events, **options):
    return History("run", None, events, **options)


def test_a_finished_run():
    run = of(*whole_run())
    assert run.state == "finished" and run.num_steps == 10 and run.seconds == 10.0
    assert run.settings["optimizer"] == "lomo"
    assert run.curve("loss")[1] == [3.0 / step for step in range(1, 11)]
    assert [event["step"] for event in run.clipped()] == [1]  # 2.0 is above 1, 2.0 / 2 is not
    assert run.peak_bytes == 2**30


def test_a_part_that_went_on_has_no_end_of_its_own():
    interrupted = end_event(2, interrupted=True)
    first = [config_event(), train_event(1), train_event(2), interrupted]
    assert of(*first).state == "interrupted"
    again = [config_event(2), {"event": "resume", "step": 2, "time": 2.0, "checkpoint": "c"}, train_event(3)]
    run = of(*first, *again)
    assert run.state == "open" and len(run.parts) == 2 and run.num_steps == 3


def test_steps_that_a_rollback_took_anew_are_there_once():
    bad = [train_event(step, loss=None, skipped=True) for step in (2, 3)]
    run = of(config_event(), train_event(1), *bad, config_event(1), train_event(2), train_event(3))
    assert run.curve("loss") == ([1.0, 2.0, 3.0], [3.0, 1.5, 1.0])
    assert run.num_taken_anew == 2 and len(run.skipped) == 2


def test_nothing_at_all():
    run = of()
    assert run.state == "empty" and run.num_steps == 0 and run.peak_bytes is None and run.predicted == {}


@pytest.mark.parametrize("value", [None, "3", True, math.nan, math.inf, [1], {"a": 1}])
def test_what_is_no_number(value):
    assert number(value) is None


def test_null_losses_do_not_count_in_the_mean():
    assert running_means([None, 2.0, None, 4.0], 2) == [None, 2.0, 2.0, 4.0]


def test_thinning_keeps_ends_and_spikes():
    steps, values = [float(i) for i in range(10_000)], [1.0] * 10_000
    values[5_000], values[7_777] = 90.0, -5.0
    thinned_steps, thinned = thin((steps, values), 200)
    assert len(thinned) <= 202 and thinned_steps == sorted(thinned_steps)
    assert {90.0, -5.0} <= set(thinned) and thinned_steps[0] == 0 and thinned_steps[-1] == 9_999
    assert thin((steps[:50], values[:50]), 200) == (steps[:50], values[:50])


def test_every_kind_of_the_planner_has_its_group():
    named = {kind for kinds in GROUPS.values() for kind in kinds} | {OTHER}
    assert named == set(KINDS)


def test_groups_come_to_the_whole():
    run = of(config_event(predicted_memory=dict.fromkeys(KINDS, 10) | {"a later kind": 5}), eval_event(0))
    groups = by_group(run)
    assert groups.pop(PROGRAM) == 2**29
    assert sum(groups.values()) == 10 * len(KINDS) + 5 and groups[OTHER] == 15


def test_memory_of_a_step():
    run = of(config_event(), train_event(2), memory_event())
    found = run.memory_of_step
    assert found is not None and (found.step, found.num_tokens, found.fullest) == (2, 96, 2)
    assert found.most["gradients"] == 4096, "between two moments that were written down"
    groups = moments_by_group(run)
    assert groups[REST] == [0, 3000, 3000, 0] and groups["gradients"] == [0, 0, 4000, 0]
    assert groups["activations"] == [0, 2000, 2000, 0] and "optimizer state" not in groups
    assert [sum(column) for column in zip(*groups.values(), strict=True)] == found.total


def test_the_peak_is_that_moment_and_what_is_above_it():
    run = of(config_event(), train_event(2, peak_memory_bytes=2**30), memory_event())
    parts = measured_by_group(run)
    assert sum(parts.values()) == 2**30 and parts[ELSEWHERE] == 2**29 - 2**20 - 9000
    assert MEASURED not in parts and measured_by_group(of(config_event(), train_event(2)))[MEASURED] == 2**21
    assert measured_by_group(of(config_event())) == {}


def test_what_is_counted_is_never_more_than_what_is_resident():
    """Pages of a mapped file count as weights before they are read."""
    event = memory_event(bytes={"weights": [2**40] * 4, "gradients": [5] * 4})
    groups = moments_by_group(of(config_event(program_bytes=2**28), event))
    assert [sum(column) for column in zip(*groups.values(), strict=True)] == event["total_bytes"]
    assert "gradients" not in groups and REST not in groups


def test_the_last_time_that_a_step_was_followed_counts():
    run = of(config_event(), memory_event(num_tokens=1), config_event(1), memory_event(num_tokens=2))
    assert run.memory_of_step.num_tokens == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"where": []},
        {"where": "forward"},
        {"bytes": None},
        {"bytes": {"weights": [1, 2]}},
        {"bytes": {"weights": [1, 2, None, 4]}},
        {"seconds": None},
        {"seconds": [0, 1, 2]},
        {"total_bytes": [1, 2, "3", 4]},
    ],
)
def test_a_broken_memory_event_is_none(changes):
    run = of(config_event(), memory_event(**changes))
    assert run.memory_of_step is None and moments_by_group(run) == {}


def test_a_memory_event_without_what_an_older_version_did_not_write():
    event = memory_event(num_tokens=None)
    del event["most_bytes"]
    found = of(config_event(), event).memory_of_step
    assert found.num_tokens is None and found.most["gradients"] == 4000


def test_samples_are_the_first_and_the_last_answer():
    run = of(config_event(), samples_event(0, "x", "y"), samples_event(5, "", "m"), samples_event(9, "aa", "z"))
    first, second = run.samples
    assert (first.prompt, first.expected, first.answers) == ("say a:", " aa", [(0, "x"), (9, "aa")])
    assert second.answers == [(0, "y"), (9, "z")]


def test_one_answer_is_one():
    assert of(config_event(), samples_event(0, "x")).samples[0].answers == [(0, "x")]


@pytest.mark.parametrize("samples", [None, "text", [None], [{}], [{"prompt": "a", "expected": "b", "answer": 3}]])
def test_broken_samples_are_left_out(samples):
    assert of(config_event(), samples_event(0, samples=samples)).samples == []
