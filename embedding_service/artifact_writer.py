"""Writing an artifact's version: collected in a temporary folder beside the others, and published whole by one rename.

What a version's folder holds is described in `artifact`.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from safetensors.torch import save_file
from torch import Tensor

from cluster.errors import ArtifactError
from cluster.storage import checksum, publish_folder, remove_folder, sync_folder, write_atomic, write_json
from embedding_service import manifest as schema
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.artifact import CURRENT, MANIFEST, VERSION_NAME
from embedding_service.catalogue_map import MAX_ROWS, Codes, Layout, draw_map
from embedding_service.exact import Metric
from embedding_service.hashed_keys import HashedKeys, KeyMap
from embedding_service.index import Device
from embedding_service.keys import Vocabulary
from embedding_service.manifest import IndexShardEntry, parse_manifest
from embedding_service.quantize import Precision
from embedding_service.recall_plot import recall_plot
from embedding_service.row_maps import RowMap, weight_table
from embedding_service.towers import TowerSpec
from embedding_service.tuning import Queries, tuned_index
from embedding_service.vectors import VectorSet, VectorSink, row_ranges

SIDE_FILES = ("attributes.parquet", "cases.parquet")  # see `attributes` and `gates`


class ArtifactWriter:
    """Collects a new version in a temporary folder below `root` and publishes it whole.

    A context manager: leaving it without `publish` removes the temporary folder. `version` defaults to the UTC time of
    publishing, with a suffix if that is taken.
    """

    def __init__(
        self, root: str | Path, version: str | None = None, *, name: str | None = None, threads: int | None = None
    ) -> None:
        if "://" in str(root):
            raise ArtifactError(f"{root}: artifacts are written to a local folder; copy the version from there")
        if version is not None:
            _check_name("version", version)
        self.root = Path(root)
        self.root.mkdir(parents=True, exist_ok=True)
        self._version = version
        self._name = name if name is not None else self.root.resolve().name
        self._threads = threads
        self._key_maps: dict[str, Any] = {}
        self._vocabularies: dict[str, Vocabulary] = {}
        self._sinks: dict[str, VectorSink] = {}
        self._vectors: dict[str, Any] = {}
        self._indexes: dict[str, Any] = {}
        self._tower: dict[str, Any] | None = None
        self._map: dict[str, Any] | None = None
        with _locked(self.root):
            _remove_abandoned(self.root)
            self.folder = self.root / f".tmp-{uuid.uuid4().hex}"
            self.folder.mkdir()
            self._lease: int | None = os.open(self.folder, os.O_RDONLY)
            fcntl.flock(self._lease, fcntl.LOCK_EX)  # held while this process lives: see _remove_abandoned
        for part in ("keys", "vectors", "indexes"):
            (self.folder / part).mkdir()

    def add_keys(self, name: str, keys: KeyMap) -> None:
        """Write the key map `name`."""
        self._check_new("key map", self._key_maps, name)
        hashed = isinstance(keys, (HashedKeys, AdmittedKeys))
        file = f"keys/{name}.json" if isinstance(keys, HashedKeys) else f"keys/{name}.arrow"
        keys.save(self.folder / file)
        if isinstance(keys, Vocabulary):
            self._vocabularies[name] = keys
        self._key_maps[name] = {
            "file": file,
            "keys": keys.num_keys,
            "key_type": keys.key_type,
            "unknown": keys.unknown,
            **({"hashed": True} if hashed else {}),
            **({"admitted": True} if isinstance(keys, AdmittedKeys) else {}),
        }

    def add_evicted(self, name: str, ids: np.ndarray, keys: pa.Array) -> None:
        """Write `keys/<name>.evicted.arrow`, an Arrow IPC file of the keys that lost their rows of a dynamic table, for
        whoever keeps something for each key. ids: int64 [n], see `HashedKeys`; keys: [n], null where it is not known.
        """
        batch = pa.record_batch({"ids": pa.array(ids, pa.int64()), "keys": keys})
        file = self.folder / f"keys/{name}.evicted.arrow"
        with pa.OSFile(os.fspath(file), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)

    def add_vectors(
        self, name: str, *, rows: int, dim: int, keys: str, precision: Precision, normalized: bool = False
    ) -> VectorSink:
        """The sink for the vector set `name`; every row is written to it exactly once, in any order.

        `rows` is the number of keys of the key map `keys`, or one more for the unknown row. `normalized` promises unit
        (or zero) length, which the sink checks.
        """
        num_keys = self._num_keys(name, keys)
        if rows not in (num_keys, num_keys + 1):
            raise ArtifactError(f"vector set {name!r}: {rows} rows do not fit the {num_keys} keys of {keys!r}")
        return self._add_sink(name, rows, dim, keys, precision, normalized)

    def add_shared_vectors(
        self, name: str, map: RowMap, *, dim: int, keys: str, precision: Precision
    ) -> tuple[VectorSink, VectorSink | None]:
        """The sinks for the shared rows of the vector set `name` and for its learned weights, if it has any.

        What is looked up in it are ids of the key map `keys`, which `map` gives their rows.
        """
        num_keys = self._num_keys(name, keys)
        if map.ids not in (num_keys, num_keys + 1):
            raise ArtifactError(f"vector set {name!r}: a map of {map.ids} ids does not fit {num_keys} keys")
        sink = self._add_sink(name, map.rows, dim, keys, precision, False)
        self._vectors[name]["map"] = map.to_dict()
        if not map.weight_rows:
            return sink, None
        weights = weight_table(name)
        self._vectors[name]["map"]["weights"] = weights
        return sink, self._add_sink(weights, map.weight_rows, map.weight_width, keys, "fp32", False)

    def _num_keys(self, name: str, keys: str) -> int:
        self._check_new("vector set", self._vectors, name)
        if keys not in self._key_maps:
            raise ArtifactError(f"vector set {name!r}: add key map {keys!r} first")
        return int(self._key_maps[keys]["keys"])

    def _add_sink(
        self, name: str, rows: int, dim: int, keys: str, precision: Precision, normalized: bool
    ) -> VectorSink:
        file = f"vectors/{name}.npy"
        scale_file = f"vectors/{name}.scale.npy" if precision == "int8" else None
        scale = None if scale_file is None else self.folder / scale_file
        sink = VectorSink(self.folder / file, scale, rows=rows, dim=dim, precision=precision, normalized=normalized)
        self._sinks[name] = sink
        self._vectors[name] = {
            "file": file, "scale_file": scale_file, "rows": rows, "dim": dim, "precision": precision,
            "normalized": normalized, "keys": keys,
        }  # fmt: skip
        return sink

    def set_query_tower(self, spec: TowerSpec, state: Mapping[str, Tensor]) -> None:
        """Write the query tower: its description and its weights (a `Tower(spec).state_dict()`)."""
        file = "query_tower.safetensors"
        save_file({name: value.detach().cpu().contiguous() for name, value in state.items()}, self.folder / file)
        self._tower = {"spec": json.loads(json.dumps(spec.to_dict())), "file": file}

    def add_file(self, name: str, source: str | Path) -> None:
        """Take a side file along: the attributes that filters ask for, or the held-out sessions of the gates.

        Raises ArtifactError for another name and a file that is not there.
        """
        if name not in SIDE_FILES:
            raise ArtifactError(f"side file {name!r}: an artifact takes {' and '.join(SIDE_FILES)}")
        if not Path(source).is_file():
            raise ArtifactError(f"{source}: there is no such file to publish as {name}")
        shutil.copyfile(source, self.folder / name)

    def add_index(
        self,
        name: str,
        *,
        vectors: str,
        metric: Metric,
        factory: str = "auto",
        recall_target: float,
        recall_k: int,
        queries: Queries | np.ndarray | None = None,
        query_rows: tuple[np.ndarray, str] | None = None,
        seed: int = 0,
        device: Device = "auto",
        memory_bytes: int = 0,
        shards: int = 1,
        on_progress: Callable[[str, float], None] = lambda text, share: None,
        keep: Path | None = None,
    ) -> dict[str, Any]:
        """Build, tune and write the index `name` over the vector set `vectors` as stored; returns its manifest record.

        Only rows of keys are candidates, never the unknown row. It is tuned on `queries`, or on the stored vectors of
        `query_rows` (int64 [m], and where these come from: see `RecallEntry`), which ask for their neighbours; without
        either on stored vectors drawn at random. See `embedding_service.tuning.tuned_index`.

        shards: in how many parts, one after the other, each over its range of the rows, by itself within `memory_bytes`
        and tuned to find its own best rows; at most as many as rows.
        keep: a folder on the same disk where the finished index is kept as well, and taken from, if it is there and
        its checksums are right, in place of building it.
        """
        self._check_new("index", self._indexes, name)
        if vectors not in self._sinks:
            raise ArtifactError(f"index {name!r}: add vector set {vectors!r} first")
        self._sinks[vectors].close()
        source = self._stored(vectors).head(len(self._vocabularies[self._vectors[vectors]["keys"]].keys))
        if query_rows is not None:
            queries = Queries.of_rows(source, *query_rows)
        target: dict[str, Any] = {
            "metric": metric, "factory": factory, "recall_target": recall_target, "recall_k": recall_k, "seed": seed,
            "threads": self._threads, "device": device, "memory_bytes": memory_bytes,
        }  # fmt: skip
        ranges = row_ranges(source.rows, min(shards, source.rows))
        records = []
        for number, rows in enumerate(ranges):
            file = f"indexes/{name}.faiss" if len(ranges) == 1 else f"indexes/{name}.shard-{number}.faiss"
            kept = None if keep is None else _take_kept(keep, self.folder, file)
            if kept is not None:
                records.append(kept)
                continue
            title = name if len(ranges) == 1 else f"{name}, shard {number + 1} of {len(ranges)}"
            asked = queries.within(rows) if isinstance(queries, Queries) else queries
            record = {"vectors": vectors, "metric": metric, "dim": source.dim}
            record |= self._build_index(title, file, source.part(rows), {**target, "queries": asked}, on_progress)
            if keep is not None:
                _keep(keep, self.folder, file, record)
            records.append(record)
        self._indexes[name] = records[0] if len(records) == 1 else _in_shards(records)
        return dict(self._indexes[name])

    def _build_index(
        self,
        title: str,
        file: str,
        source: VectorSet,
        target: dict[str, Any],
        on_progress: Callable[[str, float], None],
    ) -> dict[str, Any]:
        """Build and write one index and its plot; returns what the manifest says of them."""
        index, measured = tuned_index(source, **target, on_progress=on_progress)
        index.save(self.folder / file)
        plot = recall_plot(
            f"{title}: {index.factory} over {index.rows:,} x {index.dim}",
            measured["curve"], index.parameters, measured["recall"],
        )  # fmt: skip
        write_atomic(self.folder / f"{file}.svg", plot.encode())
        return {
            "file": file,
            "settings_file": f"{file}.json",
            "factory": index.factory,
            "arrangement": index.arrangement,
            "parameters": dict(index.parameters),
            "rows": index.rows,
            "bytes": (self.folder / file).stat().st_size,
            **measured,
            "plot_file": f"{file}.svg",
            "shards": [],
        }

    def add_map(
        self,
        *,
        vectors: str,
        layout: Layout = "pca",
        attributes: Mapping[str, tuple[Codes, Sequence[str]]] | None = None,
        seed: int = 0,
    ) -> None:
        """Draw and write the map over the first rows of the vector set `vectors` as stored.

        `attributes`: name -> code uint8 [keys] and what the codes stand for (`catalogue_map.attribute`).
        """
        if vectors not in self._sinks:
            raise ArtifactError(f"map: add vector set {vectors!r} first")
        self._sinks[vectors].close()
        rows = min(MAX_ROWS, len(self._vocabularies[self._vectors[vectors]["keys"]].keys))
        drawn = draw_map(
            self._stored(vectors).head(rows),
            layout=layout,
            attributes={name: (codes[:rows], labels) for name, (codes, labels) in (attributes or {}).items()},
            seed=seed,
        )
        drawn.save(self.folder / "map.safetensors")
        self._map = {
            "file": "map.safetensors", "vectors": vectors, "rows": rows,
            "layouts": list(drawn.layouts), "colours": list(drawn.colours),
        }  # fmt: skip

    def publish(self, *, lineage: Mapping[str, Any], figures: Mapping[str, Any], current: bool = True) -> Path:
        """Write the manifest, rename the folder to its version and make it the current one; returns its path.

        Without `current` it becomes that only where there is none.

        Raises ArtifactError if a vector set is incomplete, the parts do not fit each other, or the version exists.
        """
        for sink in self._sinks.values():
            sink.close()
        written = sorted(file for file in self.folder.rglob("*") if file.is_file())
        files = {
            file.relative_to(self.folder).as_posix(): {
                "bytes": file.stat().st_size,
                "sha256": checksum(file).removeprefix("sha256:"),
            }
            for file in written
        }
        now = datetime.datetime.now(datetime.UTC)
        with _locked(self.root):
            version = self._free_version(now)
            manifest = {
                "format": schema.FORMAT,
                "format_version": schema.FORMAT_VERSION,
                "name": self._name,
                "version": version,
                "created": now.isoformat(timespec="seconds"),
                "keys": self._key_maps,
                "vectors": self._vectors,
                "query_tower": self._tower,
                "indexes": self._indexes,
                "map": self._map,
                "lineage": dict(lineage),
                "figures": dict(figures),
                "files": files,
            }
            write_json(self.folder / MANIFEST, manifest)
            parse_manifest((self.folder / MANIFEST).read_bytes(), str(self.folder / MANIFEST))
            publish_folder(self.folder, self.root / version)
            self._release()
            if current or not (self.root / CURRENT).exists():
                write_atomic(self.root / CURRENT, json.dumps({"version": version}).encode())
        return self.root / version

    def abort(self) -> None:
        """Remove what has been written; nothing happens after `publish`."""
        if self._lease is not None:
            remove_folder(self.folder)
            self._release()

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _stored(self, name: str) -> VectorSet:
        entry = self._vectors[name]
        scale = None if entry["scale_file"] is None else self.folder / entry["scale_file"]
        return VectorSet.open(
            self.folder / entry["file"], scale, rows=entry["rows"], dim=entry["dim"], precision=entry["precision"]
        )

    def _free_version(self, now: datetime.datetime) -> str:
        if self._version is not None:
            if (self.root / self._version).exists():
                raise ArtifactError(f"{self.root / self._version}: this version exists; versions are never overwritten")
            return self._version
        stamp = version = now.strftime("%Y%m%dT%H%M%SZ")
        number = 1
        while (self.root / version).exists():
            number += 1
            version = f"{stamp}-{number:02d}"
        return version

    def _check_new(self, kind: str, entries: Mapping[str, Any], name: str) -> None:
        _check_name(kind, name)
        if name in entries:
            raise ArtifactError(f"{kind} {name!r} was added before")

    def _release(self) -> None:
        if self._lease is not None:
            os.close(self._lease)
            self._lease = None


def _in_shards(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The manifest record of an index of which these are the shards' (see `manifest.IndexEntry`)."""
    sums = {field: sum(record[field] for record in records) for field in ("rows", "bytes", "build_seconds")}
    recall = {**min((record["recall"] for record in records), key=lambda recall: recall["value"])}
    recall["met"] = all(record["recall"]["met"] for record in records)
    shards = [{field: record[field] for field in IndexShardEntry.model_fields} for record in records]
    return {**records[0], **sums, "recall": recall, "estimate": None, "curve": [], "shards": shards}


