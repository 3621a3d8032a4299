"""Compiled kernels behind `retrieval`: pool a history, score what an index found, rank it, leave out what was seen.

A single query spends its time in calls, not in arithmetic: in a server, where the caches are cold at every request, two
dozen numpy calls cost several times the search in the index. These kernels do the same for one query or a thousand.
Types are fixed, so that numba compiles once per machine (see `hash_kernels`); all of them release the GIL.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

_FLOATS_2D = types.Array(types.float32, 2, "C")
_FLOATS_2D_IN = types.Array(types.float32, 2, "A", readonly=True)
_FLOATS_IN = types.Array(types.float32, 1, "C", readonly=True)
_INT64S_2D = types.Array(types.int64, 2, "C")
_INT64S_2D_IN = types.Array(types.int64, 2, "A", readonly=True)
_INT64S_IN = types.Array(types.int64, 1, "A", readonly=True)
_BOOLS = types.Array(types.boolean, 1, "C")
_INSERTION_SORT = 64  # up to this many it is the fastest
_CACHE_LINE = 64  # bytes


def _kernel(result: Any, *arguments: Any) -> Callable[[Callable[..., Any]], Any]:
    compiler: Callable[[Callable[..., Any]], Any] = njit(
        result(*arguments), nogil=True, cache=True, error_model="numpy"
    )
    return compiler


@_kernel(types.void, _FLOATS_2D_IN, _INT64S_IN, _FLOATS_IN, _FLOATS_2D)
def pool(rows: Any, offsets: Any, weights: Any, out: Any) -> None:
    """out[i] = sum of weights[j] rows[j] over offsets[i] <= j < offsets[i + 1]; out is float32 [n, dim]."""
    num, dim = out.shape
    for i in range(num):
        for d in range(dim):
            out[i, d] = 0.0
        for j in range(offsets[i], offsets[i + 1]):
            for d in range(dim):
                out[i, d] += weights[j] * rows[j, d]


@njit(types.void(types.Array(types.float32, 1, "C"), types.Array(types.int64, 1, "C")), nogil=True, cache=True)
def _rank(scores: Any, rows: Any) -> None:
    """Sort by score descending, then row ascending, in place."""
    width = len(rows)
    if width > _INSERTION_SORT:
        order = np.argsort(rows, kind="mergesort")
        order = order[np.argsort(-scores[order], kind="mergesort")]
        scores[:] = scores[order]
        rows[:] = rows[order]
        return
    for j in range(1, width):
        score, row = scores[j], rows[j]
        place = j
        while place > 0 and (scores[place - 1] < score or (scores[place - 1] == score and rows[place - 1] > row)):
            scores[place] = scores[place - 1]
            rows[place] = rows[place - 1]
            place -= 1
        scores[place] = score
        rows[place] = row


@njit(
    types.void(
        types.Array(types.float32, 1, "A", readonly=True),
        types.Array(types.int64, 1, "A", readonly=True),
        _INT64S_IN,
        types.Array(types.float32, 1, "C"),
        types.Array(types.int64, 1, "C"),
    ),
    nogil=True,
    cache=True,
)
def _keep_unseen(scores: Any, rows: Any, seen: Any, out_scores: Any, out_rows: Any) -> None:
    """The first of `rows` that are neither -1 nor in `seen`, into out; the rest of out becomes row -1, score -inf."""
    hidden = np.sort(seen)
    found = 0
    for j in range(len(rows)):
        if found == len(out_rows):
            break
        row = rows[j]
        place = np.searchsorted(hidden, row)
        if row >= 0 and (place == len(hidden) or hidden[place] != row):
            out_scores[found] = scores[j]
            out_rows[found] = row
            found += 1
    out_scores[found:] = -np.inf
    out_rows[found:] = -1


@_kernel(types.void, _FLOATS_2D_IN, _INT64S_2D_IN, _INT64S_IN, _INT64S_IN, _FLOATS_2D, _INT64S_2D)
def first_unseen(scores: Any, rows: Any, seen: Any, offsets: Any, out_scores: Any, out_rows: Any) -> None:
    """Of each ranked line [n, m] the first that seen[offsets[i] : offsets[i + 1]] does not list, into out [n, k]."""
    for i in range(len(rows)):
        _keep_unseen(scores[i], rows[i], seen[offsets[i] : offsets[i + 1]], out_scores[i], out_rows[i])


def decoded(code: Any) -> Any:
    """The float32 of a stored component, but for int8's scale; float16 comes as its bits, in uint16."""


