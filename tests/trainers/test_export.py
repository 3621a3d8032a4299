"""Export in pieces: the same bytes as the model's, from any number of shards, and after a kill."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cluster.config import Config, config_to_dict
from cluster.errors import ArtifactError, CheckpointError
from cluster.launch import launch
from cluster.rank import current_rank
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.retrieval import Retriever
from embedding_service.tables import TableSpec
from tests.ranks import run_on_ranks
from tests.trainers.runs import small_config, write_sessions
from trainers import checkpoint_tensors, export, export_shards
from trainers.checkpoint import CheckpointStore, Progress
from trainers.evaluate import load_trained
from trainers.export import export_run
from trainers.loop import train
from trainers.models import build_model
from trainers.prepare import load_prepared
from trainers.stored_tables import StoredTables

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A two-tower run with item features and hidden layers: its item vectors are computed, not copied."""
    folder = tmp_path_factory.mktemp("export")
    write_sessions(folder / "train.parquet", num_sessions=300)
    items = [1000 + i for i in range(120)]
    side = {"item": items, "shelf": [i % 7 for i in items], "price": [float(i) for i in items]}
    pq.write_table(pa.table(side), folder / "items.parquet")
    config = small_config(
        folder / "run",
        folder / "train.parquet",
        data={"item_features": str(folder / "items.parquet")},
        model={"kind": "two_tower", "hidden": [12], "share_items": False},
        train={"epochs": 1},
    )
    train(config, on_event=lambda event: None)
    return config


def _export(run: Config, out: Path, *overrides: str) -> tuple[Path, list[dict[str, Any]]]:
    events: list[dict[str, Any]] = []
    return export_run(run.run, out=out, overrides=["export.index=Flat", *overrides], on_event=events.append), events


def _notes(events: list[dict[str, Any]]) -> str:
    return "\n".join(event["text"] for event in events if event["kind"] == "note")


