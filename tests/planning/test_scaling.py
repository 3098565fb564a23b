"""``benchmarks/scaling.py``: its tables can be made, and those of docs/scaling.md that do not depend on new measurements are its."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
PEERS = """device,threads,model,method,num_parameters,batch_size,seq_len,step_s,status,round
cpu,2,smollm2,lowtide-lomo,134515008,8,128,2.0,ok,1
cpu,2,smollm2,lowtide-lomo,134515008,8,128,2.2,ok,2
cpu,2,smollm2,adamw-bf16,134515008,8,128,2.5,ok,1
cpu,2,smollm2,galore-adamw,134515008,8,128,9.0,ok,1
cpu,2,smollm2,sgd-bf16,134515008,8,128,,killed by signal 9,1
cpu,2,smollm2,lowtide-lomo,134515008,1,64,0.9,ok,1
cpu,2,smollm2,adamw-fp32,134515008,8,128,4.0,ok,1
"""


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


@pytest.mark.parametrize("name", ["example", "paper", "others", "machines"])
def test_the_page_has_what_the_script_makes(scaling, name):
    assert scaling.tables.part(PAGE, name) == scaling.STATIC[name]()


def test_the_page_has_the_predictions(scaling):
    """Of a few machines with a small model; all of them take a minute."""
    lines = scaling.tables.part(PAGE, "predictions").splitlines()[2:]
    machines, models = scaling.predicted.MACHINES, scaling.predicted.MODELS
    pairs = [[cell.strip() for cell in line.split("|")[1:3]] for line in lines]
    assert pairs == [[machine.name, model] for machine in machines for model in models]
    few = (machines[0], machines[-1])
    for row in scaling.predicted.predictions(few, models[:1]):
        assert f"| {' | '.join(row)} |" in lines


def test_what_was_measured_can_be_compared(scaling, monkeypatch):
    """Of cpu_peers.csv, which has a hundred kinds of step, two a machine; all of them take a minute."""
    few = [dataclasses.replace(group, rows=group.rows[:2]) for group in scaling.measured.peers()]
    assert few and all(group.rows for group in few)
    monkeypatch.setattr(scaling.measured, "peers", lambda: few)
    made = {name: make() for name, make in scaling.MEASURED.items()}
    assert made["measured"].count("fitted to the first row") >= 1
    assert re.search(r"[+-]\d+%", made["measured"])
    assert all(made.values())


def test_every_part_has_its_place(scaling):
    for name in {**scaling.STATIC, **scaling.MEASURED}:
        assert scaling.tables.part(PAGE, name)


def test_rows_of_peers_are_compared(scaling, tmp_path):
    (tmp_path / "cpu_peers.csv").write_text(PEERS)
    narrow, wide = scaling.measured.peers(tmp_path)
    assert [row.case for row in narrow.rows] == [
        "smollm2, 8 x 128, lowtide-lomo",
        "smollm2, 8 x 128, adamw-bf16",
        "smollm2, 1 x 64, lowtide-lomo",
    ]
    assert narrow.rows[0].seconds == pytest.approx(2.1)
    assert len(wide.rows) == 1
    text = scaling.measured.measured_tables([narrow, wide])
    assert "| smollm2, 8 x 128, lowtide-lomo | 2.1 | 2.1 | fitted |" in text


def test_a_constant_that_was_fitted_gives_its_row(scaling):
    assert scaling.published.fitted_efficiency() < 1
    row = scaling.measured.groups()[0].rows[0]
    memory = scaling.measured.memory_bandwidth()
    assert scaling.measured.predict(row, scaling.measured.fit(row, memory), memory) == pytest.approx(row.seconds)


def test_a_part_that_is_missing_is_an_error(scaling):
    with pytest.raises(ValueError, match="0 parts"):
        scaling.tables.replaced(PAGE, "nothing", "")
