import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import pytest
from rank_pool import RankPool


@pytest.fixture(scope="session")
def pools():
    """Processes of a process group, by how many; made when they are first asked for, and used by all tests of a session."""
    made = {}

    def pool(size):
        if size not in made:
            made[size] = RankPool(size)
        return made[size]

    yield pool
    for each in made.values():
        each.close()
