import shutil

import pytest
import torch
from torch import nn

from lowtide.training import snapshot
from lowtide.training.snapshot import restored_afterwards


class Odd(nn.Module):
    """Every kind of tensor that a model may have."""

    def __init__(self):
        super().__init__()
        self.sixteen = nn.Parameter(torch.randn(7, 5).bfloat16())
        self.transposed = nn.Parameter(torch.randn(6, 4).t())
        self.scalar = nn.Parameter(torch.tensor(3.0))
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.tied = self.sixteen
        self.norm = nn.BatchNorm1d(3)
        self.norm.eval()
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("hidden", torch.tensor([1.0, float("nan"), -0.0]), persistent=False)


def bits(model):
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().contiguous().view(-1).view(torch.uint8).clone() for name, value in tensors.items()}


def spoil(model):
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_() if tensor.dtype != torch.float32 else tensor.fill_(float("nan"))
    model.train()
    model.sixteen.grad = torch.ones_like(model.sixteen)


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
@pytest.mark.parametrize("slice_bytes", [8, 64 * 1024**2])
def test_everything_is_as_before_bit_for_bit(tmp_path, monkeypatch, error, slice_bytes):
    monkeypatch.setattr(snapshot, "_SLICE_BYTES", slice_bytes)
    model = Odd()
    before, places = bits(model), [param.data_ptr() for param in model.parameters()]
    try:
        with restored_afterwards(model, tmp_path):
            spoil(model)
            if error is not None:
                raise error
    except BaseException as raised:
        assert type(raised) is error
    after = bits(model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [param.data_ptr() for param in model.parameters()] == places
    assert (model.training, model.norm.training) == (True, False)
    assert model.sixteen.grad is None
    assert list(tmp_path.iterdir()) == []


def test_a_disk_without_room_is_named_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(snapshot.shutil, "disk_usage", lambda folder: usage._replace(free=10))
    model = Odd()
    with (
        pytest.raises(OSError, match="temporary file of .* has 10 B left"),
        restored_afterwards(model, tmp_path),
    ):
        raise AssertionError("not reached")


def test_a_file_that_was_cut_short_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_write", lambda tensor, file: None)
    with pytest.raises(OSError, match="cut short"), restored_afterwards(nn.Linear(2, 2), tmp_path):
        pass
