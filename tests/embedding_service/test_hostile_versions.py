"""Damaged and hostile versions, offered to a running service as its users would: all refused, the live one unharmed."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cluster.errors import ArtifactError
from cluster.storage import checksum
from embedding_service import activations, admission
from embedding_service.faiss_header import check_index_file
from embedding_service.gates import Gates
from embedding_service.towers import TowerSpec
from tests.embedding_service.artifacts import DIM, HISTORY, publish
from tests.embedding_service.services import LocalService

ROWS = 400
Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound versions `v-live`, `v-Flat`, `v-HNSW16` and `v-IVF8,Flat`, never changed."""
    root = tmp_path_factory.mktemp("originals")
    spec = TowerSpec((HISTORY,), DIM, hidden=(8,))
    torch.manual_seed(0)
    for kind in ("live", "Flat", "HNSW16", "IVF8-Flat"):
        factory = {"live": "Flat", "IVF8-Flat": "IVF8,Flat"}.get(kind, kind)
        publish(root, version=f"v-{kind}", factory=factory, num_items=ROWS, spec=spec)
    return root


@pytest.fixture
def service(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    """Admission in this process, which spares the seconds of a process for each case."""

    def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> Any:
        try:
            return admission.admit(candidate, live, gates)
        except (OSError, ValueError) as error:
            raise ArtifactError(str(error)) from None

    monkeypatch.setattr(activations, "admit_apart", admit_here)
    shutil.copytree(originals / "v-live", tmp_path / "root" / "v-live")
    running = LocalService(tmp_path / "root", "v-live")
    yield running
    running.close()


def edit(*path: str | int, to: Any) -> Damage:
    def damage(folder: Path) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        node: Any = manifest
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = to
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return damage


def replaced(name: str, data: bytes | Callable[[bytes], bytes]) -> Damage:
    """Other bytes, with size and checksum in the manifest to match: what a hostile author would write."""

    def damage(folder: Path) -> None:
        file = folder / name
        file.write_bytes(data if isinstance(data, bytes) else data(file.read_bytes()))
        entry = {"bytes": file.stat().st_size, "sha256": checksum(file).removeprefix("sha256:")}
        edit("files", name, to=entry)(folder)

    return damage


def packed(name: str, place: int, kind: str, value: float) -> Damage:
    """One number of a binary file changed."""

    def change(data: bytes) -> bytes:
        raw = struct.pack(kind, value)
        return data[:place] + raw + data[place + len(raw) :]

    return replaced(name, change)


def array(name: str, change: Callable[[np.ndarray], np.ndarray], *, pickled: bool = False) -> Damage:
    def rewrite(data: bytes) -> bytes:
        out = io.BytesIO()
        np.save(out, change(np.load(io.BytesIO(data))), allow_pickle=pickled)
        return out.getvalue()

    return replaced(name, rewrite)


def with_nan(values: np.ndarray) -> np.ndarray:
    values[7, 3] = np.nan
    return values


def nan_weights(folder: Path) -> None:
    file = folder / "query_tower.safetensors"
    state = {name: torch.full_like(value, float("nan")) for name, value in load_file(file).items()}
    save_file(state, file)
    replaced(file.name, file.read_bytes())(folder)


def link_to_secret(folder: Path) -> None:
    secret = folder.parents[2] / "secret"
    shutil.copy(folder / "vectors/item.npy", secret)
    (folder / "vectors/item.npy").unlink()
    (folder / "vectors/item.npy").symlink_to(secret)


def pipe(folder: Path) -> None:
    (folder / "keys/item.arrow").unlink()
    os.mkfifo(folder / "keys/item.arrow")


def first_neighbours(data: bytes) -> bytes:
    index = faiss.deserialize_index(np.frombuffer(data, np.uint8).copy())
    neighbours = faiss.vector_to_array(index.hnsw.neighbors)
    place = data.index(neighbours[:32].tobytes())
    return data[:place] + struct.pack("<i", 2**30) + data[place + 4 :]


def foreign_rows(data: bytes) -> bytes:
    index = faiss.deserialize_index(np.frombuffer(data, np.uint8).copy())
    ids = faiss.rev_swig_ptr(index.invlists.get_ids(0), index.invlists.list_size(0)).tobytes()
    place = data.index(ids)
    return data[:place] + struct.pack("<q", 10**12) + data[place + 8 :]


FAISS = "indexes/recommend.faiss"
CASES: list[tuple[str, Damage, str]] = [
    # the manifest
    ("Flat", edit("version", to="../../v-live"), "version"),
    ("Flat", edit("version", to="v-live"), "version v-live is here already"),
    ("Flat", edit("files", "../../secret", to={"bytes": 1, "sha256": "0" * 64}), "secret"),
    ("Flat", edit("files", "/etc/passwd", to={"bytes": 1, "sha256": "0" * 64}), "passwd"),
    ("Flat", edit("vectors", "item", "dim", to=10**9), r"vectors\.item\.dim"),
    ("Flat", edit("vectors", "item", "rows", to=2**60), r"vectors\.item\.rows"),
    ("Flat", edit("indexes", "recommend", "parameters", to={"nprobe": 2**60}), "nprobe"),
    ("Flat", edit("query_tower", "spec", "hidden", to=[10**12]), "widths"),
    ("Flat", edit("query_tower", to=None), "needs a query tower"),
    ("Flat", edit("indexes", to={}), "needs a query tower and the indexes"),
    ("Flat", edit("indexes", "similar", "metric", to="ip"), "not what the manifest says"),
    ("Flat", edit("format_version", to=99), "format_version"),
    ("Flat", lambda folder: (folder / "manifest.json").write_bytes(b"[" * 100_000), "manifest.json"),
    ("Flat", lambda folder: (folder / "manifest.json").unlink(), "not an artifact version"),
    ("Flat", lambda folder: os.truncate(folder / "manifest.json", 2**31), "is larger than"),
    # files
    ("Flat", edit("files", "vectors/item.npy", "sha256", to="0" * 64), "is damaged"),
    ("Flat", edit("files", "vectors/item.npy", "bytes", to=7), "the manifest says 7"),
    ("Flat", lambda folder: (folder / "keys/item.arrow").unlink(), "is missing"),
    ("Flat", link_to_secret, "is a link"),
    ("Flat", pipe, "is missing"),
    # keys and vectors
    ("Flat", replaced("keys/item.arrow", b"ARROW1\0\0" + b"\xff" * 500), "not a readable vocabulary"),
    ("Flat", replaced("keys/item.arrow", lambda data: data[: len(data) // 2]), "not a readable vocabulary"),
    ("Flat", array("vectors/item.npy", lambda v: np.array([os.system], object), pickled=True), "holds object"),
    ("Flat", array("vectors/item.npy", lambda v: v[:, :-1]), "the manifest says"),
    ("Flat", replaced("vectors/item.npy", lambda data: data[:-400]), "which is not its header"),
    ("Flat", array("vectors/item.npy", with_nan), "row 7 of vectors 'item' is not finite"),
    ("Flat", edit("vectors", "item", "normalized", to=True), "said to be normalised; row 0 has length"),
    # the query tower
    ("Flat", replaced("query_tower.safetensors", struct.pack("<Q", 2**60) + b"{}"), "does not fit"),
    ("Flat", replaced("query_tower.safetensors", b"\x80\x04\x95" + b"\0" * 99), "does not fit"),
    ("Flat", nan_weights, "answers with nan"),
    # FAISS files
    ("Flat", replaced(FAISS, b"\x80\x04\x95pickle me" * 9), "is no FAISS index"),
    ("Flat", replaced(FAISS, lambda data: data[:30]), "ends in the middle"),
    ("Flat", packed(FAISS, 4, "<i", 2**30), "says it has 400 vectors of 1073741824 components"),
    ("Flat", packed(FAISS, 8, "<q", 2**40), "says it has 1099511627776 vectors"),
    ("Flat", packed(FAISS, 33, "<i", 17), "has metric 17"),
    ("Flat", packed(FAISS, 37, "<q", 2**58), "numbers follow, but has"),
    ("Flat", replaced(f"{FAISS}.json", b'{"metric": "ip"}'), "not an index's settings file"),
    ("HNSW16", replaced(FAISS, first_neighbours), "its graph leads to rows that do not exist"),
    ("HNSW16", replaced(FAISS, lambda data: data[:-64]), "is not a readable FAISS index"),
    ("IVF8-Flat", replaced(FAISS, foreign_rows), "leads to rows that do not exist"),
    # sound, and no better for it
    ("Flat", edit("indexes", "recommend", "recall", "value", to=0.5), "gate ann_recall: 0.5000, limit 0.9"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "damage", "reason"), CASES)
def test_it_is_refused_and_the_live_version_is_unharmed(
    service: LocalService, originals: Path, kind: str, damage: Damage, reason: str
) -> None:
    before = service.ask("GET", "/v1/recommend?items=i0001&items=i0002").json
    offered = service.root / "incoming" / "new"
    shutil.copytree(originals / f"v-{kind}", offered)
    damage(offered)
    reply = service.ask("POST", "/v1/versions", {"source": "incoming/new"})
    if reply.status == 201:
        assert not offered.exists()
        reply = service.ask("POST", "/v1/versions/activate", {"version": reply.json["version"], "wait_seconds": 60})
    else:
        assert offered.exists()
    status, code, message = reply.error
    assert (status, code) == (409, "refused")
    assert_says(message, reason)
    assert service.store.serving() is None
    assert service.versions.now.live.version == "v-live"
    assert service.ask("GET", "/v1/recommend?items=i0001&items=i0002").json == before
    assert [path.name for path in service.root.glob(".tmp-*")] == []


def assert_says(message: str, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        raise ArtifactError(message)


def test_the_sound_ones_are_taken(service: LocalService, originals: Path) -> None:
    """Else the refusals above would say nothing."""
    for kind in ("Flat", "HNSW16", "IVF8-Flat"):
        shutil.copytree(originals / f"v-{kind}", service.root / "incoming" / "new")
        assert service.ask("POST", "/v1/versions", {"source": "incoming/new"}).json == {"version": f"v-{kind}"}
        body = {"version": f"v-{kind}", "wait_seconds": 60}
        reply = service.ask("POST", "/v1/versions/activate", body)
        assert (reply.status, reply.json["state"]) == (200, "live"), reply.json
        assert service.ask("GET", "/v1/health").json["version"] == f"v-{kind}"


@pytest.mark.parametrize("source", ["..", "../v-live", "/etc", "incoming/../../x", "a/b/c/d/e", "", ".serving", "x\0y"])
def test_folders_outside_the_root_are_refused(service: LocalService, source: str) -> None:
    assert service.ask("POST", "/v1/versions", {"source": source}).error[:2] == (409, "refused")


def test_a_folder_that_is_a_link_is_refused(service: LocalService, originals: Path) -> None:
    (service.root / "incoming").symlink_to(originals)
    reply = service.ask("POST", "/v1/versions", {"source": "incoming/v-Flat"})
    assert reply.error[:2] == (409, "refused")
    assert (originals / "v-Flat" / "manifest.json").exists()


def test_force_passes_by_a_gate_and_not_by_damage(service: LocalService, originals: Path) -> None:
    for name, damage in (
        ("weak", edit("indexes", "recommend", "recall", "value", to=0.5)),
        ("hurt", array("vectors/item.npy", with_nan)),
    ):
        folder = service.root / name
        shutil.copytree(originals / "v-Flat", folder)
        edit("version", to=name)(folder)
        damage(folder)
    body = {"wait_seconds": 60, "force": True}
    assert service.ask("POST", "/v1/versions/activate", {"version": "hurt", **body}).status == 409
    reply = service.ask("POST", "/v1/versions/activate", {"version": "weak", **body})
    assert (reply.status, reply.json["forced"]) == (
        200,
        ["gate ann_recall: 0.5000, limit 0.9 (index recommend, as its manifest has it)"],
    )


def test_a_reader_that_crashes_takes_only_its_own_process(originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for a file that FAISS crashes on and that no check here knows."""
    crash = originals.parent / "crash" / "sitecustomize.py"
    crash.parent.mkdir()
    crash.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)\n")
    monkeypatch.setenv("PYTHONPATH", str(crash.parent))
    with pytest.raises(ArtifactError, match="v-Flat: the process that read it ended by signal 11"):
        admission.admit_apart(originals / "v-Flat", None, Gates(), timeout_seconds=60)


def test_the_process_that_reads_has_bounded_memory(originals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An array beyond the bound fails there, where without the bound it would be had."""
    monkeypatch.setattr(admission, "MEMORY_FLOOR_BYTES", 2**28)
    if (child := os.fork()) == 0:
        try:
            admission._bound_memory([originals / "v-Flat"])
            np.empty(2**30, np.uint8)
        except MemoryError:
            os._exit(7)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.parametrize("wrong", ["row below the top", "no row", "no level", "level that has no numbers"])
def test_an_entry_that_the_graph_does_not_have(originals: Path, tmp_path: Path, wrong: str) -> None:
    index = faiss.read_index(str(originals / "v-HNSW16" / FAISS))
    graph = index.hnsw
    levels = faiss.vector_to_array(graph.levels)
    assert levels.min() < levels.max()
    if wrong == "row below the top":
        graph.entry_point = int(np.argmin(levels))
    elif wrong == "no row":
        graph.entry_point = -1
    else:
        num_levels = faiss.vector_to_array(graph.cum_nneighbor_per_level).size - 1
        graph.max_level = -1 if wrong == "no level" else num_levels
    faiss.write_index(index, str(tmp_path / "index"))
    with pytest.raises(ArtifactError, match="its graph is entered at row"):
        check_index_file(tmp_path / "index", rows=ROWS, width=index.d)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8", "HNSW8,SQ8", "HNSW8,PQ4x4", "IVF4,Flat", "IVF4,PQ4x4,RFlat"])
def test_sound_faiss_files_pass_the_look_at_their_header(tmp_path: Path, factory: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(1000, 8)).astype(np.float32)
    index = faiss.index_factory(8, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    check_index_file(tmp_path / "index", rows=1000, width=8)
    with pytest.raises(ArtifactError, match="says it has 1000 vectors of 8"):
        check_index_file(tmp_path / "index", rows=999, width=8)
