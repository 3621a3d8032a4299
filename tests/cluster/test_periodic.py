"""Work that is done again and again."""

from __future__ import annotations

import logging
import threading

import pytest

from cluster.periodic import Periodic


def test_work_is_done_until_it_is_stopped() -> None:
    rounds, enough = [], threading.Event()

    def work() -> None:
        rounds.append(threading.current_thread().name)
        if len(rounds) >= 3:
            enough.set()

    task = Periodic("measuring", 0.0, work)
    assert enough.wait(30)
    task.stop()
    done = len(rounds)
    assert set(rounds) == {"measuring"}
    assert threading.active_count() == len(threading.enumerate())
    assert "measuring" not in [thread.name for thread in threading.enumerate()]
    assert len(rounds) == done


def test_what_fails_is_told_once_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    failures, enough = [], threading.Event()

    def work() -> None:
        failures.append(1)
        if len(failures) == 4:
            enough.set()
            return
        raise OSError("disk" if len(failures) < 3 else "network")

    with caplog.at_level(logging.ERROR, logger="cluster.periodic"):
        task = Periodic("measuring", 0.0, work)
        assert enough.wait(30)
        task.stop()
    assert [str(record.exc_info[1]) for record in caplog.records if record.exc_info][:2] == ["disk", "network"]
    assert caplog.records[0].getMessage() == "measuring failed; it is tried again"


def test_it_ends_before_its_first_time() -> None:
    task = Periodic("never", 3600.0, lambda: pytest.fail("an hour has not passed"))
    task.stop()
