import datetime
from itertools import pairwise

import pytest
from transformers import PreTrainedTokenizerFast

from lowtide.data import Example, Record, encode_records
from lowtide.data.chat import date_of, fix_date, render_chats
from lowtide.data.loading import tokens_of_records

CHAT = [
    {"role": "system", "content": "Decide."},
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "It is 42."},
    {"role": "user", "content": "Is it low?"},
    {"role": "assistant", "content": "yes"},
]


def text(content):
    return Record("f.txt", 1, text=content)


def pair(prompt, completion):
    return Record("f.jsonl", 7, prompt=prompt, completion=completion)


def chat(messages):
    return Record("f.jsonl", 3, messages=messages)


def encode(records, tokenizer, max_seq_len=512, **options):
    return encode_records(records, tokenizer, max_seq_len, **options)


def encode_one(record, tokenizer):
    (example,), _ = encode([record], tokenizer)
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (-100, token) for token, label in zip(example.input_ids, example.labels, strict=True))
    return example


def trained_parts(example, tokenizer):
    """The text of every run of trained tokens."""
    runs, previous = [], -100
    for label in example.labels:
        if label != -100:
            if previous == -100:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


def context(example):
    """The ids before the first trained token."""
    return example.input_ids[: next(i for i, label in enumerate(example.labels) if label != -100)]


def test_a_text_is_trained_on_whole_and_ended(tokenizer):
    example = encode_one(text("The tide is low."), tokenizer)
    ids = [*tokenizer("The tide is low.")["input_ids"], tokenizer.eos_token_id]
    assert example == Example(ids, [-100, *ids[1:]])


def test_special_tokens_that_the_tokenizer_adds_are_there_once(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    ids = encode_one(text("The tide is low."), tokenizer).input_ids
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    ids = encode_one(text("The tide is low.</s>"), tokenizer).input_ids
    assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id


def test_a_long_text_becomes_pieces_that_predict_every_token_once(tokenizer):
    whole = encode_one(text("The boat is on the sand. " * 9), tokenizer)
    for max_seq_len in (2, 3, 7, len(whole.input_ids) - 1):
        pieces, stats = encode([text("The boat is on the sand. " * 9)], tokenizer, max_seq_len)
        assert [label for piece in pieces for label in piece.labels[1:]] == whole.labels[1:]
        assert all(len(piece.input_ids) <= max_seq_len for piece in pieces)
        assert all(piece.labels == [-100, *piece.input_ids[1:]] for piece in pieces)
        for before, after in pairwise(pieces):
            assert before.input_ids[-1] == after.input_ids[0]
        assert (stats.num_truncated, stats.num_dropped, stats.num_trained_tokens) == (0, 0, len(whole.labels) - 1)


def test_without_splitting_a_long_text_keeps_its_start(tokenizer):
    whole = encode_one(text("The boat is on the sand. " * 9), tokenizer)
    (example,), stats = encode([text("The boat is on the sand. " * 9), text("a")][:1], tokenizer, 7, split_long=False)
    assert example.input_ids == whole.input_ids[:7]
    assert (stats.num_truncated, stats.num_dropped, stats.num_tokens, stats.num_trained_tokens) == (1, 0, 7, 6)


def test_loss_on_the_completion_and_its_end(tokenizer):
    example = encode_one(pair("Is it low? Answer:", " yes"), tokenizer)
    assert context(example) == tokenizer("Is it low? Answer:")["input_ids"]
    assert trained_parts(example, tokenizer) == [" yes<|endoftext|>"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("Is it low? Answer: ", "yes"),
        ("ans", "wer"),
        ("The tide\n", "\nNew"),
        ("größ", "er"),
        ("a", "\n"),
        ("東", "京"),
    ],
)
def test_a_prompt_is_what_inference_sees_whatever_merges_across_its_end(tokenizer, prompt, completion):
    example = encode_one(pair(prompt, completion), tokenizer)
    assert context(example) == tokenizer(prompt)["input_ids"]
    assert trained_parts(example, tokenizer) == [completion + "<|endoftext|>"]


@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("The answer is", " yes"), ("The answer is ", "yes"), ("ans", "wer"), ("Answer:", "yes"), ("low\n", "yes")],
)
def test_sentencepiece_puts_no_blank_before_the_completion(sentencepiece_tokenizer, prompt, completion):
    tokenizer = sentencepiece_tokenizer
    example = encode_one(pair(prompt, completion), tokenizer)
    assert context(example) == tokenizer(prompt)["input_ids"]
    assert tokenizer.decode(example.input_ids, skip_special_tokens=True) == prompt + completion
    assert example.input_ids[-1] == tokenizer.eos_token_id


