"""Keys without a vocabulary: ids that never change, the same from a file's column and from a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ArtifactError, DataError
from embedding_service.hashed_keys import NUM_IDS, HashedKeys

INTEGERS, STRINGS = HashedKeys("int64"), HashedKeys("string")


def test_ids_never_change() -> None:
    assert INTEGERS.rows(np.array([0, 1, -1])).tolist() == [
        0xE220A8397B1DCDAF >> 2,
        0x910A2DEC89025CC1 >> 2,
        0xE4D971771B652C20 >> 2,
    ]
    assert STRINGS.row("a") == 0xD24EC4F1A98C6E5B >> 2  # XXH64's published value for "a"


@pytest.mark.parametrize(("keys", "values"), [(INTEGERS, [3, 5, 3, 2**63 - 1]), (STRINGS, ["x", "", "x", "ü"])])
def test_every_form_of_a_key_has_its_id(keys: HashedKeys, values: list[Any]) -> None:
    column = pa.array(values)
    ids = keys.rows(column)
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < NUM_IDS
    assert ids[0] == ids[2] != ids[1]
    assert keys.rows(values).tolist() == [keys.row(value) for value in values] == ids.tolist()
    assert keys.rows(column.dictionary_encode()).tolist() == ids.tolist()
    assert keys.rows(pa.chunked_array([column, column])).tolist() == ids.tolist() * 2
    nothing = pa.array([values[0], None], column.type)
    assert keys.rows(nothing).tolist() == keys.rows(nothing.dictionary_encode()).tolist() == [ids[0], -1]


def test_what_is_no_key_has_no_id() -> None:
    assert INTEGERS.rows(["7", None, True, 2**63, 1.5]).tolist() == [-1] * 5
    assert STRINGS.rows([7, None, "\ud800"]).tolist() == [-1] * 3
    with pytest.raises(DataError, match="these keys are large_string, those of training int64"):
        INTEGERS.rows(pa.array(["7"]))


def test_files(tmp_path: Path) -> None:
    STRINGS.save(tmp_path / "user.json")
    assert HashedKeys.load(tmp_path / "user.json").key_type == "string"
    (tmp_path / "user.json").write_text('{"format": "lexshard.hashed_keys", "version": 2, "key_type": "string"}')
    with pytest.raises(ArtifactError, match=r"user\.json: does not say how keys are hashed .*version 2"):
        HashedKeys.load(tmp_path / "user.json")
    with pytest.raises(ArtifactError, match=r"none\.json"):
        HashedKeys.load(tmp_path / "none.json")
