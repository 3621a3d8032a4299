"""Sequential SGD for skip-gram and CBOW over a block of sessions, on a local copy of the block's rows.

A large synchronous batch delays updates and costs quality, so a worker looks the block's distinct rows up once, runs
the windows over them in order, one SGD step per target as word2vec does, and hands the difference back to the table.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba
import numpy as np

from embedding_service.row_kernels import prefetch

_LANES = 16  # float32 numbers in the widest vector register of a CPU, and in a line of its caches
_FEW_LANES = 4  # of which rows that are shorter are made: more would only take room in the caches
_AHEAD = 2  # positions


def padded(dim: int) -> int:
    """The row length that `run_block` wants for vectors of dimension `dim`: the next multiple of 16; below 16, of 4."""
    lanes = _LANES if dim > _LANES else _FEW_LANES
    return -(-dim // lanes) * lanes


def run_block(
    source: np.ndarray,
    target: np.ndarray,
    tokens: np.ndarray,
    offsets: np.ndarray,
    negatives: np.ndarray,
    *,
    cbow: bool,
    window: int,
    num_negatives: int,
    learning_rate: float,
    seed: int,
    frozen: tuple[bool, bool] = (False, False),
) -> tuple[float, int, int]:
    """One pass of SGD over the block, changing `source` and `target` in place; a pure function of the arguments.

    Position t has as contexts the positions c within a random reduced window (word2vec: uniform in 1..window; window 0:
    the whole session) of the same session. Its outputs are its own row, with label 1, and `num_negatives` drawn rows,
    with label 0, that all its contexts share; one that is the target's own is left out. With the queries q (skip-gram:
    source_c for every c; CBOW: the one mean of all source_c) as they are before the step:

        g_qo = label_o - sigmoid(q . target_o)
        target_o += rate * sum_q g_qo q
        skip-gram: source_c += rate * sum_o g_co target_o
        CBOW: every source_c += rate * sum_o g_o target_o      (word2vec's, not divided by the number of contexts)

    source: float32 [u, width] and target: float32 [v, width], C-contiguous, the distinct rows of the block with zeros
    from the dimension to the width (see `padded`); tokens: int64 [m] into both; offsets: int64 [n + 1], the sessions;
    negatives: int64 [q], a sample of rows of `target` that negatives are drawn from; frozen: whether `source`, and
    whether `target`, stay as they are. Returns the summed loss over a sixteenth of the targets and its number of
    positive pairs (query, target), and the number of pairs (context, target) of the block.
    """
    width = source.shape[1]
    assert width == target.shape[1] == padded(width)
    assert source.flags.c_contiguous
    assert target.flags.c_contiguous
    loss, pairs, contexts = _kernel(width, cbow)(
        source.reshape(-1), target.reshape(-1), tokens, offsets, negatives, window, num_negatives,
        np.float32(learning_rate), np.uint64(seed % 2**64), *frozen,
    )  # fmt: skip
    return float(loss), int(pairs), int(contexts)


def take_padded(table: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """table[rows], padded for `run_block`: float32 [u, width]. table: float32 [n, dim]; rows: int64 [u]."""
    taken: np.ndarray = _take_padded(table, rows, padded(table.shape[1]))
    return taken


@numba.njit("float32[:, ::1](float32[:, ::1], int64[::1], int64)", nogil=True, cache=True)
def _take_padded(table: np.ndarray, rows: np.ndarray, width: int) -> np.ndarray:
    dim = table.shape[1]
    out = np.zeros((rows.size, width), np.float32)
    for i in range(rows.size):
        out[i, :dim] = table[rows[i]]
    return out


@numba.njit("void(float32[:, ::1], float32[:, ::1], int64[::1])", nogil=True, cache=True)
def subtract_taken(padded_rows: np.ndarray, table: np.ndarray, rows: np.ndarray) -> None:
    """Leave in `padded_rows` [u, width] what they are beyond table[rows], float32 [u, dim], that they were taken from.

    In place: a block's rows are more memory than a new array of them is worth.
    """
    for i in range(rows.size):
        for d in range(table.shape[1]):
            padded_rows[i, d] -= table[rows[i], d]


@numba.njit("void(float32[:, ::1], int64[::1], float32[:, ::1])", nogil=True, cache=True)
def subtract_rows(table: np.ndarray, rows: np.ndarray, values: np.ndarray) -> None:
    """table[rows] -= values, in place; rows: int64 [u]; values: float32 [u, dim], or wider rows."""
    for i in range(rows.size):
        for d in range(table.shape[1]):
            table[rows[i], d] -= values[i, d]


@functools.cache
def _kernel(width: int, cbow: bool) -> Callable[..., Any]:
    """The compiled loop for one row length: known to the compiler, it needs no checks in its vector loops.

    Places in the flat arrays are unsigned for the same reason: a signed one may mean 'from the end'.
    """
    # Copies of rows have an even number of vectors of lanes, or LLVM would add the lanes of each product up twice: of
    # those that it takes two at a time, and of the last one.
    long = width if width <= _LANES else -(-width // (2 * _LANES)) * (2 * _LANES)
    step, span, span2, span3 = (np.uint64(size) for size in (width, long, 2 * long, 3 * long))

    @numba.njit(nogil=True, fastmath=True, boundscheck=False, error_model="numpy", cache=True)
    def run(source, target, tokens, offsets, negatives, window, num_negatives, rate, seed, keep_source, keep_target):  # type: ignore[no-untyped-def]
        longest = 0
        for s in range(offsets.size - 1):
            longest = max(longest, offsets[s + 1] - offsets[s])
        reach = (longest if window == 0 else min(longest, 2 * window + 1)) + 2
        num_outputs = num_negatives + 1
        columns = (num_outputs + 2) // 3 * 3  # products are taken 2 queries x 3 outputs at a time
        across = np.uint64(columns)
        queries = np.zeros(reach * long, np.float32)
        outputs = np.zeros(columns * long, np.float32)
        change = np.zeros(reach * columns, np.float32)  # products, then rate * g
        context = np.zeros(reach, np.uint64)
        state = seed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x1234567)
        reach_of = np.zeros(longest + 1, np.int64)  # of each position of a session: how far its window reaches
        drawn = np.zeros((longest + 1) * num_outputs, np.uint64)  # and its outputs' rows
        loss, num_pairs, num_contexts = 0.0, 0, 0
        for s in range(offsets.size - 1):
            begin, end = offsets[s], offsets[s + 1]
            for t in range(begin, end):
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                reduced = end - begin
                if window > 0:
                    reduced = window - np.int64(((state >> np.uint64(33)) * np.uint64(window)) >> np.uint64(31))
                reach_of[t - begin] = reduced
                if end - begin == 1:
                    continue
                first = (t - begin) * num_outputs
                drawn[first] = np.uint64(tokens[t]) * step
                for o in range(1, num_outputs):
                    state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                    place = ((state >> np.uint64(33)) * np.uint64(negatives.size)) >> np.uint64(31)
                    drawn[first + o] = np.uint64(negatives[place]) * step
            for t in range(begin, end if end - begin > 1 else begin):
                if t + _AHEAD < end:  # rows lie anywhere in memory that is larger than the CPU's caches
                    coming = t + _AHEAD - begin
                    for o in range(coming * num_outputs, (coming + 1) * num_outputs):
                        for d in range(0, width, _LANES):
                            prefetch(target, np.int64(drawn[o]) + d)
                    entering = tokens[min(end - 1, t + _AHEAD + reach_of[coming])] * width
                    for d in range(0, width, _LANES):
                        prefetch(source, entering + d)
                found = 0
                for c in range(max(begin, t - reach_of[t - begin]), min(end, t + reach_of[t - begin] + 1)):
                    if c != t:
                        context[found] = np.uint64(tokens[c]) * step
                        found += 1
                num_contexts += found
                output = drawn[(t - begin) * num_outputs :]
                own = output[0]
                # copies of the rows as they are before the step
                for o in range(num_outputs):
                    place, row = np.uint64(o) * span, output[o]
                    for d in range(step):
                        outputs[place + d] = target[row + d]
                count = found
                if cbow:
                    count = 1
                    for d in range(step):
                        queries[d] = np.float32(0.0)
                    for i in range(found):
                        row = context[i]
                        for d in range(step):
                            queries[d] += source[row + d]
                    share = np.float32(1.0) / np.float32(found)
                    for d in range(step):
                        queries[d] *= share
                else:
                    for i in range(found):
                        place, row = np.uint64(i) * span, context[i]
                        for d in range(step):
                            queries[place + d] = source[row + d]
                for i in range(0, count, 2):
                    for o in range(0, columns, 3):
                        p00 = p01 = p02 = p10 = p11 = p12 = np.float32(0.0)
                        q, r = np.uint64(i) * span, np.uint64(o) * span
                        for d in range(span):
                            q0, q1 = queries[q + d], queries[q + span + d]
                            o0, o1, o2 = outputs[r + d], outputs[r + span + d], outputs[r + span2 + d]
                            p00 += q0 * o0
                            p01 += q0 * o1
                            p02 += q0 * o2
                            p10 += q1 * o0
                            p11 += q1 * o1
                            p12 += q1 * o2
                        first = np.uint64(i) * across + np.uint64(o)
                        second = first + across
                        change[first], change[first + np.uint64(1)], change[first + np.uint64(2)] = p00, p01, p02
                        change[second], change[second + np.uint64(1)], change[second + np.uint64(2)] = p10, p11, p12
                if t & 15 == 0:
                    num_pairs += count
                    for i in range(count):
                        for o in range(num_outputs):
                            if o == 0 or output[o] != own:
                                product = change[i * columns + o]
                                loss += max(np.float32(0.0), -product if o == 0 else product)
                                loss += np.log1p(np.exp(-abs(product)))
                for j in range(count * columns):
                    # -rate * sigmoid(x) = -rate * (1 + tanh(x / 2)) / 2, tanh as Eigen's rational function
                    x = min(max(change[j] * np.float32(0.5), np.float32(-7.9)), np.float32(7.9))
                    y = x * x
                    above = y * np.float32(-2.76076847742355e-16) + np.float32(2.00018790482477e-13)
                    above = above * y + np.float32(-8.60467152213735e-11)
                    above = above * y + np.float32(5.12229709037114e-08)
                    above = above * y + np.float32(1.48572235717979e-05)
                    above = above * y + np.float32(6.37261928875436e-04)
                    above = above * y + np.float32(4.89352455891786e-03)
                    below = y * np.float32(1.19825839466702e-06) + np.float32(1.18534705686654e-04)
                    below = below * y + np.float32(2.26843463243900e-03)
                    below = below * y + np.float32(4.89352518554385e-03)
                    change[j] = -rate * (np.float32(0.5) + np.float32(0.5) * (x * above / below))
                for i in range(count):
                    change[i * columns] += rate
                    for o in range(num_outputs, columns):
                        change[i * columns + o] = np.float32(0.0)
                for o in range(1, num_outputs):
                    if output[o] == own:
                        for i in range(count):
                            change[i * columns + o] = np.float32(0.0)
                for o in range(0 if keep_target else num_outputs):
                    row = output[o]
                    i = 0
                    while i + 4 <= count:  # a row is read and written once for as many queries
                        at, q = np.uint64(i) * across + np.uint64(o), np.uint64(i) * span
                        g0, g1 = change[at], change[at + across]
                        g2, g3 = change[at + np.uint64(2) * across], change[at + np.uint64(3) * across]
                        for d in range(step):
                            target[row + d] += (
                                g0 * queries[q + d]
                                + g1 * queries[q + span + d]
                                + g2 * queries[q + span2 + d]
                                + g3 * queries[q + span3 + d]
                            )
                        i += 4
                    if i + 2 <= count:
                        at, q = np.uint64(i) * across + np.uint64(o), np.uint64(i) * span
                        g0, g1 = change[at], change[at + across]
                        for d in range(step):
                            target[row + d] += g0 * queries[q + d] + g1 * queries[q + span + d]
                    if count & 1:
                        g0, q = change[np.uint64(count - 1) * across + np.uint64(o)], np.uint64(count - 1) * span
                        for d in range(step):
                            target[row + d] += g0 * queries[q + d]
                if keep_source:
                    continue
                if cbow:
                    for d in range(step):
                        queries[d] = np.float32(0.0)
                    for o in range(num_outputs):
                        g0, r = change[o], np.uint64(o) * span
                        for d in range(step):
                            queries[d] += g0 * outputs[r + d]
                    for i in range(found):
                        row = context[i]
                        for d in range(step):
                            source[row + d] += queries[d]
                else:
                    for i in range(found):
                        row = context[i]
                        o = 0
                        while o + 6 <= columns:
                            at, r = np.uint64(i) * across + np.uint64(o), np.uint64(o) * span
                            k, v = at + np.uint64(3), r + span3
                            g0, g1, g2 = change[at], change[at + np.uint64(1)], change[at + np.uint64(2)]
                            g3, g4, g5 = change[k], change[k + np.uint64(1)], change[k + np.uint64(2)]
                            for d in range(step):
                                source[row + d] += (
                                    g0 * outputs[r + d]
                                    + g1 * outputs[r + span + d]
                                    + g2 * outputs[r + span2 + d]
                                    + g3 * outputs[v + d]
                                    + g4 * outputs[v + span + d]
                                    + g5 * outputs[v + span2 + d]
                                )
                            o += 6
                        if o < columns:
                            at, r = np.uint64(i) * across + np.uint64(o), np.uint64(o) * span
                            g0, g1, g2 = change[at], change[at + np.uint64(1)], change[at + np.uint64(2)]
                            for d in range(step):
                                source[row + d] += (
                                    g0 * outputs[r + d] + g1 * outputs[r + span + d] + g2 * outputs[r + span2 + d]
                                )
        return loss, num_pairs, num_contexts

    return run
