"""What the HTTP service understands and answers: checked requests, and the models that the OpenAPI document is made of.

The models are built for one artifact, so that the document says which type its keys have, which features its query
tower knows, how long its vectors are and what the limits of this service are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn, TypeVar

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

ARROW_TYPE = "application/vnd.apache.arrow.stream"
Key = int | str
KeyType = Literal["int64", "string"]
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused."""

    max_k: int = 1000
    max_batch: int = 10_000  # queries in one request
    max_body_bytes: int = 32 * 2**20
    max_session: int = 10_000  # items in one session
    max_results: int = 1_000_000  # queries times k
    max_waiting: int = 64  # large requests at once in a replica; more are answered with 503
    timeout_seconds: float = 30.0  # of a large request; then it is answered with 503


@dataclass(frozen=True)
class FeatureType:
    """What a client gives of a feature: a key of `key_type`, with `is_list` a list of them, with `is_weighted` of [key,
    weight] pairs, or `width` numbers.
    """

    key_type: KeyType | None = None
    is_list: bool = False
    is_weighted: bool = False
    width: int = 0


@dataclass(frozen=True)
class Catalogue:
    """What a client may ask of an artifact.

    `dim` is the length of the vectors that `search` takes. `user_type` is None where the query tower sees no user;
    `features` are the names and types of its further inputs. `details` is passed on by the version endpoint.
    """

    version: str
    num_items: int
    dim: int
    key_type: KeyType
    user_type: KeyType | None = None
    features: Mapping[str, FeatureType] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


