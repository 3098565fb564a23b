import math

import pytest
import torch

from helpers import tiny_batch, tiny_model
from lowtide.evaluation import evaluate_loss, likelihood


def reference(model, batches):
    """Token by token, in float64, from logits of the whole batch."""
    total, count = 0.0, 0
    model.eval()
    for batch in batches:
        with torch.no_grad():
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            log_probs = model(**inputs).logits.double().log_softmax(-1)
        for row in range(len(batch["labels"])):
            for position in range(1, batch["labels"].shape[1]):
                label = batch["labels"][row, position].item()
                if label != -100:
                    total -= log_probs[row, position - 1, label].item()
                    count += 1
    return total / count, count


@pytest.fixture
def batches():
    return [tiny_batch(0, batch_size=4), tiny_batch(1, batch_size=3, seq_len=7), tiny_batch(2, batch_size=1)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "cohere"])
@pytest.mark.parametrize("chunked", [True, False])
def test_is_the_mean_over_all_counted_tokens(family, chunked, batches, monkeypatch):
    model = tiny_model(family)
    if not chunked:
        monkeypatch.setattr(likelihood.ChunkedLoss, "of", classmethod(lambda cls, model: None))
        monkeypatch.setattr(likelihood, "_PIECE_TOKENS", 15)
        monkeypatch.setattr(likelihood, "_FLOAT32_TOKENS", 4)
    expected, count = reference(model, batches)
    result = evaluate_loss(model, batches)
    assert result.loss == pytest.approx(expected, abs=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    assert result.num_tokens == count


def test_does_not_depend_on_the_batches(batches):
    model = tiny_model()
    single = [
        {name: value[row : row + 1] for name, value in b.items()} for b in batches for row in range(len(b["labels"]))
    ]
    together, apart = evaluate_loss(model, batches), evaluate_loss(model, single)
    assert together.loss == pytest.approx(apart.loss, abs=1e-6)
    assert together.num_tokens == apart.num_tokens


@pytest.mark.parametrize("training", [True, False])
def test_leaves_the_model_as_it_was(training, batches):
    model = tiny_model(attention_dropout=0.5).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert evaluate_loss(model, batches) == evaluate_loss(model, batches)  # no dropout
    assert all(module.training is training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(param.grad is None for param in model.parameters())


def test_packed_documents_do_not_see_each_other(monkeypatch):
    model = tiny_model()
    one, two = (torch.randint(3, 90, (1, length)) for length in (6, 4))
    apart = [{"input_ids": ids, "labels": ids} for ids in (one, two)]
    labels = torch.cat((one, two), dim=1)
    labels[0, 6] = -100
    positions = torch.tensor([[*range(6), *range(4)]])
    packed = [{"input_ids": torch.cat((one, two), dim=1), "labels": labels, "position_ids": positions}]
    expected = evaluate_loss(model, apart).loss
    assert evaluate_loss(model, packed).loss == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(likelihood.ChunkedLoss, "of", classmethod(lambda cls, model: None))
    assert evaluate_loss(model, packed).loss == pytest.approx(expected, abs=1e-5)


def test_nothing_counted_is_an_error(batches):
    for batch in batches:
        batch["labels"].fill_(-100)
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluate_loss(tiny_model(), batches)


def test_a_hopeless_loss_has_infinite_perplexity():
    class Certain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids):
            logits = torch.zeros(*input_ids.shape, 3)
            logits[..., 0] = 1000.0
            return type("Output", (), {"logits": logits})

    ids = torch.ones(1, 4, dtype=torch.int64)
    result = evaluate_loss(Certain(), [{"input_ids": ids, "labels": ids}])
    assert (result.loss, result.perplexity, result.num_tokens) == (1000.0, math.inf, 3)
