"""Helpers of the tests of models: a tokenizer to save beside a tiny model, and what a refusal must look like."""

import json

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers import VOCAB_SIZE

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"


def tiny_tokenizer():
    words = ["<pad>", "<s>", "</s>", *(f"w{index}" for index in range(VOCAB_SIZE - 3))]
    backend = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def one_line(error):
    text = str(error.value)
    assert "\n" not in text and len(text) < 500
    return text


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
