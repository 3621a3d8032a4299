"""Counts and times that a replica notes."""

from __future__ import annotations

import pytest

from embedding_service.instruments import BOUNDS_SECONDS, MAX_VERSIONS, Instruments, Timing


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (1e-5, 0), (1.1e-5, 1), (0.1, 12), (30.0, 19), (31.0, 20), (1e9, 20)]
)
def test_a_bucket_holds_its_upper_end(seconds: float, bucket: int) -> None:
    timing = Timing()
    timing.note(seconds)
    assert [number for number, count in enumerate(timing.counts) if count] == [bucket]
    assert timing.seconds == seconds
    assert list(BOUNDS_SECONDS) == sorted(set(BOUNDS_SECONDS))


def test_requests_by_version_route_and_status() -> None:
    noted = Instruments(("/v1/similar",))
    for status in (200, 200, 404, 503):
        noted.note_request("a", "/v1/similar", status, 0.1)
    noted.note_request("", "/v1/versions", 200, 0.1)
    assert noted.requests == {
        ("a", "/v1/similar", 200): 2,
        ("a", "/v1/similar", 404): 1,
        ("a", "/v1/similar", 503): 1,
        ("", "/v1/versions", 200): 1,
    }
    assert noted.num_refused == 1
    assert sum(noted.routes["/v1/similar"].counts) == 4
    assert "/v1/versions" not in noted.routes


def test_refusals_before_a_version_was_chosen() -> None:
    noted = Instruments(("/v1/similar",))
    noted.note_request("a", "/v1/similar", 200, 0.1)
    for _ in range(2):
        noted.note_refusal("/v1/similar")
    assert noted.requests == {("a", "/v1/similar", 200): 1, ("", "/v1/similar", 503): 2}
    assert noted.num_refused == 2
    assert sum(noted.routes["/v1/similar"].counts) == 1  # not of the time that answers take
    noted.forget_old_versions()
    assert noted.requests["", "/v1/similar", 503] == 2


def test_versions_that_came_first_are_forgotten() -> None:
    noted = Instruments()
    for version in ("", *(f"v{number}" for number in range(3 * MAX_VERSIONS))):
        noted.note_request(version, "other", 200, 0.0)
    noted.forget_old_versions()
    kept = [version for version, _, _ in noted.requests]
    assert kept == ["", *(f"v{number}" for number in range(2 * MAX_VERSIONS, 3 * MAX_VERSIONS))]
