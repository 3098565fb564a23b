import logging

import pytest
import torch

from lowtide.planning import find_speeds, speeds
from lowtide.planning.speeds import ASSUMED, measure_disk, measure_flops, measure_memory


def test_given_before_measured_before_assumed(monkeypatch, tmp_path):
    monkeypatch.setattr(speeds, "measure_flops", lambda dtype, device: 7.0)
    monkeypatch.setattr(speeds, "measure_disk", lambda directory: (5.0, 6.0))
    monkeypatch.setattr(speeds, "measure_memory", lambda device: 8.0)
    found = find_speeds(dtype=torch.float32, device="cpu", directory=tmp_path, given={"disk_read": 3.0, "flops": None})
    assert (found.flops, found.disk_read, found.disk_write, found.memory) == (7.0, 3.0, 6.0, 8.0)
    assert found.to_device == ASSUMED["to_device"]
    assert dict(found.sources) == {
        "flops": "measured",
        "to_device": "assumed",
        "from_device": "assumed",
        "disk_read": "given",
        "disk_write": "measured",
        "memory": "measured",
    }


def test_nothing_is_measured_that_is_given(monkeypatch):
    monkeypatch.setattr(speeds, "measure_flops", lambda dtype, device: pytest.fail("measured"))
    assert find_speeds(dtype=torch.float32, device="cpu", given={"flops": 1.0}).flops == 1.0


def test_without_measuring_everything_is_assumed(tmp_path):
    found = find_speeds(dtype=torch.float32, device="cpu", directory=tmp_path, measure=False)
    assert set(found.sources.values()) == {"assumed"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_gpu_that_is_not_here_is_assumed():
    assert set(find_speeds(dtype=torch.bfloat16, device="cuda").sources.values()) == {"assumed"}


def test_a_disk_that_fails_is_assumed_and_said_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="lowtide"):
        found = find_speeds(dtype=torch.float32, device="cpu", directory=tmp_path / "none", given={"flops": 1.0})
    assert found.sources["disk_read"] == "assumed"
    assert "disk_read and disk_write could not be measured" in caplog.text


def test_a_disk_is_measured_and_left_clean(tmp_path):
    read, write = measure_disk(tmp_path)
    assert read > 1e6 and write > 1e6
    assert list(tmp_path.iterdir()) == []


def test_a_processor_is_measured():
    assert 1e8 < measure_flops(torch.float32, "cpu", seconds=0.05) < 1e15
    assert 1e8 < measure_memory("cpu") < 1e13


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_measured():
    assert measure_flops(torch.bfloat16, "cuda") > 1e11
    assert measure_memory("cuda") > 1e10
    assert min(speeds.measure_transfer("cuda")) > 1e8