def _by_the_trained_model(settings: dict[str, Any]) -> Any:
    from cluster.config import config_from_dict

    config = config_from_dict(settings)
    model, _ = load_trained(config, load_prepared(config.run), current_rank("cpu"), which="best")
    return {name: model.vectors(name, 0, model.table_rows(name)).tolist() for name in model.vector_sets()}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_pieces_add_up_to_the_model(
    run: Config, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = _export(run, tmp_path / "whole", f"export.precision={precision}")
    monkeypatch.setattr(export_shards, "PIECE_ROWS", 50)
    monkeypatch.setattr(export_shards, "CHUNK_ROWS", 16)
    pieces, events = _export(run, tmp_path / "pieces", f"export.precision={precision}", "export.threads=3")
    sums = [json.loads((path / "manifest.json").read_text())["files"] for path in (whole, pieces)]
    vectors = [{name: entry for name, entry in one.items() if name.startswith("vectors/")} for one in sums]
    if precision == "int8":
        assert {"vectors/item.npy", "vectors/item.scale.npy", "vectors/history.npy"} <= set(vectors[0])
    assert [set(one) for one in vectors] == [set(vectors[0])] * 2
    for name in ("item", "history"):
        found = [Artifact.open(path).vectors(name).take(np.arange(120)) for path in (whole, pieces)]
        np.testing.assert_allclose(found[0], found[1], atol=1e-6 if precision == "fp32" else 0.01)
    shares = [event["share"] for event in events if event["kind"] == "progress" and "vectors" in event["text"]]
    assert shares == sorted(shares)
    assert len(shares) == 6
    assert shares[-1] == 1.0
    assert not list((tmp_path / "pieces").glob(".*"))
    if precision == "fp32":
        trained = launch(_by_the_trained_model, config_to_dict(run), workers=1, engine="inline", storage=str(tmp_path))
        for name, rows in trained.items():
            stored = Artifact.open(whole).vectors(name)
            np.testing.assert_allclose(stored.take(np.arange(stored.rows)), rows, atol=1e-6)


def test_shared_rows_and_learned_weights_are_made_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of tables whose ids share rows are the checkpoint's rows, the weights as fp32 of their own width."""
    source = write_sessions(tmp_path / "train.parquet", num_sessions=300)
    tables: dict[str, Any] = {
        "item": {"map": "head_tail", "compression": 1.5, "learned_weights": True},
        "user": {"map": "hashed", "rows": 70, "hashes": 3, "learned_weights": True, "vocabulary": False, "dim": 12},
    }
    config = small_config(
        tmp_path / "run",
        source,
        data={"user": "user"},
        model={"kind": "two_tower", "query": ["history", "user"], "hidden": [12]},
        train={"epochs": 1},
        tables=tables,
    )
    train(config, on_event=lambda event: None)
    monkeypatch.setattr(export_shards, "PIECE_ROWS", 50)
    monkeypatch.setattr(export_shards, "CHUNK_ROWS", 16)
    version, _ = _export(config, tmp_path / "out", "export.precision=int8")
    artifact = Artifact.open(version)
    model = launch(_physical_rows, config_to_dict(config), workers=1, engine="inline", storage=str(tmp_path))
    for name, precision, atol in (("user", "int8", 0.01), ("weights_user", "fp32", 0.0), ("item", "int8", 0.01)):
        stored = artifact.vectors(name)
        assert stored.precision == precision
        rows = np.array(model[name], np.float32)
        np.testing.assert_allclose(stored.take(np.arange(stored.rows)), rows, rtol=0.0, atol=atol)
    assert np.abs(model["weights_user"]).max() > 0
    assert artifact.vectors("user").dim == 12
    assert artifact.vectors_by_id("user").rows == 2**62


def _physical_rows(settings: dict[str, Any]) -> Any:
    from cluster.config import config_from_dict

    config = config_from_dict(settings)
    model, _ = load_trained(config, load_prepared(config.run), current_rank("cpu"), which="best")
    tables = {name: model.tables.local_shards(name)[0][1].tolist() for name in ("user", "weights_user")}
    return tables | {"item": model.vectors("item", 0, 120).tolist()}


_KILLED = """
import os, signal, sys
from pathlib import Path
from trainers import export, export_shards
export_shards.PIECE_ROWS = 30
made, make = [], export_shards.make_piece
def mortal(settings, task):
    if len(made) == 3:
        work = Path(settings["work"]); (work / "item-000000000090.npy").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    made.append(make(settings, task))
export.make_piece = mortal
export.export_run(sys.argv[1], out=sys.argv[2], overrides=["export.index=Flat", "export.threads=1"])
"""


def test_a_killed_export_goes_on_where_it_was(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of eight pieces are done, one of them is damaged afterwards: six are made."""
    out = tmp_path / "out"
    command = [sys.executable, "-c", _KILLED, run.run, str(out)]
    killed = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (work,) = out.glob(".export-*")
    done = sorted(work.glob("*-*.json"))
    assert len(done) == 3
    damaged = done[1].with_suffix(".npy")
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0")
    assert not (out / "CURRENT").exists()

    monkeypatch.setattr(export_shards, "PIECE_ROWS", 30)
    made: list[Any] = []

    def counted(settings: Any, task: Any) -> None:
        made.append(task)
        export_shards.make_piece(settings, task)

    monkeypatch.setattr(export, "make_piece", counted)
    resumed, events = _export(run, out, "export.threads=1")
    assert "2 of 8 shards are done and sound" in _notes(events)
    assert len(made) == 6
    assert not list(out.glob(".*")), "what was kept is removed with the version's publication"
    monkeypatch.undo()
    fresh, _ = _export(run, tmp_path / "fresh", "export.threads=1")
    for name in ("item", "history"):
        rows = [Artifact.open(path).vectors(name).take(np.arange(120)) for path in (resumed, fresh)]
        np.testing.assert_allclose(*rows, atol=1e-3)


def test_a_finished_index_is_kept_too(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: ArtifactWriter, **options: Any) -> Path:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(ArtifactWriter, "publish", full_disk)
        with pytest.raises(OSError, match="no space left"):
            _export(run, tmp_path)
    (work,) = tmp_path.glob(".export-*")
    (work / "similar.faiss").write_bytes(b"damaged")
    built: list[str] = []
    original = Artifact.index

    from embedding_service import artifact_writer as writer_module

    tuned = writer_module.tuned_index

    def counted(*arguments: Any, **options: Any) -> Any:
        built.append(options["metric"])
        return tuned(*arguments, **options)

    monkeypatch.setattr(writer_module, "tuned_index", counted)
    version, _ = _export(run, tmp_path)
    assert built == ["cosine"], "`similar` is damaged and built again, `recommend` is not"
    for name in ("recommend", "similar"):
        assert original(Artifact.open(version), name).rows == 120


def test_indexes_in_shards_answer_as_in_one_piece(run: Config, tmp_path: Path) -> None:
    whole, _ = _export(run, tmp_path / "whole")
    parts, events = _export(run, tmp_path / "parts", "export.index_shards=3")
    opened = [Artifact.open(version) for version in (whole, parts)]
    assert [len(one.index_ranges("recommend")) for one in opened] == [1, 3]
    assert re.search(r"^index `recommend`, Flat over 40 x \d+, 3 times: about", _notes(events), re.MULTILINE)
    assert re.search(r"^index `recommend` in 3 shards, Flat: .* recall@20 1\.0000", _notes(events), re.MULTILINE)
    keys = opened[0].keys("item").keys.to_pylist()
    found = [Retriever(one, threads=1).similar(keys, 50) for one in opened]
    np.testing.assert_array_equal(found[1].rows, found[0].rows)
    np.testing.assert_array_equal(found[1].scores, found[0].scores)


def test_other_settings_start_anew_and_what_is_left_is_cleared(run: Config, tmp_path: Path) -> None:
    stale = tmp_path / ".export-0123456789abcdef"
    stale.mkdir(parents=True)
    (stale / "item-000000000000.npy").write_bytes(b"old")
    _export(run, tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_two_exports_of_one_checkpoint_do_not_mix(run: Config, tmp_path: Path) -> None:
    config = export.load_config(Path(run.run) / "config.toml", [f"run={run.run}"])
    folder = CheckpointStore(run.run).folder / CheckpointStore(run.run).names()[-1]
    with export._work_folder(tmp_path, folder, config) as work:
        with (
            pytest.raises(ArtifactError, match="another export of this checkpoint is under way"),
            export._work_folder(tmp_path, folder, config),
        ):
            raise AssertionError("entered")
        assert work.exists()
    assert not work.exists()


def test_indexes_are_tuned_on_real_queries(run: Config, tmp_path: Path) -> None:
    version, events = _export(run, tmp_path, "export.index=HNSW8")
    indexes = Artifact.open(version).manifest["indexes"]
    assert {name: entry["recall"]["queries"] for name, entry in indexes.items()} == {
        "recommend": "validation",
        "similar": "validation",
    }
    assert all(entry["curve"] for entry in indexes.values())
    assert "index `recommend`, HNSW8 over 120 x 8: about" in _notes(events)
    assert "validation sessions" in _notes(events)


def test_without_validation_training_sessions_are_the_queries(tmp_path: Path) -> None:
    source = write_sessions(tmp_path / "train.parquet", num_sessions=200)
    config = small_config(tmp_path / "run", source, data={"holdout": "none"}, train={"epochs": 1})
    train(config, on_event=lambda event: None)
    version, events = _export(config, tmp_path / "out")
    indexes = Artifact.open(version).manifest["indexes"]
    assert {entry["recall"]["queries"] for entry in indexes.values()} == {"training"}
    assert "no validation sessions: indexes are tuned on training sessions" in _notes(events)
    source.unlink()
    version, events = _export(config, tmp_path / "out")
    indexes = Artifact.open(version).manifest["indexes"]
    assert {entry["recall"]["queries"] for entry in indexes.values()} == {"stored"}
    assert "indexes are tuned on stored vectors, not real queries" in _notes(events)


def _save_on_two(settings: dict[str, Any]) -> torch.Tensor:
    from cluster.config import config_from_dict

    config = config_from_dict(settings)
    model = build_model(config, load_prepared(config.run), device=torch.device("cpu"), threads=1)
    checkpoint_tensors._PIECE_BYTES = 20 * 8 * 2  # 20 rows: three pieces of each shard
    CheckpointStore(config.run).save(model, Progress(step=999_999), config)
    return model.vectors("item", 0, 120)


def test_a_checkpoint_of_two_shards_is_read_as_one(run: Config, tmp_path: Path) -> None:
    """Rows of both, in any order; damaged and foreign files are refused by name."""
    import shutil

    shutil.copytree(run.run, tmp_path / "run")
    config = small_config(tmp_path / "run", Path("x"), model={"kind": "item2vec", "precision": "fp16"})
    expected = run_on_ranks(2, _save_on_two, config_to_dict(config))[0]
    folder = CheckpointStore(config.run).folder / Progress(step=999_999).name
    assert len(list(folder.glob("*.distcp"))) == 2
    specs = [TableSpec("output", 120, 8, 0.0, "fp16"), TableSpec("input", 120, 8, 0.0, "fp16")]
    rows = torch.tensor([119, 0, 59, 60, 61, 3, 3])
    found = StoredTables(folder, specs).lookup({"output": rows, "input": rows})
    assert torch.equal(found["output"], expected[rows])
    assert found["input"].dtype == torch.float32
    assert found["input"].abs().max() > 0
    with pytest.raises(CheckpointError, match=r"table input is \[120, 8\], not \[121, 8\]"):
        StoredTables(folder, [TableSpec("input", 121, 8, 0.0)])
    with pytest.raises(CheckpointError, match="its tables cannot be read"):
        StoredTables(folder, [TableSpec("other", 120, 8, 0.0)])
    described = json.loads((folder / "tensors.json").read_text())
    assert len([place for place in described["places"] if place["tensor"] == "tables.weight.output"]) == 6
    for lost, problem in ((100, "end at row 100 of 120"), (60, "do not follow each other at row 60")):
        described["places"] = [place for place in described["places"] if place["chunk_offset"] != [lost, 0]]
        (folder / "tensors.json").write_text(json.dumps(described))
        with pytest.raises(CheckpointError, match=f"shards of table output {problem}"):
            StoredTables(folder, specs)
