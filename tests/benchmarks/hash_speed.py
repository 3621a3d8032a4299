"""How many keys a second, on one core, find their rows without a vocabulary, and how little memory that takes.

    python -m tests.benchmarks.hash_speed [--keys 1000000000] [--quick]

Distinct int64 keys are generated (a counter scrambled by splitmix64, which is a bijection: no two are equal; they are
not real keys) and streamed in chunks through each map: key -> id (`HashedKeys`) -> rows (`RowMap`). The plain hash, one
row a key, sees all `--keys`; so does every other map but for strings, which see a fiftieth.

    keys_per_second_per_core    plain hash, generation not counted; median over equal parts of the stream
    <map>_keys_per_second       the same of each map
    peak_rss_bytes              of the whole process, numba and Arrow included
    rss_growth_bytes            by which it grew while the keys went by: what is not constant would show here

Quotients and remainders and head + tail need ids that count (a vocabulary's); for them the ids are the counter. The
last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from embedding_service.hashed_keys import NUM_IDS, HashedKeys
from embedding_service.hashing import stable_hash
from embedding_service.row_maps import RowMap
from trainers.loop import peak_rss_bytes

CHUNK = 1 << 16  # keys at a time: their ids and rows stay in the cache
PARTS = 10
ROWS = 10**8


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.hash_speed", description=__doc__.split("\n")[0])
    parser.add_argument("--keys", type=int, default=10**9)
    parser.add_argument("--quick", action="store_true", help="ten million keys")
    arguments = parser.parse_args()
    num = 10**7 if arguments.quick else arguments.keys
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for stream in STREAMS.values():  # load and compile
        list(measure(stream, CHUNK, 1))
    before = peak_rss_bytes()
    result: dict[str, object] = {"generated_keys": num}
    for name, stream in STREAMS.items():
        count = num // 50 if name == "string_keys" else num
        speeds = measure(stream, count, PARTS)
        speed = statistics.median(speeds)
        result["keys_per_second_per_core" if name == "plain" else f"{name}_keys_per_second"] = round(speed)
        sys.stderr.write(
            f"{name}: {count:,} keys, {speed / 1e6:.1f} M/s ({min(speeds) / 1e6:.1f} to {max(speeds) / 1e6:.1f}), "
            f"peak RSS {peak_rss_bytes() / 2**20:.0f} MiB\n"
        )
    peak = peak_rss_bytes()
    print(json.dumps(result | {"peak_rss_bytes": peak, "rss_growth_bytes": peak - before}))


def measure(stream: Callable[[np.ndarray], tuple[float, int]], num: int, parts: int) -> list[float]:
    """Keys per second in each of `parts` equal parts of a stream of `num` distinct keys."""
    speeds = []
    for part in range(parts):
        seconds, done = 0.0, 0
        for start in range(part * num // parts, (part + 1) * num // parts, CHUNK):
            counter = np.arange(start, min(start + CHUNK, (part + 1) * num // parts), dtype=np.int64)
            spent, largest = stream(counter)
            assert 0 <= largest < ROWS
            seconds, done = seconds + spent, done + len(counter)
        speeds.append(done / seconds)
    return speeds


def hashed(map: RowMap) -> Callable[[np.ndarray], tuple[float, int]]:
    """Scrambled int64 keys -> ids -> rows: (seconds, largest row) of a chunk."""
    keys = HashedKeys("int64")

    def run(counter: np.ndarray) -> tuple[float, int]:
        column = stable_hash(counter, seed=1).view(np.int64)
        began = time.perf_counter()
        rows = map.lists(keys.rows(column)).values
        return time.perf_counter() - began, int(rows.max())

    return run


def counted(map: RowMap) -> Callable[[np.ndarray], tuple[float, int]]:
    """Ids that a vocabulary has given -> rows."""

    def run(counter: np.ndarray) -> tuple[float, int]:
        began = time.perf_counter()
        rows = map.lists(counter).values
        return time.perf_counter() - began, int(rows.max())

    return run


def strings(map: RowMap) -> Callable[[np.ndarray], tuple[float, int]]:
    """Keys of 8 to 22 characters."""
    keys = HashedKeys("string")

    def run(counter: np.ndarray) -> tuple[float, int]:
        column = pa.array(stable_hash(counter, seed=1).view(np.int64)).cast(pa.large_string())
        began = time.perf_counter()
        rows = map.lists(keys.rows(column)).values
        return time.perf_counter() - began, int(rows.max())

    return run


IDS = 2**40  # as many as a vocabulary could have
STREAMS = {
    "plain": hashed(RowMap("hashed", NUM_IDS, ROWS)),
    "two_hashes": hashed(RowMap("hashed", NUM_IDS, ROWS, hashes=2)),
    "three_hashes": hashed(RowMap("hashed", NUM_IDS, ROWS, hashes=3)),
    "string_keys": strings(RowMap("hashed", NUM_IDS, ROWS)),
    "head_tail": counted(RowMap("head_tail", IDS, ROWS, head=ROWS // 2, hashes=2)),
    "quotient_remainder": counted(RowMap.quotient_remainder(10**9 + 1, ROWS)),
}


if __name__ == "__main__":
    main()
