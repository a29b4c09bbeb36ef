import pytest
from hypothesis import given
from hypothesis import strategies as st

from umtrain.errors import ConfigError
from umtrain.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("2GiB", 2 * 2**30),
        ("1.25 GiB", 1342177280),
        ("512mib", 512 * 2**20),
        ("1MB", 10**6),
        ("4096", 4096),
        (4096, 4096),
        ("7B", 7),
    ],
)
def test_sizes_parse_as_people_write_them(text, n_bytes):
    assert parse_bytes(text) == n_bytes


@pytest.mark.parametrize("text", ["", "GiB", "2 GBit", "-1GiB", "0", "0.1B", "1e9", "2GiB2"])
def test_what_is_no_size_is_refused_by_its_key(text):
    with pytest.raises(ConfigError, match=r"memory\.device_budget"):
        parse_bytes(text, "memory.device_budget")


@given(st.integers(1, 2**50))
def test_formatted_sizes_parse_back_to_within_their_rounding(n_bytes):
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.01)
