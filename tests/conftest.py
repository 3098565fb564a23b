"""Fixtures for all tests. Plain helpers live in ``helpers.py``, which tests import by that name."""

import os
import sys
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch

# Without a card the kernels run in Triton's interpreter. It must be asked for before anything imports Triton.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """Two threads are noisy and no faster on tensors this small."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def own_token_cache(tmp_path_factory):
    """Nothing is left in the cache of whoever runs the tests, and nothing is found there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOWTIDE_CACHE", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
