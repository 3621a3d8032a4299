"""Gates: what a version must show, by itself and against the live one, before it may go live."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cluster.errors import DataError
from embedding_service.drift import aligned_cosine, nearest_others, neighbour_overlap
from embedding_service.exact import Metric
from embedding_service.ragged import Ragged
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever

MAX_CASES_BYTES = 2**30


@dataclass(frozen=True)
class Gates:
    """The limits. A limit of 0 lets everything pass; the figure is kept all the same."""

    min_ann_recall: float = 0.9  # of each index against exact search, as its manifest has it
    min_recall_ratio: float = 0.95  # catalogue recall on held-out sessions, of the live version's
    min_coverage: float = 0.8  # share of the live version's keys that the new one has
    min_alignment: float = 0.0  # mean cosine of shared items' vectors after orthogonal alignment
    min_overlap: float = 0.02  # mean share of the neighbours that shared items keep
    cases: str = ""  # Parquet of held-out sessions, `history` and `items`; "": the version's own cases.parquet
    recall_k: int = 20
    overlap_k: int = 10
    sample: int = 1000  # shared keys that drift is measured on
    max_cases: int = 5000


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
    figures = [_ann_recall(candidate, gates)]
    if live is None:
        return figures
    figures.append(_compatible(candidate, live))
    if not figures[-1].passed:  # keys or vectors of another kind: there is nothing to compare
        return figures
    return [*figures, _recall(candidate, live, gates), *_drift(candidate, live, gates)]


def to_document(figures: list[Figure]) -> list[dict[str, Any]]:
    return [asdict(figure) for figure in figures]


def _ann_recall(candidate: Retriever, gates: Gates) -> Figure:
    indexes = candidate.artifact.manifest["indexes"]
    recalls = {name: entry["recall"]["value"] for name, entry in indexes.items()}
    worst = min(recalls, key=lambda name: recalls[name])
    return _at_least("ann_recall", recalls[worst], gates.min_ann_recall, f"index {worst}")


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
    own = candidate.artifact.path / "cases.parquet"
    listed = "cases.parquet" in candidate.artifact.manifest["files"]
    file = Path(gates.cases) if gates.cases else own if listed else None
    if file is None:
        return Figure(name, None, gates.min_recall_ratio, True, "no held-out sessions: set serve.gates.cases")
    history, truth = read_cases(file, limit=gates.max_cases)
    recalls = [recall(retriever, history, truth, gates.recall_k) for retriever in (candidate, live)]
    note = f"recall@{gates.recall_k} {recalls[0]:.4f}, live {recalls[1]:.4f}, {len(history)} sessions"
    return _at_least(name, recalls[0] / recalls[1] if recalls[1] else 1.0, gates.min_recall_ratio, note)


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
        sessions = [one.to_pylist() for one in _lists(history, part)]
        answered = retriever.recommend(sessions, k).keys
        wanted = [set(one.to_pylist()) for one in _lists(truth, part)]
        shares += [len(want & set(got)) / len(want) for want, got in zip(wanted, answered, strict=True) if want]
    return float(np.mean(shares)) if shares else 0.0


def _lists(ragged: Ragged, part: slice) -> list[Any]:
    bounds = ragged.offsets[part.start : part.stop + 1]
    return [ragged.values[start:end] for start, end in itertools.pairwise(bounds)]


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
