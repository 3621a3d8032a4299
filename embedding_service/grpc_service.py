"""The questions of `HttpService` as gRPC: the same versions, checks, limits and counts, in protobuf messages.

Ray Serve has the server, and calls `answer` for each call of `lexshard.v1.Retrieval` (retrieval.proto). A refusal is
an empty answer with a status: an exception would be Serve's own failure, with a traceback in its log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import grpc

from embedding_service import grpc_messages as messages
from embedding_service import retrieval_pb2 as pb
from embedding_service.http_messages import REQUEST_ID, Scope
from embedding_service.http_schema import Catalogue, Limits, Problem
from embedding_service.http_service import CALLER, HttpService

SERVICER = "embedding_service.grpc_servicer:add_to_server"  # what Serve is told
_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.INVALID_ARGUMENT,  # not RESOURCE_EXHAUSTED, which may be asked again
    503: grpc.StatusCode.UNAVAILABLE,
}
_HEADERS = {"authorization": b"authorization", "x-caller-id": CALLER, "request_id": REQUEST_ID}  # of the metadata
_Read = Callable[[Any, Catalogue, Limits], dict[str, Any]]
_Write = Callable[[Mapping[str, Any]], Any]
_CALLS: dict[str, tuple[str, _Read, _Write, type]] = {
    "Similar": ("/v1/similar", messages.read_similar, messages.write_answers, pb.Answers),
    "Recommend": ("/v1/recommend", messages.read_recommend, messages.write_answers, pb.Answers),
    "Search": ("/v1/search", messages.read_search, messages.write_answers, pb.Answers),
    "Embed": ("/v1/embed", messages.read_embed, messages.write_embeddings, pb.Embeddings),
}


class Context(Protocol):
    """What is needed of Serve's context of a call."""

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]: ...
    def trailing_metadata(self) -> list[tuple[str, str]]: ...  # Serve has put `request_id` there
    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None: ...  # keeps `request_id`
    def set_code(self, code: grpc.StatusCode) -> None: ...
    def set_details(self, details: str) -> None: ...


class GrpcService:
    """Any number of calls at once, in the event loop of the `HttpService`."""

    def __init__(self, service: HttpService) -> None:
        self._service = service

    async def answer(self, call: str, request: Any, context: Context) -> Any:
        """The answer to `request`, a message of `call`; after a refusal an empty one, with its status in `context`."""
        route, read, write, kind = _CALLS[call]
        scope = _scope(route, context)
        try:
            return await self._service.ask(scope, request.ByteSize(), partial(read, request), write)
        except Problem as problem:
            context.set_code(_STATUS.get(problem.status, grpc.StatusCode.INTERNAL))
            context.set_details(str(problem))
            context.set_trailing_metadata([("code", problem.code)])
            return kind()


def _scope(route: str, context: Context) -> Scope:
    """As an HTTP request would have it."""
    found = [*context.trailing_metadata(), *context.invocation_metadata()]  # the request's id as it is answered
    headers = [
        (_HEADERS[name], value if isinstance(value, bytes) else value.encode())
        for name, value in found
        if name in _HEADERS
    ]
    return {"type": "grpc", "method": "gRPC", "path": route, "query_string": b"", "headers": headers}
