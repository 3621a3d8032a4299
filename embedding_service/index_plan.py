"""Which kind of index suits a catalogue, and what it will take: bytes, and seconds to build. No index is made here.

Bytes of a row follow from the factory string (FAISS's own layouts) and are within a few per cent of the file. Seconds
are a work count over the rates below, and right within a factor of two or three: they tell minutes from hours.

    HNSW        rows x log2(rows) x (dim + 64) / HNSW_RATE, over the threads; the cost of a distance is its cache miss
    k-means     2 x 10 iterations x sample x lists x dim flops, and 2 x rows x lists x dim to assign, over FLOP_RATE;
                by a graph (`IVF..._HNSW32`) a row is assigned by about 20 log2(lists) distances
    PQ          2 x 25 iterations x sample x codes x dim flops over PQ_RATE, not faster with threads
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from cluster.errors import SettingError

ROWS_PER_CENTROID = (39, 256)  # FAISS's advice for k-means: fewer give poor centroids, more are not used
TRAINED_PER_CENTROID = 100  # what is taken where there are as many
LISTS_PER_SQRT = (4, 16)  # FAISS's advice: 4 sqrt(rows) to 16 sqrt(rows) lists
HNSW_RATE = 1.5e7  # of efConstruction 80; this and the next two on one core of the reference machine
FLOP_RATE = 4e10
PQ_RATE = 1e9

MAX_SHARDS = 1024

_FLAT_ROWS, _GRAPH_ROWS, _SMALL_GRAPH_ROWS = 20_000, 2_000_000, 20_000_000
_GRAPH_LISTS = 16_384  # from so many lists on, a graph finds a vector's list
_CHUNK_ROWS = 65_536
_GRAPH = r"HNSW(\d+)(?:,Flat|,SQ(?:\d+|fp16|bf16))?"
_LISTS = r"(?:OPQ\d+(?:_\d+)?,|RR\d+,)?IVF(\d+)(_HNSW\d+)?,(?:Flat|SQ(?:\d+|fp16|bf16)|PQ\d+(?:x\d+)?(?:fs)?(?:r)?)"


@dataclass(frozen=True)
class Estimate:
    """`index_bytes`: of the finished index; `build_bytes`: the most at a time while it is built; `seconds` to build."""

    index_bytes: int
    build_bytes: int
    seconds: float


def num_lists(rows: int) -> int:
    """Inverted lists for a catalogue: 8 sqrt(rows), the middle of FAISS's advice, with 64 rows each or more, rounded
    down to a power of two.
    """
    return 1 << (max(1, int(min(8 * rows**0.5, rows / 64))).bit_length() - 1)


def auto_factory(rows: int, dim: int, memory_bytes: int = 0) -> str:
    """The factory string for a catalogue of this size within `memory_bytes` (0: any), by what it takes to build.

    below 20 k      Flat: exact, needs no tuning, and a query still takes well under a millisecond
    below 2 M       HNSW32: the fastest at high recall; 4 dim + 272 bytes per row and a build of minutes
    below 20 M      HNSW32,SQ8: a quarter of the vectors' memory
    above           IVF,SQ8: dim + 8 bytes per row, because a graph over all rows takes hours to build; its lists are
                    found by a graph of their own
    If that is too large, the next smaller one, and at the end IVF with 4-bit PQ: dim / 4 + 8 bytes per row, its
    findings rescored from the stored vectors. Raises SettingError if nothing fits.
    """
    kinds = _kinds(rows, dim)
    for factory in kinds:
        if fits(factory, rows, dim, memory_bytes):
            return factory
    needs = {factory: estimate(factory, rows, dim) for factory in kinds}
    least = min((need.build_bytes, factory) for factory, need in needs.items() if need is not None)
    raise SettingError(
        "export.memory_gib",
        f"{memory_bytes / 2**30:.3g} is too little for any index over {rows:,} x {dim}: {least[1]} takes "
        f"{least[0] / 2**30:.3g} GiB to build; allow that, choose a smaller model.dim"
        f"{_or_cut('auto', rows, dim, memory_bytes)}",
    )


def _kinds(rows: int, dim: int) -> list[str]:
    """What `auto` tries for a catalogue, the best first."""
    lists = num_lists(rows)
    coarse = f"IVF{lists}_HNSW32" if lists >= _GRAPH_LISTS else f"IVF{lists}"
    kinds = [(_FLAT_ROWS, "Flat"), (_GRAPH_ROWS, "HNSW32"), (_SMALL_GRAPH_ROWS, "HNSW32,SQ8")]
    fitting = [factory for limit, factory in kinds if rows < limit]
    fitting = fitting[:1] if fitting[:1] == ["Flat"] else fitting
    return fitting + ([f"{coarse},SQ8", f"{coarse},PQ{dim // 2}x4fs"] if rows >= 64 * ROWS_PER_CENTROID[0] else ["SQ8"])


def fits(factory: str, rows: int, dim: int, memory_bytes: int) -> bool:
    """Whether building it is known to take at most `memory_bytes` (0: any)."""
    need = estimate(factory, rows, dim)
    return not memory_bytes or (need is not None and need.build_bytes <= memory_bytes)


def num_shards(factory: str, rows: int, dim: int, memory_bytes: int) -> int | None:
    """In how many parts an index must be cut at least for each to be built within `memory_bytes`.

    None where no cutting helps, or what it takes is not known. `auto` may take any of its kinds.
    """
    for shards in range(1, MAX_SHARDS + 1):
        part = -(-rows // shards)
        if any(fits(kind, part, dim, memory_bytes) for kind in (_kinds(part, dim) if factory == "auto" else [factory])):
            return shards
    return None


def _or_cut(factory: str, rows: int, dim: int, memory_bytes: int) -> str:
    """The way out that shards are, if they are one."""
    shards = num_shards(factory, rows, dim, memory_bytes)
    return "" if shards is None else f", or cut it into {shards} (export.index_shards)"


def check_memory(factory: str, rows: int, dim: int, memory_bytes: int) -> None:
    """Raises SettingError for an index that is known to take more than `memory_bytes` (0: any) to build."""
    need = estimate(factory, rows, dim)
    if need is not None and not fits(factory, rows, dim, memory_bytes):
        raise SettingError(
            "export.index",
            f"{factory} over {rows:,} x {dim} takes {need.build_bytes / 2**30:.3g} GiB to build, more than "
            f"export.memory_gib = {memory_bytes / 2**30:.3g}: raise that, let `auto` choose"
            f"{_or_cut(factory, rows, dim, memory_bytes)}",
        )


def advice(factory: str, rows: int) -> str:
    """What FAISS's guidelines have against the number of lists of `factory`; empty if nothing."""
    match = re.search(r"IVF(\d+)", factory)
    low, high = (round(factor * rows**0.5) for factor in LISTS_PER_SQRT)
    if match is None or low <= int(match[1]) <= high:
        return ""
    return f"{factory} has {match[1]} lists for {rows:,} rows; FAISS advises {low:,} to {high:,} (4 to 16 sqrt(rows))"


