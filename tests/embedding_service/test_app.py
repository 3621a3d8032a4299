"""The Ray Serve shell: its arguments and refusals without Ray, and one real service, asked over HTTP."""

from __future__ import annotations

import http.client
import json
import logging
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import pyarrow as pa
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.parser import text_string_to_metric_families

from cluster import grpc_addresses
from cluster.errors import ArtifactError, LaunchError, SettingError
from embedding_service import http_ports
from embedding_service import retrieval_pb2 as pb
from embedding_service.app import Service, build, deployment_options, serve_artifact
from embedding_service.artifact import Artifact
from embedding_service.artifact_writer import ArtifactWriter
from embedding_service.haproxy_refusals import MAX_ONGOING, MAX_QUEUED, SAMPLED, VARIABLE, backend_rules
from embedding_service.http_artifact import http_api
from embedding_service.http_ports import check_port, high_throughput_environment
from embedding_service.http_schema import ARROW_TYPE, Limits
from embedding_service.instruments import BOUNDS_SECONDS
from embedding_service.keys import Vocabulary
from embedding_service.retrieval import Retriever
from embedding_service.retrieval_pb2_grpc import RetrievalStub
from embedding_service.service_metrics import METRICS
from embedding_service.towers import TowerInput, TowerSpec
from tests.embedding_service.test_http_api import ask, keys_of
from tests.embedding_service.test_http_arrow import column, stream

DIM = 8
GROUPS = 5  # items item-0, item-5, item-10... share a direction
NUM_ITEMS = 40
LINEAGE = {"run": "planted", "config": {"model": {"kind": "item2vec"}, "data": {"train": "/secret/path"}}}
KEYS = [f"item-{i}" for i in range(NUM_ITEMS)]


def write_artifact(root: Path, *, indexes: tuple[str, ...] = ("recommend", "similar")) -> Path:
    """Items in groups of one direction each; users 100 + g like group g; a query is the history plus the user."""
    rng = np.random.default_rng(0)
    groups = np.eye(GROUPS, DIM)
    vectors = (groups[np.arange(NUM_ITEMS) % GROUPS] + 0.01 * rng.standard_normal((NUM_ITEMS, DIM))).astype(np.float32)
    inputs = (
        TowerInput("history", "history", "item", DIM, decay=0.8),
        TowerInput("user", "user", "user", DIM),
    )
    with ArtifactWriter(root) as writer:
        writer.add_keys("item", Vocabulary(pa.array(KEYS), np.arange(NUM_ITEMS, 0, -1)))
        writer.add_keys("user", Vocabulary(pa.array(range(100, 100 + GROUPS)), np.ones(GROUPS, np.int64)))
        writer.add_vectors("item", rows=NUM_ITEMS, dim=DIM, keys="item", precision="fp32").write(0, vectors)
        sink = writer.add_vectors("user", rows=GROUPS, dim=DIM, keys="user", precision="fp32")
        sink.write(0, groups.astype(np.float32))
        writer.set_query_tower(TowerSpec(inputs, DIM), {})
        for name in indexes:
            metric: Any = "cosine" if name == "similar" else "ip"
            writer.add_index(name, vectors="item", metric=metric, factory="Flat", recall_target=0.9, recall_k=5)
        return writer.publish(lineage=LINEAGE, figures={"recall@20": 0.5})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("artifacts"))


