"""The recall-latency curve of an index as one SVG file: nothing to install, and every browser shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT = 720, 420
_LEFT, _RIGHT, _TOP, _BOTTOM = 72, 24, 56, 56
_STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2937 } .title { font-size: 16px; font-weight: 600 }
.note, .tick { fill: #6b7280; font-size: 12px } .grid { stroke: #e5e7eb }
.target { stroke: #b45309; stroke-dasharray: 5 4 }
.curve { stroke: #2563eb; stroke-width: 2; fill: none } .point { fill: #2563eb } .chosen { fill: #b45309 }
"""


def recall_plot(
    title: str, curve: Sequence[Mapping[str, Any]], chosen: Mapping[str, int], recall: Mapping[str, Any]
) -> str:
    """An SVG document: recall (up) over microseconds of a query (to the right, logarithmic), a circle for each point.

    curve: points {"parameters", "recall", "microseconds"}; chosen: the parameters in force; recall: the index's record.
    """
    times, values = [point["microseconds"] for point in curve], [point["recall"] for point in curve]
    low_x, high_x = _span([math.log10(max(time, 0.1)) for time in times], 0.15)
    low_y, high_y = max(0.0, float(min([*values, recall["target"]])) - 0.03), 1.0

    def x(time: float) -> float:
        return _LEFT + (math.log10(max(time, 0.1)) - low_x) / (high_x - low_x) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _TOP + (high_y - float(value)) / (high_y - low_y) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_line(_LEFT, y(tick), _WIDTH - _RIGHT, y(tick), "grid") for tick in _recall_ticks(low_y)]
    parts += [_text(_LEFT - 8, y(tick) + 4, f"{tick:.2f}", "tick", "end") for tick in _recall_ticks(low_y)]
    for tick in _time_ticks(low_x, high_x):
        parts += [_line(x(tick), _TOP, x(tick), _HEIGHT - _BOTTOM, "grid")]
        parts += [_text(x(tick), _HEIGHT - _BOTTOM + 18, _time(tick), "tick", "middle")]
    parts += [_line(_LEFT, y(recall["target"]), _WIDTH - _RIGHT, y(recall["target"]), "target")]
    parts += [_text(_WIDTH - _RIGHT, y(recall["target"]) - 6, f"target {recall['target']:g}", "note", "end")]
    path = " ".join(f"{x(time):.1f},{y(value):.1f}" for time, value in zip(times, values, strict=True))
    parts += [f'<polyline class="curve" points="{path}"/>']
    for point, time, value in zip(curve, times, values, strict=True):
        is_chosen = dict(point["parameters"]) == dict(chosen)
        said = ", ".join(f"{name} {number}" for name, number in point["parameters"].items()) or "exhaustive"
        tip = f"{said}: recall {value:.4f}, {_time(time)}"
        parts.append(
            f'<circle class="{"chosen" if is_chosen else "point"}" cx="{x(time):.1f}" cy="{y(value):.1f}" '
            f'r="{6 if is_chosen else 4}"><title>{escape(tip)}</title></circle>'
        )
        if is_chosen:  # said where no curve is that rises to the right: below on the right
            parts.append(f'<circle class="chosen" cx="{_WIDTH - _RIGHT - 10}" cy="{_HEIGHT - _BOTTOM - 18}" r="6"/>')
            parts.append(_text(_WIDTH - _RIGHT - 24, _HEIGHT - _BOTTOM - 13, tip, "label", "end"))
    parts += [_text(_LEFT, 26, title, "title", "start")]
    parts += [_text(_LEFT, 44, _said_of(recall), "note", "start")]
    parts += [
        _text(
            (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 14, "time of a query, asked alone in one thread", "note", "middle"
        )
    ]
    parts += [_text(_LEFT - 8, _TOP - 6, f"recall@{recall['k']}", "note", "end")]
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" height="{_HEIGHT}" '
        f'role="img">\n<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{body}\n</svg>\n'
    )


def _said_of(recall: Mapping[str, Any]) -> str:
    width = f" +- {recall['half_width']:.4f}" if recall.get("half_width") is not None else ""
    return f"recall {recall['value']:.4f}{width} on {recall['num_queries']:,} queries ({recall['queries']})"


def _span(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    return low - margin, max(high, low + 0.3) + margin


def _recall_ticks(low: float) -> list[float]:
    step = next(step for step in (0.01, 0.02, 0.05, 0.1, 0.2) if (1 - low) / step <= 8)
    return [1 - i * step for i in range(int((1 - low) / step + 1e-9) + 1)]


def _time_ticks(low: float, high: float) -> list[float]:
    """Microseconds: 1, 2, 5 of every power of ten inside the span."""
    ticks = [digit * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for digit in (1, 2, 5)]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _time(microseconds: float) -> str:
    return f"{microseconds / 1000:.3g} ms" if microseconds >= 1000 else f"{microseconds:.3g} \u00b5s"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, kind: str, anchor: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
