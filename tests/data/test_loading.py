"""Loading: one pass over files of any size, kept on disk and found again by content."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy
import pytest
from transformers import AutoTokenizer

from lowtide.cache_folder import default_cache_folder
from lowtide.data import encode_records, read_records
from lowtide.data import records as records_module
from lowtide.data.cache import TokenCache
from lowtide.data.encoding import Encoded, Encoder
from lowtide.data.inputs import find_inputs
from lowtide.data.loading import describe, load_tokens
from lowtide.data.records import stream_records
from lowtide.data.store import StoreWriter, TokenStore
from lowtide.data.tokens import IGNORED, Example
from tiny_files import save_tiny_model, write_jsonl

KEY = "0123456789abcdef" * 2
CHAT = [{"role": "user", "content": "Is it low?"}, {"role": "assistant", "content": "yes"}]
ROWS = {
    "text": [{"text": f"the tide is low {n}" * (n + 1)} for n in range(5)],
    "pairs": [{"prompt": f"{n}: ", "completion": "yes" * n} for n in range(1, 5)],
    "chats": [{"messages": CHAT * (n + 1)} for n in range(3)],
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return AutoTokenizer.from_pretrained(save_tiny_model(tmp_path_factory.mktemp("model")))


def entries(cache):
    """What the folder of a cache holds, without the file that says that it is one."""
    return [path for path in cache.folder.iterdir() if path.name != "CACHEDIR.TAG"]


def examples_of(store):
    """The examples of a store, as ``encode_records`` has them."""
    whole = store.all()
    stored = [whole.tokens(number).tolist() for number in range(len(whole))]
    return [
        Example([t if t >= 0 else ~t for t in tokens], [t if t >= 0 else IGNORED for t in tokens]) for tokens in stored
    ]


@pytest.mark.parametrize("kinds", [["text"], ["pairs"], ["chats"], ["text", "pairs", "chats"]])
@pytest.mark.parametrize("max_seq_len", [12, 40, 512])
@pytest.mark.parametrize("cached", [True, False])
def test_it_holds_what_encoding_all_at_once_gives(tokenizer, tmp_path, kinds, max_seq_len, cached):
    files = [write_jsonl(tmp_path / f"{kind}.jsonl", ROWS[kind]) for kind in kinds]
    cache = TokenCache(tmp_path / "cache") if cached else None
    try:
        examples, stats = encode_records(read_records(files), tokenizer, max_seq_len)
    except ValueError as error:
        with pytest.raises(ValueError) as found:
            load_tokens(find_inputs(files), tokenizer, max_seq_len, cache=cache)
        assert str(found.value) == str(error)
        return
    for _ in range(2):
        store = load_tokens(find_inputs(files), tokenizer, max_seq_len, cache=cache)
        assert (store.folder is not None) == cached
        assert examples_of(store) == examples
        assert store.all().stats() == stats
        assert store.info["only_text"] == (kinds == ["text"])
        assert store.info["first"] == str(files[0])
        assert [each["num_records"] for each in store.info["detected"]] == [len(ROWS[kind]) for kind in kinds]


def test_the_second_start_tokenises_nothing(tokenizer, tmp_path, monkeypatch, caplog):
    rows = [{"text": "a", "other": 1}, {"text": "b"}]
    file, cache = write_jsonl(tmp_path / "a.jsonl", rows), TokenCache(tmp_path / "cache")
    load_tokens(find_inputs(file), tokenizer, 32, cache=cache)
    monkeypatch.setattr(Encoder, "encode", None)
    caplog.set_level("INFO", "lowtide.data.records")
    moved = file.rename(tmp_path / "moved.jsonl")
    caplog.clear()
    found = load_tokens(find_inputs(moved), tokenizer, 32, cache=cache)
    # What was said then is said again, with the name of now.
    assert [record.getMessage() for record in caplog.records] == [
        f"{moved}: text (JSON Lines), 2 records",
        f"{moved}: ignoring the keys 'other'",
    ]
    assert found.info["first"] == str(moved)


def test_a_conversation_that_the_template_refuses_is_a_bad_record_among_others(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model"))
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    with_system = [{"role": "system", "content": "Decide."}, *CHAT]
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": each} for each in (CHAT, with_system, CHAT)])
    with pytest.raises(ValueError) as caught:
        load_tokens(find_inputs(file), tokenizer, 512)
    refused = (
        f"{file}:2: the chat template refuses messages[:2] (System role not supported); correct this record, or give another "
        "template with --chat-template FILE"
    )
    assert str(caught.value) == f"{refused}; --bad-records skip leaves such records out"
    for cache in (None, TokenCache(tmp_path / "cache")):
        store = load_tokens(find_inputs(file), tokenizer, 512, skip_bad=True, cache=cache)
        examples, stats = encode_records(read_records(file)[::2], tokenizer, 512)
        assert (examples_of(store), store.all().stats()) == (examples, stats)
        assert (store.info["num_bad"], store.info["bad"]) == (1, [refused])
        assert [each["num_records"] for each in store.info["detected"]] == [2]
    write_jsonl(tmp_path / "d.jsonl", [{"messages": with_system}])
    with pytest.raises(ValueError) as caught:
        load_tokens(find_inputs(file), tokenizer, 512, skip_bad=True)
    assert str(caught.value).startswith(
        f"{file}: no records (all 1 lines are bad; the first: {file}:1: the chat template"
    )


def test_without_a_template_no_record_is_to_blame(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model", chat=False))
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT}])
    for skip_bad in (False, True):
        with pytest.raises(ValueError) as caught:
            load_tokens(find_inputs(file), tokenizer, 512, skip_bad=skip_bad)
        assert str(caught.value) == (
            f"{file}:1: 'messages' need a chat template and this tokenizer has none; use an instruct model, give a template with "
            "--chat-template FILE, or write the data as prompt/completion"
        )


def test_alpaca_as_published_has_empty_outputs_that_can_be_skipped(tokenizer, tmp_path):
    rows = [
        {"instruction": "Add.", "input": "1", "output": output, "text": f"Add. 1 {output}"} for output in ("2", "", "3")
    ]
    file = write_jsonl(tmp_path / "alpaca.jsonl", rows)
    with pytest.raises(ValueError) as caught:
        load_tokens(find_inputs(file), tokenizer, 512)
    empty = f"{file}:2: 'output' is an empty string; correct or remove this record"
    assert str(caught.value) == f"{empty}; --bad-records skip leaves such records out"
    store = load_tokens(find_inputs(file), tokenizer, 512, skip_bad=True)
    assert (store.num_records, store.info["bad"]) == (2, [empty])


def test_left_out_first_turns_are_told_at_every_start(tokenizer, tmp_path, caplog):
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": CHAT[1:] + CHAT}])
    for _ in range(2):
        caplog.clear()
        store = load_tokens(find_inputs(file), tokenizer, 512, cache=TokenCache(tmp_path / "cache"))
        says = "1 conversation begins with an assistant turn, which has no question and is left out"
        assert f"{file}: {says}" in [record.getMessage() for record in caplog.records]
    assert store.all().stats() == encode_records(read_records(file), tokenizer, 512)[1]


def test_what_changes_the_tokens_is_in_the_key(tmp_path):
    def kept(rows=({"text": "the tide"},), max_seq_len=32, name="d.jsonl", skip_bad=False, change=None):
        tokenizer = AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "model"))
        if change is not None:
            change(tokenizer)
        file = write_jsonl(tmp_path / name, rows)
        load_tokens(find_inputs(file), tokenizer, max_seq_len, skip_bad=skip_bad, cache=cache)
        return len(entries(cache))

    cache = TokenCache(tmp_path / "cache")
    assert kept() == 1
    assert kept() == 1
    assert kept(name="other.jsonl") == 1
    assert kept(max_seq_len=31) == 2
    assert kept(rows=[{"text": "the tidf"}]) == 3
    assert kept(skip_bad=True) == 4
    assert kept(change=lambda tokenizer: tokenizer.add_tokens(["tide"])) == 5
    assert kept(change=lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}")) == 6
    assert kept(change=lambda tokenizer: setattr(tokenizer, "eos_token", "<|user|>")) == 7
    dated = "{{ strftime_now('%d') }}{{ messages }}"
    assert kept(change=lambda tokenizer: setattr(tokenizer, "chat_template", dated)) == 8


def test_a_template_with_the_date_is_rendered_anew_tomorrow(tokenizer, tmp_path, monkeypatch):
    import datetime

    from lowtide.data.cache import content_key
    from lowtide.data.chat import fix_date

    inputs = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"]))
    monkeypatch.setattr(tokenizer, "chat_template", "{{ strftime_now('%d') }}")
    now = datetime.date.today()

    class Tomorrow(datetime.date):
        @classmethod
        def today(cls):
            return now + datetime.timedelta(days=1)

    today = content_key(inputs, tokenizer)
    assert content_key(inputs, tokenizer) == today
    monkeypatch.setattr(datetime, "date", Tomorrow)
    assert content_key(inputs, tokenizer) != today
    monkeypatch.setattr(tokenizer, "lowtide_date", None, raising=False)
    fix_date(tokenizer, now.isoformat())  # as a run does that goes on
    assert content_key(inputs, tokenizer) == today


def test_what_is_not_kept_is_not_said_to_be(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    cache, reports = TokenCache(tmp_path / "file" / "cache"), []
    inputs = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"]))
    load_tokens(inputs, tokenizer, 32, cache=cache, on_progress=reports.append)
    assert "tokens are kept in memory" in caplog.text and reports[-1].done
    assert "kept in" not in describe(reports[-1], cache)


def test_a_damaged_entry_is_made_anew(tokenizer, tmp_path, caplog):
    inputs, cache = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), TokenCache(tmp_path / "cache")
    expected = examples_of(load_tokens(inputs, tokenizer, 32, cache=cache))
    (entry,) = entries(cache)
    for damage in (
        lambda: os.truncate(entry / "tokens.bin", 8),
        lambda: (entry / "meta.json").unlink(),
        lambda: (entry / "lengths.npy").write_bytes(b"x"),
        lambda: (entry / "lengths.npy").write_bytes(b""),
        lambda: numpy.save(entry / "records.npy", numpy.zeros(3, numpy.int64)),
        lambda: numpy.save(entry / "records.npy", numpy.load(entry / "records.npy") + 1000),
        lambda: (entry / "meta.json").write_text("{}"),
    ):
        damage()
        caplog.clear()
        assert examples_of(load_tokens(inputs, tokenizer, 32, cache=cache)) == expected
        assert "cannot be used" in caplog.text
        assert entries(cache) == [entry]


def test_two_processes_may_keep_the_same_data_at_once(tokenizer, tmp_path):
    inputs, cache = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), TokenCache(tmp_path / "cache")
    expected = examples_of(load_tokens(inputs, tokenizer, 32))
    first, second, third = (cache.new_folder() for _ in range(3))
    for folder in (first, second, third):
        writer = StoreWriter(folder)
        for number, each in enumerate(expected):
            writer.add(Encoded(number, [each]))
        writer.finish({"n": 1})
    kept = cache.keep(first, KEY)
    again = cache.keep(second, KEY)
    assert again.folder == kept.folder and second.exists()  # what was there is used
    (kept.folder / "meta.json").unlink()
    assert examples_of(cache.keep(third, KEY)) == expected  # what was there is damaged
    assert examples_of(TokenStore.open(kept.folder)) == expected
    for folder in (first, second, third):
        cache.discard(folder)
    assert entries(cache) == [kept.folder]


def test_a_read_only_cache_is_used(tokenizer, tmp_path, monkeypatch):
    inputs, cache = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), TokenCache(tmp_path / "cache")
    load_tokens(inputs, tokenizer, 32, cache=cache)

    def refused(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.utime", refused)
    assert load_tokens(inputs, tokenizer, 32, cache=cache).folder is not None


def test_without_a_home_there_is_no_cache(tokenizer, tmp_path, monkeypatch, caplog):
    for name in ("LOWTIDE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    inputs = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"]))
    assert load_tokens(inputs, tokenizer, 32, cache=TokenCache(default_cache_folder())).folder is None
    assert "kept in memory" in caplog.text


def test_a_slow_tokenizer_is_not_cached(tokenizer, tmp_path, monkeypatch, caplog):
    inputs, cache = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), TokenCache(tmp_path / "cache")
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    assert load_tokens(inputs, tokenizer, 32, cache=cache).folder is None
    assert "slow one" in caplog.text


def test_bad_data_leaves_nothing_behind(tokenizer, tmp_path):
    data, cache = tmp_path / "d.jsonl", TokenCache(tmp_path / "cache")
    data.write_text('{"text": "a"}\n{broken\n')
    with pytest.raises(ValueError, match=r"d\.jsonl:2"):
        load_tokens(find_inputs(data), tokenizer, 32, cache=cache)
    assert entries(cache) == []


def test_what_was_not_used_for_longest_goes_first(tokenizer, tmp_path):
    cache = TokenCache(tmp_path / "cache", limit_bytes=10**9)
    inputs = [find_inputs(write_jsonl(tmp_path / f"{n}.jsonl", [{"text": f"{n}" * 50}])) for n in range(4)]

    def load(number):
        before = set(entries(cache)) if cache.folder.exists() else set()
        load_tokens(inputs[number], tokenizer, 64, cache=cache)
        return next(iter(set(entries(cache)) - before), None)

    kept = [load(0), load(1), load(2)]
    for age, entry in zip((30, 20, 10), kept, strict=True):
        os.utime(entry, (time.time() - age,) * 2)
    load(0)  # used again
    size = sum(path.stat().st_size for path in kept[0].iterdir())
    cache.limit_bytes = round(3.2 * size)
    newest = load(3)
    assert set(entries(cache)) == {kept[0], kept[2], newest}
    cache.limit_bytes = 0
    store = load_tokens(find_inputs(write_jsonl(tmp_path / "5.jsonl", [{"text": "five"}])), tokenizer, 64, cache=cache)
    assert entries(cache) == [store.folder]  # the one in use is kept


def test_leftovers_of_a_killed_process_are_removed_in_time(tokenizer, tmp_path):
    cache = TokenCache(tmp_path / "cache")
    old, new = (cache.folder / f".unfinished-{name}_1234" for name in ("old", "new"))
    for path in (old, new):
        (path / "store").mkdir(parents=True)
    (new / "store" / "tokens.bin").write_bytes(b"1234")  # grows still, however old its folder is
    for path in (old, old / "store", new, new / "store"):
        os.utime(path, (time.time() - 2 * 24 * 3600,) * 2)
    load_tokens(find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), tokenizer, 32, cache=cache)
    assert (old.exists(), new.exists()) == (False, True)


def test_without_a_place_for_the_cache_it_works_in_memory(tokenizer, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    inputs = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"]))
    store = load_tokens(inputs, tokenizer, 32, cache=TokenCache(tmp_path / "file"))
    assert store.folder is None
    assert "kept in memory" in caplog.text
    assert len(store) > 0


def test_a_full_disk_is_named(tokenizer, tmp_path, monkeypatch):
    inputs, cache = find_inputs(write_jsonl(tmp_path / "d.jsonl", ROWS["text"])), TokenCache(tmp_path / "cache")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lowtide.data.store._flush", full)
    with pytest.raises(OSError, match=r"cache.*No space left on device.*data_cache"):
        load_tokens(inputs, tokenizer, 32, cache=cache)
    assert entries(cache) == []


def test_a_disk_that_is_full_from_the_first_byte_on_is_named(tokenizer, tmp_path):
    """The real thing: a file system limit of this process, in another one."""
    program = f"""
