"""Tiny real tokenizers, trained here in a moment, and the chat templates that the tests need."""

import json
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The tide is low and the boat is on the sand.",
    "What is the answer? The answer is yes, it is 42.",
    "user asks, assistant answers, system decides\n\nNew paragraph: größer, 東京, \U0001f600!",
    "Question: is it low? Answer: yes. Question: is it high? Answer: no.",
] * 3

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = SimpleNamespace(
    chatml=CHATML,
    # SmolLM2 and Qwen2.5 write a system prompt where there is none.
    default_system=(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        + CHATML
    ),
    # Qwen3 shows the reasoning of the last turn only.
    drops_reasoning=(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ message.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Generation starts inside a reasoning block that the rendered turn does not have (DeepSeek-R1).
    prompt_not_in_turn=CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}"),
    # The generation prompt ends in a blank, which a tokenizer merges with the answer's first word.
    blank_before_answer=(
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    no_generation_prompt=CHATML.split("{% if add")[0],
    alternating=(
        "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message.role == 'user' %}[INST] {{ message.content }} [/INST]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    ),
)


@pytest.fixture(scope="session")
def templates():
    return TEMPLATES


def _byte_level(add_prefix_space=False, trim_offsets=False):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@pytest.fixture
def make_tokenizer():
    """Byte-level BPE as GPT-2, Llama 3, Qwen and SmolLM2 have it, with a chat template."""

    def make(chat_template=None, **options):
        return PreTrainedTokenizerFast(
            tokenizer_object=_byte_level(**options),
            eos_token="<|endoftext|>",
            additional_special_tokens=["<|im_start|>", "<|im_end|>"],
            chat_template=chat_template,
        )

    return make


@pytest.fixture
def tokenizer(make_tokenizer):
    return make_tokenizer(CHATML)


@pytest.fixture
def sentencepiece_tokenizer():
    """Llama 2's arrangement: a blank put before every text, blanks as U+2581, bytes as a fallback, BOS added."""
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    # Newlines are bytes to Llama 2, so none of them may get into the vocabulary as characters.
    lines = [line.replace("\n", " ") for line in LINES]
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=500, special_tokens=special + byte_tokens, show_progress=False)
    )
    # The trainer makes special tokens of the bytes too, which decoding would leave out: take over its model alone.
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Tokenizer(models.BPE(model["vocab"], merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizer
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
