from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from lowtide.data import Batches, Example, Record, encode_records, pack_lengths, split_held_out

PAD = 0
MAX_SEQ_LEN = 16
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def example(length, first=1, num_untrained=1):
    """``length`` token ids that count up from ``first``, the leading ``num_untrained`` of them not trained on."""
    ids = list(range(first, first + length))
    return Example(ids, [-100] * num_untrained + ids[num_untrained:])


def numbered(lengths):
    """Examples whose token ids all differ, so that one id says where it comes from."""
    examples, first = [], 1
    for length in lengths:
        examples.append(example(length, first))
        first += length
    return examples


def make(examples, *, packing=True, batch_size=2, max_seq_len=MAX_SEQ_LEN, seed=0, **options):
    return Batches(
        examples,
        batch_size=batch_size,
        max_seq_len=max_seq_len,
        pad_token_id=PAD,
        packing=packing,
        seed=seed,
        **options,
    )


def documents(batch):
    """(ids, labels) of every document of a packed batch; the padding of a row comes out as a document of PAD ids."""
    found = []
    for ids, labels, positions in zip(batch["input_ids"], batch["labels"], batch["position_ids"], strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(ids)]
        for start, end in pairwise(starts):
            assert positions[start:end].tolist() == list(range(end - start))
            found.append((ids[start:end].tolist(), labels[start:end].tolist()))
    return found


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, MAX_SEQ_LEN), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
    shuffle=st.booleans(),
)
def test_packing_keeps_every_example_whole_and_once(lengths, batch_size, seed, shuffle):
    examples = numbered(lengths)
    batches = make(examples, batch_size=batch_size, seed=seed, shuffle=shuffle)
    for epoch in (0, 1):
        found, all_batches = [], list(batches.epoch(epoch))
        assert len(all_batches) == len(batches)
        for batch in all_batches:
            assert set(batch) == {"input_ids", "labels", "position_ids"}
            assert all(value.dtype == torch.int64 for value in batch.values())
            assert {value.shape[1] for value in batch.values()} == {MAX_SEQ_LEN}
            found += documents(batch)
        assert all(batch["input_ids"].shape[0] == batch_size for batch in all_batches[:-1])
        assert 1 <= all_batches[-1]["input_ids"].shape[0] <= batch_size
        padding = [(ids, labels) for ids, labels in found if ids[0] == PAD]
        assert all(set(ids) == {PAD} and set(labels) == {-100} for ids, labels in padding)
        kept = [Example(*document) for document in found if document not in padding]
        assert sorted(kept, key=lambda item: item.input_ids) == examples


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(2, MAX_SEQ_LEN), min_size=1, max_size=40),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_padding_keeps_every_example_once(lengths, batch_size, seed):
    examples = numbered(lengths)
    batches = make(examples, packing=False, batch_size=batch_size, seed=seed)
    all_batches = list(batches.epoch(3))
    assert len(all_batches) == len(batches) == -(-len(lengths) // batch_size)
    kept = []
    for batch in all_batches:
        assert set(batch) == {"input_ids", "labels", "attention_mask"}
        longest = int(batch["attention_mask"].sum(1).max())
        assert batch["input_ids"].shape[1] == min(-(-longest // 8) * 8, MAX_SEQ_LEN)
        for ids, labels, mask in zip(*batch.values(), strict=True):
            length = int(mask.sum())
            assert mask.tolist() == [1] * length + [0] * (len(mask) - length)
            assert set(ids[length:].tolist()) <= {PAD} and set(labels[length:].tolist()) <= {-100}
            kept.append(Example(ids[:length].tolist(), labels[:length].tolist()))
    assert sorted(kept, key=lambda item: item.input_ids) == examples


def test_padding_stops_at_the_longest_that_is_allowed():
    shapes = [
        next(make([example(length)], packing=False, max_seq_len=11).epoch(0))["input_ids"].shape[1]
        for length in (2, 8, 9, 11)
    ]
    assert shapes == [8, 8, 11, 11]


def test_the_first_label_of_a_document_is_not_trained_on():
    batches = make([Example([5, 6, 7], [5, 6, 7]), Example([8, 9], [8, 9])], shuffle=False)
    (batch,) = batches.epoch(0)
    assert batch["labels"][0, :5].tolist() == [-100, 6, 7, -100, 9]
    assert batch["position_ids"][0].tolist() == [
        0,
        1,
        2,
        0,
        1,
        *(i % 3 for i in range(11)),
    ]  # padding needs no more positions


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 50), max_size=80))
def test_pack_lengths(lengths):
    sequences = pack_lengths(lengths, 50)
    assert sorted(length for sequence in sequences for length in sequence) == sorted(lengths)
    assert all(0 < sum(sequence) <= 50 for sequence in sequences)
    # No two sequences could have been one: all but at most one are more than half full.
    assert sum(sum(sequence) <= 25 for sequence in sequences) <= 1


