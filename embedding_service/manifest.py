"""What an artifact's manifest.json may say: the schema of format 1 and the checks that need no other file."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from cluster.errors import ArtifactError
from embedding_service.index_plan import MAX_SHARDS
from embedding_service.row_maps import MAX_HASHES, RowMap
from embedding_service.towers import LISTS, TowerInput, TowerSpec

FORMAT = "lexshard.artifact"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 64 * 2**20

_PART = r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,127}"
Name = Annotated[str, StringConstraints(pattern=rf"^{_PART}$")]
RelativePath = Annotated[str, StringConstraints(pattern=rf"^{_PART}(/{_PART}){{0,3}}$")]  # never absolute, never `..`
Count = Annotated[int, Field(ge=0, le=2**53)]
Rows = Annotated[int, Field(ge=1, le=2**40)]
Ids = Annotated[int, Field(ge=1, le=2**62)]
Dim = Annotated[int, Field(ge=1, le=2**16)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class FileEntry(_Entry):
    bytes: Count
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class KeyMapEntry(_Entry):
    file: RelativePath
    keys: Ids
    key_type: Literal["int64", "string"]
    unknown: Literal["skip", "row"]
    hashed: bool = False  # keys are hashed, not listed
    admitted: bool = False  # of the hashed keys, only those in the file have a row of their own


class RowMapEntry(_Entry):
    """How ids share the rows of a vector set: the fields of `RowMap`, and the vector set of learned weights."""

    kind: Literal["exact", "hashed", "head_tail", "quotient_remainder"]
    ids: Ids
    rows: Rows
    head: Count
    hashes: Annotated[int, Field(ge=1, le=MAX_HASHES)]
    remainders: Count
    product: bool
    weight_rows: Count
    weights: Name | None = None

    def row_map(self) -> RowMap:
        """Raises ValueError for numbers that do not fit each other."""
        return RowMap.from_dict(self.model_dump(exclude={"weights"}))


class VectorEntry(_Entry):
    file: RelativePath
    scale_file: RelativePath | None
    rows: Rows
    dim: Dim
    precision: Literal["fp32", "fp16", "int8"]
    normalized: bool
    keys: Name
    map: RowMapEntry | None = None  # None: the row of an id is the id


class RecallEntry(_Entry):
    """recall@k of the index as it is served, against exact search, over `num_queries` queries.

    queries: `validation` or `training` sessions of the run, vectors that somebody has `given`, or `stored` vectors,
    each asking for its neighbours. half_width: of the 95 % confidence interval; None where it was not computed.
    """

    value: Share
    half_width: Share | None = None
    k: Rows
    target: Share
    met: bool
    queries: Literal["validation", "training", "given", "stored"]
    num_queries: Count


class CurvePoint(_Entry):
    """Recall, and microseconds of a query asked alone in one thread, at search parameters."""

    parameters: dict[str, Count]
    recall: Share
    microseconds: Annotated[float, Field(ge=0)]


class EstimateEntry(_Entry):
    """What `index_plan.estimate` said before the index was built."""

    index_bytes: Count
    build_bytes: Count
    seconds: Annotated[float, Field(ge=0)]


class IndexShardEntry(_Entry):
    """The index over the next `rows` rows of a vector set; fields as `IndexEntry` has them."""

    file: RelativePath
    settings_file: RelativePath
    factory: str
    arrangement: Literal["plain", "centred", "augmented"]
    parameters: dict[str, Count]
    recall: RecallEntry
    rows: Rows
    bytes: Count
    plot_file: RelativePath | None = None


class IndexEntry(_Entry):
    """An index, or one in `shards`: then `rows`, `bytes` and `build_seconds` are sums, `recall` is that of the shard
    with the lowest, and what else belongs to one of them is the first one's.
    """

    file: RelativePath
    settings_file: RelativePath
    vectors: Name
    metric: Literal["ip", "cosine"]
    factory: str
    arrangement: Literal["plain", "centred", "augmented"]
    parameters: dict[str, Count]
    recall: RecallEntry
    rows: Rows
    dim: Dim
    bytes: Count
    build_seconds: Annotated[float, Field(ge=0)]
    build_bytes: Count | None = None
    estimate: EstimateEntry | None = None
    curve: list[CurvePoint] = Field(default_factory=list, max_length=1000)
    plot_file: RelativePath | None = None
    shards: list[IndexShardEntry] = Field(default_factory=list, max_length=MAX_SHARDS)


class MapEntry(_Entry):
    """`embedding_service.catalogue_map`; its rows are the first ones of the vector set, at most 2^20 of them."""

    file: RelativePath
    vectors: Name
    rows: Annotated[int, Field(ge=1, le=2**20)]
    layouts: Annotated[tuple[Literal["pca", "umap"], ...], Field(strict=False, min_length=1, max_length=2)]
    colours: Annotated[tuple[Name, ...], Field(strict=False, max_length=32)]


class TowerEntry(_Entry):
    spec: dict[str, Any]
    file: RelativePath


class Manifest(_Entry):
    format: Literal["lexshard.artifact"]
    format_version: Literal[1]
    name: str
    version: Name
    created: str
    keys: dict[Name, KeyMapEntry]
    vectors: dict[Name, VectorEntry]
    query_tower: TowerEntry | None
    indexes: dict[Name, IndexEntry]
    map: MapEntry | None = None
    lineage: dict[str, Any]
    figures: dict[str, Any]
    files: dict[RelativePath, FileEntry]


def parse_manifest(text: bytes, where: str) -> Manifest:
    """The checked manifest of manifest.json's bytes. Raises ArtifactError naming the field, prefixed with `where`."""
    if len(text) > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{where}: is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = Manifest.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the file"
        raise ArtifactError(f"{where}: {field}: {first['msg']} (got {str(first['input'])[:100]!r})") from None
    check_manifest(manifest, where)
    return manifest


