"""An artifact: one immutable, versioned folder with all that serving needs, and nothing that executes.

    <root>/CURRENT                     {"version": "..."}: the version that is served; flipped atomically
    <root>/<version>/manifest.json     the contents, lineage, figures, and size and sha256 of every file
                     keys/<name>.arrow             key map; of hashed keys <name>.json, or the ids that have rows
                     keys/<name>.evicted.arrow     keys that lost their rows of a dynamic table (not read by serving)
                     vectors/<name>.npy            fp32, fp16 or int8 [rows, dim]; int8 also <name>.scale.npy [rows]
                     indexes/<name>.faiss          FAISS index; its settings in .faiss.json, its curve as .faiss.svg;
                                                   of an index in shards <name>.shard-<number>.faiss...
                     map.safetensors               places on a plane, for people to look at
                     query_tower.safetensors       weights of the query tower (its description is in the manifest)
                     attributes.parquet, cases.parquet    side files, if there are any

A version appears by one rename, complete, or not at all (see `artifact_writer`). What a killed writer leaves is a
folder `.tmp-*` that the next writer on the same root removes.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from cluster.errors import ArtifactError
from cluster.storage import checksum
from embedding_service import manifest as schema
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.catalogue_map import CatalogueMap
from embedding_service.faiss_header import check_index_file
from embedding_service.hashed_keys import HashedKeys, KeyMap
from embedding_service.index import VectorIndex
from embedding_service.keys import Vocabulary
from embedding_service.manifest import Manifest, parse_manifest, tower_spec
from embedding_service.mapped_vectors import MappedVectors
from embedding_service.towers import Tower
from embedding_service.vectors import VectorSet

MANIFEST = "manifest.json"
CURRENT = "CURRENT"
VERSION_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,127}")


class Artifact:
    """A published version, open for reading. Parts are opened when first asked for, and checked then."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.version = manifest.version
        self.manifest: dict[str, Any] = manifest.model_dump()
        self._manifest = manifest
        self._keys: dict[str, Vocabulary] = {}

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Artifact:
        """Open a version folder, or the current version of a root folder.

        Checked here: the manifest's format, types, ranges and paths, that every file is there with its listed size and
        is no link, that array headers agree with the manifest, and, with `verify`, every checksum (reads all bytes).
        Raises ArtifactError naming the file and the reason.
        """
        folder = _version_folder(Path(path))
        where = str(folder / MANIFEST)
        file = folder / MANIFEST
        if file.is_symlink() or not file.is_file():
            raise ArtifactError(f"{where}: is missing: {folder} is not an artifact version")
        if file.stat().st_size > schema.MAX_MANIFEST_BYTES:
            raise ArtifactError(f"{where}: is larger than {schema.MAX_MANIFEST_BYTES} bytes")
        manifest = parse_manifest(file.read_bytes(), where)
        for name, entry in manifest.files.items():
            _check_file(folder, name, entry.bytes, entry.sha256 if verify else None)
        artifact = cls(folder, manifest)
        for name in manifest.vectors:
            artifact.vectors(name)
        return artifact

    def keys(self, name: str) -> Vocabulary:
        """The vocabulary of the key map `name`. Raises ArtifactError if there is none or it does not fit the
        manifest.
        """
        if name not in self._keys:
            entry = self._entry("key map", self._manifest.keys, name)
            if entry.hashed:
                raise ArtifactError(
                    f"{self.path}: the keys of {name!r} are hashed, not listed: they have no vocabulary"
                )
            vocabulary = Vocabulary.load(self.path / entry.file)
            found = (len(vocabulary.keys), vocabulary.key_type, vocabulary.unknown)
            if found != (entry.keys, entry.key_type, entry.unknown):
                raise ArtifactError(f"{self.path / entry.file}: holds {found}, not what the manifest says of it")
            self._keys[name] = vocabulary
        return self._keys[name]

    def key_map(self, name: str) -> KeyMap:
        """The key map `name`, with a vocabulary or without. Raises ArtifactError as `keys` does."""
        entry = self._entry("key map", self._manifest.keys, name)
        if not entry.hashed:
            return self.keys(name)
        kind = AdmittedKeys if entry.admitted else HashedKeys
        hashed: KeyMap = kind.load(self.path / entry.file)
        if (hashed.num_keys, hashed.key_type, hashed.unknown) != (entry.keys, entry.key_type, entry.unknown):
            raise ArtifactError(f"{self.path / entry.file}: is not what the manifest says of it")
        return hashed

    def vectors_by_id(self, name: str) -> VectorSet | MappedVectors:
        """The vector set `name` by the ids of its key map, which may share its rows."""
        stored = self.vectors(name)
        entry = self._manifest.vectors[name].map
        if entry is None:
            return stored
        return MappedVectors(entry.row_map(), stored, None if entry.weights is None else self.vectors(entry.weights))

    def vectors(self, name: str) -> VectorSet:
        """The vector set `name` as it is stored, memory-mapped. Raises ArtifactError if there is none."""
        entry = self._entry("vector set", self._manifest.vectors, name)
        scale = None if entry.scale_file is None else self.path / entry.scale_file
        return VectorSet.open(self.path / entry.file, scale, rows=entry.rows, dim=entry.dim, precision=entry.precision)

    def query_tower(self) -> Tower:
        """The query tower in evaluation mode. Raises ArtifactError if there is none or its weights do not fit it."""
        if self._manifest.query_tower is None:
            raise ArtifactError(f"{self.path}: has no query tower: it answers no sessions, only keys and vectors")
        file = self.path / self._manifest.query_tower.file
        spec = tower_spec(self._manifest, str(self.path / MANIFEST))
        try:
            with torch.device("meta"):  # a hostile description must not allocate anything
                tower = Tower(spec)
            tower.load_state_dict(load_file(file), strict=True, assign=True)
        except (RuntimeError, ValueError, OSError, SafetensorError) as error:
            raise ArtifactError(f"{file}: does not fit the query tower's description ({error})") from None
        return tower.eval()

    def index(self, name: str, shard: int = 0, *, mapped: bool = False) -> VectorIndex:
        """The index `name`, or its shard of that number, in memory or `mapped`. Raises ArtifactError if there is none
        or it misfits.
        """
        entry = self._entry("index", self._manifest.indexes, name)
        part = entry.shards[shard] if entry.shards else entry
        width = entry.dim + (part.arrangement == "augmented")
        check_index_file(self.path / part.file, rows=part.rows, width=width)
        index = VectorIndex.load(self.path / part.file, mapped=mapped)
        found = (index.rows, index.dim, index.metric, index.arrangement, index.parameters)
        if found != (part.rows, entry.dim, entry.metric, part.arrangement, part.parameters):
            raise ArtifactError(f"{self.path / part.file}: holds {found}, not what the manifest says of it")
        return index

    def index_ranges(self, name: str) -> list[range]:
        """The rows of each shard of the index `name`; one range if it is in one piece. Raises ArtifactError."""
        entry = self._entry("index", self._manifest.indexes, name)
        ends = list(itertools.accumulate((shard.rows for shard in entry.shards or [entry]), initial=0))
        return [range(start, stop) for start, stop in itertools.pairwise(ends)]

    def check_index(self, name: str, shard: int) -> None:
        """Compare the files of an index's shard with their checksums. Raises ArtifactError."""
        entry = self._entry("index", self._manifest.indexes, name)
        part = entry.shards[shard] if entry.shards else entry
        for file in (part.file, part.settings_file):
            listed = self._manifest.files[file]
            _check_file(self.path, file, listed.bytes, listed.sha256)

    def map(self) -> CatalogueMap | None:
        """The map of the catalogue; None for a version of earlier times. Raises ArtifactError if it misfits."""
        entry = self._manifest.map
        if entry is None:
            return None
        file = self.path / entry.file
        return CatalogueMap.load(file, rows=entry.rows, layouts=entry.layouts, colours=entry.colours)

    def _entry(self, kind: str, entries: Mapping[str, Any], name: str) -> Any:
        if name not in entries:
            known = ", ".join(sorted(entries)) or "none"
            raise ArtifactError(f"{self.path}: has no {kind} {name!r}; it has: {known}")
        return entries[name]