def test_packing_fills_best_fit_first():
    assert pack_lengths([3, 4, 6, 7], 10) == [[7, 3], [6, 4]]
    assert pack_lengths([2, 6, 5, 3, 4], 10) == [[6, 4], [5, 3, 2]]


def test_packing_waste():
    assert make(numbered([16, 10, 6, 8])).packing_waste == pytest.approx(8 / 48)
    assert make(numbered([4, 12])).packing_waste == 0
    assert make(numbered([16, 10, 6, 8]), packing=False, batch_size=4).packing_waste == pytest.approx(24 / 64)


@pytest.mark.parametrize("packing", [True, False])
def test_the_order_is_decided_by_seed_and_epoch(packing):
    examples = numbered([5] * 30)

    def order(seed, epoch, **options):
        batches = make(examples, packing=packing, seed=seed, **options)
        return torch.cat([batch["input_ids"].flatten() for batch in batches.epoch(epoch)]).tolist()

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)
    assert order(0, 0, shuffle=False) == order(1, 5, shuffle=False)
    batches = make(examples, packing=packing)
    list(batches.epoch(0))
    again = torch.cat([batch["input_ids"].flatten() for batch in batches.epoch(1)]).tolist()
    assert again == order(0, 1)  # an epoch does not depend on those before it


def test_which_examples_share_a_sequence_changes_with_the_epoch():
    batches = make(numbered([8] * 20), batch_size=10)
    together = [{frozenset(row.tolist()) for row in next(batches.epoch(k))["input_ids"]} for k in (0, 1)]
    assert together[0] != together[1]


def test_sequences_do_not_come_longest_first():
    examples = numbered(range(9, 17))  # no two fit together, so packing gives one sequence a length
    rows = [row for batch in make(examples).epoch(0) for row in batch["input_ids"]]
    lengths = [int((row != PAD).sum()) for row in rows]
    assert sorted(lengths) == list(range(9, 17))
    assert lengths != sorted(lengths, reverse=True)


def test_unshuffled_padded_batches_come_in_the_given_order():
    batches = make(numbered([3, 2, 4, 5, 2]), packing=False, shuffle=False)
    firsts = [row[0] for batch in batches.epoch(0) for row in batch["input_ids"].tolist()]
    assert firsts == [1, 4, 6, 10, 15]


@pytest.mark.parametrize(
    ("examples", "options", "says"),
    [
        ([], {}, "no examples to make batches of"),
        ([example(3)], {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ([example(3), example(17)], {}, "example 1 has 17 tokens, more than max_seq_len = 16; encode"),
        ([Example([1, 2], [1])], {}, "example 0 has 2 token ids but 1 labels"),
        ([example(2), Example([1, 2], [1, -100])], {}, "example 1 has no token to train on"),
    ],
)
def test_refusals(examples, options, says):
    with pytest.raises(ValueError, match=says):
        make(examples, **options)


def test_a_missing_padding_token_is_refused():
    with pytest.raises(ValueError, match="pad_token_id is None; use the end-of-sequence token"):
        Batches([example(3)], batch_size=1, max_seq_len=8, pad_token_id=None, packing=False, seed=0)


@given(num=st.integers(2, 50), fraction=st.floats(0.001, 0.999), seed=st.integers(0, 9))
def test_split_held_out(num, fraction, seed):
    records = list(range(num))
    train, held_out = split_held_out(records, fraction, seed)
    assert sorted(train + held_out) == records
    assert train == sorted(train) and held_out == sorted(held_out)
    assert len(held_out) == min(max(1, round(num * fraction)), num - 1)
    assert (train, held_out) == split_held_out(records, fraction, seed)


def test_split_held_out_depends_on_the_seed_and_refuses():
    assert split_held_out(range(50), 0.2, 0) != split_held_out(range(50), 0.2, 1)
    for fraction in (0, 1, -0.1, 1.5, float("nan")):
        with pytest.raises(ValueError, match="the held-out fraction must lie between 0 and 1"):
            split_held_out([1, 2], fraction, 0)
    for records in ([], [1]):
        with pytest.raises(ValueError, match="at least two are needed"):
            split_held_out(records, 0.5, 0)


def tiny_model(family):
    torch.manual_seed(0)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2))
    # Six layers, so that both sliding-window and full attention occur; the window is shorter than the documents.
    config = Gemma3TextConfig(**SIZES, num_hidden_layers=6, head_dim=8, sliding_window=4)
    model = Gemma3ForCausalLM(config)
    assert set(model.config.layer_types) == {"sliding_attention", "full_attention"}
    return model


