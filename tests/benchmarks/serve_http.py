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
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import faiss
import numpy as np
import orjson
import pyarrow as pa

from embedding_service.app import Service, serve_artifact
from embedding_service.artifact import Artifact, ArtifactWriter
from embedding_service.http_schema import ARROW_TYPE
from embedding_service.keys import Vocabulary
from embedding_service.towers import TowerInput, TowerSpec
from tests.benchmarks.http_load import Load, client_name, measure

K = 10
DIM = 64
SESSION_ITEMS = 5
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
            singles = measure_singles(service, artifact, args.rounds, args.seconds)
            bulk = measure_bulk(service, artifact, threads, args.rounds)
    index = artifact.manifest["indexes"]["recommend"]
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
        "data": f"{args.items} x {DIM} synthetic clustered vectors",
        "index": {name: index[name] for name in ("factory", "parameters", "recall")},
        "machine": {
            "cores": os.cpu_count(),
            "load_before": load_before,
            "client": f"{client_name()}, sharing these cores",
        },
    }
    print(json.dumps(result))


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def build_artifact(root: Path, num_items: int) -> Artifact:
    """An artifact shaped as item2vec's: a pooled history as query, HNSW indexes over items (ip) and inputs (cosine)."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, num_items // 50), DIM))
    vectors = centres[rng.integers(0, len(centres), num_items)] + 0.7 * rng.standard_normal((num_items, DIM))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    keys = pa.array(rng.permutation(100 * num_items)[:num_items])
    spec = TowerSpec((TowerInput("history", "history", "input", DIM, decay=0.8),), DIM)
    writer = ArtifactWriter(root)
    writer.add_keys("item", Vocabulary(keys, np.arange(num_items, 0, -1)))
    for name in ("item", "input"):
        sink = writer.add_vectors(name, rows=num_items, dim=DIM, keys="item", precision="fp16")
        sink.write(0, vectors)
    writer.set_query_tower(spec, {})
    options: dict[str, Any] = {"factory": "HNSW32", "recall_target": 0.95, "recall_k": K}
    writer.add_index("recommend", vectors="item", metric="ip", **options)
    writer.add_index("similar", vectors="input", metric="cosine", **options)
    return Artifact.open(writer.publish(lineage={}, figures={}))


class Bare:
    async def __call__(self, request: Any) -> str:
        return "ok"


def deploy_bare(service: Service, threads: int) -> None:
    """The bare endpoint, at /bare, with the options of ours; returns once HAProxy passes requests on to it."""
    from ray import serve

    from embedding_service.app import deployment_options

    options = deployment_options(threads=threads)
    options["ray_actor_options"]["num_cpus"] = 0
    deployment: Any = serve.deployment(**options)
    serve.run(deployment(Bare).bind(), name="bare", route_prefix="/bare")
    deadline = time.monotonic() + 60.0
    while measure(service.address, ["/bare"], connections=1, seconds=0.1).errors:
        assert time.monotonic() < deadline, "the bare endpoint does not answer"


def measure_singles(service: Service, artifact: Artifact, rounds: int, seconds: float) -> dict[str, dict[str, Any]]:
    targets = single_targets(artifact)
    loads: dict[tuple[str, int], list[Load]] = {(name, c): [] for name in targets for c in (1, 32)}
    for number in range(rounds + 1):
        for (name, connections), done in loads.items():
            load = measure(service.address, targets[name], connections=connections, seconds=seconds if number else 1)
            assert load.errors == 0, f"{name}: {load}"
            if number:  # the first round warms up
                done.append(load)
        note(
            f"round {number}: "
            + ", ".join(f"{n} c{c} {d[-1].requests_per_second:.0f}/s" for (n, c), d in loads.items() if d)
        )
    return {
        name: {
            f"c{connections}": {
                field: median(asdict(load)[field] for load in loads[name, connections])
                for field in ("requests_per_second", "p50_ms", "p99_ms")
            }
            for connections in (1, 32)
        }
        for name in targets
    }


def single_targets(artifact: Artifact) -> dict[str, list[str]]:
    rng = np.random.default_rng(1)
    keys = artifact.keys("item").keys.to_numpy()
    sessions = keys[rng.integers(0, len(keys), (5000, SESSION_ITEMS))]
    return {
        "bare": ["/bare"],
        "similar": [f"/v1/similar?key={key}&k={K}" for key in sessions[:, 0]],
        "recommend": [f"/v1/recommend?{'&'.join(f'items={key}' for key in row)}&k={K}" for row in sessions],
    }


def measure_bulk(service: Service, artifact: Artifact, threads: int, rounds: int) -> dict[str, float]:
    """Queries per second of one request, or one call, with 1024 queries."""
    rng = np.random.default_rng(2)
    keys = artifact.keys("item").keys.to_numpy()
    vectors = artifact.vectors("item").take(rng.integers(0, len(keys), BULK))
    vectors = vectors + np.float32(0.1) * rng.standard_normal(vectors.shape, dtype=np.float32)
    index = faiss.read_index(str(Path(artifact.path) / artifact.manifest["indexes"]["recommend"]["file"]))
    faiss.omp_set_num_threads(threads)
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"))

    def post(path: str, body: dict[str, Any] | bytes) -> Callable[[], None]:
        headers = {}
        if isinstance(body, bytes):
            headers["content-type"] = ARROW_TYPE
        else:
            body = orjson.dumps({**body, "k": K}, option=orjson.OPT_SERIALIZE_NUMPY)

        def request() -> None:
            connection.request("POST", path, body, headers)
            response = connection.getresponse()
            answer = response.read()
            assert response.status == 200, answer[:200]

        return request

    calls = {
        "faiss": lambda: index.search(vectors, K),
        "search_arrow": post(f"/v1/search?k={K}", arrow_stream(vectors)),
        "search_json": post("/v1/search", {"vectors": vectors}),
        "similar": post("/v1/similar", {"keys": keys[rng.integers(0, len(keys), BULK)]}),
        "recommend": post("/v1/recommend", {"sessions": keys[rng.integers(0, len(keys), (BULK, SESSION_ITEMS))]}),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(4 * rounds + 1):
        for name, call in calls.items():
            call()  # not timed: OpenMP threads of the call before spin for a while on cores that this one needs
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    connection.close()
    return {name: BULK / median(times) for name, times in seconds.items()}


def arrow_stream(vectors: np.ndarray) -> bytes:
    batch = pa.record_batch([pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM)], ["vector"])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    stream: bytes = sink.getvalue().to_pybytes()
    return stream


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
