"""The corpus of broken files, and a short round of ``fuzz.py``: nothing but a clear refusal comes of any of them."""

import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from lowtide.data import read_records
from lowtide.models import load_model
from tiny_files import save_tiny_model

sys.path.insert(0, str(Path(__file__).parent))
import targets

CORPUS = Path(__file__).parent / "corpus"
QUICK = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("good") / "model")


def files(kind):
    found = sorted((CORPUS / kind).iterdir())
    assert found
    return pytest.mark.parametrize("path", found, ids=lambda path: path.name)


@files("records")
def test_records_in_the_corpus(path, work):
    targets.try_records(work, path.read_bytes())
    targets.try_records(work, path.read_bytes(), ".txt")


@files("config")
def test_configs_in_the_corpus(path, work):
    targets.try_config(work, path.read_bytes(), path.suffix)


@files("gguf")
def test_gguf_files_in_the_corpus(path, work):
    targets.try_gguf(work, path.read_bytes())


@files("model")
def test_model_configs_in_the_corpus(path, work, model_dir):
    targets.try_model(work, model_dir, "config.json", path.read_bytes())


@QUICK
@given(data=targets.record_files)
def test_records(work, data):
    targets.try_records(work, data)


@QUICK
@given(data=targets.whole_files | targets.record_files)
def test_records_as_json(work, data):
    targets.try_records(work, data, ".json")


@QUICK
@given(data=targets.table_files)
def test_records_in_tables(work, data):
    targets.try_records(work, data, ".csv")
    targets.try_records(work, data, ".tsv")


@QUICK
@given(data=targets.parquet_files)
def test_records_in_parquet(work, data):
    targets.try_records(work, data, ".parquet")


@QUICK
@given(data=targets.config_files)
def test_configs(work, data):
    targets.try_config(work, data)
    targets.try_config(work, data, ".json")


def test_a_huge_line(tmp_path):
    path = tmp_path / "huge.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * 50_000_000 + b'"}\n{"text": "' + b"y" * 50_000_000)
    with pytest.raises(ValueError, match=":2: malformed JSON") as found:
        read_records(path)
    assert len(str(found.value)) < 500
    assert len(read_records(path, lambda error: None)[0].text) == 50_000_000


# Files of models that are not what they should be ----------------------------------------------------------------------


@pytest.fixture
def copy(model_dir, tmp_path):
    import shutil

    return Path(shutil.copytree(model_dir, tmp_path / "copy"))


def refused(directory, match):
    for lazy in (False, True):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            load_model(str(directory), dtype=torch.float32, lazy=lazy)


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/model.safetensors", "..", 5])
def test_an_index_that_leads_elsewhere_is_refused(name, copy, tmp_path):
    (copy / "model.safetensors").rename(tmp_path / "secret.safetensors")
    index = {"metadata": {}, "weight_map": {"model.embed_tokens.weight": name}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(copy, "does not lie beside it")


@pytest.mark.parametrize("lazy", [False, True])
def test_a_tensor_of_another_shape_is_refused(lazy, copy):
    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight|mismatch"):
        load_model(str(copy), dtype=torch.float32, lazy=lazy)


@pytest.mark.parametrize("lazy", [False, True])
def test_a_missing_tensor_is_refused(lazy, copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's weights, the first is model\.norm\.weight"):
        load_model(str(copy), dtype=torch.float32, lazy=lazy)


def header_of(path):
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def write_header(path, header, data, size=None):
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)


@pytest.mark.parametrize(
    "damage", ["huge size", "no JSON", "overlap", "beyond the end", "negative", "wrong size", "unknown dtype", "hole"]
)
def test_a_header_that_lies_is_refused(damage, copy):
    path = copy / "model.safetensors"
    header, data = header_of(path)
    first, second = [name for name in header if name != "__metadata__"][:2]
    size = None
    if damage == "huge size":
        size = 2**62
    elif damage == "no JSON":
        header = b"\x00" * 64
    elif damage == "overlap":
        header[first]["data_offsets"] = header[second]["data_offsets"]
    elif damage == "beyond the end":
        header[first]["data_offsets"] = [10**12, 10**12 + 4]
    elif damage == "negative":
        header[first]["data_offsets"] = [-4, 0]
    elif damage == "wrong size":
        header[first]["shape"] = [3, *header[first]["shape"]]
    elif damage == "unknown dtype":
        header[first]["dtype"] = "F12"
    elif damage == "hole":
        del header[first]
    write_header(path, header, data, size)
    refused(copy, "is not a whole safetensors file")


def test_a_pickle_is_refused_with_the_reason(copy):
    (copy / "model.safetensors").unlink()
    torch.save({"a": torch.ones(1)}, copy / "pytorch_model.bin")
    refused(copy, "a pickle, which can run any code when it is opened")


def test_a_pickle_as_a_checkpoint_is_no_checkpoint(tmp_path):
    from lowtide.training.checkpoint import read_checkpoint

    torch.save({"optimizer": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError, match="is no checkpoint of lowtide"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no checkpoint of lowtide"):
        read_checkpoint(tmp_path / "checkpoint.pt")