def token_losses(model, **batch):
    """[B, S-1] float32: the loss of every next token, 0 where the label is -100."""
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits  # with a cache transformers would not look at position_ids
    losses = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100)
    return losses.view(len(labels), -1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_packed_documents_have_the_losses_that_each_has_alone(family, training):
    model = tiny_model(family).train(training)
    generator = torch.Generator().manual_seed(1)
    examples = []
    for length in (9, 7, 12, 3, 16, 2, 6, 6, 5, 5, 4):
        ids = torch.randint(1, 64, (length,), generator=generator).tolist()
        untrained = length // 3
        examples.append(Example(ids, [-100] * untrained + ids[untrained:]))
    alone = {
        tuple(item.input_ids): token_losses(
            model, input_ids=torch.tensor([item.input_ids]), labels=torch.tensor([[-100, *item.labels[1:]]])
        )[0]
        for item in examples
    }
    num_compared = num_mixed = 0
    for batch in make(examples, batch_size=3).epoch(0):
        losses = token_losses(model, **batch)
        leaky = token_losses(model, input_ids=batch["input_ids"], labels=batch["labels"])
        for row, loss in enumerate(losses):
            starts = [*(batch["position_ids"][row] == 0).nonzero().flatten().tolist(), MAX_SEQ_LEN]
            for start, end in pairwise(starts):
                expected = alone.get(tuple(batch["input_ids"][row, start:end].tolist()))
                if expected is None:
                    assert set(batch["input_ids"][row, start:end].tolist()) == {PAD}
                    continue
                torch.testing.assert_close(loss[start : end - 1], expected, atol=1e-5, rtol=0)
                if start:
                    assert loss[start - 1] == 0  # nothing is predicted across the border
                    num_mixed += not torch.allclose(leaky[row, start : end - 1], expected, atol=1e-3)
                num_compared += 1
    assert num_compared == len(examples)
    assert num_mixed >= 3  # the same comparison without position_ids does see the documents before


@torch.no_grad()
def test_no_token_of_a_document_changes_the_losses_of_another():
    model = tiny_model("llama").train()
    documents = [[3, 4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15, 16, 17]]

    def losses(changed):
        some = [[id + 20 for id in ids] if number == changed else ids for number, ids in enumerate(documents)]
        (batch,) = make([Example(ids, ids) for ids in some], batch_size=1, shuffle=False).epoch(0)
        found = token_losses(model, **batch)[0]
        starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), MAX_SEQ_LEN]
        by_first = {batch["input_ids"][0, a].item(): found[a : b - 1] for a, b in pairwise(starts)}
        return [by_first[ids[0]] for ids in some]

    expected = losses(None)
    for changed in range(len(documents)):
        for number, (before, after) in enumerate(zip(expected, losses(changed), strict=True)):
            assert torch.equal(before, after) == (number != changed)


@torch.no_grad()
def test_padded_and_packed_batches_have_the_same_mean_loss_over_an_epoch(tokenizer):
    model = tiny_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    records = [Record("f", i, prompt="Is it low? " * (i % 3 + 1), completion=f"Answer {i}") for i in range(11)]
    examples, stats = encode_records(records, tokenizer, 64)
    sums = []
    for packing in (True, False):
        batches = make(examples, packing=packing, max_seq_len=64, batch_size=3)
        sums.append(sum(token_losses(model, **batch).double().sum() for batch in batches.epoch(0)))
        counted = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches.epoch(0))
        assert counted == stats.num_trained_tokens
    torch.testing.assert_close(sums[0], sums[1], atol=1e-4, rtol=0)