def test_the_sentencepiece_case_needs_its_care(sentencepiece_tokenizer):
    # What the test above would see if the completion were simply tokenised by itself.
    tokenizer = sentencepiece_tokenizer
    ids = tokenizer("Answer:")["input_ids"] + tokenizer("yes", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "Answer: yes"


def test_an_end_of_sequence_token_that_the_tokenizer_adds_is_taken_off_the_prompt(tokenizer):
    from tokenizers import processors

    eos = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {eos}", special_tokens=[(eos, tokenizer.eos_token_id)]
    )
    example = encode_one(pair("Answer:", " yes"), tokenizer)
    assert tokenizer.decode(example.input_ids) == "Answer: yes<|endoftext|>"
    assert trained_parts(example, tokenizer) == [" yes<|endoftext|>"]
    assert tokenizer.decode(encode_one(text("yes"), tokenizer).input_ids) == "yes<|endoftext|>"


def test_loss_on_assistant_turns_only(tokenizer):
    example = encode_one(chat(CHAT), tokenizer)
    assert trained_parts(example, tokenizer) == ["It is 42.<|im_end|>", "yes<|im_end|>"]
    assert example.input_ids == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert context(example) == tokenizer.apply_chat_template(CHAT[:2], add_generation_prompt=True)["input_ids"]


def test_whatever_follows_the_last_assistant_turn_is_left_out(tokenizer):
    assert encode_one(chat([*CHAT, {"role": "user", "content": "Bye"}]), tokenizer) == encode_one(chat(CHAT), tokenizer)


def weighted(weights):
    """CHAT, whose assistant turns have these weights."""
    left = iter(weights)
    return [{**turn, "weight": next(left)} if turn["role"] == "assistant" else turn for turn in CHAT]


def test_a_turn_of_weight_0_is_context(tokenizer):
    whole = encode_one(chat(CHAT), tokenizer)
    example = encode_one(chat(weighted([0, 1])), tokenizer)
    assert example.input_ids == whole.input_ids
    assert trained_parts(example, tokenizer) == ["yes<|im_end|>"]
    # What follows the last turn that is learnt teaches nothing.
    assert encode_one(chat(weighted([1, 0])), tokenizer) == encode_one(chat(CHAT[:3]), tokenizer)
    assert encode_one(chat(weighted([1, 1])), tokenizer) == whole


def test_a_turn_of_weight_0_is_no_example_of_its_own(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.drops_reasoning)
    (example,), _ = encode([chat(weighted([0, 1]))], tokenizer)
    assert trained_parts(example, tokenizer) == ["<think>\n\n</think>\n\nyes<|im_end|>"]


def test_the_template_is_given_names_but_no_weights(make_tokenizer):
    tokenizer = make_tokenizer(
        "{% for message in messages %}<|im_start|>{{ message.role }} {{ message.name }} {{ 'weight' in message }}\n"
        "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant  False\n{% endif %}"
    )
    example = encode_one(chat([{**CHAT[1], "name": "ann"}, *weighted([0, 1])[2:]]), tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>user ann False\nWhat is the answer?<|im_end|>\n")
    assert trained_parts(example, tokenizer) == ["yes<|im_end|>"]


def test_consecutive_assistant_turns(tokenizer):
    messages = [*CHAT[:3], {"role": "assistant", "content": "Or 43."}]
    example = encode_one(chat(messages), tokenizer)
    assert trained_parts(example, tokenizer) == ["It is 42.<|im_end|>", "Or 43.<|im_end|>"]


@pytest.mark.parametrize("content", ["größer, 東京", "\U0001f600", "ends in a blank ", "a\n\nb", "user\nassistant\n"])
def test_contents_of_many_bytes_and_blanks(tokenizer, content):
    messages = [CHAT[1], {"role": "assistant", "content": content}]
    assert trained_parts(encode_one(chat(messages), tokenizer), tokenizer) == [f"{content}<|im_end|>"]


def test_a_default_system_prompt_is_context(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.default_system)
    example = encode_one(chat(CHAT[1:]), tokenizer)
    assert tokenizer.decode(example.input_ids).startswith("<|im_start|>system\nYou are a helpful assistant.<|im_end|>")
    assert trained_parts(example, tokenizer) == ["It is 42.<|im_end|>", "yes<|im_end|>"]


def test_a_template_without_role_headers(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.alternating)
    example = encode_one(chat(CHAT[1:]), tokenizer)
    assert trained_parts(example, tokenizer) == [" It is 42.<|endoftext|>", " yes<|endoftext|>"]


def test_a_template_without_generation_prompt_leaves_the_header_to_the_model(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.no_generation_prompt)
    example = encode_one(chat(CHAT[:3]), tokenizer)
    assert trained_parts(example, tokenizer) == ["<|im_start|>assistant\nIt is 42.<|im_end|>"]


@pytest.mark.parametrize("trim_offsets", [False, True])
@pytest.mark.parametrize("content", ["yes", "\nyes"])
def test_no_token_reaches_from_the_header_into_the_answer(make_tokenizer, templates, trim_offsets, content):
    tokenizer = make_tokenizer(templates.blank_before_answer, trim_offsets=trim_offsets)
    messages = [*CHAT[1:3], CHAT[3], {"role": "assistant", "content": content}]
    example = encode_one(chat(messages), tokenizer)
    # The newline is all that ends a turn here, so it is trained on.
    assert trained_parts(example, tokenizer) == ["It is 42.\n", f"{content}\n"]
    given = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]
    assert context(example) == given
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_a_newline_at_the_start_of_an_answer_does_not_merge_with_the_header(tokenizer):
    messages = [CHAT[1], {"role": "assistant", "content": "\nyes"}]
    example = encode_one(chat(messages), tokenizer)
    assert trained_parts(example, tokenizer) == ["\nyes<|im_end|>"]
    assert context(example) == tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True)["input_ids"]


