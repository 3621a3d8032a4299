"""Gates: what a version must show, by itself and against the live one, before it may go live."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.config import GateSettings
from cluster.errors import DataError
from embedding_service.drift import aligned_cosine, nearest_others, neighbour_overlap
from embedding_service.exact import Metric, exact_search
from embedding_service.keys import Key
from embedding_service.ragged import Ragged
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever

MAX_CASES_BYTES = 2**30
ANN_QUERIES = 500  # that an index is asked and exact search too


class Gates(GateSettings):
    """The limits, and what they are measured on. A limit of 0 lets everything pass; the figure is kept all the same."""


@dataclass(frozen=True)
class Figure:
    """One gate's measurement; `value` None: it could not be measured, and `note` says why."""

    gate: str
    value: float | None
    limit: float
    passed: bool
    note: str = ""

    def __str__(self) -> str:
        measured = "not measured" if self.value is None else f"{self.value:.4f}"
        return f"gate {self.gate}: {measured}, limit {self.limit:g}" + (f" ({self.note})" if self.note else "")


def judge(candidate: Retriever, live: Retriever | None, gates: Gates) -> list[Figure]:
    """Every gate's figure. Without a live version those that compare have nothing to compare with, and pass."""
    if live is None:
        return [_ann_recall(candidate, gates)]
    compatible = _compatible(candidate, live)
    if not compatible.passed:  # keys or vectors of another kind: there is nothing to compare, and none to ask
        return [compatible]
    ann = _ann_recall(candidate, gates)
    return [ann, compatible, _recall(candidate, live, gates), *_drift(candidate, live, gates)]


def to_document(figures: list[Figure]) -> list[dict[str, Any]]:
    return [asdict(figure) for figure in figures]


def _ann_recall(candidate: Retriever, gates: Gates) -> Figure:
    """Recall@k of each index against exact search, measured here: what a manifest says of itself is believed only where
    that is less.

    The recommend index is asked with held-out sessions where there are any, else, as the similar index, with stored
    vectors. A row that scores as the k-th best one counts as found.
    """
    file = _cases_file(candidate, gates)
    recalls, notes = {}, {}
    for name, entry in candidate.artifact.manifest["indexes"].items():
        candidates, k = candidate.candidates(name), int(entry["recall"]["k"])
        if name == RECOMMEND and file is not None:
            history, _ = read_cases(file, limit=ANN_QUERIES)
            queries, unknown = candidate.encode(_to_lists(history))[1:]
            queries, asked = queries[~unknown], "held-out sessions"
        else:
            chosen = np.random.default_rng(0).permutation(candidates.rows)[:ANN_QUERIES]
            queries, asked = candidates.vectors.take(chosen), "stored vectors"
        if not len(queries):
            return Figure(
                "ann_recall", None, gates.min_ann_recall, False, f"index {name}: no held-out session is known"
            )
        best = exact_search(queries, candidates.vectors, k, metric=entry["metric"])[0]
        recalls[name] = float((candidates.search(queries, k)[0] >= best[:, -1:]).mean())
        notes[name] = f"index {name}, @{k}, {len(queries)} {asked}"
        if entry["recall"]["value"] < recalls[name]:
            recalls[name], notes[name] = entry["recall"]["value"], f"index {name}, as its manifest has it"
    worst = min(recalls, key=lambda name: recalls[name])
    return _at_least("ann_recall", recalls[worst], gates.min_ann_recall, notes[worst])


def _compatible(candidate: Retriever, live: Retriever) -> Figure:
    """Whether the live version's clients can go on as they are: types of keys, widths of vectors, meaning of scores."""

    def facts(retriever: Retriever) -> dict[str, Any]:
        manifest = retriever.artifact.manifest
        found: dict[str, Any] = {}
        for name in (RECOMMEND, SIMILAR):
            index = manifest["indexes"][name]
            vectors = manifest["vectors"][index["vectors"]]
            found[f"{name} key type"] = manifest["keys"][vectors["keys"]]["key_type"]
            found[f"{name} metric"] = index["metric"]
            found[f"{name} normalisation"] = vectors["normalized"]
        found["recommend dim"] = manifest["indexes"][RECOMMEND]["dim"]
        return found

    former, present = facts(live), facts(candidate)
    changes = [f"{name} {former[name]} -> {present[name]}" for name in former if former[name] != present[name]]
    return Figure("compatible", float(not changes), 1.0, not changes, "; ".join(changes))