def bytes_per_row(factory: str, dim: int) -> float | None:
    """Bytes of a row in the index; None for a factory string that is not known here."""
    code: float = 4.0 * dim
    if match := re.search(r"(?<!Refine\()SQ(\d+|fp16|bf16)", factory):
        code = dim * (2 if match[1].endswith("16") else int(match[1]) / 8)
    elif match := re.search(r"PQ(\d+)(?:x(\d+))?(?:fs)?r?(?:,|$)", re.sub(r"OPQ\d+(_\d+)?,", "", factory)):
        code = int(match[1]) * int(match[2] or 8) / 8
    refined, _, originals = factory.partition(",R")
    if originals:
        code += {"Flat": 4 * dim, "efine(SQfp16)": 2 * dim, "efine(SQ8)": dim}.get(originals, 4 * dim)
    if match := re.fullmatch(_GRAPH, refined):
        return code + 8 * int(match[1]) + 16  # two lists' worth of links at the bottom, and little above it
    if re.fullmatch(_LISTS, refined):
        return code + 8  # and its id
    return code if re.fullmatch(r"Flat|SQ(?:\d+|fp16|bf16)|PQ\d+(?:x\d+)?(?:fs)?", refined) else None


def estimate(factory: str, rows: int, dim: int, threads: int = 1) -> Estimate | None:
    """What an index will take; None for a factory string that is not known here."""
    row = bytes_per_row(factory, dim)
    if row is None:
        return None
    seconds, sample = 0.0, 0
    refined = factory.partition(",R")[0]
    lists = 0
    if match := re.fullmatch(_GRAPH, refined):
        seconds = rows * max(rows, 2).bit_length() * (dim + 64) / HNSW_RATE / threads
    if match := re.fullmatch(_LISTS, refined):
        lists = int(match[1])
        sample = min(rows, max(65_536, TRAINED_PER_CENTROID * lists))
        compared = 20.0 * lists.bit_length() if match[2] else float(lists)
        seconds += 2 * dim * (10 * sample * compared + rows * compared) / FLOP_RATE / threads
    if match := re.search(r"PQ\d+(?:x(\d+))?", refined):
        codes = 2 ** int(match[1] or 8)
        sample = max(sample, min(rows, 65_536))
        seconds += 2 * 25 * min(rows, ROWS_PER_CENTROID[1] * codes) * codes * dim / PQ_RATE
    index_bytes = round(rows * row + 4 * lists * dim)
    return Estimate(index_bytes, index_bytes + 4 * dim * (sample + _CHUNK_ROWS), seconds)
