"""Query strings: the short way gives what the standard library's parser gives."""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qsl

import pytest

from embedding_service.http_messages import parameters, read_body
from embedding_service.http_schema import Problem

QUERIES = (
    "", "a", "a=", "=b", "a=b", "a=b=c", "a=1&a=2", "a=1&&b=2&", "&", "a;b=1", "a=ä", "a=%C3%A4", "a+b=c+d", "a=%zz",
)  # fmt: skip


@pytest.mark.parametrize("query", QUERIES)
def test_parameters_are_those_of_the_standard_library(query: str) -> None:
    assert parameters(query.encode()) == parse_qsl(query, keep_blank_values=True, errors="strict")


@pytest.mark.parametrize("query", [b"a=\xff", b"a=%ff"])
def test_what_is_not_utf8_is_refused(query: bytes) -> None:
    with pytest.raises(Problem, match="the query string is not UTF-8"):
        parameters(query)


def test_a_body_that_never_ends_is_refused() -> None:
    pieces = [{"type": "http.request", "body": b"{", "more_body": True}]

    async def receive() -> dict[str, object]:
        return pieces.pop() if pieces else await asyncio.Event().wait()  # type: ignore[return-value]

    with pytest.raises(Problem, match=r"the body was not there within 0\.01 s") as raised:
        asyncio.run(read_body({"headers": []}, receive, 100, seconds=0.01))
    assert (raised.value.status, raised.value.code) == (408, "body_too_slow")
    assert (b"connection", b"close") in raised.value.headers
