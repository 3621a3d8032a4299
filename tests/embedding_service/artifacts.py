"""Small artifacts with a planted structure, for the tests of what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.keys import Vocabulary
from embedding_service.quantize import Precision
from embedding_service.towers import Tower, TowerInput, TowerSpec

NUM_ITEMS = 500
NUM_CLUSTERS = 20
DIM = 16
TOWNS = ["Lisboa", "Porto", "Faro"]
HISTORY = TowerInput("history", "history", "input", DIM, 0.8)


def clustered(rows: int, dim: int, *, clusters: int, seed: int) -> np.ndarray:
    """float32 [rows, dim] around `clusters` centres, row i around centre i % clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, dim))
    noise = rng.normal(size=(rows, dim)) * 0.3
    return np.asarray(centres[np.arange(rows) % clusters] + noise, np.float32)


def vocabulary(keys: list[Any], **options: Any) -> Vocabulary:
    """Key i has count 1000 - i // 4 (at least 1): most frequent first, with ties."""
    kind = pa.int64() if isinstance(keys[0], int) else pa.large_string()
    counts = np.maximum(1000 - np.arange(len(keys)) // 4, 1).astype(np.int64)
    return Vocabulary(pa.array(keys, kind), counts, **options)


def publish(
    root: Path,
    *,
    version: str | None = None,
    spec: TowerSpec | None = None,
    precision: Precision = "fp32",
    unknown: Any = "skip",
    factory: str = "auto",
    num_items: int = NUM_ITEMS,
    integer_keys: bool = False,
    same: bool = False,
    with_map: bool = False,
    shards: int = 1,
) -> Path:
    """An item2vec-like artifact: sets `item`, `input`, `user` and `shop`, indexes `recommend` (ip), `similar` (cosine).

    Items i and j look alike and follow each other if i % 20 == j % 20; user u and shop s ask for cluster u % 20 and
    s % 20.
    With `same`, all item vectors are equal: nothing but ties. `recommend` is tuned on means of random items.
    `with_map`: and a map of `input`, with an attribute `town`. `shards`: of both indexes.
    """
    items = vocabulary(list(range(10, 10 + num_items)) if integer_keys else [f"i{i:04d}" for i in range(num_items)])
    items = Vocabulary(items.keys, items.counts, unknown=unknown)
    rows = items.num_rows
    output = clustered(rows, DIM, clusters=NUM_CLUSTERS, seed=1)
    if same:
        output[:] = output[0]
    sets = {
        "item": (output, "item"),
        "input": (output + clustered(rows, DIM, clusters=NUM_CLUSTERS, seed=2) * np.float32(0.01), "item"),
        "user": (clustered(50, DIM, clusters=NUM_CLUSTERS, seed=1), "user"),
        "shop": (clustered(30, DIM, clusters=NUM_CLUSTERS, seed=1), "shop"),
    }
    with ArtifactWriter(root, version) as writer:
        writer.add_keys("item", items)
        writer.add_keys("user", vocabulary([f"u{i}" for i in range(50)]))
        writer.add_keys("shop", vocabulary(list(range(30))))
        for name, (vectors, keys) in sets.items():
            sink = writer.add_vectors(name, rows=len(vectors), dim=DIM, keys=keys, precision=precision)
            sink.write(0, vectors)
        tower = Tower(spec if spec is not None else TowerSpec((HISTORY,), DIM))
        writer.set_query_tower(tower.spec, tower.state_dict())
        target: dict[str, Any] = {"factory": factory, "recall_target": 0.95, "recall_k": 10, "shards": shards}
        chosen = np.random.default_rng(4).integers(0, num_items, (200, 6))
        queries = np.stack([sets["input"][0][line[: 1 + i % 6]].mean(axis=0) for i, line in enumerate(chosen)])
        writer.add_index("recommend", vectors="item", metric="ip", queries=queries, **target)
        writer.add_index("similar", vectors="input", metric="cosine", **target)
        if with_map:
            towns = (np.arange(num_items) % len(TOWNS)).astype(np.uint8)
            writer.add_map(vectors="input", attributes={"town": (towns, TOWNS)})
        return writer.publish(lineage={"run": "test"}, figures={"recall@20": 0.5})
