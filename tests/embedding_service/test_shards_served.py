"""A real service over two shards: versions flip with both, and one that is killed is missed until Serve has it back."""

from __future__ import annotations

import http.client
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from embedding_service.app import Service, serve_artifact
from embedding_service.artifact import Artifact
from embedding_service.retrieval import Retriever
from tests.embedding_service.artifacts import publish
from tests.embedding_service.test_app import free_port

TOKEN = "a-token-of-the-tests"
SESSIONS = [["i0003", "i0023"], ["i0040"], ["i0001", "i0001", "i0099"]]
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    publish(folder, version="next", factory="Flat", num_items=90, precision="int8", shards=3)
    publish(folder, version="first", factory="Flat", num_items=100, shards=2)
    return folder


@pytest.fixture(scope="module")
def service(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    token = tmp_path_factory.mktemp("secret") / "token"
    token.write_text(TOKEN)
    with serve_artifact(
        root,
        port=free_port(),
        threads=1,
        max_replicas=2,
        target_ongoing_requests=7.0,
        shards=2,
        on_lost_shard="partial",
        shard_timeout_seconds=2.0,
        token_file=str(token),
        gates={"min_overlap": 0.0},
    ) as running:
        yield running


def ask(service: Service, method: str, path: str, body: Any = None) -> tuple[int, str, Any]:
    """Status, the header X-Partial and the document."""
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=60)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, path, data, {"authorization": f"Bearer {TOKEN}"})
        response = connection.getresponse()
        return response.status, response.getheader("x-partial", ""), json.loads(response.read())
    finally:
        connection.close()


def recommended(service: Service) -> tuple[int, str, Any]:
    return ask(service, "POST", "/v1/recommend", {"sessions": SESSIONS, "k": 100})


def expected(root: Path, version: str) -> list[list[tuple[Any, float]]]:
    found = Retriever(Artifact.open(root / version), threads=1).recommend(SESSIONS, 100)
    return [list(zip(keys, line.tolist(), strict=False)) for keys, line in zip(found.keys, found.scores, strict=True)]


def answered(document: Any) -> list[list[tuple[Any, float]]]:
    return [[(item["key"], item["score"]) for item in result["items"]] for result in document["results"]]


def shard(number: int) -> psutil.Process | None:
    """The process that holds a shard, if there is one now."""
    for process in psutil.Process().children(recursive=True):
        try:
            if f"shard-{number}" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def test_autoscaling_is_what_was_set(service: Service) -> None:
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    assert client is not None
    deployed = client.get_serve_details()["applications"]["lexshard"]["deployments"]
    assert deployed.keys() == {"retrieval", "shard-0", "shard-1"}
    scaling = deployed["retrieval"]["deployment_config"]["autoscaling_config"]
    assert {name: scaling[name] for name in ("min_replicas", "max_replicas", "target_ongoing_requests")} == {
        "min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 7.0,
    }  # fmt: skip
    assert len(deployed["retrieval"]["replicas"]) == 1
    assert not deployed["shard-0"]["deployment_config"].get("autoscaling_config")


def test_versions_flip_with_all_their_shards(service: Service, root: Path) -> None:
    for version in ("next", "first"):
        status, _, told = ask(service, "POST", "/v1/versions/activate", {"version": version, "wait_seconds": 60})
        assert (status, told["state"]) == (200, "live"), told
        status, partial, document = recommended(service)
        assert (status, partial, document["version"]) == (200, "", version)
        assert answered(document) == expected(root, version)


def test_a_killed_shard_is_marked_missing_and_comes_back_by_itself(service: Service, root: Path) -> None:
    full = recommended(service)
    assert full[:2] == (200, "")
    process = shard(1)
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    give_up = time.monotonic() + PATIENCE_SECONDS
    while not (answer := recommended(service))[1]:
        assert time.monotonic() < give_up
    status, partial, document = answer
    assert (status, partial) == (200, "lost=1; shards=2")
    assert document["partial"] == {"lost_shards": [1], "num_shards": 2}
    kept = {f"i{row:04d}" for row in range(50)}
    whole = expected(root, document["version"])
    assert answered(document) == [[one for one in line if one[0] in kept] for line in whole]
    while (answer := recommended(service))[1]:
        assert answer[0] == 200
        assert time.monotonic() < give_up
        time.sleep(0.1)
    assert answer == full
    assert shard(1) not in (None, process)
