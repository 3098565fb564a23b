import dataclasses
import json

import pytest
import torch

from lowtide.cli.doctor import describe_machine, sizes_table
from lowtide.planning.speeds import ASSUMED, Speeds
from lowtide.reporting import doctor

GIB = 2**30


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(doctor, "SIZES", {name: doctor.SIZES[name] for name in ("0.1B", "1.1B")})


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    return doctor.look_at_machine(tmp_path_factory.mktemp("disk"))


def assumed(**changes):
    return Speeds(**{**ASSUMED, **changes}, sources=dict.fromkeys(ASSUMED, "assumed"))


def test_what_it_says(lowtide, tmp_path):
    found = lowtide("doctor", "--directory", tmp_path, "--no-measure", "--json", tmp_path / "machine.json")
    assert found.err == []
    assert f"torch {torch.__version__}" in found.out
    assert "(assumed)" in found.out and "(measured)" not in found.out
    written = json.loads((tmp_path / "machine.json").read_text())
    assert [size["num_parameters"] for size in written["sizes"]] == [134_515_008, 1_100_048_384]
    assert written["machine"]["directory"] == str(tmp_path)
    assert found.code == int(bool(written["machine"]["too_old"]))
    alone = lowtide("doctor", "--directory", tmp_path, "--no-measure", "--json", "-")
    homes = [[size["plan"]["homes"] for size in found["sizes"]] for found in (json.loads(alone.out), written)]
    assert homes[0] == homes[1]


def test_speeds_are_measured_unless_told_otherwise(machine):
    speeds = doctor.machine_speeds(machine)
    assert {speeds.sources[name] for name in ("flops", "disk_read", "disk_write")} == {"measured"}


def test_a_size_goes_where_there_is_room(machine):
    def places(**changes):
        small = dataclasses.replace(machine, gpus=[], **changes)
        sizes = list(doctor.possible_sizes(small, assumed(flops=1e11), seq_len=64))
        return [
            None if size.plan is None else {home for home in ("device", "disk") if size.plan.count(home)}
            for size in sizes
        ]

    assert places(host_free_bytes=8 * GIB, disk_free_bytes=0) == [{"device"}, {"device"}]
    assert places(host_free_bytes=2 * GIB, disk_free_bytes=20 * GIB) == [{"device"}, {"device", "disk"}]
    assert places(host_free_bytes=2 * GIB, disk_free_bytes=0) == [{"device"}, None]


def test_a_gpu_comes_first(machine):
    gpu = doctor.Gpu("Some GPU", 24 * GIB, 23 * GIB, "8.9")
    with_gpu = dataclasses.replace(machine, gpus=[gpu], host_free_bytes=64 * GIB)
    sizes = list(doctor.possible_sizes(with_gpu, assumed(), seq_len=64))
    assert all(size.plan.count("device") == len(size.plan.homes) for size in sizes)
    assert "GPU 0         Some GPU, 24.0 GiB, 23.0 GiB free, capability 8.9" in describe_machine(with_gpu)
    table = sizes_table(with_gpu, [*sizes, doctor.Size("1T", 10**12, None)], 8, 64)
    assert list(table.columns[2].cells) == ["on the GPU", "on the GPU", "does not fit"]


def test_what_is_missing_or_old_is_told_with_the_remedy(machine, monkeypatch):
    monkeypatch.setattr(doctor, "NEEDED", {"torch": "99.1", "transformers": "1.0"})
    old = doctor.look_at_machine(machine.directory)
    assert old.too_old == {"torch": "99.1"}
    lines = describe_machine(dataclasses.replace(old, optional={"peft": None}))
    assert any("too old: at least 99.1 is needed, pip install -U torch" in line for line in lines)
    assert any("not installed; for LoRA and LoRA + LOMO: pip install 'lowtide[lora]'" in line for line in lines)


def test_nothing_is_overwritten(lowtide, tmp_path):
    (tmp_path / "there.json").write_text("mine")
    found = lowtide("doctor", "--json", tmp_path / "there.json")
    assert found.code == 2 and "nothing is overwritten" in found.err[0]
    found = lowtide("doctor", "--directory", tmp_path / "nowhere")
    assert found.code == 2 and "is not a directory" in found.err[0]
