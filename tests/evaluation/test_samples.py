"""Answers to held-out prompts: which prompts, and that taking them leaves no trace in the model."""

import pytest
import torch

import lowtide
from helpers import tiny_batch, tiny_model
from lowtide.data import Batches
from lowtide.data.tokens import IGNORED, Example
from lowtide.evaluation import Sample, answer_samples, choose_samples
from lowtide.evaluation.samples import MAX_NEW_TOKENS
from lowtide.models import load_model, load_tokenizer
from tiny_files import save_tiny_model


def batches(*examples):
    return Batches(examples, batch_size=2, max_seq_len=2048, pad_token_id=0, packing=False, seed=0, shuffle=False)


def answer(num_prompt, num_answer):
    ids = list(range(5, 5 + num_prompt + num_answer))
    return Example(ids, [IGNORED] * num_prompt + ids[num_prompt:])


def text(length):
    return answer(1, length - 1)


def test_the_prompt_is_what_comes_before_the_first_part_that_is_learnt():
    (sample,) = choose_samples(batches(answer(4, 3)), 5)
    assert sample == Sample([5, 6, 7, 8], [9, 10, 11])


def test_of_a_conversation_the_first_turn():
    ids = list(range(10, 20))
    labels = [IGNORED] * 3 + ids[3:5] + [IGNORED] * 3 + ids[8:]
    (sample,) = choose_samples(batches(Example(ids, labels)), 1)
    assert sample == Sample([10, 11, 12], [13, 14])


@pytest.mark.parametrize(("length", "num_prompt"), [(2, 1), (10, 5), (500, 24)])
def test_of_plain_text_the_beginning(length, num_prompt):
    (sample,) = choose_samples(batches(text(length)), 1)
    assert len(sample.prompt) == num_prompt
    assert len(sample.expected) == min(length - num_prompt, MAX_NEW_TOKENS)


def test_prompts_that_are_too_long_are_passed_over():
    found = choose_samples(batches(answer(600, 3), answer(100, 3), answer(8, 3), answer(7, 2), answer(6, 2)), 2)
    assert [len(sample.prompt) for sample in found] == [100, 8]
    found = choose_samples(batches(answer(100, 3), answer(8, 3)), 2, max_tokens=8 + MAX_NEW_TOKENS)
    assert [len(sample.prompt) for sample in found] == [8]
    assert choose_samples(batches(answer(8, 3)), 2, max_tokens=MAX_NEW_TOKENS) == []


def test_the_same_prompt_is_not_asked_twice():
    found = choose_samples(batches(answer(4, 3), answer(4, 3), answer(5, 3)), 3)
    assert [len(sample.prompt) for sample in found] == [4, 5]


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    directory = save_tiny_model(tmp_path_factory.mktemp("samples") / "model")
    return load_model(directory, dtype=torch.float32), load_tokenizer(directory)


def ids_of(tokenizer, prompt):
    return tokenizer(prompt)["input_ids"]


def test_in_a_batch_each_is_answered_as_if_alone(opened):
    model, tokenizer = opened
    samples = [Sample(ids_of(tokenizer, prompt), []) for prompt in ("a", "a much longer prompt", "say b:")]
    together = answer_samples(model, tokenizer, samples, "cpu")
    assert together == [answer_samples(model, tokenizer, [sample], "cpu")[0] for sample in samples]
    assert len(set(together)) > 1


def test_modes_weights_and_random_state_stay(opened):
    model, tokenizer = opened
    model.train()
    model.model.layers[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    model.generation_config.do_sample, model.generation_config.temperature = True, 5.0
    samples = [Sample(ids_of(tokenizer, "say a:"), [])]
    assert answer_samples(model, tokenizer, samples, "cpu") == answer_samples(model, tokenizer, samples, "cpu")
    assert torch.equal(state, torch.get_rng_state())
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("home", ["device", "disk"])
def test_a_fused_model_answers_and_goes_on_training(home, tmp_path):
    """Bit for bit as one that was not asked."""
    weights = []
    for asked in (True, False):
        model = tiny_model("llama")
        optimizer = lowtide.Lomo(model.parameters(), lr=0.05)
        where = "device" if home == "device" else str(tmp_path / str(asked))
        engine = lowtide.fuse(model, optimizer, weights=where)
        for step in range(3):
            if asked:
                assert len(answer_samples(model, Letters(), [Sample([3, 4], []), Sample([5], [])], "cpu")) == 2
            engine.backward(model(**tiny_batch(step)).loss)
            optimizer.step()
        engine.remove()
        weights.append([param.detach().clone() for param in model.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))


class Letters:
    """As much of a tokenizer as is needed."""

    pad_token_id, eos_token_id = 0, 2

    def batch_decode(self, rows, skip_special_tokens):
        return ["".join(map(chr, row.tolist())) for row in rows]