def check_manifest(manifest: Manifest, where: str) -> None:
    """The parts must fit each other. Raises ArtifactError."""

    def refuse(problem: str) -> None:
        raise ArtifactError(f"{where}: {problem}")

    named = [(f"keys.{name}", entry.file) for name, entry in manifest.keys.items()]
    weights = {entry.map.weights for entry in manifest.vectors.values() if entry.map is not None}
    for name, vectors in manifest.vectors.items():
        named.append((f"vectors.{name}", vectors.file))
        if vectors.scale_file is not None:
            named.append((f"vectors.{name}", vectors.scale_file))
        if (vectors.scale_file is None) == (vectors.precision == "int8"):
            refuse(f"vectors.{name}: int8 vectors have a scale file, others have none")
        if vectors.keys not in manifest.keys:
            refuse(f"vectors.{name}: there is no key map {vectors.keys!r}")
        keys = manifest.keys[vectors.keys].keys
        if vectors.map is not None:
            _check_map(manifest, name, vectors, vectors.map, where)
        elif name not in weights and vectors.rows not in (keys, keys + 1):
            refuse(f"vectors.{name}: has {vectors.rows} rows, but key map {vectors.keys!r} has {keys} keys")
    for name, index in manifest.indexes.items():
        named += [(f"indexes.{name}", index.file), (f"indexes.{name}", index.settings_file)]
        named += [(f"indexes.{name}", index.plot_file)] if index.plot_file is not None else []
        for shard in index.shards:
            files = (shard.file, shard.settings_file, shard.plot_file)
            named += [(f"indexes.{name}.shards", file) for file in files if file is not None]
        if index.shards and (sum(shard.rows for shard in index.shards), index.shards[0].file) != (
            index.rows,
            index.file,
        ):
            refuse(f"indexes.{name}: its shards do not make up its {index.rows} rows, beginning with {index.file}")
        if index.vectors not in manifest.vectors:
            refuse(f"indexes.{name}: there is no vector set {index.vectors!r}")
        source = manifest.vectors[index.vectors]
        if source.map is not None:
            refuse(f"indexes.{name}: vector set {index.vectors!r} has no row for every key")
        if (index.rows, index.dim) != (manifest.keys[source.keys].keys, source.dim):
            refuse(f"indexes.{name}: {index.rows} x {index.dim} does not fit vector set {index.vectors!r}")
    if manifest.map is not None:
        named.append(("map", manifest.map.file))
        drawn = manifest.vectors.get(manifest.map.vectors)
        if drawn is None or manifest.map.rows > manifest.keys[drawn.keys].keys:
            refuse(f"map: {manifest.map.rows} rows do not fit a vector set {manifest.map.vectors!r}")
    if manifest.query_tower is not None:
        named.append(("query_tower", manifest.query_tower.file))
        for block in tower_spec(manifest, where).inputs:
            _check_tower_input(manifest, block, where)
    for owner, file in named:
        if file not in manifest.files:
            refuse(f"{owner}: {file} is not among the listed files")


