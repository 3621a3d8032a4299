"""A uniform sample of what was offered."""

from __future__ import annotations

import numpy as np
import pytest

from embedding_service.reservoir import Reservoir


def offered(num: int, *, batch: int, seed: int, size: int = 8) -> np.ndarray:
    """The numbers of the queries that are kept of `num`, offered `batch` at a time."""
    reservoir = Reservoir(size, seed=seed)
    numbers = np.arange(num, dtype=np.float32)[:, None]
    for start in range(0, num, batch):
        reservoir.offer(numbers[start : start + batch])
    kept = reservoir.take()
    assert kept is not None
    return kept[0][:, 0]


@pytest.mark.parametrize("batch", [1, 7, 200])
def test_every_query_is_as_likely(batch: int) -> None:
    """400 samples of 8 of 200: each tenth of the queries has 320 of the 3200, give or take four deviations of 17."""
    kept = np.concatenate([offered(200, batch=batch, seed=seed) for seed in range(400)])
    tenths = np.bincount((kept // 20).astype(int), minlength=10)
    assert tenths.sum() == 3200
    assert abs(tenths - 320).max() < 68


def test_no_query_is_kept_twice() -> None:
    for seed in range(20):
        kept = offered(300, batch=50, seed=seed)
        assert len(set(kept.tolist())) == len(kept) == 8


def test_few_queries_are_all_kept() -> None:
    assert offered(5, batch=2, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_taking_begins_anew() -> None:
    reservoir = Reservoir(4)
    assert reservoir.take() is None
    reservoir.offer(np.ones((1000, 3), np.float32), np.arange(1000))
    vectors, own = reservoir.take() or pytest.fail("nothing was kept")
    assert (vectors.shape, vectors.dtype, len(set(own.tolist()))) == ((4, 3), np.float32, 4)
    assert reservoir.take() is None
    reservoir.offer(np.zeros((0, 3), np.float32))
    reservoir.offer(np.zeros((1, 3), np.float32))
    vectors, own = reservoir.take() or pytest.fail("nothing was kept")
    assert (len(vectors), own.tolist()) == (1, [-1])


def test_what_is_kept_is_a_copy() -> None:
    """A view would keep a whole bulk request in memory."""
    reservoir, queries = Reservoir(4), np.ones((2, 3), np.float32)
    reservoir.offer(queries)
    queries[:] = 0
    kept = reservoir.take()
    assert kept is not None
    assert (kept[0] == 1).all()
