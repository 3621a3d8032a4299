"""The metrics against their definitions, written out slowly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError, SettingError
from embedding_service.ragged import Ragged
from trainers.metrics import FREQUENCIES, METRICS, Tally, judge, mean_metrics, parse_metric, query_metrics
from trainers.row_runs import RowRuns


def ragged(lists: list[list[int]]) -> Ragged:
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return Ragged(np.array([row for rows in lists for row in rows], dtype=np.int64), offsets)


def slow(name: str, ranked: list[int], truth: list[int], k: int) -> float:
    relevant = {row for row in truth if row >= 0}
    num_relevant = len(relevant) + sum(row < 0 for row in truth)
    if num_relevant == 0:
        return math.nan
    ranks = [rank for rank, row in enumerate(ranked[:k], start=1) if row in relevant]
    if name == "recall":
        return len(ranks) / num_relevant
    if name == "precision":
        return len(ranks) / k
    if name == "hit_rate":
        return float(bool(ranks))
    if name == "mrr":
        return 1 / ranks[0] if ranks else 0.0
    assert name == "ndcg"
    ideal = sum(1 / math.log2(rank + 1) for rank in range(1, min(k, num_relevant) + 1))
    return sum(1 / math.log2(rank + 1) for rank in ranks) / ideal


rankings = st.lists(st.integers(0, 9), unique=True, max_size=6).map(lambda rows: rows + [-1] * (6 - len(rows)))
queries = st.lists(st.tuples(rankings, st.lists(st.integers(-1, 9), max_size=8)), max_size=6)


@settings(deadline=None, derandomize=True)
@given(queries, st.integers(1, 6))
def test_every_metric_is_its_formula(cases: list[tuple[list[int], list[int]]], k: int) -> None:
    ranked = np.array([rows for rows, _ in cases], dtype=np.int64).reshape(-1, 6)
    truth = ragged([rows for _, rows in cases])
    values = query_metrics(ranked, truth, [f"{name}@{k}" for name in METRICS])
    for name in METRICS:
        expected = [slow(name, *case, k) for case in cases]
        np.testing.assert_allclose(values[f"{name}@{k}"], expected, rtol=1e-12)
        assert values[f"{name}@{k}"].dtype == np.float64


def test_one_case_by_hand() -> None:
    ranked, truth = np.array([[5, 3, 8, 1]]), ragged([[3, 1, 3, 7]])  # T = {1, 3, 7}, found at ranks 2 and 4
    means = mean_metrics(ranked, truth, ["recall@4", "precision@4", "hit_rate@1", "mrr@4", "ndcg@4", "recall@3"])
    dcg = 1 / math.log2(3) + 1 / math.log2(5)
    idcg = 1 + 1 / math.log2(3) + 1 / 2
    assert means == pytest.approx(
        {"recall@4": 2 / 3, "precision@4": 0.5, "hit_rate@1": 0, "mrr@4": 0.5, "ndcg@4": dcg / idcg, "recall@3": 1 / 3}
    )


def test_a_perfect_ranking_scores_one() -> None:
    ranked, truth = np.array([[4, 2, 9], [1, 0, 3]]), ragged([[2, 4, 9, 5, 6], [1]])
    assert mean_metrics(ranked, truth, ["ndcg@3", "mrr@3", "hit_rate@3"]) == {"ndcg@3": 1, "mrr@3": 1, "hit_rate@3": 1}


def test_padding_never_hits_unknown_truth() -> None:
    hits, num_relevant = judge(np.array([[-1, -1], [2, -1]]), ragged([[-1], [-1, 2]]), 2)
    assert hits.tolist() == [[False, False], [True, False]]
    assert num_relevant.tolist() == [1, 2]


def test_a_row_of_one_query_does_not_hit_for_another() -> None:
    assert mean_metrics(np.array([[0], [1]]), ragged([[1], [0]]), ["recall@1"]) == {"recall@1": 0}


def test_queries_without_truth_are_left_out_of_the_mean() -> None:
    ranked, truth = np.array([[1], [1], [1]]), ragged([[], [1], [2]])
    assert mean_metrics(ranked, truth, ["recall@1"]) == {"recall@1": 0.5}
    assert np.isnan(query_metrics(ranked, truth, ["recall@1"])["recall@1"][0])
    with pytest.raises(DataError, match="nothing to measure"):
        mean_metrics(ranked, ragged([[], [], []]), ["recall@1"])


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"metrics at 3 need at least 3 ranked rows per query; got shape \(1, 2\)"):
        judge(np.array([[1, 2]]), ragged([[1]]), 3)
    with pytest.raises(ValueError, match="1 rankings for 2 queries"):
        judge(np.array([[1, 2]]), ragged([[1], [2]]), 2)


def test_names_of_metrics() -> None:
    assert parse_metric("recall@20") == ("recall", 20)
    assert parse_metric("hit_rate@1") == ("hit_rate", 1)
    with pytest.raises(
        SettingError, match=r"setting train\.metric: there is no metric 'recal'; did you mean recall@20"
    ):
        parse_metric("recal@20")
    with pytest.raises(SettingError, match=r"evaluate\.metrics: there is no metric 'auc'; there are recall, ndcg"):
        parse_metric("auc", setting="evaluate.metrics")
    for wrong in ("recall", "recall@", "recall@0", "recall@-1", "recall@2.5", "recall@²"):
        with pytest.raises(SettingError, match="a metric is written recall@20"):
            parse_metric(wrong)


@settings(deadline=None, derandomize=True)
@given(queries, queries)
def test_a_tally_of_several_parts_is_the_mean_over_all_queries(
    first: list[tuple[list[int], list[int]]], second: list[tuple[list[int], list[int]]]
) -> None:
    counts = np.array([900, 21, 20, 8, 7, 6, 5, 2, 1, 0])
    tally = Tally((2, 5), RowRuns.of(counts))
    for part in (first, second):
        tally.add(np.array([rows for rows, _ in part], dtype=np.int64).reshape(-1, 6), ragged([t for _, t in part]))
    for name, value in tally.figures().items():
        metric, _, k = name.partition("@")
        values = [slow(metric, *case, int(k)) for case in first + second]
        wanted = [value for value in values if not math.isnan(value)]
        assert value == pytest.approx(np.mean(wanted) if wanted else math.nan, nan_ok=True)
    by_frequency: dict[str, list[tuple[bool, bool]]] = {name: [] for name in FREQUENCIES}
    for ranked, truth in first + second:
        for row in truth:
            count = counts[row] if row >= 0 else 0
            name = "0" if count == 0 else "1-5" if count <= 5 else "6-20" if count <= 20 else ">20"
            by_frequency[name].append((row >= 0 and row in ranked[:2], row >= 0 and row in ranked[:5]))
    found = tally.by_frequency()
    assert set(found) == {name for name, hits in by_frequency.items() if hits}
    for name, figures in found.items():
        recalls = np.mean(by_frequency[name], axis=0)
        assert figures == pytest.approx(
            {"items": len(by_frequency[name]), "recall@2": recalls[0], "recall@5": recalls[1]}
        )
