"""Sessions in, a measured artifact out: training, export and evaluation of both models on planted groups."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.cli import main
from cluster.config import Config
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from embedding_service.artifact import Artifact
from embedding_service.retrieval import Retriever
from tests.trainers.runs import final_tensors, small_config, write_sessions
from trainers.evaluate import evaluate
from trainers.export import export_run
from trainers.loop import train
from trainers.prepare import load_prepared

MODELS: dict[str, dict[str, dict[str, Any]]] = {
    "item2vec": {"model": {"kind": "item2vec"}, "train": {"epochs": 12, "learning_rate": 0.1}},
    "two_tower": {
        "model": {"kind": "two_tower", "query": ["user", "history"], "examples": "every_item"},
        "data": {"user": "user"},
        "train": {"epochs": 12, "batch_size": 256, "learning_rate": 0.1, "optimizer": "sgd"},
    },
    "item2vec with shared rows": {
        "model": {"kind": "item2vec"},
        "train": {"epochs": 12, "learning_rate": 0.1},
        "tables": {"item": {"map": "quotient_remainder", "compression": 1.5}},
    },
    "two_tower with shared rows": {
        "model": {"kind": "two_tower", "query": ["user", "history"], "examples": "every_item"},
        "data": {"user": "user"},
        "train": {"epochs": 12, "batch_size": 256, "learning_rate": 0.1, "optimizer": "sgd"},
        "tables": {
            "item": {"map": "head_tail", "compression": 1.2, "precision": "fp16"},
            "user": {"map": "hashed", "rows": 300, "vocabulary": False},
        },
    },
    "two_tower with features and hidden layers": {
        "model": {"kind": "two_tower", "query": ["history", "last_item"], "hidden": [16], "share_items": False},
        "data": {"query_features": ["country"], "item_features": "side.parquet"},
        "train": {"epochs": 12, "batch_size": 256, "learning_rate": 0.1, "dense_learning_rate": 0.01},
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planted")
    sessions = pq.read_table(write_sessions(folder / "plain.parquet"))
    first = [items[0] for items in sessions["items"].to_pylist()]
    country = pa.array([None if i % 17 == 0 else f"country {key // 10 % 2}" for i, key in enumerate(first)])
    pq.write_table(sessions.append_column("country", country), folder / "train.parquet")
    keys = np.arange(1000, 1120)
    side = {"item": keys, "category": pa.array([f"category {key // 10}" for key in keys])}
    pq.write_table(pa.table(side), folder / "side.parquet")
    return folder


@pytest.fixture(scope="module", params=MODELS)
def run(request: pytest.FixtureRequest, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    sections = {name: dict(section) for name, section in MODELS[request.param].items()}
    if "item_features" in sections.get("data", {}):
        sections["data"]["item_features"] = str(data / "side.parquet")
    sections["train"] |= {"checkpoint_seconds": 60.0, "metric": "recall@5"}
    config = small_config(tmp_path_factory.mktemp("run") / "run", data / "train.parquet", **sections)
    train(config, on_event=lambda event: None)
    export_run(config.run, on_event=lambda event: None)
    return config


def test_planted_groups_are_learned(run: Config) -> None:
    result = json.loads((Path(run.run) / "result.json").read_text())
    assert result["best"]["recall@5"] > 0.7  # five of the ten items of a group remain; by chance it is .04


def test_neighbours_are_of_the_same_group(run: Config) -> None:
    retriever = Retriever(Artifact.open(Path(run.run) / "artifacts"))
    keys = [1000 + 10 * group for group in range(12)]
    found = retriever.similar(keys, 5).keys
    right = [neighbour // 10 == key // 10 for key, row in zip(keys, found, strict=True) for neighbour in row]
    assert np.mean(right) > 0.8


def test_recommendations_are_of_the_same_group_and_unseen(run: Config) -> None:
    retriever = Retriever(Artifact.open(Path(run.run) / "artifacts"))
    sessions = [[1000 + 10 * group, 1003 + 10 * group] for group in range(12)]
    found = retriever.recommend(sessions, 5)
    right = [key // 10 == session[0] // 10 for session, keys in zip(sessions, found.keys, strict=True) for key in keys]
    assert np.mean(right) > 0.8
    assert not any(set(session) & set(keys) for session, keys in zip(sessions, found.keys, strict=True))


def test_checkpoint_and_artifact_agree(run: Config) -> None:
    report = evaluate(run.run, cases="valid", ks=(5, 20))
    checkpoint, exact, index = report["results"]
    assert report["num_cases"] > 100
    assert checkpoint["what"].startswith("checkpoint step-")
    assert (exact["search"], index["search"]) == ("exact", "index")
    for metric in ("recall@5", "ndcg@20", "mrr@5", "hit_rate@20", "precision@5"):
        assert exact[metric] == pytest.approx(checkpoint[metric], abs=0.01)  # fp16 vectors reorder near ties
        assert index[metric] == pytest.approx(exact[metric], abs=0.05)


def test_manifest_tells_where_it_comes_from(run: Config) -> None:
    manifest = Artifact.open(Path(run.run) / "artifacts").manifest
    assert manifest["lineage"]["checkpoint"].startswith("step-")
    assert manifest["lineage"]["config"]["model"]["dim"] == 8
    assert manifest["figures"]["validation"][-1]["epoch"] == 12
    assert set(manifest["indexes"]) == {"recommend", "similar"}


def test_versions_add_up(run: Config) -> None:
    root = Path(run.run) / "artifacts"
    before = {path.name for path in root.iterdir()}
    version = export_run(run.run, overrides=["export.precision=int8"], on_event=lambda event: None)
    assert version.name not in before
    assert Artifact.open(root).version == version.name
    assert Artifact.open(root).manifest["vectors"]["item"]["precision"] == "int8"


def test_cases_of_a_file(run: Config, data: Path, tmp_path: Path) -> None:
    history = [[1000, 1001, 9999], [1010]]
    columns = {"user": [0, 1], "country": ["country 0", None], "history": history, "items": [[1002], [8888, 1011]]}
    pq.write_table(pa.table(columns), tmp_path / "cases.parquet")
    report = evaluate(run.run, cases=str(tmp_path / "cases.parquet"), ks=(100,))
    for figures in report["results"]:
        assert figures["recall@100"] <= 0.75  # key 8888 is unknown: half of the second case cannot be found


@pytest.fixture(scope="module")
def text_run(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on a column `line` of plain text, whose words are w0, w1... in planted groups of ten."""
    folder = tmp_path_factory.mktemp("text")
    sessions = pq.read_table(write_sessions(folder / "plain.parquet"))["items"].to_pylist()
    lines = ["  ".join(f"w{key - 1000}" for key in keys) + "\n" for keys in sessions]
    pq.write_table(pa.table({"line": lines}), folder / "text.parquet")
    config = small_config(
        folder / "run",
        folder / "text.parquet",
        data={"items": "line", "text": True},
        train={"epochs": 12, "learning_rate": 0.1, "metric": "recall@5", "checkpoint_seconds": 60.0},
    )
    train(config, on_event=lambda event: None)
    return config


