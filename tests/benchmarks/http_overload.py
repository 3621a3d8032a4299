"""More requests than a service answers, sent at a steady rate whatever comes back, and what becomes of them.

wrk sends request number n at n / rate, or as soon as one of its connections is free: a refusal frees it at once, an
answer that is late does not keep the others back as long as there are more connections than the service lets wait.

Looking at the headers of every answer costs wrk, at ten thousand a second, a quarter of a core that it shares with the
service. It does so where it is asked to; else it counts successes and the rest, as its own code in C does anyway.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence
from dataclasses import dataclass

from tests.benchmarks.http_load import Request, run_wrk

_STEADY = """
local ffi = require("ffi")
ffi.cdef("typedef struct { long s; long ns; } stamp; int clock_gettime(int clock, stamp *now);")
local now, next_ms = ffi.new("stamp"), 0
delay = function()
  ffi.C.clock_gettime(1, now)
  local ms = tonumber(now.s) * 1000 + tonumber(now.ns) / 1e6
  if next_ms == 0 then next_ms = ms end
  next_ms = next_ms + 1000 / %(rate)f
  return math.max(0, math.floor(next_ms - ms))
end
"""
_LOOK = """
answered, refused, bare_refusals, others = 0, 0, 0, 0
local statuses = {}
response = function(status, headers)
  if status == 200 then answered = answered + 1
  elseif status ~= 503 then
    others = others + 1
    statuses[status] = (statuses[status] or 0) + 1
    if statuses[status] == 1 then io.stderr:write("status " .. status .. "\\n") end
  else
    local told = false
    for name in pairs(headers) do if name:lower() == "retry-after" then told = true end end
    if told then refused = refused + 1 else bare_refusals = bare_refusals + 1 end
  end
end
"""
_TELL = """
local threads = {}
setup = function(thread) threads[#threads + 1] = thread end
done = function(summary, latency)
  local e, t = summary.errors, threads[1]
  local answered, refused, others = summary.requests - e.status, e.status, 0
  if t:get("answered") then
    answered, refused, others = t:get("answered"), t:get("refused"), t:get("bare_refusals") + t:get("others")
  end
  io.write(string.format('\\n{"microseconds": %d, "answered": %d, "refused": %d, "others": %d, "broken": %d, ' ..
    '"late": %d, "p50_us": %f, "p99_us": %f, "max_us": %f}', summary.duration, answered, refused, others,
    e.connect + e.read + e.write, e.timeout, latency:percentile(50), latency:percentile(99), latency.max))
end
"""


@dataclass(frozen=True)
class Overload:
    """Per second: `offered` = `answered` (200) + `refused` (503 with Retry-After) + `others`.

    `others`, `broken` (connections) and `late` (unanswered within the timeout) are counts; latencies of all answers.
    Unless `looked_at`, everything but a success is in `refused`. `client_cores`: how many of the machine's cores wrk
    itself took.
    """

    offered: float
    answered: float
    refused: float
    others: int
    broken: int
    late: int
    p50_ms: float
    p99_ms: float
    max_ms: float
    client_cores: float
    looked_at: bool

    @property
    def is_orderly(self) -> bool:
        """Every request was answered within its timeout, if `looked_at` with what it asked for or when to come back."""
        return self.others == self.broken == self.late == 0


def overload(
    address: str,
    requests: Sequence[Request],
    *,
    rate: float,
    connections: int,
    seconds: float,
    timeout_seconds: float,
    look: bool = False,
) -> Overload:
    """`rate` requests per second over at most `connections` connections; `look` at each answer. Needs wrk."""
    before = _children_seconds()
    counted = run_wrk(
        address,
        requests,
        _STEADY % {"rate": rate} + (_LOOK if look else "") + _TELL,
        connections=connections,
        seconds=seconds,
        timeout_seconds=timeout_seconds,
    )
    duration = counted["microseconds"] / 1e6
    return Overload(
        offered=(counted["answered"] + counted["refused"] + counted["others"]) / duration,
        answered=counted["answered"] / duration,
        refused=counted["refused"] / duration,
        others=counted["others"],
        broken=counted["broken"],
        late=counted["late"],
        p50_ms=counted["p50_us"] / 1e3,
        p99_ms=counted["p99_us"] / 1e3,
        max_ms=counted["max_us"] / 1e3,
        client_cores=(_children_seconds() - before) / duration,
        looked_at=look,
    )


def _children_seconds() -> float:
    """CPU of the child processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
