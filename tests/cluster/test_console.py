from __future__ import annotations

import io

from cluster.console import duration, line_of, table, watching

PROGRESS = {
    "kind": "progress",
    "step": 7,
    "epoch": 2,
    "share": 0.425,
    "loss": 0.12345,
    "rate": 0.05,
    "examples_per_second": 51234.4,
    "seconds": 9.0,
    "seconds_left": 83.4,
    "peak_rss_bytes": 812 * 2**20,
}


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines() -> None:
    assert line_of(PROGRESS) == "epoch 3   42.5%  loss 0.1235  51,234 examples/s  1:23 left  812 MiB"
    assert "left" not in line_of({**PROGRESS, "seconds_left": None})
    event = {"kind": "validation", "step": 9, "epoch": 3, "recall@20": 0.25, "best": True}
    assert line_of(event) == "epoch 3 validated: recall@20 0.2500  (best so far)"
    assert line_of({"kind": "note", "text": "hello"}) == "hello"
    assert line_of({"done": 3}) == "done 3"


def test_durations() -> None:
    assert [duration(seconds) for seconds in (0.4, 61, 3599.6, 3909)] == ["0:00", "1:01", "1:00:00", "1:05:09"]


def test_plain_lines_are_thinned_out_and_notes_are_not() -> None:
    out = io.StringIO()
    with watching(every_seconds=3600.0, stream=out) as listen:
        for event in (PROGRESS, {"text": "a note"}, PROGRESS, {"text": "another"}):
            listen(event)
    assert out.getvalue().splitlines() == [line_of(PROGRESS), "a note", "another"]


def test_every_line_without_thinning() -> None:
    out = io.StringIO()
    with watching(every_seconds=0.0, stream=out) as listen:
        listen(PROGRESS)
        listen(PROGRESS)
    assert out.getvalue().splitlines() == [line_of(PROGRESS)] * 2


def test_a_terminal_shows_the_last_progress_and_keeps_notes(monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    out = _Terminal()
    with watching(every_seconds=10.0, stream=out) as listen:
        listen(PROGRESS)
        listen({"text": "a [note] with brackets"})
        listen({**PROGRESS, "loss": 0.5})
    assert "a [note] with brackets" in out.getvalue()
    assert "loss 0.5000" in out.getvalue()


def test_tables() -> None:
    text = table(("what", "recall@20"), [("checkpoint", "0.1500"), ("x", "10.0")])
    assert text.splitlines() == ["what        recall@20", "checkpoint     0.1500", "x                10.0"]
    assert table(("a", "b"), []) == "a  b"
