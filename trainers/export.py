"""A run's checkpoint -> an immutable, measured artifact.

Vector sets are made in pieces (`trainers.export_shards`), on threads or as Ray tasks, straight from the checkpoint's
shards, and indexes one after the other. What is done is kept in `<out>/.export-<fingerprint>` until the version is
published, and taken up, after its checksums are held against it, by the next export of the same checkpoint with the
same settings. Memory: CHUNK_ROWS vectors for each thread, the key maps and item features of the run, and then one index
with its training sample (`lexshard export` tells how much before it is built).
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch

from cluster.config import Config, config_from_dict, config_to_dict, load_config
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from cluster.launch import launch, report
from cluster.rank import num_cores
from cluster.storage import remove_folder
from cluster.tasks import run_tasks
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.catalogue_map import MAX_ATTRIBUTES, Codes, attribute
from embedding_service.hashed_keys import KeyMap
from embedding_service.index_plan import auto_factory, estimate, num_shards
from embedding_service.keys import Vocabulary
from embedding_service.projection import check_umap
from embedding_service.row_maps import RowMap, weight_table
from embedding_service.tuning import TUNING_QUERIES, Queries
from embedding_service.vectors import VectorSink
from trainers import export_shards
from trainers.cases import Cases, load_validation, sample_training
from trainers.checkpoint import CheckpointStore, check_same_run, step_of
from trainers.evictions import evicted_ids, keys_of
from trainers.export_shards import Piece, copy_piece, cut, is_done, make_piece, stored_model
from trainers.models import Model
from trainers.prepare import Prepared, load_prepared

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
    current: bool = True,
    on_event: Any = None,
) -> Path:
    """Publish the run's checkpoint (`best` or `last`) as a new version below `out` (empty: `<run>/artifacts`).

    Settings are the run's, with `overrides` (`export.precision=int8`...). `current`: make it the current version there,
    which a service begins with. `on_event` is called with {"kind": "note", "text"} and {"kind": "progress", "share",
    "text"}, which have "shards_done" and "num_shards" while vectors are made, in this thread. Returns the version's
    folder. Killed, it is to be called again: what was done is kept. Raises LexshardError.
    """
    folder = Path(run)
    if not (folder / "config.toml").exists():
        raise CheckpointError(f"{run} is not a run of `lexshard train`: it has no config.toml")
    config = load_config(folder / "config.toml", [*overrides, f"run={folder}"])
    where = {"out": str(out or folder / "artifacts"), "current": current}
    settings = {"config": config_to_dict(config), "which": which, **where}
    return Path(launch(_export, settings, workers=1, engine="inline", storage=str(folder), on_event=on_event))


def _export(settings: dict[str, Any]) -> str:
    config = config_from_dict(settings["config"])
    if config.export.map == "umap":
        check_umap()
    prepared = load_prepared(config.run)
    name, folder = _checkpoint(config, settings["which"])
    shared = {"config": config_to_dict(config), "checkpoint": str(folder)}
    model = stored_model(shared)
    lineage = {"run": Path(config.run).name, "checkpoint": name, "config": config_to_dict(config)}
    with (
        ArtifactWriter(settings["out"], name=Path(config.run).name, threads=config.export.threads or None) as writer,
        _work_folder(writer.root, folder, config) as work,
    ):
        for side_file, source in _side_files(config):
            writer.add_file(side_file, source)  # before the work: one may be missing
        for key_map, keys in prepared.key_maps.items():
            if not key_map.startswith("item_"):  # item features are inside the item vectors already
                writer.add_keys(key_map, _exported(model, key_map, keys))
                _write_evicted(writer, model, key_map, config, prepared, name)
        _write_vectors(writer, model, config, shared, work)
        writer.set_query_tower(model.query_tower.spec, model.query_tower.state_dict())
        _write_indexes(writer, model, config, prepared, work)
        slow = ", which takes minutes" if config.export.map == "umap" else ""
        report({"kind": "note", "text": f"drawing the map by {config.export.map}{slow}"})
        writer.add_map(
            vectors=model.similar_set,
            layout=config.export.map,
            attributes=_attributes(prepared),
            seed=config.train.seed,
        )
        return str(writer.publish(lineage=lineage, figures=_figures(config), current=settings["current"]))


def _side_files(config: Config) -> list[tuple[str, str]]:
    """(name in the artifact, where it is) of the files that are published along."""
    named = (("attributes.parquet", config.export.attributes), ("cases.parquet", config.export.cases))
    return [(name, source) for name, source in named if source]


def _checkpoint(config: Config, which: str) -> tuple[str, Path]:
    """Name and folder of a sound checkpoint. Raises CheckpointError."""
    store = CheckpointStore(config.run)
    chosen = store.choose(which)
    if chosen is None:
        raise CheckpointError(f"{config.run} has no checkpoint yet; run `lexshard train` first")
    name, description, refused = chosen
    for reason in refused:
        report({"kind": "note", "text": f"warning: {reason}; using {name} instead"})
    check_same_run(description["config"], config, store.folder / name)
    return name, store.folder / name


@contextmanager
def _work_folder(root: Path, checkpoint: Path, config: Config) -> Iterator[Path]:
    """The folder of what is done, which stays if the block fails. Raises ArtifactError if another export is in it."""
    of = {
        "checkpoint": hashlib.sha256((checkpoint / "checkpoint.json").read_bytes()).hexdigest(),
        "export": asdict(config.export) | {"threads": 0, "attributes": "", "cases": "", "map": ""},
        "pieces": [export_shards.PIECE_ROWS, 1],  # and the version of what is in them
    }
    digest = hashlib.sha256(json.dumps(of, sort_keys=True).encode()).hexdigest()[:16]
    work = root / f".export-{digest}"
    work.mkdir(exist_ok=True)
    handle = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtifactError(f"{work}: another export of this checkpoint is under way; wait for it") from None
        yield work
        for done in root.glob(".export-*"):
            _remove_unused(done, own=done == work)
    finally:
        os.close(handle)


def _remove_unused(work: Path, *, own: bool) -> None:
    """What was done of this version, which is published, and of earlier ones that nobody works on."""
    handle = os.open(work, os.O_RDONLY)
    try:
        if not own:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        remove_folder(work)
    except BlockingIOError:
        pass  # under way
    finally:
        os.close(handle)


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


def _write_vectors(writer: ArtifactWriter, model: Model, config: Config, shared: dict[str, Any], work: Path) -> None:
    """All vector sets: pieces that are not done yet are made, then all are put together."""
    dynamic = [name for name in model.vector_sets() if model.table_of(name) in model.tables.dynamic]
    in_pieces = [name for name in model.vector_sets() if name not in dynamic]
    sets = [whole for name in in_pieces for whole in _stored_sets(model, name, config)]
    pieces = [piece for whole in sets for piece in cut(whole, export_shards.PIECE_ROWS)]
    todo = [piece for piece in pieces if not is_done(piece, work)]
    shards = {"shards_done": len(pieces) - len(todo), "num_shards": len(pieces)}
    if len(todo) < len(pieces):
        text = f"{shards['shards_done']} of {len(pieces)} shards are done and sound"
        report({"kind": "note", "text": text, **shards})
    total = sum(whole.stop for whole in sets)
    done = total - sum(piece.stop - piece.start for piece in todo)
    for i, _ in run_tasks(
        make_piece,
        {**shared, "work": str(work)},
        [asdict(piece) for piece in todo],
        threads=config.export.threads or num_cores(),
        engine=config.cluster.engine,
        address=config.cluster.address,
    ):
        done += todo[i].stop - todo[i].start
        shards["shards_done"] += 1
        _progress(f"{done:,} of {total:,} vectors", done / total, **shards)
    for name in in_pieces:
        for whole, sink in _sinks(writer, model, name, config):
            for piece in cut(whole, export_shards.PIECE_ROWS):
                copy_piece(piece, work, sink)
    for name in dynamic:
        _write_dynamic(writer, model, name, config)


def _map_of(model: Model, name: str) -> RowMap | None:
    """How the ids of a vector set share its rows, None if each has its own.

    Items get a row each, whatever they share in training, since indexes are built of them; users and features keep
    sharing theirs.
    """
    table = model.table_of(name)
    return None if table is None or model.vector_sets()[name] == "item" else model.tables.maps.get(table)


def _stored_sets(model: Model, name: str, config: Config) -> list[Piece]:
    """What is stored of a vector set: its vectors, and the learned weights of its ids' rows if there are any."""
    table, map = model.table_of(name), _map_of(model, name)
    dim = config.model.dim if table is None else model.tables.specs[table].dim
    precision = config.export.precision
    if table is None or map is None:
        normalized = name == "item" and config.model.kind == "two_tower" and config.model.normalize
        return [Piece(name, 0, model.table_rows(name), dim, precision, normalized=normalized)]
    rows = Piece(name, 0, map.rows, dim, precision, table=table)
    weights = Piece(weight_table(name), 0, map.weight_rows, map.weight_width, "fp32", table=weight_table(table))
    return [rows, weights] if map.weight_rows else [rows]


