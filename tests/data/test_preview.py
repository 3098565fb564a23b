"""An example as text again, with what is trained on made visible."""

import pytest

from lowtide.data import Example, Record, encode_records
from lowtide.data.formats import alpaca_prompt
from lowtide.data.preview import example_spans, mark_trained

CHAT = [
    {"role": "user", "content": "What is the answer?"},
    {"role": "assistant", "content": "It is 42, größer."},
    {"role": "user", "content": "Is it low?"},
    {"role": "assistant", "content": "yes"},
]


def preview(record, tokenizer, max_seq_len=512, which=0):
    examples, _ = encode_records([record], tokenizer, max_seq_len)
    return mark_trained(example_spans(examples[which], tokenizer))[0]


def text_of(spans):
    return "".join(span.text for span in spans)


def test_a_conversation(tokenizer):
    assert preview(Record("f", 1, messages=CHAT), tokenizer) == (
        "<|im_start|>user\nWhat is the answer?<|im_end|>\n<|im_start|>assistant\n⟦It is 42, größer.<|im_end|>⟧\n"
        "<|im_start|>user\nIs it low?<|im_end|>\n<|im_start|>assistant\n⟦yes<|im_end|>⟧\n"
    )


def test_a_prompt_and_its_completion(tokenizer):
    record = Record("f", 1, prompt="Is it low? Answer:", completion=" yes,\nit is")
    assert preview(record, tokenizer) == "Is it low? Answer:⟦ yes,\nit is<|endoftext|>⟧"


def test_a_text_is_trained_on_but_for_its_first_token(tokenizer):
    record = Record("f", 1, text="The tide is low.")
    first = tokenizer.decode(tokenizer("The tide is low.")["input_ids"][:1])
    assert preview(record, tokenizer) == f"{first}⟦{'The tide is low.'.removeprefix(first)}<|endoftext|>⟧"


def test_what_does_not_fit_is_not_shown(tokenizer):
    record = Record("f", 1, prompt="Is it low? Answer:", completion=" yes, it is low and the boat is on the sand.")
    examples, _ = encode_records([record], tokenizer, 14)
    shown, _ = mark_trained(example_spans(examples[0], tokenizer))
    assert "<|endoftext|>" not in shown
    assert shown.replace("⟦", "").replace("⟧", "") == tokenizer.decode(examples[0].input_ids)


def test_blanks_of_sentencepiece_stay_where_they_are(sentencepiece_tokenizer, templates):
    tokenizer = sentencepiece_tokenizer
    record = Record("f", 1, prompt="The answer is", completion=" yes it is")
    assert preview(record, tokenizer).replace("<s> ", "<s>") == "<s>The answer is⟦ yes it is</s>⟧"
    tokenizer.chat_template = templates.blank_before_answer
    chat = Record("f", 1, messages=CHAT[2:])
    assert preview(chat, tokenizer) == "user: Is it low?\nassistant: ⟦yes\n⟧"


def test_special_tokens_are_told_apart(tokenizer):
    (example,), _ = encode_records([Record("f", 1, messages=CHAT[2:])], tokenizer, 512)
    spans = example_spans(example, tokenizer)
    assert [span.text for span in spans if span.special] == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert [span.trained for span in spans if span.special] == [False, False, False, True]
    assert text_of(spans) == tokenizer.decode(example.input_ids)


def test_a_cut_inside_of_a_character_shows_on_both_sides(tokenizer):
    ids = tokenizer("\U0001f600", add_special_tokens=False)["input_ids"]
    assert len(ids) > 1
    spans = example_spans(Example(ids, [-100, *ids[1:]]), tokenizer)
    assert [span.trained for span in spans] == [False, True]
    assert all(set(span.text) == {"\ufffd"} for span in spans)


def test_other_marks_where_the_text_has_these(tokenizer):
    record = Record("f", 1, prompt="What is ⟦?", completion=" A bracket.")
    (example,), _ = encode_records([record], tokenizer, 512)
    marked, marks = mark_trained(example_spans(example, tokenizer))
    assert marks == ("⟪", "⟫")
    assert marked == "What is ⟦?⟪ A bracket.<|endoftext|>⟫"


def test_control_characters_are_written_out(tokenizer):
    record = Record("f", 1, prompt="a\x1b[2Jb\tc:", completion="\rd\x9b")
    assert preview(record, tokenizer) == "a\\x1b[2Jb\tc:⟦\\x0dd\\x9b<|endoftext|>⟧"


# Alpaca: the tokenizer's own template, or Alpaca's wording -------------------------------------------------------------------


def alpaca(context):
    question = f"Add the numbers.\n\n{context}" if context else "Add the numbers."
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "3"}]
    return Record("f", 1, messages=messages, instruction=("Add the numbers.", context))


@pytest.mark.parametrize("context", ["", "1 and 2"])
def test_an_alpaca_record_is_a_conversation_where_there_is_a_template(tokenizer, context):
    record = alpaca(context)
    assert encode_records([record], tokenizer, 512) == encode_records(
        [Record("f", 1, messages=record.messages)], tokenizer, 512
    )


@pytest.mark.parametrize(
    ("context", "words"),
    [
        (
            "",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nAdd the numbers.\n\n### Response:\n",
        ),
        (
            "1 and 2",
            "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
            "response that appropriately completes the request.\n\n### Instruction:\nAdd the numbers.\n\n"
            "### Input:\n1 and 2\n\n### Response:\n",
        ),
    ],
)
def test_alpacas_wording_where_there_is_no_template(make_tokenizer, context, words):
    tokenizer = make_tokenizer(None)
    assert alpaca_prompt("Add the numbers.", context) == words
    assert preview(alpaca(context), tokenizer) == f"{words}⟦3<|endoftext|>⟧"
    with pytest.raises(ValueError, match="'messages' need a chat template"):  # of no other conversation it is known
        encode_records([alpaca(context), Record("f", 2, messages=CHAT)], tokenizer, 512)
