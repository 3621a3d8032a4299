"""Tables become zero, and the system says that their memory is in huge pages."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from cluster.rank import process_group
from embedding_service.huge_pages import zero_in_huge_pages
from embedding_service.sharding import ShardedTables
from embedding_service.tables import TableSpec

SYSTEM = Path("/sys/kernel/mm/transparent_hugepage/enabled")
needs_huge_pages = pytest.mark.skipif(
    not SYSTEM.exists() or "[never]" in SYSTEM.read_text(), reason="the system has no huge pages to ask for"
)


def mapping_at(address: int) -> dict[str, str]:
    """What the system says of the mapping in which `address` lies, as /proc/self/smaps has it."""
    here, found = False, {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            here = int(span[1], 16) <= address < int(span[2], 16)
        elif here:
            name, _, value = line.partition(":")
            found[name] = value.strip()
    return found


def pages_in_memory(address: int, size: int) -> int:
    """How many of the pages at `address` are in memory (bit 63 of their entries in /proc/self/pagemap).

    A mapping's own total would not do: one with the same advice beside it becomes one with it.
    """
    first, last = address // mmap.PAGESIZE, (address + size) // mmap.PAGESIZE
    with Path("/proc/self/pagemap").open("rb", buffering=0) as pages:
        pages.seek(8 * first)
        entries = torch.frombuffer(bytearray(pages.read(8 * (last - first))), dtype=torch.int64)
    return int((entries < 0).sum())


def test_small_tensors_become_zero_too() -> None:
    tensor = torch.ones(1000)
    assert not zero_in_huge_pages(tensor)
    assert not tensor.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int64])
def test_all_of_a_large_tensor_becomes_zero_and_nothing_beside_it(dtype: torch.dtype) -> None:
    whole = torch.ones(9_000_001, dtype=dtype)
    tensor = whole[1:-3]
    zero_in_huge_pages(tensor)  # whether the system has any is its own business
    assert not tensor.any()
    assert whole[0] == 1
    assert (whole[-3:] == 1).all()
    tensor[5_000_000] = 7
    assert whole[5_000_001] == 7


@needs_huge_pages
def test_memory_that_was_written_to_comes_anew_in_huge_pages() -> None:
    tensor = torch.ones(64 * 2**20, dtype=torch.uint8)
    middle = tensor.data_ptr() + 16 * 2**20
    assert pages_in_memory(middle, 32 * 2**20) == 32 * 2**20 // mmap.PAGESIZE
    assert zero_in_huge_pages(tensor)
    assert not pages_in_memory(middle, 32 * 2**20)  # given back
    tensor.fill_(1)
    assert "hg" in mapping_at(middle)["VmFlags"].split()


@needs_huge_pages
@pytest.mark.parametrize("optimizer", ["sgd", "rowwise_adagrad"])
def test_tables_are_asked_for_in_huge_pages_and_keep_their_first_rows(optimizer: str) -> None:
    spec = TableSpec("item", 4_000_000, 4, 0.5, "fp16", "")
    with process_group("cpu"):
        tables = ShardedTables([spec], optimizer=optimizer, learning_rate=0.1, seed=3)  # type: ignore[arg-type]
        (_, weights), *_ = tables.local_shards("item")
        assert "hg" in mapping_at(weights.data_ptr() + weights.nbytes // 2)["VmFlags"].split()
        assert 0.2 < float(weights[-1000:].float().abs().mean()) < 0.3  # uniform in -.5 .. .5
        assert not tables.lookup_state({"item": torch.arange(3_999_000, 4_000_000)})["item"].any()


@needs_huge_pages
def test_tables_on_disk_are_left_as_their_file_is_mapped(tmp_path: Path) -> None:
    specs = [TableSpec("item", 4_000_000, 4, 0.5, "fp16", str(tmp_path)), TableSpec("user", 100, 4, 0.5)]
    with process_group("cpu"):
        tables = ShardedTables(specs, optimizer="rowwise_adagrad", learning_rate=0.1, seed=3)
        (_, weights), *_ = tables.local_shards("item")
        assert "hg" not in mapping_at(weights.data_ptr() + weights.nbytes // 2)["VmFlags"].split()