class Problem(Exception):
    """A request that is answered with an error: `status`, a stable `code` for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        self.status, self.code, self.headers = status, code, headers
        super().__init__(message)


def overloaded(message: str) -> Problem:
    """A 503 for a request that would have to wait too long; the client may come back in a second."""
    return Problem(503, "overloaded", message, ((b"retry-after", b"1"),))


def batch_too_large(num_queries: int, limits: Limits) -> Problem:
    message = f"{num_queries} queries in one request; the limit is {limits.max_batch}: send several"
    return Problem(413, "batch_too_large", message)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Item(BaseModel):
    key: Key
    score: float = Field(description="inner product or cosine, as the artifact's index has it; higher is closer")


class Pull(BaseModel):
    key: Key = Field(description="an item of the session")
    contribution: float = Field(description="by how much the score would fall without it")


class ExplainedItem(Item):
    because: list[Pull] | None = Field(
        None, description="with `explain`: what of the session pulled it, strongest first"
    )


class Vectors(BaseModel):
    version: str
    vectors: list[list[float] | None] = Field(description="one per key, null for an unknown one, or one per session")


class Partial(BaseModel):
    lost_shards: list[int] = Field(description="shards of the index that did not answer, counted from 0")
    num_shards: int


class Answered(BaseModel):
    version: str = Field(description="version of the artifact that answered")
    partial: Partial | None = Field(None, description="only where parts of the index did not answer, and lack here")


class Answer(Answered):
    items: list[Item] = Field(description="best first; fewer than k only where the catalogue has no more")


class Recommendation(Answered):
    items: list[ExplainedItem] = Field(description="best first; fewer than k only where no more are allowed")
    cold_start: bool = Field(description="nothing in the request is known: these are the most frequent items")
    unknown: list[Key] = Field(description="items of the session that are not in the vocabulary; they were ignored")
    unknown_user: bool = Field(description="a user was given who is not in the vocabulary, and was ignored")


class ItemsResult(BaseModel):
    items: list[Item]


class SimilarResult(ItemsResult):
    unknown: list[Key] = Field(description="[key] if the vocabulary does not have it: then there are no items")


class RecommendationResult(ItemsResult):
    cold_start: bool
    unknown: list[Key]
    unknown_user: bool


class SimilarBatch(Answered):
    results: list[SimilarResult] = Field(description="one per query, in their order")


class SearchBatch(Answered):
    results: list[ItemsResult] = Field(description="one per query, in their order")


class RecommendationBatch(Answered):
    results: list[RecommendationResult] = Field(description="one per query, in their order")


class Health(BaseModel):
    status: Literal["ok"]
    version: str


class Version(BaseModel):
    version: str
    num_items: int
    dim: int
    key_type: KeyType
    limits: dict[str, float]
    details: dict[str, Any]


class ErrorDetail(BaseModel):
    code: str = Field(description="for programs; stable")
    message: str = Field(description="for people")
    request_id: str | None = Field(None, description="X-Request-ID of the request; the service's log has it too")


class Error(BaseModel):
    error: ErrorDetail


class RequestModels:
    """Checks the JSON bodies of one service. Each endpoint takes one of two models: a single query, or a batch."""

    def __init__(self, catalogue: Catalogue, limits: Limits, *, wishes: bool = False) -> None:
        """`wishes`: whether filters, diversity and explanations may be asked for, and vectors (`embed`)."""
        self._limits = limits
        key = _key(catalogue.key_type)
        options: dict[str, Any] = {
            "k": (Annotated[int, Field(ge=1, le=limits.max_k, description="how many items")], 10)
        }
        self.wished: type[BaseModel] | None = None  # what parameters may wish for
        if wishes:
            wished: dict[str, Any] = {
                "filter": (_filter(key, limits) | None, Field(None, description="which items may be shown"))
            }
            about = "0: by score alone; towards 1: the less alike the better (maximal marginal relevance)"
            wished["diversity"] = (float, Field(0.0, ge=0.0, le=1.0, description=about))
            self.wished = _model("Wished", **wished)
            options |= wished
        vector = _vector(catalogue.dim)
        self.similar = Pair(
            _model("Similar", key=(key, ...), **options),
            _model("SimilarBatchRequest", keys=(self._batch(key), ...), **options),
        )
        self.search = Pair(
            _model("Search", vector=(vector, ...), **options),
            _model("SearchBatchRequest", vectors=(self._batch(vector), ...), **options),
        )
        session = Annotated[
            list[key],  # type: ignore[valid-type]
            Field(max_length=limits.max_session, fail_fast=True, description="item keys, oldest first"),
        ]
        options["exclude_seen"] = (bool, Field(True, description="leave out the items of the session"))
        one: dict[str, Any] = {"session": (session, ())}
        self.embed: Pair | None = None
        if wishes:
            one["explain"] = (bool, Field(False, description="tell which items of the session pulled each item"))
            items, sessions = {"keys": (self._batch(key), ...)}, {"sessions": (self._batch(session), ...)}
            self.embed = Pair(_model("EmbedItems", **items), _model("EmbedSessions", **sessions))
        many: dict[str, Any] = {"sessions": (self._batch(session), ...)}
        if catalogue.user_type is not None:
            user = _key(catalogue.user_type) | None
            one["user"] = (user, None)
            many["users"] = (self._batch(user), Field(None, description="a user, or null, per session"))
        if catalogue.features:
            entries = {name: _feature(type_, limits) | None for name, type_ in catalogue.features.items()}
            features = _model("Features", **{name: (entry, None) for name, entry in entries.items()})
            columns = {name: (self._batch(entry), Field(None)) for name, entry in entries.items()}
            one["features"] = (features | None, None)
            doc = "per feature a list with a value, or null, per session"
            many["features"] = (_model("FeatureColumns", **columns) | None, Field(None, description=doc))
        self.recommend = Pair(_model("Recommend", **one, **options), _model("RecommendBatchRequest", **many, **options))

    def parse(self, pair: Pair, body: bytes | dict[str, Any]) -> Any:
        """The checked model of a body, JSON or what it holds: `pair.batch` if it has a field that only a batch has,
        else `pair.single`.

        Raises Problem 400, or 413 where a batch is larger than the limit.
        """
        document = _json_object(body, pair.names) if isinstance(body, bytes) else body
        return _checked(document, pair.single if pair.plurals.isdisjoint(document) else pair.batch)

    def parse_wished(self, given: Mapping[str, str]) -> Any:
        """The checked model of the parameters `filter` and `diversity`, each as JSON has it. Raises Problem 400."""
        assert self.wished is not None
        document = {}
        for name, text in given.items():
            try:
                document[name] = orjson.loads(text)
            except orjson.JSONDecodeError as error:
                raise Problem(400, "invalid_request", f"the parameter `{name}` is not valid JSON: {error}") from None
        return _checked(document, self.wished)

    def _batch(self, entry: Any) -> Any:
        """list[entry] with at least one and at most the limit's number of entries."""

        def check_size(value: Any) -> Any:
            if isinstance(value, list) and len(value) > self._limits.max_batch:
                raise batch_too_large(len(value), self._limits)
            return value

        schema = {"maxItems": self._limits.max_batch}
        batch = Annotated[list[entry], Field(min_length=1, fail_fast=True, json_schema_extra=schema)]
        return Annotated[batch, BeforeValidator(check_size)]


