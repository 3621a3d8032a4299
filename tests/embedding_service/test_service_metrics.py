"""What a replica publishes, and the dashboard that draws it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.metrics import Distribution, Sample
from embedding_service import activations, admission
from embedding_service.gates import Gates
from embedding_service.instruments import Instruments
from embedding_service.recall_probe import RecallProbe
from embedding_service.service_metrics import METRICS, Overload, ServiceMetrics
from tests.embedding_service.artifacts import publish
from tests.embedding_service.services import LocalService

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "retrieval.json"
RAY_LABELS = {"deployment", "application", "replica", "NodeAddress", "instance", "job"}
Values = dict[tuple[str, tuple[str, ...]], float]


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalService]:
    def admit_here(candidate: Path, live: Path | None, gates: Gates, *, timeout_seconds: float) -> object:
        return admission.admit(candidate, live, gates)

    monkeypatch.setattr(activations, "admit_apart", admit_here)
    for version in ("a", "b"):
        publish(tmp_path, version=version)
    running = LocalService(tmp_path, "a")
    yield running
    running.close()


def metrics_of(service: LocalService) -> ServiceMetrics:
    probe = RecallProbe(service.versions, margin=0.05, rest=lambda seconds: None)
    probe.run()
    return ServiceMetrics(service.instruments, service.versions, service.store, probe)


def values(metrics: ServiceMetrics) -> Values:
    """Of everything but histograms, which count for what they have seen."""
    found: Values = {}
    for sample in metrics.samples():
        value = sample.value if isinstance(sample, Sample) else sum(sample.counts)
        assert (sample.metric, sample.labels) not in found
        found[sample.metric, sample.labels] = value
    return found


def test_every_metric_has_a_value_and_nothing_else_has(service: LocalService) -> None:
    body = {"version": "b", "share": 0.25, "wait_seconds": 60}
    assert service.ask("POST", "/v1/versions/canary", body).status == 200
    service.ask("GET", "/v1/recommend?items=i0001&items=nope")
    metrics = metrics_of(service)
    labels = {metric.name: len(metric.labels) for metric in METRICS}
    samples = list(metrics.samples())
    assert {sample.metric for sample in samples} == set(labels)
    assert all(len(sample.labels) == labels[sample.metric] for sample in samples)
    kinds = {metric.name: metric.kind for metric in METRICS}
    assert all((kinds[one.metric] == "histogram") == isinstance(one, Distribution) for one in samples)
    found = values(metrics)
    assert found["lexshard_canary_share", ("b",)] == 0.25
    assert found["lexshard_live", ("a",)] == 1.0
    assert ("lexshard_live", ("b",)) not in found
    assert found["lexshard_gate", ("b", "overlap")] == 1.0  # the same vectors


def test_requests_and_keys_are_counted(service: LocalService) -> None:
    for _ in range(3):
        service.ask("GET", "/v1/recommend?items=i0001&items=nope&items=i0002")
    service.ask("GET", "/v1/similar?key=nope")
    service.ask("POST", "/v1/similar", {"keys": ["i0001", "nope"], "k": 3})
    service.ask("GET", "/made/up")
    service.ask("GET", "/page/none.js")
    service.ask("GET", "/v1/versions")
    service.ask("POST", "/v1/versions", {"source": "x"}, token=b"")
    found = values(metrics_of(service))
    assert found["lexshard_requests", ("a", "/v1/recommend", "200")] == 3
    assert found["lexshard_requests", ("a", "/v1/similar", "404")] == 1
    assert found["lexshard_requests", ("a", "/v1/similar", "200")] == 1
    assert found["lexshard_requests", ("a", "other", "404")] == 1
    assert found["lexshard_requests", ("a", "/page", "404")] == 1
    assert found["lexshard_requests", ("", "/v1/versions", "200")] == 1
    assert found["lexshard_requests", ("", "/v1/versions", "401")] == 1
    assert found["lexshard_keys", ()] == 3 * 3 + 1 + 2
    assert found["lexshard_unknown_keys", ()] == 3 + 1 + 1
    assert found["lexshard_request_seconds", ("/v1/recommend",)] == 3
    assert found["lexshard_in_flight", ("a",)] == found["lexshard_waiting", ("a",)] == 0


def test_each_stage_is_timed(service: LocalService) -> None:
    def seen() -> list[float]:
        found = values(metrics_of(service))
        stages = ("parse", "encode", "search", "document", "render")
        return [found["lexshard_stage_seconds", (stage,)] for stage in stages]

    assert seen() == [0, 0, 0, 0, 0]  # warming up does not count
    service.ask("GET", "/v1/recommend?items=i0001")
    assert seen() == [1, 1, 1, 1, 0]
    service.ask("POST", "/v1/recommend", {"session": ["i0001"], "filter": {"deny": ["i0002"]}})
    assert seen() == [2, 2, 2, 2, 1]
    service.ask("GET", "/v1/similar?key=i0001")
    assert seen() == [3, 2, 3, 3, 1]
    service.ask("GET", "/v1/recommend?items=nope")  # nothing to encode: the most frequent items
    assert seen() == [4, 2, 3, 4, 1]
    service.ask("POST", "/v1/recommend", {"sessions": [["i0001"], ["i0002"]]})
    assert seen() == [5, 3, 4, 5, 2]


def test_an_overload_begins_and_ends_once(caplog: pytest.LogCaptureFixture) -> None:
    noted, now = Instruments(), [10.0]
    overload = Overload(noted, lambda: now[0])
    with caplog.at_level(logging.INFO, logger="embedding_service.service_metrics"):
        for refused in (0, 4, 3, 0, 0, 1):
            for _ in range(refused):
                noted.note_request("a", "/v1/similar", 503, 0.0)
            overload.look()
            now[0] += 5.0
    told = [(record.event, record.fields) for record in caplog.records]  # type: ignore[attr-defined]
    assert told == [
        ("overload_began", {"refused": 4}),
        ("overload_ended", {"refused": 7, "seconds": 10.0}),
        ("overload_began", {"refused": 1}),
    ]


EXPORTED = {name: labels for metric in METRICS for name, labels in metric.exported.items()}


def expressions(document: Any) -> Iterator[str]:
    """Of panels' targets and of variables."""
    if isinstance(document, dict) and document.get("type") != "datasource":
        for name, value in document.items():
            if name in ("expr", "query", "definition") and isinstance(value, str):
                yield value
            else:
                yield from expressions(value)
    elif isinstance(document, list):
        for value in document:
            yield from expressions(value)


