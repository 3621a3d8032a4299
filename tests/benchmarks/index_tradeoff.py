"""Kinds of index over one catalogue: memory, build time, recall and speed, tuned by us and as FAISS has them.

    python -m tests.benchmarks.index_tradeoff [--quick] [--folder FOLDER [--minutes M] [--steps PATTERN ...]]

The catalogue is synthetic (1 M x 64: no public data set here has so many trained vectors): clusters of unequal size,
noise with a decaying spectrum, lengths that differ. Queries are means of fresh draws from one cluster; the 20 k that
tune and the 20 k that measure are drawn apart. `ours` is what is exported and served: built as export builds, tuned to
recall@10 of .95, rows found scored anew from fp16 vectors. `plain` is FAISS alone: the same factory string (PQ: with
FAISS's refinement, RFlat), trained and filled by FAISS from float32, nothing set. Both answer 20 k (Flat: 1000) in one
call with all cores; `microseconds` are of single queries, ours in one thread, FAISS's as it divides them. The bytes are
those of the index; ours scores by the artifact's fp16 vectors (128 bytes each, mapped), RFlat has float32 in it.

    walk_over_faiss       queries/s of our walk of the HNSW graph by fp16 vectors over those of FAISS's search of the
                          same graph by float32, same efSearch, one thread each, in turns; `same_rows` of their answers
    recall_error_max      the largest |recall@10 - .95| on the queries that did not tune, over the kinds that have
                          something to tune; of Flat 1 - recall
    gowalla.arrangements  recall@20 of a graph over that run's output vectors, see `embedding_service.index`
    fp16_loss, int8_loss  Recall@20 on Gowalla's test cases that an export loses against fp32, by exact search over the
                          exported vectors of one run of the item2vec recipe (LEXSHARD_DATA)

All of it takes some twenty minutes. With --folder every step that ends is kept there, and a later call goes on behind
it: with --minutes no step begins after so many, with --steps only those whose names match (`build *`, `gowalla *`). The
call that finds all steps done prints the last line. A step's `load` is the machine's when it ended.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from statistics import median
from typing import Any, get_args

import faiss
import numpy as np

from cluster.config import load_config
from cluster.storage import write_json
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
SINGLES = 200
EXACT_QUERIES = 1000  # of exhaustive search, which takes long
PRECISIONS = ("fp32", "fp16", "int8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="100 k rows")
    parser.add_argument("--folder", default="", metavar="PATH", help="keeps what is done, for a call that goes on")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no step after so many")
    parser.add_argument("--steps", nargs="+", default=["*"], metavar="PATTERN", help="these alone")
    args = parser.parse_args()
    rows, lists = (100_000, 1024) if args.quick else (1_000_000, 4096)
    kinds = ["HNSW32", f"IVF{lists},SQ8", f"IVF{lists},PQ32x4fs", "Flat"]
    with tempfile.TemporaryDirectory(prefix="lexshard-") as temporary:
        folder = Path(args.folder or temporary)
        steps = Steps(folder / str(rows), time.monotonic() + 60 * args.minutes, args.steps)
        data = Catalogue(rows, steps.folder)
        for name in data.asked:
            steps.take(f"exact {name}", functools.partial(data.answer, name))
        for kind in kinds:
            steps.take(f"build {kind}", functools.partial(build, kind, data, steps.folder))
            steps.take(f"build plain {kind}", functools.partial(build_plain, kind, data, steps.folder))
        for kind in kinds:
            needed = [*(f"exact {name}" for name in data.asked), f"build {kind}", f"build plain {kind}"]
            steps.take(f"measure {kind}", functools.partial(measured, kind, data, steps), needed)
        gowalla = folder / "gowalla_item2vec"
        steps.take("train gowalla", functools.partial(train_gowalla, gowalla))
        for precision in PRECISIONS:
            exported = functools.partial(gowalla_recall, gowalla, precision)
            steps.take(f"gowalla {precision}", exported, ["train gowalla"])
        steps.take("gowalla arrangements", functools.partial(gowalla_arrangements, gowalla), ["train gowalla"])
    if steps.left:
        progress(f"to be done yet: {', '.join(steps.left)}")
        return
    found = {kind: steps.done[f"measure {kind}"] for kind in kinds}
    gowalla_found = {precision: steps.done[f"gowalla {precision}"] for precision in PRECISIONS}
    losses = {name: gowalla_found["fp32"]["recall@20"] - found["recall@20"] for name, found in gowalla_found.items()}
    print(
        json.dumps(
            {
                "recall_error_max": max(entry["ours"]["recall_error"] for entry in found.values()),
                "fp16_loss": round(losses["fp16"], 5),
                "int8_loss": round(losses["int8"], 5),
                "kinds": found,
                "gowalla": {**gowalla_found, "arrangements": steps.done["gowalla arrangements"]},
                "data": f"{rows} x {DIM} synthetic clusters",
                "recall": {"k": K, "target": TARGET, "tuning_queries": NUM_QUERIES, "measuring_queries": NUM_QUERIES},
                "machine": {"cores": os.cpu_count()},
            }
        )
    )


class Steps:
    """The steps of the benchmark, each of which leaves a JSON file in `folder` and is not taken again."""

    def __init__(self, folder: Path, until: float, patterns: list[str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._until, self._patterns = folder, until, patterns
        self.done: dict[str, dict[str, Any]] = {}
        self.left: list[str] = []

    def take(self, name: str, step: Callable[[], dict[str, Any]], needed: Sequence[str] = ()) -> None:
        """Its result into `done`; into `left` if it is not its turn, or what it needs is not done."""
        file = self.folder / f"{name}.json"
        if not file.exists():
            chosen = any(fnmatch(name, pattern) for pattern in self._patterns)
            if not chosen or time.monotonic() > self._until or not self.done.keys() >= set(needed):
                self.left.append(name)
                return
            progress(name)
            began = time.monotonic()
            result = step()
            load = round(os.getloadavg()[0], 2)
            write_json(file, {**result, "load": load})
            progress(f"{name}: {time.monotonic() - began:.0f} s")
        self.done[name] = json.loads(file.read_bytes())


class Catalogue:
    """Synthetic vectors as an item2vec run exports them (fp16), and queries that tune and that measure."""

    def __init__(self, rows: int, folder: Path) -> None:
        self._folder = folder
        self._rng = np.random.default_rng(0)
        self._centres = self._rng.standard_normal((rows // 1000, DIM), dtype=np.float32)
        weights = self._rng.lognormal(0, 1, len(self._centres))
        self._share = weights / weights.sum()
        self._spread = np.float32(1.5) / np.sqrt(1 + np.arange(DIM, dtype=np.float32) / 32)
        owners = self._rng.choice(len(self._centres), rows, p=self._share)
        vectors = unit_length(self._draw(owners)) * self._rng.lognormal(0, 0.05, (rows, 1)).astype(np.float32)
        self.vectors = VectorSet(*encode(vectors, "fp16"), "fp16")
        self.asked = {name: self._queries() for name in ("tuning", "test")}

    def answer(self, name: str) -> dict[str, Any]:
        """Exact answers to the queries that tune, or that measure."""
        np.save(self._folder / f"{name}.npy", self._recall_test(name, None).threshold)
        return {}

    @functools.cached_property
    def tuning(self) -> RecallTest:
        return self._recall_test("tuning", np.load(self._folder / "tuning.npy"))

    @functools.cached_property
    def test(self) -> RecallTest:
        return self._recall_test("test", np.load(self._folder / "test.npy"))

    def _recall_test(self, name: str, threshold: np.ndarray | None) -> RecallTest:
        asked = Queries(self.asked[name])
        return RecallTest(self.vectors, "ip", K, asked, os.cpu_count() or 1, threshold=threshold)

    def float32(self) -> np.ndarray:
        return np.concatenate([chunk for _, chunk in self.vectors.chunks()])

    def _draw(self, owners: np.ndarray) -> np.ndarray:
        out = self._centres[owners]
        out += self._rng.standard_normal(out.shape, dtype=np.float32) * self._spread
        return out

    def _queries(self) -> np.ndarray:
        owners = self._rng.choice(len(self._centres), NUM_QUERIES, p=self._share)
        draws = [self._draw(owners) for _ in range(3)]
        return np.asarray(np.mean(draws, axis=0), np.float32)


def build(kind: str, data: Catalogue, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    index = VectorIndex.build(data.vectors, metric="ip", factory=kind, threads=os.cpu_count())
    seconds = time.perf_counter() - began
    index.save(folder / f"{kind}.faiss")
    expected = estimate(kind, data.vectors.rows, DIM, os.cpu_count() or 1)
    return {
        "seconds": round(seconds, 1),
        "bytes": (folder / f"{kind}.faiss").stat().st_size,
        "estimate": None if expected is None else vars(expected),
    }


def build_plain(kind: str, data: Catalogue, folder: Path) -> dict[str, Any]:
    vectors, file = data.float32(), folder / f"plain {kind}.faiss"
    index = faiss.index_factory(DIM, f"{kind},RFlat" if "PQ" in kind else kind, faiss.METRIC_INNER_PRODUCT)
    began = time.perf_counter()
    if not index.is_trained:
        index.train(vectors)
    index.add(vectors)
    seconds = time.perf_counter() - began
    faiss.write_index(index, str(file))
    return {"seconds": round(seconds, 1), "bytes": file.stat().st_size}


def measured(kind: str, data: Catalogue, steps: Steps) -> dict[str, Any]:
    """The figures of one kind, ours and plain."""
    ours, plain = _ours(kind, data, steps.folder), _plain(kind, data, steps.folder)
    for entry, name in ((ours, f"build {kind}"), (plain, f"build plain {kind}")):
        took = steps.done[name]
        entry["bytes_per_vector"] = round(took["bytes"] / data.vectors.rows, 1)
        entry["build_seconds"], entry["build_load"] = took["seconds"], took["load"]
    ours["estimate"] = steps.done[f"build {kind}"]["estimate"]
    return {"ours": ours, "plain": plain}


def _ours(kind: str, data: Catalogue, folder: Path) -> dict[str, Any]:
    threads = os.cpu_count() or 1
    index = VectorIndex.load(folder / f"{kind}.faiss")
    began = time.perf_counter()
    record = tune(index, data.tuning, TARGET)
    tuning_seconds = time.perf_counter() - began
    exact = index.exhaustive
    recall = data.test.recall(index, slice(0, EXACT_QUERIES if exact else None))
    with ThreadPoolExecutor(threads) as pool:
        candidates = Candidates(data.vectors, "ip", index, pool, threads)
        speed = _speed(lambda queries: candidates.search(queries, K), data, exact=exact)
    return {
        **_walk_over_faiss(index, data),
        "parameters": index.parameters,
        "arrangement": index.arrangement,
        "tuning_seconds": round(tuning_seconds, 1),
        "recall": round(recall, 4),
        "recall_when_tuned": round(record["recall"]["value"], 4),
        "half_width": round(record["recall"]["half_width"], 4),
        "recall_error": round(1 - recall if exact else abs(recall - TARGET), 4),
        **speed,
        "curve": [[point["parameters"], point["recall"], point["microseconds"]] for point in record["curve"]],
    }


def _walk_over_faiss(index: VectorIndex, data: Catalogue) -> dict[str, float]:
    """Nothing for what FAISS searches itself."""
    walk, queries = index.walk_over(data.vectors), data.test.queries.vectors
    if walk is None:
        return {}
    ratios = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        ours = walk.search_rows(queries, K, index.breadth)
        between = time.perf_counter()
        theirs = index.search_rows(queries, K)
        ratios.append((time.perf_counter() - between) / (between - began))
    same = (ours[:, :, None] == theirs[:, None, :]).any(axis=2).mean()
    return {"walk_over_faiss": round(median(ratios), 2), "same_rows": round(float(same), 4)}


def _plain(kind: str, data: Catalogue, folder: Path) -> dict[str, Any]:
    index = faiss.read_index(str(folder / f"plain {kind}.faiss"))
    faiss.omp_set_num_threads(os.cpu_count() or 1)
    exact = isinstance(index, faiss.IndexFlat)
    recall = round(_plain_recall(index, data, exact=exact), 4)
    return {"recall": recall, **_speed(lambda queries: index.search(queries, K), data, exact=exact)}


def _plain_recall(index: Any, data: Catalogue, *, exact: bool) -> float:
    """As `RecallTest` counts, over what FAISS returns."""
    queries = data.test.queries.vectors[: EXACT_QUERIES if exact else None]
    rows = index.search(queries, K)[1]
    scores = np.einsum("nkd,nd->nk", data.vectors.take(np.maximum(rows, 0)), queries)
    threshold = data.test.threshold[: len(queries), None]
    found = (rows >= 0) & (scores >= threshold - 1e-5 * np.abs(threshold))
    return float(found.mean())


def _speed(search: Callable[[np.ndarray], Any], data: Catalogue, *, exact: bool) -> dict[str, float]:
    queries = data.test.queries.vectors[: EXACT_QUERIES if exact else None]
    batches, singles = [], []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        search(queries)
        batches.append(time.perf_counter() - began)
    for i in range(SINGLES):
        began = time.perf_counter()
        search(queries[i : i + 1])
        singles.append(time.perf_counter() - began)
    return {
        "queries_per_second": round(len(queries) / median(batches)),
        "microseconds": round(1e6 * median(singles), 1),
    }


def train_gowalla(run: Path) -> dict[str, Any]:
    os.environ["LEXSHARD_DATA"] = str(data_folder())
    if not (run / "result.json").exists():
        lexshard(["train", str(RECIPES / "gowalla_item2vec.toml"), "--json", "--set", f"run={run}"], dict(os.environ))
    return {"seconds": json.loads((run / "result.json").read_text())["seconds"]}


def gowalla_recall(run: Path, precision: str) -> dict[str, Any]:
    """Recall@20 of the run's export in one precision, by exact search."""
    cases = _gowalla_cases(run)
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        overrides = [f"export.precision={precision}", "export.index=Flat"]
        path = export_run(run, out=folder, which="last", overrides=overrides)
        tally = evaluate_artifact(Artifact.open(path), cases, ks=(20,), mask_seen=True, exact=True)
    return {"recall@20": round(float(tally.figures()["recall@20"]), 5), "num_cases": len(cases)}


def gowalla_arrangements(run: Path) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        path = export_run(run, out=folder, which="last", overrides=["export.precision=fp32", "export.index=Flat"])
        return graph_arrangements(Artifact.open(path), _gowalla_cases(run))


def _gowalla_cases(run: Path) -> Cases:
    os.environ["LEXSHARD_DATA"] = str(data_folder())
    config, prepared = load_config(run / "config.toml", [f"run={run}"]), load_prepared(run)
    return load_cases(config, prepared.keys, prepared.query_features, config.data.test)


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
