"""The page's files and the data that it asks for, over ASGI; a browser looks at it in test_page.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.numpy import load

from embedding_service.artifact import Artifact
from embedding_service.http_api import HttpApi
from embedding_service.http_artifact import http_api
from tests.embedding_service.artifacts import NUM_ITEMS, publish
from tests.embedding_service.test_http_api import ask


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpApi]:
    api = http_api(Artifact.open(publish(tmp_path_factory.mktemp("page"), with_map=True, version="v1")))
    yield api
    api.close()


@pytest.fixture(scope="module")
def integers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpApi]:
    root = tmp_path_factory.mktemp("integers")
    api = http_api(Artifact.open(publish(root, integer_keys=True, unknown="row", factory="Flat")))
    yield api
    api.close()


class TestFiles:
    def test_root_leads_to_the_page(self, api: HttpApi) -> None:
        assert ask(api, "GET", "/").headers["location"] == "/page"
        assert ask(api, "GET", "/base", root_path="/base").headers["location"] == "/base/page"

    def test_allows_no_other_origin_and_nothing_inline(self, api: HttpApi) -> None:
        reply = ask(api, "GET", "/page")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        policy = reply.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'")
        assert "unsafe" not in policy
        assert re.findall(rb"(?:src|href|action)\W{1,3}(?:https?:)?//", reply.body) == []
        for name in re.findall(rb'(?:src|href)="(page/[^"]+)"', reply.body):
            assert ask(api, "GET", f"/{name.decode()}").status == 200

    def test_carries_the_licences_of_what_it_contains(self, api: HttpApi) -> None:
        text = ask(api, "GET", "/page/licenses.txt").body.decode()
        assert "@deck.gl/core" in text
        assert "Permission is hereby granted, free of charge" in text

    @pytest.mark.parametrize("path", ["/page/", "/page/index.html", "/page/../http_page.py", "/page/%2e%2e/app.py"])
    def test_there_is_nothing_else(self, api: HttpApi, path: str) -> None:
        assert ask(api, "GET", path).status == 404


class TestMap:
    def test_is_a_safetensors_document_of_the_most_frequent_items(self, api: HttpApi) -> None:
        tensors = load(ask(api, "GET", "/v1/map?points=40").body)
        assert {name: list(tensor.shape) for name, tensor in tensors.items()} == {
            "layout.pca": [40, 2],
            "colour.k-means": [40],
            "colour.town": [40],
        }
        whole = ask(api, "GET", "/v1/map").body
        assert load(whole)["layout.pca"][:40].tolist() == tensors["layout.pca"].tolist()
        length = int.from_bytes(whole[:8], "little")
        metadata = json.loads(whole[8 : 8 + length])["__metadata__"]
        assert json.loads(metadata["about"]) == {"version": "v1", "num_items": NUM_ITEMS}

    @pytest.mark.parametrize("query", ["points=0", "points=-1", "points=x", "points=1e3", "points=", "rows=3"])
    def test_wrong_parameters(self, api: HttpApi, query: str) -> None:
        assert ask(api, "GET", f"/v1/map?{query}").status == 400

    def test_a_version_without_a_map_says_so(self, integers: HttpApi) -> None:
        status, code, message = ask(integers, "GET", "/v1/map").error
        assert (status, code) == (404, "no_map")
        assert "export the run again" in message


class TestKeys:
    def test_completion_has_the_most_frequent_first(self, api: HttpApi) -> None:
        answer = ask(api, "GET", "/v1/keys?prefix=I001&limit=3").json
        assert answer["version"] == "v1"
        assert answer["items"] == [{"key": f"i001{d}", "row": 10 + d, "count": 1000 - (10 + d) // 4} for d in range(3)]
        assert len(ask(api, "GET", "/v1/keys?prefix=").json["items"]) == 10

    def test_of_rows_and_back(self, api: HttpApi) -> None:
        found = ask(api, "GET", "/v1/keys?row=499&row=3&row=500&row=100000000000").json["items"]
        assert [item["key"] for item in found] == ["i0499", "i0003"]
        found = ask(api, "GET", "/v1/keys?key=i0499&key=nobody&key=i0003&key=i0003").json["items"]
        assert [item["row"] for item in found] == [499, 3]

    def test_integer_keys(self, integers: HttpApi) -> None:
        found = ask(integers, "GET", "/v1/keys?prefix=1&limit=4").json["items"]
        assert [item["key"] for item in found] == [10, 11, 12, 13]
        assert ask(integers, "GET", "/v1/keys?key=12&key=99999").json["items"][0]["row"] == 2
        assert ask(integers, "GET", "/v1/keys?row=500").json["items"] == []  # the unknown row
        assert ask(integers, "GET", "/v1/keys?key=x").status == 400

    @pytest.mark.parametrize(
        "query",
        [
            "",
            "prefix=a&row=1",
            "row=1&key=a",
            "row=a",
            "prefix=a&limit=0",
            "prefix=a&limit=101",
            "prefix=" + "a" * 201,
            "&".join(["row=1"] * 102),
            "name=a",
        ],
    )
    def test_wrong_parameters(self, api: HttpApi, query: str) -> None:
        assert ask(api, "GET", f"/v1/keys?{query}").status == 400

    def test_only_get(self, api: HttpApi) -> None:
        assert ask(api, "POST", "/v1/keys", {}).headers["allow"] == "GET"


def test_figures_tell_of_the_version_and_not_of_its_paths(api: HttpApi) -> None:
    figures = ask(api, "GET", "/v1/figures").json
    assert figures["version"] == "v1"
    assert figures["indexes"]["similar"]["recall"]["target"] == 0.95
    assert figures["map"] == {"rows": NUM_ITEMS, "layouts": ["pca"], "colours": ["k-means", "town"]}
    assert figures["bytes"] > 0
    assert "lineage" not in figures


def test_the_built_page_is_small_enough_to_ship() -> None:
    built = Path(__file__).parents[2] / "embedding_service" / "page" / "built"
    assert sum(file.stat().st_size for file in built.iterdir()) < 3_000_000