def _version_folder(path: Path) -> Path:
    """`path` itself if it is a version, else the version that its CURRENT names."""
    pointer = path / CURRENT
    if (path / MANIFEST).exists() or not pointer.exists():
        if not path.is_dir():
            raise ArtifactError(f"{path}: there is no such artifact folder")
        return path
    try:
        version = json.loads(pointer.read_bytes())["version"]
        if not isinstance(version, str) or not VERSION_NAME.fullmatch(version):
            raise ValueError(f"{version!r} is not a version's name")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ArtifactError(f"{pointer}: does not name a version ({error})") from None
    if (path / version).is_symlink() or not (path / version).is_dir():
        raise ArtifactError(f"{pointer}: names version {version}, which is not there")
    return path / version


def _check_file(folder: Path, name: str, size: int, sha256: str | None) -> None:
    file = folder / name
    if os.path.realpath(file) != os.path.join(os.path.realpath(folder), *name.split("/")):
        raise ArtifactError(f"{file}: is a link, or below one; an artifact's files are its own")
    if not file.is_file():
        raise ArtifactError(f"{file}: is missing, though the manifest lists it")
    if file.stat().st_size != size:
        raise ArtifactError(f"{file}: has {file.stat().st_size} bytes, the manifest says {size}")
    if sha256 is not None and checksum(file).removeprefix("sha256:") != sha256:
        raise ArtifactError(f"{file}: is damaged: its sha256 is not the manifest's; copy the version again")
