"""Batches made by hand, for tests of what happens to them."""

from __future__ import annotations

import numpy as np

from embedding_service.ragged import Ragged
from trainers.examples import PairBatch


def pair_batch(
    items: np.ndarray, *, own: list[list[int]] | None = None, sampled: np.ndarray | None = None, seed: int = 0
) -> PairBatch:
    """A batch of one worker with these positives; own: the items that are no negatives (by default the positive)."""
    lists = Ragged.from_lists([[int(item)] for item in items] if own is None else own)
    return PairBatch(
        item=items,
        history=Ragged(np.empty(0, np.int64), np.zeros(len(items) + 1, np.int64)),
        user=None,
        features={},
        without_id=np.zeros(len(items), bool),
        positives=items,
        sizes=(len(items),),
        first=0,
        sampled=np.empty(0, np.int64) if sampled is None else sampled,
        seed=seed,
        values=lists.values,
        begin=lists.offsets[:-1],
        end=lists.offsets[1:],
        step_items=items,
    )
