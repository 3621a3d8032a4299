"""Which index suits a catalogue, and whether what is estimated is what FAISS then takes."""

from __future__ import annotations

import faiss
import numpy as np
import pytest

from cluster.errors import SettingError
from embedding_service.index import VectorIndex
from embedding_service.index_plan import (
    advice,
    auto_factory,
    bytes_per_row,
    check_memory,
    estimate,
    fits,
    num_lists,
    num_shards,
)

ROWS, DIM = 12_000, 32
GIB = 2**30


@pytest.mark.parametrize(
    "factory",
    [
        "Flat", "SQ8", "SQfp16", "PQ8x4", "PQ8x4fs", "HNSW16", "HNSW32,SQ8", "IVF64,Flat", "IVF64,SQ8", "IVF64,SQ4",
        "IVF64,PQ16x4", "IVF64,PQ16x4fs", "IVF64,PQ16x4fs,RFlat", "IVF64,PQ16x4,Refine(SQfp16)",
        "IVF64_HNSW32,SQ8",
    ],
)  # fmt: skip
def test_bytes_are_those_of_the_file(factory: str) -> None:
    index = faiss.index_factory(DIM, factory, faiss.METRIC_INNER_PRODUCT)
    vectors = np.random.default_rng(0).normal(size=(ROWS, DIM)).astype(np.float32)
    faiss.omp_set_num_threads(1)
    index.train(vectors[:2600])
    index.add(vectors)
    expected = estimate(factory, ROWS, DIM)
    assert expected is not None
    assert expected.index_bytes == pytest.approx(len(faiss.serialize_index(index)), rel=0.12)
    assert expected.build_bytes > expected.index_bytes


def test_unknown_kinds_are_not_estimated() -> None:
    assert bytes_per_row("LSH", 64) is None
    assert estimate("IVF64,RaBitQ", 1000, 64) is None
    check_memory("LSH", 10**9, 64, 1)  # nothing is known of it, so nothing is refused


def test_auto_goes_by_size() -> None:
    sizes = [100, 19_999, 20_000, 1_000_000, 5_000_000, 100_000_000]
    assert [auto_factory(rows, 64) for rows in sizes] == [
        "Flat", "Flat", "HNSW32", "HNSW32", "HNSW32,SQ8", "IVF65536_HNSW32,SQ8"
    ]  # fmt: skip
    for rows in (*sizes, 10**9):
        for memory in (0, rows * 100 + 2 * GIB):
            created = faiss.index_factory(64, auto_factory(rows, 64, memory), faiss.METRIC_INNER_PRODUCT)
            assert rows >= 39 * getattr(created, "nlist", 0)


def test_auto_goes_by_memory() -> None:
    """Of 5 M x 64: a graph takes 1.7 GB, IVF,SQ8 .4 GB and 4-bit PQ .1 GB, each with its training sample."""
    found = {gib: auto_factory(5_000_000, 64, int(gib * GIB)) for gib in (4, 0.8, 0.6)}
    assert found == {4: "HNSW32,SQ8", 0.8: "IVF16384_HNSW32,SQ8", 0.6: "IVF16384_HNSW32,PQ32x4fs"}
    for gib, factory in found.items():
        need = estimate(factory, 5_000_000, 64)
        assert need is not None
        assert need.build_bytes <= gib * GIB
    with pytest.raises(
        SettingError, match=r"export\.memory_gib: 0\.01 is too little for any index over 5,000,000 x 64.* model\.dim$"
    ):
        auto_factory(5_000_000, 64, GIB // 100)


def test_an_index_is_cut_until_its_parts_fit() -> None:
    """Not at all where it fits, and in vain where the rows that are added at a time are more than there is room for."""
    for factory in ("HNSW32", "auto"):
        assert num_shards(factory, 5_000_000, 64, 8 * GIB) == 1
        assert num_shards(factory, 5_000_000, 64, GIB // 100) is None
        shards = num_shards(factory, 5_000_000, 64, GIB // 4)
        assert shards is not None
        assert shards > 1
        part, larger = -(-5_000_000 // shards), -(-5_000_000 // (shards - 1))
        if factory == "auto":
            assert auto_factory(part, 64, GIB // 4)
            with pytest.raises(SettingError, match=rf"or cut it into {shards} \(export\.index_shards\)$"):
                auto_factory(5_000_000, 64, GIB // 4)
        else:
            assert fits(factory, part, 64, GIB // 4)
            assert not fits(factory, larger, 64, GIB // 4)
            with pytest.raises(SettingError, match=rf"let `auto` choose, or cut it into {shards} \(export"):
                check_memory(factory, 5_000_000, 64, GIB // 4)
    assert num_shards("LSH", 1000, 64, GIB) is None


def test_lists_follow_the_advice_of_faiss() -> None:
    for rows in (10_000, 1_000_000, 50_000_000, 10**9):
        lists = num_lists(rows)
        assert lists & (lists - 1) == 0
        assert 64 * lists <= rows
        assert rows < 500_000 or advice(f"IVF{lists},SQ8", rows) == ""
    assert advice("IVF100,SQ8", 1_000_000) == (
        "IVF100,SQ8 has 100 lists for 1,000,000 rows; FAISS advises 4,000 to 16,000 (4 to 16 sqrt(rows))"
    )
    assert advice("HNSW32", 1_000_000) == ""


def test_an_index_beyond_the_budget_is_refused() -> None:
    vectors = np.zeros((1000, 16), np.float32)
    with pytest.raises(SettingError, match=r"export\.index: HNSW32 over 1,000 x 16 takes .* GiB to build, more than"):
        VectorIndex.build(vectors, metric="ip", factory="HNSW32", threads=1, memory_bytes=1000)
    assert VectorIndex.build(vectors, metric="ip", factory="HNSW32", threads=1, memory_bytes=GIB).rows == 1000


def test_seconds_grow_with_the_work_and_shrink_with_threads() -> None:
    for factory in ("HNSW32", "IVF4096,SQ8", "IVF16384_HNSW32,SQ8"):
        seconds = [estimate(factory, rows, 64, threads) for rows, threads in ((10**6, 1), (10**6, 2), (10**7, 2))]
        assert all(seconds)
        one, two, more = (need.seconds for need in seconds if need is not None)
        assert one == pytest.approx(2 * two)
        assert more > (5 if factory == "HNSW32" else 1.5) * two
