"""Shards held elsewhere: the answers of one index, marked or refused while a shard is lost, whole when it is back."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import ArtifactError, ShardLost
from cluster.metrics import Sample
from embedding_service import shard_versions
from embedding_service.artifact import Artifact
from embedding_service.http_api import HttpApi
from embedding_service.http_artifact import http_api
from embedding_service.http_schema import ARROW_TYPE
from embedding_service.instruments import Instruments
from embedding_service.live_versions import LiveVersions
from embedding_service.scatter import Scatter, noting_lost_shards
from embedding_service.service_args import ServiceArgs
from embedding_service.service_metrics import ServiceMetrics
from embedding_service.shard_versions import ShardVersions
from embedding_service.version_listing import VersionListing
from embedding_service.versions import VersionStore
from tests.embedding_service.artifacts import DIM, NUM_ITEMS, clustered, publish
from tests.embedding_service.test_http_api import Reply, ask
from tests.embedding_service.test_http_arrow import column, stream

SHARDS = 3
LONG_SECONDS, SHORT_SECONDS = 60.0, 0.05


class Holder:
    """One shard, asked as Serve asks a deployment: by coroutines, whatever becomes of the process behind them."""

    def __init__(self, root: Path, number: int) -> None:
        self._settings = ServiceArgs(artifact=str(root), shards=SHARDS, start="one")
        self._number = number
        self.versions = ShardVersions(self._settings, number)
        self.state = "here"  # or "dead", which raises, or "hanging"
        self.asked: Counter[str] = Counter()

    def restart(self) -> None:
        self.versions, self.state = ShardVersions(self._settings, self._number), "here"

    async def send(self, method: str, *arguments: Any) -> Any:
        self.asked[method] += 1
        if self.state == "dead":
            raise ConnectionError("its process\nhas ended")
        if self.state == "hanging":
            await asyncio.Event().wait()
        return await asyncio.to_thread(getattr(self.versions, method), *arguments)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    publish(folder, version="one", factory="Flat", shards=SHARDS)
    publish(folder, version="two", factory="Flat", precision="int8", shards=SHARDS + 1, num_items=NUM_ITEMS - 7)
    publish(folder, version="whole", factory="Flat")
    return folder


@pytest.fixture
def holders(root: Path) -> list[Holder]:
    return [Holder(root, number) for number in range(SHARDS)]


def scatter_over(holders: list[Holder], *, partial: bool = True, timeout: float = LONG_SECONDS) -> Scatter:
    sends = [holder.send for holder in holders]
    return Scatter(sends, timeout_seconds=timeout, partial=partial, load_seconds=LONG_SECONDS)


def served(root: Path, version: str, scatter: Scatter | None) -> HttpApi:
    if scatter is not None:
        scatter.load(version)
    return http_api(Artifact.open(root / version), scatter=scatter)


def until(reached: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    for _ in range(600):
        if reached():
            return
        threading.Event().wait(0.05)
    raise AssertionError("it does not happen")


VECTORS = clustered(40, DIM, clusters=40, seed=7)
QUESTIONS: list[tuple[str, str, Any]] = [
    ("GET", "/v1/similar?key=i0003&k=200", b""),
    ("GET", "/v1/recommend?items=i0003&items=i0023", b""),
    ("GET", "/v1/recommend?items=nobody", b""),
    ("POST", "/v1/recommend", {"sessions": [["i0001"], [], ["i0400", "i0020"]], "exclude_seen": False, "k": 600}),
    ("POST", "/v1/search", {"vectors": VECTORS[:3].tolist(), "filter": {"deny": ["i0009"]}, "k": 30}),
    ("POST", "/v1/recommend", {"session": ["i0007"], "diversity": 0.4, "explain": True}),
    ("POST", "/v1/embed", {"keys": ["i0007", "nobody"]}),
]


def test_answers_are_those_of_one_index(root: Path, holders: list[Holder]) -> None:
    whole, sharded = (served(root, version, scatter) for version, scatter in (
        ("whole", None), ("one", scatter_over(holders)),
    ))  # fmt: skip
    for method, path, body in QUESTIONS:
        expected, got = (ask(api, method, path, body) for api in (whole, sharded))
        assert got.status == 200
        assert "x-partial" not in got.headers
        assert {**got.json, "version": "whole"} == expected.json


def arrow(api: HttpApi) -> tuple[Reply, pa.Table]:
    reply = ask(
        api, "POST", "/v1/search?k=5", stream([column(VECTORS)]), headers=[(b"content-type", ARROW_TYPE.encode())]
    )
    return reply, pa.ipc.open_stream(reply.body).read_all()


def test_a_lost_shard_leaves_marked_answers_until_it_is_back(root: Path, holders: list[Holder]) -> None:
    api = served(root, "one", scatter_over(holders))
    full = ask(api, "GET", "/v1/similar?key=i0003&k=499").json
    before = holders[1].asked["search"]
    holders[1].state = "dead"
    lost = {f"i{row:04d}" for row in range(166, 333)}
    for path, body in (
        ("/v1/recommend?items=i0003&k=500", None),
        ("/v1/recommend", {"session": ["i0003"], "k": 500}),
        ("/v1/recommend", {"sessions": [["i0003"], ["i0200"]], "k": 500}),
        ("/v1/search", {"vector": VECTORS[0].tolist(), "filter": {"deny": ["i0009"]}, "k": 500}),
    ):
        reply = ask(api, "GET", path) if body is None else ask(api, "POST", path, body)
        assert reply.status == 200
        assert reply.json["partial"] == {"lost_shards": [1], "num_shards": SHARDS}
        assert reply.headers["x-partial"] == "lost=1; shards=3"
        for result in reply.json.get("results", [reply.json]):
            keys = {item["key"] for item in result["items"]}
            assert len(keys) >= 331
            assert not keys & lost
    reply, table = arrow(api)
    assert json.loads(table.schema.metadata[b"partial"]) == {"lost_shards": [1], "num_shards": SHARDS}
    assert reply.headers["x-partial"] == "lost=1; shards=3"
    assert not {key for keys in table["keys"].to_pylist() for key in keys} & lost
    assert holders[1].asked["search"] - before == 1  # it is not asked before it says that it is back
    holders[1].restart()
    until(lambda: "x-partial" not in arrow(api)[0].headers)
    assert ask(api, "GET", "/v1/similar?key=i0003&k=499").json == full


def test_what_is_lost_is_listed_and_is_a_metric(root: Path, holders: list[Holder]) -> None:
    scatter = scatter_over(holders)
    versions = LiveVersions("one", lambda version, _: served(root, version, scatter), None)
    listing = VersionListing(versions, None, scatter=scatter)
    metrics = ServiceMetrics(Instruments(), versions, None, scatter=scatter)

    def told() -> tuple[Any, float]:
        here = listing.document()["here"]
        assert here["num_shards"] == SHARDS
        (sample,) = [one for one in metrics.samples() if one.metric == "lexshard_lost_shards"]
        assert (sample.labels, type(sample)) == (("one",), Sample)
        return here["lost_shards"], sample[2]

    assert told() == ([], 0)
    holders[1].state = "dead"
    ask(versions.now.live.api, "GET", "/v1/similar?key=i0003")
    reason = "failed (ConnectionError: has ended)"
    assert told() == ([{"version": "one", "shard": 1, "reason": reason}], 1)
    holders[1].restart()
    until(lambda: told() == ([], 0))
    versions.close()


def test_or_errors_as_configured(root: Path, holders: list[Holder]) -> None:
    api = served(root, "one", scatter_over(holders, partial=False))
    holders[2].state = "dead"
    for method, path, body in QUESTIONS[:2] + QUESTIONS[3:6]:
        reply = ask(api, method, path, body)
        assert reply.error[:2] == (503, "shard_lost")
        assert reply.error[2].startswith(
            "shard 2 of 3 failed (ConnectionError: has ended): it is started again by itself"
        )
        assert reply.headers["retry-after"] == "1"
    assert ask(api, "GET", "/v1/health").status == 200
    holders[2].restart()
    until(lambda: ask(api, "GET", "/v1/similar?key=i0003").status == 200)


def test_what_cannot_be_marked_is_not_answered_in_part(root: Path, holders: list[Holder]) -> None:
    """A new item's place, say, which is kept."""
    candidates = scatter_over(holders).candidates(Artifact.open(root / "one"), "recommend")
    holders[0].state = "dead"
    with pytest.raises(ShardLost, match="shard 0 of 3 failed"):
        candidates.search(VECTORS, 3)
    with noting_lost_shards() as partial:
        assert candidates.search(VECTORS, 3)[1].min() >= 166
    assert partial == {"lost_shards": [0], "num_shards": SHARDS}


