import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowtide.units import GIB, format_bytes, format_count, format_duration, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20GiB", 20 * GIB), ("500 MB", 500_000_000), ("1.5g", 1_500_000_000), ("17", 17), (17, 17), ("0b", 0)],
)
def test_parse_bytes(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-3GB", "3 parsecs", "1e9x", -1])
def test_parse_bytes_refuses(text):
    with pytest.raises(ValueError, match="bytes"):
        parse_bytes(text)


@given(st.integers(min_value=1, max_value=2**45))
def test_format_then_parse_is_close(num_bytes):
    assert parse_bytes(format_bytes(num_bytes)) == pytest.approx(num_bytes, rel=0.01)


def test_for_people():
    assert format_bytes(3 * GIB) == "3.00 GiB"
    assert format_bytes(13.61 * GIB) == "13.6 GiB"
    assert format_count(134_515_008) == "134.5M"
    assert format_count(950) == "950"
    assert [format_duration(s) for s in (42, 185, 7800)] == ["42 s", "3 min 05 s", "2 h 10 min"]
