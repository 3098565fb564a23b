"""The working copy on disk: what is in it, and what happens when disk, process or user fail."""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from streaming import RULES, LateLane, train

import lowtide
from helpers import same_weights, tiny_batch, tiny_model, twin
from lowtide.weights import direct_io, disk, working_copy
from lowtide.weights.direct_io import DirectFile
from lowtide.weights.layout import aligned_buffer
from lowtide.weights.staging import Staging


def fused(directory, model=None, **changes):
    model = model or tiny_model(tie_word_embeddings=False, **changes)
    optimizer = RULES["lomo"](model.parameters())
    return model, optimizer, lowtide.fuse(model, optimizer, weights=directory)


def step(model, optimizer, engine):
    engine.backward(model(**tiny_batch()).loss)
    optimizer.step()


def test_blocks_are_safetensors_files(tmp_path):
    from safetensors import safe_open

    model, optimizer, engine = fused(tmp_path / "weights")
    step(model, optimizer, engine)
    engine.remove()
    found = {}
    for path in sorted((tmp_path / "weights").glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update({name: file.get_tensor(name) for name in file.keys() if name != "__padding__"})  # noqa: SIM118
    expected = {name: value for name, value in model.state_dict().items() if name != "model.norm.weight"}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_model_afterwards_does_not_change_the_files(tmp_path):
    model, optimizer, engine = fused(tmp_path / "weights")
    step(model, optimizer, engine)
    engine.remove()
    before = {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}
    train("device", model=model, num_steps=1)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "weights").iterdir()}


def test_bytes_written_are_counted(tmp_path):
    model, optimizer, engine = fused(tmp_path / "weights")
    home = engine.home.streamed[0]
    total = sum(layout.num_bytes for layout in home.layouts)
    assert home.store.bytes_written == total
    for _ in range(3):
        step(model, optimizer, engine)
    engine.remove()
    assert home.store.bytes_written == 4 * total
    assert 2.5 * total < home.store.bytes_read < 7 * total  # some blocks are still there at the turning points


