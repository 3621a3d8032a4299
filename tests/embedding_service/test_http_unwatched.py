"""GET requests that Serve does not watch: what the middleware adds, and that Serve takes it as it is meant."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import uvicorn

from embedding_service.app import deployment_options
from embedding_service.http_unwatched import ENVIRONMENT, HEADER, Unwatched


@pytest.mark.parametrize(
    ("scope", "added"),
    [
        ({"type": "http", "method": "GET"}, [HEADER]),
        ({"type": "http", "method": "POST"}, []),  # may be large, and its client may leave before it is answered
        ({"type": "websocket"}, []),
    ],
)
def test_the_header_is_put_on_get_requests(scope: dict[str, Any], added: list[Any]) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.extend(scope["headers"])

    async def nothing(*_: Any) -> Any:
        raise AssertionError

    asyncio.run(Unwatched(app)({**scope, "headers": [(b"host", b"x")]}, nothing, nothing))  # type: ignore[arg-type]
    assert seen == [(b"host", b"x"), *added]


async def unused(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError


def test_serve_finds_the_middleware_and_understands_its_header() -> None:
    from ray.serve._private.http_util import parse_disconnect_disabled_header, validate_http_proxy_callback_return
    from ray.serve._private.utils import call_function_from_import_path

    (path,) = ENVIRONMENT.values()
    (middleware,) = validate_http_proxy_callback_return(call_function_from_import_path(path))
    assert middleware.cls is Unwatched
    config = uvicorn.Config(Unwatched(unused))
    config.load()
    assert config.interface == "asgi3"  # else replicas answer nothing, and HAProxy falls back on Serve's slow proxy
    assert parse_disconnect_disabled_header(dict([HEADER]))
    environment = deployment_options()["ray_actor_options"]["runtime_env"]["env_vars"]
    assert ENVIRONMENT.items() <= environment.items()
