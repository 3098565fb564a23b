import pytest
import torch

from lowtide.models import loss as real
from lowtide.planning import head_loss
from lowtide.planning.head_loss import HeadLoss
from lowtide.planning.tracing import MemoryTrace


def peak(function, tokens, vocab, hidden_size, dtype):
    """Bytes of forward and backward at most, beyond hidden states and weight."""
    hidden = torch.empty(tokens, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    weight = torch.empty(vocab, hidden_size, dtype=dtype, device="meta", requires_grad=True)
    trace = MemoryTrace()
    trace.ignore([hidden, weight])
    with trace:
        function(trace, hidden, weight).backward()
    return sum(trace.peak.values())


def stand_in(trace, hidden, weight):
    return HeadLoss.apply(trace, hidden, weight)


def real_loss(trace, hidden, weight):
    labels = torch.empty(hidden.shape[0], dtype=torch.int64, device="meta")
    kept = real._KeptLogits(real._MAX_KEPT_BYTES)
    return real._LinearCrossEntropy.apply(hidden, weight, None, labels, 1.0, None, None, None, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "vocab", "hidden_size"),
    [(1000, 32000, 256), (60, 5000, 512), (8000, 3000, 64), (5000, 50000, 128), (300, 40000, 1024)],
)
def test_it_holds_what_the_real_loss_holds(tokens, vocab, hidden_size, dtype):
    expected = peak(real_loss, tokens, vocab, hidden_size, dtype)
    assert peak(stand_in, tokens, vocab, hidden_size, dtype) == pytest.approx(expected, rel=0.03)


def test_its_constants_are_those_of_the_real_ones():
    ours = (head_loss.MAX_LOGITS, head_loss.MIN_SLICE, head_loss.MAX_KEPT_BYTES)
    assert ours == (real._MAX_LOGITS, real._MIN_SLICE, real._MAX_KEPT_BYTES)