def parse_body(model: type[Model], body: bytes) -> Model:
    """The checked model of a JSON body. Raises Problem 400."""
    return _checked(_json_object(body, ", ".join(f"`{name}`" for name in model.model_fields)), model)


def _json_object(body: bytes, names: str) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise Problem(400, "invalid_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(document, dict):
        raise Problem(400, "invalid_request", f"the body must be a JSON object with {names}")
    return document


def _checked(document: dict[str, Any], model: type[Model]) -> Model:
    _check_names(document, model)
    try:
        return model.model_validate(document)
    except ValidationError as error:
        _refuse(error)


class Pair:
    """The single and the batch form of one endpoint's body."""

    def __init__(self, single: type[BaseModel], batch: type[BaseModel]) -> None:
        self.single, self.batch = single, batch
        self.plurals = set(batch.model_fields) - set(single.model_fields)
        self.names = f"`{next(iter(single.model_fields))}` or `{next(iter(batch.model_fields))}`"


def _model(name: str, **fields: Any) -> type[BaseModel]:
    return create_model(name, __base__=Strict, **fields)


def _key(key_type: KeyType) -> Any:
    if key_type == "string":
        return str
    return Annotated[int, Field(ge=-(2**63), le=2**63 - 1, json_schema_extra={"format": "int64"})]


def _filter(key: Any, limits: Limits) -> type[BaseModel]:
    many = Annotated[list[key], Field(max_length=limits.max_batch, fail_fast=True)]
    value = Annotated[str, Field(max_length=1000)] | int | bool
    values = value | Annotated[list[value], Field(max_length=1000, fail_fast=True)]
    where = Annotated[dict[str, values], Field(max_length=16)]
    fields: dict[str, Any] = {
        "allow": (many | None, Field(None, description="these alone")),
        "deny": (many, Field((), description="none of these")),
        "where": (where, Field({}, description="attribute: its value, or a list of values of which it is one")),
    }
    return _model("Filter", **fields)


def _feature(asked: FeatureType, limits: Limits) -> Any:
    if asked.key_type is None:
        number = Annotated[float, Field(allow_inf_nan=False)]
        return number if asked.width == 1 else _vector(asked.width)
    if not asked.is_list:
        return _key(asked.key_type)
    key: Any = _key(asked.key_type)
    if asked.is_weighted:
        key = Annotated[list[key | float], Field(min_length=2, max_length=2, description="key, weight")]
    return Annotated[list[key], Field(max_length=limits.max_session, fail_fast=True)]


def _vector(width: int) -> Any:
    number = Annotated[float, Field(allow_inf_nan=False)]
    return Annotated[list[number], Field(min_length=width, max_length=width, fail_fast=True)]


def _check_names(document: dict[str, Any], model: type[BaseModel], path: str = "") -> None:
    """Raise Problem for a field that `model` does not have.

    Before pydantic looks, which would collect an error for each of a million unknown names.
    """
    fields = model.model_fields
    for name, value in document.items():
        if name not in fields:
            close = difflib.get_close_matches(name[:100], fields, n=1)
            hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(fields)}"
            raise Problem(400, "unknown_field", f"there is no field `{path}{name[:100]}`; {hint}")
        inner = [part for part in getattr(fields[name].annotation, "__args__", ()) if isinstance(part, type)]
        if inner and issubclass(inner[0], BaseModel) and isinstance(value, dict):
            _check_names(value, inner[0], f"{path}{name}.")


def _refuse(error: ValidationError) -> NoReturn:
    """Raise the Problem for the first thing that is wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    path = ".".join(str(part) for part in first["loc"])
    says = "must be a JSON object" if first["type"] == "model_type" else first["msg"].replace(" after validation", "")
    raise Problem(400, "invalid_request", f"`{path}`: {says[:1].lower()}{says[1:]}") from None
