"""Artifacts: what is written is read, a version appears whole or not at all, damaged and hostile ones are refused."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cluster.errors import ArtifactError
from cluster.storage import checksum
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.quantize import PRECISIONS, Precision, error_bound
from embedding_service.towers import Tower, TowerInput, TowerSpec
from tests.embedding_service.artifacts import DIM, HISTORY, publish, vocabulary

SMALL = 60


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One int8 version with hidden layers in its tower, read only."""
    spec = TowerSpec((HISTORY, TowerInput("user", "user", "user", DIM)), DIM, hidden=(8,))
    return publish(tmp_path_factory.mktemp("root"), version="v1", spec=spec, precision="int8", num_items=SMALL)


@pytest.fixture
def version(published: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(published.parent, tmp_path / "root")
    return tmp_path / "root" / "v1"


def _edit(version: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((version / "manifest.json").read_text())
    change(manifest)
    (version / "manifest.json").write_text(json.dumps(manifest))


def _replace(version: Path, name: str, data: bytes) -> None:
    """Replace a file and make the manifest's size and checksum agree: what a hostile author would do."""
    (version / name).write_bytes(data)
    entry = {"bytes": len(data), "sha256": checksum(version / name).removeprefix("sha256:")}
    _edit(version, lambda manifest: manifest["files"].__setitem__(name, entry))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_written_is_read(tmp_path: Path, precision: Precision) -> None:
    values = np.random.default_rng(0).normal(size=(100, 12)).astype(np.float32)
    keys = vocabulary([f"k{i}" for i in range(99)], unknown="row")
    spec = TowerSpec((TowerInput("history", "history", "v", 12, 0.5),), 12, hidden=(5,))
    tower = Tower(spec)
    with ArtifactWriter(tmp_path, name="shop") as writer:
        writer.add_keys("item", keys)
        sink = writer.add_vectors("v", rows=100, dim=12, keys="item", precision=precision)
        sink.write(64, values[64:])  # any order
        sink.write(0, values[:64])
        writer.set_query_tower(spec, tower.state_dict())
        record = writer.add_index("near", vectors="v", metric="cosine", recall_target=0.9, recall_k=5)
        folder = writer.publish(lineage={"run": "r"}, figures={"recall@20": 0.25})

    artifact = Artifact.open(tmp_path)
    assert artifact.path == folder
    assert artifact.version == folder.name
    assert (artifact.manifest["name"], artifact.manifest["lineage"]) == ("shop", {"run": "r"})
    assert artifact.manifest["created"].endswith("+00:00")
    assert artifact.manifest["indexes"]["near"] == record
    assert artifact.keys("item").keys.equals(keys.keys)
    stored = artifact.vectors("v")
    assert (stored.rows, stored.dim, stored.precision) == (100, 12, precision)
    whole = stored.take(np.arange(100))
    assert (np.abs(whole - values) <= error_bound(values, precision) + 1e-7).all()
    chunks = list(stored.chunks(33))
    assert [start for start, _ in chunks] == [0, 33, 66, 99]
    np.testing.assert_array_equal(np.concatenate([chunk for _, chunk in chunks]), whole)
    np.testing.assert_array_equal(stored.take(np.array([[3, 99], [0, 3]])), whole[[[3, 99], [0, 3]]])
    block = {"history": torch.randn(4, 12)}
    assert torch.equal(artifact.query_tower()(block), tower(block))
    index = artifact.index("near")
    assert (index.rows, index.dim) == (99, 12), "the unknown row is not a candidate"
    assert {entry.name for entry in tmp_path.iterdir()} == {"CURRENT", folder.name}


def test_manifest_lists_every_file_with_its_checksum(published: Path) -> None:
    manifest = json.loads((published / "manifest.json").read_text())
    on_disk = {file.relative_to(published).as_posix() for file in published.rglob("*") if file.is_file()}
    assert set(manifest["files"]) == on_disk - {"manifest.json"}
    for name, entry in manifest["files"].items():
        assert checksum(published / name) == f"sha256:{entry['sha256']}"
        assert (published / name).stat().st_size == entry["bytes"]
    assert not any(file.suffix in (".pkl", ".pt", ".pickle") for file in published.rglob("*"))


def test_versions_sort_by_time_and_are_never_overwritten(tmp_path: Path) -> None:
    paths = [publish(tmp_path, num_items=SMALL) for _ in range(3)]
    assert len(set(paths)) == 3
    assert sorted(paths) == paths
    assert Artifact.open(tmp_path).version == paths[-1].name
    publish(tmp_path, version="mine", num_items=SMALL)
    with pytest.raises(ArtifactError, match="mine: this version exists; versions are never overwritten"):
        publish(tmp_path, version="mine", num_items=SMALL)
    assert Artifact.open(tmp_path).version == "mine"
    assert not list(tmp_path.glob(".*"))


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    publish(tmp_path, version="good", num_items=SMALL)
    with contextlib.suppress(ZeroDivisionError), ArtifactWriter(tmp_path) as writer:
        writer.add_keys("item", vocabulary(["a"]))
        raise ZeroDivisionError
    assert {entry.name for entry in tmp_path.iterdir()} == {"CURRENT", "good"}


def test_a_killed_writer_leaves_a_folder_that_the_next_one_clears(tmp_path: Path) -> None:
    publish(tmp_path, version="good", num_items=SMALL)
    code = (
        "import os, signal, sys; from embedding_service.artifact_writer import ArtifactWriter\n"
        "writer = ArtifactWriter(sys.argv[1]); (writer.folder / 'vectors' / 'x.npy').write_bytes(b'half')\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, check=False, capture_output=True)
    assert killed.returncode == -9, killed.stderr
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    assert Artifact.open(tmp_path).version == "good"
    with ArtifactWriter(tmp_path) as first:
        assert list(tmp_path.glob(".tmp-*")) == [first.folder]
        with ArtifactWriter(tmp_path) as second:  # a living writer's folder stays
            assert set(tmp_path.glob(".tmp-*")) == {first.folder, second.folder}
    assert not list(tmp_path.glob(".*"))


def test_incomplete_and_repeated_rows_are_refused(tmp_path: Path) -> None:
    ones = np.ones((10, 3), np.float32)
    cases = [
        ([(0, 4), (6, 4)], "row 4 was never written"),
        ([(0, 4)], "row 4 was never written"),
        ([(0, 6), (4, 6)], "row 4 was written twice"),
    ]
    for writes, message in cases:
        with ArtifactWriter(tmp_path) as writer:
            writer.add_keys("item", vocabulary([f"k{i}" for i in range(10)]))
            sink = writer.add_vectors("v", rows=10, dim=3, keys="item", precision="fp16")
            for start, num in writes:
                sink.write(start, ones[:num])
            with pytest.raises(ArtifactError, match=f"vector set v: {message}"):
                writer.publish(lineage={}, figures={})
    assert list(tmp_path.iterdir()) == []


def test_a_sink_refuses_what_does_not_belong(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path) as writer:
        writer.add_keys("item", vocabulary(["a", "b", "c"]))
        sink = writer.add_vectors("v", rows=3, dim=2, keys="item", precision="fp16", normalized=True)
        with pytest.raises(ValueError, match=r"vector set v: wants \[n, 2\]; got \[1, 3\]"):
            sink.write(0, np.ones((1, 3), np.float32))
        with pytest.raises(ValueError, match=r"rows 2\.\.3 are not all in 0\.\.2"):
            sink.write(2, np.ones((2, 2), np.float32))
        with pytest.raises(ArtifactError, match="from row 1 on: row 0 holds nan"):
            sink.write(1, np.array([[np.nan, 0]], np.float32))
        with pytest.raises(ValueError, match="row 2 has length 2, not 1"):
            sink.write(1, np.array([[0, 1], [0, 2]], np.float32))
        sink.write(0, np.array([[0, 1], [0, 0], [0.6, 0.8]], np.float32))
        sink.close()


def test_parts_must_fit_each_other(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path) as writer:
        writer.add_keys("item", vocabulary(["a", "b"]))
        with pytest.raises(ArtifactError, match="add key map 'user' first"):
            writer.add_vectors("v", rows=2, dim=2, keys="user", precision="fp32")
        with pytest.raises(ArtifactError, match="4 rows do not fit the 2 keys of 'item'"):
            writer.add_vectors("v", rows=4, dim=2, keys="item", precision="fp32")
        with pytest.raises(ArtifactError, match="'item' was added before"):
            writer.add_keys("item", vocabulary(["a"]))
        with pytest.raises(ArtifactError, match=r"name '\.\./x'"):
            writer.add_keys("../x", vocabulary(["a"]))
        with pytest.raises(ArtifactError, match="add vector set 'v' first"):
            writer.add_index("i", vectors="v", metric="ip", recall_target=0.9, recall_k=1)
        spec = TowerSpec((TowerInput("history", "history", "missing", 2),), 2)
        writer.set_query_tower(spec, {})
        with pytest.raises(ArtifactError, match="input 'history' needs a vector set 'missing'"):
            writer.publish(lineage={}, figures={})
    with pytest.raises(ArtifactError, match=r"version name '\.\./\.\./etc'"):
        ArtifactWriter(tmp_path, "../../etc")
    with pytest.raises(ArtifactError, match="are written to a local folder"):
        ArtifactWriter("s3://bucket/artifacts")


# --- opening what is damaged, foreign or hostile ---------------------------------------------------------------------


def test_missing_places_are_named(tmp_path: Path, version: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere: there is no such artifact folder"):
        Artifact.open(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"manifest\.json: is missing: .* is not an artifact version"):
        Artifact.open(tmp_path)
    for text in ('{"version": "v2"}', '{"version": "../../etc"}', '{"version": 3}', "{}", "v1", ""):
        (version.parent / "CURRENT").write_text(text)
        with pytest.raises(ArtifactError, match="CURRENT: "):
            Artifact.open(version.parent)
    assert Artifact.open(version).version == "v1"
    artifact = Artifact.open(version)
    for ask in (artifact.keys, artifact.vectors, artifact.index):
        with pytest.raises(ArtifactError, match="'nothing'; it has: "):
            ask("nothing")


_FILES = [
    "keys/item.arrow", "vectors/item.npy", "vectors/item.scale.npy", "indexes/recommend.faiss",
    "indexes/recommend.faiss.json", "query_tower.safetensors",
]  # fmt: skip


@pytest.mark.parametrize("name", _FILES)
def test_every_flipped_bit_cut_and_loss_is_refused_by_name(version: Path, name: str) -> None:
    file = version / name
    good = file.read_bytes()
    for damaged, reason in (
        (good[:-1], "bytes, the manifest says"),
        (good + b"x", "bytes, the manifest says"),
        (good[: len(good) // 2] + bytes([good[len(good) // 2] ^ 1]) + good[len(good) // 2 + 1 :], "is damaged"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=reason) as info:
            Artifact.open(version)
        assert name in str(info.value)
    file.unlink()
    with pytest.raises(ArtifactError, match="is missing, though the manifest lists it"):
        Artifact.open(version)
    file.write_bytes(good)
    Artifact.open(version)


def test_links_are_refused(version: Path, tmp_path: Path) -> None:
    file = version / "vectors" / "item.npy"
    outside = tmp_path / "outside.npy"
    shutil.copy(file, outside)
    file.unlink()
    file.symlink_to(outside)
    with pytest.raises(ArtifactError, match=r"vectors/item\.npy: is a link"):
        Artifact.open(version, verify=False)
    file.unlink()
    shutil.copy(outside, file)
    shutil.move(version / "vectors", tmp_path / "moved")
    (version / "vectors").symlink_to(tmp_path / "moved")
    with pytest.raises(ArtifactError, match="is a link, or below one"):
        Artifact.open(version, verify=False)
    (version.parent / "v2").symlink_to(version)
    (version.parent / "CURRENT").write_text('{"version": "v2"}')
    with pytest.raises(ArtifactError, match="names version v2, which is not there"):
        Artifact.open(version.parent)


def _set(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        node: Any = manifest
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to

    return change


_EXTRA_FILE = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_set("format", to="other"), "format"),
        (_set("format_version", to=2), "format_version"),
        (_set("surprise", to=1), "surprise"),
        (lambda m: m.pop("files"), "files"),
        (_set("version", to="../v1"), "version"),
        (_set("files", "../../etc/passwd", to=_EXTRA_FILE), "etc/passwd"),
        (_set("files", "/etc/passwd", to=_EXTRA_FILE), "/etc/passwd"),
        (_set("files", "vectors/../item.npy", to=_EXTRA_FILE), "vectors/../item"),
        (_set("files", "keys/item.arrow", "bytes", to=-1), "bytes"),
        (_set("files", "keys/item.arrow", "bytes", to="12"), "bytes"),
        (_set("files", "keys/item.arrow", "sha256", to="abc"), "sha256"),
        (_set("vectors", "item", "file", to="../other.npy"), "vectors.item.file"),
        (_set("vectors", "item", "file", to="vectors/absent.npy"), "is not among the listed files"),
        (_set("vectors", "item", "dim", to=10**9), "vectors.item.dim"),
        (_set("vectors", "item", "dim", to=17), "does not fit"),
        (_set("vectors", "item", "rows", to=2**60), "vectors.item.rows"),
        (_set("vectors", "item", "rows", to=2**39), "key map 'item' has 60 keys"),
        (_set("vectors", "item", "rows", to=61), r"the manifest says int8 \[61, 16\]"),
        (_set("vectors", "item", "precision", to="fp64"), "vectors.item.precision"),
        (_set("vectors", "item", "precision", to="fp16"), "int8 vectors have a scale file"),
        (_set("vectors", "item", "scale_file", to=None), "int8 vectors have a scale file"),
        (_set("vectors", "item", "keys", to="nobody"), "there is no key map 'nobody'"),
        (_set("indexes", "recommend", "vectors", to="nothing"), "there is no vector set 'nothing'"),
        (_set("indexes", "recommend", "rows", to=59), "does not fit vector set 'item'"),
        (_set("indexes", "recommend", "metric", to="l7"), "indexes.recommend.metric"),
        (_set("indexes", "recommend", "recall", "value", to=1.5), "indexes.recommend.recall.value"),
        (_set("query_tower", "spec", "inputs", to=[]), "widths"),
        (_set("query_tower", "spec", "inputs", 0, "vectors", to="gone"), "needs a vector set 'gone'"),
        (_set("query_tower", "spec", "inputs", 0, "dim", to=99), "has width 99"),
        (_set("query_tower", "spec", "inputs", 0, "decay", to=-3), "decay -3"),
        (_set("query_tower", "spec", "hidden", to=[10**12]), "widths"),
        (_set("query_tower", "spec", "inputs", 0, "encoder", to="magic"), "encoder 'magic', which does not fit"),
        (_set("query_tower", "spec", "inputs", 0, "encoder", to=["gru"]), "which does not fit 'history'"),
        (_set("query_tower", "spec", "inputs", 0, "encoder", to="sum"), "'sum', which does not fit 'history'"),
        (_set("query_tower", "spec", "inputs", 0, "encoder", to="gru"), "widths"),  # of length 0
        (_set("query_tower", "spec", "inputs", 0, "center", to=1e999), "not both finite numbers"),
        (_set("query_tower", "spec", "evil", to=1), "not a tower description"),
    ],
)  # fmt: skip
def test_absurd_manifests_are_refused_with_the_field(version: Path, change: Any, reason: str) -> None:
    _edit(version, change)
    with pytest.raises(ArtifactError, match=reason) as info:
        Artifact.open(version, verify=False)
    assert str(version) in str(info.value) or "query tower" in str(info.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"\xff\xfe", b"{", b'{"format": "lexshard.artifact"}', b"[" * 100_000])
def test_files_that_are_no_manifest_are_refused(version: Path, text: bytes) -> None:
    (version / "manifest.json").write_bytes(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json: "):
        Artifact.open(version)


def _npy(array: np.ndarray, *, allow_pickle: bool = False) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=allow_pickle)
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_npy(np.array([os.system], dtype=object), allow_pickle=True), "holds object"),
        (_npy(np.zeros((60, 16), np.float32)), r"holds float32 \[60, 16\], the manifest says int8 \[60, 16\]"),
        (_npy(np.zeros((60, 15), np.int8)), r"holds int8 \[60, 15\]"),
        (_npy(np.asfortranarray(np.zeros((60, 16), np.int8))), "holds int8"),
        (_npy(np.zeros((60, 16), np.int8))[:-5], "which is not its header"),
        (b"not an array", "is not an .npy file"),
        (b"\x93NUMPY\x01\x00\xff\xff{'descr': __import__('os')}", "is not an .npy file"),
    ],
)
def test_hostile_arrays_are_refused_though_checksums_agree(version: Path, data: bytes, reason: str) -> None:
    _replace(version, "vectors/item.npy", data)
    with pytest.raises(ArtifactError, match=reason) as info:
        Artifact.open(version)
    assert "vectors/item.npy" in str(info.value)


def test_parts_that_belong_to_another_artifact_are_refused(version: Path, tmp_path: Path) -> None:
    other = publish(tmp_path / "other", num_items=SMALL + 4, spec=TowerSpec((HISTORY,), DIM, hidden=(9,)))
    _replace(version, "keys/item.arrow", (other / "keys/item.arrow").read_bytes())
    for file in ("indexes/recommend.faiss", "indexes/recommend.faiss.json"):
        _replace(version, file, (other / file).read_bytes())
    _replace(version, "query_tower.safetensors", (other / "query_tower.safetensors").read_bytes())
    artifact = Artifact.open(version)
    with pytest.raises(ArtifactError, match=r"keys/item\.arrow: holds \(64, "):
        artifact.keys("item")
    with pytest.raises(ArtifactError, match=r"indexes/recommend\.faiss: says it has 64 vectors"):
        artifact.index("recommend")
    with pytest.raises(ArtifactError, match=r"query_tower\.safetensors: does not fit"):
        artifact.query_tower()
    _replace(version, "query_tower.safetensors", b"\xff" * 64)
    with pytest.raises(ArtifactError, match=r"query_tower\.safetensors: does not fit"):
        Artifact.open(version).query_tower()