def test_sentencepiece_conversations(sentencepiece_tokenizer, templates):
    tokenizer = sentencepiece_tokenizer
    tokenizer.chat_template = templates.blank_before_answer
    example = encode_one(chat(CHAT[1:]), tokenizer)
    assert context(example) == tokenizer.apply_chat_template(CHAT[1:2], add_generation_prompt=True)["input_ids"]
    assert tokenizer.decode(example.input_ids) == tokenizer.apply_chat_template(CHAT[1:], tokenize=False)
    assert trained_parts(example, tokenizer) == ["It is 42.\n", "yes\n"]


def test_a_template_that_rewrites_earlier_turns_gives_an_example_per_turn(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.drops_reasoning)
    examples, stats = encode([chat(CHAT), chat(CHAT[:3])], tokenizer)
    thinking = "<think>\n\n</think>\n\n"
    assert [trained_parts(example, tokenizer) for example in examples] == [
        [f"{thinking}It is 42.<|im_end|>"],
        [f"{thinking}yes<|im_end|>"],
        [f"{thinking}It is 42.<|im_end|>"],
    ]
    assert context(examples[1]) == tokenizer.apply_chat_template(CHAT[:4], add_generation_prompt=True)["input_ids"]
    assert stats.num_records == 2


def test_of_one_conversation_some_examples_are_cut_and_others_not(make_tokenizer, templates):
    """They have different lengths where earlier turns are rewritten."""
    tokenizer = make_tokenizer(templates.drops_reasoning)
    whole, _ = encode([chat(CHAT)], tokenizer)
    length = len(whole[1].input_ids) - 1
    assert len(whole[0].input_ids) <= length
    examples, stats = encode([chat(CHAT)], tokenizer, length)
    assert (len(examples), stats.num_truncated) == (2, 1)
    store = tokens_of_records([chat(CHAT)], tokenizer, length)
    assert store.truncated.tolist() == [False, True] and store.all().stats() == stats


