import pytest
import torch
from torch import nn

from lowtide.weights import home


@pytest.mark.parametrize(("width", "expected"), [(16, 0), (2100, 2)])
def test_only_large_blocks_give_memory_back(width, expected, monkeypatch):
    calls = []
    monkeypatch.setattr(home, "malloc_trim", lambda: calls.append)
    device, block = home.DeviceHome(), nn.Linear(width, width)
    before = block.weight.detach().clone()
    device.fetch(block)
    device.release(block)
    device.write_back(block)
    block.eval()
    device.fetch(block)
    assert len(calls) == expected and torch.equal(before, block.weight)


def test_other_c_libraries_do_without(monkeypatch):
    monkeypatch.setattr(home, "malloc_trim", lambda: None)
    home.DeviceHome().write_back(nn.Linear(2100, 2100))
