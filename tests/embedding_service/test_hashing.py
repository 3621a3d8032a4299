"""The hashes are what they claim to be, for ever."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import DataError
from embedding_service.hashing import key_array, stable_hash

fixed = settings(deadline=None, derandomize=True)  # the same cases in every run, on slow machines too
GOLDEN = 0x9E3779B97F4A7C15
M64 = 2**64 - 1

GOLDEN_INTEGERS = [0xE220A8397B1DCDAF, 0x910A2DEC89025CC1, 0xE4D971771B652C20, 0x2A67D7552E039EA7, 0x481EC0A212A9F3DB]
GOLDEN_INTEGERS_SEED_7 = [
    0xD8AEAF9751EE6FAD,
    0xDB8F1AB363E87690,
    0x22886F8280FBF0C2,
    0xFD53FB148550F2AD,
    0x76886809FA6277D2,
]
GOLDEN_STRINGS_SEED_7 = [0x95F0626F6F0A4409, 0x353C3FBB8D01C5C8, 0xF408F80EE0731587, 0xAE5AD321E4FE6127]


def slow_mix(state: int) -> int:
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & M64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & M64
    return state ^ (state >> 31)


def xxhash_sanity_buffer(length: int) -> bytes:
    """The input of the reference implementation's own check (xxHash, tests/sanity_test.c)."""
    word, out = 2654435761, bytearray()
    for _ in range(length):
        out.append(word >> 56)
        word = word * 11400714785074694797 & M64
    return bytes(out)


def hash_raw(data: bytes, seed: int) -> int:
    offsets = np.array([0, len(data)], dtype=np.int64)
    keys = pa.Array.from_buffers(pa.large_string(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])
    return int(stable_hash(keys, seed=seed)[0])


@pytest.mark.parametrize(
    ("length", "seed", "expected"),
    [
        (0, 0, 0xEF46DB3751D8E999),
        (0, 2654435761, 0xAC75FDA2929B17EF),
        (1, 0, 0xE934A84ADB052768),
        (1, 2654435761, 0x5014607643A9B4C3),
        (4, 0, 0x9136A0DCA57457EE),
        (14, 0, 0x8282DCC4994E35C8),
        (14, 2654435761, 0xC3BD6BF63DEB6DF0),
        (222, 0, 0xB641AE8CB691C174),
        (222, 2654435761, 0x20CB8AB7AE10C14A),
    ],
)
def test_strings_match_the_published_xxh64_vectors(length: int, seed: int, expected: int) -> None:
    assert hash_raw(xxhash_sanity_buffer(length), seed) == expected


def test_text_matches_xxh64_of_its_utf8_bytes() -> None:
    hashes = stable_hash(pa.array(["a", "ab", "abc", "Nobody inspects the spammish repetition"]))
    assert hashes.tolist() == [15154266338359012955, 7347350983217793633, 4952883123889572249, 0xFBCEA83C8A378BF1]
    assert int(stable_hash(pa.array(["Zürich 東京 🚲"]))[0]) == hash_raw("Zürich 東京 🚲".encode(), 0)


def test_integers_match_the_published_splitmix64_sequence() -> None:
    # output i of the reference generator seeded with s is the hash of s + i * GOLDEN
    states = [(1234567 + i * GOLDEN) & M64 for i in range(5)]
    keys = np.array(states, dtype=np.uint64).view(np.int64)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert stable_hash(keys).tolist() == [*published, 16408922859458223821]
    assert int(stable_hash(np.array([0]))[0]) == 0xE220A8397B1DCDAF


def test_golden_values() -> None:
    """Tables are addressed by these: a change here makes every saved run unreadable."""
    integers = np.array([0, 1, -1, 2**63 - 1, -(2**63)])
    assert stable_hash(integers).tolist() == GOLDEN_INTEGERS
    assert stable_hash(integers, seed=7).tolist() == GOLDEN_INTEGERS_SEED_7
    assert stable_hash(pa.array(["", "item/7", "κλειδί", "x" * 100]), seed=7).tolist() == GOLDEN_STRINGS_SEED_7


@fixed
@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20), st.integers(0, M64))
def test_integers_follow_the_formula(keys: list[int], seed: int) -> None:
    slow = [slow_mix((key + GOLDEN & M64) ^ slow_mix(seed)) for key in keys]
    assert stable_hash(pa.array(keys, pa.int64()), seed=seed).tolist() == slow


@fixed
@given(st.lists(st.text(), max_size=20), st.integers(0, M64))
def test_slices_and_layouts_do_not_matter(keys: list[str], seed: int) -> None:
    alone = [int(stable_hash(pa.array([key]), seed=seed)[0]) for key in keys]
    padded = pa.array(["padding", *keys, "padding"])
    for layout in (padded, padded.cast(pa.large_string()), padded.dictionary_encode(), padded.cast(pa.string_view())):
        assert stable_hash(layout.slice(1, len(keys)), seed=seed).tolist() == alone


def test_integer_widths_do_not_matter() -> None:
    expected = stable_hash(np.array([-3, 0, 100])).tolist()
    for width in (np.int8, np.int16, np.int32):
        assert stable_hash(np.array([-3, 0, 100], dtype=width)).tolist() == expected
    assert stable_hash(np.array([100], dtype=np.uint64)).tolist() == expected[2:]


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_buckets_are_even_and_seeds_independent(kind: str) -> None:
    # consecutive ids, the worst friendly case; 4 sigma of a binomial around the mean
    keys = pa.array(np.arange(200_000)).cast(kind)
    buckets = [stable_hash(keys, seed=seed) % np.uint64(1000) for seed in (0, 1)]
    for bucket in buckets:
        sizes = np.bincount(bucket.astype(np.int64), minlength=1000)
        assert abs(sizes.var() / 200 - 1) < 4 * np.sqrt(2 / 999)
    both = np.count_nonzero(buckets[0] == buckets[1])
    assert abs(both - 200) < 4 * np.sqrt(200)


def test_another_process_agrees() -> None:
    """Python's own hash of a string would differ: it is salted in every process."""
    code = (
        "import pyarrow as pa; from embedding_service.hashing import stable_hash;"
        "print(stable_hash(pa.array(['item/7']))[0])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(out.stdout) == int(stable_hash(pa.array(["item/7"]))[0])


def test_what_is_not_a_key_is_refused() -> None:
    with pytest.raises(DataError, match="integers or strings; these are double"):
        stable_hash(np.array([1.5]))
    with pytest.raises(DataError, match="null key"):
        stable_hash(pa.array([1, None]))
    with pytest.raises(DataError, match="fit int64"):
        key_array(np.array([2**63], dtype=np.uint64))
    with pytest.raises(ValueError, match="seed"):
        stable_hash(np.array([1]), seed=-1)


def test_importing_costs_nothing() -> None:
    code = "import sys, embedding_service.hashing, embedding_service.keys; print('numba' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
