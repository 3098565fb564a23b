import copy
import math
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lowtide.evaluation import ChoiceItem, choice_accuracy, choice_log_likelihoods
from lowtide.evaluation import choices as choices_module

ITEMS = [
    ChoiceItem("Is the tide low?", [" yes", " no", " no idea at all"], 0),
    ChoiceItem("Where is the boat that we came with yesterday?", [" on the sand", " sea"], 1),
    ChoiceItem("2 + 2 =", [" 4", " 5", " 22"], 0),
    ChoiceItem("a", ["b"], 0),
]


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the tide is low yes no no yes"] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.5,  # so that the choices differ widely
    )
    return LlamaForCausalLM(config)


def one_by_one(model, tokenizer, item, choice, normalize, count_end):
    """The plain definition: one sequence, all logits, one token after the other."""
    prompt, answer = tokenizer(item.prompt).input_ids, tokenizer(choice).input_ids
    answer = answer + [tokenizer.eos_token_id] * count_end
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    total = 0.0
    for index, token in enumerate(answer):
        total += torch.log_softmax(logits[len(prompt) + index - 1], -1)[token].item()
    return total / len(answer) if normalize == "per_token" else total


@pytest.mark.parametrize("normalize", ["sum", "per_token"])
@pytest.mark.parametrize("count_end", [False, True])
@pytest.mark.parametrize("piece_tokens", [1, 40, 1024])
def test_equals_one_by_one(model, tokenizer, monkeypatch, normalize, count_end, piece_tokens):
    monkeypatch.setattr(choices_module, "_PIECE_TOKENS", piece_tokens)
    monkeypatch.setattr(choices_module, "_FLOAT32_TOKENS", 3)
    scores = choice_log_likelihoods(model, tokenizer, ITEMS, normalize=normalize, count_end=count_end)
    for item, some in zip(ITEMS, scores, strict=True):
        slow = [one_by_one(model, tokenizer, item, choice, normalize, count_end) for choice in item.choices]
        assert some == pytest.approx(slow, abs=1e-4)


# Computed by hand --------------------------------------------------------------------------------------------------------

BIGRAMS = {  # probability of the next token
    "<end>": {"<end>": 0.25, "q": 0.25, "a": 0.25, "b": 0.25},
    "q": {"<end>": 0.125, "q": 0.125, "a": 0.5, "b": 0.25},
    "a": {"<end>": 0.125, "q": 0.0625, "a": 0.0625, "b": 0.75},
    "b": {"<end>": 0.5, "q": 0.25, "a": 0.125, "b": 0.125},
}


class Bigrams(torch.nn.Module):
    """Knows the last token only."""

    def __init__(self):
        super().__init__()
        table = torch.tensor([[row[token] for token in BIGRAMS] for row in BIGRAMS.values()])
        self.logits = torch.nn.Parameter(table.log() + 7)  # a constant more, as logits may have

    def forward(self, input_ids, attention_mask):
        return SimpleNamespace(logits=self.logits[input_ids])


