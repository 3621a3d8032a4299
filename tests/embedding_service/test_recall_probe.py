"""Recall of what is live, on what is asked."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding_service.index import VectorIndex
from embedding_service.recall_probe import LEAST_QUERIES, RECENT_QUERIES, RecallProbe
from tests.embedding_service.artifacts import publish
from tests.embedding_service.services import LocalService

ITEMS = [f"i{number:04d}" for number in range(40)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("versions")
    for version in ("a", "b"):
        publish(folder, version=version, factory="IVF8,Flat", precision="int8")
    return folder


@pytest.fixture
def service(root: Path) -> Iterator[LocalService]:
    running = LocalService(root, "a")
    running.store.activate("a", start="a")
    running.versions.refresh()
    yield running
    running.close()


def probe_of(service: LocalService, **options: Any) -> RecallProbe:
    return RecallProbe(service.versions, **{"margin": 0.05, "rest": lambda seconds: None, **options})


def ask(service: LocalService, *, similar: bool = True) -> None:
    for item in ITEMS:
        assert service.ask("GET", f"/v1/recommend?items={item}").status == 200
        if similar:
            assert service.ask("GET", f"/v1/similar?key={item}").status == 200


def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The index finds the same rows, whatever it is asked."""
    monkeypatch.setattr(VectorIndex, "search_rows", lambda self, queries, k: np.tile(np.arange(k), (len(queries), 1)))


def events(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.event for record in caplog.records if hasattr(record, "event")]


def test_it_finds_what_export_has_measured(service: LocalService) -> None:
    ask(service)
    probe = probe_of(service)
    probe.run()
    assert set(probe.found) == {("a", "recommend"), ("a", "similar")}
    for (_, index), probed in probe.found.items():
        entry = service.store.open("a").manifest["indexes"][index]["recall"]
        assert (probed.k, probed.measured) == (entry["k"], entry["value"])
        assert probed.recall == pytest.approx(entry["value"], abs=0.05)  # here the queries are all alike
        assert probed.num_queries == len(ITEMS)


def test_an_index_that_answers_wrongly_is_told_once(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    probe = probe_of(service)
    with caplog.at_level(logging.INFO, logger="embedding_service.recall_probe"):
        ask(service, similar=False)
        probe.run()
        assert events(caplog) == []
        with monkeypatch.context() as broken:
            breaks(broken)
            for _ in range(2):
                ask(service, similar=False)
                probe.run()
        low = probe.found["a", "recommend"]
        assert low.recall < low.measured - 0.2
        assert events(caplog) == ["recall_low"]
        assert caplog.records[-1].levelno == logging.WARNING
        assert caplog.records[-1].fields["version"] == "a"  # type: ignore[attr-defined]
        for _ in range(RECENT_QUERIES // len(ITEMS) + 1):
            ask(service, similar=False)
            probe.run()
        assert events(caplog) == ["recall_low", "recall_recovered"]
    assert len(probe.found["a", "recommend"].recalls) == RECENT_QUERIES
    assert json.dumps([record.fields for record in caplog.records])  # type: ignore[attr-defined]


def test_a_few_queries_warn_nobody(
    service: LocalService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    breaks(monkeypatch)
    for item in ITEMS[: LEAST_QUERIES - 1]:
        service.ask("GET", f"/v1/recommend?items={item}")
    probe = probe_of(service)
    with caplog.at_level(logging.INFO, logger="embedding_service.recall_probe"):
        probe.run()
    assert probe.found["a", "recommend"].recall < 0.5
    assert events(caplog) == []


def test_it_follows_the_versions(service: LocalService) -> None:
    probe = probe_of(service)
    ask(service)
    service.store.set_canary("b", 0.5, start="a")
    service.versions.refresh()
    for number in range(20):
        assert service.ask("GET", "/v1/similar?key=i0003", x_caller_id=f"caller-{number}").status == 200
    probe.run()
    assert {version for version, _ in probe.found} == {"a", "b"}
    service.store.activate("b", start="a")
    service.versions.refresh()
    probe.run()
    assert {version for version, _ in probe.found} == {"b"}


def test_what_nobody_asks_is_not_probed(service: LocalService) -> None:
    """Least of all with the queries that warm a version up."""
    probe = probe_of(service)
    probe.run()
    assert probe.found == {}
    ask(service, similar=False)
    probe.run()
    former = probe.found["a", "recommend"]
    probe.run()
    assert probe.found["a", "recommend"] == former


def test_a_version_that_goes_is_let_go_of(service: LocalService) -> None:
    ask(service, similar=False)

    def rest(_: float) -> None:
        pytest.fail("it went on")

    service.versions.now.live.retired = True
    probe = probe_of(service, rest=rest)
    probe.run()
    assert probe.found == {}


def test_it_rests_in_proportion(service: LocalService) -> None:
    """Each chunk takes a second by this clock: at two hundredths of a core that is 49 to rest."""
    times, rests = iter(range(1000)), list[float]()
    ask(service, similar=False)
    probe_of(service, share=0.02, rest=rests.append, clock=lambda: float(next(times))).run()
    assert rests == pytest.approx([49.0])
