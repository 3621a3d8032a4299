"""Kinds of index over one catalogue: memory, build time, recall and speed, tuned by us and as FAISS has them.

    python -m tests.benchmarks.index_tradeoff [--quick] [--cache FOLDER] [--kinds HNSW32,...] [--gowalla-run FOLDER]

The catalogue is synthetic (1 M x 64: no public data set here has so many trained vectors): clusters of unequal size,
noise with a decaying spectrum, lengths that differ. Queries are means of fresh draws from one cluster; the 20 k that
tune and the 20 k that measure are drawn apart. `ours` is what is exported and served: tuned to recall@10 of .95, rows
found scored anew from fp16 vectors. `plain` is the same factory string (PQ: with FAISS's own refinement) with FAISS's
default parameters. Both answer 20 k (Flat: 1000) in one call with all cores; `microseconds` are of single queries, ours
in one thread, FAISS's as it divides them.

    recall_error_max      the largest |recall@10 - .95| on the queries that did not tune, over the kinds that have
                          something to tune; of Flat 1 - recall
    gowalla.arrangements  recall@20 of a graph over that run's output vectors, see `embedding_service.index`
    fp16_loss, int8_loss  Recall@20 on Gowalla's test cases that an export loses against fp32, by exact search over the
                          exported vectors of one run of the item2vec recipe (LEXSHARD_DATA)

Building takes minutes. With --cache what has been built is kept there and only measured again; --kinds builds some of
them, so that the work can be done in pieces; the run that measures all of them gives the figures.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any, get_args

import faiss
import numpy as np

from cluster.config import load_config
from embedding_service.artifact import Artifact
from embedding_service.candidates import Candidates
from embedding_service.exact import unit_length
from embedding_service.index import Arrangement, VectorIndex
from embedding_service.index_plan import estimate
from embedding_service.quantize import encode
from embedding_service.retrieval import Retriever
from embedding_service.tuning import Queries, RecallTest, tune
from embedding_service.vectors import VectorSet
from tests.benchmarks.recipes import RECIPES, data_folder, lexshard, progress
from trainers.cases import Cases, load_cases
from trainers.evaluate import evaluate_artifact
from trainers.export import export_run
from trainers.prepare import load_prepared

K, DIM, TARGET = 10, 64, 0.95
NUM_QUERIES = 20_000
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 k rows")
    parser.add_argument("--cache", default="", metavar="PATH", help="keeps what has been built")
    parser.add_argument("--kinds", default="", metavar="FACTORY;...", help="only these; no last line")
    parser.add_argument("--build-only", action="store_true", help="of the --kinds: build, and measure nothing")
    parser.add_argument("--gowalla-run", default="", metavar="FOLDER", help="a run of the recipe, trained if missing")
    args = parser.parse_args()
    rows = 100_000 if args.quick else 1_000_000
    lists = 1024 if args.quick else 4096
    kinds = ["HNSW32", f"IVF{lists},SQ8", f"IVF{lists},PQ32x4fs", "Flat"]
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        cache = Path(args.cache or folder) / str(rows)
        cache.mkdir(parents=True, exist_ok=True)
        data = Catalogue(rows)
        if args.build_only:
            for kind in args.kinds.split(";"):
                built(kind, data.vectors, cache)
            return
        found = {kind: measured(kind, data, cache) for kind in (args.kinds.split(";") if args.kinds else kinds)}
        if args.kinds:
            return
        losses = gowalla_losses(Path(args.gowalla_run or folder) / "gowalla_item2vec")
    print(
        json.dumps(
            {
                "recall_error_max": max(entry["ours"]["recall_error"] for entry in found.values()),
                **{name: losses[name] for name in ("fp16_loss", "int8_loss")},
                "kinds": found,
                "gowalla": losses,
                "data": f"{rows} x {DIM} synthetic clusters",
                "recall": {"k": K, "target": TARGET, "tuning_queries": NUM_QUERIES, "measuring_queries": NUM_QUERIES},
                "machine": {"cores": os.cpu_count(), "load": os.getloadavg()[0]},
            }
        )
    )


class Catalogue:
    """Synthetic vectors as an item2vec run exports them (fp16), and queries that tune and that measure."""

    def __init__(self, rows: int) -> None:
        self._rng = np.random.default_rng(0)
        self._centres = self._rng.standard_normal((rows // 1000, DIM), dtype=np.float32)
        weights = self._rng.lognormal(0, 1, len(self._centres))
        self._share = weights / weights.sum()
        self._spread = np.float32(1.5) / np.sqrt(1 + np.arange(DIM, dtype=np.float32) / 32)
        owners = self._rng.choice(len(self._centres), rows, p=self._share)
        vectors = unit_length(self._draw(owners)) * self._rng.lognormal(0, 0.05, (rows, 1)).astype(np.float32)
        self.vectors = VectorSet(*encode(vectors, "fp16"), "fp16")
        self._asked = [self._queries() for _ in range(2)]

    @functools.cached_property
    def tuning(self) -> RecallTest:
        return RecallTest(self.vectors, "ip", K, Queries(self._asked[0]), os.cpu_count() or 1)

    @functools.cached_property
    def test(self) -> RecallTest:
        return RecallTest(self.vectors, "ip", K, Queries(self._asked[1]), os.cpu_count() or 1)

    def _draw(self, owners: np.ndarray) -> np.ndarray:
        out = self._centres[owners]
        out += self._rng.standard_normal(out.shape, dtype=np.float32) * self._spread
        return out

    def _queries(self) -> np.ndarray:
        owners = self._rng.choice(len(self._centres), NUM_QUERIES, p=self._share)
        draws = [self._draw(owners) for _ in range(3)]
        return np.asarray(np.mean(draws, axis=0), np.float32)


def measured(kind: str, data: Catalogue, cache: Path) -> dict[str, Any]:
    """The figures of one kind, ours and plain."""
    threads = os.cpu_count() or 1
    index, record = ours(kind, data, cache)
    exact = index.exhaustive
    recalls = data.test.recalls(index, slice(0, 1000 if exact else None))
    recall = float(recalls.mean())
    stored = index_bytes(cache / f"{kind}.faiss")
    rows = data.vectors.rows
    entry = {
        "parameters": index.parameters,
        "arrangement": index.arrangement,
        "bytes_per_vector": round(stored / rows, 1),
        "build_seconds": round(record["build_seconds"], 1),
        "tuning_seconds": round(record["tuning_seconds"], 1),
        "estimate": record["estimate"],
        "recall": round(recall, 4),
        "recall_when_tuned": round(record["recall"]["value"], 4),
        "half_width": round(record["recall"]["half_width"], 4),
        "curve": [[point["parameters"], point["recall"], point["microseconds"]] for point in record["curve"]],
        "recall_error": round(1 - recall if exact else abs(recall - TARGET), 4),
    }
    with ThreadPoolExecutor(threads) as pool:
        candidates = Candidates(data.vectors, "ip", index, pool, threads)
        entry |= speed(lambda queries: candidates.search(queries, K), data, exact=exact)
    plain, seconds, size = plain_index(kind, data, cache)
    faiss.omp_set_num_threads(threads)
    entry_plain = {
        "bytes_per_vector": round(size / rows, 1),
        "build_seconds": round(seconds, 1),
        "recall": round(plain_recall(plain, data), 4),
        **speed(lambda queries: plain.search(queries, K), data, exact=exact),
    }
    progress(json.dumps({kind: {"ours": entry, "plain": entry_plain}}))
    return {"ours": entry, "plain": entry_plain}


def speed(search: Any, data: Catalogue, *, exact: bool) -> dict[str, float]:
    queries = data.test.queries.vectors[: 1000 if exact else None]
    batches, singles = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        search(queries)
        batches.append(time.perf_counter() - began)
    for i in range(200):
        began = time.perf_counter()
        search(queries[i : i + 1])
        singles.append(time.perf_counter() - began)
    return {
        "queries_per_second": round(len(queries) / median(batches)),
        "microseconds": round(1e6 * median(singles), 1),
    }


def ours(kind: str, data: Catalogue, cache: Path) -> tuple[VectorIndex, dict[str, Any]]:
    """The index, tuned now, and its record."""
    index, seconds = built(kind, data.vectors, cache)
    progress(f"tuning {kind}")
    began = time.perf_counter()
    record = tune(index, data.tuning, TARGET)
    expected = estimate(kind, data.vectors.rows, DIM, os.cpu_count() or 1)
    return index, {
        **record,
        "tuning_seconds": time.perf_counter() - began,
        "build_seconds": seconds,
        "estimate": None if expected is None else vars(expected),
    }


def built(kind: str, vectors: VectorSet, cache: Path) -> tuple[VectorIndex, float]:
    """The index, and the seconds that building it has taken."""
    file, notes = cache / f"{kind}.faiss", cache / f"{kind}.json"
    if not notes.exists():
        progress(f"building {kind}")
        began = time.perf_counter()
        index = VectorIndex.build(vectors, metric="ip", factory=kind, threads=os.cpu_count())
        seconds = time.perf_counter() - began
        index.save(file)
        notes.write_text(json.dumps({"seconds": seconds}))
    return VectorIndex.load(file), float(json.loads(notes.read_text())["seconds"])


def plain_index(kind: str, data: Catalogue, cache: Path) -> tuple[Any, float, int]:
    """FAISS's index with nothing set: (index, seconds to build, bytes).

    Of the inverted files ours is FAISS's too, and built once: it is read again, with the parameters that FAISS gives
    it, and refined by FAISS (`RFlat`) where it is PQ. A graph is built anew, since ours is over centred vectors.
    """
    file, notes = cache / f"plain-{kind}.faiss", cache / f"plain-{kind}.json"
    vectors = np.concatenate([chunk for _, chunk in data.vectors.chunks()])
    if "IVF" in kind:
        seconds = json.loads((cache / f"{kind}.json").read_text())["seconds"]
        index = faiss.read_index(str(cache / f"{kind}.faiss"))
        faiss.ParameterSpace().set_index_parameter(index, "nprobe", 1)
        size = index_bytes(cache / f"{kind}.faiss")
        if "PQ" not in kind:
            return index, seconds, size
        refined = faiss.IndexRefineFlat(index, faiss.swig_ptr(vectors))
        refined.base = index  # keep it alive
        return refined, seconds, size + vectors.nbytes
    if not notes.exists():
        progress(f"building plain {kind}")
        index = faiss.index_factory(DIM, kind, faiss.METRIC_INNER_PRODUCT)
        began = time.perf_counter()
        index.add(vectors)
        notes.write_text(json.dumps({"seconds": time.perf_counter() - began}))
        faiss.write_index(index, str(file))
    return faiss.read_index(str(file)), json.loads(notes.read_text())["seconds"], index_bytes(file)


def plain_recall(index: Any, data: Catalogue) -> float:
    """As `RecallTest` counts, over what FAISS returns."""
    queries = data.test.queries.vectors[: 1000 if isinstance(index, faiss.IndexFlat) else None]
    rows = index.search(queries, K)[1]
    scores = np.einsum("nkd,nd->nk", data.vectors.take(np.maximum(rows, 0)), queries)
    threshold = data.test.threshold[: len(queries), None]
    found = (rows >= 0) & (scores >= threshold - 1e-5 * np.abs(threshold))
    return float(found.mean())


def index_bytes(file: Path) -> int:
    return file.stat().st_size


def gowalla_losses(run: Path) -> dict[str, Any]:
    """Recall@20 of one run's exports in each precision, by exact search."""
    data = data_folder()
    os.environ["LEXSHARD_DATA"] = str(data)
    if not (run / "result.json").exists():
        progress("training the Gowalla item2vec recipe")
        command = ["train", str(RECIPES / "gowalla_item2vec.toml"), "--json", "--set", f"run={run}"]
        lexshard(command, dict(os.environ))
    config, prepared = load_config(run / "config.toml", [f"run={run}"]), load_prepared(run)
    cases = load_cases(config, prepared.keys, prepared.query_features, config.data.test)
    recall = {}
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        for precision in ("fp32", "fp16", "int8"):
            overrides = [f"export.precision={precision}", "export.index=Flat"]
            path = export_run(run, out=f"{folder}/{precision}", which="last", overrides=overrides)
            tally = evaluate_artifact(Artifact.open(path), cases, ks=(20,), mask_seen=True, exact=True)
            recall[precision] = float(tally.figures()["recall@20"])
        arrangements = graph_arrangements(Artifact.open(f"{folder}/fp32"), cases)
    return {
        "fp16_loss": round(recall["fp32"] - recall["fp16"], 5),
        "int8_loss": round(recall["fp32"] - recall["int8"], 5),
        "recall@20": {name: round(value, 5) for name, value in recall.items()},
        "num_cases": len(cases),
        "arrangements": arrangements,
    }


def graph_arrangements(artifact: Artifact, cases: Cases) -> dict[str, float]:
    """Recall@20 of exact search that HNSW32 with efSearch 64 has, in each arrangement of `embedding_service.index`."""
    retriever = Retriever(artifact)
    queries = retriever.encode_rows(cases.history, None, {})[:5000]
    vectors = artifact.vectors("item").head(len(artifact.keys("item").keys))
    test = RecallTest(vectors, "ip", 20, Queries(queries), os.cpu_count() or 1)
    found = {}
    for arrangement in get_args(Arrangement):
        index = VectorIndex.build(vectors, metric="ip", factory="HNSW32", arrangement=arrangement)
        index.set_parameters({"efSearch": 64})
        found[arrangement] = round(test.recall(index), 4)
    return found


if __name__ == "__main__":
    main()
