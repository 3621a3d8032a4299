"""A run that is killed and started again ends where an uninterrupted one does, and no session is lost or doubled."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cluster.config import Config, config_to_dict
from cluster.errors import CheckpointError, DataError, LaunchError
from cluster.launch import launch
from tests.trainers.runs import diary_worker, final_tensors, mortal_worker, small_config, write_sessions
from trainers.checkpoint import CheckpointStore
from trainers.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sessions(tmp_path_factory.mktemp("sessions") / "train.parquet")


def silent(event: dict[str, Any]) -> None:
    """A listener that lets every event pass."""


def run_inline_in_a_process(config: Config, worker: str, **extra: Any) -> int:
    """Exit status of a process of its own that runs a worker of tests/trainers/runs.py inline."""
    code = (
        "import json, sys; from cluster.launch import launch; from tests.trainers import runs; "
        "job = json.loads(sys.argv[1]); "
        "launch(getattr(runs, sys.argv[2]), job, workers=1, storage=job['run'], threads=1, on_event=lambda e: None)"
    )
    job = json.dumps(config_to_dict(config) | extra)
    return subprocess.run([sys.executable, "-c", code, job, worker], check=False, timeout=120).returncode


def test_killed_workers_end_bit_equal(data: Path, tmp_path: Path) -> None:
    shared = {"item": {"map": "head_tail", "compression": 1.5, "learned_weights": True}}
    sections: dict[str, Any] = {"model": {"kind": "two_tower", "hidden": [8]}, "tables": shared}
    calm = small_config(tmp_path / "calm", data, cluster={"workers": 2}, **sections)
    train(calm, on_event=silent)
    steps = json.loads((tmp_path / "calm" / "result.json").read_text())["steps"]
    random = np.random.default_rng(7)
    deaths = [[int(random.integers(2)), int(step)] for step in random.choice(np.arange(1, steps), 5, replace=False)]
    graves = tmp_path / "graves"
    graves.mkdir()
    killed = small_config(tmp_path / "killed", data, cluster={"workers": 2, "max_failures": 5}, **sections)
    Path(killed.run).mkdir()
    launch(
        mortal_worker,
        config_to_dict(killed) | {"deaths": deaths, "graves": str(graves)},
        workers=2,
        max_failures=5,
        storage=killed.run,
        threads=1,
        on_event=silent,
    )
    assert len(list(graves.iterdir())) == 5
    assert final_tensors(killed) == final_tensors(calm)


def test_killed_driver_ends_bit_equal(data: Path, tmp_path: Path) -> None:
    calm = small_config(tmp_path / "calm", data)
    train(calm, on_event=silent)
    killed = small_config(tmp_path / "killed", data)
    Path(killed.run).mkdir()
    graves = tmp_path / "graves"
    graves.mkdir()
    random = np.random.default_rng(11)
    steps = json.loads((tmp_path / "calm" / "result.json").read_text())["steps"]
    for step in np.sort(random.choice(np.arange(1, steps), 2, replace=False)).tolist():
        status = run_inline_in_a_process(killed, "mortal_worker", deaths=[[0, step]], graves=str(graves))
        assert status == -9
    train(killed, on_event=silent)
    assert final_tensors(killed) == final_tensors(calm)


@pytest.mark.parametrize("nth", [1, 4, 7, 10])
def test_killed_while_a_checkpoint_is_written(data: Path, tmp_path: Path, nth: int) -> None:
    """By SIGKILL before the n-th rename of a process that writes a checkpoint with every step."""
    calm = small_config(tmp_path / "calm", data, train={"epochs": 2})
    train(calm, on_event=silent)
    killed = small_config(tmp_path / "killed", data, train={"epochs": 2})
    Path(killed.run).mkdir()
    assert run_inline_in_a_process(killed, "worker_dying_at_a_rename", nth=nth) == -9
    train(killed, on_event=silent)
    assert final_tensors(killed) == final_tensors(calm)
    assert not [path for path in CheckpointStore(killed.run).folder.iterdir() if path.name.startswith(".")]


def test_every_session_once_over_two_one_and_three_workers(data: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run",
        data,
        data={"user": "user", "holdout": "none"},
        model={"kind": "two_tower", "query": ["user"], "examples": "last_item"},
        train={"epochs": 2, "batch_size": 8, "checkpoint_seconds": 0.0},
        tables={"user": {"map": "hashed", "rows": 100}},
    )
    Path(config.run).mkdir()
    lives = []
    for life, (workers, last_step) in enumerate(((2, 25), (1, 50), (3, 0))):
        diary = tmp_path / f"life-{life}"
        diary.mkdir()
        job = config_to_dict(config) | {"diary": str(diary), "last_step": last_step}
        store = CheckpointStore(config.run)
        chosen = store.choose()
        first = chosen[1]["progress"]["step"] if chosen else 0
        if workers == 1:
            assert run_inline_in_a_process(config, "diary_worker", diary=str(diary), last_step=last_step) == -9
        else:
            try:
                launch(
                    diary_worker, job, workers=workers, max_failures=0, storage=config.run, threads=1, on_event=silent
                )
            except LaunchError:
                assert last_step
        lives.append((first, diary))
    firsts = [first for first, _ in lives]
    assert firsts[0] == 0 < firsts[1] < 25 <= firsts[2] <= 50  # each life goes on inside an epoch of the one before
    trained: Counter[int] = Counter()
    ends = [first for first, _ in lives[1:]] + [10**9]
    for (_, diary), end in zip(lives, ends, strict=True):
        for file in diary.glob("rank-*.jsonl"):
            for line in file.read_text().splitlines():
                entry = json.loads(line)
                if entry["step"] <= end:  # later steps were lost with the process, and trained again
                    trained.update(entry["users"])
    assert set(trained) == set(range(600))
    assert set(trained.values()) == {2}  # once in each of the two epochs


class TestRefusedCheckpoints:
    @pytest.fixture
    def run(self, data: Path, tmp_path: Path) -> Config:
        config = small_config(tmp_path / "run", data, train={"epochs": 2})
        train(config, on_event=silent)
        return config

    def test_damaged_one_is_named_and_the_one_before_is_used(self, run: Config, data: Path) -> None:
        store = CheckpointStore(run.run)
        before, last = store.names()[-2:]
        tensors = next((store.folder / last).glob("*.distcp"))
        tensors.write_bytes(tensors.read_bytes()[:-7] + b"garbage")
        notes = []
        longer = small_config(Path(run.run), data, train={"epochs": 3})
        train(longer, on_event=lambda event: notes.append(event.get("text", "")))
        assert any(f"{last}: file {tensors.name} is damaged" in note and before in note for note in notes)
        assert json.loads((Path(run.run) / "result.json").read_text())["epochs"] == 3

    def test_damaged_key_maps_come_back_from_the_checkpoint(self, run: Config, data: Path) -> None:
        prepared = Path(run.run) / "prepared"
        (prepared / "item.arrow").write_bytes(b"garbage")
        (prepared / "prepared.json").write_text("{}")
        result = train(small_config(Path(run.run), data, train={"epochs": 3}), on_event=silent)
        assert result["epochs"] == 3

    def test_refused_settings_leave_the_run_as_it_was(self, run: Config, data: Path) -> None:
        before = (Path(run.run) / "config.toml").read_bytes()
        with pytest.raises(CheckpointError):
            train(small_config(Path(run.run), data, model={"dim": 12}), on_event=silent)
        with pytest.raises(DataError):
            train(small_config(Path(run.run), data.with_name("typo.parquet")), fresh=True, on_event=silent)
        assert (Path(run.run) / "config.toml").read_bytes() == before
        assert CheckpointStore(run.run).names()

    def test_another_metric_chooses_anew(self, run: Config, data: Path) -> None:
        config = small_config(Path(run.run), data, train={"epochs": 3, "metric": "ndcg@10"})
        result = train(config, on_event=silent)
        assert result["best"]["ndcg@10"] == result["validations"][-1]["ndcg@10"]

    def test_all_damaged_is_an_error_and_nothing_is_lost(self, run: Config, data: Path) -> None:
        store = CheckpointStore(run.run)
        for name in store.names():
            (store.folder / name / "tensors.json").unlink()
        with pytest.raises(CheckpointError, match=r"no checkpoint of .* can be used: .*file tensors\.json is missing"):
            train(small_config(Path(run.run), data, train={"epochs": 3}), on_event=silent)
        assert store.names()

    def test_foreign_settings_are_named(self, run: Config, data: Path) -> None:
        other = small_config(Path(run.run), data, model={"dim": 12})
        with pytest.raises(CheckpointError, match=r"model\.dim was 8 and is now 12.*--fresh"):
            train(other, on_event=silent)

    def test_foreign_data_are_refused(self, run: Config, tmp_path: Path) -> None:
        other = write_sessions(tmp_path / "other.parquet", num_sessions=700)
        with pytest.raises(CheckpointError, match="other training data"):
            train(small_config(Path(run.run), other), on_event=silent)

    def test_lost_pointer_is_not_needed(self, run: Config, data: Path) -> None:
        (Path(run.run) / "checkpoints" / "pointer.json").unlink()
        result = train(small_config(Path(run.run), data, train={"epochs": 3}), on_event=silent)
        assert result["epochs"] == 3

    def test_no_pickle_but_torch_weights(self, run: Config) -> None:
        store = CheckpointStore(run.run)
        names = {path.name for path in (store.folder / store.names()[-1]).rglob("*") if path.is_file()}
        assert ".metadata" not in names
        assert "tensors.json" in names


def test_checkpoints_kept(data: Path, tmp_path: Path) -> None:
    config = small_config(
        tmp_path / "run", data, train={"epochs": 4, "keep_checkpoints": 2, "checkpoint_seconds": 60.0}
    )
    train(config, on_event=silent)
    store = CheckpointStore(config.run)
    assert len(store.names()) in (2, 3)  # the last two, and the best where it is neither
    assert store.pointer()["best"] in store.names()
    assert not [path for path in store.folder.iterdir() if path.name.startswith(".")]
    shutil.rmtree(config.run)
