"""The parts of the GPU suite on a CPU, with tiny sizes, by the command that runs them on a card."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from suite import overlap, streamed
from suite.context import FIELDS, Context
from suite.models import SHAPES, flops_per_token, llama_config, num_parameters, random_model
from suite.parts import PARTS
from suite.runner import END
from suite_path import SUITE


@pytest.fixture
def context(tmp_path):
    rows = []
    found = Context("a part", True, tmp_path, tmp_path, time.monotonic() + 600, rows.append)
    found.rows = rows
    return found


def rehearse(path, *arguments):
    command = [sys.executable, str(SUITE / "run.py"), "--rehearse", "--results", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)


@pytest.mark.slow
def test_the_whole_suite_runs_and_a_second_start_has_nothing_to_do(tmp_path):
    path = tmp_path / "rows.csv"
    done = rehearse(path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == FIELDS
    assert {row["part"]: row["status"] for row in rows if row["case"] == END} == {part.name: "ok" for part in PARTS}
    assert not [row for row in rows if row["status"] not in ("ok", "begun", "not run")]
    by_part = {part.name: [row for row in rows if row["part"] == part.name and row["step_s"]] for part in PARTS}
    for name in ("65b-24", "30b-24", "13b-24", "7b-8", "7b-12"):
        last = by_part[name][-1]
        assert "host" in last["homes"] and "device" in last["homes"]  # as under a real limit
        assert int(last["pinned"]) == pytest.approx(int(last["plan_host"]), rel=0.2)
        assert int(last["plan_device"]) > 0 and int(last["cap"]) > 0 and float(last["plan_step_s"]) > 0
    assert {row["case"].split(", ")[1] for row in by_part["resident"]} == {"lomo", "adalomo", "no update"}
    assert len({row["case"] for row in by_part["clipping"]}) == 5
    assert len(by_part["long"]) == 3 and any("AdamW" in row["case"] for row in by_part["others"])
    assert (tmp_path / "trace-cpu.json.gz").exists() and "65b-24" in (tmp_path / "rows.md").read_text()

    again = rehearse(path)
    assert again.returncode == 0 and again.stdout.count("done before") == len(PARTS)
    with path.open(newline="") as file:
        assert list(csv.DictReader(file)) == rows


def test_without_a_card_it_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a card here")
    done = subprocess.run(
        [sys.executable, str(SUITE / "run.py")], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 2 and "--rehearse" in done.stderr and not done.stdout


def test_the_shapes_are_those_of_llama(context):
    context.rehearse = False
    # Table 2 of arXiv 2302.13971 says 6.7, 13.0, 32.5 and 65.2 B; arXiv 2401.02385 1.1 B.
    found = {name: round(num_parameters(llama_config(context, name)) / 1e9, 1) for name in SHAPES}
    assert found == {"tiny": 1.1, "7b": 6.7, "13b": 13.0, "30b": 32.5, "65b": 65.3}


def test_parameters_are_counted_as_in_the_model(context):
    for name in SHAPES:
        config = llama_config(context, name)
        assert sum(p.numel() for p in random_model(context, config).parameters()) == num_parameters(config)


def test_flops_of_a_token(context):
    context.rehearse = False
    config = llama_config(context, "7b")
    # 6 a parameter but the embedding; attention: two products of 2 * S * hidden a layer, half of them masked, three times over.
    products = 6 * (num_parameters(config) - 32000 * 4096)
    assert flops_per_token(config, 1024) == products + 3 * (2 * 2 * 1024 * 4096 // 2) * 32


def test_overlap_is_measured_in_the_trace():
    def event(kind, name, start, duration):
        return {"ph": "X", "cat": kind, "name": name, "ts": start * 1e6, "dur": duration * 1e6}

    events = [
        event("kernel", "gemm", 0, 4), event("kernel", "gemm, on another stream", 3, 2), event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 1, 2),
        event("gpu_memcpy", "Memcpy DtoH (Device -> Pinned)", 2, 2), event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 4.5, 1.5),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 10, 5), event("cpu_op", "aten::mm", 0, 100), {"ph": "M", "cat": "kernel", "name": "x"},
    ]  # fmt: skip
    found = overlap.hidden_copies(events)
    # copies cover 1 to 4 and 4.5 to 6, kernels 0 to 5: 3.5 of 4.5 seconds are hidden
    assert found == pytest.approx({"copy_s": 4.5, "kernel_s": 5.0, "exposed_s": 1.0, "hidden_share": 3.5 / 4.5})
    assert overlap.hidden_copies(events[:2]) is None and overlap.hidden_copies([]) is None


def test_a_model_too_large_for_the_machine_is_shortened_and_says_so(context, monkeypatch):
    whole = llama_config(context, "65b")
    room = streamed._limits(context, whole, 0, 1, 32).device
    monkeypatch.setattr(streamed, "_limits", lambda *arguments: streamed.Limits(room, 0, 0))
    monkeypatch.setattr(streamed.psutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    streamed.capped(context, "65b", 24.0)
    last = context.rows[-1]
    assert last["status"] == "ok" and "of 6 layers fit here" in last["note"]


def test_nothing_fits(context, monkeypatch):
    monkeypatch.setattr(streamed, "_limits", lambda *arguments: streamed.Limits(1000, 1000, 0))
    monkeypatch.setattr(streamed.psutil, "disk_usage", lambda folder: type("Usage", (), {"free": 0}))
    with pytest.raises(MemoryError, match="65b under"):
        streamed.capped(context, "65b", 24.0)


def test_the_guide_names_every_part():
    guide = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text()
    assert [part.name for part in PARTS if f"`{part.name}`" not in guide] == []
    assert sum(part.seconds for part in PARTS) > 0
