from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.rank import process_group
from tests.trainers.batches import pair_batch
from trainers.mining import NOTHING, HardNegatives, Mined, MiningSpec

SPEC = MiningSpec(num=500, every=4, skip=2, take=3, margin=2.0)


def circle(num: int, turn: float = 0.0) -> Tensor:
    """Unit vectors around a circle: item i's neighbours are i - 1 and i + 1."""
    angle = 2 * torch.pi * (torch.arange(num) + turn) / num
    return torch.stack([angle.cos(), angle.sin(), 0 * angle, 0 * angle], 1)


def started(items: Tensor, spec: MiningSpec = SPEC) -> HardNegatives:
    """With an index of `items`."""
    miner = HardNegatives(len(items), items.shape[1], spec)
    for _ in range(spec.every + spec.every // 2 + 1):
        miner.begin_step(lambda start, stop: items[start:stop])
    return miner


@pytest.fixture(autouse=True)
def one_process() -> object:
    with process_group("cpu"):
        yield


def test_negatives_are_of_the_rank_window() -> None:
    items = circle(20)
    query = items[[5, 12]] + 0.01 * items[[6, 13]]  # breaks the ties: i, i + 1, i - 1, i + 2, i - 2
    mined = started(items).mine(query, pair_batch(np.array([5, 12])))
    assert mined.windows.tolist() == sorted([4, 7, 3, 11, 14, 10])
    assert mined.counts.tolist() == [1] * 6
    assert len(mined.rows) == SPEC.num
    assert set(mined.rows.tolist()) == set(mined.windows.tolist())
    assert not len(mined.hits)


def test_draws_are_as_often_as_expected() -> None:
    mined = started(circle(20)).mine(circle(20, 0.1)[[5, 6, 6]], pair_batch(np.array([5, 6, 6])))
    items = np.arange(20)
    expected = mined.expected(items)
    assert expected.sum() == pytest.approx(SPEC.num)
    count = np.bincount(mined.rows, minlength=20)
    assert (np.abs(count - expected) <= 5 * np.sqrt(expected)).all()
    assert NOTHING.expected(items).tolist() == [0.0] * 20


def test_the_margin_leaves_false_negatives_out() -> None:
    items, positives = circle(20), np.array([5, 12])
    query = items[[5, 12]]
    spec = MiningSpec(num=200, every=4, skip=0, take=8, margin=-0.1)
    mined = started(items, spec).mine(query, pair_batch(positives))
    similar = (query @ items.T).numpy()
    near = {(i, j) for i in range(2) for j in range(20) if similar[i, j] > similar[i, positives[i]] - 0.1}
    assert near == {(0, 4), (0, 5), (0, 6), (1, 11), (1, 12), (1, 13)}
    assert not {j for _, j in near} & set(mined.windows.tolist())

    neighbours = np.array([5, 7])  # the one's false negatives are hard negatives of the other
    mined = started(items, spec).mine(items[neighbours], pair_batch(neighbours))
    wanted = {(i, place) for place, j in enumerate(mined.rows) for i in range(2) if abs(neighbours[i] - j) <= 1}
    assert {divmod(place, len(mined.rows)) for place in mined.hits.tolist()} == wanted
    assert wanted


def test_an_index_is_used_from_half_a_period_after_its_snapshot() -> None:
    old, new = circle(20), circle(20, 10.0)  # the opposite side
    miner = HardNegatives(20, 4, SPEC)
    batch = pair_batch(np.array([5]))
    seen = []
    for step in range(12):
        now = old if step < 8 else new
        miner.begin_step(lambda start, stop, now=now: now[start:stop])  # type: ignore[misc]
        windows = miner.mine(F.normalize(old[[5]] + 0.01 * old[[6]]), batch).windows.tolist()
        seen.append("none" if not windows else "old" if 4 in windows else "new")
    assert seen == ["none"] * 6 + ["old"] * 4 + ["new"] * 2


@pytest.mark.parametrize("stop", range(4, 12))
def test_a_resumed_miner_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    random = torch.Generator().manual_seed(0)
    snapshots = [F.normalize(torch.randn(30, 4, generator=random), dim=1) for _ in range(12)]
    query, batch = snapshots[0][:5], pair_batch(np.arange(5))

    def steps(miner: HardNegatives, first: int, last: int) -> list[Mined]:
        found = []
        for step in range(first, last):
            miner.begin_step(lambda start, stop, step=step: snapshots[step][start:stop])  # type: ignore[misc]
            found.append(miner.mine(query, batch))
        return found

    whole = steps(HardNegatives(30, 4, SPEC), 0, 12)
    before = HardNegatives(30, 4, SPEC)
    steps(before, 0, stop)
    after = HardNegatives(30, 4, SPEC)
    after.load_state_dict(before.state_dict())
    for mine, theirs in zip(steps(after, stop, 12), whole[stop:], strict=True):
        assert np.array_equal(mine.rows, theirs.rows)
        assert np.array_equal(mine.windows, theirs.windows)


def test_an_empty_batch_has_nothing_to_mine() -> None:
    assert not len(started(circle(20)).mine(torch.empty(0, 4), pair_batch(np.empty(0, np.int64))).rows)
