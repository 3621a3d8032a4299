"""gRPC messages to the documents that JSON bodies hold, and answers back: what is asked is checked in one place only.

A message says less than JSON about types: an empty list of keys is neither of integers nor of strings, and a feature's
type is known to the catalogue alone, which the fields of a feature are read by (`http_schema.FeatureType`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from embedding_service import retrieval_pb2 as pb
from embedding_service.http_schema import Catalogue, FeatureType, Key, Limits, Problem, batch_too_large

Message = TypeVar("Message")


def read_similar(request: pb.SimilarRequest, catalogue: Catalogue, limits: Limits) -> dict[str, Any]:
    document = _options(request)
    if request.HasField("key"):
        document["key"] = _key(request.key, "key")
    if request.HasField("keys"):
        document["keys"] = _keys(request.keys, "keys")
    return document


def read_recommend(request: pb.RecommendRequest, catalogue: Catalogue, limits: Limits) -> dict[str, Any]:
    document = _options(request)
    if request.HasField("exclude_seen"):
        document["exclude_seen"] = request.exclude_seen
    if request.explain:
        document["explain"] = True
    if request.HasField("session"):
        session = request.session
        document["session"] = _keys(session.items, "session.items")
        if session.HasField("user"):
            document["user"] = _key(session.user, "session.user")
        if session.features:
            document["features"] = {
                name: _feature(value, catalogue.features.get(name), f"session.features.{name}")
                for name, value in session.features.items()
            }
    if request.sessions:
        document |= _sessions(_within(request.sessions, limits), catalogue.features)
    return document


def read_search(request: pb.SearchRequest, catalogue: Catalogue, limits: Limits) -> dict[str, Any]:
    document = _options(request)
    if request.HasField("vector"):
        document["vector"] = list(request.vector.values)
    if request.vectors:
        document["vectors"] = [list(vector.values) for vector in _within(request.vectors, limits)]
    return document


def read_embed(request: pb.EmbedRequest, catalogue: Catalogue, limits: Limits) -> dict[str, Any]:
    document: dict[str, Any] = {}
    if request.HasField("keys"):
        document["keys"] = _keys(request.keys, "keys")
    if request.sessions:
        sessions = _within(request.sessions, limits)
        document["sessions"] = [_keys(session.items, "sessions.items") for session in sessions]
    return document


def write_answers(document: Mapping[str, Any]) -> pb.Answers:
    """The answer to one query, or to a batch."""
    answers = document.get("results")
    if answers is None:
        answers = [document]
    partial = document.get("partial")
    return pb.Answers(
        version=document["version"],
        answers=[_answer(one) for one in answers],
        partial=None if partial is None else pb.Partial(**partial),
    )


def write_embeddings(document: Mapping[str, Any]) -> pb.Embeddings:
    return pb.Embeddings(
        version=document["version"], vectors=[pb.Vector(values=vector or ()) for vector in document["vectors"]]
    )


def _answer(one: Mapping[str, Any]) -> pb.Answer:
    items = one["items"]
    answer = pb.Answer(
        keys=_written([item["key"] for item in items]),
        scores=[item["score"] for item in items],
        cold_start=one.get("cold_start", False),
        unknown_user=one.get("unknown_user", False),
    )
    if one.get("unknown"):
        answer.unknown.CopyFrom(_written(one["unknown"]))
    if items and items[0].get("because") is not None:
        for item in items:
            pulls = item["because"]
            contributions = [pull["contribution"] for pull in pulls]
            answer.because.add(keys=_written([pull["key"] for pull in pulls]), contributions=contributions)
    return answer


def _written(keys: Sequence[Key]) -> pb.Keys:
    if keys and isinstance(keys[0], int):
        return pb.Keys(integers=keys)  # type: ignore[arg-type]
    return pb.Keys(strings=keys)  # type: ignore[arg-type]


def _options(request: Any) -> dict[str, Any]:
    """What the requests for items have in common."""
    document: dict[str, Any] = {}
    if request.HasField("k"):
        document["k"] = request.k
    if request.diversity:
        document["diversity"] = request.diversity
    if request.HasField("filter"):
        chosen = request.filter
        filtered: dict[str, Any] = {}
        if chosen.HasField("allow"):
            filtered["allow"] = _keys(chosen.allow, "filter.allow")
        if chosen.HasField("deny"):
            filtered["deny"] = _keys(chosen.deny, "filter.deny")
        if chosen.where:
            filtered["where"] = {
                name: [*values.strings, *values.integers, *values.booleans] for name, values in chosen.where.items()
            }
        document["filter"] = filtered
    return document


def _within(messages: Sequence[Message], limits: Limits) -> Sequence[Message]:
    """`messages`, one per query. Problem 413 before millions of empty ones, of two bytes each, are looked at."""
    if len(messages) > limits.max_batch:
        raise batch_too_large(len(messages), limits)
    return messages


def _sessions(sessions: Sequence[pb.Session], features: Mapping[str, FeatureType]) -> dict[str, Any]:
    """A batch: the items of each session, and where any session has them a column of users and one of each feature."""
    columns: dict[str, Any] = {"sessions": [_keys(session.items, "sessions.items") for session in sessions]}
    if any(session.HasField("user") for session in sessions):
        columns["users"] = [
            _key(session.user, "sessions.user") if session.HasField("user") else None for session in sessions
        ]
    named = dict.fromkeys(name for session in sessions for name in session.features)
    if unknown := next((name for name in named if name not in features), None):
        columns["features"] = {unknown: []}  # to be refused; a column for each of a million names would take long
    elif named:
        columns["features"] = {
            name: [
                _feature(session.features[name], features.get(name), f"sessions.features.{name}")
                if name in session.features
                else None
                for session in sessions
            ]
            for name in named
        }
    return columns


def _key(key: pb.Key, name: str) -> Key:
    kind = key.WhichOneof("key")
    if kind is None:
        raise Problem(400, "invalid_request", f"`{name}` has neither an integer nor a string")
    value: Key = getattr(key, kind)
    return value


def _keys(keys: pb.Keys, name: str) -> list[Key]:
    if keys.integers and keys.strings:
        raise Problem(400, "invalid_request", f"`{name}` has integers and strings; a catalogue's keys are one kind")
    return list(keys.integers or keys.strings)


def _feature(value: pb.Feature, known: FeatureType | None, name: str) -> Any:
    """As JSON has it. What is unknown, or of the wrong kind, is passed on as it is, to be refused as in JSON."""
    keys, numbers = _keys(value.keys, f"{name}.keys"), list(value.numbers)
    if known is not None and known.is_weighted:
        if len(keys) != len(numbers):
            message = f"`{name}` has {len(keys)} keys and {len(numbers)} numbers; each key has one weight"
            raise Problem(400, "invalid_request", message)
        return [[key, weight] for key, weight in zip(keys, numbers, strict=True)]
    if known is not None and known.is_list:
        return numbers or keys
    values: list[Any] = keys or numbers
    if known is not None and known.width > 1:
        return values
    return values[0] if len(values) == 1 else values
