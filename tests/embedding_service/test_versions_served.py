"""Versions swapped under load on a real service of two replicas, and a replica that is killed."""

from __future__ import annotations

import http.client
import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pytest

from embedding_service.app import Service, serve_artifact
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.keys import Vocabulary
from embedding_service.retrieval import Retriever
from embedding_service.towers import TowerInput, TowerSpec
from tests.embedding_service.test_app import free_port

DIM, NUM_ITEMS, CLIENTS = 8, 60, 4
VERSIONS = ("one", "two", "three")
TOKEN = "a-token-of-the-tests"
KEYS = [f"k{i}" for i in range(NUM_ITEMS)]
SESSIONS = [["k1", "k7"], ["k30"], ["k59", "k2", "k2"]]


def write_version(root: Path, version: str) -> None:
    """Every version has vectors of its own, and as good as no neighbours in common with the others."""
    vectors = np.random.default_rng(len(version)).standard_normal((NUM_ITEMS, DIM)).astype(np.float32)
    with ArtifactWriter(root, version) as writer:
        writer.add_keys("item", Vocabulary(pa.array(KEYS), np.arange(NUM_ITEMS, 0, -1)))
        writer.add_vectors("item", rows=NUM_ITEMS, dim=DIM, keys="item", precision="fp32").write(0, vectors)
        writer.set_query_tower(TowerSpec((TowerInput("history", "history", "item", DIM, decay=0.8),), DIM), {})
        for name in ("recommend", "similar"):
            metric: Any = "cosine" if name == "similar" else "ip"
            writer.add_index(name, vectors="item", metric=metric, factory="Flat", recall_target=0.9, recall_k=5)
        writer.publish(lineage={}, figures={})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for version in VERSIONS:
        write_version(folder, version)
    return folder


@pytest.fixture(scope="module")
def service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(TOKEN)
    gates = {"min_overlap": 0.0}
    with serve_artifact(root, port=free_port(), replicas=2, threads=1, token_file=str(token), gates=gates) as running:
        yield running


def ask(connection: http.client.HTTPConnection, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    headers = {"authorization": f"Bearer {TOKEN}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = response.read()
    try:
        return response.status, json.loads(answer)
    except ValueError:
        return response.status, answer


def expected_answers(root: Path) -> dict[str, dict[str, list[list[Any]]]]:
    """version -> question -> the keys of each of its answers."""
    found = {}
    for version in VERSIONS:
        retriever = Retriever(Artifact.open(root / version), threads=1)
        found[version] = {
            "similar": [retriever.similar([key], 5).keys[0] for key in KEYS],
            "sessions": retriever.recommend(SESSIONS, 5).keys,
        }
    return found


class Clients:
    """Ask all the time, each over a connection of its own, and hold every answer against its version's."""

    def __init__(self, service: Service, root: Path) -> None:
        self._address = service.address.removeprefix("http://")
        self._expected = expected_answers(root)
        self._ended = threading.Event()
        self.versions: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CLIENTS)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join(60)

    def _run(self, number: int) -> None:
        connection = http.client.HTTPConnection(self._address, timeout=30)
        turn = number
        while not self._ended.is_set():
            turn += 1
            try:
                self._ask_one(connection, turn)
            except (OSError, http.client.HTTPException) as error:
                self.failed.append(repr(error))
                connection.close()
        connection.close()

    def _ask_one(self, connection: http.client.HTTPConnection, turn: int) -> None:
        if turn % 3:
            which = turn % NUM_ITEMS
            status, answer = ask(connection, "GET", f"/v1/similar?key={KEYS[which]}&k=5")
        else:
            which = -1
            status, answer = ask(connection, "POST", "/v1/recommend", {"sessions": SESSIONS, "k": 5})
        if status != 200:
            self.failed.append(f"{status} {answer}")
            return
        expected = self._expected[answer["version"]]
        results = [answer] if which >= 0 else answer["results"]
        got = [[item["key"] for item in result["items"]] for result in results]
        if got != ([expected["similar"][which]] if which >= 0 else expected["sessions"]):
            self.wrong.append(f"{answer['version']}: {got}")
        self.versions[answer["version"]] += 1


def replicas() -> set[int]:
    return {one.pid for one in psutil.Process().children(recursive=True) if "ServeReplica" in one.name()}


def test_swaps_and_roll_backs_under_load_fail_no_request_and_mix_no_versions(service: Service, root: Path) -> None:
    manager = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=120)
    live = ask(manager, "GET", "/v1/versions")[1]["live"]
    order = [*[version for version in VERSIONS if version != live], live]
    with Clients(service, root) as clients:
        for number in range(20):
            body = {"version": order[number % 3], "wait_seconds": 60}
            status, told = ask(manager, "POST", "/v1/versions/activate", body)
            assert (status, told["state"]) == (200, "live"), told
        for _ in range(5):
            status, told = ask(manager, "POST", "/v1/versions/rollback")
            assert status == 200, told
        assert_settles(service, told["live"])
    manager.close()
    assert clients.wrong == []
    assert clients.failed == []
    assert set(clients.versions) == set(VERSIONS)


def assert_settles(service: Service, version: str) -> None:
    """All replicas come to serve `version`, and then stay with it."""
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=30)
    in_a_row, give_up = 0, time.monotonic() + 60
    while in_a_row < 50:
        assert time.monotonic() < give_up
        in_a_row = in_a_row + 1 if ask(connection, "GET", "/v1/health")[1]["version"] == version else 0
    connection.close()


def test_a_killed_replica_fails_no_more_than_what_it_worked_on(service: Service, root: Path) -> None:
    manager = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=120)
    live = ask(manager, "GET", "/v1/versions")[1]["live"]
    other = next(version for version in VERSIONS if version != live)
    assert ask(manager, "POST", "/v1/versions/activate", {"version": other, "wait_seconds": 60})[0] == 200
    before = replicas()
    assert len(before) == 2
    with Clients(service, root) as clients:
        give_up = time.monotonic() + 60
        while clients.versions.total() < 100:
            assert time.monotonic() < give_up, clients.failed
            time.sleep(0.01)
        os.kill(min(before), signal.SIGKILL)
        give_up = time.monotonic() + 60
        while not (len(now := replicas()) == 2 and now != before):
            assert time.monotonic() < give_up
            time.sleep(0.1)
        assert_settles(service, other)  # the new replica knows what is live, though it was started with another one
    manager.close()
    assert clients.wrong == []
    assert len(clients.failed) <= CLIENTS, clients.failed  # each had at most one request on it


def test_the_document_names_every_endpoint_of_the_service(service: Service) -> None:
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=30)
    document = ask(connection, "GET", "/openapi.json")[1]
    connection.close()
    assert {"/v1/similar", "/v1/versions", "/v1/versions/rollback", "/v1/feedback"} <= document["paths"].keys()
