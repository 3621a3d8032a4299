"""Recall over bytes as an SVG picture, drawn without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, LEGEND = 460, 320, 56, 44, 28, 230
COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#c98a1b", "#7b4b94", "#555555", "#00798c")
DASHES = ("", "5 3", "2 3")  # where there are more lines than colours


def plot(datasets: Mapping[str, Mapping[str, Any]], file: Path) -> None:
    """One panel for every data set: kept recall over compression, a line for every map.

    datasets: data set -> variant (`<map> <compression>x`) -> {"kept", "compression"}.
    """
    lines = sorted({_line(name) for points in datasets.values() for name in points})  # alike in all panels
    looks = {name: (COLOURS[i % len(COLOURS)], DASHES[i // len(COLOURS) % len(DASHES)]) for i, name in enumerate(lines)}
    panels = [_panel(name, points, looks, i) for i, (name, points) in enumerate(datasets.items())]
    size = f'width="{WIDTH + LEGEND}" height="{max(1, len(panels)) * HEIGHT}"'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    file.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="11">'
        f"{paper}{''.join(panels)}</svg>\n"
    )


def _line(variant: str) -> str:
    return variant.rpartition(" ")[0] or variant


def _panel(title: str, points: Mapping[str, Any], looks: Mapping[str, tuple[str, str]], number: int) -> str:
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, point in points.items():
        if point["kept"] is not None and not name.startswith("user"):
            lines.setdefault(_line(name), []).append((point["compression"], point["kept"]))
    parts = [f'<text x="{LEFT}" y="16" font-size="13">{escape(title)}: share of recall kept by compression</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = _y(share)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{share:g}</text>')
    for times in (1, 2, 5, 10, 20, 50):
        parts.append(f'<text x="{_x(times):.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{times}x</text>')
    for i, (name, places) in enumerate(sorted(lines.items())):
        colour, dash = looks[name]
        path = " ".join(f"{_x(times):.1f},{_y(kept):.1f}" for times, kept in sorted(places))
        stroke = f'stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{path}" fill="none" {stroke}/>')
        parts += [f'<circle cx="{_x(times):.1f}" cy="{_y(kept):.1f}" r="3" fill="{colour}"/>' for times, kept in places]
        y = TOP + 16 * (i + 1)
        parts.append(f'<line x1="{WIDTH + 8}" x2="{WIDTH + 28}" y1="{y - 4}" y2="{y - 4}" {stroke}/>')
        parts.append(f'<text x="{WIDTH + 34}" y="{y}" fill="{colour}">{escape(name)}</text>')
    return f'<g transform="translate(0,{number * HEIGHT})">{"".join(parts)}</g>'


def _x(times: float) -> float:
    return LEFT + (WIDTH - LEFT - 10) * math.log(max(1.0, times)) / math.log(60.0)


def _y(share: float) -> float:
    return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * min(1.1, share) / 1.1
