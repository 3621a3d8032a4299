"""Sequential skip-gram SGD over a block of sessions, on a local copy of the block's rows.

A large synchronous batch delays updates and costs quality, so a worker looks the block's distinct rows up once, runs
the windows over them in order, one SGD step per target as word2vec does, and hands the difference back to the table.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

_CLAMP = 8.0
_STEPS = 4096
_GRID = (np.arange(_STEPS) + 0.5) / _STEPS * (2 * _CLAMP) - _CLAMP
_SIGMOID = (1.0 / (1.0 + np.exp(-_GRID))).astype(np.float32)


def run_block(
    source: np.ndarray,
    target: np.ndarray,
    tokens: np.ndarray,
    offsets: np.ndarray,
    negatives: np.ndarray,
    *,
    window: int,
    num_negatives: int,
    learning_rate: float,
    seed: int,
    threads: int,
) -> tuple[float, int]:
    """One pass of SGD over the block, changing `source` and `target` in place.

    For every position t and every context position c within a random reduced window (word2vec: uniform in 1..window;
    window 0: the whole session) of the same session, the pair (source[tokens[c]], target[tokens[t]]) is positive, and
    (source[tokens[c]], target[n]) negative for `num_negatives` rows n that all contexts of t share:

        g = label - sigmoid(source_c . target_n)
        target_n += rate * sum_c g source_c
        source_c += rate * sum_n g target_n

    source, target: float32 [u, dim], the distinct rows of the block; tokens: int64 [m] into them; offsets: int64
    [n + 1], the sessions; negatives: int64 [q], a sample of rows of `target` that negatives are drawn from. With one
    thread the result is a pure function of the arguments; more threads work on shares of the sessions and update
    without locks (Hogwild, Niu et al. 2011). Returns the summed loss over a sixteenth of the targets, and its number of
    pairs.
    """
    count = len(offsets) - 1
    share = np.searchsorted(offsets, np.linspace(0, offsets[-1], threads + 1)).clip(0, count)
    share[0], share[-1] = 0, count

    def work(part: int) -> tuple[float, int]:
        return _kernel(  # type: ignore[no-any-return]
            source, target, tokens, offsets, share[part], share[part + 1], negatives, window, num_negatives,
            np.float32(learning_rate), np.uint64((seed * 1_000_003 + part) % 2**64), _SIGMOID,
        )  # fmt: skip

    if threads == 1:
        return work(0)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(work, range(threads)))
    loss, pairs = (sum(values) for values in zip(*parts, strict=True))
    return float(loss), int(pairs)


@numba.njit(nogil=True, fastmath=True, boundscheck=False, error_model="numpy", cache=True)
def _kernel(source, target, tokens, offsets, first, last, negatives, window, num_negatives, rate, seed, sigmoid):  # type: ignore[no-untyped-def]
    dim = source.shape[1]
    longest = 0
    for s in range(first, last):
        longest = max(longest, offsets[s + 1] - offsets[s])
    reach = longest if window == 0 else min(longest, 2 * window + 1)
    step = np.empty((max(1, reach), dim), np.float32)
    contexts = np.empty(max(1, reach), np.int64)
    moved = np.empty(dim, np.float32)
    outputs = np.empty(num_negatives + 1, np.int64)
    state = seed * np.uint64(0x9E3779B97F4A7C15) + np.uint64(0x1234567)
    num_candidates = np.uint64(negatives.size)
    scale = np.float32(sigmoid.size / (2 * 8.0))
    loss = 0.0
    pairs = 0
    for s in range(first, last):
        begin, end = offsets[s], offsets[s + 1]
        for t in range(begin, end):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            reduced = end - begin if window == 0 else window - np.int64((state >> np.uint64(33)) % np.uint64(window))
            num_contexts = 0
            for c in range(max(begin, t - reduced), min(end, t + reduced + 1)):
                if c != t:
                    contexts[num_contexts] = tokens[c]
                    num_contexts += 1
            if num_contexts == 0:
                continue
            outputs[0] = tokens[t]
            num_outputs = 1
            for _ in range(num_negatives):
                state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
                drawn = negatives[(state >> np.uint64(33)) % num_candidates]
                if drawn != tokens[t]:
                    outputs[num_outputs] = drawn
                    num_outputs += 1
            for i in range(num_contexts):
                for d in range(dim):
                    step[i, d] = 0.0
            watched = (t & 15) == 0
            for n in range(num_outputs):
                out = target[outputs[n]]
                label = np.float32(1.0) if n == 0 else np.float32(0.0)
                for d in range(dim):
                    moved[d] = 0.0
                for i in range(num_contexts):
                    row = source[contexts[i]]
                    dot = np.float32(0.0)
                    for d in range(dim):
                        dot += row[d] * out[d]
                    cell = min(max(np.int64((dot + np.float32(8.0)) * scale), 0), sigmoid.size - 1)
                    chance = sigmoid[cell]
                    if watched:
                        loss -= np.log(chance if n == 0 else np.float32(1.0) - chance)
                        pairs += n == 0
                    g = (label - chance) * rate
                    add = step[i]
                    for d in range(dim):
                        add[d] += g * out[d]
                        moved[d] += g * row[d]
                for d in range(dim):
                    out[d] += moved[d]
            for i in range(num_contexts):
                row = source[contexts[i]]
                add = step[i]
                for d in range(dim):
                    row[d] += add[d]
    return loss, pairs
