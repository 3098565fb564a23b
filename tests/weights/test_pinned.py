"""Page-locked memory, with a driver that only takes notes: what CUDA itself does is tested on a card (tests/gpu)."""

import mmap
import types

import pytest
import torch

from lowtide.weights import pinned
from lowtide.weights.layout import PAGE_BYTES, aligned_buffer

CPU = torch.device("cpu")


class Driver:
    """Registers what it is told to, or refuses with an error code."""

    def __init__(self, code=0):
        self.code, self.registered, self.unregistered = code, {}, []

    def cudaHostRegister(self, address, size, flags):
        self.registered[address] = size
        return self.code

    def cudaHostUnregister(self, address):
        self.unregistered.append(address)


@pytest.fixture
def driver(monkeypatch):
    found = Driver()
    monkeypatch.setattr(pinned, "_cudart", lambda: found)
    return found


def test_takes_no_more_than_asked_for_and_begins_at_a_page(driver):
    for num_bytes in (1, PAGE_BYTES, 5 * 2**20 + 3):
        buffer = aligned_buffer(num_bytes, CPU, pinned=True)
        assert buffer.shape == (num_bytes,) and buffer.dtype == torch.uint8 and not buffer.any()
        assert buffer.data_ptr() % PAGE_BYTES == 0
        assert driver.registered[buffer.data_ptr()] - num_bytes < mmap.PAGESIZE  # torch would take a power of two


def test_is_given_back_when_the_last_view_is_gone(driver):
    buffer = pinned.pinned_buffer(3 * PAGE_BYTES)
    address, view = buffer.data_ptr(), buffer[PAGE_BYTES:].view(torch.bfloat16)
    del buffer
    assert driver.unregistered == []
    view.fill_(1.0)
    del view
    assert driver.unregistered == [address]


def test_nothing_to_lock(driver):
    assert pinned.pinned_buffer(0).numel() == 0 and not driver.registered


def test_a_refusal_falls_back_to_torch_and_says_so_once(monkeypatch, caplog):
    refusing = Driver(code=801)
    asked = []

    def zeros(size, *, dtype=None, pin_memory=False, device=None):
        asked.append((size, pin_memory))
        return torch.ones(size).mul(0).to(dtype or torch.float32)

    monkeypatch.setattr(pinned, "_cudart", lambda: refusing)
    monkeypatch.setattr(pinned, "_warned", set())
    monkeypatch.setattr(
        pinned, "torch", types.SimpleNamespace(frombuffer=torch.frombuffer, uint8=torch.uint8, zeros=zeros)
    )
    for _ in range(2):
        assert pinned.pinned_buffer(5000).shape == (5000,)
    assert asked.count((5000, True)) == 2 and not refusing.unregistered
    assert caplog.text.count("could not be registered") == 1 and "801" in caplog.text


def test_nothing_can_be_locked(monkeypatch):
    def zeros(size, *, dtype=None, pin_memory=False, device=None):
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(pinned, "_cudart", lambda: Driver(code=2))
    monkeypatch.setattr(
        pinned, "torch", types.SimpleNamespace(frombuffer=torch.frombuffer, uint8=torch.uint8, zeros=zeros)
    )
    with pytest.raises(MemoryError, match="ulimit -l"):
        pinned.pinned_buffer(5000)


def test_more_than_there_is(driver):
    with pytest.raises(MemoryError, match="host memory"):
        pinned.pinned_buffer(2**62)
