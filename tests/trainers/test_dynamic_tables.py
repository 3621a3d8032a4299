"""Dynamic tables from training to serving: the numbers of exact ones, rows that are handed on as new, the same keys in
them for any number of workers and across a resume, and served as they were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest
import torch

from cluster.config import Config, config_to_dict
from cluster.errors import SettingError
from cluster.rank import current_rank, process_group
from embedding_service.artifact import Artifact
from embedding_service.dynamic_rows import DynamicRows
from embedding_service.hashed_keys import NUM_IDS, HashedKeys
from embedding_service.mapped_tables import MappedTables
from embedding_service.ragged import Ragged
from embedding_service.retrieval import Retriever
from embedding_service.row_maps import RowMap
from embedding_service.tables import Optimizer, Precision, TableSpec, initial_rows
from tests.ranks import run_on_ranks
from tests.trainers.runs import final_tensors, small_config, write_sessions
from tests.trainers.test_resume import run_inline_in_a_process
from trainers import loop
from trainers.evaluate import evaluate, load_trained
from trainers.export import export_run
from trainers.loop import train, train_worker
from trainers.prepare import load_prepared, open_reader

DIM, ROWS = 8, 12
SPEC = TableSpec("t", NUM_IDS, DIM, 0.5)
OLD, HOT = np.arange(11) * 10**15, np.arange(20, 31) * 10**15


def tables_of(optimizer: Optimizer, precision: Precision = "fp32", *, exact: bool = False) -> MappedTables:
    rows = ROWS if exact else NUM_IDS
    map = RowMap.exact(ROWS) if exact else RowMap("dynamic", NUM_IDS, ROWS, eviction="lru")
    spec = TableSpec("t", rows, DIM, 0.5, precision)
    return MappedTables([spec], {"t": map}, optimizer=optimizer, learning_rate=0.1, seed=3)


def step(tables: MappedTables, ids: np.ndarray) -> torch.Tensor:
    """One update of the distinct `ids`; their vectors before it."""
    vectors = tables.lookup(tables.route({"t": torch.from_numpy(ids)}))["t"]
    ((vectors - 1.0).square() * torch.arange(1, len(ids) + 1)[:, None]).sum().backward()
    return vectors.detach()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("optimizer", ["rowwise_adagrad", "adagrad", "sgd"])
def test_vectors_are_those_of_an_exact_table_and_a_row_is_handed_on_as_new(
    optimizer: Optimizer, precision: Precision
) -> None:
    with process_group("cpu"):
        dynamic, exact = tables_of(optimizer, precision), tables_of(optimizer, precision, exact=True)
        dynamic.learn({"t": OLD}, (0, 0))
        for _ in range(3):
            rows = dynamic.dynamic["t"].find_ahead(OLD)
            assert sorted(rows.tolist()) == list(range(ROWS - 1))
            assert torch.equal(step(dynamic, OLD), step(exact, rows))
        dynamic.learn({"t": HOT[:4]}, (0, 1))
        fresh = tables_of(optimizer, precision, exact=True)
        handed_on = dynamic.dynamic["t"].find_ahead(HOT[:4])
        assert (handed_on < ROWS - 1).all()
        for number in range(3):  # no trace of the former owners, in rows or in the optimiser's state
            found = step(dynamic, HOT[:4])
            assert torch.equal(found, step(fresh, handed_on)), number
            if not number:
                first = np.concatenate(
                    [initial_rows(dynamic.specs["t"], 3, row, row + 1) for row in handed_on.tolist()]
                )
                assert torch.equal(
                    found, torch.from_numpy(first).to(found.dtype if precision == "fp32" else torch.half).float()
                )
        gone = dynamic.evicted()["t"]
        assert len(gone) == 4
        assert dynamic.evicted() == {}
        stayed = np.setdiff1d(OLD, gone)
        with torch.no_grad():
            kept = dynamic.lookup({"t": torch.from_numpy(stayed)})["t"]
            now = torch.from_numpy(dynamic.dynamic["t"].trained.find(stayed))
            assert torch.equal(kept, exact.lookup({"t": now})["t"])


def test_ids_without_a_row_share_the_last_one_and_its_gradient() -> None:
    with process_group("cpu"):
        dynamic, exact = tables_of("sgd"), tables_of("sgd", exact=True)
        dynamic.learn({"t": OLD[:2]}, (0, 0))
        strangers = np.array([7, 8, 9])
        asked = np.concatenate([strangers, OLD[:2]])
        found = step(dynamic, asked)
        shared = exact.lookup({"t": torch.tensor([ROWS - 1])})["t"]
        assert torch.equal(found[:3], shared.detach().expand(3, DIM))
        ((shared - 1.0).square() * (1 + 2 + 3)).sum().backward()
        with torch.no_grad():
            after = dynamic.lookup({"t": torch.from_numpy(strangers)})["t"]
            torch.testing.assert_close(after[1:2], exact.lookup({"t": torch.tensor([ROWS - 1])})["t"])
        assert dynamic.known("t", asked).tolist() == [-1, -1, -1, *OLD[:2].tolist()]
        assert dynamic.occupancy() == {"t": {"occupied": 2, "admitted": 2, "evicted": 0}}


USERS, COUNTRIES = 23, 5


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """600 sessions of 160 users, few of whom have many, with a list of countries."""
    folder = tmp_path_factory.mktemp("planted")
    sessions = pq.read_table(write_sessions(folder / "plain.parquet"))
    random = np.random.default_rng(1)
    users = [f"user {int(number)}" for number in np.minimum(random.zipf(1.4, 600), 400)]
    visited = [[f"country {c}" for c in np.minimum(random.zipf(1.5, n), 40)] for n in random.integers(0, 3, 600)]
    table = pa.table({"user": pa.array(users), "items": sessions["items"], "country": pa.array(visited)})
    pq.write_table(table, folder / "train.parquet", row_group_size=120)
    return folder / "train.parquet"


def config_of(folder: Path, source: Path, /, **sections: Any) -> Config:
    tree: dict[str, Any] = {
        "data": {"user": "user", "query_features": ["country"]},
        "model": {"kind": "two_tower", "query": ["history", "user"], "history_length": 5},
        "train": {"batch_size": 32, "epochs": 3, "learning_rate": 0.1, "checkpoint_seconds": 60.0},
        "export": {"precision": "fp32"},
        "tables": {
            "user": {"map": "dynamic", "rows": USERS, "eviction": "lru"},
            "query_country": {"map": "dynamic", "rows": COUNTRIES, "admission": 1},
        },
    }
    for name, section in sections.items():
        tree[name] = {**tree.get(name, {}), **section}
    return small_config(folder, source, **tree)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = config_of(tmp_path_factory.mktemp("run") / "run", data)
    train(config, on_event=lambda event: None)
    export_run(config.run, which="last", on_event=lambda event: None)
    return config


def slots_of(config: Config) -> dict[str, dict[str, torch.Tensor]]:
    with process_group("cpu"):
        model, _ = load_trained(config, load_prepared(config.run), current_rank("cpu"), which="last")
        return {name: rows.trained.copy().to_dict() for name, rows in model.tables.dynamic.items()}


def test_who_has_a_row_follows_from_the_sessions(run: Config) -> None:
    """Replayed: the users of every window are learned once, in the order of the windows."""
    prepared, rows = load_prepared(run.run), DynamicRows(USERS, eviction="lru", admission=2)
    reader = open_reader(run)
    gone: set[int] = set()
    for epoch in range(3):
        for window, batch in reader.windows(epoch):
            sessions = prepared.rows(loop.holdout_of(run, reader.num_sessions).training(batch))
            assert sessions.user is not None
            rows.learn(sessions.user[sessions.items.lengths > 0], (epoch, window))
            news = rows.news()
            assert news is not None
            gone |= set(rows.adopt(news)[0].tolist())
    wanted, found = rows.trained.to_dict(), slots_of(run)["user"]
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    result = json.loads((Path(run.run) / "result.json").read_text())
    (user,) = (one for one in result["tables"] if one["table"] == "user")
    assert user["occupied"] == USERS - 1
    assert (user["admitted"], user["evicted"]) == (rows.trained.num_admitted, rows.trained.num_evicted)
    assert user["evicted"] > 20
    with pa.ipc.open_file(Artifact.open(Path(run.run) / "artifacts").path / "keys" / "user.evicted.arrow") as file:
        evicted = file.read_all()
    assert set(evicted["ids"].to_pylist()) == gone - set(rows.trained.ids.tolist())
    assert len(evicted) > 5
    np.testing.assert_array_equal(HashedKeys("string").rows(evicted["keys"]), evicted["ids"])


def test_served_as_trained(run: Config, data: Path, tmp_path: Path) -> None:
    artifact = Artifact.open(Path(run.run) / "artifacts")
    prepared, served = load_prepared(run.run), artifact.key_map("user")
    keys = ["user 1", "user 2", "a stranger", None, "user 1"]
    rows = served.rows(keys)
    assert served.num_keys == USERS - 1
    assert rows[[2, 3]].tolist() == [USERS - 1, -1]
    assert rows[0] == rows[4] < USERS - 1
    countries = Ragged.from_lists([[0], [0, 1], [], [1], [2, 3]])
    names = ["country 1", "country 2", "country 40", "nowhere"]
    features = {source: prepared.key_maps[f"query_{source}"].rows(names) for source in ("country",)}
    history = Ragged.from_lists([[0, 1], [], [3], [4], [5]])
    with process_group("cpu"):
        model, _ = load_trained(run, prepared, current_rank("cpu"), which="last")
        single = {
            "user": prepared.key_maps["user"].rows(keys),
            "country": countries.with_values(features["country"][countries.values]),
        }
        wanted = model.encode_queries(history, single).numpy()
    of_artifact = artifact.key_map("query_country").rows(names)
    found = Retriever(artifact).encode_rows(
        history, rows, {"country": countries.with_values(of_artifact[countries.values])}
    )
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    assert np.abs(found[0] - found[4]).max() > 1e-3
    assert Retriever(artifact).recommend([[]], 3, users=["a stranger"]).cold_start == [True]
    assert Retriever(artifact).recommend([[]], 3, users=["user 1"]).cold_start == [rows[0] == USERS - 1]
    cases = {"history": [[1001, 1002]] * 3 + [[]], "items": [[1003]] * 4, "user": [*keys[:2], "new", "new"]}
    pq.write_table(pa.table(cases | {"country": [["country 1"], [], ["nowhere"], []]}), tmp_path / "cases.parquet")
    checkpoint, exact, _ = evaluate(run.run, cases=str(tmp_path / "cases.parquet"), which="last")["results"]
    assert {name: checkpoint[name] for name in checkpoint if "@" in name} == pytest.approx(
        {name: exact[name] for name in exact if "@" in name}
    )


def test_tomorrows_run_goes_on_with_the_keys_of_today(run: Config, data: Path, tmp_path: Path) -> None:
    today = pq.read_table(data)
    users = [*("a new user",) * 3, "a rare user"]
    pq.write_table(today.slice(0, 4).set_column(0, "user", pa.array(users)), tmp_path / "tomorrow.parquet")
    config = config_of(
        tmp_path / "run", tmp_path / "tomorrow.parquet", data={"holdout": "none"}, train={"grow": run.run, "epochs": 1}
    )
    train(config, on_event=lambda event: None)
    old, new = (vectors_of_users(one) for one in (run, config))
    new_user, rare = HashedKeys("string").rows(["a new user", "a rare user"]).tolist()
    assert new_user in new
    assert rare not in new
    assert len(new) == len(old) == USERS - 1
    assert len(new.keys() - old.keys()) == 1  # who made room for it is who was not seen for the longest time
    assert all(torch.equal(new[user], old[user]) for user in new if user != new_user)
    assert all((vector != new[new_user]).any() for vector in old.values())


def vectors_of_users(config: Config) -> dict[int, torch.Tensor]:
    with process_group("cpu"):
        model, _ = load_trained(config, load_prepared(config.run), current_rank("cpu"), which="last")
        ids = model.tables.dynamic["user"].trained.ids.copy()
        vectors = model.tables.lookup({"user": torch.from_numpy(ids)})["user"].detach()
    return dict(zip(ids.tolist(), vectors, strict=True))


def stopped_worker(settings: dict[str, Any], last_step: int) -> Any:
    """The epochs of `train_worker`, asked to stop at step `last_step`."""
    count = loop._Run._count

    def stop(self: Any, *arguments: Any) -> None:
        count(self, *arguments)
        self.is_asked_to_stop |= self.progress.step >= last_step

    loop._Run._count = stop  # type: ignore[method-assign]
    try:
        return train_worker(settings)["epochs"]
    finally:
        loop._Run._count = count  # type: ignore[method-assign]


def test_two_then_one_then_three_workers_know_the_same_keys(run: Config, data: Path, tmp_path: Path) -> None:
    config = config_of(tmp_path / "run", data, train={"batch_size": 48})
    stops = []
    for workers, last_step in ((2, 12), (1, 60), (3, 10**9)):
        (Path(config.run) / "stop").unlink(missing_ok=True)
        if workers == 1:
            with process_group("cpu"):
                stops.append(stopped_worker(config_to_dict(config), last_step))
        else:
            stops.append(run_on_ranks(workers, stopped_worker, config_to_dict(config), last_step)[0])
    assert stops == [0, 1, 3]  # inside an epoch, and a window, of some 11 and 22 steps
    wanted = slots_of(run)
    for name, found in slots_of(config).items():
        assert all(torch.equal(found[part], wanted[name][part]) for part in found), name
    assert log_of(config) == log_of(run)


def log_of(config: Config) -> list[tuple[str, list[int]]]:
    """What the run has written of evictions, without the steps, of which smaller batches have more."""
    lines = [json.loads(line) for line in (Path(config.run) / "evicted.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    return [(line["table"], line["ids"]) for line in lines]


def test_killed_and_gone_on_ends_bit_equal(run: Config, data: Path, tmp_path: Path) -> None:
    killed = config_of(tmp_path / "killed", data, train={"checkpoint_seconds": 0.0})
    Path(killed.run).mkdir()
    (tmp_path / "graves").mkdir()
    extra = {"deaths": [[0, 47]], "graves": str(tmp_path / "graves")}
    assert run_inline_in_a_process(killed, "mortal_worker", **extra) == -9
    train(config_of(tmp_path / "killed", data), on_event=lambda event: None)
    assert final_tensors(killed) == final_tensors(run)
    assert (Path(killed.run) / "evicted.jsonl").read_text() == (Path(run.run) / "evicted.jsonl").read_text()


@pytest.mark.parametrize(
    ("path", "table", "problem"),
    [
        ("item.map", {"map": "dynamic", "rows": 9}, "dynamic is for user and query features: .* keys.min_count"),
        ("user.rows", {"map": "dynamic"}, "at least 2, one for a key and one"),
        ("user.compression", {"map": "dynamic", "rows": 9, "compression": 2}, "has no effect with map = dynamic"),
        ("user.frozen", {"map": "dynamic", "rows": 9, "frozen": True}, "exclude each other"),
        ("user.eviction", {"map": "hashed", "rows": 9, "eviction": "lru"}, "has no effect with map = hashed"),
        ("user.admission", {"admission": 3}, "has no effect with map = auto"),
    ],
)
def test_impossible_settings_are_refused(
    data: Path, tmp_path: Path, path: str, table: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SettingError, match=problem) as caught:
        train(config_of(tmp_path / "run", data, tables={path.partition(".")[0]: table}))
    assert caught.value.path == f"tables.{path}"
