"""What the system was asked for is what it says of the memory."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from embedding_service.huge_pages import prefer_huge_pages


def test_small_tensors_are_left_alone() -> None:
    assert not prefer_huge_pages(torch.zeros(1000))


def flags_at(address: int) -> list[str]:
    """What the system keeps of the mapping in which `address` lies."""
    here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(found[1], 16) <= address < int(found[2], 16)
        elif here and line.startswith("VmFlags:"):
            return line.split()[1:]
    return []


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists() or not Path("/proc/self/smaps").exists(),
    reason="the system has no huge pages to ask for",
)
def test_a_large_tensor_is_marked_for_huge_pages() -> None:
    tensor = torch.empty(64 * 2**20, dtype=torch.uint8)
    middle = tensor.data_ptr() + 32 * 2**20
    assert prefer_huge_pages(tensor)
    assert "hg" in flags_at(middle)


def test_a_large_tensor_keeps_what_is_in_it() -> None:
    tensor = torch.arange(5_000_000)
    views = tensor[7:9], tensor[-1:]
    prefer_huge_pages(tensor)  # whether the system has any is its own business
    assert torch.equal(tensor, torch.arange(5_000_000))
    tensor[8] = -1
    assert [view.tolist() for view in views] == [[7, -1], [4_999_999]]