def _recall(candidate: Retriever, live: Retriever, gates: Gates) -> Figure:
    """recall@k of held-out sessions through the index, over the live version's: what a user of the service sees."""
    name = "recall_ratio"
    file = _cases_file(candidate, gates)
    if file is None:
        return Figure(name, None, gates.min_recall_ratio, True, "no held-out sessions: set serve.gates.cases")
    history, truth = read_cases(file, limit=gates.max_cases)
    recalls = [recall(retriever, history, truth, gates.recall_k) for retriever in (candidate, live)]
    note = f"recall@{gates.recall_k} {recalls[0]:.4f}, live {recalls[1]:.4f}, {len(history)} sessions"
    return _at_least(name, recalls[0] / recalls[1] if recalls[1] else 1.0, gates.min_recall_ratio, note)


def _cases_file(candidate: Retriever, gates: Gates) -> Path | None:
    """The held-out sessions that the settings name, else those that the version brings along."""
    if gates.cases:
        return Path(gates.cases)
    own = candidate.artifact.path / "cases.parquet"
    return own if own.name in candidate.artifact.manifest["files"] else None


def read_cases(file: Path, *, limit: int) -> tuple[Ragged, Ragged]:
    """Histories and what came next, lists of keys (Arrow), at most `limit`, evenly spread. Raises DataError."""
    try:
        if file.stat().st_size > MAX_CASES_BYTES:
            raise DataError(f"is larger than {MAX_CASES_BYTES} bytes", file=str(file))
        table = pq.read_table(file, columns=["history", "items"])
        lists = [table[name].combine_chunks() for name in ("history", "items")]
        chosen = pa.array(np.unique(np.linspace(0, len(table) - 1, min(limit, len(table))).astype(np.int64)))
        history, truth = (Ragged.from_arrow(one.take(chosen)) for one in lists)
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(f"needs list columns `history` and `items` of keys ({error})", file=str(file)) from None
    if not len(history):
        raise DataError("holds no cases", file=str(file))
    return history, truth


def recall(retriever: Retriever, history: Ragged, truth: Ragged, k: int) -> float:
    """Mean share of each session's items `truth` among its k recommendations; keys that are unknown are missed."""
    shares = []
    for start in range(0, len(history), 1024):
        part = slice(start, min(len(history), start + 1024))
        answered = retriever.recommend(_to_lists(history, part), k).keys
        wanted = [set(one) for one in _to_lists(truth, part)]
        shares += [len(want & set(got)) / len(want) for want, got in zip(wanted, answered, strict=True) if want]
    return float(np.mean(shares)) if shares else 0.0


def _to_lists(ragged: Ragged, part: slice = slice(None)) -> list[list[Key]]:
    bounds = ragged.offsets[part.start or 0 : None if part.stop is None else part.stop + 1]
    return [ragged.values[start:end].to_pylist() for start, end in itertools.pairwise(bounds)]


def _drift(candidate: Retriever, live: Retriever, gates: Gates) -> list[Figure]:
    """Coverage of keys, and over sampled shared items how far vectors and neighbours have moved (index `similar`)."""
    keys, rows = live.catalogue(SIMILAR).keys, np.arange(len(live.catalogue(SIMILAR).keys))
    there = candidate.catalogue(SIMILAR).rows(keys)
    shared = np.flatnonzero((there >= 0) & (there < len(candidate.catalogue(SIMILAR).keys)))
    coverage = _at_least("coverage", len(shared) / len(rows), gates.min_coverage, f"{len(shared)} of {len(rows)} keys")
    if len(shared) <= gates.overlap_k:
        few = f"only {len(shared)} shared keys"
        limits = {"alignment": gates.min_alignment, "overlap": gates.min_overlap}
        return [coverage, *[Figure(name, None, limit, limit == 0.0, few) for name, limit in limits.items()]]
    chosen = np.random.default_rng(0).permutation(shared)[: max(gates.sample, gates.overlap_k + 1) * 10]
    former = live.candidates(SIMILAR).vectors.take(chosen)
    present = candidate.candidates(SIMILAR).vectors.take(there[chosen])
    asked = np.arange(min(gates.sample, len(chosen)))
    metrics = [cast(Metric, one.artifact.manifest["indexes"][SIMILAR]["metric"]) for one in (live, candidate)]
    near = [
        nearest_others(vectors, asked, gates.overlap_k, metric)
        for vectors, metric in zip((former, present), metrics, strict=True)
    ]
    note = f"{len(asked)} items among {len(chosen)} shared ones"
    return [
        coverage,
        _at_least("alignment", aligned_cosine(former[asked], present[asked]), gates.min_alignment, note),
        _at_least("overlap", neighbour_overlap(*near), gates.min_overlap, f"@{gates.overlap_k}, {note}"),
    ]


def _at_least(gate: str, value: float, limit: float, note: str) -> Figure:
    return Figure(gate, value, limit, bool(value >= limit), note)
