"""The map in an artifact: it comes back as it was drawn, and nothing else is taken for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from cluster.errors import ArtifactError
from embedding_service.artifact import Artifact
from embedding_service.catalogue_map import CLUSTER, CatalogueMap, attribute
from embedding_service.keys import Vocabulary
from tests.embedding_service.artifacts import NUM_ITEMS, TOWNS, publish


@pytest.fixture(scope="module")
def version(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return publish(tmp_path_factory.mktemp("map"), with_map=True, unknown="row")


def test_an_artifact_has_the_map_of_its_items(version: Path) -> None:
    artifact = Artifact.open(version)
    drawn = artifact.map()
    assert drawn is not None
    assert "map.safetensors" in artifact.manifest["files"]
    assert drawn.rows == NUM_ITEMS  # not the unknown row
    assert list(drawn.layouts) == ["pca"]
    assert list(drawn.colours) == [CLUSTER, "town"]
    assert drawn.labels == {"town": TOWNS}
    assert drawn.colours["town"].tolist() == [row % 3 for row in range(NUM_ITEMS)]
    same = drawn.colours[CLUSTER].reshape(-1, 20)  # rows i and i + 20 are of one planted group
    assert (same == same[0]).mean() > 0.95


def test_head(version: Path) -> None:
    drawn = Artifact.open(version).map()
    assert drawn is not None
    head = drawn.head(7)
    assert head.rows == 7
    np.testing.assert_array_equal(head.layouts["pca"], drawn.layouts["pca"][:7])
    assert len(head.colours["town"]) == 7


def test_a_version_of_earlier_times_has_none(version: Path, tmp_path: Path) -> None:
    older = publish(tmp_path)
    manifest = json.loads((older / "manifest.json").read_text())
    del manifest["map"]
    (older / "manifest.json").write_text(json.dumps(manifest))
    assert Artifact.open(older).map() is None


def _tensors(**changed: Any) -> dict[str, Any]:
    tensors = {"layout.pca": np.zeros((4, 2), np.float32), "colour.k-means": np.zeros(4, np.uint8)}
    tensors["colour.town"] = np.array([0, 1, 2, 0], np.uint8)
    return {name: value for name, value in (tensors | changed).items() if value is not None}


@pytest.mark.parametrize(
    ("tensors", "labels", "problem"),
    [
        (_tensors(**{"layout.pca": None}), TOWNS, "is not the map"),
        (_tensors(**{"layout.more": np.zeros((4, 2), np.float32)}), TOWNS, "is not the map"),
        (_tensors(**{"layout.pca": np.zeros((5, 2), np.float32)}), TOWNS, "is not the map"),
        (_tensors(**{"layout.pca": np.zeros((4, 2), np.float64)}), TOWNS, "float64"),
        (_tensors(**{"layout.pca": np.full((4, 2), np.nan, np.float32)}), TOWNS, "finite"),
        (_tensors(**{"colour.town": np.zeros(4, np.int64)}), TOWNS, "uint8 below 3"),
        (_tensors(**{"colour.town": np.full(4, 3, np.uint8)}), TOWNS, "uint8 below 3"),
        (_tensors(**{"colour.k-means": np.full(4, 12, np.uint8)}), TOWNS, "uint8 below 12"),
        (_tensors(), "Lisboa", "not a list of strings"),
        (_tensors(), [1, 2, 3], "not a list of strings"),
    ],
)
def test_what_is_no_such_map_is_refused(tmp_path: Path, tensors: Any, labels: Any, problem: str) -> None:
    file = tmp_path / "map.safetensors"
    save_file(tensors, file, {"labels": json.dumps({"town": labels})})
    with pytest.raises(ArtifactError, match=problem) as raised:
        CatalogueMap.load(file, rows=4, layouts=["pca"], colours=[CLUSTER, "town"])
    assert str(file) in str(raised.value)


@pytest.mark.parametrize("text", [b"", b"\xff" * 100, b"\x10\0\0\0\0\0\0\0[]"])
def test_damaged_files_are_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "map.safetensors").write_bytes(text)
    with pytest.raises(ArtifactError, match="is not the map"):
        CatalogueMap.load(tmp_path / "map.safetensors", rows=4, layouts=["pca"], colours=[CLUSTER])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"rows": 10**6}, "do not fit"),
        ({"rows": 2**21}, "map.rows"),
        ({"vectors": "nothing"}, "do not fit"),
        ({"layouts": []}, "map.layouts"),
        ({"layouts": ["tsne"]}, "map.layouts"),
        ({"file": "../map"}, "map.file"),
        ({"file": "other"}, "is not among the listed files"),
    ],
)
def test_a_manifest_that_misfits_is_refused(tmp_path: Path, change: dict[str, Any], problem: str) -> None:
    version = publish(tmp_path, with_map=True, factory="Flat")
    manifest = json.loads((version / "manifest.json").read_text())
    manifest["map"] |= change
    (version / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match=problem):
        Artifact.open(version)


def test_frequent_values_of_an_attribute_have_codes_of_their_own() -> None:
    keys = Vocabulary(pa.array(range(100, 120)), np.arange(20, 0, -1))
    codes, labels = attribute(np.array([0, 10, 11, 19, -1]), keys)
    assert codes.tolist() == [0, 10, 11, 11, 11]
    assert labels == [str(key) for key in range(100, 111)] + ["other or none"]
