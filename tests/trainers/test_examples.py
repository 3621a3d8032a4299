from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

from embedding_service.ragged import Ragged
from trainers.examples import PairBatch, PairPlan, TokenPlan, generator, session_hits, shuffle_lists
from trainers.negatives import UnigramSampler
from trainers.prepare import Sessions
from trainers.row_runs import RowRuns

# Every (session, item) tells where it is: item 100 * s + p is at place p of session s, until sessions repeat items.
PLACES = [[100 * s + p for p in range(length)] for s, length in enumerate([3, 0, 1, 5, 2, 1, 8, 0])]
NUMBERS = (3, 1, 4)
KINDS = ("every_item", "next_item", "last_item")


def sessions(lists: list[list[int]], *, user: bool = True) -> Sessions:
    users = np.arange(len(lists)) + 1000
    return Sessions(Ragged.from_lists(lists), users if user else None, {"city": users % 3 - 1})


def pair_plan(lists: list[list[int]] = PLACES, *, user: bool = True, **change: Any) -> PairPlan:
    settings: dict[str, Any] = {
        "batch_size": 4, "kind": "next_item", "with_history": True, "only_history": not user, "history_length": 0,
        "mask": "session", "numbers": NUMBERS,
    }  # fmt: skip
    return PairPlan(sessions(lists, user=user), **{**settings, **change})


def whole(plan: PairPlan) -> PairBatch:
    return plan.batch(0, plan.size)