def _sinks(writer: ArtifactWriter, model: Model, name: str, config: Config) -> list[tuple[Piece, VectorSink]]:
    """The sinks of what `_stored_sets` says of a vector set."""
    keys, map = model.vector_sets()[name], _map_of(model, name)
    first, *weights = _stored_sets(model, name, config)
    if map is None:
        sink = writer.add_vectors(
            name, rows=first.stop, dim=first.dim, keys=keys, precision=first.precision, normalized=first.normalized
        )
        return [(first, sink)]
    sink, weight_sink = writer.add_shared_vectors(name, map, dim=first.dim, keys=keys, precision=first.precision)
    found = [(first, sink)]
    if weight_sink is not None:
        found.append((weights[0], weight_sink))
    return found


def _write_dynamic(writer: ArtifactWriter, model: Model, table: str, config: Config) -> None:
    """The rows that ids have, in their order, and behind them the one that all others share."""
    now, dim = model.tables.dynamic[table].trained, model.tables.specs[table].dim
    rows = np.append(now.rows_of_ids, now.rows - 1)
    sink = writer.add_vectors(table, rows=len(rows), dim=dim, keys=table, precision=config.export.precision)
    for start in range(0, len(rows), export_shards.CHUNK_ROWS):
        asked = torch.from_numpy(rows[start : start + export_shards.CHUNK_ROWS])
        sink.write(start, model.tables.physical.lookup({table: asked})[table].numpy())


