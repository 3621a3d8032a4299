"""Counts, intervals and who is a canary's caller."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from embedding_service.traffic import Tally, figures, takes_canary, wilson


@pytest.mark.parametrize(("successes", "trials"), [(0, 1), (0, 50), (3, 50), (50, 50), (120, 4000)])
def test_the_interval_is_wilsons(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(0.95, method="wilson")
    assert wilson(successes, trials) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="3 successes in 2 trials"):
        wilson(3, 2)


def test_tallies_of_processes_add_up() -> None:
    one, other = Tally(), Tally()
    for number in range(100):
        one.note(200, 0.001 if number else 1.0, recommends=True)
    other.note(500, 0.001, recommends=True)
    other.note(404, 0.001, recommends=True)
    other.note(200, 0.001, recommends=False)
    for request, key in (("a", 1), ("a", 2), ("a", 1), ("b", 1)):
        one.note_click(request, key)
    found = figures([one.counts(), other.counts()])
    assert (found["requests"], found["failed"], found["answered"]) == (103, 1, 100)
    assert (found["clicks"], found["clicked"], found["ctr"]) == (3, 2, 0.02)
    assert (found["ctr_low"], found["ctr_high"]) == wilson(2, 100)
    assert 1.0 <= found["p50_ms"] <= 1.2
    assert figures([other.counts()])["p99_ms"] < 2


def test_nothing_counted_is_not_zero() -> None:
    found = figures([])
    assert (found["ctr"], found["ctr_low"], found["ctr_high"], found["p50_ms"]) == (None, 0.0, 1.0, None)


def test_the_same_share_of_callers_every_time() -> None:
    callers = [f"caller-{number}".encode() for number in range(20_000)]
    chosen = {caller for caller in callers if takes_canary(caller, "v2", 0.1)}
    assert len(chosen) == pytest.approx(2000, rel=0.1)
    assert chosen <= {caller for caller in callers if takes_canary(caller, "v2", 0.3)}  # who was in stays in
    others = {caller for caller in callers if takes_canary(caller, "v3", 0.1)}
    assert len(chosen & others) < 300  # another version, other callers
    assert not any(takes_canary(caller, "v2", 0.0) for caller in callers[:100])
    assert all(takes_canary(caller, "v2", 1.0) for caller in callers[:100])
    assert takes_canary(b"caller-3", "v2", 0.5) is takes_canary(b"caller-3", "v2", 0.5)


def test_a_latency_falls_into_its_quarter_of_an_octave() -> None:
    """Slow formula: floor(4 log2(seconds / 10 us)) of 96 buckets."""
    for number, seconds in enumerate(np.geomspace(1.1e-6, 900.0, 997)):
        tally = Tally()
        tally.note(200, float(seconds), recommends=False)
        (bucket,) = np.flatnonzero(tally.counts()["latency_buckets"])
        assert bucket == np.clip(np.floor(4 * np.log2(seconds / 1e-5)), 0, 95), number
