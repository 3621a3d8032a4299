from __future__ import annotations

import pytest

from cluster.errors import SettingError
from cluster.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GiB", 2**31), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("10k", 10_240), ("3 mib", 3 * 2**20), ("1T", 2**40)],
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    assert parse_bytes(text, "keys.budget") == size


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "2 bananas", "2GiB/s", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(SettingError, match=r"setting keys\.budget: must be a size like 2GiB or 500MB"):
        parse_bytes(text, "keys.budget")


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (1023, "1,023 B"), (1536, "1.5 KiB"), (2**31, "2.0 GiB")])
def test_sizes_as_people_read_them(size: int, text: str) -> None:
    assert format_bytes(size) == text
