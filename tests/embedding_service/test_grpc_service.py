"""gRPC without Ray: messages to what JSON would hold and back, statuses of refusals, tokens, versions and counts."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import grpc
import pytest

from embedding_service import retrieval_pb2 as pb
from embedding_service.grpc_messages import read_recommend
from embedding_service.grpc_service import GrpcService
from embedding_service.http_schema import Catalogue, FeatureType, Problem
from tests.embedding_service.artifacts import publish
from tests.embedding_service.services import LIMITS, LocalService

ROOT = Path(__file__).parents[2]
READ_TOKEN = b"a-token-of-readers"
KEYS = [f"i{i:04d}" for i in range(10)]
CATALOGUE = Catalogue(
    "v1",
    6,
    4,
    "string",
    features={
        "colour": FeatureType("string"),
        "tags": FeatureType("int64", is_list=True),
        "visits": FeatureType("string", is_list=True, is_weighted=True),
        "age": FeatureType(width=1),
        "taste": FeatureType(width=2),
    },
)


class Context:
    """Serve's, as far as it is used."""

    def __init__(self, metadata: list[tuple[str, str]]) -> None:
        self._metadata, self.trailing = metadata, [("request_id", "of-serve")]
        self.status: grpc.StatusCode | None = None
        self.details = ""

    def invocation_metadata(self) -> list[tuple[str, str | bytes]]:
        return list(self._metadata)

    def trailing_metadata(self) -> list[tuple[str, str]]:
        return self.trailing

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing = self.trailing[:1] + trailing_metadata

    def set_code(self, code: grpc.StatusCode) -> None:
        self.status = code

    def set_details(self, details: str) -> None:
        self.details = details


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    root = tmp_path_factory.mktemp("versions")
    publish(root, version="a")
    running = LocalService(root, "a", read_token=READ_TOKEN)
    yield running
    running.close()


def call(service: LocalService, name: str, request: Any, token: bytes = READ_TOKEN) -> tuple[Any, Context]:
    context = Context([("authorization", f"Bearer {token.decode()}"), ("user-agent", "a test")])
    return asyncio.run(GrpcService(service.app).answer(name, request, context)), context


def keys(*strings: str) -> pb.Keys:
    return pb.Keys(strings=strings)