import resource, sys
from pathlib import Path
from transformers import AutoTokenizer
from lowtide.data.cache import TokenCache
from lowtide.data.inputs import find_inputs
from lowtide.data.loading import load_tokens
import signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path / "model")!r})
inputs = find_inputs({str(tmp_path / "d.jsonl")!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    load_tokens(inputs, tokenizer, 32, cache=TokenCache(Path({str(tmp_path / "cache")!r})))
except OSError as error:
    print(error)
"""
    tokenizer.save_pretrained(tmp_path / "model")
    write_jsonl(tmp_path / "d.jsonl", [{"text": "the tide " * 200}] * 20)
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "the tokens of the data cannot be kept there (File too large)" in ended.stdout, ended


def test_progress_goes_from_nothing_to_all(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("lowtide.data.encoding._RECORDS_PER_CALL", 10)
    monkeypatch.setattr("lowtide.data.inputs._HASHED_AT_ONCE", 4096)
    files = [write_jsonl(tmp_path / f"{n}.jsonl", [{"text": "the tide " * 50}] * 200) for n in (1, 2)]
    cache, reports = TokenCache(tmp_path / "cache"), []
    load_tokens(find_inputs(files), tokenizer, 32, cache=cache, on_progress=reports.append)
    num_bytes = sum(file.stat().st_size for file in files)
    assert {report.num_bytes for report in reports} == {num_bytes}
    hashed = [report for report in reports if report.hashing]
    assert reports[: len(hashed)] == hashed  # before anything else
    assert len(hashed) > num_bytes / 4096
    read = [report.num_read for report in hashed]
    assert (read[0], read[-1], read) == (4096, num_bytes, sorted(read))
    reports = reports[len(hashed) :]
    read = [report.num_read for report in reports]
    assert read == sorted(read)
    assert 0 < read[0] < num_bytes / 4
    assert len(set(read)) >= 6
    assert reports[-1].num_read == num_bytes
    assert [report.done for report in reports] == [False] * (len(reports) - 1) + [True]
    assert reports[-1].num_tokens == int(TokenStore.open(entries(cache)[0]).lengths.sum())
    assert f"{reports[-1].num_tokens:,} tokens in" in describe(reports[-1], cache)
    assert f"kept in {cache.folder}" in describe(reports[-1], cache)
    reports.clear()
    load_tokens(find_inputs(files), tokenizer, 32, cache=cache, on_progress=reports.append)
    assert [each.hashing for each in reports] == [True] * len(hashed) + [False]
    report = reports[-1]
    assert (report.from_cache, report.done) == (True, True)
    assert "from the cache" in describe(report, cache)


# Long texts -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_pieces(monkeypatch):
    """Texts count as long from 800 bytes on, and are read 100 bytes at a time."""
    monkeypatch.setattr(records_module, "_PIECE", 100)
    monkeypatch.setattr(records_module, "_LONG", 800)


LONG = {
    "lines": "".join(f"line {n}, and what it says\n" for n in range(200)),
    "windows": "".join(f"line {n}, and what it says\r\n" for n in range(200)),
    "paragraphs": "".join(f"p{n}\n\n  and what it says\n\n\n" for n in range(200)),
    "blank lines": "".join(f"Line {n}, and what it says.\n\nAnother.\n\n" for n in range(120)),
    "indented": "".join(f"    line {n} is indented\n" for n in range(200)),
    "no newline": "a word and another " * 200,
    "no blank": "abcdefgh" * 400,
    "wide": "Grüße, 潮が引く。\n" * 150,
}


@pytest.mark.parametrize("kind", LONG)
def test_a_long_text_comes_in_pieces_that_make_up_the_whole(short_pieces, tmp_path, kind):
    path = tmp_path / "long.txt"
    path.write_bytes(b"\xef\xbb\xbf" + LONG[kind].encode())
    expected = LONG[kind].replace("\r\n", "\n")
    pieces = list(stream_records(find_inputs(path)[0]))
    assert "".join(piece.text for piece in pieces) == expected
    assert max(len(piece.text) for piece in pieces) < 1000
    assert [piece.continues for piece in pieces] == [False] + [True] * (len(pieces) - 1)
    assert [piece.continued for piece in pieces] == [True] * (len(pieces) - 1) + [False]
    assert len(pieces) > 2
    (record,) = read_records(path)
    assert (record.text, record.continued, record.continues) == (expected, False, False)
    row = write_jsonl(tmp_path / "long.jsonl", [{"text": "before"}, {"text": expected}, {"text": "behind"}])
    assert [record.text for record in read_records(row)] == ["before", expected, "behind"]
    assert len(list(stream_records(find_inputs(row)[0]))) > 4


@pytest.mark.parametrize("at", [0, 5, 99, 100, 101, 950, -1])
def test_a_bad_byte_in_a_long_text_is_found(short_pieces, tmp_path, at):
    raw = bytearray(LONG["lines"].encode())
    raw[at] = 0xFF if at != -1 else 0xC3  # the beginning of a character that the end of the file cuts off
    path = tmp_path / "long.txt"
    path.write_bytes(raw)
    offset = at % len(raw)
    line = raw[:offset].count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"long\.txt:{line}: byte {offset} \(0x{raw[at]:02x}\) is not valid UTF-8"):
        list(stream_records(find_inputs(path)[0]))


def test_a_long_blank_text_is_empty(short_pieces, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n \n" * 500)
    with pytest.raises(ValueError, match="the file is empty"):
        list(stream_records(find_inputs(path)[0]))


def word_tokenizers():
    """Tokenizers as they are met: byte-level BPE as of GPT-2 and Llama 3, and one that puts a blank before a text."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    corpus = list(LONG.values())
    llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    splits = {
        "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
        "llama3": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(llama3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        "sentencepiece": None,
    }
    for name, split in splits.items():
        tokenizer = Tokenizer(models.BPE(byte_fallback=split is None, unk_token="<unk>"))
        special = ["<unk>", "<s>", "</s>"]
        if split is None:
            prepend, replace = normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")
            tokenizer.normalizer = normalizers.Sequence([prepend, replace])
            alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
            lines = [line for text in corpus for line in text.splitlines()]
            tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=600, special_tokens=special + alphabet))
        else:
            tokenizer.pre_tokenizer = split
            alphabet = pre_tokenizers.ByteLevel.alphabet()
            trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=special, initial_alphabet=alphabet)
            tokenizer.train_from_iterator(corpus, trainer)
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        yield name, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("max_seq_len", [2, 7, 64, 100_000])
@pytest.mark.parametrize("kind", ["lines", "windows", "paragraphs", "blank lines", "indented", "no newline", "wide"])
def test_pieces_have_the_tokens_of_the_whole(short_pieces, tmp_path, kind, max_seq_len, monkeypatch):
    path = tmp_path / "long.txt"
    path.write_bytes(LONG[kind].encode())
    rows = write_jsonl(tmp_path / "b.jsonl", [{"text": "a"}, {"text": LONG[kind]}, {"text": "b"}])
    for name, tokenizer in word_tokenizers():
        if kind in ("windows", "paragraphs", "blank lines", "indented", "no newline") and name == "sentencepiece":
            continue  # trained on one line here, it has tokens of several words, as real ones have not
        for file in (path, rows):
            whole, stats = encode_records(read_records(file), tokenizer, max_seq_len)
            store = load_tokens(find_inputs(file), tokenizer, max_seq_len)
            assert examples_of(store) == whole, name
            assert store.all().stats() == stats
            start, _ = encode_records(read_records(file), tokenizer, max_seq_len, split_long=False)
            pieces = list(stream_records(find_inputs(file)[0]))
            assert encode_records(pieces, tokenizer, max_seq_len, split_long=False)[0] == start


