"""Endpoints that export a run and tell how it goes.

    POST /v1/exports         {"run"}       begin; 409 where one runs already; "activate": make the version live then
    GET  /v1/exports                       the exports that were asked for, the latest first
    GET  /v1/exports/{id}

An export takes seconds to hours: it is answered with 202 and its record, whose `state` is running, then published,
failed or interrupted. All three need the token for changes: why an export has failed may quote what its config takes
from the environment.
"""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from pydantic import Field

from cluster.errors import ArtifactError
from embedding_service.export_records import RECORD_ID
from embedding_service.exports import Exports, Which
from embedding_service.http_messages import Response, json_response
from embedding_service.http_openapi import Operation
from embedding_service.http_schema import Problem, Strict, parse_body
from embedding_service.service_logs import log_event

logger = logging.getLogger(__name__)

EXPORTS, ONE_EXPORT = "/v1/exports", "/v1/exports/{id}"


class Export(Strict):
    run: str = Field(max_length=500, description="a run's folder below serve.runs, like clicks or team/clicks")
    which: Which = Field("best", description="its checkpoint")
    activate: bool = Field(False, description="make the version live if the gates say so")


_TOKEN = {"401": "without the token", "403": "changes are switched off"}

OPERATIONS = (
    Operation("GET", EXPORTS, "exports and how they go", token=True, errors=_TOKEN),
    Operation(
        "POST",
        EXPORTS,
        "export a run as a version",
        Export,
        True,
        202,
        answer="begun",
        errors={
            "400": "the body is wrong",
            "401": "without the token",
            "403": "changes, or exports, are switched off",
            "404": "there is no such run",
            "409": "another export runs, or the service cannot do it; the message says why",
            "413": "the body is too large",
        },
    ),
    Operation(
        "GET",
        ONE_EXPORT,
        "an export and how it goes",
        token=True,
        names={"id": RECORD_ID.pattern},
        errors=_TOKEN | {"400": "that is no export's id", "404": "there is no such export"},
    ),
)


class ExportEndpoints:
    """The handlers of OPERATIONS. `exports`: None where the service was started without a root of runs."""

    def __init__(self, exports: Exports | None) -> None:
        self._exports = exports

    async def all(self, _: bytes) -> Response:
        found = await asyncio.to_thread(self._exports.records.all) if self._exports is not None else []
        return json_response({"exports": found})

    async def begin(self, body: bytes) -> Response:
        asked = parse_body(Export, body)
        try:
            record = await asyncio.to_thread(partial(self._begin, asked))
        except Problem as problem:
            log_event(logger, "refused", level=logging.WARNING, asked="export", run=asked.run, reason=str(problem))
            raise
        return json_response(record, 202)

    async def one(self, _: bytes, id: str) -> Response:
        if not RECORD_ID.fullmatch(id):
            message = f"{id[:100]!r} is no export's id: 16 of 0-9 and a-f, as {EXPORTS} lists them"
            raise Problem(400, "invalid_request", message)
        found = await asyncio.to_thread(self._exports.records.find, id) if self._exports is not None else None
        if found is None:
            raise Problem(404, "unknown_export", f"there is no export {id}; {EXPORTS} lists the latest")
        return json_response(found)

    def _begin(self, asked: Export) -> dict[str, Any]:
        if self._exports is None:
            message = (
                "exports are switched off: the service was started without serve.runs, the folder that runs lie below, "
                "or on the folder of one version"
            )
            raise Problem(403, "exports_off", message)
        try:
            return self._exports.begin(asked.run, which=asked.which, activate=asked.activate)
        except BlockingIOError:
            running = next((one for one in self._exports.records.all() if one["state"] == "running"), None)
            what = "another export runs" if running is None else f"the export of {running['run']} runs"
            where = EXPORTS if running is None else f"{EXPORTS}/{running['id']}"
            message = f"{what}, and one is done at a time: GET {where} tells how it goes"
            raise Problem(409, "busy", message) from None
        except ArtifactError as error:
            raise Problem(404, "unknown_run", str(error)) from None
        except OSError as error:
            logger.exception("an export cannot be noted")
            message = f"the folder of versions cannot be changed: {error.strerror or error}"
            raise Problem(409, "read_only", message) from None