def test_a_template_gets_the_day_that_it_is_told(make_tokenizer):
    tokenizer = make_tokenizer(
        "{{ strftime_now('%d %B %Y %H:%M') }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    )
    now = render_chats([chat(CHAT[:3])], tokenizer)[0][0].text
    assert now.startswith(f"{datetime.date.today():%d %B %Y} 00:00")
    fix_date(tokenizer, "2031-02-03")
    assert render_chats([chat(CHAT[:3])], tokenizer)[0][0].text.startswith("03 February 2031 00:00")
    assert date_of(tokenizer) == datetime.date(2031, 2, 3)


def test_chat_templates_that_cannot_be_trained_on(make_tokenizer, templates):
    with pytest.raises(ValueError, match=r"^f\.jsonl:3: 'messages' need a chat template and this tokenizer has none"):
        encode([chat(CHAT)], make_tokenizer(None))
    with pytest.raises(ValueError, match=r"^f\.jsonl:3: the chat template cannot be trained on: with messages\[2\]"):
        encode([chat(CHAT)], make_tokenizer(templates.prompt_not_in_turn))
    with pytest.raises(
        ValueError, match=r"^f\.jsonl:3: the chat template refuses messages\[:2\] \(roles must alternate"
    ):
        encode([chat(CHAT)], make_tokenizer(templates.alternating))


def test_a_slow_tokenizer_cannot_do_conversations(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(ValueError, match=r"^f\.jsonl:3: 'messages' need a fast tokenizer"):
        encode([chat(CHAT)], tokenizer)


@pytest.mark.parametrize("record", [text("a"), pair("a", "b")])
def test_a_tokenizer_without_end_of_sequence_token_is_refused(tokenizer, record):
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=f"^{record.where}: the tokenizer has no end-of-sequence token"):
        encode([record], bare)


def test_pairs_and_conversations_are_cut_at_their_end_and_counted(tokenizer):
    record = pair("Is it low? Answer:", " yes, it is low and the boat is on the sand.")
    whole = encode_one(record, tokenizer)
    length = len(context(whole)) + 2
    examples, stats = encode([record, pair("a", "b"), record], tokenizer, length)
    assert examples[0] == Example(whole.input_ids[:length], whole.labels[:length])
    assert (stats.num_records, stats.num_truncated, stats.num_dropped, len(examples)) == (3, 2, 0, 3)
    assert stats.num_tokens == sum(len(example.input_ids) for example in examples)
    assert stats.num_trained_tokens == 2 + 2 + 2
    assert encode([chat(CHAT)], tokenizer, 30)[0] == [
        Example(encode_one(chat(CHAT), tokenizer).input_ids[:30], encode_one(chat(CHAT), tokenizer).labels[:30])
    ]


def test_cut_at_the_start_the_answer_is_kept(tokenizer):
    record = pair("Is it low? Answer:", " yes, it is low and the boat is on the sand.")
    whole = encode_one(record, tokenizer)
    length = whole.labels.count(-100) + 2  # two tokens more than the prompt
    examples, stats = encode([record, pair("a", "b")], tokenizer, length, truncation="start")
    assert examples[0].input_ids == whole.input_ids[-length:]
    assert examples[0].labels == [-100, *whole.labels[-length + 1 :]]
    assert (stats.num_truncated, stats.num_dropped) == (1, 0)
    assert examples[1] == encode_one(pair("a", "b"), tokenizer)
    assert (
        encode([chat(CHAT)], tokenizer, 6, truncation="start")[0][0].input_ids
        == encode_one(chat(CHAT), tokenizer).input_ids[-6:]
    )


def test_a_long_prompt_does_not_cost_its_answer(tokenizer):
    record = pair("The boat is on the sand. " * 9, " yes")
    with pytest.raises(ValueError, match="has a token to train on within 8 tokens"):
        encode([record], tokenizer, 8)
    (example,), _ = encode([record], tokenizer, 8, truncation="start")
    assert len(example.input_ids) == 8
    assert trained_parts(example, tokenizer) == [" yes<|endoftext|>"]


def test_the_token_that_begins_a_sequence_is_kept(make_tokenizer, templates):
    tokenizer = make_tokenizer(templates.chatml)
    tokenizer.bos_token = "<|im_start|>"
    record = Record(
        "f.jsonl", 7, messages=[{"role": "user", "content": "low " * 20}, {"role": "assistant", "content": "yes"}]
    )
    whole = encode_one(record, tokenizer)
    assert whole.input_ids[0] == tokenizer.bos_token_id
    (example,), _ = encode([record], tokenizer, 8, truncation="start")
    assert example.input_ids == [whole.input_ids[0], *whole.input_ids[-7:]]
    assert example.labels == [-100, *whole.labels[-7:]]


def test_texts_are_split_whatever_the_truncation(tokenizer):
    record = text("The boat is on the sand. " * 9)
    assert encode([record], tokenizer, 7, truncation="start") == encode([record], tokenizer, 7)


def test_there_are_two_ways_to_truncate(tokenizer):
    with pytest.raises(ValueError, match="truncation must be end or start, got 'middle'"):
        encode([pair("a", "b")], tokenizer, truncation="middle")


def test_what_has_nothing_left_to_train_on_is_dropped_and_counted(tokenizer):
    long = pair("Is it low? Answer:", " yes")
    length = len(context(encode_one(long, tokenizer)))
    examples, stats = encode([long, pair("a", "b")], tokenizer, length)
    assert len(examples) == 1
    assert (stats.num_truncated, stats.num_dropped) == (0, 1)
    with pytest.raises(
        ValueError, match=rf"none of the 1 records \(f.jsonl:7, .* raise --max-seq-len .* {length + 1} or"
    ):
        encode([long], tokenizer, length)
    assert len(encode([long], tokenizer, length + 1)[0]) == 1


def test_order_is_that_of_the_records_across_kinds_and_calls(tokenizer, monkeypatch):
    monkeypatch.setattr("lowtide.data.encoding._RECORDS_PER_CALL", 2)
    records = [text("a"), chat(CHAT), pair("b", "c"), text("d"), text("e"), chat(CHAT[:3]), text("f")]
    examples, _ = encode(records, tokenizer)
    assert examples == [encode_one(record, tokenizer) for record in records]


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match="no records to encode"):
        encode([], tokenizer)
    with pytest.raises(ValueError, match="--max-seq-len must be at least 2"):
        encode([text("a")], tokenizer, 1)
    # The text is the end-of-sequence token itself: one token, which nothing predicts.
    with pytest.raises(ValueError, match="has a token to train on at any length"):
        encode([text("<|endoftext|>")], tokenizer)