def test_without_any_shard_there_is_no_partial_answer(root: Path, holders: list[Holder]) -> None:
    api = served(root, "one", scatter_over(holders))
    for holder in holders:
        holder.state = "dead"
    assert ask(api, "GET", "/v1/similar?key=i0003").error[:2] == (503, "shard_lost")


def test_a_batch_that_meets_a_lost_shard_is_not_asked_again_in_halves(root: Path, holders: list[Holder]) -> None:
    api = served(root, "one", scatter_over(holders, partial=False))
    holders[0].state = "dead"
    before = holders[1].asked["search"]

    async def together() -> list[Any]:
        turns = api._turns
        group = api._queries.get_similar([("key", "i0001")]).group
        return await asyncio.gather(*(turns.ask(group, f"i{row:04d}") for row in range(20)), return_exceptions=True)

    assert {type(one).__name__ for one in asyncio.run(together())} == {"ShardLost"}
    assert holders[1].asked["search"] - before == 1


def test_a_shard_that_hangs_is_waited_for_once(root: Path, holders: list[Holder]) -> None:
    api = served(root, "one", scatter_over(holders, timeout=SHORT_SECONDS))
    holders[0].state = "hanging"
    until(lambda: ask(api, "GET", "/v1/similar?key=i0400").json["partial"]["lost_shards"] == [0])
    searches = holders[0].asked["search"]
    for _ in range(5):
        ask(api, "GET", "/v1/similar?key=i0400")
    assert holders[0].asked["search"] == searches