@pytest.fixture(scope="module")
def letters():
    tokenizer = Tokenizer(models.WordLevel({token: index for index, token in enumerate(BIGRAMS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.mark.parametrize(
    ("normalize", "count_end", "probabilities"),
    [
        ("sum", False, [0.5, 0.375]),  # P(a|q) = 1/2, and P(a|q) P(b|a) = 1/2 * 3/4
        ("per_token", False, [0.5, 0.6124]),  # the square root of 0.375
        ("sum", True, [0.0625, 0.1875]),  # 1/2 * 1/8, and 3/8 * 1/2
        ("per_token", True, [0.25, 0.5724]),  # the square root, and the cube root
    ],
)
def test_probabilities_computed_by_hand(letters, normalize, count_end, probabilities):
    item = ChoiceItem("q", ["a", "ab"], 1)
    (found,) = choice_log_likelihoods(Bigrams(), letters, [item], normalize=normalize, count_end=count_end)
    assert [math.exp(each) for each in found] == pytest.approx(probabilities, abs=5e-5)
    likeliest = probabilities.index(max(probabilities))
    result = choice_accuracy(Bigrams(), letters, [item], normalize=normalize, count_end=count_end)
    assert (result.predictions, result.accuracy) == ([likeliest], float(likeliest == 1))


def test_prompts_beyond_the_context_lose_their_beginning(tokenizer, caplog):
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_head=4, n_layer=2, n_positions=12, initializer_range=0.5
    )
    model = GPT2LMHeadModel(config).eval()
    short = ChoiceItem("is low", [" yes", " no"], 0)
    for choices in ([" yes", " no"], [" yes no", " idea"]):
        item = ChoiceItem("a sea " * 9 + "is low", choices, 0)
        (found,) = choice_log_likelihoods(model, tokenizer, [item])
        for choice, value in zip(choices, found, strict=True):
            prompt, answer = tokenizer(item.prompt).input_ids, tokenizer(choice).input_ids
            row = (prompt + answer)[-12 - 1 :]  # the last one is predicted, and not given
            with torch.no_grad():
                logits = model(torch.tensor([row[:-1]])).logits[0].double().log_softmax(-1)
            expected = sum(logits[index - len(answer), token].item() for index, token in enumerate(answer))
            assert value == pytest.approx(expected, abs=1e-4)
    assert "2 of 2 prompts with a choice are longer than the context of the model, 12 tokens" in caplog.text
    caplog.clear()
    choice_log_likelihoods(model, tokenizer, [short])
    assert not caplog.text
    with pytest.raises(ValueError, match=r"item 0.*a choice of \d+ tokens, and the context of the model has 12"):
        choice_log_likelihoods(model, tokenizer, [ChoiceItem("a", ["sea " * 20], 0)])


def test_a_config_need_not_be_of_transformers(model, tokenizer):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, SimpleNamespace(size=3)

        def forward(self, **inputs):
            return self.inner(**inputs)

    assert choice_log_likelihoods(Plain(), tokenizer, ITEMS) == choice_log_likelihoods(model, tokenizer, ITEMS)


def test_the_token_that_begins_a_sequence_stays(tokenizer):
    """Rows as they are made: the prompt without its middle."""
    begins = copy.deepcopy(tokenizer)
    begins.bos_token = "<end>"
    rows = choices_module._rows([ChoiceItem("<end>" + "sea " * 9, [" yes"], 0)], begins, False, 8)
    assert rows[0].input_ids[0] == tokenizer.eos_token_id
    assert len(rows[0].input_ids) == 8 and rows[0].first_position == 7


def test_accuracy_counts_the_items_whose_likeliest_choice_is_right(model, tokenizer):
    scores = choice_log_likelihoods(model, tokenizer, ITEMS)
    best = [max(range(len(some)), key=some.__getitem__) for some in scores]
    right = [ChoiceItem(item.prompt, item.choices, index) for item, index in zip(ITEMS, best, strict=True)]
    result = choice_accuracy(model, tokenizer, right)
    assert (result.accuracy, result.num_items, result.predictions) == (1.0, 4, best)
    wrong_first = [ChoiceItem(ITEMS[0].prompt, ITEMS[0].choices, (best[0] + 1) % 3), *right[1:]]
    assert choice_accuracy(model, tokenizer, wrong_first).accuracy == 0.75


def test_per_token_and_sum_can_disagree(model, tokenizer):
    item = ITEMS[0]
    (total,), (mean,) = (
        choice_log_likelihoods(model, tokenizer, [item], normalize=name) for name in ("sum", "per_token")
    )
    lengths = [len(tokenizer(choice).input_ids) for choice in item.choices]
    assert mean == pytest.approx([some / length for some, length in zip(total, lengths, strict=True)])


def test_choices_of_one_token_share_one_row(model, tokenizer):
    yes, no = (len(tokenizer(choice).input_ids) for choice in (" yes", " no"))
    assert yes == no == 1
    item = ChoiceItem("Is the tide low?", [" yes", " no"], 0)
    rows = []

    def record(module, args, kwargs):
        rows.append(kwargs["input_ids"].shape[0])

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        choice_log_likelihoods(model, tokenizer, [item] * 3)
    finally:
        handle.remove()
    assert rows == [1]


def test_only_the_needed_positions_get_logits(model, tokenizer):
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: shapes.append(output.shape[1]))
    try:
        choice_log_likelihoods(model, tokenizer, [ITEMS[2]])
    finally:
        handle.remove()
    longest = max(len(tokenizer(choice).input_ids) for choice in ITEMS[2].choices)
    assert shapes == [longest]


def test_a_model_that_cannot_leave_logits_out_gives_the_same(model, tokenizer):
    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask)

    expected = choice_log_likelihoods(model, tokenizer, ITEMS)
    for some, wanted in zip(choice_log_likelihoods(Plain(), tokenizer, ITEMS), expected, strict=True):
        assert some == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(model, tokenizer, training):
    model.train(training)
    choice_accuracy(model, tokenizer, ITEMS)
    assert model.training is training
    model.eval()


@pytest.mark.parametrize(
    ("items", "options", "message"),
    [
        ([], {}, "nothing to score"),
        ([ChoiceItem("a", [], 0)], {}, "item 0: gold is 0, but there are 0 choices"),
        ([ChoiceItem("a", ["b"], 1)], {}, "item 0: gold is 1, but there are 1 choices"),
        ([ChoiceItem("", ["b"], 0)], {}, "item 0: the prompt is empty"),
        (ITEMS, {"normalize": "mean"}, "normalize must be one of sum, per_token, got 'mean'"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, tokenizer, items, options, message):
    with pytest.raises(ValueError, match=message):
        choice_accuracy(model, tokenizer, items, **options)
