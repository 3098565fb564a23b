"""Which token pads, and that one outside of the embedding never gets into a batch."""

from types import SimpleNamespace

import pytest
from torch import nn

from helpers import tiny_model
from lowtide.models.padding import padding_id


def tokens(pad, eos):
    return SimpleNamespace(pad_token_id=pad, eos_token_id=eos)


@pytest.mark.parametrize(
    ("pad", "eos", "expected"),
    [(5, 2, 5), (96, 2, 96), (97, 2, 2), (None, 2, 2), (97, 98, 0), (None, None, 0), (0, 2, 0)],
)
def test_it_is_one_that_the_model_knows(pad, eos, expected):
    assert padding_id(tokens(pad, eos), tiny_model()) == expected


def test_without_a_model_or_an_embedding_it_is_the_tokenizers():
    assert padding_id(tokens(97, 2)) == 97 and padding_id(tokens(97, 2), nn.Linear(2, 2)) == 97
