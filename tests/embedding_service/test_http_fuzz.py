"""The service asked whatever its own OpenAPI document allows, and a good deal that it does not: never a 5xx."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
import requests  # type: ignore[import-untyped]
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode

from embedding_service.http_management import OPERATIONS
from embedding_service.towers import TowerInput, TowerSpec
from tests.embedding_service.artifacts import DIM, HISTORY, publish
from tests.embedding_service.services import TOKEN, LocalService

EXAMPLES = 15  # per operation and mode
KNOWN = ["i0001", "i0007", "i0042", "unknown"]
_KEYS = {"key", "keys", "items", "session", "sessions", "allow", "deny", "like"}  # fields and parameters


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    torch.set_flush_denormal(False)  # where a test before has trained in this process: Hypothesis draws any number
    root = tmp_path_factory.mktemp("root")
    shop = TowerInput("shop", "shop", "shop", DIM, encoder="mean")
    spec = TowerSpec((HISTORY, TowerInput("user", "user", "user", DIM), shop), DIM)
    publish(root, version="one", num_items=60, spec=spec, with_map=True)
    runs = tmp_path_factory.mktemp("runs")
    (runs / "link").symlink_to(root)
    running = LocalService(root, "one", runs=runs)
    yield running
    running.close()


def raw(service: LocalService, case: Any) -> tuple[int, bytes]:
    """The request that schemathesis has made, through the ASGI interface."""
    made = case.as_transport_kwargs(base_url="http://service")
    parts = {name: made.get(name) for name in ("params", "headers", "data", "json")}
    prepared = requests.Request(made["method"], made["url"], **parts).prepare()
    path, _, query = prepared.path_url.partition("?")
    sent_along = [(name.lower(), str(value)) for name, value in prepared.headers.items()]
    headers = [(name.encode(), value.encode("latin-1")) for name, value in sent_along if name != "authorization"]
    body = prepared.body or b""
    scope = {
        "type": "http",
        "method": prepared.method,
        "path": path,
        "query_string": query.encode(),
        "headers": [*headers, (b"authorization", b"Bearer " + TOKEN)],
    }
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": body if isinstance(body, bytes) else body.encode()}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(service.app(scope, receive, send))
    return sent[0]["status"], sent[1]["body"]


def knowing(document: Any, *, is_key: bool = False) -> Any:
    """The OpenAPI document with keys that the catalogue has, most of them, in place of any string."""
    if isinstance(document, list):
        return [knowing(one, is_key=is_key) for one in document]
    if not isinstance(document, dict):
        return document
    if is_key and document.get("type") == "string":
        return {**document, "enum": KNOWN}
    if document.get("in") == "query":
        return {**document, **knowing({"schema": document.get("schema", {})}, is_key=document["name"] in _KEYS)}
    properties = {name: knowing(one, is_key=name in _KEYS) for name, one in document.get("properties", {}).items()}
    rest = {name: knowing(one, is_key=is_key) for name, one in document.items() if name != "properties"}
    return {**rest, "properties": properties} if properties else rest


READING = [
    ("GET", "similar"), ("POST", "similar"), ("POST", "search"), ("GET", "recommend"), ("POST", "recommend"),
    ("POST", "embed"), ("GET", "version"), ("GET", "health"), ("GET", "figures"), ("GET", "map"), ("GET", "keys"),
]  # fmt: skip
ALL = [*[(method, f"/v1/{name}") for method, name in READING], *[(one.method, one.path) for one in OPERATIONS]]
SETTINGS = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(("method", "path"), ALL)
def test_no_request_is_answered_with_5xx(service: LocalService, method: str, path: str) -> None:
    document = json.loads(service.ask("GET", "/openapi.json").body)
    described = document["paths"][path][method.lower()]
    can_be_wrong = described.get("parameters") or "requestBody" in described
    schema = schemathesis.openapi.from_dict(knowing(document))
    seen: set[int] = set()
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)[: 1 + bool(can_be_wrong)]:

        @SETTINGS
        @given(case=schema[path][method].as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            status, body = raw(service, case)
            assert status < 500, (case.body, body)
            seen.add(status)
            if status >= 400:
                assert json.loads(body)["error"]["code"]

        ask()
    assert 400 in seen or not can_be_wrong
    assert 200 in seen or (method, path.removeprefix("/v1/")) not in READING
    assert service.versions.now.live.version == "one"


def test_all_operations_are_asked(service: LocalService) -> None:
    paths = json.loads(service.ask("GET", "/openapi.json").body)["paths"]
    assert {(method.upper(), path) for path, methods in paths.items() for method in methods} == set(ALL)
