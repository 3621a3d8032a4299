"""Ranking metrics: pure functions of ranked rows and the rows that should have been found.

In all of them `ranked` is int64 [n, >= k], the rows recommended to n queries, best first; the rows of one query are
distinct, and negative ones are padding that is never a hit. `truth` holds each query's relevant rows, n lists: a row
that is repeated counts once; a negative one stands for a relevant item outside the vocabulary, which no ranking can
reach, and counts as such (drop them first for a protocol that does not). A query without truth has no value: nan, and
the means leave it out.

Below, rel_i is 1 if the row at rank i (from 1) is relevant and 0 otherwise, and T the set of relevant items.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from cluster.errors import DataError, SettingError
from embedding_service.ragged import Ragged
from trainers.row_runs import RowRuns

Rows = npt.NDArray[np.int64]
Values = npt.NDArray[np.float64]


def recall(ranked: Rows, truth: Ragged, k: int) -> Values:
    """recall@k = sum_{i <= k} rel_i / |T|; float64 [n]."""
    hits, num_relevant = judge(ranked, truth, k)
    return _defined(hits.sum(axis=1) / np.maximum(num_relevant, 1), num_relevant)


def precision(ranked: Rows, truth: Ragged, k: int) -> Values:
    """precision@k = sum_{i <= k} rel_i / k, also where fewer than k rows were recommended; float64 [n]."""
    hits, num_relevant = judge(ranked, truth, k)
    return _defined(hits.sum(axis=1) / k, num_relevant)


def hit_rate(ranked: Rows, truth: Ragged, k: int) -> Values:
    """hit_rate@k = 1 if any rel_i with i <= k is 1, else 0; float64 [n]."""
    hits, num_relevant = judge(ranked, truth, k)
    return _defined(np.asarray(hits.any(axis=1), dtype=np.float64), num_relevant)


def mrr(ranked: Rows, truth: Ragged, k: int) -> Values:
    """mrr@k = 1 / min{i <= k : rel_i = 1}, 0 if there is none; float64 [n]. Its mean is the mean reciprocal rank."""
    hits, num_relevant = judge(ranked, truth, k)
    values: Values = hits.any(axis=1) / (1 + hits.argmax(axis=1)).astype(np.float64)
    return _defined(values, num_relevant)


def ndcg(ranked: Rows, truth: Ragged, k: int) -> Values:
    """ndcg@k = DCG / IDCG, DCG = sum_{i <= k} rel_i / log2(i + 1), IDCG = sum_{i <= min(k, |T|)} 1 / log2(i + 1).

    Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (TOIS 2002), with binary gains and the
    customary discount at every rank; float64 [n].
    """
    hits, num_relevant = judge(ranked, truth, k)
    discounts = 1.0 / np.log2(np.arange(2, k + 2))
    ideal = np.cumsum(discounts)[np.clip(num_relevant, 1, k) - 1]
    return _defined(hits @ discounts / ideal, num_relevant)


METRICS: dict[str, Callable[[Rows, Ragged, int], Values]] = {
    "recall": recall,
    "ndcg": ndcg,
    "mrr": mrr,
    "hit_rate": hit_rate,
    "precision": precision,
}


def judge(ranked: Rows, truth: Ragged, k: int) -> tuple[npt.NDArray[np.bool_], Rows]:
    """Which of the first k ranked rows are relevant, bool [n, k], and how many relevant items there are, int64 [n].

    Raises ValueError if `ranked` has fewer than k columns (pad with -1 where the catalogue is smaller) or not one list
    for each list of `truth`.
    """
    if ranked.ndim != 2 or not 1 <= k <= ranked.shape[1]:
        raise ValueError(f"metrics at {k} need at least {max(k, 1)} ranked rows per query; got shape {ranked.shape}")
    num_queries = len(truth.offsets) - 1
    if len(ranked) != num_queries:
        raise ValueError(f"{len(ranked)} rankings for {num_queries} queries")
    ranked = ranked[:, :k]
    rows = np.asarray(truth.values, dtype=np.int64)
    query_of = np.repeat(np.arange(num_queries), np.diff(truth.offsets))
    # a (query, row) pair as one integer, so that one sorted array answers for all queries
    stride = 1 + max(rows.max(initial=0), ranked.max(initial=0))
    known = rows >= 0
    relevant = np.unique(query_of[known] * stride + rows[known])
    num_relevant = np.bincount(relevant // stride, minlength=num_queries)
    num_relevant += np.bincount(query_of[~known], minlength=num_queries)
    pairs = np.arange(num_queries)[:, None] * stride + ranked
    places = np.searchsorted(relevant, pairs)
    found = np.append(relevant, -1)[places] == pairs
    return found & (ranked >= 0), num_relevant.astype(np.int64)


def parse_metric(text: str, *, setting: str = "train.metric") -> tuple[str, int]:
    """("recall", 20) of "recall@20". Raises SettingError, naming `setting`, for an unknown metric or a k below 1."""
    name, at, k = text.partition("@")
    if name not in METRICS:
        close = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {close[0]}@{k or 20}?" if close else f"there are {', '.join(METRICS)}, as in recall@20"
        raise SettingError(setting, f"there is no metric {name!r}; {hint}")
    if not at or not (k.isascii() and k.isdigit()) or int(k) < 1:
        raise SettingError(setting, f"a metric is written {name}@20, with a k of at least 1; got {text!r}")
    return name, int(k)


def query_metrics(ranked: Rows, truth: Ragged, metrics: Sequence[str]) -> dict[str, Values]:
    """The value of each of `metrics` ("recall@20", ...) for each query, float64 [n], nan where there is no truth."""
    parsed = {text: parse_metric(text) for text in metrics}
    return {text: METRICS[name](ranked, truth, k) for text, (name, k) in parsed.items()}


def mean_metrics(ranked: Rows, truth: Ragged, metrics: Sequence[str]) -> dict[str, float]:
    """The mean of each of `metrics` over the queries that have truth. Raises DataError if none has."""
    if not np.diff(truth.offsets).any():
        raise DataError("no query has an item that should be found, so there is nothing to measure")
    return {text: float(np.nanmean(values)) for text, values in query_metrics(ranked, truth, metrics).items()}


FREQUENCIES = ("0", "1-5", "6-20", ">20")  # training interactions of an item, in which recall is told apart
_FREQUENCY_STARTS = (1, 6, 21)


class Tally:
    """Sums over queries from which a report's figures follow; the sums of several workers add up.

    `sums` float64: every metric @k, the number of queries that have truth, and for every k and frequency the relevant
    items that were found; then how many there are of each frequency.
    """

    def __init__(self, ks: Sequence[int], counts: Rows | RowRuns) -> None:
        """counts: int64 by row, the training interactions of each row."""
        self._ks, self._counts = tuple(ks), counts
        self._names = [f"{name}@{k}" for k in ks for name in METRICS]
        self.sums = np.zeros(len(self._names) + 1 + len(FREQUENCIES) * (len(ks) + 1))

    def add(self, ranked: Rows, truth: Ragged) -> None:
        """The rankings of n queries, as everywhere here."""
        values = query_metrics(ranked, truth, self._names)
        by_metric = [float(np.nansum(values[name])) for name in self._names]
        asked = int(np.count_nonzero(truth.lengths))
        place = np.asarray(truth.values, dtype=np.int64)
        frequency = np.searchsorted(
            _FREQUENCY_STARTS, np.where(place >= 0, self._counts[np.maximum(place, 0)], 0), side="right"
        )
        found = [np.bincount(frequency, found_of(ranked, truth, k), len(FREQUENCIES)) for k in self._ks]
        by_frequency = np.concatenate([*found, np.bincount(frequency, minlength=len(FREQUENCIES))])
        self.sums += np.concatenate([by_metric, [asked], by_frequency])

    def figures(self) -> dict[str, float]:
        """The mean of every metric over the queries that have truth."""
        num = self.sums[len(self._names)]
        return {
            name: float(total / num) if num else math.nan for name, total in zip(self._names, self.sums, strict=False)
        }

    def by_frequency(self) -> dict[str, dict[str, float]]:
        """For each of FREQUENCIES that the truth has: the number of relevant items, and recall@k over these."""
        *found, num = self.sums[len(self._names) + 1 :].reshape(len(self._ks) + 1, -1)
        return {
            name: {"items": int(num[i])}
            | {f"recall@{k}": float(f[i] / num[i]) for k, f in zip(self._ks, found, strict=True)}
            for i, name in enumerate(FREQUENCIES)
            if num[i]
        }


def found_of(ranked: Rows, truth: Ragged, k: int) -> npt.NDArray[np.bool_]:
    """Which entries of `truth` are among the first k ranked of their query: bool [len(truth.values)]."""
    rows = np.asarray(truth.values, dtype=np.int64)
    stride = 1 + max(rows.max(initial=0), ranked.max(initial=0))
    query = np.arange(len(ranked))[:, None] * stride
    given = np.where(ranked[:, :k] >= 0, query + ranked[:, :k], -1)
    return (rows >= 0) & np.isin(truth.owners() * stride + rows, given)


def _defined(values: Values, num_relevant: Rows) -> Values:
    return np.where(num_relevant > 0, values, np.nan)