def questions(folder: Path) -> list[str]:
    """Options of `lexshard evaluate`: pairs of one group are alike, of two are not; every third line is unknown."""
    alike = [f"w{10 * g} w{10 * g + 1} 9\nw{10 * g} w{(10 * g + 10) % 120} 1\nw{10 * g} nothing 5\n" for g in range(12)]
    (folder / "pairs.txt").write_text("".join(alike))
    (folder / "none.txt").write_text("nothing nobody 1\nnothing nowhere 2\n")
    (folder / "analogies.txt").write_text(": known\nw0 w1 w10 w11\nw0 w1 w2 nothing\n: Unknown\na b c d\n")
    files = ["--word-pairs", "pairs.txt", "--word-pairs", "none.txt", "--analogies", "analogies.txt"]
    return [name if name.startswith("--") else str(folder / name) for name in files]


class TestWords:
    def test_words_are_scored_of_checkpoint_and_artifact(
        self, text_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        export_run(text_run.run, overrides=["export.precision=fp32"], on_event=lambda event: None)
        reports = []
        for path in (text_run.run, f"{text_run.run}/artifacts"):
            assert main(["evaluate", path, "--json", *questions(tmp_path)]) == 0
            reports.append(json.loads(capsys.readouterr().out, parse_constant=pytest.fail))  # NaN is no JSON
        for one, other in zip(*reports, strict=True):
            assert one == {**other, "score": other["score"] and pytest.approx(other["score"])}
        pairs, none, known, unknown = reports[0]
        assert (pairs["what"], pairs["used"], pairs["given"]) == (str(tmp_path / "pairs.txt"), 24, 36)
        assert pairs["score"] > 0.8
        assert (none["score"], none["used"], none["given"]) == (None, 0, 2)
        assert (known["what"], known["used"], known["given"]) == ("known", 1, 2)
        assert known["score"] in (0.0, 1.0)
        assert unknown == {"what": "Unknown", "score": None, "used": 0, "given": 1}

    def test_the_table(self, text_run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", text_run.run, *questions(tmp_path)]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["score", "known"]
        assert rows[0].split()[2:] == ["24", "of", "36"]
        assert float(rows[0].split()[1]) > 0.8
        assert rows[1].split() == [str(tmp_path / "none.txt"), "0", "of", "2"]
        assert rows[3].split() == ["Unknown", "0", "of", "1"]

    @pytest.mark.parametrize("option", [["--cases", "valid"], ["--k", "5"], ["--set", "data.mask_seen=false"]])
    def test_options_without_effect(
        self, text_run: Config, option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["evaluate", text_run.run, *option, *questions(tmp_path)]) == 2
        assert f"{option[0]}: has no effect with --word-pairs or --analogies" in capsys.readouterr().err

    def test_items_that_are_no_words(self, run: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        export_run(run.run, on_event=lambda event: None)
        for path in (run.run, f"{run.run}/artifacts"):
            assert main(["evaluate", path, *questions(tmp_path)]) == 2
            assert f"{path}: its items are int64 keys, not words" in capsys.readouterr().err

    def test_nowhere(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["evaluate", str(tmp_path / "nowhere"), *questions(tmp_path)]) == 2
        assert f"{tmp_path}/nowhere: there is no such run or artifact" in capsys.readouterr().err

    def test_planted_groups_of_words_are_learned(self, text_run: Config) -> None:
        result = json.loads((Path(text_run.run) / "result.json").read_text())
        assert result["best"]["recall@5"] > 0.7
        keys = load_prepared(text_run.run).keys["item"].keys.to_pylist()
        assert sorted(keys) == sorted(f"w{i}" for i in range(120))


class TestMistakes:
    def test_evaluate_without_cases(self, run: Config) -> None:
        with pytest.raises(SettingError, match=r"data\.test: is empty; name a file of cases with `--cases FILE`"):
            evaluate(run.run)

    def test_evaluate_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="there is no such run or artifact"):
            evaluate(str(tmp_path / "nowhere"))

    def test_export_before_training(self, tmp_path: Path, data: Path) -> None:
        with pytest.raises(CheckpointError, match=r"is not a run of `lexshard train`"):
            export_run(tmp_path)

    def test_train_without_data(self, tmp_path: Path) -> None:
        with pytest.raises(SettingError, match=r"data\.train: is empty; name a file"):
            train(small_config(tmp_path / "run", Path(), data={"train": ""}), on_event=lambda event: None)

    def test_user_without_column(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet", model={"kind": "two_tower", "query": ["user"]})
        with pytest.raises(SettingError, match=r"model\.query: asks for the user, but data\.user names no column"):
            train(config, on_event=lambda event: None)

    def test_min_count_leaves_nothing(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet", keys={"min_count": 10**6})
        with pytest.raises(DataError, match=r"lower keys\.min_count"):
            train(config, on_event=lambda event: None)

    def test_unknown_metric(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet", train={"metric": "recal@20"})
        with pytest.raises(SettingError, match=r"train\.metric.*did you mean recall@20"):
            train(config, on_event=lambda event: None)

    def test_divergence_is_told(self, tmp_path: Path, data: Path) -> None:
        config = small_config(
            tmp_path / "run",
            data / "train.parquet",
            model={"kind": "two_tower", "normalize": False},
            train={"optimizer": "sgd", "learning_rate": 1e6},
        )
        with pytest.raises(SettingError, match=r"train\.learning_rate: the loss is not a finite number at step \d"):
            train(config, on_event=lambda event: None)

    @pytest.mark.parametrize("kind", ["item2vec", "two_tower"])
    def test_nothing_to_train_on(self, tmp_path: Path, kind: str) -> None:
        pq.write_table(pa.table({"items": [[1], [2], [3], []]}), tmp_path / "singles.parquet")
        config = small_config(
            tmp_path / "run", tmp_path / "singles.parquet", model={"kind": kind}, data={"holdout": "none"}
        )
        with pytest.raises(DataError, match=r"singles\.parquet: there is nothing to train on"):
            train(config, on_event=lambda event: None)

    def test_absurd_k(self, run: Config) -> None:
        with pytest.raises(SettingError, match="1000000000 is more than the catalogue's 120 items"):
            evaluate(run.run, cases="valid", ks=(10**9,))

    def test_damaged_artifact(self, run: Config, tmp_path: Path) -> None:
        version = export_run(run.run, out=tmp_path / "artifacts", on_event=lambda event: None)
        vectors = version / "vectors" / "item.npy"
        vectors.write_bytes(vectors.read_bytes()[:-1] + b"\0\1"[-1:])
        with pytest.raises(ArtifactError, match=r"item\.npy"):
            Artifact.open(tmp_path / "artifacts")


class TestLoop:
    def test_early_stop_keeps_the_best(self, tmp_path: Path, data: Path) -> None:
        config = small_config(
            tmp_path / "run",
            data / "train.parquet",
            train={"epochs": 40, "patience": 1, "learning_rate": 0.0, "checkpoint_seconds": 60.0},
        )
        result = train(config, on_event=lambda event: None)
        assert result["stopped_early"]
        assert result["epochs"] == 2
        assert result["best_epoch"] == 1

    def test_metrics_are_written(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet")
        events: list[dict[str, Any]] = []
        train(config, on_event=events.append)
        lines = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
        assert {line["kind"] for line in lines} == {"progress", "validation"}
        assert [event for event in events if event["kind"] == "validation"] == [
            line for line in lines if line["kind"] == "validation"
        ]
        assert list((Path(config.run) / "tensorboard").glob("events.*"))
        steps = [line for line in lines if line["kind"] == "progress"]
        assert steps[0]["rate"] == 1.0
        assert steps[-1]["rate"] < 0.1  # the linear decay reaches the model
        assert np.mean([line["loss"] for line in steps[-5:]]) < np.mean([line["loss"] for line in steps[:5]])

    def test_nothing_left_to_do(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet", train={"epochs": 1})
        first = train(config, on_event=lambda event: None)
        notes: list[str] = []
        second = train(config, on_event=lambda event: notes.append(event.get("text", "")))
        assert second["steps"] == first["steps"]
        assert any("nothing left to do; raise train.epochs" in note for note in notes)

    @pytest.mark.parametrize("architecture", ["skipgram", "cbow"])
    def test_threads_are_reproducible(self, tmp_path: Path, data: Path, architecture: str) -> None:
        def tables(name: str, threads: int) -> dict[str, str]:
            config = small_config(
                tmp_path / name,
                data / "train.parquet",
                model={"architecture": architecture},
                train={"threads": threads, "epochs": 1, "validate_every": 0},
            )
            train(config, on_event=lambda event: None)
            return final_tensors(config)

        assert tables("first", 2) == tables("second", 2)
        assert tables("first", 2) != tables("alone", 1)

    def test_fresh_starts_over(self, tmp_path: Path, data: Path) -> None:
        train(small_config(tmp_path / "run", data / "train.parquet", train={"epochs": 2}), on_event=lambda event: None)
        other = small_config(tmp_path / "run", data / "train.parquet", model={"dim": 12}, train={"epochs": 1})
        assert train(other, fresh=True, on_event=lambda event: None)["epochs"] == 1

    def test_unknown_row_is_trained(self, tmp_path: Path, data: Path) -> None:
        config = small_config(tmp_path / "run", data / "train.parquet", keys={"min_count": 30, "unknown": "row"})
        train(config, on_event=lambda event: None)
        artifact = Artifact.open(export_run(config.run, on_event=lambda event: None))
        vectors = artifact.vectors("item")
        assert vectors.rows == len(artifact.keys("item").keys) + 1
        assert np.abs(vectors.take(np.array([vectors.rows - 1]))).max() > 0.01
        found = Retriever(artifact).recommend([[1000, 1001]], 200).rows
        assert found.max() < vectors.rows - 1
