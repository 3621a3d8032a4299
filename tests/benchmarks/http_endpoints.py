"""What the HTTP benchmarks ask: an artifact with HNSW indexes, the service on it, a bare endpoint, requests.

The bare endpoint is an `async __call__` that returns a constant, on the same Serve instance in high-throughput mode,
one replica each with the same options. Serve watches its clients as it does by default; `bare_unwatched` asks it for
what our replicas ask by themselves (`embedding_service.http_unwatched`). Both have Serve's histograms of every request,
which our replicas leave out (`cluster.metrics.leave_out_request_histograms`).
"""

from __future__ import annotations

import http.client
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import faiss
import numpy as np
import orjson
import pyarrow as pa

from embedding_service import http_unwatched
from embedding_service.app import Service
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.http_schema import ARROW_TYPE
from embedding_service.keys import Vocabulary
from embedding_service.towers import TowerInput, TowerSpec
from tests.benchmarks.http_load import Load, Request, client_name, measure

K = 10
DIM = 64
SESSION_ITEMS = 5


def note(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def build_artifact(
    root: Path, num_items: int, *, queries: np.ndarray | None = None, recall_target: float = 0.95
) -> Artifact:
    """An artifact shaped as item2vec's: a pooled history as query, HNSW indexes over items (ip) and inputs (cosine).

    The vectors are the same each time. The index over items reaches `recall_target` on `queries`, by default on items.
    """
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
    options: dict[str, Any] = {"factory": "HNSW32", "recall_k": K}
    writer.add_index("recommend", vectors="item", metric="ip", queries=queries, recall_target=recall_target, **options)
    writer.add_index("similar", vectors="input", metric="cosine", recall_target=0.95, **options)
    return Artifact.open(writer.publish(lineage={}, figures={}))


def conditions(artifact: Artifact, load_before: float) -> dict[str, Any]:
    """What a result was measured on: data, index and machine."""
    index = artifact.manifest["indexes"]["recommend"]
    return {
        "data": f"{index['rows']} x {DIM} synthetic clustered vectors",
        "index": {name: index[name] for name in ("factory", "parameters", "recall")},
        "machine": {
            "cores": os.cpu_count(),
            "load_before": load_before,
            "client": f"{client_name()}, sharing these cores",
        },
    }


class Bare:
    async def __call__(self, request: Any) -> str:
        return "ok"


def deploy_bare(service: Service, threads: int) -> None:
    """The bare endpoint, at /bare, with the options of ours; returns once HAProxy passes requests on to it."""
    from ray import serve

    from embedding_service.app import deployment_options

    options = deployment_options(threads=threads)
    actor = options["ray_actor_options"]
    actor["num_cpus"] = 0
    for name in http_unwatched.ENVIRONMENT:
        del actor["runtime_env"]["env_vars"][name]
    deployment: Any = serve.deployment(**options)
    serve.run(deployment(Bare).bind(), name="bare", route_prefix="/bare")
    deadline = time.monotonic() + 60.0
    while measure(service.address, [Request("/bare")], connections=1, seconds=0.1).errors:
        assert time.monotonic() < deadline, "the bare endpoint does not answer"


class Endpoint(NamedTuple):
    """Requests that are sent in turn to the server at `address`."""

    address: str
    requests: Sequence[Request]


def single_endpoints(service: Service, artifact: Artifact) -> dict[str, Endpoint]:
    """Single queries for changing items, and the bare endpoint."""
    rng = np.random.default_rng(1)
    keys = artifact.keys("item").keys.to_numpy()
    sessions = keys[rng.integers(0, len(keys), (5000, SESSION_ITEMS))]
    paths = {
        "bare": ["/bare"],
        "similar": [f"/v1/similar?key={key}&k={K}" for key in sessions[:, 0]],
        "recommend": [f"/v1/recommend?{'&'.join(f'items={key}' for key in row)}&k={K}" for row in sessions],
    }
    found = {name: Endpoint(service.address, [Request(path) for path in those]) for name, those in paths.items()}
    header = tuple(part.decode() for part in http_unwatched.HEADER)
    found["bare_unwatched"] = Endpoint(service.address, [Request("/bare", headers=(header,))])
    return found


def measure_in_turns(
    endpoints: Mapping[str, Endpoint],
    connections: Sequence[int],
    *,
    rounds: int,
    seconds: float,
) -> dict[str, dict[str, dict[str, float]]]:
    """name -> c<connections> -> requests_per_second, p50_ms and p99_ms: medians of rounds in which all take turns, with
    one number of connections after the other, so that what is compared is measured within seconds.

    The first round warms up. Raises AssertionError for an answer that is no success.
    """
    loads: dict[tuple[str, int], list[Load]] = {(name, c): [] for c in connections for name in endpoints}
    for number in range(rounds + 1):
        for (name, num), done in loads.items():
            load = measure(*endpoints[name], connections=num, seconds=seconds if number else 1)
            assert load.errors == 0, f"{name}, {num} connections: {load}"
            if number:
                done.append(load)
        told = [f"{n} c{c} {done[-1].requests_per_second:.0f}/s" for (n, c), done in loads.items() if done]
        note(f"round {number}: {', '.join(told)}")
    fields = ("requests_per_second", "p50_ms", "p99_ms")
    return {
        name: {
            f"c{num}": {field: median(asdict(load)[field] for load in loads[name, num]) for field in fields}
            for num in connections
        }
        for name in endpoints
    }


def query_vectors(artifact: Artifact, num: int) -> np.ndarray:
    """float32 [num, dim] near items."""
    rng = np.random.default_rng(2)
    vectors = artifact.vectors("item")
    chosen = vectors.take(rng.integers(0, vectors.rows, num))
    return chosen + np.float32(0.1) * rng.standard_normal(chosen.shape, dtype=np.float32)


def faiss_index(artifact: Artifact, threads: int) -> Any:
    """The artifact's own index in this process, without the service."""
    faiss.omp_set_num_threads(threads)
    return faiss.read_index(str(Path(artifact.path) / artifact.manifest["indexes"]["recommend"]["file"]))


def post(connection: http.client.HTTPConnection, path: str, body: Mapping[str, Any] | bytes) -> Callable[[], None]:
    """A call that posts an Arrow stream, or a JSON document, and reads the answer to its last byte."""
    is_arrow = isinstance(body, bytes)
    sent = body if is_arrow else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
    headers = {"content-type": ARROW_TYPE if is_arrow else "application/json"}

    def request() -> None:
        connection.request("POST", path, sent, headers)
        response = connection.getresponse()
        answer = response.read()
        assert response.status == 200, answer[:200]

    return request


def median_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """What each call takes, in turns; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        for name, call in calls.items():
            call()  # not timed: OpenMP threads of the call before spin for a while on cores that this one needs
            start = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: median(times) for name, times in seconds.items()}


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
