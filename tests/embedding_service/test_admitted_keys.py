"""Keys that had rows at export: theirs, the shared one for others, from every form of a key and from the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ArtifactError
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.hashed_keys import HashedKeys

IDS = np.sort(HashedKeys("string").rows(["a", "b", "c"]))
KEYS = AdmittedKeys("string", IDS)


def test_rows_of_keys() -> None:
    known = KEYS.rows(pa.array(["a", "b", "c"]))
    assert sorted(known.tolist()) == [0, 1, 2]
    assert KEYS.ids[known].tolist() == HashedKeys("string").rows(["a", "b", "c"]).tolist()
    assert KEYS.rows(["a", "z", None, 7]).tolist() == [known[0], 3, -1, -1]
    assert [KEYS.row(key) for key in ("a", "z", None)] == [known[0], 3, -1]
    assert (KEYS.num_keys, KEYS.num_rows) == (3, 4)


def test_files(tmp_path: Path) -> None:
    KEYS.save(tmp_path / "user.arrow")
    loaded = AdmittedKeys.load(tmp_path / "user.arrow")
    assert loaded.ids.tolist() == IDS.tolist()
    assert loaded.key_type == "string"
    (tmp_path / "user.arrow").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match=r"user\.arrow: does not say which keys have rows"):
        AdmittedKeys.load(tmp_path / "user.arrow")
    with pytest.raises(ArtifactError, match=r"none\.arrow"):
        AdmittedKeys.load(tmp_path / "none.arrow")
    with pytest.raises(ValueError, match="ascending"):
        AdmittedKeys("int64", IDS[::-1])
