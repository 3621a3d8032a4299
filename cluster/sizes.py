"""Amounts of memory as people write them: 2GiB, 512 MiB, 80GB."""

from __future__ import annotations

import re

from cluster.errors import SettingError

_UNITS = {"": 1, "B": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("KMGTP", start=1)
    for suffix, base in (("iB", 1024), ("B", 1000), ("", 1024))
}


def parse_bytes(text: str, setting: str) -> int:
    """The bytes of a size like `2GiB`, `1.5 GB` or `4096`; a bare K, M, G, T, P is binary. Raises SettingError."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units or float(match[1]) <= 0:
        raise SettingError(setting, f"must be a size like 2GiB or 500MB; got {text!r}")
    return int(float(match[1]) * units[match[2].lower()])


def format_bytes(num: int) -> str:
    """`num` bytes in the largest binary unit that leaves at least 1 of it: 1536 -> `1.5 KiB`."""
    size, unit = float(num), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB", "PiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{num:,} B" if unit == "B" else f"{size:,.1f} {unit}"
