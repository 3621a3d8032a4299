"""Diginetica (GCE-GNN split), next item of every test prefix, all items ranked, nothing masked: both recipes and
ItemKNN.

python -m tests.benchmarks.diginetica
"""

from __future__ import annotations

import json
import time

import numpy as np
import pyarrow.parquet as pq

from embedding_service.ragged import Ragged
from tests.benchmarks.recipes import data_folder, progress, run_recipe
from trainers.metrics import mean_metrics


def item_knn(k: int = 20) -> dict[str, float]:
    """Cosine ItemKNN: candidates scored by their summed cosine similarity to all items of the prefix.

    cos(a, b) = |sessions with both| / sqrt(|sessions with a| |sessions with b|)
    """
    from scipy.sparse import csr_matrix, diags

    folder = data_folder() / "diginetica"
    sessions = Ragged.from_arrow(pq.read_table(folder / "train.parquet")["items"].combine_chunks())
    test = pq.read_table(folder / "test.parquet")
    history = Ragged.from_arrow(test["history"].combine_chunks())
    truth = Ragged.from_arrow(test["items"].combine_chunks())
    size = int(max(np.asarray(sessions.values).max(), np.asarray(truth.values).max())) + 1
    seen = csr_matrix(
        (np.ones(len(sessions.values)), (sessions.owners(), np.asarray(sessions.values))), (len(sessions), size)
    )
    seen.data[:] = 1.0
    count = np.asarray(seen.sum(0)).ravel()
    scale = diags(1.0 / np.sqrt(np.maximum(count, 1.0)))
    similar = (scale @ (seen.T @ seen) @ scale).tolil()
    similar.setdiag(0.0)
    similar = similar.tocsr()
    query = csr_matrix(
        (np.ones(len(history.values)), (history.owners(), np.asarray(history.values))), (len(history), size)
    )
    ranked = np.full((len(history), k), -1, np.int64)
    for start in range(0, len(history), 2048):
        scores = (query[start : start + 2048] @ similar).toarray()
        top = np.argpartition(-scores, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        ranked[start : start + len(top)] = np.take_along_axis(top, order, 1)
    return mean_metrics(ranked, truth.with_values(np.asarray(truth.values)), [f"hit_rate@{k}", f"mrr@{k}"])


def main() -> None:
    started = time.monotonic()
    knn = item_knn()
    result: dict[str, object] = {
        "item_knn_p20": round(100 * knn["hit_rate@20"], 2),
        "item_knn_mrr20": round(100 * knn["mrr@20"], 2),
        "published_item_knn": {"p20": 39.23, "mrr20": 11.03, "source": "measured by the data's protocol page"},
    }
    progress(json.dumps(result))
    peak = 0
    for kind in ("item2vec", "two_tower"):
        run = run_recipe(f"diginetica_{kind}", "20")
        result |= {
            f"{kind}_p20": round(100 * run["metrics"]["hit_rate@20"], 2),
            f"{kind}_mrr20": round(100 * run["metrics"]["mrr@20"], 2),
            f"{kind}_train_seconds": run["seconds"],
            f"{kind}_epochs": run["epochs"],
            "num_cases": run["num_cases"],
        }
        peak = max(peak, run["peak_rss_bytes"])
        progress(json.dumps({kind: run}))
    print(json.dumps(result | {"wall_seconds": round(time.monotonic() - started, 1), "peak_rss_bytes": peak}))


if __name__ == "__main__":
    main()
