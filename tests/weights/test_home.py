import pytest
import torch
from torch import nn

from lowtide.weights import home

MB = 10**6


class Machine:
    """Memory of a made-up process: what is in use, and what is free and still resident."""

    def __init__(self, monkeypatch):
        self.used, self.free, self.trims, self.peak = 1000 * MB, 0, [], 0
        monkeypatch.setattr(home, "malloc_trim", lambda: self.trim)
        monkeypatch.setattr(home, "resident_bytes", lambda: self.used + self.free)

    def trim(self, pad):
        self.trims.append(self.used + self.free)
        self.free = 0

    def run(self, needs, fits):
        """Something that needs so much for a while, of which so much at most finds room in what is free."""
        self.free += max(0, needs - min(fits, self.free))
        self.peak = max(self.peak, self.used + self.free)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def step(machine, device, blocks, growth=20 * MB):
    """Blocks that need 60 MB forward and 200 backward, each of which leaves some more behind than the one before it."""
    for block in blocks:
        device.fetch(block)
        machine.run(60 * MB, 60 * MB - growth // 4)
        device.release(block)
        machine.used += 4 * MB
    machine.run(100 * MB, 0)  # the loss
    for block in reversed(blocks):
        device.fetch(block)
        machine.run(200 * MB, 200 * MB - growth)
        device.write_back(block)
        machine.used -= 4 * MB


def large_blocks(count=10):
    return [nn.Linear(2100, 2100) for _ in range(count)]


def test_small_blocks_leave_it(machine):
    step(machine, home.DeviceHome(), [nn.Linear(16, 16) for _ in range(3)])
    assert not machine.trims


def test_evaluation_leaves_it(machine):
    device, block = home.DeviceHome(), nn.Linear(2100, 2100).eval()
    device.fetch(block)
    device.release(block)
    assert not machine.trims


def test_weights_stay_as_they_are():
    device, block = home.DeviceHome(), nn.Linear(2100, 2100)
    before = block.weight.detach().clone()
    device.fetch(block)
    device.write_back(block)
    assert torch.equal(before, block.weight)


def test_it_is_given_back_seldom_and_the_peak_hardly_grows(machine):
    blocks = large_blocks()
    device = home.DeviceHome()
    step(machine, device, blocks)
    machine.trims, machine.peak = [], 0
    for _ in range(3):
        step(machine, device, blocks)
    live = (1000 + 4 * len(blocks) + 200) * MB  # at the first block of a backward pass
    # A heap that grows for ever, by 20 MB a block: it may have a quarter of 200 MB more than after the first block.
    assert live <= machine.peak <= live + 25 * MB + 50 * MB
    assert 3 * 2 <= len(machine.trims) <= 3 * 5  # around every block: 60


def test_a_heap_that_stops_growing_is_left_alone(machine):
    blocks, device = large_blocks(), home.DeviceHome()
    for number in range(4):
        machine.trims = []
        for block in blocks:
            device.fetch(block)
            machine.run(60 * MB, 60 * MB)
            device.release(block)
            machine.used += 4 * MB
        machine.run(100 * MB, 0)
        for place, block in enumerate(reversed(blocks)):
            device.fetch(block)
            machine.run(200 * MB, 200 * MB - (8 * MB >> place))
            device.write_back(block)
            machine.used -= 4 * MB
        assert number == 0 or len(machine.trims) == 2  # where forward turns to backward


def test_it_is_given_back_where_forward_turns_to_backward(machine):
    blocks = large_blocks(4)
    device = home.DeviceHome()
    for _ in range(2):
        step(machine, device, blocks, growth=0)
    machine.trims = []
    step(machine, device, blocks, growth=0)
    # Behind the last block, where the loss begins, and behind the loss; nothing grows otherwise.
    assert len(machine.trims) == 2


def test_longer_batches_are_followed(machine):
    """What is resident with one batch is no measure for the next."""
    blocks, device = large_blocks(), home.DeviceHome()
    for _ in range(2):
        step(machine, device, blocks)
    machine.used += 500 * MB  # of the user's
    step(machine, device, blocks)
    machine.trims = []
    step(machine, device, blocks)
    assert len(machine.trims) <= 6


def test_other_c_libraries_do_without(monkeypatch):
    monkeypatch.setattr(home, "malloc_trim", lambda: None)
    device, block = home.DeviceHome(), nn.Linear(2100, 2100)
    device.fetch(block)
    device.write_back(block)
