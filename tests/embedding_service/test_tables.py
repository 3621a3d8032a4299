from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding_service.tables import TableSpec, check_names, deduplicate, initial_rows

SPEC = TableSpec("item", 1000, 8, 0.25)
GOLDEN = [-0.016799122095108032, -0.0004786849021911621, 0.10531634092330933, -0.24888503551483154,
          0.1300872564315796, 0.20099613070487976, 0.06434151530265808, -0.07367536425590515]  # fmt: skip


def test_initial_rows_do_not_depend_on_how_the_table_is_cut() -> None:
    whole = initial_rows(SPEC, 7, 0, 1000)
    for cuts in ([0, 500, 1000], [0, 1, 2, 334, 1000], [0, 0, 999, 1000]):
        parts = [initial_rows(SPEC, 7, start, stop) for start, stop in itertools.pairwise(cuts)]
        assert np.array_equal(np.concatenate(parts), whole)


def test_initial_rows_do_not_depend_on_the_size_of_the_table() -> None:
    larger = TableSpec("item", 2000, 8, 0.25)
    assert np.array_equal(initial_rows(larger, 7, 0, 1000), initial_rows(SPEC, 7, 0, 1000))


def test_initial_rows_are_uniform_in_the_scale() -> None:
    rows = initial_rows(TableSpec("item", 20_000, 8, 0.25), 0, 0, 20_000)
    assert rows.dtype == np.float32
    assert rows.shape == (20_000, 8)
    assert np.abs(rows).max() <= 0.25
    shares = np.histogram(rows, bins=10, range=(-0.25, 0.25))[0] / rows.size
    assert np.abs(shares - 0.1).max() < 5 * np.sqrt(0.09 / rows.size)
    columns = np.corrcoef(rows.T) - np.eye(8)
    assert np.abs(columns).max() < 5 / np.sqrt(20_000)


def test_initial_rows_differ_by_seed_and_by_table() -> None:
    rows = initial_rows(SPEC, 7, 0, 100)
    assert not np.any(initial_rows(SPEC, 8, 0, 100) == rows)
    assert not np.any(initial_rows(TableSpec("user", 1000, 8, 0.25), 7, 0, 100) == rows)


def test_tables_whose_names_begin_alike_start_differently() -> None:
    first, second = (TableSpec(name, 1000, 8, 0.25) for name in ("query_country", "query_color"))
    assert not np.array_equal(initial_rows(first, 0, 0, 100), initial_rows(second, 0, 0, 100))


def test_any_seed_and_name_will_do() -> None:
    with np.errstate(over="raise"):
        assert np.isfinite(initial_rows(TableSpec("größe_über_alles", 3, 4, 1.0), 2**64 - 1, 0, 3)).all()


def test_scale_zero_is_zeros() -> None:
    assert not initial_rows(TableSpec("output", 10, 4, 0.0), 0, 3, 10).any()


def splitmix64(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_initial_rows_are_splitmix64_of_the_elements_number() -> None:
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # the generator's published first number for seed 0
    name = int.from_bytes(hashlib.blake2b(b"item", digest_size=8).digest(), "little")
    base = (7 + name) * 0xD1342543DE82EF95
    units = [splitmix64((base + i * 0x9E3779B97F4A7C15) % 2**64) >> 40 for i in range(5 * 8 + 1, 7 * 8 + 1)]
    wanted = (2.0 * np.array(units) * 2.0**-24 - 1.0) * 0.25
    assert np.allclose(initial_rows(SPEC, 7, 5, 7).reshape(-1), wanted, rtol=0, atol=1e-7)


def test_initial_rows_are_the_same_in_every_version() -> None:
    """A run resumed by a later version, or on another machine, must not find other rows than it began with."""
    assert initial_rows(SPEC, 7, 5, 6)[0].tolist() == GOLDEN


def test_deduplicate_splits_the_index_by_use() -> None:
    uses = {"item": np.array([7, 3, 7]), "none": np.empty(0, np.int64), "history": np.array([3, 9, 9, 0])}
    distinct, index = deduplicate(uses)
    assert distinct.tolist() == [0, 3, 7, 9]
    assert {name: found.tolist() for name, found in index.items()} == {
        "item": [2, 1, 2],
        "none": [],
        "history": [1, 3, 3, 0],
    }


@settings(deadline=None, derandomize=True)
@given(st.lists(st.lists(st.integers(0, 2**62) | st.integers(0, 9), max_size=40), max_size=4))
def test_deduplicate_is_numpys_unique(lists: list[list[int]]) -> None:
    uses = {str(i): np.array(rows, np.int64) for i, rows in enumerate(lists)}
    distinct, index = deduplicate(uses)
    assert distinct.dtype == np.int64
    assert distinct.tolist() == sorted({row for rows in lists for row in rows})
    assert list(index) == list(uses)
    for name, rows in uses.items():
        assert distinct[index[name]].tolist() == rows.tolist()


def test_deduplicate_of_many_rows_of_few_values() -> None:
    rows = np.random.default_rng(0).integers(0, 1000, 100_000) * 2**20  # equal low bits
    distinct, index = deduplicate({"item": rows})
    assert len(distinct) == 1000
    assert np.array_equal(distinct[index["item"]], rows)


@pytest.mark.parametrize(
    ("rows", "dim", "message"), [(0, 4, "item needs at least one row; got 0"), (3, 6, "by 4; got 6")]
)
def test_a_table_that_cannot_be_is_refused(rows: int, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TableSpec("item", rows, dim, 0.1)


@pytest.mark.parametrize(
    ("precision", "optimizer", "row_bytes"),
    [("fp32", "sgd", 64), ("fp16", "sgd", 32), ("fp32", "rowwise_adagrad", 68), ("fp16", "adagrad", 96)],
)
def test_bytes_count_weights_and_optimizer_state(precision: str, optimizer: str, row_bytes: int) -> None:
    assert TableSpec("item", 10, 16, 0.1, precision).num_bytes(optimizer) == 10 * row_bytes  # type: ignore[arg-type]


def test_two_tables_of_one_name_are_refused() -> None:
    check_names([SPEC, TableSpec("user", 1, 4, 0.0)])
    with pytest.raises(ValueError, match="must differ"):
        check_names([SPEC, TableSpec("item", 1, 4, 0.0)])