def _write_indexes(writer: ArtifactWriter, model: Model, config: Config, prepared: Prepared, work: Path) -> None:
    asked = _asked(config, prepared)
    rows = len(prepared.keys["item"].keys)
    for index, vectors, metric in _INDEXES:
        set_name = vectors or model.similar_set
        memory = int(config.export.memory_gib * 2**30)
        _announce(index, rows, _stored_sets(model, set_name, config)[0].dim, config, memory)
        queries: dict[str, Any] = {}
        if asked is not None and index == "recommend":
            queries = {"queries": _query_vectors(model, *asked)}
        elif asked is not None:
            queries = {"query_rows": (_looked_at(asked[0], rows), asked[1])}
        record = writer.add_index(
            index,
            vectors=set_name,
            metric=metric,
            factory=config.export.index,
            recall_target=config.export.recall_target,
            recall_k=config.export.recall_k,
            seed=config.train.seed,
            device=config.export.index_device,
            memory_bytes=memory,
            shards=config.export.index_shards,
            on_progress=lambda text, share, index=index: _progress(f"{index}: {text}", share),  # type: ignore[misc]
            keep=work,
            **queries,
        )
        _tell(index, record)


def _announce(index: str, rows: int, dim: int, config: Config, memory: int) -> None:
    factory, shards = config.export.index, min(rows, config.export.index_shards)
    rows = -(-rows // shards)
    factory = auto_factory(rows, dim, memory) if factory == "auto" else factory
    need = estimate(factory, rows, dim, config.export.threads or num_cores())
    takes = "" if need is None else f": about {_size(need.build_bytes)} while it is built, {need.seconds:,.0f} s"
    each = "" if shards == 1 else f", {shards} times"
    report({"kind": "note", "text": f"index `{index}`, {factory} over {rows:,} x {dim}{each}{takes}"})
    wanted = auto_factory(rows, dim)
    if config.export.index == "auto" and factory != wanted:
        more = num_shards(wanted, rows, dim, memory)
        text = f"{wanted} would take more than export.memory_gib = {config.export.memory_gib:g}"
        text += "" if more is None else f"; export.index_shards = {shards * more} leaves room for it"
        report({"kind": "note", "text": text})


def _tell(index: str, record: dict[str, Any]) -> None:
    recall = record["recall"]
    at = ", ".join(f"{name} {value}" for name, value in record["parameters"].items()) or "exhaustive"
    parts = f" in {len(record['shards'])} shards" if record["shards"] else ""
    text = (
        f"index `{index}`{parts}, {record['factory']}: {_size(record['bytes'])}, "
        f"built in {record['build_seconds']:,.0f} s; "
        f"recall@{recall['k']} {recall['value']:.4f} +- {recall['half_width']:.4f} at {at}, "
        f"on {recall['num_queries']:,} {_SOURCES[recall['queries']]}"
    )
    report({"kind": "note", "text": text})
    if not recall["met"]:
        text = f"warning: index `{index}` does not reach export.recall_target = {recall['target']}"
        report({"kind": "note", "text": f"{text}; name an index with finer codes"})


_SOURCES = {
    "validation": "validation sessions",
    "training": "training sessions",
    "given": "queries",
    "stored": "vectors of its own",
}


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _progress(text: str, share: float, **more: int) -> None:
    report({"kind": "progress", "share": share, "text": text, **more})


def _attributes(prepared: Prepared) -> dict[str, tuple[Codes, list[str]]]:
    """The item features that have one key per item: what the map can be coloured by."""
    names = [name for name, feature in prepared.item_features.items() if feature.kind == "key"]
    return {
        name: attribute(np.asarray(prepared.item_values[name])[: len(prepared.keys["item"].keys)], keys)
        for name in names[:MAX_ATTRIBUTES]
        if isinstance(keys := prepared.keys.get(f"item_{name}"), Vocabulary)  # hashed keys have no names
    }


def _asked(config: Config, prepared: Prepared) -> tuple[Cases, str] | None:
    """Real queries for tuning, and where they come from: validation cases, else training sessions; None without."""
    cases, source = load_validation(config, prepared), "validation"
    if cases is None:
        try:
            cases, source = sample_training(config, prepared, limit=TUNING_QUERIES), "training"
            text = "there are no validation sessions: indexes are tuned on training sessions"
        except DataError as error:
            text = f"warning: no sessions to tune on ({error}): indexes are tuned on stored vectors, not real queries"
        report({"kind": "note", "text": text})
    if cases is None:
        return None
    chosen = np.linspace(0, len(cases) - 1, min(len(cases), TUNING_QUERIES)).astype(np.int64)
    return cases.take(chosen), source


def _query_vectors(model: Model, cases: Cases, source: str) -> Queries | None:
    """The cases through the query tower; None if all are silent."""
    queries = model.encode_queries(cases.history, cases.single).cpu().numpy()
    asking = queries[np.abs(queries).max(1) > 0.0]  # a history of unknown items asks for nothing
    return Queries(asking, source) if len(asking) else None


def _looked_at(cases: Cases, rows: int) -> np.ndarray:
    """The last item of every history, int64 [m]: what `similar` is asked for, as often as it is looked at."""
    history = cases.history
    last = history.values[history.offsets[1:][history.lengths > 0] - 1]
    known: np.ndarray = last[(last >= 0) & (last < rows)]
    return known


def _figures(config: Config) -> dict[str, Any]:
    """The validation figures of the run, for the manifest."""
    try:
        result = json.loads((Path(config.run) / "result.json").read_text())
        return {"validation": result["validations"], "best_epoch": result["best_epoch"]}
    except (OSError, ValueError, KeyError, TypeError):  # a run that goes on has none yet
        return {}
