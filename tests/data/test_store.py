"""The token store: the same examples in memory and on disk, in columns that do not stay in memory."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowtide.data import store as store_module
from lowtide.data import store_files
from lowtide.data.batches import split_held_out
from lowtide.data.encoding import Encoded, TokenStats
from lowtide.data.held_out import split_numbers
from lowtide.data.store import StoreWriter, TokenStore
from lowtide.data.tokens import IGNORED, Example


@pytest.fixture
def short_columns(monkeypatch):
    """Columns are written after 4 numbers and looked at 64 at a time."""
    monkeypatch.setattr(store_module, "_SPILLED", 4)
    for module in (store_module, store_files):
        monkeypatch.setattr(module, "PIECE", 64)


def random_records(num_records, seed=0):
    """Records of no, one or several examples, some in two pieces."""
    rng = random.Random(seed)
    for record in range(num_records):
        for _ in range(rng.choice((1, 1, 1, 2))):
            examples = []
            for _ in range(rng.choice((0, 1, 1, 3))):
                ids = [rng.randrange(1000) for _ in range(rng.randrange(1, 9))]
                examples.append(Example(ids, [IGNORED] + [rng.choice((IGNORED, each)) for each in ids[1:]]))
            yield Encoded(record, examples, [rng.choice((False, True)) for _ in examples], rng.choice((0, 0, 2)))


def written(records, folder=None):
    writer = StoreWriter(folder)
    for each in records:
        writer.add(each)
    return writer.finish({"note": 1})


def signed(example):
    return [each if label != IGNORED else ~each for each, label in zip(example.input_ids, example.labels, strict=True)]


def stats_of(records, chosen):
    """The counts, from the records themselves."""
    taken = [each for each in records if each.record in chosen]
    examples = [example for each in taken for example in each.examples]
    return TokenStats(
        num_records=len(chosen),
        num_tokens=sum(len(each.input_ids) for each in examples),
        num_trained_tokens=sum(len(each.labels) - each.labels.count(IGNORED) for each in examples),
        num_truncated=sum(sum(each.truncated) for each in taken),
        num_dropped=sum(each.num_dropped for each in taken),
    )


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("num_records", [1, 3, 4, 5, 300])
def test_it_gives_what_was_put_in(short_columns, tmp_path, on_disk, num_records):
    records = list(random_records(num_records))
    store = written(records, tmp_path / "store" if on_disk else None)
    flat = [(each.record, example) for each in records for example in each.examples]
    whole = store.all()
    assert [whole.tokens(number).tolist() for number in range(len(whole))] == [signed(each) for _, each in flat]
    assert (len(store), store.num_records, store.info) == (len(flat), num_records, {"note": 1})
    assert store.num_tokens == len(store.tokens)
    assert whole.stats() == stats_of(records, set(range(num_records)))
    tokens = numpy.array([token for _, each in flat for token in signed(each)], dtype="<i4")
    lengths = numpy.array([len(each.input_ids) for _, each in flat], dtype="<i4")
    assert store.digest == hashlib.sha256(tokens.tobytes() + lengths.tobytes()).hexdigest()
    indices = numpy.arange(len(flat), dtype="<i8")
    assert whole.digest() == hashlib.sha256(store.digest.encode() + indices.tobytes()).hexdigest()[:16]


@pytest.mark.parametrize("on_disk", [False, True])
def test_some_records_are_chosen(short_columns, tmp_path, on_disk):
    records = list(random_records(300))
    store = written(records, tmp_path / "store" if on_disk else None)
    for chosen in ([7], range(0, 300, 3), range(300), [299, 5, 0]):
        selection = store.of_records(chosen)
        expected = [signed(example) for each in records if each.record in set(chosen) for example in each.examples]
        assert [selection.tokens(number).tolist() for number in range(len(selection))] == expected
        assert selection.lengths.tolist() == [len(each) for each in expected]
        assert selection.stats() == stats_of(records, set(chosen))
        assert selection.indices.dtype == numpy.int32
    backwards = store.all().among(range(len(store) - 1, -1, -1))
    assert backwards.lengths.tolist() == store.lengths.tolist()[::-1]
    assert backwards.digest() != store.all().digest()


def test_its_files_are_plain_numpy_files(short_columns, tmp_path):
    records = list(random_records(50))
    store, in_memory = written(records, tmp_path / "store"), written(records)
    for name, kind in store_files.COLUMNS.items():
        column = numpy.load(tmp_path / "store" / f"{name}.npy")
        assert column.dtype == kind
        assert numpy.array_equal(column, getattr(in_memory, name))
    again = TokenStore.open(tmp_path / "store")
    assert again.digest == store.digest == in_memory.digest


def test_another_type_of_numbers_is_refused(tmp_path):
    written(random_records(5), tmp_path / "store")
    numpy.save(tmp_path / "store" / "trained.npy", numpy.load(tmp_path / "store" / "trained.npy").astype(float))
    with pytest.raises(ValueError, match=r"trained\.npy holds float64 \[\d+\] instead of int32"):
        TokenStore.open(tmp_path / "store")


@given(st.integers(2, 400), st.floats(0.001, 0.999), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_numbers_are_held_out_as_records_are(number, fraction, seed):
    num_held_out = min(max(1, round(number * fraction)), number - 1)
    held_out = set(random.Random(seed).sample(range(number), num_held_out))
    expected = [sorted(set(range(number)) - held_out), sorted(held_out)]
    assert [each.tolist() for each in split_numbers(number, fraction, seed)] == expected
    assert list(split_held_out(range(number), fraction, seed)) == expected


@pytest.mark.parametrize(
    ("number", "fraction", "says"),
    [(5, 0.0, "between 0 and 1, got 0.0"), (5, 1.0, "between 0 and 1, got 1.0"), (1, 0.5, "1 record.*add data")],
)
def test_what_cannot_be_held_out_is_refused(number, fraction, says):
    with pytest.raises(ValueError, match=says):
        split_numbers(number, fraction, 0)


MEMORY = """
import json, sys
from pathlib import Path
from lowtide.data.encoding import Encoded
from lowtide.data.held_out import split_numbers
from lowtide.data.store import StoreWriter
from lowtide.data.tokens import Example
from lowtide.planning import peak_resident_bytes, resident_bytes
number, folder = int(sys.argv[1]), Path(sys.argv[2])
before = resident_bytes()
writer, example = StoreWriter(folder), Example([5, 6, 7], [-100, 6, 7])
for record in range(number):
    writer.add(Encoded(record, [example]))
store = writer.finish()
train, held_out = (store.of_records(each) for each in split_numbers(number, 0.05, 0))
assert train.stats().num_tokens + held_out.stats().num_tokens == 3 * number
train.digest()
print(json.dumps(peak_resident_bytes() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_short_records_take_little_memory(tmp_path):
    def peak(number):
        command = [sys.executable, "-c", MEMORY, str(number), str(tmp_path / f"{number}")]
        return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout)

    # About 20. With all columns in memory, a copy of each, and a list of the records it was 130.
    assert (peak(250_000) - peak(50_000)) / 200_000 < 50
