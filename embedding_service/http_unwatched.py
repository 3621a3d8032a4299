"""GET requests without the two tasks that Serve begins for each, to notice that its client has left.

They are answered within a turn of the event loop or two: by the time that a task could be told to stop it has ended.
Serve takes this from a header of the request, which a client may send; `middlewares`, which Serve calls in every
replica whose environment names it, has the replica add it by itself. POST requests, which may be large, are watched.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from embedding_service.http_messages import Receive, Scope, Send

HEADER = (b"x-request-disconnect-disabled", b"?1")
ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}:middlewares"}

_App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Unwatched:
    """Puts the header on GET requests."""

    def __init__(self, app: _App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "GET":
            scope["headers"].append(HEADER)
        await self._app(scope, receive, send)


def middlewares() -> list[Any]:
    from starlette.middleware import Middleware

    return [Middleware(Unwatched)]
