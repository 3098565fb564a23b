"""Checkpoints of weights on disk as copy-on-write clones, on real file systems that have them."""

import itertools
import os
import shutil
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from lowtide.training import read_events, train
from lowtide.training.checkpoint import list_checkpoints, read_checkpoint
from lowtide.weights import cloning, safetensors_file
from tiny_files import save_tiny_model


@pytest.fixture(params=["xfs", "btrfs"])
def cloning_disk(request, tmp_path):
    """A file system in a file, mounted."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    folder.mkdir()
    make = shutil.which(f"mkfs.{request.param}")
    if make is None:
        pytest.skip(f"mkfs.{request.param} is not installed")
    with image.open("wb") as file:
        file.truncate(400 * 1024**2)
    commands = (
        [make, "-q", *(["-m", "reflink=1"] if request.param == "xfs" else []), image],
        ["mount", "-o", "loop", image, folder],
    )
    for command in commands:
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip(f"needs to be allowed to mount {request.param}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture
def clones(monkeypatch):
    """Which files were cloned."""
    made, original = [], safetensors_file.clone_file

    def clone_file(path, *arguments):
        digest = original(path, *arguments)
        made.append((path.name, digest is not None))
        return digest

    monkeypatch.setattr("lowtide.models.shards.clone_file", clone_file)
    return made


def tensors(directory):
    return {name: value for path in directory.glob("model*.safetensors") for name, value in load_file(path).items()}


def test_checkpoints_share_the_working_copy_until_it_changes(make_config, tmp_path, cloning_disk, clones):
    model = save_tiny_model(tmp_path / "wide", intermediate_size=9000)
    changes = {
        "model": str(model),
        "max_steps": 6,
        "save_every": "2",
        "keep_checkpoints": 9,
        "optimizer": "lomo",
        "lr": 0.01,
    }
    whole = train(make_config(**changes, output=str(tmp_path / "whole")), show_progress=False)
    assert not clones, "weights on the device"
    free = []

    def watch(event):
        if event["event"] in ("train", "checkpoint"):
            os.sync()
            free.append((event["event"], os.statvfs(cloning_disk).f_bavail * os.statvfs(cloning_disk).f_bsize))

    config = make_config(**changes, output=str(cloning_disk / "out"), weights=str(cloning_disk / "w"))
    result = train(config, on_event=watch, show_progress=False)
    assert clones and all(done for _, done in clones)
    paths = list_checkpoints(result.output / "checkpoints")
    assert len(paths) == 2
    for path in paths:
        assert read_checkpoint(path), "what came after it did not change it"
        expected = tensors(whole.output / "checkpoints" / path.name)
        found = tensors(path)
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
    size = read_events(result.output / "metrics.jsonl", "checkpoint")[0]["num_bytes"]
    before, after = next((a[1], b[1]) for a, b in itertools.pairwise(free) if b[0] == "checkpoint")
    assert size > 6_000_000 and before - after < size / 2, "the clone took no room"


def test_elsewhere_everything_is_written(make_config, tmp_path, clones):
    """And gives the same bytes."""
    changes = {"max_steps": 4, "save_every": "2", "optimizer": "lomo", "lr": 0.01}
    plain = train(make_config(**changes, output=str(tmp_path / "plain")), show_progress=False)
    result = train(
        make_config(**changes, output=str(tmp_path / "disk"), weights=str(tmp_path / "w")), show_progress=False
    )
    assert not any(done for _, done in clones)
    name = "checkpoints/step-00000002"
    expected, found = tensors(plain.output / name), tensors(result.output / name)
    assert all(torch.equal(expected[key], found[key]) for key in expected) and expected.keys() == found.keys()


def test_a_file_system_without_clones_says_no(tmp_path, monkeypatch):
    import errno
    import fcntl

    def ioctl(*arguments):
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    (tmp_path / "source").write_bytes(bytes(8192))
    assert not cloning.can_clone(tmp_path / "source", tmp_path)
    entries = [("a", torch.uint8, (100,))]
    assert safetensors_file.clone_file(tmp_path / "clone", entries, (tmp_path / "source", 0, 4096)) is None
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
