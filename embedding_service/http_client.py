"""Asks a running service over HTTP: the one client of `lexshard query` and `lexshard versions`."""

from __future__ import annotations

import http.client
import ipaddress
import json
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from cluster.errors import LexshardError
from embedding_service.http_access import CHANGE_VARIABLE, READ_VARIABLE, find_access

_TIMEOUT_SECONDS = 90.0  # more than any answer waits
_MAX_ANSWER_BYTES = 64 * 2**20


def ask(service: str, method: str, path: str, body: Any = None, *, token_file: str = "") -> dict[str, Any]:
    """The JSON document that the service answers. Raises LexshardError with its reason."""
    access = find_access(token_file)
    token = (access.read or access.change) if method == "GET" else (access.change or access.read)
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token.decode()}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = Request(service.rstrip("/") + path, data=data, headers=headers, method=method)
    proxies = [ProxyHandler({})] if is_loopback(service) else []
    opener = build_opener(_NoRedirects, *proxies)
    try:
        with opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
            told = json.loads(response.read(_MAX_ANSWER_BYTES))
        if not isinstance(told, dict):
            raise ValueError("its answer is no JSON object")
    except HTTPError as error:
        if 300 <= error.code < 400:
            where = str(error.headers.get("location"))[:300]
            raise LexshardError(f"{service} redirects to {where}; the token is not sent there: name that URL") from None
        problem = f"{service} answered {error.code}: {_reason(error.read(2**20))}"
        if error.code == 401:
            accepted = f"{READ_VARIABLE} or {CHANGE_VARIABLE}" if method == "GET" else CHANGE_VARIABLE
            shown = f"in {token_file}" if token_file else f"in the environment's {accepted}"
            problem += f"; this command shows the one {shown}"
        raise LexshardError(problem) from None
    except URLError as error:
        problem = str(getattr(error.reason, "strerror", None) or error.reason)
        hint = "; is `lexshard serve` running there?" if isinstance(error.reason, ConnectionRefusedError) else ""
        raise LexshardError(f"nothing answers at {service}: {problem}{hint}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        problem = str(error) or type(error).__name__
        raise LexshardError(f"{service} does not answer as a lexshard service: {problem}") from None
    return told


class _NoRedirects(HTTPRedirectHandler):
    """A redirect is an error: followed, it would take the token to another host."""

    def redirect_request(self, *_: Any) -> None:
        return None


def is_loopback(service: str) -> bool:
    """Whether the URL means this machine, where no proxy is asked."""
    try:
        host = urlsplit(service).hostname or ""
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _reason(body: bytes) -> str:
    """The message of an error answer; all of it where it is none of ours."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:500]