@overload(decoded)
def _decoded_by_type(code: Any) -> Callable[[Any], Any]:
    def half(code: Any) -> Any:
        """Shifted into the fields of a float32, a float16 is too small by the difference of the exponents' biases."""
        size = np.uint32((np.uint32(code) & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32)
        return size * np.float32(-(2.0**112) if code & np.uint16(0x8000) else 2.0**112)

    def plain(code: Any) -> Any:
        return np.float32(code)

    return half if code == types.uint16 else plain


@njit(fastmath={"reassoc"}, error_model="numpy")
def _dot(query: Any, code: Any, factor: Any) -> Any:
    """Inner product in float64 of a query and a stored vector, summed in the order that suits the processor."""
    total = 0.0
    for d in range(len(query)):
        total += query[d] * np.float64(np.float32(decoded(code[d]) * factor))
    return total


@njit(fastmath={"reassoc"}, error_model="numpy")
def _squared(code: Any, factor: Any) -> Any:
    """The squared length in float64 of a stored vector."""
    total = 0.0
    for d in range(len(code)):
        value = np.float64(np.float32(decoded(code[d]) * factor))
        total += value * value
    return total


@intrinsic
def _prefetch(_: Any, address: Any) -> Any:
    """Have the processor fetch the cache line at `address`, without waiting for it."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), (pointer, number, number, number))
        )
        options = [ir.Constant(number, option) for option in (0, 3, 1)]  # to read, soon again, data
        builder.call(function, [builder.inttoptr(arguments[0], pointer), *options])
        return context.get_dummy_value()

    return types.void(address), generate


@njit(error_model="numpy")
def prefetch_from(address: int, num_bytes: int) -> None:
    """The cache lines of `num_bytes` bytes from `address` on."""
    for offset in range(0, num_bytes, _CACHE_LINE):
        _prefetch(address + offset)  # type: ignore[call-arg]  # numba adds the first argument


@njit(error_model="numpy")
def _prefetch_rows(codes: Any, rows: Any) -> None:
    """Vectors that an index has found lie anywhere: their lines are fetched side by side, not one after the other."""
    row_bytes = codes.shape[1] * codes.itemsize
    for row in rows:
        if row >= 0:
            prefetch_from(codes.ctypes.data + row * row_bytes, row_bytes)


def _scores_of(codes: Any) -> Any:
    return types.int64(
        _FLOATS_2D_IN,
        _INT64S_2D_IN,
        types.Array(codes, 2, "C", readonly=True),
        _FLOATS_IN,
        types.boolean,
        types.int64,
        types.boolean,
        _INT64S_IN,
        _INT64S_IN,
        _FLOATS_2D,
        _INT64S_2D,
        _BOOLS,
    )


@njit(
    [_scores_of(types.float32), _scores_of(types.uint16), _scores_of(types.int8)],
    nogil=True,
    cache=True,
    error_model="numpy",
)
def best_unseen(
    queries: Any,
    found: Any,
    codes: Any,
    scale: Any,
    cosine: bool,
    wanted: int,
    heed_ties: bool,
    seen: Any,
    offsets: Any,
    out_scores: Any,
    out_rows: Any,
    lacking: Any,
) -> int:
    """Score found rows [n, m] by their vectors, rank them, keep the first unseen ones in out [n, k].

    codes [rows, dim] and scale float32 [rows], or [0] for none, are stored vectors (`VectorSet.stored`), decoded here.
    Scores are those of `exact.pair_scores`: inner products (for cosine of unit vectors) in float64, rounded to float32.
    lacking [n] is set where fewer than `wanted` rows were found (-1 stands for the others), or where, with heed_ties,
    the last of m > wanted scores is that of place `wanted`: then rows that were not fetched may tie. Returns how many
    lack.
    """
    num, width = found.shape
    dim = codes.shape[1]
    query = np.empty(dim, np.float64)
    scores = np.empty(width, np.float32)
    rows = np.empty(width, np.int64)
    num_lacking = 0
    for i in range(num):
        _prefetch_rows(codes, found[i])
        squared = 0.0
        for d in range(dim):
            query[d] = queries[i, d]
            squared += query[d] * query[d]
        length = max(np.sqrt(squared), 1e-30)
        num_found = 0
        for j in range(width):
            row = found[i, j]
            rows[j] = row
            if row < 0:
                scores[j] = -np.inf
                continue
            num_found += 1
            factor = scale[row] if len(scale) > 0 else np.float32(1.0)
            total = _dot(query, codes[row], factor)
            if cosine:
                total /= length * max(np.sqrt(_squared(codes[row], factor)), 1e-30)
            scores[j] = np.float32(total)
        _rank(scores, rows)
        lacks = num_found < wanted
        lacks |= heed_ties and width > wanted and scores[width - 1] == scores[wanted - 1]
        lacking[i] = lacks
        num_lacking += lacks
        _keep_unseen(scores[:wanted], rows[:wanted], seen[offsets[i] : offsets[i + 1]], out_scores[i], out_rows[i])
    return num_lacking