class TestAnswers:
    """Each is what HTTP answers to the same question."""

    @pytest.mark.parametrize(
        ("name", "request_", "path", "body"),
        [
            ("Similar", pb.SimilarRequest(key=pb.Key(string=KEYS[2])), "similar", {"key": KEYS[2]}),
            (
                "Similar",
                pb.SimilarRequest(keys=keys(KEYS[1], "nope"), k=3, filter=pb.Filter(deny=keys(KEYS[0]))),
                "similar",
                {"keys": [KEYS[1], "nope"], "k": 3, "filter": {"deny": [KEYS[0]]}},
            ),
            (
                "Similar",
                pb.SimilarRequest(key=pb.Key(string=KEYS[2]), filter=pb.Filter(allow=pb.Keys())),
                "similar",
                {"key": KEYS[2], "filter": {"allow": []}},
            ),
            ("Recommend", pb.RecommendRequest(), "recommend", {"session": []}),
            (
                "Recommend",
                pb.RecommendRequest(session=pb.Session(items=keys(KEYS[3], "nope")), exclude_seen=False, explain=True),
                "recommend",
                {"session": [KEYS[3], "nope"], "exclude_seen": False, "explain": True},
            ),
            (
                "Recommend",
                pb.RecommendRequest(sessions=[pb.Session(items=keys(KEYS[3])), pb.Session()], k=4, diversity=0.5),
                "recommend",
                {"sessions": [[KEYS[3]], []], "k": 4, "diversity": 0.5},
            ),
        ],
    )
    def test_they_are_those_of_http(
        self, service: LocalService, name: str, request_: Any, path: str, body: dict[str, Any]
    ) -> None:
        found, context = call(service, name, request_)
        expected = service.ask("POST", f"/v1/{path}", body).json
        assert (context.status, found.version) == (None, expected["version"])
        results = expected.get("results", [expected])
        assert len(found.answers) == len(results)
        for answer, result in zip(found.answers, results, strict=True):
            assert list(answer.keys.strings) == [item["key"] for item in result["items"]]
            assert list(answer.scores) == pytest.approx([item["score"] for item in result["items"]])
            assert list(answer.unknown.strings) == result.get("unknown", [])
            assert answer.cold_start == result.get("cold_start", False)
            because = [list(told.keys.strings) for told in answer.because]
            explained = [item["because"] for item in result["items"] if "because" in item]
            assert because == [[pull["key"] for pull in pulls] for pulls in explained]
            assert bool(because) == ("explain" in body)

    def test_embedded_sessions_find_what_recommend_does(self, service: LocalService) -> None:
        session = pb.Session(items=keys(KEYS[3], KEYS[4]))
        embedded, _ = call(service, "Embed", pb.EmbedRequest(sessions=[session]))
        found, _ = call(service, "Search", pb.SearchRequest(vectors=embedded.vectors, k=5))
        one, _ = call(service, "Search", pb.SearchRequest(vector=embedded.vectors[0], k=5))
        asked, _ = call(service, "Recommend", pb.RecommendRequest(session=session, k=5, exclude_seen=False))
        assert found.answers[0].keys == one.answers[0].keys == asked.answers[0].keys
        embedded, _ = call(service, "Embed", pb.EmbedRequest(keys=keys(KEYS[0], "nope")))
        assert [len(vector.values) > 0 for vector in embedded.vectors] == [True, False]

    def test_they_are_counted_as_http_is(self, service: LocalService) -> None:
        def counted() -> list[int]:
            requests, tally = service.instruments.requests, service.versions.now.live.tally.counts()
            return [*(requests.get(("a", "/v1/similar", status), 0) for status in (200, 404)), tally["requests"]]

        before = counted()
        call(service, "Similar", pb.SimilarRequest(key=pb.Key(string=KEYS[2])))
        call(service, "Similar", pb.SimilarRequest(key=pb.Key(string="nope")))
        assert [now - then for now, then in zip(counted(), before, strict=True)] == [1, 1, 2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("name", "request_", "status", "code", "details"),
        [
            ("Similar", pb.SimilarRequest(key=pb.Key(string="nope")), "NOT_FOUND", "key_not_found", "'nope'"),
            ("Similar", pb.SimilarRequest(), "INVALID_ARGUMENT", "invalid_request", "`key`: field required"),
            ("Similar", pb.SimilarRequest(key=pb.Key()), "INVALID_ARGUMENT", "invalid_request", "`key` has neither an"),
            (
                "Similar",
                pb.SimilarRequest(key=pb.Key(integer=3)),
                "INVALID_ARGUMENT",
                "invalid_request",
                "`key`: input should be a valid string",
            ),
            (
                "Similar",
                pb.SimilarRequest(keys=pb.Keys(integers=[3], strings=["a"])),
                "INVALID_ARGUMENT",
                "invalid_request",
                "`keys` has integers and strings; a catalogue's keys are one kind",
            ),
            (
                "Similar",
                pb.SimilarRequest(key=pb.Key(string=KEYS[0]), k=LIMITS.max_k + 1),
                "INVALID_ARGUMENT",
                "invalid_request",
                "`k`: input should be less than or equal to 50",
            ),
            (
                "Similar",
                pb.SimilarRequest(keys=keys(*KEYS[:1] * (LIMITS.max_batch + 1))),
                "INVALID_ARGUMENT",
                "batch_too_large",
                "101 queries in one request; the limit is 100: send several",
            ),
            (
                "Recommend",
                pb.RecommendRequest(sessions=[pb.Session()] * (LIMITS.max_batch + 1)),
                "INVALID_ARGUMENT",
                "batch_too_large",
                "101 queries in one request; the limit is 100: send several",
            ),
            (
                "Search",
                pb.SearchRequest(vector=pb.Vector(values=[1.0, float("nan")])),
                "INVALID_ARGUMENT",
                "invalid_request",
                "`vector",
            ),
            (
                "Recommend",
                pb.RecommendRequest(session=pb.Session(features={"age": pb.Feature(numbers=[3.0])})),
                "INVALID_ARGUMENT",
                "unknown_field",
                "there is no field `features",
            ),
        ],
    )
    def test_they_have_a_status_a_code_and_a_message(
        self, service: LocalService, name: str, request_: Any, status: str, code: str, details: str
    ) -> None:
        found, context = call(service, name, request_)
        assert found.ByteSize() == 0
        assert context.status is grpc.StatusCode[status]
        assert context.trailing == [("request_id", "of-serve"), ("code", code)]
        assert details in context.details

    def test_reading_needs_its_token_where_one_is_set(self, service: LocalService) -> None:
        request = pb.SimilarRequest(key=pb.Key(string=KEYS[0]))
        found, context = call(service, "Similar", request, token=b"another-long-token")
        assert (found.ByteSize(), context.status) == (0, grpc.StatusCode.UNAUTHENTICATED)
        assert "Bearer TOKEN" in context.details
        assert call(service, "Similar", request)[1].status is None

    def test_a_bug_is_told_to_nobody(self, service: LocalService, monkeypatch: pytest.MonkeyPatch) -> None:
        async def broken(*_: Any) -> None:
            raise RuntimeError("secret")

        monkeypatch.setattr(service.versions.now.live.api, "ask", broken)
        _, context = call(service, "Similar", pb.SimilarRequest(key=pb.Key(string=KEYS[0])))
        assert context.status is grpc.StatusCode.INTERNAL
        assert "secret" not in context.details


