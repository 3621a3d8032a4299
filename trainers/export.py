"""A run's checkpoint -> an immutable, measured artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.config import Config, config_from_dict, config_to_dict, load_config
from cluster.errors import CheckpointError
from cluster.launch import launch, report
from cluster.rank import current_rank
from embedding_service.artifact import ArtifactWriter
from embedding_service.catalogue_map import MAX_ATTRIBUTES, Codes, attribute
from embedding_service.keys import Vocabulary
from embedding_service.projection import check_umap
from embedding_service.row_maps import weight_table
from embedding_service.vectors import VectorSink
from trainers.cases import Cases, load_validation
from trainers.evaluate import load_trained
from trainers.models import Model
from trainers.prepare import Prepared, load_prepared

_CHUNK_ROWS = 65_536
_TUNING_QUERIES = 1000
_INDEXES: tuple[tuple[str, str, Literal["ip", "cosine"]], ...] = (  # name, vector set (empty: the model's), metric
    ("recommend", "item", "ip"),
    ("similar", "", "cosine"),
)


def export_run(
    run: str | Path,
    *,
    out: str | Path = "",
    which: str = "best",
    overrides: Sequence[str] = (),
    on_event: Any = None,
) -> Path:
    """Publish the run's checkpoint (`best` or `last`) as a new version below `out` (empty: `<run>/artifacts`).

    Settings are the run's, with `overrides` (`export.precision=int8`...). Returns the version's folder.
    Raises LexshardError.
    """
    folder = Path(run)
    if not (folder / "config.toml").exists():
        raise CheckpointError(f"{run} is not a run of `lexshard train`: it has no config.toml")
    config = load_config(folder / "config.toml", [*overrides, f"run={folder}"])
    settings = {"config": config_to_dict(config), "out": str(out or folder / "artifacts"), "which": which}
    return Path(launch(_export, settings, workers=1, engine="inline", storage=str(folder), on_event=on_event))


def _export(settings: dict[str, Any]) -> str:
    config = config_from_dict(settings["config"])
    if config.export.map == "umap":
        check_umap()
    place = current_rank(config.cluster.device)
    prepared = load_prepared(config.run)
    model, checkpoint = load_trained(config, prepared, place, which=settings["which"])
    lineage = {"run": Path(config.run).name, "checkpoint": checkpoint, "config": config_to_dict(config)}
    with ArtifactWriter(settings["out"], name=Path(config.run).name) as writer:
        for name, key_map in prepared.key_maps.items():
            if not name.startswith("item_"):  # item features are inside the item vectors already
                writer.add_keys(name, key_map)
        for name, keys in model.vector_sets().items():
            _write_vectors(writer, model, name, keys, config)
        writer.set_query_tower(model.query_tower.spec, model.query_tower.state_dict())
        for index, vectors, metric in _INDEXES:
            report({"kind": "note", "text": f"building the index `{index}`"})
            writer.add_index(
                index,
                vectors=vectors or model.similar_set,
                metric=metric,
                factory=config.export.index,
                recall_target=config.export.recall_target,
                recall_k=config.export.recall_k,
                queries=_tuning_queries(config, prepared, model) if index == "recommend" else None,
                seed=config.train.seed,
            )
        report({"kind": "note", "text": f"drawing the map by {config.export.map}"})
        writer.add_map(
            vectors=model.similar_set,
            layout=config.export.map,
            attributes=_attributes(prepared),
            seed=config.train.seed,
        )
        for name, source in (("attributes.parquet", config.export.attributes), ("cases.parquet", config.export.cases)):
            if source:
                writer.add_file(name, source)
        return str(writer.publish(lineage=lineage, figures=_figures(config)))


def _write_vectors(writer: ArtifactWriter, model: Model, name: str, keys: str, config: Config) -> None:
    """One vector set, a chunk at a time. Items get a row each, whatever they share in training, since indexes are built
    of them; users and features keep sharing theirs.
    """
    rows, table = model.table_rows(name), model.table_of(name)
    map = None if table is None or keys == "item" else model.tables.maps.get(table)
    dim = config.model.dim if table is None else model.tables.specs[table].dim
    precision = config.export.precision
    if map is None:
        normalized = name == "item" and config.model.kind == "two_tower" and config.model.normalize
        sink = writer.add_vectors(name, rows=rows, dim=dim, keys=keys, precision=precision, normalized=normalized)
        for start in range(0, rows, _CHUNK_ROWS):
            stop = min(rows, start + _CHUNK_ROWS)
            sink.write(start, model.vectors(name, start, stop).cpu().numpy())
        return
    assert table is not None
    sink, weights = writer.add_shared_vectors(name, map, dim=dim, keys=keys, precision=precision)
    _write_rows(sink, model, table)
    if weights is not None:
        _write_rows(weights, model, weight_table(table))


def _write_rows(sink: VectorSink, model: Model, table: str) -> None:
    """The rows of a table as they are."""
    for first, rows in model.tables.local_shards(table):
        for start in range(0, len(rows), _CHUNK_ROWS):
            sink.write(first + start, rows[start : start + _CHUNK_ROWS].float().cpu().numpy())


def _attributes(prepared: Prepared) -> dict[str, tuple[Codes, list[str]]]:
    """The item features that have one key per item: what the map can be coloured by."""
    names = [name for name, feature in prepared.item_features.items() if feature.kind == "key"]
    return {
        name: attribute(np.asarray(prepared.item_values[name])[: len(prepared.keys["item"].keys)], keys)
        for name in names[:MAX_ATTRIBUTES]
        if isinstance(keys := prepared.keys.get(f"item_{name}"), Vocabulary)  # hashed keys have no names
    }


def _tuning_queries(config: Config, prepared: Prepared, model: Model) -> np.ndarray | None:
    """Real queries for tuning the index: validation cases through the query tower; None without validation."""
    cases: Cases | None = load_validation(config, prepared)
    if cases is None:
        return None
    chosen = cases.take(np.linspace(0, len(cases) - 1, min(len(cases), _TUNING_QUERIES)).astype(np.int64))
    queries = model.encode_queries(chosen.history, chosen.single).cpu().numpy()
    asking: np.ndarray = queries[np.abs(queries).max(1) > 0.0]
    return asking  # a history of unknown items asks for nothing


def _figures(config: Config) -> dict[str, Any]:
    """The validation figures of the run, for the manifest."""
    try:
        result = json.loads((Path(config.run) / "result.json").read_text())
        return {"validation": result["validations"], "best_epoch": result["best_epoch"]}
    except (OSError, ValueError, KeyError, TypeError):  # a run that goes on has none yet
        return {}