@pytest.mark.parametrize("direct", [True, False])
def test_files_without_direct_io(direct, tmp_path, monkeypatch):
    """The same bits where the file system knows no direct I/O, or takes it back at the first request."""
    if not direct:
        monkeypatch.setattr(direct_io, "_open_direct", lambda path: None)
    original, refused = os.preadv, []

    def preadv(descriptor, buffers, offset):
        if direct and not refused:
            refused.append(descriptor)
            raise OSError(errno.EINVAL, "made up")
        return original(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    expected, _, _ = train("device", num_steps=2)
    found, home, _ = train(tmp_path / "weights", num_steps=2)
    assert same_weights(expected, found)
    assert not all(file.direct for file in home.streamed[0].store._files)


# Faults ---------------------------------------------------------------------------------------------------------------


def test_too_little_room(tmp_path, monkeypatch):
    model = tiny_model()
    before = twin(model)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(OSError, match="the working copy of the weights takes .* has 1000 B"):
        fused(tmp_path / "weights", model)
    assert same_weights(model, before) and not (tmp_path / "weights").exists()
    monkeypatch.undo()
    fused(tmp_path / "weights", model)[2].remove()


def test_disk_full_while_the_copy_is_made(tmp_path, monkeypatch):
    made = []

    def reserve(path, num_bytes):
        if len(made) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        made.append(path)
        direct_io.reserve(path, num_bytes)

    monkeypatch.setattr(disk, "reserve", reserve)
    model = tiny_model()
    before = twin(model)
    (tmp_path / "weights").mkdir()
    with pytest.raises(OSError, match="No space left"):
        fused(tmp_path / "weights", model)
    assert same_weights(model, before) and not list((tmp_path / "weights").iterdir())


@pytest.mark.parametrize("call", ["preadv", "pwritev"])
def test_a_failing_disk(call, tmp_path, monkeypatch):
    model, optimizer, engine = fused(tmp_path / "weights", num_hidden_layers=6)
    step(model, optimizer, engine)

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    verb = "reading" if call == "preadv" else "writing"
    with pytest.raises(OSError, match=rf"{verb} .*block-0000\d.safetensors failed: Input/output error"):
        for _ in range(2):
            step(model, optimizer, engine)
        engine.home.streamed[0].synchronize()
    monkeypatch.undo()
    with nullcontext() if call == "preadv" else pytest.raises(OSError, match="Input/output error"):
        engine.remove()
    assert not model.lm_head.weight.isnan().any()
    if call == "pwritev":
        refuse_torn(tmp_path / "weights")
    else:  # it failed in a forward pass: the weights are all of one step
        assert json.loads((tmp_path / "weights" / working_copy.MARKER).read_text())["status"] == "complete"


def test_broken_off_in_the_middle_of_a_step(tmp_path):
    model, _, engine = fused(tmp_path / "weights")
    loss = model(**tiny_batch()).loss
    hook = model.model.layers[0].mlp.register_full_backward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.backward(loss)
    hook.remove()
    engine.remove()
    assert not any(value.isnan().any() for value in model.state_dict().values())
    refuse_torn(tmp_path / "weights")


def _interrupt(*args):
    raise KeyboardInterrupt


def test_a_truncated_file(tmp_path):
    model, optimizer, engine = fused(tmp_path / "weights", num_hidden_layers=6)
    os.truncate(tmp_path / "weights" / "block-00005.safetensors", 5000)
    with pytest.raises(OSError, match=r"block-00005.safetensors was truncated"):
        step(model, optimizer, engine)


def test_no_permission(tmp_path, monkeypatch):
    def mkdir(self, *args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(PermissionError, match="no directory for weights can be made at .*: Permission denied"):
        fused(tmp_path / "weights")


def test_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "thesis.txt").write_text("chapter 1")
    with pytest.raises(FileExistsError, match="not empty, and nothing in it will be overwritten"):
        fused(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        fused(tmp_path / "thesis.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def refuse_torn(directory):
    working_copy_files = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    with pytest.raises(lowtide.weights.TornWorkingCopyError, match="a mixture of two steps and are not used"):
        fused(directory)
    assert working_copy_files == {path: path.stat().st_mtime_ns for path in directory.iterdir()}


def test_a_copy_in_use_and_one_that_is_complete(tmp_path):
    _, _, engine = fused(tmp_path / "weights")
    with pytest.raises(FileExistsError, match=f"used by another run .process {os.getpid()}"):
        fused(tmp_path / "weights")
    engine.remove()
    assert json.loads((tmp_path / "weights" / working_copy.MARKER).read_text())["status"] == "complete"
    with pytest.raises(FileExistsError, match="ended in good order"):
        fused(tmp_path / "weights")


def test_killed_at_random_moments(tmp_path):
    """kill -9 in the middle of steps: the source is untouched, and the working copy is known to be torn."""
    source = tiny_model(tie_word_embeddings=False)
    source.save_pretrained(tmp_path / "source")
    digest = _digest(tmp_path / "source")
    (tmp_path / "run.py").write_text(
        textwrap.dedent(f"""
        import os, sys, time, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r}), sys.path.insert(0, {str(Path(__file__).parents[1])!r})
        torch.set_num_threads(1)
        import lowtide
        from helpers import tiny_batch
        from lowtide.models import load_model
        from transformers import AutoModelForCausalLM
        # One process with everything loaded makes the others by forking: seconds saved for each.
        for number in range({NUM_KILLS}):
            pid = os.fork()
            if not pid:
                model = load_model({str(tmp_path / "source")!r}, dtype=torch.float32).train()
                optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
                engine = lowtide.fuse(model, optimizer, weights={str(tmp_path)!r} + f"/weights-{{number}}")
                print("ready", os.getpid(), flush=True)
                while True:
                    engine.backward(model(**tiny_batch()).loss)
                    optimizer.step()
            os.waitpid(pid, 0)
        """)
    )
    moments = random.Random(0)
    with subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, text=True) as parent:
        for _ in range(NUM_KILLS):
            word, pid = parent.stdout.readline().split()
            assert word == "ready"
            time.sleep(moments.uniform(0.0, 0.1))
            os.kill(int(pid), signal.SIGKILL)
        assert parent.wait(60) == 0
    assert _digest(tmp_path / "source") == digest
    for number in range(NUM_KILLS):
        refuse_torn(tmp_path / f"weights-{number}")


NUM_KILLS = 12


def _digest(directory):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


# Between a disk and a GPU -----------------------------------------------------------------------------------------------


def test_staging_moves_whole_blocks_in_pieces(tmp_path):
    """Two buffers a direction, with copies that land late: a buffer that is filled too early would show."""
    size, start = 10 * 4096, 4096
    direct_io.reserve(tmp_path / "file", start + size)
    file = DirectFile(tmp_path / "file")
    lanes = LateLane("to", None), LateLane("from", None)
    for lane in lanes:
        lane.delay_s = 0.002
    staging = Staging(torch.device("cpu"), lanes, buffer_bytes=4 * 4096)
    source = torch.randint(256, (size,), dtype=torch.uint8)
    staging.write(file, start, source)
    assert (tmp_path / "file").read_bytes()[start:] == source.numpy().tobytes()
    target = aligned_buffer(size, torch.device("cpu")).zero_()
    staging.read(file, start, target)
    assert torch.equal(target, source)