# Memory ---------------------------------------------------------------------------------------------------------------

MEMORY = """
import json, sys
from pathlib import Path
from transformers import AutoTokenizer
from lowtide.data import Batches
from lowtide.data.cache import TokenCache
from lowtide.data.inputs import find_inputs
from lowtide.data.loading import load_tokens
from lowtide.planning import peak_resident_bytes, resident_bytes
import lowtide.data.encoding as encoding
encoding._CHARACTERS_PER_CALL = 2**16  # 6 MB instead of 97, whose scatter would hide what is looked for
model, data, cache = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
tokenizer(["warm up"] * 8)
before = resident_bytes()
store = load_tokens(find_inputs(data), tokenizer, 512, cache=TokenCache(Path(cache)))
batches = Batches(store.all(), batch_size=8, max_seq_len=512, pad_token_id=0, packing=True, seed=0)
next(batches.epoch(0))
print(json.dumps([peak_resident_bytes() - before, len(store), store.num_tokens]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_data(tmp_path):
    model = save_tiny_model(tmp_path / "model")

    def peak(num_records):
        file = tmp_path / f"{num_records}.jsonl"
        with file.open("w") as lines:
            for number in range(num_records):
                lines.write(json.dumps({"prompt": f"{number} " + "p" * 500, "completion": "c" * 300}) + "\n")
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        ended = subprocess.run(
            [sys.executable, "-c", MEMORY, str(model), str(file), str(tmp_path / "cache")],
            capture_output=True, text=True, check=True, env=environment,
        )  # fmt: skip
        return json.loads(ended.stdout.splitlines()[-1])

    small, num_small, _ = peak(2_000)
    large, num_large, num_tokens = peak(32_000)
    assert (num_small, num_large) == (2_000, 32_000)
    # 30000 more records are 25 MB of text and 61 MB of tokens, lists of them ten times that.
    assert large - small < 8_000_000 < 4 * num_tokens
