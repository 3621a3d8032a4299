"""The vocabulary against a dictionary and a sort."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.errors import ArtifactError, DataError, SettingError
from embedding_service.hashing import key_array, stable_hash
from embedding_service.keys import Vocabulary

fixed = settings(deadline=None, derandomize=True)  # the same cases in every run, on slow machines too
integers = st.one_of(
    st.integers(-3, 3), st.integers(-(2**63), 2**63 - 1), st.sampled_from([-(2**63), 2**63 - 1, 2**32, -1])
)
texts = st.one_of(st.sampled_from(["", "a", "aa", "b", "é", "🚲", "\0", "a\0"]), st.text(max_size=40))
key_lists = st.one_of(st.lists(integers, min_size=1), st.lists(texts, min_size=1))


def arrow(keys: list[Any]) -> pa.Array:
    return pa.array(keys, pa.int64() if isinstance(keys[0], int) else pa.large_string())


def vocabulary(keys: list[Any], **options: Any) -> Vocabulary:
    return Vocabulary.build([arrow(keys)], **options)


def utf8_order(key: Any) -> Any:
    return key.encode() if isinstance(key, str) else key


@fixed
@given(key_lists, st.integers(1, 3), st.integers(1, 7))
def test_build_is_a_count_and_a_sort_for_any_chunking(keys: list[Any], min_count: int, size: int) -> None:
    counts = Counter(keys)
    expected = sorted((k for k in counts if counts[k] >= min_count), key=lambda k: (-counts[k], utf8_order(k)))
    chunks = [arrow(keys).slice(i, size) for i in range(0, len(keys), size)]
    if not expected:
        with pytest.raises(DataError, match=r"lower keys\.min_count"):
            Vocabulary.build(chunks, min_count=min_count)
        return
    built = Vocabulary.build(chunks, min_count=min_count)
    assert built.keys.to_pylist() == expected
    assert built.counts.tolist() == [counts[k] for k in expected]
    assert built.dropped == len(keys) - sum(counts[k] for k in expected)
    assert built.fingerprint == vocabulary(keys, min_count=min_count).fingerprint


@fixed
@given(key_lists, key_lists, st.sampled_from(["skip", "row"]))
def test_lookups_are_a_dictionary(keys: list[Any], others: list[Any], unknown: Any) -> None:
    built = vocabulary(keys, unknown=unknown)
    num_keys = len(built.keys)
    absent = num_keys if unknown == "row" else -1
    rows = {key: row for row, key in enumerate(built.keys.to_pylist())}
    assert built.num_rows == num_keys + (unknown == "row")

    assert built.keys_of(built.rows(built.keys)).equals(built.keys)
    np.testing.assert_array_equal(built.rows(built.keys_of(np.arange(num_keys))), np.arange(num_keys))
    mixed = [*others, *keys]
    expected = [rows.get(key, absent) for key in mixed]
    assert built.rows(mixed).tolist() == expected
    assert [built.row(key) for key in mixed] == expected
    if type(others[0]) is type(keys[0]):
        assert built.rows(arrow(mixed)).tolist() == expected
        assert built.rows(arrow(mixed).dictionary_encode()).tolist() == expected


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_many_keys_grow_every_buffer(kind: str) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(-(2**63), 2**63 - 1, 20_000)
    drawn = ids[rng.integers(0, 20_000, 60_000)]
    chunks = [pa.array(part).cast(kind) for part in np.array_split(drawn, 7)]
    built = Vocabulary.build(chunks)
    counts = Counter(key for chunk in chunks for key in chunk.to_pylist())
    assert dict(zip(built.keys.to_pylist(), built.counts.tolist(), strict=True)) == counts
    np.testing.assert_array_equal(built.rows(built.keys), np.arange(len(counts)))
    assert (built.rows(pa.array(rng.integers(0, 10**6, 1000)).cast(kind)) == -1).all()


def test_one_long_key_grows_the_bytes_at_once() -> None:
    long = "long" * 100_000
    built = vocabulary(["short", long, long])
    assert built.keys.to_pylist() == [long, "short"]
    assert built.row(long) == 0


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_keys_of_one_slot_are_told_apart(kind: str) -> None:
    """Keys that collide in the table's first slots, and absent keys beside them: probing must pass over them."""
    candidates = pa.array(np.arange(50_000)).cast(kind)
    same = candidates.filter(pa.array(stable_hash(candidates) % np.uint64(64) == 63))  # wraps round the table's end
    present, absent = same.slice(0, 40), same.slice(40)
    built = Vocabulary.build([present])
    assert sorted(built.rows(present)) == list(range(40))
    assert built.keys_of(built.rows(present)).equals(key_array(present))
    assert len(absent) > 100
    assert (built.rows(absent) == -1).all()


