"""What the service writes down: one line per event, for people or as JSON for programs, through `logging`.

    {"time": "2026-03-01T09:30:00.120+00:00", "level": "INFO", "event": "activated", "version": "0042", "pid": 711}

Events of the service, besides warnings and errors, which have a "message" in the place of an event's fields:

    published activated refused canary_started canary_ended rolled_back removed     what somebody asked for
    export_began export_published export_failed export_interrupted
    serving                                                this replica now answers with another version, or begins
    recall_low recall_recovered                            the probe of the live index (`recall_probe`)
    overload_began overload_ended                          requests are answered with 503, and no more
    request                                                with `access_log`: id, route, status, milliseconds

Nothing of a request but what is named here is written: no header, and so no token, no body and no query string.
"""

from __future__ import annotations

import json
import logging
import os
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from typing import Any, Literal

from cluster.errors import SettingError

LogFormat = Literal["text", "json"]
LogLevel = Literal["info", "warning"]
LOGGERS = ("embedding_service", "cluster")


def log_event(logger: logging.Logger, event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """One line for `event`; None fields are left out."""
    if logger.isEnabledFor(level):
        told = {name: value for name, value in fields.items() if value is not None}
        text = " ".join([event, *(f"{name}={_plain(value)}" for name, value in told.items())])
        logger.log(level, "%s", text, extra={"event": event, "fields": told})


class JsonLines(logging.Formatter):
    """A record as one JSON object on one line."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time, "level": record.levelname}
        if hasattr(record, "event"):
            line |= {"event": record.event, **getattr(record, "fields", {})}
        else:
            line |= {"logger": record.name, "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line | {"pid": os.getpid()}, default=str)


def configure_logs(log_format: LogFormat = "text", file: str = "", level: LogLevel = "info") -> logging.Handler:
    """Write this process's events, warnings and errors to `file`, else to stderr. Returns what writes them.

    level: `warning` leaves events out that are no warnings.

    A file that is moved away, as logrotate does, is begun anew; several processes may append to one. Raises
    SettingError (serve.log_file) if it cannot be written.
    """
    try:
        handler = WatchedFileHandler(file, encoding="utf-8") if file else logging.StreamHandler()
    except OSError as error:
        raise SettingError("serve.log_file", f"{file} cannot be written: {error.strerror}") from None
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(JsonLines() if log_format == "json" else text)
    for name in LOGGERS:
        logger = logging.getLogger(name)
        logger.setLevel(level.upper())
        logger.addHandler(handler)
        logger.propagate = False
    return handler


def _plain(value: Any) -> str:
    """On one line, whoever has written it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if text.isprintable() and " " not in text and text else json.dumps(text)
