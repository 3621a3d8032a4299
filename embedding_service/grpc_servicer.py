"""What Ray Serve is told to answer over gRPC: an import path, which its replicas and proxies call on their servers."""

from __future__ import annotations

from typing import Any

from embedding_service.retrieval_pb2_grpc import add_RetrievalServicer_to_server


def add_to_server(servicer: Any, server: Any) -> None:
    """`add_RetrievalServicer_to_server`, as far as Serve knows it.

    Serve puts its own calls in place of those that are added as generic handlers. Code that grpcio-tools generates adds
    them as registered ones, too, which come first and lead to `servicer`; Serve passes a mock for that.
    """
    add: Any = add_RetrievalServicer_to_server
    add(servicer, _Generic(server))


class _Generic:
    """Takes generic handlers alone."""

    def __init__(self, server: Any) -> None:
        self.add_generic_rpc_handlers = server.add_generic_rpc_handlers

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        pass
