from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.rank import process_group
from embedding_service.ragged import Ragged
from embedding_service.towers import Given, Tower, TowerInput, TowerSpec
from tests.ranks import run_on_ranks
from trainers import catalogue
from trainers.cases import Cases
from trainers.catalogue import evaluate_model
from trainers.metrics import METRICS, mean_metrics


class _ExactTables:
    def known(self, name: str, values: Given) -> Given:
        return values


class PlantedModel:
    """Vectors that are given: a query is the sum of its history's vectors and its user's."""

    def __init__(self, num_items: int, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.num_items = num_items
        self.counts = (np.arange(num_items) < num_items - 3).astype(np.int64)  # training has not seen the last three
        self.items, self.users = random.normal(size=(num_items, 5)), random.normal(size=(9, 5))

    tables = _ExactTables()
    query_tower = Tower(
        TowerSpec((TowerInput("history", "history", "item", 5), TowerInput("user", "user", "user", 5)), 5)
    )

    def encode_queries(self, history: Ragged, single: Mapping[str, np.ndarray]) -> Tensor:
        seen = [[row for row in rows if self.counts[row]] for rows in history.to_lists()]
        vectors = [self.items[rows].sum(0) for rows in seen]
        users = [self.users[user] if user >= 0 else np.zeros(5) for user in single["user"]]
        return torch.from_numpy(np.array(vectors).reshape(-1, 5) + np.array(users).reshape(-1, 5))

    def encode_items(self, start: int, stop: int) -> Tensor:
        return torch.from_numpy(self.items[start:stop])


def cases(num: int, num_items: int) -> Cases:
    random = np.random.default_rng(num)
    histories = [random.permutation(num_items)[: random.integers(0, 5)].tolist() for _ in range(num)]
    truths = [random.integers(-1, num_items, random.integers(i == 0, 4)).tolist() for i in range(num)]
    return Cases(Ragged.from_lists(histories), Ragged.from_lists(truths), {"user": random.integers(-1, 9, num)})


def brute_force(
    model: PlantedModel, found: Cases, ks: tuple[int, ...], *, mask_seen: bool, num_candidates: int
) -> dict[str, float]:
    """One query at a time, over all candidates at once."""
    ranked = np.full((len(found), max(ks)), -1)
    for i, history in enumerate(found.history.to_lists()):
        one = found.take(np.array([i]))
        scores = model.items[:num_candidates] @ model.encode_queries(one.history, one.single)[0].numpy()
        if (
            not model.counts[[row for row in history if row < num_candidates]].any() and one.single["user"][0] < 0
        ):  # nothing is known: the most frequent, which are the first rows
            scores = -np.arange(num_candidates, dtype=np.float64)
        order = [row for row in np.argsort(-scores) if not (mask_seen and row in history)][: max(ks)]
        ranked[i, : len(order)] = order
    return mean_metrics(ranked, found.truth, [f"{name}@{k}" for k in ks for name in METRICS])


def evaluate(num: int, mask_seen: bool, num_candidates: int, num_items: int = 30) -> dict[str, float]:
    with process_group("cpu") as place:
        return evaluate_model(
            PlantedModel(num_items, 1),  # type: ignore[arg-type]
            cases(num, num_items),
            ks=(1, 4, 10),
            place=place,
            mask_seen=mask_seen,
            num_candidates=num_candidates,
        ).figures()


@pytest.mark.parametrize("mask_seen", [True, False])
@pytest.mark.parametrize("num_candidates", [0, 29, 12])
@pytest.mark.parametrize(("query_block", "item_chunk"), [(8192, 4096), (7, 4)])
def test_metrics_are_those_of_brute_force(
    monkeypatch: pytest.MonkeyPatch, mask_seen: bool, num_candidates: int, query_block: int, item_chunk: int
) -> None:
    monkeypatch.setattr(catalogue, "_QUERY_BLOCK", query_block)
    monkeypatch.setattr(catalogue, "_ITEM_CHUNK", item_chunk)
    found = evaluate(50, mask_seen, num_candidates)
    wanted = brute_force(
        PlantedModel(30, 1), cases(50, 30), (1, 4, 10), mask_seen=mask_seen, num_candidates=num_candidates or 30
    )
    assert found == pytest.approx(wanted, rel=1e-12)
    assert 0 < found["recall@1"] < found["recall@10"] < 1


def test_a_catalogue_smaller_than_k_is_padded() -> None:
    found = evaluate(20, True, 0, num_items=6)
    wanted = brute_force(PlantedModel(6, 1), cases(20, 6), (1, 4, 10), mask_seen=True, num_candidates=6)
    assert found == pytest.approx(wanted, rel=1e-12)


def test_planted_neighbours_are_found() -> None:
    """Every query is an item's own vector, and the item is what should be found."""
    model = PlantedModel(40, 2)
    model.items /= np.linalg.norm(model.items, axis=1, keepdims=True)
    each = Ragged.from_lists([[row] for row in range(40)])
    model.counts[:] = 1
    planted = Cases(each, each, {"user": np.full(40, -1)})
    with process_group("cpu") as place:
        for mask_seen, recall in ((False, 1.0), (True, 0.0)):
            found = evaluate_model(model, planted, ks=(1,), place=place, mask_seen=mask_seen).figures()  # type: ignore[arg-type]
            assert found["recall@1"] == recall


@pytest.mark.parametrize("num", [1, 2, 7])
def test_workers_share_the_cases(num: int) -> None:
    """Also where there are fewer cases than workers: some then have none, but take part in every exchange."""
    for rank in shared_by_two():
        wanted = brute_force(PlantedModel(30, 1), cases(num, 30), (1, 4, 10), mask_seen=True, num_candidates=30)
        assert rank[str(num)] == pytest.approx(wanted, rel=1e-12, nan_ok=True)


_SHARED: list[dict[str, dict[str, float]]] = []


def shared_by_two() -> list[dict[str, dict[str, float]]]:
    if not _SHARED:
        _SHARED.extend(run_on_ranks(2, evaluate_all))
    return _SHARED


def evaluate_all() -> dict[str, dict[str, float]]:
    return {str(num): evaluate(num, True, 0) for num in (1, 2, 7)}