def _keep(keep: Path, folder: Path, file: str, record: Mapping[str, Any]) -> None:
    """Link the index `file` of a version's folder and its settings into `keep`, then write its record there."""
    sums = {}
    for part in (file, f"{file}.json", f"{file}.svg"):
        kept = keep / Path(part).name
        kept.unlink(missing_ok=True)
        os.link(folder / part, kept)
        sums[kept.name] = checksum(kept)
    write_json(keep / f"{Path(file).name}.record.json", {"record": dict(record), "sha256": sums})


def _take_kept(keep: Path, folder: Path, file: str) -> dict[str, Any] | None:
    """The record of what `_keep` has kept, its files linked into `folder`; None if none is there or it is damaged."""
    names = [Path(file).name + ending for ending in ("", ".json", ".svg")]
    try:
        noted = json.loads((keep / f"{names[0]}.record.json").read_bytes())
        if any(checksum(keep / name) != noted["sha256"][name] for name in names):
            return None
        record: dict[str, Any] = noted["record"]
        for name in names:
            os.link(keep / name, (folder / file).with_name(name))
        return record
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _check_name(kind: str, name: str) -> None:
    if not VERSION_NAME.fullmatch(name):
        raise ArtifactError(f"{kind} name {name!r}: use letters, digits, `_`, `.`, `-` and spaces, at most 128")


@contextlib.contextmanager
def _locked(root: Path) -> Iterator[None]:
    """One writer at a time changes what is directly below `root`."""
    handle = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_abandoned(root: Path) -> None:
    """Remove folders of writers that are gone: the kernel released their lock."""
    for folder in [*root.glob(".tmp-*"), *root.glob(".*.removed")]:
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder)
        except BlockingIOError:
            continue  # its writer is at work
        finally:
            os.close(handle)
    sync_folder(root)
