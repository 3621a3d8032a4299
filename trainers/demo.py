"""The whole path on input that every machine has: the calls in the functions of the Python standard library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import numpy as np

from cluster.config import Config, config_from_dict
from embedding_service.artifact import Artifact
from embedding_service.keys import Vocabulary
from embedding_service.retrieval import Retriever
from trainers.cases import Cases, load_cases
from trainers.corpus import write_corpus
from trainers.evaluate import evaluate_artifact
from trainers.export import export_run
from trainers.loop import train
from trainers.metrics import mean_metrics
from trainers.prepare import load_prepared

METRICS = ("recall@20", "ndcg@20", "mrr@20")
_SIMILAR = ("os.path.join", "threading.Lock", "json.dumps", "struct.unpack", "re.compile", "socket.socket", "open")
_SESSIONS = (
    ("argparse.ArgumentParser", "parser.add_argument"),
    ("threading.Lock", "threading.Condition"),
    ("os.path.exists", "os.makedirs"),
    ("json.loads", "isinstance"),
)

_MODELS: dict[str, dict[str, Any]] = {
    "item2vec": {
        "model": {"kind": "item2vec", "window": 3, "negative_exponent": 0.25, "history_decay": 0.7},
        "train": {"epochs": 40, "learning_rate": 0.1, "batch_size": 20_000},
    },
    "two_tower": {
        "model": {"kind": "two_tower", "query": ["history"], "history_decay": 0.7, "share_items": False},
        "train": {"epochs": 10, "learning_rate": 0.05, "optimizer": "sgd", "batch_size": 512},
    },
}


@dataclass(frozen=True)
class Demo:
    """What the demo has made: figures for the last line, the lines of the tables, and what to serve."""

    figures: dict[str, Any]
    table: list[tuple[str, ...]]
    examples: list[tuple[str, list[str]]]
    served: Path
    question: str  # path and query string of a request worth trying


def demo_config(folder: Path, kind: str, *, site_packages: bool) -> Config:
    """The demo's run of one model; settings chosen on held-out training functions."""
    tree = _MODELS[kind]
    epochs = tree["train"]["epochs"]
    epochs = max(2, epochs // 4) if site_packages else epochs  # eighteen times the calls
    return config_from_dict(
        {
            "run": str(folder / kind),
            "data": {
                "train": str(folder / "data" / "train.parquet"),
                "test": str(folder / "data" / "test.parquet"),
                "holdout": "sessions",
                "holdout_fraction": 0.05,
            },
            "keys": {"min_count": 2},
            "model": {"dim": 64, **tree["model"]},
            "train": {"validate_every": 10, **tree["train"], "epochs": epochs},
        }
    )


def run_demo(folder: str | Path, *, site_packages: bool = False, on_event: Callable[[dict[str, Any]], None]) -> Demo:
    """Corpus -> sessions -> both models -> artifacts -> figures on held-out functions, below `folder` (made anew)."""
    root = Path(folder)
    on_event({"kind": "note", "text": "reading the calls in Python's standard library"})
    corpus = write_corpus(root / "data", site_packages=site_packages)
    text = (
        f"{corpus.files:,} files, {corpus.train_sessions:,} functions to train on ({corpus.calls:,} calls in all); "
        f"{corpus.test_cases:,} next calls of other functions to predict"
    )
    on_event({"kind": "note", "text": text})
    figures: dict[str, Any] = {"test_cases": corpus.test_cases}
    table: list[tuple[str, ...]] = []
    for kind in _MODELS:
        config = demo_config(root, kind, site_packages=site_packages)
        result = train(config, fresh=True, on_event=on_event)
        artifact = Artifact.open(export_run(config.run, on_event=on_event))
        prepared = load_prepared(config.run)
        cases = load_cases(config, prepared.key_maps, {}, config.data.test)
        if not table:
            found = popularity(prepared.keys["item"], cases)
            figures["popularity"] = found
            table.append(("popularity", "", *_cells(found), ""))
        for exact in (True, False):
            found = evaluate_artifact(artifact, cases, ks=(20,), mask_seen=True, exact=exact).figures()
            search = "exact" if exact else "index"
            seconds = f"{result['seconds']:.0f}"
            table.append((kind, search, *_cells(found), seconds if exact else ""))
            figures[f"{kind}_{search}"] = {name: found[name] for name in METRICS}
        figures[f"{kind}_seconds"] = result["seconds"]
    best = max(_MODELS, key=lambda kind: figures[f"{kind}_exact"]["recall@20"])
    examples, question = _examples(root)
    served = root / best / "artifacts"
    return Demo({**figures, "served": best}, table, examples, served, question)


def popularity(items: Vocabulary, cases: Cases) -> dict[str, float]:
    """The same protocol for the most frequent items, those of the history left out."""
    longest = int(cases.history.lengths.max(initial=0))
    most = np.arange(min(len(items.keys), 20 + longest))  # rows are ordered by frequency
    ranked = np.full((len(cases), 20), -1, np.int64)
    for i, seen in enumerate(cases.history.to_lists()):
        kept = most[~np.isin(most, seen)][:20]
        ranked[i, : len(kept)] = kept
    return mean_metrics(ranked, cases.truth, METRICS)


def _cells(found: dict[str, float]) -> Iterable[str]:
    return (f"{found[name]:.4f}" for name in METRICS)


def _examples(root: Path) -> tuple[list[tuple[str, list[str]]], str]:
    """A few readable neighbours and recommendations, and a request that gives one of them."""
    neighbours = Retriever(Artifact.open(root / "item2vec" / "artifacts"))
    next_calls = Retriever(Artifact.open(root / "two_tower" / "artifacts"))
    known = neighbours.artifact.keys("item")
    lines = []
    names = [name for name in _SIMILAR if known.row(name) >= 0][:4]
    for name in names:
        lines.append((f"similar to {name}", [str(key) for key in neighbours.similar([name], 5).keys[0]]))
    sessions = [session for session in _SESSIONS if any(known.row(name) >= 0 for name in session)][:3]
    for session in sessions:
        found = next_calls.recommend([list(session)], 5)
        lines.append((f"after {', '.join(session)}", [str(key) for key in found.keys[0]]))
    chosen = sessions[0] if sessions else tuple(known.keys.slice(0, 1).to_pylist())
    return lines, "/v1/recommend?" + urlencode([("items", item) for item in chosen] + [("k", "5")])
