"""Single query vectors over HTTP, at equal recall: a Chroma server and ours, with the same vectors.

Chroma has its default HNSW settings. Ours is exported with the recall that Chroma reaches on one half of the queries as
`recall_target`, measured on that half; load and recall of both are those of the other half.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import orjson

from embedding_service.app import serve_artifact
from embedding_service.artifact import Artifact
from embedding_service.exact import exact_search
from embedding_service.retrieval import Retriever
from tests.benchmarks.chroma_server import ChromaServer, chroma_server, find_chroma
from tests.benchmarks.http_endpoints import (
    Endpoint,
    K,
    build_artifact,
    free_port,
    measure_in_turns,
    note,
    query_vectors,
)
from tests.benchmarks.http_load import Request

HALF = 1000  # queries
CONCURRENCY = (1, 32)


def measure_peer(
    artifact: Artifact, root: Path, program: str, *, threads: int, rounds: int, seconds: float
) -> dict[str, Any] | str:
    """Loads and recall@10 against exact search of both; in words where the peer's `program` is not here.

    Ours is a version of `artifact`'s vectors that is built in `root`.
    """
    found = find_chroma(program)
    if found is None:
        return f"skipped: there is no program {program!r} (pip install chromadb, in an environment of its own)"
    vectors = artifact.vectors("item")
    queries = query_vectors(artifact, 2 * HALF)
    tuned_on, asked = queries[:HALF], queries[HALF:]
    truth = exact_search(queries, vectors, K, metric="ip")[1]
    with chroma_server(found) as peer:
        note(f"adding {vectors.rows} vectors to the peer")
        for start, chunk in vectors.chunks(2000):
            peer.add(start, chunk)
        target = _recall(_rows(peer, tuned_on), truth[:HALF])
        note(f"the peer's recall is {target:.4f}: building ours for that")
        ours = build_artifact(root, vectors.rows, queries=tuned_on, recall_target=target)
        with serve_artifact(ours.path, port=free_port(), threads=threads) as service:
            endpoints = {
                "chroma": Endpoint(peer.address, [peer.request(query, K) for query in asked]),
                "ours": Endpoint(service.address, [_request(query) for query in asked]),
            }
            loads: dict[str, Any] = dict(measure_in_turns(endpoints, CONCURRENCY, rounds=rounds, seconds=seconds))
        rows = {"chroma": _rows(peer, asked), "ours": Retriever(ours).search(asked, K).rows.tolist()}
    for name, answered in rows.items():
        loads[name]["recall"] = _recall(answered, truth[HALF:])
    loads["ours"]["parameters"] = ours.manifest["indexes"]["recommend"]["parameters"]
    return loads


def _request(query: np.ndarray) -> Request:
    return Request("/v1/search", orjson.dumps({"vector": query.tolist(), "k": K}))


def _rows(peer: ChromaServer, queries: np.ndarray) -> list[list[int]]:
    return [peer.rows(query, K) for query in queries]


def _recall(answered: list[list[int]], truth: np.ndarray) -> float:
    hits = sum(len(set(got) & set(best)) for got, best in zip(answered, truth.tolist(), strict=True))
    return hits / truth.size
