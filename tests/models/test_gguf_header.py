import struct

import gguf
import pytest
from gguf_files import byte_vocabulary, write_gguf
from model_helpers import one_line
from test_gguf import tiny_source

from lowtide.models.gguf_header import read_header


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", tiny_source("llama"), "llama", "Q8_0")


def test_agrees_with_the_package_gguf(path):
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert header.architecture == "llama"
    assert list(header.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        entry = header.tensors[tensor.name]
        assert entry.offset == tensor.data_offset
        assert entry.ggml_type == tensor.tensor_type
        assert entry.shape == tuple(reversed([int(size) for size in tensor.shape]))
        assert entry.num_rows * entry.row_bytes == tensor.n_bytes
    own = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert header.metadata == own
    assert header.metadata["tokenizer.ggml.tokens"] == byte_vocabulary()[0]


def test_every_kind_of_value_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    for kind, value in [("uint8", 200), ("int8", -5), ("uint16", 60000), ("int16", -6), ("uint32", 4), ("int32", -7)]:
        getattr(writer, f"add_{kind}")(kind, value)
    writer.add_uint64("uint64", 2**60)
    writer.add_int64("int64", -(2**60))
    writer.add_float32("float32", 0.5)
    writer.add_float64("float64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("words", ["a", "日本"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata = read_header(tmp_path / "v.gguf").metadata
    assert metadata["uint8"] == 200 and metadata["int8"] == -5 and metadata["int16"] == -6
    assert metadata["uint64"] == 2**60 and metadata["int64"] == -(2**60)
    assert metadata["float64"] == 0.1 and metadata["bool"] is True
    assert metadata["numbers"] == [1, 2, 3] and metadata["words"] == ["a", "日本"]


def test_no_such_file(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        read_header(tmp_path / "no.gguf")
    assert "does not exist" in one_line(error)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "not a GGUF file"),
        (b"PK\x03\x04 a zip", "not a GGUF file"),
        (b"GGUF", "damaged or incomplete"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3), "version 50331648"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62), "damaged or incomplete"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99), "damaged"),
    ],
)
def test_what_is_no_gguf_file_is_refused(tmp_path, content, text):
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ValueError) as error:
        read_header(tmp_path / "x.gguf")
    assert text in one_line(error) and "x.gguf" in one_line(error)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_cut_file_is_refused_wherever_it_is_cut(tmp_path, path, share):
    whole = path.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ValueError, match="incomplete"):
        read_header(tmp_path / "cut.gguf")


def test_a_part_of_a_split_model_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "llama")
    writer.add_uint16("split.count", 3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="llama-gguf-split --merge"):
        read_header(tmp_path / "part.gguf")