def test_versions_go_live_when_all_shards_have_them(root: Path, holders: list[Holder]) -> None:
    """Requests to both at once, each answered by its own; what a shard cannot load does not go live."""
    scatter = scatter_over(holders)
    store = VersionStore(root)
    versions = LiveVersions("one", lambda version, _: served(root, version, scatter), store)
    one = versions.now.live
    expected = {
        name: ask(served(root, name, None), "GET", "/v1/similar?key=i0003&k=300").json for name in ("one", "two")
    }
    store.activate("two", start="one")
    versions.refresh()
    assert (versions.problem, versions.now.live.version) == ("", "two")
    assert all(holder.versions.versions == ["one", "two"] for holder in holders)
    for loaded in (one, versions.now.live):
        assert ask(loaded.api, "GET", "/v1/similar?key=i0003&k=300").json == expected[loaded.version]
    store.activate("whole", start="one")
    versions.refresh()
    assert versions.now.live.version == "two"
    assert "cannot load version whole: " in versions.problem
    assert "is in one piece and cannot be divided among 3: export it with export.index_shards = 3" in versions.problem
    store.roll_back()
    versions.refresh()
    assert (versions.problem, versions.now.live.version) == ("", "two")
    versions.close()
    store.roll_back()
    (root / ".serving" / "state.json").unlink()


