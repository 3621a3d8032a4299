"""HTTP service against a bare Ray Serve endpoint and against in-process FAISS, in one run.

    python -m tests.benchmarks.serve_http

Both endpoints run on one Serve instance in high-throughput mode, one replica each with the same options; the bare one
is an `async __call__` that returns a constant. Rounds alternate between them, and a figure is the median of its rounds.
Single queries are GET requests for changing items; bulk is one POST of 1024 queries, timed from the first byte sent to
the last byte received, against `search` of the same FAISS index in this process with as many threads.

    single_over_bare         the lower of similar and recommend: requests/s at concurrency 32 over those of bare
    p50_ms                   the higher of similar and recommend at concurrency 1
    bulk_over_faiss          queries/s of POST /v1/search as an Arrow stream over those of FAISS: the form for bulk
    bulk_json_over_faiss     the same vectors in the same request as JSON
    bulk_similar_over_faiss  POST /v1/similar {"keys"}, JSON, over FAISS with the other vectors
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
from pathlib import Path

import numpy as np

from embedding_service.app import Service, serve_artifact
from embedding_service.artifact import Artifact
from tests.benchmarks.http_endpoints import (
    DIM,
    SESSION_ITEMS,
    K,
    arrow_stream,
    build_artifact,
    conditions,
    deploy_bare,
    faiss_index,
    free_port,
    measure_in_turns,
    median_seconds,
    note,
    post,
    query_vectors,
    single_endpoints,
)

BULK = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        note(f"building HNSW over {args.items} x {DIM} synthetic clustered vectors")
        artifact = build_artifact(Path(folder), args.items)
        threads = os.cpu_count() or 1
        load_before = os.getloadavg()[0]
        note("starting the service")
        with serve_artifact(artifact.path, port=free_port(), threads=threads) as service:
            deploy_bare(service, threads)
            singles = measure_in_turns(
                single_endpoints(service, artifact), (1, 32), rounds=args.rounds, seconds=args.seconds
            )
            bulk = measure_bulk(service, artifact, threads, args.rounds)
    ratios = {
        name: singles[name]["c32"]["requests_per_second"] / singles["bare"]["c32"]["requests_per_second"]
        for name in ("similar", "recommend")
    }
    result = {
        "single_over_bare": min(ratios.values()),
        "p50_ms": max(singles[name]["c1"]["p50_ms"] for name in ratios),
        "bulk_over_faiss": bulk["search_arrow"] / bulk["faiss"],
        "bulk_json_over_faiss": bulk["search_json"] / bulk["faiss"],
        "bulk_similar_over_faiss": bulk["similar"] / bulk["faiss"],
        "similar_over_bare": ratios["similar"],
        "recommend_over_bare": ratios["recommend"],
        "singles": singles,
        "bulk_queries_per_second": bulk,
        **conditions(artifact, load_before),
    }
    print(json.dumps(result))


def measure_bulk(service: Service, artifact: Artifact, threads: int, rounds: int) -> dict[str, float]:
    """Queries per second of one request, or one call, with 1024 queries."""
    rng = np.random.default_rng(2)
    keys = artifact.keys("item").keys.to_numpy()
    vectors = query_vectors(artifact, BULK)
    index = faiss_index(artifact, threads)
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"))
    sessions = keys[rng.integers(0, len(keys), (BULK, SESSION_ITEMS))]
    calls = {
        "faiss": lambda: index.search(vectors, K),
        "search_arrow": post(connection, f"/v1/search?k={K}", arrow_stream(vectors)),
        "search_json": post(connection, "/v1/search", {"vectors": vectors, "k": K}),
        "similar": post(connection, "/v1/similar", {"keys": keys[rng.integers(0, len(keys), BULK)], "k": K}),
        "recommend": post(connection, "/v1/recommend", {"sessions": sessions, "k": K}),
    }
    seconds = median_seconds(calls, 4 * rounds)
    connection.close()
    return {name: BULK / taken for name, taken in seconds.items()}


if __name__ == "__main__":
    main()
