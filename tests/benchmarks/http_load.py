"""A load generator for the HTTP benchmarks: `wrk` where it is installed, else a client of our own in another process.

The client shares the machine's cores with what it measures. wrk needs about a tenth of a core at ten thousand requests
per second, the Python client most of one: figures of the two are not to be mixed, and every result names its client.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

_REQUESTS = """
local requests = {}
for one in io.open(%(requests)s, "rb"):read("*a"):gmatch("[^%%z]+") do requests[#requests + 1] = one end
local turn = 0
request = function()
  turn = turn %% #requests + 1
  return requests[turn]
end
"""
_FIGURES = """
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format('\\n{"requests": %d, "microseconds": %d, "p50_us": %f, "p99_us": %f, "errors": %d}',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99),
    e.connect + e.read + e.write + e.status + e.timeout))
end
"""


class Request(NamedTuple):
    """GET `path` (with query), or POST a JSON document to it."""

    path: str
    body: bytes = b""
    headers: tuple[tuple[str, ...], ...] = ()

    def raw(self, host: str) -> bytes:
        lines = [f"{'POST' if self.body else 'GET'} {self.path} HTTP/1.1", f"Host: {host}"]
        lines += [f"{name}: {value}" for name, value in self.headers]
        if self.body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(self.body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + self.body


@dataclass(frozen=True)
class Load:
    """What one connection count reached. `errors` counts answers other than 2xx and 3xx, and broken connections."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    errors: int


def client_name() -> str:
    return "wrk" if shutil.which("wrk") else "python"


def measure(address: str, requests: Sequence[Request], *, connections: int, seconds: float) -> Load:
    """Send `requests` to `address` in turn over keep-alive connections, as fast as answers come."""
    if client_name() == "wrk":
        counted = run_wrk(address, requests, _FIGURES, connections=connections, seconds=seconds)
        return Load(
            requests_per_second=counted["requests"] / (counted["microseconds"] / 1e6),
            p50_ms=counted["p50_us"] / 1e3,
            p99_ms=counted["p99_us"] / 1e3,
            errors=counted["errors"],
        )
    with tempfile.TemporaryDirectory() as folder:
        file = _written(Path(folder), address, requests)
        arguments = [address, str(file), str(connections), str(seconds)]
        command = [sys.executable, "-m", "tests.benchmarks.http_load", *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Load(**json.loads(done.stdout))


def run_wrk(
    address: str,
    requests: Sequence[Request],
    script: str,
    *,
    connections: int,
    seconds: float,
    timeout_seconds: float = 2.0,
) -> dict[str, Any]:
    """The JSON object that the Lua `script`, run behind the one that gives the requests, writes as its last line."""
    with tempfile.TemporaryDirectory() as folder:
        file = _written(Path(folder), address, requests)
        lua = file.with_suffix(".lua")
        lua.write_text(_REQUESTS % {"requests": json.dumps(str(file))} + script)
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}"]
        command += ["--timeout", f"{math.ceil(timeout_seconds)}s", "-s", str(lua), address]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _written(folder: Path, address: str, requests: Sequence[Request]) -> Path:
    file = folder / "requests"
    file.write_bytes(b"\0".join(request.raw(urlsplit(address).netloc) for request in requests))
    return file


async def _drive(host: str, port: int, requests: list[bytes], connections: int, seconds: float) -> Load:
    latencies: list[float] = []
    errors = 0
    start = time.perf_counter()
    deadline = start + seconds

    async def one_connection(first: int) -> None:
        nonlocal errors
        reader, writer = await asyncio.open_connection(host, port)
        turn = first
        while (sent := time.perf_counter()) < deadline:
            writer.write(requests[turn % len(requests)])
            turn += connections
            head = await reader.readuntil(b"\r\n\r\n")
            await _skip_body(reader, head.lower())
            latencies.append(time.perf_counter() - sent)
            errors += head[9:10] not in (b"2", b"3")
        writer.close()

    outcomes = await asyncio.gather(*map(one_connection, range(connections)), return_exceptions=True)
    wall = time.perf_counter() - start
    errors += sum(isinstance(outcome, BaseException) for outcome in outcomes)
    p50, p99 = np.percentile(latencies, [50, 99]) * 1e3 if latencies else (np.inf, np.inf)
    return Load(len(latencies) / wall, float(p50), float(p99), errors)


async def _skip_body(reader: asyncio.StreamReader, head: bytes) -> None:
    """Read to the end of an answer whose header, in lower case, is `head`."""
    if b"transfer-encoding: chunked" not in head:
        await reader.readexactly(int(head.split(b"content-length:", 1)[1].split(b"\r\n", 1)[0]))
        return
    while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
        await reader.readexactly(size + 2)
    await reader.readuntil(b"\r\n")


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("address")
    parser.add_argument("requests", type=Path)
    parser.add_argument("connections", type=int)
    parser.add_argument("seconds", type=float)
    args = parser.parse_args()
    url = urlsplit(args.address)
    requests = args.requests.read_bytes().split(b"\0")
    load = asyncio.run(_drive(url.hostname or "", url.port or 80, requests, args.connections, args.seconds))
    print(json.dumps(asdict(load)))


if __name__ == "__main__":
    _main()
