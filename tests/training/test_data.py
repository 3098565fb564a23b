import logging

import pytest
from transformers import AutoTokenizer

from lowtide.data import encode_records, read_records, split_held_out
from lowtide.data.cache import TokenCache
from lowtide.training.data import find_data, load_data, token_cache
from superglue_files import write_rte
from tiny_files import write_jsonl


@pytest.fixture
def tokenizer(model_dir):
    return AutoTokenizer.from_pretrained(model_dir)


def examples_of(batches):
    """The ids of every example, without padding."""
    return sorted(
        tuple(ids[: mask.sum()].tolist())
        for batch in batches.epoch(0)
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    )


def test_held_out_records_come_from_the_training_data_or_from_their_own(make_config, tokenizer, tmp_path):
    config = make_config(eval_fraction=0.25)
    records = read_records(config.data)
    chosen, kept_back = split_held_out(records, 0.25, config.data_seed)
    assert (len(chosen), len(kept_back)) == (48, 16)
    data = load_data(config, tokenizer)
    for batches, expected in ((data.train, chosen), (data.held_out, kept_back)):
        examples, _ = encode_records(expected, tokenizer, config.max_seq_len)
        assert examples_of(batches) == sorted(tuple(example.input_ids) for example in examples)
    assert data.stats == encode_records(chosen, tokenizer, config.max_seq_len)[1]
    own = write_jsonl(tmp_path / "eval.jsonl", [{"prompt": "x", "completion": "y"}])
    data = load_data(make_config(eval_data=[str(own)]), tokenizer)
    assert (len(examples_of(data.train)), len(examples_of(data.held_out))) == (64, 1)
    assert load_data(make_config(eval_fraction=0), tokenizer).held_out is None