@pytest.mark.parametrize("kind", ["int64", "string"])
def test_keys_are_compared_whole_not_by_hash(kind: str) -> None:
    """Two keys of one length whose hashes agree in the 24 bits a slot keeps, and in the slot they want."""
    candidates = pa.array(np.arange(100_000, 200_000)).cast(kind)
    hashes = stable_hash(candidates)
    seen = hashes >> np.uint64(40) << np.uint64(1) | hashes & np.uint64(1)
    order = np.argsort(seen)
    twins = np.flatnonzero(np.diff(seen[order]) == 0)
    assert len(twins) > 10
    for place in twins[:10]:
        pair = candidates.take(pa.array(order[place : place + 2]))
        one = Vocabulary.build([pair.slice(0, 1)])
        assert one.rows(pair).tolist() == [0, -1]
        assert one.row(pair[1].as_py()) == -1
        both = Vocabulary.build([pair, pair])
        assert both.counts.tolist() == [2, 2]
        assert sorted(both.rows(pair).tolist()) == [0, 1]


def test_unknown_keys() -> None:
    skip, row = vocabulary([7, 7, 8]), vocabulary([7, 7, 8], unknown="row")
    strange = [9, None, "7", 7.0, True, 2**63, -(2**63) - 1, b"7", [7]]
    assert skip.rows(strange).tolist() == [-1] * len(strange)
    assert row.rows(strange).tolist() == [2] * len(strange)
    assert row.rows([7, 2**64]).tolist() == [0, 2]
    assert row.row(np.int64(8)) == 1
    assert row.rows(pa.array([8, None])).tolist() == [1, 2]
    assert row.rows(pa.array([8, None, 9]).dictionary_encode()).tolist() == [1, 2, 2]
    assert row.keys_of(np.array([2, 0])).to_pylist() == [None, 7]
    text = vocabulary(["7"])
    assert text.rows(["7", 7, "\ud800", None]).tolist() == [0, -1, -1, -1]
    assert text.rows([]).tolist() == text.rows(pa.array([], pa.string())).tolist() == []


def test_layouts_of_a_batch() -> None:
    numbers, text = vocabulary([5, 6]), vocabulary(["a", "b"])
    assert numbers.rows(np.array([6, 5, 4], dtype=np.int32)).tolist() == [1, 0, -1]
    assert numbers.rows(np.arange(10)[::-1][3:]).tolist() == [1, 0, -1, -1, -1, -1, -1]
    assert numbers.rows(pa.array([0, 6, 5]).slice(1)).tolist() == [1, 0]
    assert numbers.rows(pa.chunked_array([[6], [5]])).tolist() == [1, 0]
    assert text.rows(np.array(["b", "c"])).tolist() == [1, -1]
    assert text.rows(pa.array(["x", "b", "a"]).slice(1)).tolist() == [1, 0]
    with pytest.raises(DataError, match=r"these keys are large_string, those of the vocabulary int64"):
        numbers.rows(pa.array(["5"]))
    with pytest.raises(DataError, match="double"):
        numbers.rows(np.array([5.0]))


def test_rows_out_of_range_have_no_key() -> None:
    built = vocabulary(["a", "b"])
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"row {wrong} is not one of the vocabulary's 2 rows"):
            built.keys_of(np.array([0, wrong]))
    assert built.keys_of([]).to_pylist() == []


def test_bad_input_says_what_is_wrong() -> None:
    with pytest.raises(DataError, match=r"occurs min_count = 3 times \(the most frequent occurs 2 times\)"):
        vocabulary([1, 1, 2], min_count=3)
    with pytest.raises(DataError, match="the data is empty"):
        Vocabulary.build([])
    with pytest.raises(DataError, match="the data is empty"):
        Vocabulary.build([pa.array([], pa.int64())])
    with pytest.raises(DataError, match="null"):
        Vocabulary.build([pa.array([1, None])])
    with pytest.raises(DataError, match="int64 at first and large_string later"):
        Vocabulary.build([pa.array([1]), pa.array(["1"])])
    with pytest.raises(DataError, match="integers or strings"):
        Vocabulary.build([pa.array([1.5])])
    with pytest.raises(SettingError, match=r"keys\.min_count"):
        vocabulary([1], min_count=0)
    with pytest.raises(SettingError, match=r"keys\.unknown"):
        vocabulary([1], unknown="hash")
    with pytest.raises(DataError, match="key 4 is there twice"):
        Vocabulary(pa.array([4, 4]), np.array([1, 1]))
    with pytest.raises(DataError, match="not ordered"):
        Vocabulary(pa.array([4, 5]), np.array([1, 2]))
    with pytest.raises(DataError, match="2 keys have 1 counts"):
        Vocabulary(pa.array([4, 5]), np.array([1]))