def _check_map(manifest: Manifest, name: str, vectors: VectorEntry, entry: RowMapEntry, where: str) -> None:
    """Raises ArtifactError where a vector set's row map fits neither itself nor the rest."""
    keys = manifest.keys[vectors.keys].keys
    try:
        map = entry.row_map()
    except ValueError as error:
        raise ArtifactError(f"{where}: vectors.{name}.map: {error}") from None
    if map.rows != vectors.rows or map.ids not in (keys, keys + 1):
        raise ArtifactError(
            f"{where}: vectors.{name}: a map of {map.ids} ids to {map.rows} rows does not fit {keys} keys and "
            f"{vectors.rows} rows"
        )
    weights = None if entry.weights is None else manifest.vectors.get(entry.weights)
    found = None if weights is None else (weights.rows, weights.dim, weights.map)
    if found != (None if not map.weight_rows else (map.weight_rows, map.weight_width, None)):
        raise ArtifactError(f"{where}: vectors.{name}: its learned weights {entry.weights!r} are not what its map says")


def tower_spec(manifest: Manifest, where: str) -> TowerSpec:
    """The query tower's description, with sane dimensions. Raises ArtifactError."""
    assert manifest.query_tower is not None
    spec = TowerSpec.from_dict(manifest.query_tower.spec)
    widths = (spec.dim, *spec.hidden, *(block.dim for block in spec.inputs))
    widths += tuple(block.width for block in spec.inputs if block.encoder == "project")
    widths += tuple(block.length for block in spec.inputs if block.encoder in ("attention", "gru"))
    if not spec.inputs or not all(isinstance(width, int) and 1 <= width <= 2**16 for width in widths):
        raise ArtifactError(f"{where}: query_tower: widths {widths} are not all in 1..65536")
    return spec


def _check_tower_input(manifest: Manifest, block: TowerInput, where: str) -> None:
    def refuse(problem: str) -> None:
        raise ArtifactError(f"{where}: query_tower: input {block.name!r} {problem}")

    own = {"history": ("pool", "attention", "gru"), "last_item": ("pool",), "user": ("pool",)}
    fitting = own.get(block.source, ("pool", *LISTS, "project"))
    if block.encoder not in fitting:
        refuse(f"has encoder {block.encoder!r}, which does not fit {block.source!r}")
    if not all(isinstance(value, (int, float)) and abs(value) < math.inf for value in (block.center, block.scale)):
        refuse(f"is standardised by {block.center!r} and {block.scale!r}, which are not both finite numbers")
    if not isinstance(block.decay, (int, float)) or not 0.0 <= block.decay <= 1.0:
        refuse(f"has decay {block.decay!r}, not in 0..1")
    if block.encoder == "project":
        return
    vectors = manifest.vectors.get(block.vectors)
    if vectors is None:
        refuse(f"needs a vector set {block.vectors!r}")
    elif vectors.dim != block.dim:
        refuse(f"has width {block.dim}, but vector set {block.vectors!r} has {vectors.dim}")