def test_what_is_held_out_follows_the_data_seed_alone(make_config, tokenizer, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {number}\n" for number in range(400)))
    for changes in ({"data": [str(book)]}, {}):

        def held_out(seed, data_seed, changes=changes):
            config = make_config(eval_fraction=0.25, seed=seed, data_seed=data_seed, **changes)
            found = load_data(config, tokenizer).held_out
            return [list(found.example(number)[0]) for number in range(found.num_examples)]

        assert held_out(0, 0) == held_out(1, 0) != held_out(0, 1)


def test_prompts_that_are_too_long_keep_their_answer_if_asked_to(make_config, tokenizer, tmp_path):
    data = write_jsonl(
        tmp_path / "d.jsonl", [{"prompt": "p" * 40, "completion": "y"}, {"prompt": "x", "completion": "y"}] * 3
    )
    counts = {}
    for truncation in ("end", "start", "end", "start"):  # the cache of one is not that of the other
        config = make_config(
            data=[str(data)], max_seq_len=16, truncation=truncation, eval_fraction=0, data_cache=str(tmp_path)
        )
        found = load_data(config, tokenizer)
        counts.setdefault(truncation, []).append(
            (found.train.num_examples, found.stats.num_truncated, found.stats.num_dropped)
        )
    assert counts == {"end": [(3, 0, 3)] * 2, "start": [(6, 3, 0)] * 2}


def test_no_prompt_of_a_task_costs_its_answer(make_config, tokenizer, tmp_path):
    folder = write_rte(tmp_path / "SuperGLUE")
    config = make_config(task="superglue/rte", data=[str(folder)], max_seq_len=16)
    data = load_data(config, tokenizer)
    assert data.stats.num_dropped == 0
    assert data.stats.num_truncated == data.train.num_examples > 0
    ids, trained = data.train.example(0)
    assert len(ids) == 16
    assert tokenizer.decode([i for i, t in zip(ids, trained, strict=True) if t]) in (" Yes<|end|>", " No<|end|>")


def test_a_single_record_cannot_be_held_out(make_config, tokenizer, tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(ValueError, match=r"one\.jsonl has a single record.*eval_fraction"):
        load_data(make_config(data=[str(one)]), tokenizer)


def test_a_part_without_anything_to_learn_is_refused(make_config, tokenizer, tmp_path):
    rows = [{"prompt": "p" * 40, "completion": "y"}] * 9 + [{"prompt": "x", "completion": "y"}]
    data = write_jsonl(tmp_path / "d.jsonl", rows)
    with pytest.raises(ValueError, match=r"none of the 1 records that were drawn to evaluate.*--max-seq-len"):
        load_data(make_config(data=[str(data)], max_seq_len=16), tokenizer)
    data = write_jsonl(tmp_path / "d.jsonl", rows[:9])
    with pytest.raises(ValueError, match=r"none of the 9 records \(.*the shortest prompt needs 41 or more"):
        load_data(make_config(data=[str(data)], max_seq_len=16), tokenizer)


def test_passages_of_a_long_text_are_held_out(make_config, tokenizer, tmp_path):
    book = tmp_path / "book.txt"
    book.write_text("".join(f"line {number}\n" for number in range(400)))
    data = load_data(make_config(data=[str(book)]), tokenizer)
    num_held_out = sum(len(batch["input_ids"]) for batch in data.held_out.epoch(0))
    num_train = sum(len(batch["input_ids"]) for batch in data.train.epoch(0))
    assert num_held_out / (num_held_out + num_train) == pytest.approx(0.1, abs=0.03)
    book.write_text("short")
    with pytest.raises(ValueError, match=r"book\.txt is too short"):
        load_data(make_config(data=[str(book)]), tokenizer)


@pytest.mark.parametrize(("packing", "packed"), [(None, (True, False)), (True, (True, True)), (False, (False, False))])
def test_text_is_packed_and_prompts_are_padded_unless_asked_otherwise(
    make_config, tokenizer, tmp_path, packing, packed
):
    text = write_jsonl(tmp_path / "text.jsonl", [{"text": f"some text {number}"} for number in range(30)])
    for changes, expected in (({"data": [str(text)]}, packed[0]), ({}, packed[1])):
        batch = next(load_data(make_config(packing=packing, **changes), tokenizer).train.epoch(0))
        assert ("position_ids" in batch) is expected


def test_skipped_records_are_told_of_at_every_start(make_config, tokenizer, tmp_path, caplog):
    data = tmp_path / "d.jsonl"
    good = '{"prompt": "a", "completion": "b"}\n'
    data.write_text(good * 3 + "{broken\n" * 12)
    config = make_config(data=[str(data)], bad_records="skip")
    for _ in range(2):
        caplog.clear()
        assert load_data(config, tokenizer).num_skipped == 12
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == 11
        assert lines[0].startswith(f"skipped: {data}:4: malformed JSON")
        assert lines[-1] == "12 of 15 records were skipped (the first 10 are named above)"
    with pytest.raises(ValueError, match=r"d\.jsonl:4"):
        load_data(make_config(data=[str(data)]), tokenizer)


def test_missing_data_is_noticed_before_anything_is_loaded(make_config):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        find_data(make_config(data=["nowhere.jsonl"]))
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl"):
        find_data(make_config(eval_data=["nowhere.jsonl"]))


def test_where_tokens_are_kept(make_config, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setenv("LOWTIDE_CACHE", str(tmp_path / "env"))
    assert token_cache(make_config()).folder == tmp_path / "env" / "tokens"
    monkeypatch.delenv("LOWTIDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert token_cache(make_config()).folder == tmp_path / "xdg" / "lowtide" / "tokens"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert token_cache(make_config()).folder == tmp_path / "home" / ".cache" / "lowtide" / "tokens"
    assert token_cache(make_config(data_cache="none")) is None
    own = token_cache(make_config(data_cache=str(tmp_path / "own"), data_cache_size="3MB"))
    assert (own.folder, own.limit_bytes) == (tmp_path / "own" / "tokens", 3_000_000)
    assert TokenCache(tmp_path).limit_bytes == make_config().data_cache_size_bytes
    with pytest.raises(ValueError, match="data_cache_size"):
        make_config(data_cache_size="big").validate()
    # With and without, the batches are the same.
    cached, fresh = (load_data(make_config(data_cache=str(name)), tokenizer).train for name in (tmp_path / "c", "none"))
    assert cached.fingerprint == fresh.fingerprint
    assert list((tmp_path / "c" / "tokens").iterdir())
