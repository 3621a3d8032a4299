"""Ranking quality over the whole catalogue of a model in training: exact, on any number of workers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist

from cluster.errors import SettingError
from cluster.rank import Rank
from embedding_service.ragged import Ragged
from embedding_service.towers import says
from trainers.cases import Cases
from trainers.metrics import Tally
from trainers.models import Model

_QUERY_BLOCK = 8192
_ITEM_CHUNK = 4096


def check_ks(ks: Sequence[int], num_candidates: int) -> None:
    """Raises SettingError for a k far beyond the catalogue, whose rankings would only be padding."""
    for k in ks:
        if k > max(1000, num_candidates):
            raise SettingError("k", f"{k} is more than the catalogue's {num_candidates} items; ask for less")


@torch.no_grad()
def evaluate_model(
    model: Model,
    cases: Cases,
    *,
    ks: Sequence[int],
    place: Rank,
    mask_seen: bool,
    num_candidates: int = 0,
) -> Tally:
    """Every metric @k of a model in training, exact, over all candidates. A collective call: ranks share the cases.

    mask_seen: what a history holds is not recommended. num_candidates: the first rows that are candidates; 0: all.
    """
    check_ks(ks, num_candidates or model.num_items)
    tally = Tally(ks, model.counts)
    mine = cases.take(np.arange(place.rank, len(cases), place.world_size))
    num_blocks = math.ceil(len(cases) / (place.world_size * _QUERY_BLOCK))
    for block in range(num_blocks):
        part = mine.take(np.arange(block * _QUERY_BLOCK, min(len(mine), (block + 1) * _QUERY_BLOCK)))
        seen = part.history if mask_seen else None
        ranked = _rank_catalogue(model, part, max(ks), seen, num_candidates or model.num_items)
        if len(part):
            tally.add(ranked, part.truth)
    totals = torch.from_numpy(tally.sums)
    dist.all_reduce(totals)
    return tally


def _rank_catalogue(model: Model, cases: Cases, k: int, seen: Ragged | None, num_candidates: int) -> np.ndarray:
    """The k best candidates of each case, best first: int64 [n, k], -1 where the catalogue has fewer.

    A case of which nothing is known is answered with the most frequent items, as the service does.
    """
    asked, k = k, min(k, num_candidates)
    query = model.encode_queries(cases.history, cases.single)
    masked_item = masked_query = np.empty(0, np.int64)
    if seen is not None:
        order = np.argsort(seen.values, kind="stable")
        masked_item, masked_query = seen.values[order], seen.owners()[order]
    vectors = {block.source: block.vectors for block in model.query_tower.spec.inputs}
    sources = vectors.keys()
    cold = np.ones(len(cases), bool)
    if sources & {"history", "last_item"}:
        seen_in_training = model.counts[np.maximum(cases.history.values, 0)] > 0
        trained = cases.history.with_values(np.where(seen_in_training, cases.history.values, -1))
        cold = ~says(trained, num_candidates)  # the unknown row says nothing
    for source in sources & cases.single.keys():
        cold &= ~says(model.tables.known(vectors[source], cases.single[source]))
    frequency = -torch.arange(num_candidates, dtype=query.dtype, device=query.device)  # rows are ordered by it
    best = query.new_full((len(cases), k), -torch.inf)
    rows = torch.full((len(cases), k), -1, dtype=torch.int64, device=query.device)
    for start in range(0, num_candidates, _ITEM_CHUNK):
        stop = min(num_candidates, start + _ITEM_CHUNK)
        scores = query @ model.encode_items(start, stop).T
        scores[torch.from_numpy(cold)] = frequency[start:stop]
        low, high = np.searchsorted(masked_item, [start, stop])
        scores[torch.from_numpy(masked_query[low:high]), torch.from_numpy(masked_item[low:high] - start)] = -torch.inf
        top = scores.topk(min(k, stop - start), dim=1)
        values, choice = torch.cat([best, top.values], 1).topk(k, dim=1)
        rows = torch.cat([rows, top.indices + start], 1).gather(1, choice)
        best = values
    rows[best == -torch.inf] = -1
    return np.pad(rows.cpu().numpy(), ((0, 0), (0, asked - k)), constant_values=-1)
