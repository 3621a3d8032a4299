"""The queue before the replicas, and refusals, in HAProxy: neither costs a replica anything there.

A replica answers fastest when it has some dozens of requests at a time. With more the turns of its event loop grow, and
each takes in one new connection: with 256 callers, 1 in 100 waited about a second (`serve_load`). So HAProxy passes on
to each what it works on at once, and the others wait in HAProxy, for whichever replica is free first. Single queries
beyond what may wait are answered by HAProxy with a 503; some go to a replica, marked, to be refused there and counted
for the others.
What else HAProxy refuses (bulk requests beyond twice as many, no replica) is not in a replica's metrics, and neither is
the time that requests wait here.

Serve writes HAProxy's configuration and puts the value of the environment variable `VARIABLE` into every backend, amid
a `default-server` line: `backend_rules` goes on with that line, then with lines of its own. All applications of that
Serve get them: they are for one that runs lexshard alone. On n nodes there are n HAProxies, each within its limits, and
replicas keep limits of their own (`http_refusals`).

    python -m embedding_service.haproxy_refusals     prints the value, for deploy/serve.yaml
"""

from __future__ import annotations

MAX_ONGOING = 64  # requests in a replica at a time: twice what it answers fastest with
MAX_QUEUED = 320  # and that wait
VARIABLE = "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER"
SAMPLED = 32
REFUSED_HEADER = "x-lexshard-refused"  # of a request that stands for SAMPLED refused ones: replicas count and log them
_INTERVAL = "5s"  # Serve's default of what the variable is for
# A replica that does not accept connections is left out at once, until health checks find it again: with nothing to
# work on it would be the least busy one, and what is passed on to it in vain is refused after a few attempts
_GONE = "observe layer4 error-limit 2 on-error mark-down"
_QUEUE_SECONDS = 5  # for single queries that is a replica at a stop; for what waits behind bulk requests, enough
_FULL = "more requests than the replicas take on: come back in a second"
_NONE_FREE = "no replica could take this request on in time: come back in a second"


def backend_rules(ongoing: int = MAX_ONGOING, queued: int = MAX_QUEUED) -> str:
    """The value of `VARIABLE` with which each replica has `ongoing` requests at a time, and `queued` wait for each.

    Single queries (GET) beyond that are refused. All else waits, in places of its own: another `queued` for each.
    """
    refuse = f"http-request return status 503 {_error(_FULL)}"
    return "\n    ".join(
        [
            f"{_INTERVAL} maxconn {ongoing} {_GONE}",
            f"timeout queue {_QUEUE_SECONDS}s",
            f"http-error status 503 {_error(_NONE_FREE)}",
            f"http-request del-header {REFUSED_HEADER}",  # which is not for clients to set
            "http-request set-header x-request-id %[uuid()] if !{ req.fhdr(x-request-id) -m found }",  # or Serve would
            f"http-request allow if {{ avg_queue lt {queued} }}",  # nearly always: these pay for no more than that
            f"{refuse} if {{ avg_queue ge {2 * queued} }}",
            "http-request allow if !{ method GET } or !{ path_end /v1/similar /v1/recommend }",
            f"http-request set-header {REFUSED_HEADER} {SAMPLED} if {{ rand({SAMPLED}) eq 0 }}",
            f"http-request allow if {{ req.hdr({REFUSED_HEADER}) -m found }}",
            "http-request set-log-level silent",  # a datagram each to a log that hardly anybody reads
            refuse,
            f"default-server inter {_INTERVAL}",  # Serve goes on with this line
        ]
    )


def _error(message: str) -> str:
    request_id = "%[req.fhdr(x-request-id),json(utf8s)]"
    document = f'{{"error":{{"code":"overloaded","message":"{message}","request_id":"{request_id}"}}}}'
    headers = "hdr retry-after 1 hdr x-request-id %[req.fhdr(x-request-id)]"
    return f"content-type application/json {headers} lf-string '{document}'"


if __name__ == "__main__":
    print(backend_rules())