def drawn(expression: str) -> tuple[set[str], set[str]]:
    """The metrics and the labels that a PromQL expression names."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    metrics = set(re.findall(r"\bray_\w+", bare))
    inside = re.findall(r"\b(?:by|without|on|ignoring|group_left)\s*\(([^)]*)\)", bare)
    labels = {label for group in inside for label in re.findall(r"\w+", group)}
    labels |= set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)\s*\"\"", bare))
    values_of = re.search(r"label_values\(\w+(?:\{[^}]*\})?,\s*(\w+)\)", bare)
    return metrics, labels | ({values_of[1]} if values_of else set())


class TestDashboard:
    def test_every_expression_asks_for_what_is_published(self) -> None:
        found = list(expressions(json.loads(DASHBOARD.read_text())))
        assert len(found) >= 15
        for expression in found:
            metrics, labels = drawn(expression)
            assert metrics, expression
            assert metrics <= EXPORTED.keys(), expression
            known = {label for name in metrics for label in EXPORTED[name]} | RAY_LABELS
            assert labels <= known, expression
            assert expression.count("(") == expression.count(")"), expression
            assert expression.count("{") == expression.count("}"), expression

    def test_every_metric_is_drawn(self) -> None:
        found = set().union(*(drawn(one)[0] for one in expressions(json.loads(DASHBOARD.read_text()))))
        missing = [metric.name for metric in METRICS if not found & metric.exported.keys()]
        assert missing == []

    def test_counters_are_asked_for_rates(self) -> None:
        counters = {name for metric in METRICS if metric.kind != "gauge" for name in metric.exported}
        for expression in expressions(json.loads(DASHBOARD.read_text())):
            for name in drawn(expression)[0] & counters:
                assert re.search(rf"(rate|increase)\({name}\b", expression), expression

    def test_the_test_sees_what_is_wrong(self) -> None:
        assert drawn('sum by (le, stage) (rate(ray_x_bucket{deployment=~"$d"}[5m]))') == (
            {"ray_x_bucket"},
            {"le", "stage", "deployment"},
        )
        assert drawn("label_values(ray_x, version)") == ({"ray_x"}, {"version"})

    def test_panels_do_not_lie_on_each_other(self) -> None:
        panels = json.loads(DASHBOARD.read_text())["panels"]
        assert len({panel["id"] for panel in panels}) == len(panels)
        cells: set[tuple[int, int]] = set()
        for place in (panel["gridPos"] for panel in panels):
            area = {(x, y) for x in range(place["x"], place["x"] + place["w"])
                    for y in range(place["y"], place["y"] + place["h"])}  # fmt: skip
            assert place["x"] + place["w"] <= 24
            assert not area & cells
            cells |= area
