"""Agreement where there is nobody to agree with; with several processes it is tested in sharded/."""

import pytest

from lowtide.ranks import ALONE


@pytest.mark.parametrize("flag", [True, False])
def test_alone_one_agrees_with_oneself(flag):
    assert ALONE.all(flag) is flag
    assert ALONE.any(flag) is flag


def test_alone_everything_stays_as_it_is():
    assert ALONE.sum([1.5, 2.0]) == [1.5, 2.0]
    assert ALONE.broadcast({"a": [1]}) == {"a": [1]}
    assert ALONE.is_first and ALONE.size == 1
