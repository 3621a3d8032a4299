"""Lines of the log: one per event, JSON or text, and never a token."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import SettingError
from embedding_service import activations, admission
from embedding_service.gates import Gates
from embedding_service.service_args import checked_args
from embedding_service.service_logs import LOGGERS, configure_logs, log_event
from tests.embedding_service.artifacts import publish
from tests.embedding_service.services import TOKEN, LocalService

READ_TOKEN, GUESS = b"another-token-to-read", "a-guess-of-somebody-else"
logger = logging.getLogger("embedding_service.somewhere")


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Path]:
    """A file that events are written to as JSON, until the test is over."""
    former = {name: (logging.getLogger(name).level, logging.getLogger(name).propagate) for name in LOGGERS}
    handler = configure_logs("json", str(tmp_path / "service.log"))
    yield tmp_path / "service.log"
    for name, (level, propagate) in former.items():
        logging.getLogger(name).removeHandler(handler)
        logging.getLogger(name).setLevel(level)
        logging.getLogger(name).propagate = propagate
    handler.close()


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def test_an_event_is_one_json_object(log: Path) -> None:
    log_event(logger, "published", version="a\nb", share=0.5, forced=None)
    log_event(logger, "recall_low", level=logging.WARNING, recall=0.25)
    logger.debug("not shown")
    first, second = lines(log)
    assert first.pop("time")[-6:] == "+00:00"
    assert type(first.pop("pid")) is int
    assert first == {"level": "INFO", "event": "published", "version": "a\nb", "share": 0.5}
    assert (second["level"], second["event"], second["recall"]) == ("WARNING", "recall_low", 0.25)


def test_events_can_be_left_out_and_warnings_never_are(tmp_path: Path, log: Path) -> None:
    handler = configure_logs("json", str(tmp_path / "warnings.log"), "warning")
    try:
        log_event(logger, "published", version="a")
        log_event(logger, "recall_low", level=logging.WARNING)
        logger.error("looking at versions failed")
        assert [line["level"] for line in lines(tmp_path / "warnings.log")] == ["WARNING", "ERROR"]
    finally:
        for name in LOGGERS:
            logging.getLogger(name).removeHandler(handler)
        handler.close()
    with pytest.raises(SettingError, match=r"args\.access_log: args\.log_level = warning leaves its lines out"):
        checked_args({"artifact": "x", "access_log": True, "log_level": "warning"})


def test_a_message_that_is_no_event(log: Path) -> None:
    try:
        raise OSError("no such disk")
    except OSError:
        logger.exception("looking at %s failed", "versions")
    (line,) = lines(log)
    assert (line["level"], line["logger"], line["message"]) == ("ERROR", logger.name, "looking at versions failed")
    assert "OSError: no such disk" in line["exception"]


def test_a_line_for_people(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        log_event(logger, "refused", version="b", reason="gate overlap: 0.01\nlimit", forced=["x"], share=None)
    assert caplog.messages == ['refused version=b reason="gate overlap: 0.01\\nlimit" forced=["x"]']


def test_a_file_that_is_moved_away_is_begun_anew(log: Path) -> None:
    log_event(logger, "one")
    log.rename(log.with_suffix(".1"))
    log_event(logger, "two")
    assert [line["event"] for line in lines(log)] == ["two"]


def test_a_file_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"^setting serve.log_file: .*none/x.log cannot be written: No such file"):
        configure_logs("text", str(tmp_path / "none" / "x.log"))


def test_events_of_a_service_and_no_token(log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> object:
        return admission.admit(candidate, live, gates)

    monkeypatch.setattr(activations, "admit_apart", admit_here)
    root = tmp_path / "root"
    for version in ("a", "b"):
        publish(root, version=version)
    publish(root, version="small", num_items=100)
    shutil.move(root / "b", root / "incoming" / "b")
    service = LocalService(root, "a", read_token=READ_TOKEN, access_log=True)
    wait = {"wait_seconds": 60}
    service.ask("POST", "/v1/versions", {"source": "incoming/b"})
    service.ask("POST", "/v1/versions", {"source": "incoming/none"})
    service.ask("POST", "/v1/versions/canary", {"version": "b", "share": 0.5, **wait})
    service.ask("POST", "/v1/versions/canary", {"version": "", "share": 0.0})
    service.ask("POST", "/v1/versions/activate", {"version": "b", **wait})
    service.ask("POST", "/v1/versions/activate", {"version": "small", **wait})
    service.ask("POST", "/v1/versions/rollback", {})
    service.ask("POST", "/v1/versions/remove", {"version": "small"})
    service.ask("GET", f"/v1/similar?key=i0001&token={GUESS}", token=GUESS.encode(), x_request_id="r-1")
    service.ask("GET", "/v1/similar?key=i0001", token=READ_TOKEN, x_request_id="r-2")
    service.ask("POST", "/v1/versions/rollback", {}, token=READ_TOKEN)
    service.close()
    text = log.read_text()
    for secret in (TOKEN.decode(), READ_TOKEN.decode(), GUESS):
        assert secret not in text
    told = [line for line in lines(log) if line.get("event") != "request"]
    assert [line["event"] for line in told] == [
        "serving", "published", "refused", "serving", "canary_started", "canary_ended", "serving", "serving",
        "activated", "refused", "rolled_back", "serving", "removed",
    ]  # fmt: skip
    refusals = [line for line in told if line["event"] == "refused"]
    assert [(line["level"], line["asked"]) for line in refusals] == [("WARNING", "publish"), ("WARNING", "activate")]
    assert "gate coverage" in refusals[1]["reason"]
    requests = [line for line in lines(log) if line.get("event") == "request"]
    assert len(requests) == 11
    assert [(one["request_id"], one["route"], one["status"]) for one in requests if "request_id" in one] == [
        ("r-1", "/v1/similar", 401),
        ("r-2", "/v1/similar", 200),
    ]
    assert all(one["ms"] >= 0 for one in requests)


def test_requests_are_not_written_unless_asked_for(log: Path, tmp_path: Path) -> None:
    publish(tmp_path / "root", version="a")
    service = LocalService(tmp_path / "root", "a")
    service.ask("GET", "/v1/similar?key=i0001")
    service.close()
    assert [line["event"] for line in lines(log)] == ["serving"]
