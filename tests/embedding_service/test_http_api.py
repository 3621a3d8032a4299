"""The HTTP interface, asked as a server would ask it: ASGI messages in, ASGI messages out; no sockets, no Ray."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar
from urllib.parse import urlencode

import numpy as np
import pyarrow as pa
import pytest

from cluster.errors import KeyNotFound, SettingError
from embedding_service.http_api import HttpApi
from embedding_service.http_schema import ARROW_TYPE, Catalogue, FeatureType, Key, Limits
from embedding_service.keys import Vocabulary
from tests.embedding_service.test_http_arrow import column, stream

DIM = 3
VECTORS = np.eye(6, DIM, dtype=np.float32) + np.float32(0.25)


@dataclass(frozen=True)
class Found:
    keys: list[list[Key]]
    scores: np.ndarray
    cold_start: list[bool]

    @property
    def flat_keys(self) -> pa.Array:
        return pa.array([key for keys in self.keys for key in keys])

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(keys) for keys in self.keys])


class BruteForce:
    """Retrieval by the slow formula, over one table of vectors; it notes the threads it was asked from."""

    def __init__(self, items: Vocabulary) -> None:
        self.items = items
        self.threads: list[str] = []
        self.asked: dict[str, Any] = {}

    def search(self, vectors: np.ndarray, k: int = 10, hidden: Sequence[set[int]] | None = None) -> Found:
        self.threads.append(threading.current_thread().name)
        assert vectors.dtype == np.float32
        scores = vectors @ VECTORS[: len(self.items.keys)].T
        for row, seen in enumerate(hidden or []):
            scores[row, list(seen)] = -np.inf
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        best = np.take_along_axis(scores, order, axis=1)
        keys = [
            [self.items.keys[int(row)].as_py() for row, score in zip(rows, line, strict=True) if score > -np.inf]
            for rows, line in zip(order, best, strict=True)
        ]
        return Found(keys, best, [False] * len(keys))

    def similar(self, keys: Sequence[Key], k: int = 10) -> Found:
        rows = [self.items.row(key) for key in keys]
        for key, row in zip(keys, rows, strict=True):
            if row < 0:
                raise KeyNotFound(key, "item")
        return self.search(VECTORS[rows], k, [{row} for row in rows])

    def recommend(
        self,
        sessions: Sequence[Sequence[Key]],
        k: int = 10,
        *,
        users: Sequence[Key | None] | None = None,
        features: Mapping[str, Sequence[Any]] | None = None,
        exclude_seen: bool = True,
    ) -> Found:
        self.asked = {"users": users, "features": features}
        rows = [[row for row in map(self.items.row, session) if row >= 0] for session in sessions]
        vectors = np.stack([VECTORS[known].sum(0) if known else np.zeros(DIM, np.float32) for known in rows])
        found = self.search(vectors, k, [set(known) if exclude_seen else set() for known in rows])
        return replace(found, cold_start=[not known for known in rows])


@pytest.fixture
def items() -> Vocabulary:
    return Vocabulary(pa.array(["a", "b", "c", "d", "é", "x y"]), np.arange(6, 0, -1))


@pytest.fixture
def users() -> Vocabulary:
    return Vocabulary(pa.array([7, 8]), np.array([2, 1]))


@pytest.fixture
def retriever(items: Vocabulary) -> BruteForce:
    return BruteForce(items)


LIMITS = Limits(max_k=5, max_batch=4, max_body_bytes=1000, max_session=6, max_results=12)


@pytest.fixture
def api(retriever: BruteForce, items: Vocabulary, users: Vocabulary) -> HttpApi:
    catalogue = Catalogue("v7", 6, DIM, "string", "int64", {"colour": FeatureType("string")}, {"model": "two_tower"})
    return HttpApi(retriever, catalogue, items, users, limits=LIMITS)


@pytest.fixture
def int_api() -> HttpApi:
    items = Vocabulary(pa.array([10, -20, 30]), np.array([3, 2, 1]))
    return HttpApi(BruteForce(items), Catalogue("v1", 3, DIM, "int64"), items, limits=LIMITS)


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> tuple[int, str, str]:
        assert self.headers["content-type"] == "application/json"
        return self.status, self.json["error"]["code"], self.json["error"]["message"]


def ask(
    api: HttpApi,
    method: str,
    target: str,
    body: Any = b"",
    *,
    headers: Sequence[tuple[bytes, bytes]] = (),
    chunk: int = 400,
    root_path: str = "",
) -> Reply:
    """One request through the ASGI interface; a body that is not bytes is sent as JSON, in chunks."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    path, _, query = target.partition("?")
    scope = {
        "type": "http",
        "method": method,
        "path": path,
        "root_path": root_path,
        "query_string": query.encode(),
        "headers": list(headers),
    }
    pieces = [data[start : start + chunk] for start in range(0, len(data), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": piece, "more_body": i < len(pieces) - 1} for i, piece in enumerate(pieces)
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(api(scope, receive, send))
    start, end = sent
    got = {name.decode(): value.decode() for name, value in start["headers"]}
    assert int(got["content-length"]) == len(end["body"])
    return Reply(start["status"], got, end["body"])


def keys_of(answer: Any) -> list[Key]:
    return [item["key"] for item in answer["items"]]


class TestSimilar:
    def test_get(self, api: HttpApi) -> None:
        reply = ask(api, "GET", "/v1/similar?key=a&k=3")
        assert reply.status == 200
        assert reply.json["version"] == "v7"
        assert "a" not in keys_of(reply.json)
        expected = np.sort(VECTORS[1:] @ VECTORS[0])[::-1][:3]
        assert [item["score"] for item in reply.json["items"]] == expected.tolist()

    def test_k_defaults_to_ten_or_all_there_are(self, api: HttpApi) -> None:
        assert len(ask(api, "GET", "/v1/similar?key=a").json["items"]) == 5

    @pytest.mark.parametrize("key", ["é", "x y"])
    def test_keys_are_percent_decoded(self, api: HttpApi, key: str) -> None:
        assert key not in keys_of(ask(api, "GET", f"/v1/similar?{urlencode({'key': key})}").json)

    def test_get_parses_keys_by_the_type_of_the_vocabulary(self, int_api: HttpApi) -> None:
        assert keys_of(ask(int_api, "GET", "/v1/similar?key=-20").json) == [10, 30]

    def test_post_single_is_the_get(self, api: HttpApi) -> None:
        single = ask(api, "POST", "/v1/similar", {"key": "b", "k": 2})
        assert single.json == ask(api, "GET", "/v1/similar?key=b&k=2").json

    def test_batch_gives_what_single_gives(self, api: HttpApi) -> None:
        batch = ask(api, "POST", "/v1/similar", {"keys": ["b", "a"], "k": 2}).json
        singles = [ask(api, "GET", f"/v1/similar?key={key}&k=2").json for key in "ba"]
        assert [result["items"] for result in batch["results"]] == [single["items"] for single in singles]
        assert batch["version"] == "v7"

    def test_unknown_key_is_404_and_names_the_key(self, api: HttpApi) -> None:
        expected = (404, "key_not_found", "key 'nope' is not in the item vocabulary")
        assert ask(api, "GET", "/v1/similar?key=nope").error == expected
        assert ask(api, "POST", "/v1/similar", {"key": "nope"}).error == expected

    def test_unknown_keys_of_a_batch_are_reported_in_place(self, api: HttpApi) -> None:
        results = ask(api, "POST", "/v1/similar", {"keys": ["nope", "a", "no"], "k": 1}).json["results"]
        assert [result["unknown"] for result in results] == [["nope"], [], ["no"]]
        assert [len(result["items"]) for result in results] == [0, 1, 0]

    def test_batch_of_unknown_keys(self, api: HttpApi) -> None:
        assert ask(api, "POST", "/v1/similar", {"keys": ["nope"]}).json["results"] == [
            {"items": [], "unknown": ["nope"]}
        ]


class TestSearch:
    def test_single_and_batch(self, api: HttpApi) -> None:
        vectors = [[1.0, 0.0, 0.0], [0, 1, 0]]
        batch = ask(api, "POST", "/v1/search", {"vectors": vectors, "k": 2}).json
        singles = [ask(api, "POST", "/v1/search", {"vector": vector, "k": 2}).json for vector in vectors]
        assert [keys_of(single)[0] for single in singles] == ["a", "b"]
        assert [result["items"] for result in batch["results"]] == [single["items"] for single in singles]

    @pytest.mark.parametrize(
        ("body", "message"),
        [
            ({"vector": [1.0]}, "`vector`: list should have at least 3 items, not 1"),
            ({"vector": [1.0, 2, 3, 4]}, "`vector`: list should have at most 3 items, not 4"),
            ({"vectors": [[1.0, 2, 3], [1.0, 2]]}, "`vectors.1`: list should have at least 3 items, not 2"),
            ({"vector": [1.0, 2, "3"]}, "`vector.2`: input should be a valid number"),
            ({"vector": [1.0, 2, None]}, "`vector.2`: input should be a valid number"),
            ({"vector": [True, 2, 3]}, "`vector.0`: input should be a valid number"),
            ({"vector": [1e39, 2, 3]}, "`vector`: a component is too large for a float32"),
            ({"vector": "abc"}, "`vector`: input should be a valid list"),
            ({"vectors": []}, "`vectors`: list should have at least 1 item, not 0"),
            ({"k": 3}, "`vector`: field required"),
        ],
    )
    def test_wrong_vectors(self, api: HttpApi, body: Any, message: str) -> None:
        assert ask(api, "POST", "/v1/search", body).error == (400, "invalid_request", message)

    @pytest.mark.parametrize("number", [b"NaN", b"Infinity", b"1e999"])
    def test_numbers_that_are_none(self, api: HttpApi, number: bytes) -> None:
        status, code, message = ask(api, "POST", "/v1/search", b'{"vector": [1, 2, %s]}' % number).error
        assert (status, code) == (400, "invalid_json")
        assert "the body is not valid JSON" in message


class TestArrow:
    """The bulk form of search; `test_http_arrow` has what a stream may be."""

    def post(self, api: HttpApi, body: bytes, target: str = "/v1/search", **options: Any) -> Reply:
        return ask(api, "POST", target, body, headers=[(b"content-type", ARROW_TYPE.encode())], **options)

    def test_it_is_the_json_batch(self, api: HttpApi) -> None:
        vectors = np.array([[1, 0, 0], [0, 1, 0], [0.5, 0, 2]], np.float32)
        reply = self.post(api, stream([column(vectors)]), "/v1/search?k=2")
        assert (reply.status, reply.headers["content-type"]) == (200, ARROW_TYPE)
        table = pa.ipc.open_stream(reply.body).read_all()
        results = ask(api, "POST", "/v1/search", {"vectors": vectors.tolist(), "k": 2}).json["results"]
        assert table["keys"].to_pylist() == [keys_of(result) for result in results]
        assert table["scores"].to_pylist() == [[item["score"] for item in result["items"]] for result in results]
        assert table.schema.metadata == {b"version": b"v7"}

    def test_integer_keys(self, int_api: HttpApi) -> None:
        table = pa.ipc.open_stream(
            self.post(int_api, stream([column(np.eye(3, dtype=np.float32))]), "/v1/search?k=4").body
        ).read_all()
        assert table.schema.field("keys").type == pa.list_(pa.int64())
        assert [sorted(keys) for keys in table["keys"].to_pylist()] == [[-20, 10, 30]] * 3

    def test_queries_with_fewer_results_are_shorter(
        self, api: HttpApi, retriever: BruteForce, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scores = np.array([[3, 2], [1, -np.inf]], np.float32)
        monkeypatch.setattr(retriever, "search", lambda *_: Found([["a", "b"], ["c"]], scores, [False] * 2))
        table = pa.ipc.open_stream(
            self.post(api, stream([column(np.eye(2, DIM, dtype=np.float32))]), "/v1/search?k=2").body
        ).read_all()
        assert table.to_pydict() == {"keys": [["a", "b"], ["c"]], "scores": [[3.0, 2.0], [1.0]]}

    def test_refusals_are_json(self, api: HttpApi) -> None:
        three, five = (stream([column(np.ones((num, DIM), np.float32))]) for num in (3, 5))
        status, code, message = self.post(api, b"{}").error
        assert (status, code) == (400, "invalid_arrow")
        assert self.post(api, five).error[:2] == (413, "batch_too_large")
        message = "3 queries times k = 5 are 15 results; the limit is 12: send several requests"
        assert self.post(api, three, "/v1/search?k=5").error == (413, "batch_too_large", message)
        message = "`k` must be an integer in [1, 5]; got '6'"
        assert self.post(api, three, "/v1/search?k=6").error == (400, "invalid_request", message)
        message = "there is no parameter `n`; known here: k"
        assert self.post(api, three, "/v1/search?n=6").error == (400, "unknown_parameter", message)

    def test_large_streams_leave_the_event_loop(self, retriever: BruteForce, items: Vocabulary) -> None:
        api = HttpApi(retriever, Catalogue("v1", 6, DIM, "string"), items)
        body = stream([column(np.ones((8000, DIM), np.float32))])
        assert pa.ipc.open_stream(self.post(api, body, chunk=20_000).body).read_all().num_rows == 8000
        assert retriever.threads == ["retrieval_0"]


class TestRecommend:
    def test_get(self, api: HttpApi) -> None:
        reply = ask(api, "GET", "/v1/recommend?items=a&items=b&user=7&k=5").json
        assert set(keys_of(reply)) == {"c", "d", "é", "x y"}
        assert (reply["cold_start"], reply["unknown"], reply["unknown_user"]) == (False, [], False)

    def test_post_single_is_the_get(self, api: HttpApi) -> None:
        body = {"session": ["a", "nope"], "user": 8, "k": 2, "exclude_seen": False}
        get = ask(api, "GET", "/v1/recommend?items=a&items=nope&user=8&k=2&exclude_seen=false")
        assert ask(api, "POST", "/v1/recommend", body).json == get.json

    def test_seen_items_are_left_out_unless_asked_for(self, api: HttpApi) -> None:
        assert keys_of(ask(api, "GET", "/v1/recommend?items=a&k=1").json) != ["a"]
        assert keys_of(ask(api, "GET", "/v1/recommend?items=a&k=1&exclude_seen=false").json) == ["a"]

    def test_unknown_items_and_users_are_ignored_and_reported(self, api: HttpApi) -> None:
        reply = ask(api, "GET", "/v1/recommend?items=a&items=nope&user=99&k=2").json
        assert reply["unknown"] == ["nope"]
        assert reply["unknown_user"] is True
        assert reply["items"] == ask(api, "GET", "/v1/recommend?items=a&k=2").json["items"]

    @pytest.mark.parametrize("query", ["?items=nope", "?items=nope&items=no", "", "?user=99"])
    def test_nothing_known_is_a_cold_start(self, api: HttpApi, query: str) -> None:
        reply = ask(api, "GET", f"/v1/recommend{query}")
        assert reply.status == 200
        assert reply.json["cold_start"] is True
        assert len(reply.json["items"]) == 6

    def test_batch_gives_what_single_gives(self, api: HttpApi) -> None:
        sessions, users = [["a", "b"], [], ["nope", "c"]], [7, 99, None]
        features = {"colour": ["red", None, "blue"]}
        body = {"sessions": sessions, "users": users, "features": features, "k": 3}
        batch = ask(api, "POST", "/v1/recommend", body).json
        for session, user, colour, result in zip(sessions, users, features["colour"], batch["results"], strict=True):
            one = {"session": session, "user": user, "features": {"colour": colour}, "k": 3}
            single = ask(api, "POST", "/v1/recommend", one).json
            assert single == {"version": "v7", **result}

    def test_a_long_session_reports_the_same(self, items: Vocabulary, retriever: BruteForce) -> None:
        api = HttpApi(retriever, Catalogue("v1", 6, DIM, "string"), items)
        session = ["a", "nope"] * 20
        assert ask(api, "POST", "/v1/recommend", {"session": session}).json["unknown"] == ["nope"] * 20

    def test_users_and_features_reach_the_retriever(self, api: HttpApi, retriever: BruteForce) -> None:
        ask(api, "POST", "/v1/recommend", {"session": ["a"], "user": 7, "features": {"colour": "red"}})
        assert retriever.asked == {"users": [7], "features": {"colour": ["red"]}}

    def test_a_model_without_users_refuses_one(self, int_api: HttpApi) -> None:
        message = "there is no parameter `user`; known here: items, k, exclude_seen"
        assert ask(int_api, "GET", "/v1/recommend?items=10&user=1").error == (400, "unknown_parameter", message)
        status, code, message = ask(int_api, "POST", "/v1/recommend", {"session": [10], "user": 1}).error
        assert (status, code) == (400, "unknown_field")
        assert message == "there is no field `user`; known here: session, k, exclude_seen"

    @pytest.mark.parametrize(
        ("body", "code", "message"),
        [
            ({"session": [1]}, "invalid_request", "`session.0`: input should be a valid string"),
            ({"session": "a"}, "invalid_request", "`session`: input should be a valid list"),
            ({"session": None}, "invalid_request", "`session`: input should be a valid list"),
            ({"sessions": ["a"]}, "invalid_request", "`sessions.0`: input should be a valid list"),
            ({"session": ["a"], "user": "7"}, "invalid_request", "`user`: input should be a valid integer"),
            (
                {"session": ["a"], "user": 2**63},
                "invalid_request",
                f"`user`: input should be less than or equal to {2**63 - 1}",
            ),
            (
                {"session": ["a"], "exclude_seen": 1},
                "invalid_request",
                "`exclude_seen`: input should be a valid boolean",
            ),
            ({"session": ["a"], "features": []}, "invalid_request", "`features`: must be a JSON object"),
            (
                {"session": ["a"], "features": {"color": "x"}},
                "unknown_field",
                "there is no field `features.color`; did you mean `colour`?",
            ),
            (
                {"sessions": [["a"]], "users": [7, 8]},
                "invalid_request",
                "`users` has 2 entries for 1 sessions; write null for none",
            ),
            (
                {"sessions": [["a"]], "features": {"colour": ["x", "y"]}},
                "invalid_request",
                "`features.colour` has 2 entries for 1 sessions; write null for none",
            ),
            (
                {"sessions": [["a"]], "session": ["a"]},
                "unknown_field",
                "there is no field `session`; did you mean `sessions`?",
            ),
            ({"users": [7]}, "invalid_request", "`sessions`: field required"),
            ({"session": list("abcdabc")}, "invalid_request", "`session`: list should have at most 6 items, not 7"),
        ],
    )
    def test_wrong_bodies(self, api: HttpApi, body: Any, code: str, message: str) -> None:
        assert ask(api, "POST", "/v1/recommend", body).error == (400, code, message)


class TestFeatures:
    """Keys, lists of keys, numbers and vectors in a request."""

    FEATURES: ClassVar = {
        "colour": FeatureType("string"),
        "tags": FeatureType("int64", is_list=True),
        "age": FeatureType(width=1),
        "taste": FeatureType(width=2),
    }

    @pytest.fixture
    def api(self, retriever: BruteForce, items: Vocabulary) -> HttpApi:
        return HttpApi(retriever, Catalogue("v1", 6, DIM, "string", features=self.FEATURES), items, limits=LIMITS)

    def test_they_reach_the_retriever_as_they_are(self, api: HttpApi, retriever: BruteForce) -> None:
        features = {"colour": "red", "tags": [3, 4], "age": 33, "taste": [0.5, 1]}
        assert ask(api, "POST", "/v1/recommend", {"session": ["a"], "features": features}).status == 200
        assert retriever.asked["features"] == {name: [value] for name, value in features.items()}
        columns = {"colour": ["red", None], "tags": [None, []], "age": [None, 1.5], "taste": [[1, 2], None]}
        assert ask(api, "POST", "/v1/recommend", {"sessions": [["a"], []], "features": columns, "k": 3}).status == 200
        assert retriever.asked["features"] == columns

    @pytest.mark.parametrize(
        ("features", "message"),
        [
            ({"tags": 3}, "`features.tags`: input should be a valid list"),
            ({"tags": ["3"]}, "`features.tags.0`: input should be a valid integer"),
            ({"tags": [1] * 7}, "`features.tags`: list should have at most 6 items, not 7"),
            ({"age": "33"}, "`features.age`: input should be a valid number"),
            ({"age": [33]}, "`features.age`: input should be a valid number"),
            ({"taste": [1]}, "`features.taste`: list should have at least 2 items after validation, not 1"),
            ({"taste": 1.0}, "`features.taste`: input should be a valid list"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, api: HttpApi, features: Any, message: str) -> None:
        error = ask(api, "POST", "/v1/recommend", {"session": ["a"], "features": features}).error
        assert error == (400, "invalid_request", message.replace(" after validation", ""))

    def test_numbers_beyond_all_bounds_are_refused(self, api: HttpApi) -> None:
        for value in (b"1e999", b"NaN"):
            assert ask(api, "POST", "/v1/recommend", b'{"features": {"age": ' + value + b"}}").status == 400

    def test_openapi_says_what_they_are(self, api: HttpApi) -> None:
        schemas = ask(api, "GET", "/openapi.json").json["components"]["schemas"]
        known = {name: entry["anyOf"][0] for name, entry in schemas["Features"]["properties"].items()}
        assert known["colour"] == {"type": "string"}
        assert (known["tags"]["type"], known["tags"]["items"]["type"], known["tags"]["maxItems"]) == (
            "array", "integer", 6
        )  # fmt: skip
        assert known["age"] == {"type": "number"}
        assert (known["taste"]["items"], known["taste"]["minItems"], known["taste"]["maxItems"]) == (
            {"type": "number"}, 2, 2
        )  # fmt: skip
        columns = schemas["FeatureColumns"]["properties"]
        assert columns["age"]["items"]["anyOf"][0] == {"type": "number"}


class TestBadRequests:
    @pytest.mark.parametrize("body", [b"", b"{", b"{'key': 1}", b"\xff\xfe", b"[" * 900])
    def test_not_json(self, api: HttpApi, body: bytes) -> None:
        status, code, message = ask(api, "POST", "/v1/similar", body).error
        assert (status, code) == (400, "invalid_json")
        assert message.startswith("the body is not valid JSON: ")

    @pytest.mark.parametrize("body", [b"[]", b"null", b"3", b'"key"'])
    def test_not_an_object(self, api: HttpApi, body: bytes) -> None:
        message = "the body must be a JSON object with `key` or `keys`"
        assert ask(api, "POST", "/v1/similar", body).error == (400, "invalid_request", message)

    def test_unknown_field(self, api: HttpApi) -> None:
        message = "there is no field `kez`; did you mean `key`?"
        assert ask(api, "POST", "/v1/similar", {"key": "a", "kez": 1}).error == (400, "unknown_field", message)

    @pytest.mark.parametrize("k", ["0", "6", "-1", "1.5", "ten", "", "9" * 30, "٣"])
    def test_k_out_of_range(self, api: HttpApi, k: str) -> None:
        target = f"/v1/similar?{urlencode({'key': 'a', 'k': k})}"
        assert ask(api, "GET", target).error == (400, "invalid_request", f"`k` must be an integer in [1, 5]; got {k!r}")

    @pytest.mark.parametrize(
        ("k", "message"),
        [
            (0, "`k`: input should be greater than or equal to 1"),
            (6, "`k`: input should be less than or equal to 5"),
            (True, "`k`: input should be a valid integer"),
            (2.0, "`k`: input should be a valid integer"),
            (None, "`k`: input should be a valid integer"),
        ],
    )
    def test_k_out_of_range_in_a_body(self, api: HttpApi, k: Any, message: str) -> None:
        assert ask(api, "POST", "/v1/similar", {"key": "a", "k": k}).error == (400, "invalid_request", message)

    @pytest.mark.parametrize("key", ["abc", "1.0", "", "-", "1" * 19 + "9", "--1", "+1", " 1"])
    def test_a_key_of_the_wrong_type(self, int_api: HttpApi, key: str) -> None:
        message = f"`key` must be an integer, as all keys here are; got {key!r}"
        target = f"/v1/similar?{urlencode({'key': key})}"
        assert ask(int_api, "GET", target).error == (400, "invalid_request", message)

    def test_missing_and_unknown_parameters(self, api: HttpApi) -> None:
        missing = "the parameter `key` is missing: /v1/similar?key=...&k=10"
        assert ask(api, "GET", "/v1/similar").error == (400, "invalid_request", missing)
        unknown = "there is no parameter `n`; known here: key, k"
        assert ask(api, "GET", "/v1/similar?key=a&n=3").error == (400, "unknown_parameter", unknown)

    def test_a_query_string_that_is_no_text(self, api: HttpApi) -> None:
        assert ask(api, "GET", "/v1/similar?key=%ff").error == (400, "invalid_request", "the query string is not UTF-8")

    def test_exclude_seen_is_a_boolean(self, api: HttpApi) -> None:
        message = "`exclude_seen` must be true or false; got 'maybe'"
        assert ask(api, "GET", "/v1/recommend?exclude_seen=maybe").error == (400, "invalid_request", message)

    def test_session_too_long(self, api: HttpApi) -> None:
        query = "&".join(["items=a"] * 7)
        assert ask(api, "GET", f"/v1/recommend?{query}").error == (413, "session_too_long", "7 items; the limit is 6")

    def test_batch_too_large(self, api: HttpApi) -> None:
        message = "5 queries in one request; the limit is 4: send several"
        for path, name in (("similar", "keys"), ("search", "vectors"), ("recommend", "sessions")):
            assert ask(api, "POST", f"/v1/{path}", {name: [[]] * 5}).error == (413, "batch_too_large", message)

    def test_too_many_results(self, api: HttpApi) -> None:
        message = "3 queries times k = 5 are 15 results; the limit is 12: send several requests"
        body = {"keys": ["a", "b", "c"], "k": 5}
        assert ask(api, "POST", "/v1/similar", body).error == (413, "batch_too_large", message)

    def test_body_too_large_is_refused_before_it_is_read(self, api: HttpApi) -> None:
        async def receive() -> Any:
            raise AssertionError("the body was read")

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/similar", "headers": [(b"content-length", b"1001")]}
        asyncio.run(api(scope, receive, send))
        assert sent[0]["status"] == 413
        assert json.loads(sent[1]["body"])["error"] == {
            "code": "body_too_large",
            "message": "the body is larger than the limit of 1000 bytes: send several requests",
        }

    def test_body_too_large_without_announcement(self, api: HttpApi) -> None:
        status, code, _ = ask(api, "POST", "/v1/similar", b" " * 1001).error
        assert (status, code) == (413, "body_too_large")

    def test_body_of_the_limit_is_read(self, api: HttpApi) -> None:
        body = json.dumps({"key": "a"}).encode().ljust(1000)
        assert ask(api, "POST", "/v1/similar", body, headers=[(b"content-length", b"1000")]).status == 200

    @pytest.mark.parametrize("path", ["/v1", "/v1/similar/", "/v2/similar", "/favicon.ico", "//", "/v1/SIMILAR"])
    def test_unknown_path(self, api: HttpApi, path: str) -> None:
        status, code, message = ask(api, "GET", path).error
        assert (status, code) == (404, "not_found")
        assert message.startswith(f"there is no {path}; there are /docs, /openapi.json, /v1/health")

    @pytest.mark.parametrize(
        ("method", "path", "allowed"),
        [
            ("GET", "/v1/search", "POST"),
            ("DELETE", "/v1/similar", "GET, POST"),
            ("POST", "/v1/health", "GET"),
            ("HEAD", "/", "GET"),
        ],
    )
    def test_wrong_method(self, api: HttpApi, method: str, path: str, allowed: str) -> None:
        reply = ask(api, method, path, b"{}")
        assert reply.error[:2] == (405, "method_not_allowed")
        assert reply.headers["allow"] == allowed


class TestFailures:
    def test_a_bug_is_logged_and_told_to_nobody(
        self, api: HttpApi, retriever: BruteForce, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(retriever, "similar", broken)
        with caplog.at_level(logging.ERROR):
            reply = ask(api, "GET", "/v1/similar?key=a")
        assert reply.error == (500, "internal", "this request failed inside the service; its log says why")
        assert caplog.records[0].getMessage() == "GET /v1/similar failed"
        assert "secret detail" in caplog.text

    def test_a_refusal_of_the_retriever_is_the_clients_mistake(
        self, api: HttpApi, retriever: BruteForce, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse(*_: Any, **__: Any) -> Any:
            raise SettingError("k", "is too large")

        monkeypatch.setattr(retriever, "recommend", refuse)
        assert ask(api, "GET", "/v1/recommend").error == (400, "invalid_request", "setting k: is too large")

    def test_a_client_that_left_gets_no_answer(self, api: HttpApi) -> None:
        async def receive() -> Any:
            return {"type": "http.disconnect"}

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(api({"type": "http", "method": "POST", "path": "/v1/similar", "headers": []}, receive, send))
        assert sent == []


class TestPages:
    def test_health_and_version(self, api: HttpApi) -> None:
        assert ask(api, "GET", "/v1/health").json == {"status": "ok", "version": "v7"}
        version = ask(api, "GET", "/v1/version").json
        assert (version["version"], version["num_items"], version["dim"]) == ("v7", 6, DIM)
        assert version["limits"]["max_k"] == 5
        assert version["details"] == {"model": "two_tower"}

    def test_root_leads_to_the_docs(self, api: HttpApi) -> None:
        assert ask(api, "GET", "/").headers["location"] == "/docs"
        assert ask(api, "GET", "/base/", root_path="/base").headers["location"] == "/base/docs"
        assert ask(api, "GET", "/base", root_path="/base").headers["location"] == "/base/docs"

    def test_a_route_prefix_is_taken_off(self, api: HttpApi) -> None:
        assert ask(api, "GET", "/base/v1/health", root_path="/base").status == 200

    def test_docs_ask_nobody_outside(self, api: HttpApi) -> None:
        reply = ask(api, "GET", "/docs")
        assert reply.headers["content-type"] == "text/html; charset=utf-8"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'; connect-src 'self'")
        assert b"<title>lexshard API</title>" in reply.body
        assert re.findall(rb"(?:src|href|url|import)\W{1,3}(?:https?:)?//", reply.body) == []

    def test_openapi_describes_every_route(self, api: HttpApi) -> None:
        document = ask(api, "GET", "/openapi.json").json
        described = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
        assert described == {
            ("GET", "/v1/similar"),
            ("POST", "/v1/similar"),
            ("POST", "/v1/search"),
            ("GET", "/v1/recommend"),
            ("POST", "/v1/recommend"),
            ("GET", "/v1/version"),
            ("GET", "/v1/health"),
        }
        for method, path in described:
            assert ask(api, method, path, b"{}").status in (200, 400)

    def test_openapi_has_no_dangling_reference_and_true_examples(self, api: HttpApi) -> None:
        document = ask(api, "GET", "/openapi.json").json
        text = json.dumps(document)
        names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
        assert names == set(document["components"]["schemas"])
        for path, methods in document["paths"].items():
            if "post" in methods:
                example = methods["post"]["requestBody"]["content"]["application/json"]["example"]
                for kind in (methods["post"]["requestBody"]["content"], methods["post"]["responses"]["200"]["content"]):
                    assert (ARROW_TYPE in kind) == (path == "/v1/search")
                assert ask(api, "POST", path, example).status == 200

    def test_openapi_knows_this_catalogue(self, api: HttpApi, int_api: HttpApi) -> None:
        strings, integers = (ask(one, "GET", "/openapi.json").json["components"]["schemas"] for one in (api, int_api))
        assert strings["Similar"]["properties"]["key"]["type"] == "string"
        assert integers["Similar"]["properties"]["key"]["type"] == "integer"
        assert strings["Similar"]["properties"]["k"]["maximum"] == 5
        assert "user" in strings["Recommend"]["properties"]
        assert "user" not in integers["Recommend"]["properties"]
        vector = strings["Search"]["properties"]["vector"]
        assert (vector["minItems"], vector["maxItems"]) == (DIM, DIM)


class TestTogether:
    """Single requests that wait side by side are answered in one call, each as if it were alone."""

    def at_once(self, api: HttpApi, targets: Sequence[str]) -> list[tuple[int, Any]]:
        async def request(target: str) -> tuple[int, Any]:
            sent: list[Any] = []

            async def send(message: Any) -> None:
                sent.append(message)

            async def receive() -> Any:
                raise AssertionError("a GET has no body")

            path, _, query = target.partition("?")
            scope = {"type": "http", "method": "GET", "path": path, "query_string": query.encode(), "headers": []}
            await api(scope, receive, send)
            return sent[0]["status"], json.loads(sent[1]["body"])

        async def run() -> list[tuple[int, Any]]:
            return await asyncio.gather(*map(request, targets))

        return asyncio.run(run())

    def test_each_is_answered_as_alone(self, api: HttpApi, retriever: BruteForce) -> None:
        targets = [
            "/v1/recommend?items=a&k=3",
            "/v1/similar?key=a&k=3",
            "/v1/recommend?items=b&items=nope&user=7&k=3",
            "/v1/recommend?items=a&k=3&exclude_seen=0",
            "/v1/similar?key=b&k=3",
            "/v1/recommend?user=99&k=3",
            "/v1/similar?key=a&k=2",
        ]
        together = self.at_once(api, targets)
        assert len(retriever.threads) == 4  # recommend twice, similar twice
        for target, (status, answer) in zip(targets, together, strict=True):
            assert (status, answer) == (200, ask(api, "GET", target).json)

    def test_an_unknown_key_fails_only_its_own_request(self, api: HttpApi) -> None:
        answers = self.at_once(api, [f"/v1/similar?key={key}&k=2" for key in ("a", "nope", "b", "c")])
        assert [status for status, _ in answers] == [200, 404, 200, 200]
        assert answers[1][1]["error"]["message"] == "key 'nope' is not in the item vocabulary"
        assert answers[2][1] == ask(api, "GET", "/v1/similar?key=b&k=2").json

    def test_a_bug_fails_those_it_meets(
        self, api: HttpApi, retriever: BruteForce, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("secret detail")

        monkeypatch.setattr(retriever, "similar", broken)
        with caplog.at_level(logging.ERROR):
            answers = self.at_once(api, ["/v1/similar?key=a", "/v1/recommend?items=a", "/v1/similar?key=b"])
        assert [status for status, _ in answers] == [500, 200, 500]
        assert [record.getMessage() for record in caplog.records] == ["GET /v1/similar failed"] * 2


class TestThreads:
    def test_quick_queries_stay_on_the_event_loop(self, api: HttpApi, retriever: BruteForce) -> None:
        api.warm_up()
        retriever.threads.clear()
        ask(api, "GET", "/v1/similar?key=a")
        assert retriever.threads == [threading.current_thread().name]

    @pytest.mark.parametrize("padding", [0, 70_000])
    def test_long_work_leaves_it(self, retriever: BruteForce, items: Vocabulary, padding: int) -> None:
        api = HttpApi(retriever, Catalogue("v1", 6, DIM, "string"), items)
        if not padding:  # a slow catalogue instead of a large body
            api._query_seconds = 1.0
        body = json.dumps({"keys": ["a", "b"]}).encode().ljust(padding)
        assert len(ask(api, "POST", "/v1/similar", body, chunk=10_000).json["results"]) == 2
        assert retriever.threads == ["retrieval_0"]

    def test_health_is_answered_while_a_batch_runs(
        self, retriever: BruteForce, items: Vocabulary, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        api = HttpApi(retriever, Catalogue("v1", 6, DIM, "string"), items)
        api._query_seconds = 1.0
        started, finish = threading.Event(), threading.Event()
        search = retriever.search

        def slow(*args: Any) -> Found:
            started.set()
            assert finish.wait(10)
            return search(*args)

        monkeypatch.setattr(retriever, "search", slow)
        order: list[str] = []

        async def request(method: str, path: str, body: bytes = b"") -> None:
            async def receive() -> Any:
                return {"type": "http.request", "body": body}

            async def send(message: Any) -> None:
                if message["type"] == "http.response.body":
                    order.append(path)

            scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
            await api(scope, receive, send)

        async def both() -> None:
            batch = asyncio.create_task(request("POST", "/v1/similar", b'{"keys": ["a", "b"]}'))
            assert await asyncio.to_thread(started.wait, 10)
            await request("GET", "/v1/health")
            finish.set()
            await batch

        asyncio.run(both())
        assert order == ["/v1/health", "/v1/similar"]


def test_lifespan_and_websockets(api: HttpApi) -> None:
    async def run(scope_type: str, incoming: list[str]) -> list[str]:
        messages = [{"type": name} for name in incoming]
        sent: list[str] = []

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await api({"type": scope_type}, receive, send)
        return sent

    assert asyncio.run(run("websocket", ["websocket.connect"])) == ["websocket.close"]
    events = ["lifespan.startup", "lifespan.shutdown"]
    assert asyncio.run(run("lifespan", events)) == [f"{event}.complete" for event in events]
