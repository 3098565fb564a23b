import subprocess
import sys

import psutil
import pytest
import torch

from lowtide.planning import hardware
from lowtide.planning.hardware import (
    available_host_bytes,
    device_available_bytes,
    peak_resident_bytes,
)

MIB = 2**20
FREE = 10**12


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with FREE bytes available; returns a function that writes one of its files."""
    memory = psutil.virtual_memory()._replace(available=FREE)
    monkeypatch.setattr(hardware.psutil, "virtual_memory", lambda: memory)

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    return write


def write_v2(write, group, limit, usage, inactive_file=0):
    write(f"sys/fs/cgroup/{group}/memory.max", f"{limit}\n")
    write(f"sys/fs/cgroup/{group}/memory.current", f"{usage}\n")
    write(f"sys/fs/cgroup/{group}/memory.stat", f"anon 5\ninactive_file {inactive_file}\n")


def test_without_control_groups_it_is_what_the_machine_has(machine, tmp_path):
    assert available_host_bytes(root=tmp_path) == FREE


def test_a_version_2_limit_counts_less_what_is_used_plus_reclaimable_cache(machine, tmp_path):
    machine("proc/self/cgroup", "0::/jobs/mine\n")
    write_v2(machine, "jobs/mine", 1000 * MIB, 700 * MIB, inactive_file=100 * MIB)
    assert available_host_bytes(root=tmp_path) == 400 * MIB


def test_the_tightest_of_the_enclosing_groups_counts(machine, tmp_path):
    machine("proc/self/cgroup", "0::/jobs/mine\n")
    write_v2(machine, "jobs/mine", "max", 1)
    write_v2(machine, "jobs", 300 * MIB, 100 * MIB)
    assert available_host_bytes(root=tmp_path) == 200 * MIB


def test_in_a_container_whose_path_is_not_visible_the_mount_counts(machine, tmp_path):
    machine("proc/self/cgroup", "0::/system.slice/docker-abc\n")
    write_v2(machine, ".", 500 * MIB, 0)
    assert available_host_bytes(root=tmp_path) == 500 * MIB


def test_a_version_1_limit_counts(machine, tmp_path):
    machine("proc/self/cgroup", "7:cpu,cpuacct:/x\n5:memory:/x\n")
    machine("sys/fs/cgroup/memory/x/memory.limit_in_bytes", str(80 * MIB))
    machine("sys/fs/cgroup/memory/x/memory.usage_in_bytes", str(50 * MIB))
    machine("sys/fs/cgroup/memory/x/memory.stat", f"inactive_file 3\ntotal_inactive_file {10 * MIB}\n")
    assert available_host_bytes(root=tmp_path) == 40 * MIB


def test_no_limit_in_either_version_leaves_what_the_machine_has(machine, tmp_path):
    machine("proc/self/cgroup", "5:memory:/\n0::/\n")
    write_v2(machine, ".", "max", 1)
    machine("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    machine("sys/fs/cgroup/memory/memory.usage_in_bytes", "1")
    machine("sys/fs/cgroup/memory/memory.stat", "")
    assert available_host_bytes(root=tmp_path) == FREE


def test_a_group_over_its_limit_has_nothing_left(machine, tmp_path):
    machine("proc/self/cgroup", "0::/\n")
    write_v2(machine, ".", 10, 20)
    assert available_host_bytes(root=tmp_path) == 0


def test_a_malformed_line_is_passed_over(machine, tmp_path):
    machine("proc/self/cgroup", "nonsense\n\n")
    assert available_host_bytes(root=tmp_path) == FREE


def test_this_machine_has_memory():
    assert 0 < available_host_bytes() <= psutil.virtual_memory().total
    assert 0 < device_available_bytes("cpu") <= psutil.virtual_memory().total


def test_resident_set_grows_and_the_peak_stays():
    script = """
from lowtide.planning import peak_resident_bytes, resident_bytes
before = resident_bytes()
block = b"x" * (200 << 20)
during = resident_bytes()
del block
print(during - before, peak_resident_bytes() - before, resident_bytes() - before)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    during, peak, after = (int(value) / MIB for value in done.stdout.split())
    assert 190 < during < 260
    assert 190 < peak < 300
    assert after < 50


def test_the_peak_is_not_inherited_from_the_parent():
    script = """
import subprocess, sys
block = b"x" * (300 << 20)
child = "from lowtide.planning.hardware import peak_resident_bytes as peak; print(peak())"
done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True)
from lowtide.planning.hardware import peak_resident_bytes
print(peak_resident_bytes() - int(done.stdout))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) / MIB > 200


def test_without_proc_the_unit_is_kib_but_bytes_on_macos(monkeypatch, tmp_path):
    peak = peak_resident_bytes(root=tmp_path)
    assert peak >= peak_resident_bytes() * 0.9
    monkeypatch.setattr(hardware.sys, "platform", "darwin")
    assert peak_resident_bytes(root=tmp_path) == pytest.approx(peak / 1024, rel=0.1)


def test_cuda_counts_what_torch_holds_but_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (100, 1000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 10)
    assert device_available_bytes("cuda") == 120


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_allocation_on_cuda_is_seen():
    before = device_available_bytes("cuda")
    block = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    assert before - device_available_bytes("cuda") == pytest.approx(block.numel(), abs=32 * MIB)


@pytest.mark.parametrize(
    "machine, capability, expected",
    [("x86_64", "AVX2", False), ("AMD64", "DEFAULT", False), ("x86_64", "AVX512", True), ("aarch64", "DEFAULT", True)],
)
def test_bfloat16_is_for_processors_that_have_it(monkeypatch, machine, capability, expected):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert hardware.computes_bfloat16() is expected
    assert hardware.computes_bfloat16("cuda")
