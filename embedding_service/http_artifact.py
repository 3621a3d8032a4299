"""The HTTP interface over one artifact: what its manifest says of keys, users and features, for `HttpApi`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.errors import ArtifactError
from embedding_service.artifact import Artifact
from embedding_service.attributes import FILE as ATTRIBUTES
from embedding_service.attributes import Attributes
from embedding_service.hashed_keys import KeyMap
from embedding_service.http_api import HttpApi
from embedding_service.http_page import Page
from embedding_service.http_schema import Catalogue, FeatureType, Limits
from embedding_service.instruments import Instruments
from embedding_service.overlay import Overlay
from embedding_service.retrieval import RECOMMEND, SIMILAR, Retriever
from embedding_service.scatter import Scatter
from embedding_service.selective import SelectiveRetriever
from embedding_service.towers import LISTS, TowerInput

WAITING_THREADS = 32  # requests at a time that wait for shards, mostly without work


def http_api(
    artifact: Artifact,
    limits: Limits = Limits(),  # noqa: B008 (frozen)
    *,
    threads: int = 1,
    overlay: Overlay | None = None,
    instruments: Instruments | None = None,
    scatter: Scatter | None = None,
) -> HttpApi:
    """The ASGI application over `artifact` and the changes to its items, warmed up; it fills in `instruments`.

    `scatter`: the processes that hold its indexes in shards, which have loaded it; None: this one holds them.
    Raises ArtifactError for one that lacks an index or a tower, or whose attributes cannot be read.
    """
    check_servable(artifact)
    manifest = artifact.manifest

    def key_map(vectors: str) -> KeyMap:
        return artifact.key_map(manifest["vectors"][vectors]["keys"])

    index = manifest["indexes"][RECOMMEND]
    items = artifact.keys(manifest["vectors"][index["vectors"]]["keys"])
    inputs = {block.source: block for block in artifact.query_tower().spec.inputs}
    users = key_map(inputs["user"].vectors) if "user" in inputs else None

    def feature_type(block: TowerInput) -> FeatureType:
        if block.encoder == "project":
            return FeatureType(width=block.width)
        key_type, is_weighted = key_map(block.vectors).key_type, block.encoder.startswith("weighted")
        return FeatureType(key_type, is_list=block.encoder in LISTS, is_weighted=is_weighted)

    features = {
        name: feature_type(block)
        for name, block in sorted(inputs.items())
        if name not in ("history", "last_item", "user")
    }
    catalogue = Catalogue(
        version=artifact.version,
        num_items=items.num_keys,
        dim=index["dim"],
        key_type=items.key_type,
        user_type=None if users is None else users.key_type,
        features=features,
        details={"model": _model_kind(manifest["lineage"]), "figures": manifest["figures"]},
    )
    listed = ATTRIBUTES in manifest["files"]
    attributes = Attributes.read(artifact.path / ATTRIBUTES, items) if listed else None
    instruments = instruments or Instruments()
    retriever = Retriever(artifact, threads=threads, elsewhere=None if scatter is None else scatter.candidates)
    selective = SelectiveRetriever(retriever, overlay or Overlay(), attributes)
    api = HttpApi(
        retriever,
        catalogue,
        items,
        users,
        limits=limits,
        threads=max(2, threads) if scatter is None else WAITING_THREADS,
        selective=selective,
        page=Page(artifact, items, artifact.map()),
        instruments=instruments,
        scatter=scatter,
    )
    api.warm_up()
    retriever.tell(instruments)  # the questions of warming up were nobody's
    return api


def _model_kind(lineage: Mapping[str, Any]) -> str | None:
    """What was trained; nothing else of the lineage is published: its config names the paths of the data."""
    try:
        return str(lineage["config"]["model"]["kind"])
    except (KeyError, TypeError):
        return None


def check_servable(artifact: Artifact) -> None:
    """Raise ArtifactError for an artifact that lacks the query tower or an index that the endpoints need."""
    indexes = artifact.manifest["indexes"]
    if not {RECOMMEND, SIMILAR} <= indexes.keys() or artifact.manifest["query_tower"] is None:
        raise ArtifactError(
            f"{artifact.path}: a service needs a query tower and the indexes {RECOMMEND} and {SIMILAR}; "
            f"indexes here: {', '.join(indexes) or 'none'}"
        )