@pytest.mark.parametrize("keys", [[3, -(2**63), 3, 2**63 - 1], ["", "é", "", "🚲" * 50]])
@pytest.mark.parametrize("unknown", ["skip", "row"])
def test_a_file_gives_the_same_vocabulary(tmp_path: Path, keys: list[Any], unknown: Any) -> None:
    built = vocabulary([*keys, *keys], min_count=2, unknown=unknown)
    built.save(tmp_path / "one.arrow")
    Vocabulary.build([arrow(keys), arrow(keys)], min_count=2, unknown=unknown).save(tmp_path / "two.arrow")
    assert (tmp_path / "one.arrow").read_bytes() == (tmp_path / "two.arrow").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.arrow", "two.arrow"]

    loaded = Vocabulary.load(tmp_path / "one.arrow")
    (tmp_path / "one.arrow").unlink()  # the mapping outlives the name
    assert loaded.keys.equals(built.keys)
    assert loaded.counts.tolist() == built.counts.tolist()
    assert (loaded.unknown, loaded.num_rows, loaded.dropped) == (built.unknown, built.num_rows, built.dropped)
    assert loaded.fingerprint == built.fingerprint
    assert loaded.rows(keys).tolist() == built.rows(keys).tolist()


def test_the_fingerprint_sees_every_part() -> None:
    variants = [
        vocabulary([1, 1, 2]),
        vocabulary([1, 2]),
        vocabulary([1, 1, 3]),
        vocabulary([1, 1, 2], unknown="row"),
        vocabulary([1, 1, 2, 2, 3], min_count=2),
        vocabulary([1, 1, 2, 2]),
        vocabulary(["1", "1", "2"]),
        vocabulary(["12", "", ""]),
        vocabulary(["1", "2", "", ""]),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_a_file_is_mapped_not_read(tmp_path: Path) -> None:
    vocabulary(list(range(10_000))).save(tmp_path / "keys.arrow")
    before = pa.total_allocated_bytes()
    loaded = Vocabulary.load(tmp_path / "keys.arrow")
    assert pa.total_allocated_bytes() - before < 8 * 10_000
    assert loaded.keys[9_999].as_py() == 9_999


def test_foreign_files_are_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "keys.arrow"
    with pytest.raises(ArtifactError, match=r"keys\.arrow: there is no such file"):
        Vocabulary.load(path)
    for content in (b"", b"not arrow", b"PAR1" * 100):
        path.write_bytes(content)
        with pytest.raises(ArtifactError, match=r"keys\.arrow: is not a readable vocabulary"):
            Vocabulary.load(path)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, pa.schema({"keys": pa.int64()})) as writer:
        writer.write_batch(pa.record_batch({"keys": [1]}))
    with pytest.raises(ArtifactError, match=r"keys\.arrow: is not a lexshard vocabulary"):
        Vocabulary.load(path)
    with pytest.raises(ArtifactError, match="readable vocabulary"):
        Vocabulary.load(tmp_path)


def test_every_truncation_and_flipped_bit_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "keys.arrow"
    built = vocabulary(["a", "bb", "bb", "ccc"], unknown="row")
    built.save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"keys\.arrow"):
            Vocabulary.load(path)
    for place in range(len(whole)):  # padding and redundant copies of the schema may differ; the contents may not
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << place % 8)]) + whole[place + 1 :])
        try:
            loaded = Vocabulary.load(path)
        except ArtifactError as error:
            assert "keys.arrow" in str(error)  # noqa: PT017 (either outcome is right)
        else:
            assert (loaded.fingerprint, loaded.num_rows) == (built.fingerprint, 4)


def test_threads_share_a_vocabulary() -> None:
    ids = np.random.default_rng(0).permutation(50_000)
    built = vocabulary(ids.tolist())
    wrong: list[int] = []

    def look() -> None:
        for _ in range(5):
            if (built.rows(ids) != ids).any():  # all counts are 1, so rows are in key order
                wrong.append(1)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@fixed
@given(st.permutations(list(range(30))))
def test_the_order_of_the_data_does_not_matter(keys: list[int]) -> None:
    assert vocabulary(keys).keys.to_pylist() == list(range(30))


@pytest.mark.parametrize("unknown", ["skip", "row"])
def test_unseen_keys_come_behind_the_others(unknown: Any) -> None:
    seen = Vocabulary.build([pa.array(["b", "b", "z", "a", "a", "a"])], unknown=unknown, min_count=2)
    both = seen.with_unseen(pa.array(["y", "a", "c", "y"]))
    assert both.keys.to_pylist() == ["a", "b", "c", "y"]
    assert both.counts.tolist() == [3, 2, 0, 0]
    assert (both.num_seen, both.dropped, both.unknown) == (2, 1, unknown)
    assert seen.with_unseen(pa.array(["a", "b"])).fingerprint == seen.fingerprint
    with pytest.raises(DataError, match="these keys are int64, those of the vocabulary large_string"):
        seen.with_unseen(pa.array([1]))
