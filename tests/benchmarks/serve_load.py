"""The HTTP service under load, against a bare Ray Serve endpoint, in-process FAISS and a Chroma server, in one run.

    python -m tests.benchmarks.serve_load [--seconds 3] [--rounds 3] [--chroma PATH] [--only overload|peer]

HNSW over 100 k items; one replica, one machine: service, proxy and load generator share its cores. Rounds alternate
between what is compared, and a figure is the median of its rounds.

    single_over_bare   requests/s of similar over those of bare at concurrency 32, see `http_endpoints` for bare: it is
                       Serve as it comes, with Serve's histograms of every request, which our replicas leave out
    single_over_bare_unwatched  the same where Serve is asked not to watch the bare endpoint's clients either
    p99_over_bare      99th percentile of latency of the same
    bulk_over_faiss    the lower of Arrow requests of 1 k and 10 k queries, from the first byte sent to the last
                       received, over `search` of the same index with as many threads in this process
    overload_kept      answers that are no errors per second at twice the peak's rate of requests, over the peak's,
                       which the same client finds before and after it: the median of seven floods, each over the mean
                       of its two peaks; null where requests were lost or late, or held back: `overload` says which. A
                       flood whose rate turns out not to be 1.6 to 2.4 times that mean does not count and is made up
                       for. In one more in their midst every answer is looked at: 200, or 503 with Retry-After. What is
                       open when a flood ends, at most a request a connection, is left out
    overload_worst     the least of those seven
    peer               POST of one query vector, JSON, to a Chroma server with the same vectors and to ours, tuned to
                       its recall (`http_peer`); in words where `chroma` (pip install chromadb, in an environment of
                       its own) is not here
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from embedding_service.app import Service, serve_artifact
from embedding_service.artifact import Artifact
from tests.benchmarks.http_endpoints import (
    DIM,
    Endpoint,
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
from tests.benchmarks.http_load import client_name
from tests.benchmarks.http_overload import overload
from tests.benchmarks.http_peer import measure_peer

CONCURRENCY = (1, 32, 256)
BULK = (1000, 10_000)
MAX_CONNECTIONS = 512  # a third more than the service works on and lets wait; wrk's own time grows with them
FLOODS = 7
FLOOD_SECONDS = 10.0  # so that the first second, with its new connections, weighs little
PEAK_SECONDS = 3.0
UNLIMITED = 1e9  # requests/s: as soon as a connection is free
RATES = (1.6, 2.4)  # of the peak: outside of them a flood is left out, since the machine has changed its speed
MIN_SENT = 0.9  # of the rate that was asked for: refusals that come late hold connections up
TIMEOUT_SECONDS = 2.0  # much less than a flood: wrk notices that an answer is late when it comes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="per measurement")
    parser.add_argument("--chroma", default="chroma", help="the peer's program")
    parser.add_argument("--only", choices=["overload", "peer"], help="that part alone; the last line has its keys")
    args = parser.parse_args()
    threads = os.cpu_count() or 1
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        note(f"building HNSW over {args.items} x {DIM} synthetic clustered vectors")
        artifact = build_artifact(Path(folder), args.items)
        options: dict[str, Any] = {"threads": threads, "rounds": args.rounds, "seconds": args.seconds}
        compare_peer = partial(measure_peer, artifact, Path(folder) / "peer", args.chroma, **options)
        if args.only == "peer":
            print(json.dumps({"peer": compare_peer(), **conditions(artifact, load_before)}))
            return
        note("starting the service")
        with serve_artifact(artifact.path, port=free_port(), threads=threads) as service:
            if args.only:
                similar = {"similar": single_endpoints(service, artifact)["similar"]}
                flood = measure_overload(similar["similar"])
                told = {"overload_kept": flood.pop("kept"), "overload_worst": flood.pop("worst"), "overload": flood}
                print(json.dumps({**told, **conditions(artifact, load_before)}))
                return
            deploy_bare(service, threads)
            endpoints = single_endpoints(service, artifact)
            singles = measure_in_turns(endpoints, CONCURRENCY, rounds=args.rounds, seconds=args.seconds)
            flood = measure_overload(endpoints["similar"])
            bulk = measure_bulk(service, artifact, threads, args.rounds)
        peer = compare_peer()
    bare, unwatched, ours = (singles[name]["c32"] for name in ("bare", "bare_unwatched", "similar"))
    result = {
        "single_over_bare": ours["requests_per_second"] / bare["requests_per_second"],
        "single_over_bare_unwatched": ours["requests_per_second"] / unwatched["requests_per_second"],
        "bulk_over_faiss": min(bulk[f"arrow_{num}"] / bulk[f"faiss_{num}"] for num in BULK),
        "p99_over_bare": ours["p99_ms"] / bare["p99_ms"],
        "overload_kept": flood.pop("kept"),
        "overload_worst": flood.pop("worst"),
        "recommend_over_bare": singles["recommend"]["c32"]["requests_per_second"] / bare["requests_per_second"],
        "singles": singles,
        "overload": flood,
        "bulk_queries_per_second": bulk,
        "peer": peer,
        **conditions(artifact, load_before),
    }
    print(json.dumps(result))


def measure_overload(endpoint: Endpoint) -> dict[str, Any]:
    """Its peak and twice that, in turns; `kept` is None where `problem` says why."""
    if client_name() != "wrk":
        return {"kept": None, "worst": None, "problem": "needs wrk: the client in Python is slower than the service"}
    send = partial(overload, *endpoint, timeout_seconds=TIMEOUT_SECONDS)

    def peak_with(connections: int) -> float:
        found = send(rate=UNLIMITED, connections=connections, seconds=PEAK_SECONDS)
        assert found.is_orderly, found
        assert found.refused == 0, found
        return found.answered

    peak_with(CONCURRENCY[1])  # warms up
    best = max(CONCURRENCY[1:], key=peak_with)
    peaks, floods, shares, problems = [peak_with(best)], [], [], []
    counted: list[float] = []
    while len(counted) < FLOODS and len(floods) < 2 * FLOODS:
        rate = 2 * peaks[-1]
        look = len(floods) == FLOODS // 2
        found = send(rate=rate, connections=MAX_CONNECTIONS, seconds=FLOOD_SECONDS, look=look)
        peaks.append(peak_with(best))
        peak = (peaks[-1] + peaks[-2]) / 2
        floods.append(found)
        shares.append(found.answered / peak)
        note(f"peaks of {peak:.0f}/s, at {rate:.0f}/s {found.answered:.0f}/s and {found.refused:.0f} refusals")
        if not found.is_orderly:
            problems.append(
                f"{found.others} other answers, {found.broken} broken connections, {found.late} late answers"
            )
        elif found.offered < MIN_SENT * rate:
            problems.append(f"{found.offered:.0f} requests/s could be sent of {rate:.0f}")
        elif RATES[0] <= rate / peak <= RATES[1] and not look:
            counted.append(shares[-1])
    if len(counted) < FLOODS:
        problems.append(f"in {len(counted)} of {len(floods)} floods the machine kept its speed")
    return {
        "kept": None if problems else median(counted),
        "worst": min(counted, default=None),
        "answered_over_peak": shares,
        "peaks": peaks,
        "peak_connections": best,
        "timeout_seconds": TIMEOUT_SECONDS,
        "floods": [asdict(found) for found in floods],
        "problem": "; ".join(problems),
    }


def measure_bulk(service: Service, artifact: Artifact, threads: int, rounds: int) -> dict[str, float]:
    """Queries per second of one request, or one call, with so many queries."""
    index = faiss_index(artifact, threads)
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"))
    rates: dict[str, float] = {}
    for num in BULK:
        vectors = query_vectors(artifact, num)
        arrow = post(connection, f"/v1/search?k={K}", arrow_stream(vectors))
        seconds = median_seconds({"faiss": lambda v=vectors: index.search(v, K), "arrow": arrow}, 4 * rounds)
        rates |= {f"{name}_{num}": num / taken for name, taken in seconds.items()}
    connection.close()
    return rates


if __name__ == "__main__":
    main()
