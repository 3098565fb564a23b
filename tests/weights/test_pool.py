"""The buffers that streamed weights visit: no larger than needed, and never too small."""

import pytest
import torch
from streaming import train

from helpers import same_weights
from lowtide.weights import streamed
from lowtide.weights.pool import Slot, choose, slot_sizes
from streaming_cpu import stream_on_cpu

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("num_bytes", "uses", "expected"),
    [
        ([10, 4, 4, 4, 4, 10], range(6), [10, 4, 4]),  # embedding, layers, head
        ([10, 4, 4, 4], [0, 1, 2, 3, 0], [10, 4, 4]),  # tied: the embedding is the head, too
        ([10, 4, 10], range(3), [10, 10, 4]),  # one layer: all three follow each other
        ([10, 4], [0, 1, 0], [10, 4]),
        ([4, 9, 5, 8, 4], range(5), [9, 8, 5]),
        ([7], [0], [7]),
        ([3, 3, 3, 3], range(4), [3, 3, 3]),
    ],
)
def test_sizes(num_bytes, uses, expected):
    assert slot_sizes(num_bytes, list(uses)) == expected


def test_any_blocks_that_follow_one_another_fit_at_once():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        num_bytes = torch.randint(1, 9, (7,), generator=generator).tolist()
        sizes = slot_sizes(num_bytes, list(range(7)))
        for start in range(5):
            window = sorted(num_bytes[start : start + 3], reverse=True)
            assert all(size >= wanted for size, wanted in zip(sizes, window, strict=True))


def test_a_large_buffer_is_left_to_the_large_block_that_comes_soon():
    large, small, other = Slot(8192, CPU), Slot(4096, CPU), Slot(4096, CPU)
    small.block, small.last_use, other.block, other.last_use = 1, 1, 2, 2
    assert choose([large, small, other], 4096, soon=8192) is small, "the large one is empty, and needed soon"
    assert choose([large, small, other], 4096, soon=4096) is large
    assert choose([small, other], 8192, soon=0) is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_with_a_large_vocabulary_needs_one_large_buffer(tied, monkeypatch):
    stream_on_cpu(monkeypatch)
    homes, original = [], streamed.StreamedHome.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        homes.append([slot.num_bytes for slot in self._slots])

    monkeypatch.setattr(streamed.StreamedHome, "__init__", init)
    changes = {"num_hidden_layers": 5, "vocab_size": 3000, "tie_word_embeddings": tied}
    expected, _, _ = train("device", changes=changes, num_steps=4, clip_grad_norm=0.3)
    found, _, _ = train("cpu", changes=changes, num_steps=4, clip_grad_norm=0.3)
    assert same_weights(expected, found)
    large, *layers = homes[0]
    assert large >= 3000 * 32 * 4 and len(layers) == 2 and max(layers) < large / 4


def test_uses_in_another_order_than_expected_find_room(monkeypatch):
    """Two large blocks one after the other where none was expected: a buffer grows."""
    stream_on_cpu(monkeypatch)
    monkeypatch.setattr(streamed, "slot_sizes", lambda num_bytes, uses, num_slots: [min(num_bytes)] * 2)
    changes = {"num_hidden_layers": 4, "vocab_size": 3000, "tie_word_embeddings": False}
    expected, _, _ = train("device", changes=changes, num_steps=3)
    found, _, _ = train("cpu", changes=changes, num_steps=3)
    assert same_weights(expected, found)
