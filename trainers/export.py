"""A run's checkpoint -> an immutable, measured artifact."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from cluster.config import Config, config_from_dict, config_to_dict, load_config
from cluster.errors import CheckpointError, DataError, SettingError
from cluster.launch import launch, report
from cluster.rank import current_rank
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.artifact import ArtifactWriter
from embedding_service.hashed_keys import KeyMap
from embedding_service.row_maps import weight_table
from embedding_service.vectors import VectorSink
from trainers.cases import Cases, load_validation
from trainers.checkpoint import step_of
from trainers.evaluate import load_trained
from trainers.evictions import evicted_ids, keys_of
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
    place = current_rank(config.cluster.device)
    prepared = load_prepared(config.run)
    model, checkpoint = load_trained(config, prepared, place, which=settings["which"])
    lineage = {"run": Path(config.run).name, "checkpoint": checkpoint, "config": config_to_dict(config)}
    with ArtifactWriter(settings["out"], name=Path(config.run).name) as writer:
        for name, key_map in prepared.key_maps.items():
            if not name.startswith("item_"):  # item features are inside the item vectors already
                writer.add_keys(name, _exported(model, name, key_map))
                _write_evicted(writer, model, name, config, prepared, checkpoint)
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
        for name, source in (("attributes.parquet", config.export.attributes), ("cases.parquet", config.export.cases)):
            if source:
                writer.add_file(name, source)
        return str(writer.publish(lineage=lineage, figures=_figures(config)))


def _exported(model: Model, name: str, key_map: KeyMap) -> KeyMap:
    """`key_map` as it is served: of a dynamic table, with the keys that have a row. Raises SettingError."""
    dynamic = model.tables.dynamic.get(name)
    if dynamic is None:
        return key_map
    ids = dynamic.trained.ids
    if not len(ids):
        raise SettingError(f"tables.{name}.admission", "no key was seen so often that it has a row: lower it")
    return AdmittedKeys(key_map.key_type, ids.copy())


def _write_evicted(
    writer: ArtifactWriter, model: Model, name: str, config: Config, prepared: Prepared, checkpoint: str
) -> None:
    """`keys/<name>.evicted.arrow`: the keys that once had a row of a dynamic table and have none at this checkpoint."""
    dynamic = model.tables.dynamic.get(name)
    if dynamic is None:
        return
    ids = evicted_ids(config.run, name, step=step_of(checkpoint))
    ids = ids[dynamic.trained.find(ids) == dynamic.trained.rows - 1]
    try:
        keys = keys_of(config, prepared, name, ids)
    except (DataError, SettingError) as error:
        keys = pa.nulls(len(ids), pa.int64() if prepared.hashed_keys[name].key_type == "int64" else pa.large_string())
        text = (
            f"warning: the evicted keys of `{name}` are given by their ids alone, without the training data ({error})"
        )
        report({"kind": "note", "text": text})
    writer.add_evicted(name, ids, keys)


def _write_vectors(writer: ArtifactWriter, model: Model, name: str, keys: str, config: Config) -> None:
    """One vector set, a chunk at a time. Items get a row each, whatever they share in training, since indexes are built
    of them; users and features keep sharing theirs.
    """
    rows, table = model.table_rows(name), model.table_of(name)
    map = None if table is None or keys == "item" else model.tables.maps.get(table)
    dim = config.model.dim if table is None else model.tables.specs[table].dim
    precision = config.export.precision
    if table in model.tables.dynamic:
        _write_dynamic(writer, model, name, config)
        return
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


def _write_dynamic(writer: ArtifactWriter, model: Model, table: str, config: Config) -> None:
    """The rows that ids have, in their order, and behind them the one that all others share."""
    now, dim = model.tables.dynamic[table].trained, model.tables.specs[table].dim
    rows = np.append(now.rows_of_ids, now.rows - 1)
    sink = writer.add_vectors(table, rows=len(rows), dim=dim, keys=table, precision=config.export.precision)
    with torch.no_grad():
        for start in range(0, len(rows), _CHUNK_ROWS):
            asked = torch.from_numpy(rows[start : start + _CHUNK_ROWS])
            sink.write(start, model.tables.physical.lookup({table: asked})[table].cpu().numpy())


def _write_rows(sink: VectorSink, model: Model, table: str) -> None:
    """The rows of a table as they are."""
    for first, rows in model.tables.local_shards(table):
        for start in range(0, len(rows), _CHUNK_ROWS):
            sink.write(first + start, rows[start : start + _CHUNK_ROWS].float().cpu().numpy())


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
