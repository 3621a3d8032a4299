"""A Chroma server with given vectors, as the peer of the HTTP benchmarks: started from an environment of its own."""

from __future__ import annotations

import contextlib
import http.client
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import orjson

from tests.benchmarks.http_endpoints import free_port
from tests.benchmarks.http_load import Request

_COLLECTIONS = "/api/v2/tenants/default_tenant/databases/default_database/collections"


def find_chroma(program: str) -> str | None:
    """The path of the `chroma` program; None if it is not here."""
    return shutil.which(program)


class ChromaServer:
    """Answers the nearest of some vectors by inner product."""

    def __init__(self, address: str, collection: str) -> None:
        self.address, self._path = address, f"{_COLLECTIONS}/{collection}"

    def request(self, vector: np.ndarray, k: int) -> Request:
        body = {"query_embeddings": [vector.tolist()], "n_results": k, "include": ["distances"]}
        return Request(f"{self._path}/query", orjson.dumps(body))

    def add(self, start: int, vectors: np.ndarray) -> None:
        """float32 [n, dim]; their ids are their rows, from `start`."""
        ids = [str(row) for row in range(start, start + len(vectors))]
        _ask(self.address, "POST", f"{self._path}/add", {"ids": ids, "embeddings": vectors})

    def rows(self, vector: np.ndarray, k: int) -> list[int]:
        request = self.request(vector, k)
        found = _ask(self.address, "POST", request.path, orjson.loads(request.body))
        return [int(row) for row in found["ids"][0]]


@contextlib.contextmanager
def chroma_server(program: str, *, start_seconds: float = 60.0) -> Iterator[ChromaServer]:
    """Runs on 127.0.0.1 until the context is left; its default HNSW settings, by inner product."""
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [program, "run", "--path", folder, "--host", "127.0.0.1", "--port", str(port)]
        environment = os.environ | {"ANONYMIZED_TELEMETRY": "False", "CHROMA_OTEL_GRANULARITY": "none"}
        server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
        try:
            address = f"http://127.0.0.1:{port}"
            _await_answer(server, address, time.monotonic() + start_seconds)
            made = _ask(address, "POST", _COLLECTIONS, {"name": "items", "configuration": {"hnsw": {"space": "ip"}}})
            yield ChromaServer(address, made["id"])
        finally:
            server.terminate()
            server.wait(30)


def _await_answer(server: subprocess.Popen[bytes], address: str, deadline: float) -> None:
    while True:
        assert server.poll() is None, f"the Chroma server has ended with {server.returncode}"
        assert time.monotonic() < deadline, "the Chroma server does not answer"
        try:
            _ask(address, "GET", "/api/v2/heartbeat")
        except OSError:
            time.sleep(0.1)
        else:
            return


def _ask(address: str, method: str, path: str, body: Any = None) -> Any:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    try:
        sent = None if body is None else orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY)
        connection.request(method, path, sent, {"content-type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
        assert response.status in (200, 201), f"{method} {path}: {response.status} {answer[:300]!r}"
        return orjson.loads(answer) if answer else None
    finally:
        connection.close()