def group_of(key: object) -> int:
    return int(str(key).removeprefix("item-")) % GROUPS


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestWithoutRay:
    def test_the_api_answers_what_the_retriever_finds(self, folder: Path) -> None:
        artifact = Artifact.open(folder)
        api = http_api(artifact)
        expected = Retriever(artifact).recommend([["item-3", "item-8"]], 7, users=[101])
        reply = ask(api, "GET", "/v1/recommend?items=item-3&items=item-8&user=101&k=7").json
        assert [item["key"] for item in reply["items"]] == expected.keys[0]
        assert [item["score"] for item in reply["items"]] == expected.scores[0].tolist()

    def test_the_api_knows_the_artifact(self, folder: Path) -> None:
        version = ask(http_api(Artifact.open(folder)), "GET", "/v1/version").json
        assert (version["version"], version["num_items"], version["dim"]) == (folder.name, NUM_ITEMS, DIM)
        assert version["details"] == {"model": "item2vec", "figures": {"recall@20": 0.5}}
        assert "/secret/path" not in json.dumps(version)

    def test_an_artifact_without_an_index_is_refused(self, tmp_path: Path) -> None:
        artifact = Artifact.open(write_artifact(tmp_path, indexes=("similar",)))
        with pytest.raises(
            ArtifactError, match="needs a query tower and the indexes recommend and similar; indexes here: similar"
        ):
            http_api(artifact)

    @pytest.mark.parametrize(
        ("args", "message"),
        [
            ({}, "setting args.artifact: Field required"),
            ({"artifact": ""}, "setting args.artifact: String should have at least 1 character"),
            (
                {"artifact": "a", "maxk": 3},
                "setting args.maxk: Extra inputs are not permitted; known are artifact, replicas",
            ),
            ({"artifact": "a", "max_k": "3"}, "setting args.max_k: Input should be a valid integer; got '3'"),
            (
                {"artifact": "a", "replicas": 0},
                "setting args.replicas: Input should be greater than or equal to 1; got 0",
            ),
            (
                {"artifact": "a", "replicas": 3, "max_replicas": 2},
                "setting args.max_replicas: 2 is less than replicas = 3, the least number: raise it, or set 0 to have",
            ),
            (
                {"artifact": "a", "max_replicas": 2, "target_ongoing_requests": 33.0},
                "setting args.target_ongoing_requests: Input should be less than or equal to 32",
            ),
            ({"artifact": "a", "on_lost_shard": "retry"}, "setting args.on_lost_shard: Input should be 'error' or"),
        ],
    )
    def test_wrong_arguments_of_a_config_file(self, args: dict[str, Any], message: str) -> None:
        with pytest.raises(SettingError) as caught:
            build(args)
        assert str(caught.value).startswith(message)

    def test_replicas_between_least_and_most(self) -> None:
        assert deployment_options(replicas=3)["num_replicas"] == 3
        scaled = deployment_options(replicas=2, max_replicas=5, target_ongoing_requests=8.0)
        assert "num_replicas" not in scaled
        assert scaled["autoscaling_config"] == {"min_replicas": 2, "max_replicas": 5, "target_ongoing_requests": 8.0}

    def test_shards_need_an_index_in_shards(self, folder: Path) -> None:
        with pytest.raises(ArtifactError, match=r"is in one piece and cannot be divided among 2: export it with"):
            build({"artifact": str(folder), "shards": 2})
        with pytest.raises(SettingError, match=r"^setting serve.max_replicas: 1 is less than replicas = 2"):
            serve_artifact(folder, port=free_port(), replicas=2, max_replicas=1)

    def test_exports_need_a_root_and_a_token(
        self, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("LEXSHARD_TOKEN", raising=False)
        args = {"artifact": str(folder.parent), "runs": str(tmp_path)}
        with pytest.raises(SettingError, match=r"^setting serve.runs: .*/none: there is no such folder"):
            build({**args, "runs": str(tmp_path / "none")})
        with pytest.raises(SettingError, match=r"^setting serve.runs: exports need the token .* or LEXSHARD_TOKEN"):
            build(args)
        monkeypatch.setenv("LEXSHARD_TOKEN", "a-token-of-the-tests")
        build(args)
        with pytest.raises(SettingError, match=r"^setting serve.runs: .* is the folder of one version"):
            build({**args, "artifact": str(folder)})

    def test_a_missing_artifact_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ArtifactError, match="there is no such artifact folder"):
            build({"artifact": str(tmp_path / "none")})

    def test_the_config_file_in_deploy_is_valid(self, folder: Path) -> None:
        from ray.serve.schema import ServeDeploySchema

        config = yaml.safe_load((Path(__file__).parents[2] / "deploy" / "serve.yaml").read_text())
        schema = ServeDeploySchema.model_validate(config)
        assert schema.applications[0].import_path == f"{build.__module__}:{build.__name__}"
        environment = config["controller_options"]["runtime_env"]["env_vars"]
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert environment[VARIABLE] == backend_rules()
        build({**schema.applications[0].args, "artifact": str(folder)})


