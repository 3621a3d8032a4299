"""The plot of a recall-latency curve: well-formed, each point where it belongs, hostile names escaped."""

from __future__ import annotations

import itertools
from xml.etree import ElementTree

import pytest

from embedding_service.recall_plot import recall_plot

SVG = "{http://www.w3.org/2000/svg}"
RECALL = {"value": 0.951, "half_width": 0.002, "k": 10, "target": 0.95, "num_queries": 20_000, "queries": "validation"}
CURVE = [
    {"parameters": {"nprobe": 1 << i}, "recall": 1 - 0.5**i, "microseconds": 20.0 * 2**i} for i in range(1, 9)
]  # fmt: skip


def test_points_rise_to_the_right_and_the_chosen_one_is_marked() -> None:
    root = ElementTree.fromstring(recall_plot("similar: IVF64", CURVE, {"nprobe": 32}, RECALL))
    circles = root.findall(f"{SVG}circle")
    circles = [one for one in circles if one.find(f"{SVG}title") is not None]  # and one in the legend
    assert len(circles) == 8
    places = [(float(one.attrib["cx"]), float(one.attrib["cy"])) for one in circles]
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(places))
    assert all(0 <= x <= 720 and 0 <= y <= 420 for x, y in places)
    steps = [b[0] - a[0] for a, b in itertools.pairwise(places)]
    assert max(steps) == pytest.approx(min(steps), abs=0.2), "the time axis is logarithmic"
    (chosen,) = [one for one in circles if one.attrib["class"] == "chosen"]
    assert chosen.findtext(f"{SVG}title") == "nprobe 32: recall 0.9688, 640 \u00b5s"
    texts = [one.text for one in root.findall(f"{SVG}text")]
    assert "recall 0.9510 +- 0.0020 on 20,000 queries (validation)" in texts
    assert {"target 0.95", "recall@10", "1 ms"} - set(texts) == set()


@pytest.mark.parametrize("recall", [0.0, 1.0])
def test_a_single_point_is_a_plot_too(recall: float) -> None:
    curve = [{"parameters": {}, "recall": recall, "microseconds": 0.0}]
    root = ElementTree.fromstring(recall_plot("Flat", curve, {}, {**RECALL, "half_width": None}))
    circle, _ = root.findall(f"{SVG}circle")
    assert 0 <= float(circle.attrib["cy"]) <= 420


def test_names_are_escaped() -> None:
    text = recall_plot("<script>&", [{"parameters": {"<b>": 1}, "recall": 1.0, "microseconds": 1.0}], {}, RECALL)
    root = ElementTree.fromstring(text)
    assert root.findtext(f"{SVG}title") == "<script>&"
    assert not list(root.iter(f"{SVG}script"))
