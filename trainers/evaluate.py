"""Reports: the catalogue-wide quality of a run's checkpoint and of what was published from it, by one protocol."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import Config, config_from_dict, config_to_dict, load_config
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from cluster.launch import launch, report
from cluster.rank import Rank, current_rank
from embedding_service.admitted_keys import AdmittedKeys
from embedding_service.artifact import Artifact
from embedding_service.hashed_keys import KeyMap
from embedding_service.retrieval import Retriever
from embedding_service.towers import row_values, with_rows
from trainers.cases import Cases, load_cases, load_validation
from trainers.catalogue import check_ks, evaluate_model
from trainers.checkpoint import CheckpointStore
from trainers.features import Feature
from trainers.metrics import Tally
from trainers.models import Model, build_model
from trainers.prepare import Prepared, load_prepared


def evaluate_artifact(artifact: Artifact, cases: Cases, *, ks: Sequence[int], mask_seen: bool, exact: bool) -> Tally:
    """Every metric @k of a served artifact, by exact search or through its index."""
    retriever = Retriever(artifact, exact=exact)
    tally = Tally(ks, artifact.keys("item").counts)
    for part in _blocks(cases, 2048):
        features = {name: values for name, values in part.single.items() if name != "user"}
        _, ranked = retriever.recommend_rows(
            part.history, part.single.get("user"), features, max(ks), part.history if mask_seen else None
        )
        if ranked.shape[1] < max(ks):
            ranked = np.pad(ranked, ((0, 0), (0, max(ks) - ranked.shape[1])), constant_values=-1)
        tally.add(ranked, part.truth)
    return tally


def _blocks(cases: Cases, size: int) -> Iterator[Cases]:
    for start in range(0, len(cases), size):
        yield cases.take(np.arange(start, min(len(cases), start + size)))


def evaluate(
    path: str, *, cases: str = "", ks: Sequence[int] = (20,), which: str = "best", overrides: Sequence[str] = ()
) -> dict[str, Any]:
    """The report of `lexshard evaluate`: metrics of a run's checkpoint and its published artifact, or of an artifact.

    path: a run's folder, or an artifact's. cases: a file of cases, `valid` for the run's validation cases; empty: the
    run's `data.test`. which: `best` or `last` checkpoint. Returns {"path", "cases", "num_cases", "results": [{"what",
    "search", <metric>: value, "by_frequency": {"0" | "1-5" | "6-20" | ">20": {"items", "recall@k"}}}]}, the last by the
    training interactions of the items that should be found; those outside the vocabulary have 0. Raises LexshardError.
    """
    folder = Path(path)
    if (folder / "config.toml").exists():
        config = load_config(folder / "config.toml", [*overrides, f"run={folder}"])
        prepared = load_prepared(folder)
        keys: Mapping[str, KeyMap] = prepared.key_maps
        features: Mapping[str, Feature] = prepared.query_features
        artifact = Artifact.open(folder / "artifacts") if (folder / "artifacts" / "CURRENT").exists() else None
    elif folder.exists():
        artifact = Artifact.open(folder)
        lineage = artifact.manifest["lineage"]
        if "config" not in lineage:
            raise ArtifactError(f"{path}: its manifest does not say which columns its data had (lineage.config)")
        config = config_from_dict(lineage["config"])
        keys = {name: artifact.key_map(name) for name in artifact.manifest["keys"]}
        features = {block.source: Feature.of(block) for block in artifact.query_tower().spec.inputs}
    else:
        raise CheckpointError(f"{path}: there is no such run or artifact")
    is_run = (folder / "config.toml").exists()
    results: list[dict[str, Any]] = []
    source = cases or config.data.test
    if not source:
        raise SettingError("data.test", "is empty; name a file of cases with `--cases FILE`, or `--cases valid`")
    check_ks(ks, keys["item"].num_keys)
    found = _find_cases(config, keys, features, source)
    if is_run:
        settings = {"config": config_to_dict(config), "source": source, "ks": list(ks), "which": which}
        figures = launch(_evaluate_checkpoint, settings, workers=1, engine="inline", storage=str(folder))
        results.append({"what": f"checkpoint {figures.pop('checkpoint')}", "search": "exact", **figures})
    if artifact is not None:
        served = _as_served(artifact, found) if is_run else found
        for exact in (True, False):
            tally = evaluate_artifact(artifact, served, ks=ks, mask_seen=config.data.mask_seen, exact=exact)
            what = {"what": f"artifact {artifact.version}", "search": "exact" if exact else "index"}
            results.append({**what, **tally.figures(), "by_frequency": tally.by_frequency()})
    return {"path": str(path), "cases": source, "num_cases": len(found), "results": results}


def _as_served(artifact: Artifact, cases: Cases) -> Cases:
    """`cases` of a run's key maps with the rows of the artifact's, which differ where a table is dynamic."""
    single = dict(cases.single)
    for source, values in cases.single.items():
        name = "user" if source == "user" else f"query_{source}"
        keys = artifact.key_map(name) if name in artifact.manifest["keys"] else None
        if isinstance(keys, AdmittedKeys):
            single[source] = with_rows(values, keys.rows_of_ids(row_values(values)))
    return Cases(cases.history, cases.truth, single)


def _find_cases(config: Config, keys: Mapping[str, KeyMap], features: Mapping[str, Feature], source: str) -> Cases:
    if source != "valid":
        return load_cases(config, keys, features, source)
    validation = load_validation(config, load_prepared(config.run))
    if validation is None:
        raise DataError(
            f"{config.run} has no validation cases: it was trained with data.holdout = none and no data.valid"
        )
    return validation


def _evaluate_checkpoint(settings: dict[str, Any]) -> dict[str, Any]:
    config = config_from_dict(settings["config"])
    place = current_rank(config.cluster.device)
    prepared = load_prepared(config.run)
    model, name = load_trained(config, prepared, place, which=settings["which"])
    tally = evaluate_model(
        model,
        _find_cases(config, prepared.key_maps, prepared.query_features, settings["source"]),
        ks=settings["ks"],
        place=place,
        mask_seen=config.data.mask_seen,
        num_candidates=len(prepared.keys["item"].keys),
    )
    return {"checkpoint": name, **tally.figures(), "by_frequency": tally.by_frequency()}


def load_trained(config: Config, prepared: Prepared, place: Rank, *, which: str) -> tuple[Model, str]:
    """The model of a run's checkpoint (`best` or `last`), and the checkpoint's name. Raises CheckpointError."""
    store = CheckpointStore(config.run)
    if not store.names():
        raise CheckpointError(f"{config.run} has no checkpoint yet; run `lexshard train` first")
    model = build_model(config, prepared, device=place.device, threads=torch.get_num_threads())
    progress, warnings = store.resume(model, config, which=which)
    for warning in warnings:
        report({"kind": "note", "text": f"warning: {warning}"})
    return model, progress.name