class TestAddress:
    def test_a_port_in_use_names_the_setting(self, folder: Path) -> None:
        import ray

        with socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            port = busy.getsockname()[1]
            with pytest.raises(SettingError, match=rf"^setting serve.port: {port} is in use on 127.0.0.1") as caught:
                check_port("127.0.0.1", port)
            assert caught.value.path == "serve.port"
            was_running = ray.is_initialized()
            with pytest.raises(SettingError, match="is in use"):
                serve_artifact(folder, port=port)
            assert ray.is_initialized() == was_running

    def test_grpc_has_a_port_of_its_own(self, folder: Path) -> None:
        port = free_port()
        with pytest.raises(SettingError, match=rf"^setting serve.grpc_port: {port} is serve.port: take another"):
            serve_artifact(folder, port=port, grpc_port=port)
        with socket.socket() as busy:
            busy.bind(("127.0.0.1", 0))
            busy.listen()
            with pytest.raises(SettingError, match=r"^setting serve.grpc_port: \d+ is in use on 127.0.0.1"):
                serve_artifact(folder, port=port, grpc_port=busy.getsockname()[1])

    def test_grpc_needs_haproxy(self, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "none"))
        with pytest.raises(SettingError, match=r"^setting serve.grpc_port: needs HAProxy, which is not here"):
            serve_artifact(folder, port=free_port(), grpc_port=free_port())

    def test_grpc_needs_a_ray_that_listens_where_it_is_told(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from ray.serve._private import default_impl

        monkeypatch.delattr(default_impl, "add_grpc_address")
        with pytest.raises(LaunchError, match=r"cannot be told where its gRPC servers listen.*serve.grpc_port = 0"):
            serve_artifact(folder, port=free_port(), grpc_port=free_port())
        assert grpc_addresses.PROXY_ENVIRONMENT.keys() == {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"}

    def test_a_free_port_is_fine(self) -> None:
        check_port("127.0.0.1", free_port())

    @pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.77"])
    def test_a_host_that_is_not_ours_names_the_setting(self, host: str) -> None:
        with pytest.raises(SettingError, match=rf"^setting serve.host: '?{host}"):
            check_port(host, 8000)


class TestHighThroughput:
    def test_connections_stay_below_the_limit_on_open_files(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 6000))
        environment = high_throughput_environment(local=True)
        assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
        assert environment["RAY_SERVE_HAPROXY_MAXCONN"] == "2000"
        assert environment["RAY_SERVE_HAPROXY_STATS_PORT"] != environment["RAY_SERVE_HAPROXY_METRICS_PORT"]
        assert "RAY_SERVE_HAPROXY_STATS_PORT" not in high_throughput_environment(local=False)

    def test_ports_are_not_those_of_outgoing_connections(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Which may take one before Serve binds it."""
        ports = http_ports._free_ports(6)
        assert len(set(ports)) == 6
        assert all(20_000 <= port < http_ports._outgoing_ports_begin() for port in ports)
        with socket.socket() as busy:
            monkeypatch.setattr(http_ports, "_AFTER_WORKERS", ports[0])
            monkeypatch.setattr(http_ports, "_OUTGOING_PORTS", tmp_path / "range")
            (tmp_path / "range").write_text(f"{ports[0] + 1} 60999\n")  # leaves one
            busy.bind(("127.0.0.1", ports[0]))
            assert ports[0] not in http_ports._free_ports(3)  # the system's are better than none

    @pytest.mark.parametrize(("cores", "threads"), [(None, "1"), (1, "1"), (2, "1"), (4, "2"), (16, "4")])
    def test_most_cores_are_left_to_the_replicas(
        self, cores: int | None, threads: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        assert high_throughput_environment(local=True)["RAY_SERVE_HAPROXY_NBTHREAD"] == threads

    def test_what_is_set_already_stays(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_MAXCONN", "77")
        assert high_throughput_environment(local=True)["RAY_SERVE_HAPROXY_MAXCONN"] == "77"

    def test_without_haproxy_the_python_proxy_serves(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setenv("RAY_SERVE_HAPROXY_BINARY_PATH", str(tmp_path / "none"))
        with caplog.at_level(logging.WARNING):
            assert "RAY_SERVE_ENABLE_HA_PROXY" not in high_throughput_environment(local=True)
        assert "HAProxy is not available here" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_wait_ends_with_a_signal_and_gives_the_handlers_back(number: signal.Signals) -> None:
    former = signal.getsignal(number)

    def press() -> None:
        while signal.getsignal(number) is former:
            pass
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    Service("127.0.0.1", 1).wait()
    thread.join(10)
    assert signal.getsignal(number) is former


@pytest.mark.parametrize("to_group", [False, True])
def test_sigterm_while_it_starts_leaves_nothing_behind(folder: Path, to_group: bool) -> None:
    """Sent to the process alone or, as a terminal or a supervisor may, to Ray's processes as well."""
    command = [sys.executable, "-m", "cluster.cli", "serve", str(folder), "--port", str(free_port())]
    root = Path(__file__).parents[2]
    run = subprocess.Popen(
        command, cwd=root, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        main = psutil.Process(run.pid)
        give_up = time.monotonic() + 120
        started: set[psutil.Process] = set()
        while not any(_name(one) == "haproxy" for one in started):
            assert run.poll() is None
            assert time.monotonic() < give_up
            started |= set(main.children(recursive=True))
        (os.killpg if to_group else os.kill)(run.pid, signal.SIGTERM)
        _, told = run.communicate(timeout=120)
        assert run.returncode == 130, told
        assert "lexshard: interrupted" in told
        _, left = psutil.wait_procs([one for one in started if _name(one)], timeout=10)
        assert [_name(one) for one in left] == []
    finally:
        run.kill()


def _name(process: psutil.Process) -> str:
    """Its name; nothing if it has ended."""
    try:
        return "" if process.status() == psutil.STATUS_ZOMBIE else process.name()
    except psutil.NoSuchProcess:
        return ""


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "service.log"


@pytest.fixture(scope="module")
def service(folder: Path, log: Path) -> Iterator[Service]:
    import ray

    already = ray.is_initialized()
    limits = Limits(max_k=20, max_body_bytes=100_000)
    told: dict[str, Any] = {"log_format": "json", "log_file": str(log), "probe_seconds": 1.0}
    ports = {"port": free_port(), "grpc_port": free_port()}
    with serve_artifact(folder.parent, threads=1, limits=limits, **ports, **told) as running:
        yield running
    assert ray.is_initialized() == already
    with pytest.raises(ConnectionRefusedError):
        request(running, "GET", "/v1/health")


def request(service: Service, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=30)
    try:
        connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


class TestService:
    """One real service on a local Ray, through HAProxy."""

    def test_similar(self, service: Service, folder: Path) -> None:
        status, answer = request(service, "GET", "/v1/similar?key=item-2&k=7")
        assert (status, answer["version"]) == (200, folder.name)
        assert {group_of(key) for key in keys_of(answer)} == {2}
        assert "item-2" not in keys_of(answer)

    def test_search_and_recommend_in_batches(self, service: Service) -> None:
        vectors = np.eye(GROUPS, DIM).tolist()
        status, answer = request(service, "POST", "/v1/search", {"vectors": vectors, "k": 4})
        assert status == 200
        assert [{group_of(key) for key in keys_of(result)} for result in answer["results"]] == [
            {g} for g in range(GROUPS)
        ]
        body = {"sessions": [["item-1"], [], ["nope"]], "users": [None, 103, 99], "k": 5}
        results = request(service, "POST", "/v1/recommend", body)[1]["results"]
        assert [{group_of(key) for key in keys_of(result)} for result in results[:2]] == [{1}, {3}]
        assert keys_of(results[2]) == KEYS[:5]
        assert [result["cold_start"] for result in results] == [False, False, True]
        assert [result["unknown_user"] for result in results] == [False, False, True]

    def test_a_search_in_arrow(self, service: Service, folder: Path) -> None:
        vectors = np.repeat(np.eye(GROUPS, DIM, dtype=np.float32), 300, axis=0)  # more than a proxy's buffer
        connection = http.client.HTTPConnection(service.address.removeprefix("http://"), timeout=30)
        connection.request("POST", "/v1/search?k=4", stream([column(vectors)]), {"Content-Type": ARROW_TYPE})
        table = pa.ipc.open_stream(connection.getresponse().read()).read_all()
        connection.close()
        groups = [{group_of(key) for key in keys} for keys in table["keys"].to_pylist()]
        assert groups == [{g} for g in range(GROUPS) for _ in range(300)]
        assert table.schema.metadata == {b"version": folder.name.encode()}

    def test_grpc(self, service: Service, folder: Path) -> None:
        """What HTTP answers; errors have a status, a code and the request's id."""
        with grpc.insecure_channel(service.grpc_address) as channel:
            stub = RetrievalStub(channel)
            found = stub.Similar(pb.SimilarRequest(key=pb.Key(string="item-2"), k=7), timeout=30)
            asked = request(service, "GET", "/v1/similar?key=item-2&k=7")[1]
            assert found.version == folder.name
            assert list(found.answers[0].keys.strings) == keys_of(asked)
            assert list(found.answers[0].scores) == [np.float32(item["score"]) for item in asked["items"]]
            vectors = [pb.Vector(values=row) for row in np.repeat(np.eye(GROUPS, DIM), 300, axis=0)]
            found = stub.Search(pb.SearchRequest(vectors=vectors, k=4), timeout=30)
            groups = [{group_of(key) for key in answer.keys.strings} for answer in found.answers]
            assert groups == [{g} for g in range(GROUPS) for _ in range(300)]
            with pytest.raises(grpc.RpcError) as caught:
                stub.Similar(
                    pb.SimilarRequest(key=pb.Key(string="nope")), timeout=30, metadata=[("request_id", "mine")]
                )
            told = dict(caught.value.trailing_metadata())
            assert (caught.value.code(), told["code"]) == (grpc.StatusCode.NOT_FOUND, "key_not_found")
            assert told["request_id"] == "mine"
            assert "'nope'" in caught.value.details()
            with pytest.raises(grpc.RpcError) as caught:
                stub.Search(pb.SearchRequest(vectors=vectors * 2), timeout=30)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            assert caught.value.details().startswith("the body is larger than the limit of 100000 bytes")

    def test_it_listens_on_this_machine_alone(self, service: Service) -> None:
        """But for HAProxy's statistics and metrics, and a replica's port for other deployments, which cannot be told.
        gRPC is answered by HAProxy, the replica and Serve's own proxy.
        """
        listening = [
            (one.name(), connection.laddr)
            for one in psutil.Process().children(recursive=True)
            for connection in one.net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        ]
        ports = {address.port: address.ip for _, address in listening}
        assert ports[int(service.grpc_address.rpartition(":")[2])] == "127.0.0.1"
        beyond = Counter(name for name, address in listening if not address.ip.endswith(("127.0.0.1", "::1")))
        assert beyond == {"haproxy": 2, "ray::ServeReplica:lexshard:retrieval": 1}

    def test_it_is_not_put_behind_other_processes(self, service: Service) -> None:
        """Ray would run its workers at niceness 15."""
        workers = [one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::Serve")]
        assert workers
        assert {one.nice() for one in workers} == {psutil.Process().nice()}

    def test_mistakes(self, service: Service) -> None:
        status, answer = request(service, "GET", "/v1/similar?key=nope")
        assert (status, answer["error"]["code"]) == (404, "key_not_found")
        status, answer = request(service, "GET", "/nowhere")
        assert (status, answer["error"]["code"]) == (404, "not_found")
        status, answer = request(service, "DELETE", "/v1/similar")
        assert (status, answer["error"]["code"]) == (405, "method_not_allowed")
        status, answer = request(service, "GET", "/v1/similar?key=item-1&k=21")
        assert (status, answer["error"]["message"]) == (400, "`k` must be an integer in [1, 20]; got '21'")
        status, answer = request(service, "POST", "/v1/similar", b"{" + b" " * 200_000)
        assert (status, answer["error"]["code"]) == (413, "body_too_large")

    def test_health_and_docs(self, service: Service, folder: Path) -> None:
        assert request(service, "GET", "/v1/health") == (200, {"status": "ok", "version": folder.name})
        assert request(service, "GET", "/openapi.json")[1]["info"]["version"] == folder.name

    def test_events_are_written_where_they_are_asked_for(self, service: Service, folder: Path, log: Path) -> None:
        first = json.loads(log.read_text().splitlines()[0])
        assert (first["event"], first["version"], first["level"]) == ("serving", folder.name, "INFO")

    def test_overload_is_refused_at_once_and_told(self, service: Service, log: Path) -> None:
        """HAProxy refuses what comes while the replica stands still and as many wait as may, and tells the replica of
        some of them, which stand for the others.
        """
        (replica,) = (
            one for one in psutil.Process().children(recursive=True) if one.name().startswith("ray::ServeReplica:lexs")
        )
        address = service.address.removeprefix("http://")
        connections = [http.client.HTTPConnection(address, timeout=60) for _ in range(2 * (MAX_ONGOING + MAX_QUEUED))]
        refused: list[dict[str, str]] = []
        try:
            for _ in range(4):
                replica.suspend()
                try:
                    for connection in connections:
                        connection.request("GET", "/v1/similar?key=item-2&k=3", headers={"X-Request-Id": "mine"})
                finally:
                    replica.resume()
                for connection in connections:
                    answer = connection.getresponse()
                    document = json.loads(answer.read())
                    if answer.status == 503:
                        assert answer.headers["Retry-After"] == "1"
                        refused.append(document["error"])
                    else:
                        assert (answer.status, len(document["items"])) == (200, 3)
            assert len(refused) > len(connections) // 4
            assert {error["code"] for error in refused} == {"overloaded"}
            assert {error["request_id"] for error in refused} == {"mine"}
            connections[0].request("GET", "/v1/similar?key=item-2&k=3")
            assert connections[0].getresponse().status == 200
        finally:
            for connection in connections:
                connection.close()
        give_up = time.monotonic() + 60
        while not (told := [line for line in log.read_text().splitlines() if "overload_began" in line]):
            assert time.monotonic() < give_up
            threading.Event().wait(0.1)
        num_refused = json.loads(told[0])["refused"]
        assert num_refused > 0
        assert num_refused % SAMPLED == 0

    def test_the_metrics_port_of_a_ray_that_runs_is_not_ours_to_choose(self, service: Service, folder: Path) -> None:
        args = {"artifact": str(folder), "replicas": 1, "threads": 1}
        with pytest.raises(SettingError, match=r"^setting serve.metrics_port: is that of a Ray started here"):
            Service("127.0.0.1", free_port(), free_port()).start(args)

    def test_prometheus_finds_what_is_declared(self, service: Service, folder: Path) -> None:
        """From the replica over its node's agent, which passes metrics on every ten seconds. What Serve observes of
        each request's latency, at a high price, is not among them.
        """
        (address,) = service.metrics_addresses
        assert address.startswith("http://127.0.0.1:")
        assert request(service, "GET", "/v1/recommend?items=item-1&items=nope")[0] == 200
        wanted = {"ray_lexshard_requests_total", "ray_lexshard_recall", "ray_serve_deployment_request_counter"}
        give_up = time.monotonic() + 60
        found: dict[str, list[tuple[dict[str, str], float]]] = {}
        others: set[str] = set()
        while not wanted <= found.keys() | others:
            assert time.monotonic() < give_up, sorted(found)
            with urllib.request.urlopen(address, timeout=30) as answer:
                text = answer.read().decode()
            found, others = {}, set()
            for family in text_string_to_metric_families(text):
                others.add(family.name)
                for name, labels, value, *_ in family.samples:
                    if name.startswith("ray_lexshard_"):
                        found.setdefault(name, []).append((labels, value))
            threading.Event().wait(0.1)
        declared = {name: set(labels) for metric in METRICS for name, labels in metric.exported.items()}
        assert found.keys() <= declared.keys()
        assert "ray_serve_deployment_processing_latency_ms" not in others
        for name, series in found.items():
            assert all(declared[name] | {"deployment", "replica"} <= labels.keys() for labels, _ in series), name
        (live,) = {labels["version"] for labels, _ in found["ray_lexshard_live"]}
        assert live == folder.name
        recalls = {(labels["version"], labels["index"]): value for labels, value in found["ray_lexshard_recall"]}
        assert recalls[folder.name, "recommend"] == 1.0  # a Flat index
        (told, *_) = request(service, "GET", "/v1/versions")[1]["here"]["recall"]
        assert (told["version"], told["recall"]) == (folder.name, 1.0)
        buckets = {
            labels["le"]: value
            for labels, value in found["ray_lexshard_request_seconds_bucket"]
            if labels["route"] == "/v1/recommend"
        }
        assert len(buckets) == len(BOUNDS_SECONDS) + 1
        assert buckets["+Inf"] >= 1

    def test_a_second_application_beside_it(self, service: Service, folder: Path) -> None:
        """As a Serve config file would deploy it, under a route prefix."""
        from ray import serve

        serve.run(build({"artifact": str(folder), "max_k": 3}), name="second", route_prefix="/second")
        status, answer = request(service, "GET", "/v1/similar?key=item-1&k=4")
        assert (status, len(answer["items"])) == (200, 4)
        give_up = time.monotonic() + 30  # HAProxy learns of the new route a moment after Serve reports it
        while (reply := request(service, "GET", "/second/v1/similar?key=item-1&k=4"))[0] == 404:
            assert time.monotonic() < give_up
        status, answer = reply
        assert status == 400
        assert len(answer["error"].pop("request_id")) == 36
        assert answer == {"error": {"code": "invalid_request", "message": "`k` must be an integer in [1, 3]; got '4'"}}
