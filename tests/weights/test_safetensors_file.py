"""The streaming writer: what safetensors reads back, of any size, and nothing left behind by a failure."""

import errno
import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lowtide.weights import safetensors_file
from lowtide.weights.safetensors_file import DTYPE_NAMES, clone_file, encode_header, read_pieces, sha256_of, write_file


def entries_of(tensors):
    return [(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


@pytest.mark.parametrize("buffer_bytes", [4096, 8192, 2**20])
def test_what_is_written_is_read(buffer_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_BUFFER_BYTES", buffer_bytes)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "long": torch.randint(-9, 9, (3, 5), generator=generator),
        "float": torch.randn(1000, 7, generator=generator),
        "strided": torch.randn(40, 30, generator=generator).t(),
        "number": torch.tensor(2.5),
        "bf16": torch.randn(4097, generator=generator).bfloat16(),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
    }
    path = tmp_path / "a.safetensors"
    digest = write_file(path, entries_of(tensors), iter(tensors.values()))
    found = load_file(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_same_data_as_the_library_writes(tmp_path):
    tensors = {"a": torch.arange(10.0), "b": torch.arange(3, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "theirs")
    write_file(tmp_path / "ours", entries_of(tensors), tensors.values())
    ours, theirs = ((tmp_path / name).read_bytes() for name in ("ours", "theirs"))
    assert ours[-46:] == theirs[-46:] and set(DTYPE_NAMES.values()) >= {"F32", "BF16"}


def test_an_empty_file(tmp_path):
    write_file(tmp_path / "none", [], [])
    assert load_file(tmp_path / "none") == {}


def test_order_that_would_not_be_aligned_is_refused():
    with pytest.raises(ValueError, match="larger dtypes must come first"):
        encode_header([("a", torch.uint8, (3,)), ("b", torch.float32, (1,))])
    with pytest.raises(ValueError, match="cannot hold"):
        encode_header([("a", torch.complex64, (3,))])


def test_more_or_fewer_bytes_than_announced_are_refused(tmp_path):
    for number, count in enumerate((2, 4, 4_000_000)):
        with pytest.raises(ValueError, match=r"x\d was to have \d+ bytes"):
            write_file(tmp_path / f"x{number}", [("a", torch.float32, (3,))], [torch.zeros(count)])


def test_one_piece_is_alive_at_a_time(tmp_path):
    import weakref

    alive, most = weakref.WeakSet(), []

    def pieces():
        for _ in range(5):
            piece = torch.zeros(1000)
            alive.add(piece)
            most.append(len(alive))
            yield piece
            del piece

    write_file(tmp_path / "x", [("a", torch.float32, (5000,))], pieces())
    assert most == [1] * 5


def test_pieces_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "_BUFFER_BYTES", 8192)
    data = bytes(range(256)) * 16 * 6
    (tmp_path / "source").write_bytes(data)
    pieces = [bytes(piece.tolist()) for piece in read_pieces((tmp_path / "source", 4096, 5 * 4096), 5 * 4096 - 100)]
    assert b"".join(pieces) == data[4096 : 6 * 4096 - 100] and [len(piece) for piece in pieces] == [8192, 8192, 3996]


def test_others_may_read_a_saved_model(tmp_path):
    import os

    before = os.umask(0o022)
    try:
        write_file(tmp_path / "x", [("a", torch.float32, (3,))], [torch.zeros(3)])
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_a_failing_disk_is_reported(tmp_path, monkeypatch):
    def write(self, source, offset):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(safetensors_file.DirectFile, "write", write)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "x", [("a", torch.float32, (10_000_000,))], [torch.zeros(10_000_000)])


def test_the_room_is_taken_first(tmp_path, monkeypatch):
    def reserve(path, num_bytes, mode):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(safetensors_file, "reserve", reserve)
    asked = []
    with pytest.raises(OSError, match="No space left"):
        write_file(tmp_path / "x", [("a", torch.float32, (3,))], (asked.append(1) for _ in range(1)))
    assert not asked, "no tensor was loaded for it"


def test_no_clone_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_file, "clone_range", lambda *arguments: False)
    assert clone_file(tmp_path / "x", [("a", torch.uint8, (5,))], (tmp_path / "y", 0, 4096)) is None
    assert not list(tmp_path.iterdir())