def test_every_item_sees_the_others_of_its_basket() -> None:
    batch = whole(pair_plan(kind="every_item"))
    assert sorted(batch.item.tolist()) == sorted(item for one in PLACES for item in one)
    for item, history in zip(batch.item, batch.history.to_lists(), strict=True):
        assert sorted([item, *history]) == PLACES[item // 100]


def test_next_item_sees_those_before_it() -> None:
    batch = whole(pair_plan(kind="next_item"))
    assert sorted(batch.item.tolist()) == sorted(item for one in PLACES for item in one)
    for item, history in zip(batch.item, batch.history.to_lists(), strict=True):
        assert history == PLACES[item // 100][: item % 100]


def test_last_item_is_one_example_a_session() -> None:
    batch = whole(pair_plan(kind="last_item"))
    assert sorted(batch.item.tolist()) == sorted(one[-1] for one in PLACES if one)
    for item, history in zip(batch.item, batch.history.to_lists(), strict=True):
        assert history == PLACES[item // 100][:-1]


@pytest.mark.parametrize("kind", KINDS)
def test_users_and_features_are_those_of_the_session(kind: str) -> None:
    batch = whole(pair_plan(kind=kind))
    assert batch.user is not None
    assert batch.user.tolist() == (batch.item // 100 + 1000).tolist()
    assert batch.features["city"].tolist() == ((batch.item // 100 + 1000) % 3 - 1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_without_users_an_example_has_a_history(kind: str) -> None:
    lengths = whole(pair_plan(kind=kind, user=False)).history.lengths
    wanted = {"every_item": 3 + 5 + 2 + 8, "next_item": 2 + 4 + 1 + 7, "last_item": 4}[kind]
    assert len(lengths) == wanted
    assert lengths.min() >= 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 3])
def test_history_length_keeps_the_last_items(kind: str, length: int) -> None:
    """For a basket: so many of the others, each once."""
    for item, history in zip(*as_lists(pair_plan(kind=kind, history_length=length)), strict=True):
        place, size = item % 100, len(PLACES[item // 100])
        if kind == "every_item":
            assert len(history) == min(length, size - 1)
            assert set(history) <= set(PLACES[item // 100]) - {item}
            assert len(set(history)) == len(history)
        else:
            assert history == PLACES[item // 100][max(0, place - length) : place]


def as_lists(plan: PairPlan) -> tuple[list[int], list[list[int]]]:
    batch = whole(plan)
    return batch.item.tolist(), batch.history.to_lists()


def test_a_towers_without_history_gets_empty_ones_and_all_examples() -> None:
    batch = whole(pair_plan(with_history=False, only_history=False, user=False))
    assert len(batch) == sum(map(len, PLACES))
    assert not batch.history.lengths.any()


def test_a_repeated_item_may_be_in_the_history_of_its_other_place() -> None:
    items, histories = as_lists(pair_plan([[7, 8, 7]], kind="next_item"))
    assert sorted(zip(items, map(tuple, histories), strict=True)) == [(7, ()), (7, (7, 8)), (8, (7,))]
    items, histories = as_lists(pair_plan([[7, 8, 7]], kind="every_item"))
    assert sorted((item, tuple(sorted(seen))) for item, seen in zip(items, histories, strict=True)) == [
        (7, (7, 8)), (7, (7, 8)), (8, (7, 7))
    ]  # fmt: skip


def test_the_order_is_random_and_a_pure_function_of_the_numbers() -> None:
    long = [list(range(50)) for _ in range(20)]
    first, again, other = (
        as_lists(pair_plan(long, kind="every_item", numbers=n)) for n in (NUMBERS, NUMBERS, (3, 1, 5))
    )
    assert first == again
    assert first[0] != other[0]
    assert first[0] != sorted(first[0])


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["pairs", "tokens", "baskets"])
def test_the_workers_shares_cover_the_window_once(kind: str, num_workers: int) -> None:
    plan: PairPlan | TokenPlan
    if kind == "pairs":
        plan = pair_plan()
    else:
        plan = TokenPlan(sessions(PLACES), block_items=3, ordered=kind == "tokens", keep=None, numbers=NUMBERS)
    offset, covered, parts = 0, [], []
    while offset < plan.size:
        stop = plan.stop_after(offset, num_workers)
        assert offset < stop <= plan.size
        for rank in range(num_workers):
            start, end = plan.share(offset, stop, rank, num_workers)
            covered += list(range(start, end))
            batch = plan.batch(start, end)
            parts.append(batch.item if isinstance(batch, PairBatch) else batch.items.values)
        offset = stop
    assert covered == list(range(plan.size))
    assert sorted(np.concatenate(parts).tolist()) == sorted(item for one in PLACES for item in one)


@pytest.mark.parametrize("num_workers", [1, 2, 3, 5])
def test_shares_are_nearly_equal(num_workers: int) -> None:
    lists = [list(range(1 + i % 4)) for i in range(1000)]
    pairs = pair_plan(lists, batch_size=50)
    tokens = TokenPlan(sessions(lists), block_items=50, ordered=True, keep=None, numbers=NUMBERS)
    assert pairs.stop_after(0, num_workers) == 50 * num_workers
    for plan, slack in ((pairs, 0), (tokens, 4)):  # a session is not cut: its longest has 4 items
        stop = plan.stop_after(0, num_workers)
        for rank in range(num_workers):
            batch = plan.batch(*plan.share(0, stop, rank, num_workers))
            size = len(batch.item) if isinstance(batch, PairBatch) else len(batch.items.values)
            assert abs(size - 50) <= slack


def test_a_session_longer_than_a_block_is_a_block() -> None:
    plan = TokenPlan(sessions([[1] * 9, [2], [3]]), block_items=3, ordered=True, keep=None, numbers=NUMBERS)
    assert plan.stop_after(0, 1) == 1
    assert plan.stop_after(1, 1) == 3


def test_an_empty_window_has_no_steps() -> None:
    assert pair_plan([[], []]).size == 0
    assert TokenPlan(sessions([]), block_items=3, ordered=False, keep=None, numbers=NUMBERS).size == 0


def test_baskets_are_shuffled_and_sessions_are_not() -> None:
    lists = [list(range(8)) for _ in range(50)]
    ordered, baskets = (
        TokenPlan(sessions(lists), block_items=9, ordered=flag, keep=None, numbers=NUMBERS)
        .batch(0, 50)
        .items.to_lists()
        for flag in (True, False)
    )
    assert ordered == lists
    assert [sorted(one) for one in baskets] == lists
    assert len({tuple(one) for one in baskets}) > 40


def test_subsampling_thins_out_by_the_probability() -> None:
    keep = RowRuns.of(np.array([0.2, 1.0, 0.0], np.float32))
    plan = TokenPlan(sessions([[0, 1, 2]] * 5000), block_items=9, ordered=True, keep=keep, numbers=NUMBERS)
    counts = Counter(plan.batch(0, plan.size).items.values.tolist())
    assert plan.size == 5000
    assert counts[1] == 5000
    assert counts[2] == 0
    assert counts[0] == pytest.approx(1000, abs=5 * np.sqrt(5000 * 0.16))


def test_shuffle_lists_gives_every_order_the_same_chance() -> None:
    orders = Counter(map(tuple, shuffle_lists(Ragged.from_lists([[1, 2, 3]] * 12_000), generator(1)).to_lists()))
    assert len(orders) == 6
    assert all(abs(count - 2000) < 5 * np.sqrt(2000) for count in orders.values())


def brute_hits(pool: list[int], own: list[list[int]]) -> set[tuple[int, int]]:
    return {(i, j) for i in range(len(own)) for j in range(len(pool)) if pool[j] in own[i]}


def random_lists(seed: int) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 12, random.integers(0, 9)).tolist() for _ in range(40)]


def owned(batch: PairBatch, mask: str) -> list[list[int]]:
    lists = zip(batch.item.tolist(), batch.history.to_lists(), strict=True)
    return [[item, *history] if mask == "session" else [item] for item, history in lists]


@pytest.mark.parametrize("mask", ["item", "session"])
@pytest.mark.parametrize("seed", range(4))
def test_hits_are_those_of_brute_force(mask: str, seed: int) -> None:
    plan = pair_plan(random_lists(seed), kind="every_item", mask=mask, batch_size=1000)
    extra = np.random.default_rng(seed).integers(0, 14, 20)
    for start, stop in ((0, plan.size), (5, 37), (3, 4), (3, 3)):
        batch = plan.batch(start, stop)
        for pool in (batch.positives, extra, np.concatenate([batch.positives, extra]), extra[:0]):
            places = batch.hits(pool).tolist()
            pairs = [divmod(place, max(1, len(pool))) for place in places]
            assert len(pairs) == len(set(pairs)), "a pair is there twice"
            assert set(pairs) == brute_hits(pool.tolist(), owned(batch, mask))
            assert [i for i, _ in pairs] == sorted(i for i, _ in pairs)


@pytest.mark.parametrize("mask", ["item", "session"])
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_gathered_workers_share_the_step(mask: str, num_workers: int) -> None:
    """Each has its own examples, and the positives and hits of all of them."""
    sampler = UnigramSampler(np.ones(12, np.int64), 0.0)
    plan = pair_plan(random_lists(1), kind="every_item", mask=mask, gather=True, sampler=sampler, num_sampled=9)
    start, stop = 7, 40
    whole = plan.batch(start, stop)
    parts = [plan.batch(start, stop, rank, num_workers) for rank in range(num_workers)]
    assert np.concatenate([part.item for part in parts]).tolist() == whole.item.tolist()
    own = owned(whole, mask)
    for rank, part in enumerate(parts):
        mine = range(part.first, part.first + len(part))
        assert part.positives.tolist() == part.step_items.tolist() == whole.item.tolist()
        assert part.sampled.tolist() == whole.sampled.tolist()
        assert part.seed == whole.seed
        assert part.sizes == tuple(len(other) for other in parts)
        assert part.first == sum(part.sizes[:rank])
        places = {divmod(place, stop - start) for place in part.hits(part.positives).tolist()}
        assert places == brute_hits(whole.item.tolist(), [own[k] for k in mine])
        queries = part.query_hits()
        assert queries.tolist() == sorted(queries.tolist())
        assert {divmod(place, stop - start) for place in queries.tolist()} == {
            (i, k) for i, item in enumerate(part.item.tolist()) for k in range(stop - start) if item in own[k]
        }


def test_workers_of_their_own_share_what_is_sampled_alone() -> None:
    sampler = UnigramSampler(np.ones(12, np.int64), 0.0)
    plan = pair_plan(random_lists(1), kind="every_item", sampler=sampler, num_sampled=9)
    first, second = (plan.batch(0, 30, rank, 2) for rank in (0, 1))
    assert first.sampled.tolist() == second.sampled.tolist() != plan.batch(30, 60).sampled.tolist()
    for part in (first, second):
        assert part.positives.tolist() == part.item.tolist()
        assert (part.first, part.sizes) == (0, (15,))
        assert part.step_items.tolist() == [*first.item, *second.item]


def test_hits_of_many_equal_items_grow_beyond_the_first_guess() -> None:
    items = np.zeros(100, np.int64)
    hits = session_hits(items, items, np.arange(100), np.arange(1, 101))
    assert sorted(hits.tolist()) == list(range(100 * 100))


def test_ids_are_dropped_at_random_alike_for_any_number_of_workers() -> None:
    lists = [list(range(10 * s, 10 * s + 10)) for s in range(300)]
    plan = pair_plan(lists, id_dropout=0.25)
    dropped = whole(plan).without_id
    assert 0.2 < dropped.mean() < 0.3
    shares = [plan.batch(0, plan.size, rank, 3).without_id for rank in range(3)]
    assert np.concatenate(shares).tolist() == dropped.tolist()
    assert pair_plan(lists, id_dropout=0.25, numbers=(3, 2, 4)).without_id.tolist() != plan.without_id.tolist()
    assert not whole(pair_plan(lists)).without_id.any()
