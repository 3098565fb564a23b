"""The runner of the GPU suite: whatever becomes of a part is reported, and the rest still runs."""

import csv

import made_up_parts
import pytest
from suite import runner
from suite.context import FIELDS
from suite.runner import END, Part, Results, run_parts
from suite.table import markdown, one_line

COMMON = {"device": "a card", "commit": "abc", "torch": "2.13.0"}


def part(name, seconds=60.0, **needs):
    return Part(name, name, getattr(made_up_parts, name), seconds, **needs)


@pytest.fixture
def run(tmp_path):
    def go(*parts, common=COMMON, **options):
        results, shown = Results(tmp_path / "results.csv", common), []
        arguments = {"rehearse": True, "minutes": 5.0, "preload": ("torch",), **options}
        good = run_parts(list(parts), results, directory=tmp_path, output=tmp_path, show=shown.append, **arguments)
        return good, results, shown

    return go


def ends(shown):
    return {row["part"]: row["status"] for row in shown if row["case"] == END}


def test_every_way_to_end_is_reported_and_the_rest_still_runs(run, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "_GRACE_S", 1)
    names = ("raising", "out_of_device_memory", "no_plan", "killed", "leaving", "a_check_that_fails")
    good, results, shown = run(part("too_slow", seconds=4.0), *map(part, names), part("well"))
    assert not good
    assert ends(shown) == {
        "too_slow": "timed out",
        "raising": "failed",
        "out_of_device_memory": "out of memory",
        "no_plan": "does not fit",
        "killed": "killed",
        "leaving": "killed",
        "a_check_that_fails": "FAILED",
        "well": "ok",
    }
    notes = {row["part"]: row["note"] for row in shown if row["case"] == END}
    assert "ValueError: something is wrong" in notes["raising"] and "20.00 GiB" in notes["out_of_device_memory"]
    assert (
        "signal 9" in notes["killed"]
        and "exit status 3" in notes["leaving"]
        and "1 of 2" in notes["a_check_that_fails"]
    )
    # what was reported before the end is in the file
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    before = {row["part"] for row in rows if row["case"] == "before"}
    assert before == {"too_slow", "raising", "out_of_device_memory", "killed"}
    assert all(row["commit"] == "abc" and row["device"] == "a card" for row in rows)
    assert len(rows) == len(results.rows) == len(shown)


def test_a_second_start_does_what_is_missing(run, tmp_path):
    good, _, shown = run(part("well"), part("once_broken"))
    assert not good and ends(shown) == {"well": "ok", "once_broken": "failed"}
    (tmp_path / "repaired").touch()
    good, results, shown = run(part("well"), part("once_broken"))
    assert good and ends(shown) == {"well": "done before", "once_broken": "ok"}
    latest = {(row["part"], row["case"]): row for row in results.latest()}
    assert latest["well", "first"]["step_s"] == "2.0" and latest["once_broken", END]["status"] == "ok"
    assert run(part("well"), again=True)[2][-1]["status"] == "ok"
    assert ends(run(part("well"), common={**COMMON, "commit": "later"})[2]) == {"well": "ok"}
    assert ends(run(part("well"), common={**COMMON, "device": "another"})[2]) == {"well": "ok"}


def test_a_part_for_which_no_time_is_left_is_not_begun(run):
    good, _, shown = run(part("well", seconds=100.0), minutes=0.1, rehearse=False)
    assert not good and ends(shown) == {"well": "not run"} and "100 s" in shown[0]["note"]


def test_what_a_machine_lacks_is_skipped(monkeypatch):
    import torch

    class Properties:
        total_memory = 8 * 2**30

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    assert "24 GiB of device memory, there are 8" in runner._too_little(part("well", device_gib=24, host_gib=1))
    assert "9999 GiB of host memory" in runner._too_little(part("well", device_gib=8, host_gib=9999))
    assert runner._too_little(part("well", device_gib=8, host_gib=1)) is None


def test_results_of_another_version_are_not_touched(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("date,other\n1,2\n")
    with pytest.raises(SystemExit, match="other columns"):
        Results(path, COMMON)
    assert path.read_text() == "date,other\n1,2\n"


def test_unknown_columns_are_a_mistake(tmp_path):
    with pytest.raises(AssertionError, match="no such columns"):
        Results(tmp_path / "results.csv", COMMON).add({"part": "x", "case": "y", "stepz": 1})


def test_the_table_shows_memory_beside_the_plan():
    row = dict.fromkeys(FIELDS, "") | {
        "part": "65b-24", "case": "65b", "status": "ok", "allocated": str(20 * 2**30), "reserved": str(21 * 2**30), "plan_device": str(19 * 2**30),
        "cap": str(24 * 2**30), "pinned": str(100 * 2**30), "plan_host": str(99 * 2**30), "resident": str(101 * 2**30), "note": "a|b",
        "step_s": "5.0", "tokens_per_s": "800",
    }  # fmt: skip
    header, rule, line = markdown([row]).splitlines()
    assert header.count("|") == rule.count("|") == line.count("|")
    cells = dict(zip(header.split(" | "), line.split(" | "), strict=True))
    assert (cells["device: tensors"], cells["device: planned"], cells["device: reserved"], cells["device: limit"]) == (
        "20.00",
        "19.00",
        "21.00",
        "24.00",
    )
    assert (cells["host: pinned"], cells["host: planned"], cells["host: resident"]) == ("100.00", "99.00", "101.00")
    assert "20.00 GiB in tensors, 21.00 reserved, 19.00 planned" in one_line(row)
