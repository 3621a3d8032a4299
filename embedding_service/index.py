"""A FAISS index over a vector set: build, tune to a recall target, save, load, search.

FAISS is met in this file only, and CPU or GPU is chosen in one place, `_to_device`.

Maximum inner product on a graph (HNSW) is the one case that FAISS's defaults get badly wrong when vectors differ
in length or share a common direction, as item2vec's output vectors do. A graph is therefore built over one of:

    centred    x - c, c the mean of the vectors. q.x = q.(x - c) + q.c: the order is the same for every q
    augmented  (x - c, sqrt(M^2 - |x - c|^2)) with M the largest |x - c|, queries (q, 0), under L2:
               |q' - x'|^2 = |q|^2 + M^2 - 2 q.(x - c)       (Bachrach et al. 2014, RecSys, section 3)

recall@20 of HNSW32 at efSearch 64 over Gowalla's item2vec vectors, plain / centred / augmented: .50 / .90 / .98
(`tests.benchmarks.index_tradeoff`, `gowalla.arrangements`). Which is best differs from data to data, so
`embedding_service.tuning` tries the augmented one where the centred one needs a long search. The other kinds, and
cosine, are as FAISS has them ("plain"). A graph over float32 vectors is searched by those that the artifact stores, see
`graph_walk`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import faiss
import numpy as np

from cluster.errors import ArtifactError, SettingError
from cluster.storage import write_json
from embedding_service.exact import ArrayVectors, Float32, Int64, Metric, Vectors, unit_length
from embedding_service.graph_walk import Graph, GraphWalk
from embedding_service.index_plan import ROWS_PER_CENTROID, TRAINED_PER_CENTROID, advice, auto_factory, check_memory
from embedding_service.vectors import VectorSet

Arrangement = Literal["plain", "centred", "augmented"]
Device = Literal["auto", "cpu", "gpu"]  # auto: the GPU where there is one and FAISS has the kind of index for it

ADDED_ROWS = 65_536  # at a time
MAX_TRAINING_BYTES = 2 * 2**30  # of the training sample, as long as 39 rows per centroid fit
MAX_GPU_K = MAX_GPU_NPROBE = 2048  # FAISS's limits
MAX_RESCORE = 1024
_SPARE = 8  # rows that `nearest_rows` keeps beyond what is asked for, against float32's rounding
_LOSSLESS = (faiss.IndexFlat, faiss.IndexHNSWFlat, faiss.IndexIVFFlat)

_log = logging.getLogger(__name__)


class VectorIndex:
    """Approximate nearest rows under inner product or cosine. Made by `build` or `load`."""

    def __init__(
        self,
        index: Any,
        *,
        factory: str,
        metric: Metric,
        arrangement: Arrangement,
        centre: Float32 | None,
        radius: float,
        parameters: Mapping[str, int],
        device: Device = "auto",
    ) -> None:
        self.factory = factory
        self.metric: Metric = metric
        self.arrangement: Arrangement = arrangement
        self.parameters: dict[str, int] = {}
        self._centre = centre
        self._radius = radius
        self.rescore = 1
        self._core_kind, self._refines = type(_core(index)), isinstance(_whole(index), faiss.IndexRefine)
        self._index, self._gpu = _to_device(index, device, factory)
        self._searching = threading.Lock() if self._gpu is not None else contextlib.nullcontext()
        self.set_parameters(parameters)

    @classmethod
    def build(
        cls,
        vectors: Vectors | Float32,
        *,
        metric: Metric,
        factory: str = "auto",
        arrangement: Arrangement | None = None,
        threads: int | None = None,
        seed: int = 0,
        device: Device = "auto",
        memory_bytes: int = 0,
        on_share: Callable[[float], None] | None = None,
    ) -> VectorIndex:
        """Train and fill an index; its search parameters are FAISS's defaults until `set_parameters`.

        Reads `vectors` in chunks: memory is the index, a training sample (IVF, PQ, SQ) and one chunk. `arrangement`
        None picks "centred" for a graph under inner product and "plain" else. `threads` is for `set_threads`. With a
        GPU the index is trained and filled there. `on_share` is told the share of rows that are in the index.
        `memory_bytes` (0: any) bounds what `auto` chooses and what is built.

        Raises SettingError (export.index) for a factory string that FAISS cannot parse or honour for this dimension
        and metric, and for fewer vectors than its training needs.
        """
        if isinstance(vectors, np.ndarray):
            vectors = ArrayVectors(vectors)
        set_threads(threads)
        resolved = auto_factory(vectors.rows, vectors.dim, memory_bytes) if factory == "auto" else factory
        check_memory(resolved, vectors.rows, vectors.dim, memory_bytes)
        if note := advice(resolved, vectors.rows):
            _log.info(note)
        empty = _create(resolved, vectors.dim, faiss.METRIC_INNER_PRODUCT)
        if arrangement is None:
            arrangement = "centred" if metric == "ip" and _is_graph(empty) else "plain"
        centre, radius = None, 0.0
        if arrangement != "plain":
            centre = mean = _mean(vectors)
            radius = max(float(_norms(chunk - mean).max()) for _, chunk in vectors.chunks())
        if arrangement == "augmented":
            empty = _create(resolved, vectors.dim + 1, faiss.METRIC_L2)
        arranged = _Arranged(vectors, metric, centre, radius if arrangement == "augmented" else None)
        built = cls(
            empty, factory=resolved, metric=metric, arrangement=arrangement, centre=centre, radius=radius,
            parameters={}, device=device,
        )  # fmt: skip
        if not empty.is_trained:
            built._index.train(_training_sample(arranged, empty, resolved, seed))
        for start, chunk in arranged.chunks(ADDED_ROWS):
            built._index.add(chunk)
            if on_share is not None:
                on_share((start + len(chunk)) / vectors.rows)
        return built

    @property
    def rows(self) -> int:
        return int(self._index.ntotal)

    @property
    def dim(self) -> int:
        return int(self._index.d) - (self.arrangement == "augmented")

    @property
    def on_gpu(self) -> bool:
        return self._gpu is not None

    @property
    def exhaustive(self) -> bool:
        """Whether every row is scored without loss, so that only rounding and ties part it from `exact_search`."""
        return issubclass(self._core_kind, faiss.IndexFlat)

    @property
    def knob(self) -> tuple[str, int] | None:
        """The search parameter that trades time for recall and its largest value; None if there is none."""
        core = _core(self._index)
        if hasattr(core, "nprobe"):
            return "nprobe", min(int(core.nlist), MAX_GPU_NPROBE) if self.on_gpu else int(core.nlist)
        if hasattr(core, "hnsw"):
            return "efSearch", max(16, min(4096, self.rows))
        return None

    @property
    def depth(self) -> str | None:
        """The parameter that says how many times k rows are fetched and scored anew; None where codes lose nothing.

        `k_factor_rf` is FAISS's, of indexes that keep the originals themselves (`...,RFlat`); `rescore` is ours:
        `Candidates` scores by the stored vectors, which the artifact has anyway, at no memory of the index.
        """
        if self._refines:
            return "k_factor_rf"
        return None if issubclass(self._core_kind, _LOSSLESS) else "rescore"

    def set_parameters(self, parameters: Mapping[str, int]) -> None:
        """Set FAISS search parameters (efSearch, nprobe, k_factor_rf...), or `rescore`, the factor of rows fetched.

        Raises ArtifactError for one that the index lacks.
        """
        space = faiss.GpuParameterSpace() if self._gpu is not None else faiss.ParameterSpace()
        for name, value in parameters.items():
            if name == "rescore":
                if not 1 <= value <= MAX_RESCORE:
                    raise ArtifactError(f"index {self.factory}: rescore {value} is not in 1..{MAX_RESCORE}")
                self.rescore = self.parameters[name] = value
                continue
            try:
                space.set_index_parameter(self._index, name, value)
            except RuntimeError as error:
                raise ArtifactError(f"index {self.factory} has no search parameter {name!r}: {_short(error)}") from None
            self.parameters[name] = value

    def search(self, queries: Float32, k: int) -> tuple[Float32, Int64]:
        """The k best rows of queries [n, dim], best first: scores float32 and rows int64 [n, k].

        Scores are inner products or cosines, up to the index's quantisation. Where fewer than k rows are found, rows
        are -1 and scores -inf at the end.
        """
        if queries.ndim != 2 or queries.shape[1] != self.dim:
            raise ValueError(f"queries must be [n, {self.dim}]; got {list(queries.shape)}")
        queries = np.ascontiguousarray(queries, np.float32)
        if self._gpu is not None and k > MAX_GPU_K:
            scores, rows = self.search(queries, MAX_GPU_K)
            padding = ((0, 0), (0, k - MAX_GPU_K))
            return np.pad(scores, padding, constant_values=-np.inf), np.pad(rows, padding, constant_values=-1)
        if self.metric == "cosine":
            queries = unit_length(queries)
        if self.arrangement != "augmented":
            with self._searching:  # a GPU's resources serve one search at a time
                scores, rows = self._index.search(queries, k)
        else:
            padded = np.concatenate([queries, np.zeros((len(queries), 1), np.float32)], axis=1)
            with self._searching:
                distances, rows = self._index.search(padded, k)
            scores = (np.square(_norms(queries)) + self._radius**2 - distances) / 2
        if self._centre is not None:
            scores = scores + (queries @ self._centre)[:, None]
        return np.where(rows >= 0, scores, -np.inf).astype(np.float32), rows

    def search_rows(self, queries: Float32, k: int) -> Int64:
        """The rows of `search`, int64 [n, k], without the scores: what it takes if they are computed anew anyway.

        Without a GPU one thread works, the caller's: `Candidates` divides a batch among threads.
        """
        if self._gpu is not None:
            return self.search(queries, k)[1]
        if self.arrangement == "augmented":
            queries = np.concatenate([queries, np.zeros((len(queries), 1), np.float32)], axis=1)
        threads = faiss.omp_get_max_threads()  # of the calling thread only, see `set_threads`
        faiss.omp_set_num_threads(1)
        try:
            rows: Int64 = self._index.search(queries, k)[1]  # a query's length changes no order
        finally:
            faiss.omp_set_num_threads(threads)
        return rows

    def walk_over(self, vectors: VectorSet) -> GraphWalk | None:
        """The search of this graph by `vectors`, those that it was built over; None where FAISS is to search: there is
        no graph, it is walked by codes that are smaller, or its file is mapped and its arrays lie askew.

        It holds for as long as nothing is added. Raises ValueError for another number of vectors.
        """
        whole = faiss.downcast_index(self._index)
        if type(whole) is not faiss.IndexHNSWFlat:
            return None
        hnsw: Any = whole.hnsw
        neighbours = faiss.rev_swig_ptr(hnsw.neighbors.data(), hnsw.neighbors.size())
        if neighbours.ctypes.data % neighbours.itemsize:
            return None
        offsets = faiss.rev_swig_ptr(hnsw.offsets.data(), hnsw.offsets.size()).view(np.int64)
        widths = [hnsw.cum_nb_neighbors(level) for level in range(hnsw.cum_nneighbor_per_level.size())]
        graph = Graph(neighbours, offsets, np.array(widths, np.int64), hnsw.entry_point, hnsw.max_level, self._index)
        return GraphWalk(graph, vectors, self.metric)

    @property
    def breadth(self) -> int:
        """The graph's efSearch."""
        return int(_core(self._index).hnsw.efSearch)

    def check_rows(self) -> None:
        """Raise ArtifactError if the inverted lists name rows that do not exist: FAISS does not look."""
        lists = getattr(_core(self._index), "invlists", None)
        if lists is None or self._gpu is not None:
            return
        for number in range(int(lists.nlist)):
            if size := int(lists.list_size(number)):
                rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
                if rows.min() < 0 or rows.max() >= self.rows:
                    raise ArtifactError(f"index {self.factory}: list {number} leads to rows that do not exist")

    def save(self, path: str | Path) -> None:
        """Write `path` (FAISS's own format, no pickle) and, next to it, `<path>.json` with the settings."""
        faiss.write_index(faiss.index_gpu_to_cpu(self._index) if self._gpu is not None else self._index, str(path))
        settings = {
            "factory": self.factory,
            "metric": self.metric,
            "arrangement": self.arrangement,
            "parameters": self.parameters,
            "radius": self._radius,
            "centre": None if self._centre is None else self._centre.tolist(),
        }
        write_json(f"{path}.json", settings)

    @classmethod
    def load(cls, path: str | Path, *, device: Device = "auto", mapped: bool = False) -> VectorIndex:
        """The index that `save` wrote. Raises ArtifactError, naming the file, if it is missing, damaged or foreign.

        `mapped`: not read into memory but mapped, as far as FAISS can (not fast-scan PQ, which is small).
        """
        try:
            settings = json.loads(Path(f"{path}.json").read_bytes())
            if settings["metric"] not in ("ip", "cosine"):
                raise ValueError(f"metric {settings['metric']!r}")
            if settings["arrangement"] not in ("plain", "centred", "augmented"):
                raise ValueError(f"arrangement {settings['arrangement']!r}")
            centre = None if settings["centre"] is None else np.array(settings["centre"], np.float32)
            if (centre is None) != (settings["arrangement"] == "plain"):
                raise ValueError("a centre belongs to centred and augmented indexes")
            settings["radius"] = float(settings["radius"])
            settings["parameters"] = {str(name): int(value) for name, value in settings["parameters"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{path}.json: is not an index's settings file ({error})") from None
        try:
            index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mapped else 0)
        except (RuntimeError, MemoryError) as error:
            raise ArtifactError(f"{path}: is not a readable FAISS index ({_short(error)})") from None
        expected = faiss.METRIC_L2 if settings["arrangement"] == "augmented" else faiss.METRIC_INNER_PRODUCT
        if index.metric_type != expected:
            raise ArtifactError(f"{path}: its metric is not the one of its settings file")
        loaded = cls(index, **{**settings, "centre": centre}, device=device)
        if centre is not None and (centre.shape != (loaded.dim,) or not np.isfinite(centre).all()):
            raise ArtifactError(f"{path}.json: the centre does not have the index's dimension {loaded.dim}")
        return loaded


def set_threads(threads: int | None) -> None:
    """Threads that FAISS uses for calls from this thread; None leaves them as they are."""
    if threads is not None:
        faiss.omp_set_num_threads(threads)


class _Arranged:
    """Vectors as they go into FAISS: normalised for cosine, centred, augmented (`radius` not None)."""

    def __init__(self, vectors: Vectors, metric: Metric, centre: Float32 | None, radius: float | None) -> None:
        self.vectors, self.metric, self.centre, self.radius = vectors, metric, centre, radius
        self.rows = vectors.rows

    def __call__(self, chunk: Float32) -> Float32:
        if self.metric == "cosine":
            chunk = unit_length(chunk)
        if self.centre is not None:
            chunk = chunk - self.centre
        if self.radius is not None:
            rest = np.sqrt(np.maximum(self.radius**2 - np.square(_norms(chunk).astype(np.float64)), 0.0))
            chunk = np.concatenate([chunk, rest.astype(np.float32)], axis=1)
        return np.ascontiguousarray(chunk)

    def chunks(self, size: int) -> Iterator[tuple[int, Float32]]:
        for start, chunk in self.vectors.chunks(size):
            yield start, self(chunk)


def _training_sample(arranged: _Arranged, index: Any, factory: str, seed: int) -> Float32:
    """Evenly spread rows: 100 per centroid, the (geometric) middle of FAISS's advice, within MAX_TRAINING_BYTES, but at
    least 39 per centroid. k-means is most of what building IVF takes, and its time goes with the sample.
    """
    low = ROWS_PER_CENTROID[0]
    centroids = _num_centroids(index, factory)
    if arranged.rows < low * centroids:
        raise SettingError(
            "export.index",
            f"{factory} has {centroids} centroids and wants {low} vectors for each, {low * centroids} in all; "
            f"there are {arranged.rows}: take at most {arranged.rows // low} lists, fewer PQ bits, or `auto`",
        )
    affordable = MAX_TRAINING_BYTES // (4 * index.d)
    num = min(arranged.rows, max(65_536, min(TRAINED_PER_CENTROID * centroids, affordable), low * centroids))
    jitter = np.random.default_rng(seed).random(num)
    rows = np.minimum(((np.arange(num) + jitter) * (arranged.rows / num)).astype(np.int64), arranged.rows - 1)
    return arranged(arranged.vectors.take(rows))


def _num_centroids(index: Any, factory: str) -> int:
    """The largest k-means that training `index` runs."""
    core = _core(index)
    lists = int(getattr(core, "nlist", 0))
    quantizer = getattr(core, "pq", None)
    if quantizer is None and hasattr(core, "storage"):
        quantizer = getattr(faiss.downcast_index(core.storage), "pq", None)
    codes = 2 ** int(quantizer.nbits) if quantizer is not None else 0
    return max(lists, codes, 256 if "OPQ" in factory else 0)  # OPQ trains 8-bit codes, whatever follows it


def _create(factory: str, dim: int, metric: int) -> Any:
    """An empty FAISS index on the CPU."""
    try:
        index = faiss.index_factory(dim, factory, metric)
    except RuntimeError as error:
        raise SettingError(
            "export.index", f"FAISS cannot make {factory!r} for {dim} dimensions and inner product: {_short(error)}"
        ) from None
    if index.metric_type != metric or _core(index).metric_type != metric:
        raise SettingError("export.index", f"FAISS makes {factory!r} for another metric; try HNSW32,SQ8 or IVF with PQ")
    if re.search(r"L2norm|PCA|ITQ", factory):  # FAISS normalises or shifts vectors and queries
        raise SettingError("export.index", f"{factory!r} changes inner products; to reduce vectors use OPQ, SQ or PQ")
    if "IDMap" in factory:
        raise SettingError("export.index", f"{factory!r}: rows are their own ids; this index has no ids to map")
    if hasattr(_core(index), "hnsw"):
        _core(index).hnsw.efConstruction = 80
    return index


def nearest_rows(vectors: Vectors, queries: Float32, k: int, metric: Metric) -> Int64:
    """The min(k + 8, rows) rows of the best float32 scores for queries [n, dim], best first: int64 [n, k + 8 at most].

    Exhaustive, chunk by chunk, and many times as fast as `exact_search`, at the price of float32: rows whose scores
    differ by its rounding may change places, which the eight rows beyond k are for.
    """
    kept = min(k + _SPARE, vectors.rows)
    best, rows = np.full((len(queries), kept), -np.inf, np.float32), np.full((len(queries), kept), -1, np.int64)
    queries = unit_length(queries) if metric == "cosine" else np.ascontiguousarray(queries, np.float32)
    for start, chunk in _Arranged(vectors, metric, None, None).chunks(ADDED_ROWS):
        scores, found = faiss.knn(queries, chunk, min(kept, len(chunk)), metric=faiss.METRIC_INNER_PRODUCT)
        both, both_rows = np.concatenate([best, scores], 1), np.concatenate([rows, found + start], 1)
        order = np.argsort(-both, axis=1, kind="stable")[:, :kept]
        best, rows = np.take_along_axis(both, order, 1), np.take_along_axis(both_rows, order, 1)
    return rows


def _whole(index: Any) -> Any:
    """The index inside pre-transforms."""
    index = faiss.downcast_index(index)
    while isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    return index


def _core(index: Any) -> Any:
    """The index inside pre-transforms and refinement: the one that has nprobe or an HNSW graph."""
    index = faiss.downcast_index(index)
    while True:
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        elif isinstance(index, faiss.IndexRefine):
            index = faiss.downcast_index(index.base_index)
        else:
            return index


def _is_graph(index: Any) -> bool:
    return hasattr(_core(index), "hnsw")


def _to_device(index: Any, device: Device, factory: str) -> tuple[Any, Any]:
    """The index on the first GPU, in fp16 where FAISS can, and the GPU's resources, which must outlive it; or as it is
    and None.

    For a GPU, FAISS must be its GPU build, and the index of a kind that FAISS has for GPUs. Raises SettingError where
    `device` is `gpu` and it cannot be; with `auto` a machine with a GPU says that it is not used.
    """
    if device == "cpu":
        return index, None
    on_gpu = (faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexIVFPQ, faiss.IndexIVFScalarQuantizer)
    fits = isinstance(faiss.downcast_index(index), on_gpu)
    if faiss.get_num_gpus() == 0:
        if device == "gpu":
            raise SettingError(
                "export.index_device",
                "gpu, but FAISS sees no GPU here (or is its CPU build, faiss-cpu): set auto to use one where there is "
                "one, or cpu",
            )
        return index, None
    if not fits:
        if device == "gpu":
            raise SettingError(
                "export.index_device",
                f"gpu, but FAISS has no GPU form of {factory}; it has Flat, and IVF of Flat, SQ, PQ",
            )
        _log.info("index %s stays on the CPU: FAISS has no GPU form of it", factory)
        return index, None
    resources, options = faiss.StandardGpuResources(), faiss.GpuClonerOptions()
    options.useFloat16 = not isinstance(faiss.downcast_index(index), faiss.IndexFlat)  # which is exact by definition
    return faiss.index_cpu_to_gpu(resources, 0, index, options), resources


def _mean(vectors: Vectors) -> Float32:
    total = np.zeros(vectors.dim)
    for _, chunk in vectors.chunks():
        total += chunk.sum(axis=0, dtype=np.float64)
    return (total / vectors.rows).astype(np.float32)


def _norms(vectors: Float32) -> Float32:
    norms: Float32 = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))[:, None]
    return norms


def _short(error: BaseException) -> str:
    """FAISS's message without its function signature and source path."""
    text = re.sub(r"\s+", " ", str(error)).strip()
    text = re.sub(r"^Error in .* at \S+:\d+: ", "", text)
    return re.sub(r"^Error: '.*?' failed: ", "", text)[:200]