def test_flips_under_load_mix_no_versions(root: Path, tmp_path: Path) -> None:
    """Every answer is one version's own, whichever was live when it was asked; a shard dies and returns meanwhile."""
    for version in ("one", "two"):
        shutil.copytree(root / version, tmp_path / version)
    holders = [Holder(tmp_path, number) for number in range(SHARDS)]
    scatter = scatter_over(holders, partial=False)
    store = VersionStore(tmp_path)
    versions = LiveVersions("one", lambda version, _: served(tmp_path, version, scatter), store)
    body = {"sessions": [["i0003", "i0250"], ["i0400"]], "k": 40}

    def asked(api: HttpApi) -> Reply:
        return ask(api, "POST", "/v1/recommend", body)

    expected = {name: asked(served(root, name, None)).json for name in ("one", "two")}
    answers: Counter[str] = Counter()
    wrong: list[Any] = []
    ended = threading.Event()

    def client() -> None:
        while not ended.is_set():
            reply = asked(versions.now.live.api)
            if reply.status == 200:
                answers[reply.json["version"]] += 1
            if reply.status not in (200, 503) or (
                reply.status == 200 and reply.json != expected[reply.json["version"]]
            ):
                wrong.append(reply)

    clients = [threading.Thread(target=client, daemon=True) for _ in range(3)]
    for one in clients:
        one.start()
    for number in range(10):
        if number == 5:
            holders[1].state = "dead"
            until(lambda: scatter.lost != {})
            holders[1].restart()
        version = ("two", "one")[number % 2]
        store.activate(version, start="one")
        versions.refresh()
        assert (versions.problem, versions.now.live.version) == ("", version)
        enough = answers[version] + 5
        until(lambda: answers[version] >= enough)  # noqa: B023
    ended.set()
    for one in clients:
        one.join(LONG_SECONDS)
    versions.close()
    assert wrong == []
    assert set(answers) == {"one", "two"}


def test_a_shard_lets_go_of_what_is_neither_served_nor_asked(
    root: Path, monkeypatch: pytest.MonkeyPatch, holders: list[Holder]
) -> None:
    monkeypatch.setattr(shard_versions, "IDLE_CHECKS", 2)
    held = holders[0].versions
    held.load("two")  # by a version's activation that was refused in the end
    for _ in range(2):
        held.let_go()
    held.load("two")
    for _ in range(2):
        held.let_go()
    assert held.versions == ["one", "two"]
    held.let_go()
    assert held.versions == ["one"]
    scatter = scatter_over(holders)
    candidates = scatter.candidates(Artifact.open(root / "two"), "recommend")
    assert candidates.search(VECTORS, 3)[1].shape == (40, 3)  # a request on its way is answered nevertheless
    assert held.versions == ["one", "two"]


def test_a_question_to_other_rows_is_not_answered(root: Path, holders: list[Holder]) -> None:
    """As while a service with another number of shards takes the place of the one before."""
    two = scatter_over(holders[:2], partial=False).candidates(Artifact.open(root / "one"), "recommend")
    with pytest.raises(
        ShardLost, match=r"shard 1 of 2 failed \(holds rows 166\.\.333 of index 'recommend' and was asked"
    ):
        two.search(VECTORS, 3)


def test_a_shard_checks_the_checksums_of_its_own_files(tmp_path: Path) -> None:
    version = publish(tmp_path, version="one", factory="Flat", shards=2, num_items=60)
    file = version / "indexes" / "recommend.shard-1.faiss"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    settings = ServiceArgs(artifact=str(tmp_path), shards=2, start="one")
    assert ShardVersions(settings, 0).versions == ["one"]
    with pytest.raises(ArtifactError, match=r"recommend\.shard-1\.faiss: is damaged"):
        ShardVersions(settings, 1)


def test_a_search_after_k_is_over_keeps_its_shape(root: Path, holders: list[Holder]) -> None:
    candidates = scatter_over(holders).candidates(Artifact.open(root / "one"), "similar")
    scores, rows = candidates.search(VECTORS, 10_000)
    assert scores.shape == rows.shape == (40, NUM_ITEMS)
    assert np.array_equal(np.sort(rows, axis=1), np.broadcast_to(np.arange(NUM_ITEMS), rows.shape))