class TestFeatures:
    GIVEN: ClassVar = {
        "colour": pb.Feature(keys=keys("red")),
        "tags": pb.Feature(keys=pb.Keys(integers=[3, 4])),
        "visits": pb.Feature(keys=keys("x", "y"), numbers=[0.5, 2.0]),
        "age": pb.Feature(numbers=[33]),
        "taste": pb.Feature(numbers=[0.5, 1]),
    }
    MEANT: ClassVar = {
        "colour": "red",
        "tags": [3, 4],
        "visits": [["x", 0.5], ["y", 2.0]],
        "age": 33.0,
        "taste": [0.5, 1.0],
    }

    def test_they_are_read_by_their_types(self) -> None:
        session = pb.Session(items=keys("a"), user=pb.Key(integer=7), features=self.GIVEN)
        document = read_recommend(pb.RecommendRequest(session=session), CATALOGUE, LIMITS)
        assert document == {"session": ["a"], "user": 7, "features": self.MEANT}

    def test_of_a_batch_they_are_columns(self) -> None:
        sessions = [pb.Session(features=self.GIVEN), pb.Session(items=keys("b"), user=pb.Key(string="u"))]
        document = read_recommend(pb.RecommendRequest(sessions=sessions), CATALOGUE, LIMITS)
        columns = {name: [value, None] for name, value in self.MEANT.items()}
        assert document == {"sessions": [[], ["b"]], "users": [None, "u"], "features": columns}

    def test_a_batch_has_no_columns_for_names_that_are_unknown(self) -> None:
        named = {f"nope-{i}": pb.Feature() for i in range(5)}
        sessions = [pb.Session(features=named), pb.Session(features=self.GIVEN)]
        document = read_recommend(pb.RecommendRequest(sessions=sessions), CATALOGUE, LIMITS)
        (name,) = document["features"]
        assert name in named

    def test_each_key_has_one_weight(self) -> None:
        session = pb.Session(features={"visits": pb.Feature(keys=keys("x", "y"), numbers=[1.0])})
        with pytest.raises(Problem, match=r"^`session.features.visits` has 2 keys and 1 numbers; each key has one"):
            read_recommend(pb.RecommendRequest(session=session), CATALOGUE, LIMITS)

    def test_what_does_not_fit_is_left_to_the_checks_of_json(self) -> None:
        given = {"age": pb.Feature(keys=keys("old")), "taste": pb.Feature(numbers=[1.0]), "nope": pb.Feature()}
        document = read_recommend(pb.RecommendRequest(session=pb.Session(features=given)), CATALOGUE, LIMITS)
        assert document["features"] == {"age": "old", "taste": [1.0], "nope": []}


def test_the_generated_code_is_that_of_the_proto_file(tmp_path: Path) -> None:
    from grpc_tools import protoc

    target = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    assert protoc.main(["protoc", f"-I{ROOT}", *target, "embedding_service/retrieval.proto"]) == 0
    made = sorted((tmp_path / "embedding_service").iterdir())
    assert [file.name for file in made] == ["retrieval_pb2.py", "retrieval_pb2.pyi", "retrieval_pb2_grpc.py"]
    for file in made:
        assert file.read_bytes() == (ROOT / "embedding_service" / file.name).read_bytes(), "run `make proto`"
