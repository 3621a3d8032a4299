"""What the HTTP service understands and answers: checked requests, and the OpenAPI document made of the same models.

The models are built for one artifact, so that the document says which type its keys have, which features its query
tower knows, how long its vectors are and what the limits of this service are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NoReturn

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

ARROW_TYPE = "application/vnd.apache.arrow.stream"
Key = int | str
KeyType = Literal["int64", "string"]


@dataclass(frozen=True)
class Limits:
    """What one request may ask for; more is refused."""

    max_k: int = 1000
    max_batch: int = 10_000  # queries in one request
    max_body_bytes: int = 32 * 2**20
    max_session: int = 10_000  # items in one session
    max_results: int = 1_000_000  # queries times k


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
    """A request that is answered with an error: `status` 4xx, a stable `code` for programs, a message for people."""

    def __init__(self, status: int, code: str, message: str) -> None:
        self.status = status
        self.code = code
        super().__init__(message)


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Item(BaseModel):
    key: Key
    score: float = Field(description="inner product or cosine, as the artifact's index has it; higher is closer")


class Answer(BaseModel):
    version: str = Field(description="version of the artifact that answered")
    items: list[Item] = Field(description="best first; fewer than k only where the catalogue has no more")


class Recommendation(Answer):
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


class SimilarBatch(BaseModel):
    version: str
    results: list[SimilarResult] = Field(description="one per query, in their order")


class SearchBatch(BaseModel):
    version: str
    results: list[ItemsResult] = Field(description="one per query, in their order")


class RecommendationBatch(BaseModel):
    version: str
    results: list[RecommendationResult] = Field(description="one per query, in their order")


class Health(BaseModel):
    status: Literal["ok"]
    version: str


class Version(BaseModel):
    version: str
    num_items: int
    dim: int
    key_type: KeyType
    limits: dict[str, int]
    details: dict[str, Any]


class ErrorDetail(BaseModel):
    code: str
    message: str


class Error(BaseModel):
    error: ErrorDetail


class RequestModels:
    """Checks the JSON bodies of one service. Each endpoint takes one of two models: a single query, or a batch."""

    def __init__(self, catalogue: Catalogue, limits: Limits) -> None:
        self._limits = limits
        key = _key(catalogue.key_type)
        options: dict[str, Any] = {
            "k": (Annotated[int, Field(ge=1, le=limits.max_k, description="how many items")], 10)
        }
        vector = _vector(catalogue.dim)
        self.similar = _Pair(
            _model("Similar", key=(key, ...), **options),
            _model("SimilarBatchRequest", keys=(self._batch(key), ...), **options),
        )
        self.search = _Pair(
            _model("Search", vector=(vector, ...), **options),
            _model("SearchBatchRequest", vectors=(self._batch(vector), ...), **options),
        )
        session = Annotated[
            list[key],  # type: ignore[valid-type]
            Field(max_length=limits.max_session, fail_fast=True, description="item keys, oldest first"),
        ]
        options["exclude_seen"] = (bool, Field(True, description="leave out the items of the session"))
        one: dict[str, Any] = {"session": (session, ())}
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
        self.recommend = _Pair(
            _model("Recommend", **one, **options), _model("RecommendBatchRequest", **many, **options)
        )

    def parse(self, pair: _Pair, body: bytes) -> Any:
        """The checked model of a JSON body: `pair.batch` if it has a field that only a batch has, else `pair.single`.

        Raises Problem 400, or 413 where a batch is larger than the limit.
        """
        try:
            document = orjson.loads(body)
        except orjson.JSONDecodeError as error:
            raise Problem(400, "invalid_json", f"the body is not valid JSON: {error}") from None
        if not isinstance(document, dict):
            raise Problem(400, "invalid_request", f"the body must be a JSON object with {pair.names}")
        model = pair.single if pair.plurals.isdisjoint(document) else pair.batch
        _check_names(document, model)
        try:
            return model.model_validate(document)
        except ValidationError as error:
            _refuse(error)

    def _batch(self, entry: Any) -> Any:
        """list[entry] with at least one and at most the limit's number of entries."""

        def check_size(value: Any) -> Any:
            if isinstance(value, list) and len(value) > self._limits.max_batch:
                message = f"{len(value)} queries in one request; the limit is {self._limits.max_batch}: send several"
                raise Problem(413, "batch_too_large", message)
            return value

        schema = {"maxItems": self._limits.max_batch}
        batch = Annotated[list[entry], Field(min_length=1, fail_fast=True, json_schema_extra=schema)]
        return Annotated[batch, BeforeValidator(check_size)]


class _Pair:
    """The single and the batch form of one endpoint's body."""

    def __init__(self, single: type[BaseModel], batch: type[BaseModel]) -> None:
        self.single, self.batch = single, batch
        self.plurals = set(batch.model_fields) - set(single.model_fields)
        self.names = f"`{next(iter(single.model_fields))}` or `{next(iter(batch.model_fields))}`"


def _model(name: str, **fields: Any) -> type[BaseModel]:
    return create_model(name, __base__=_Strict, **fields)


def _key(key_type: KeyType) -> Any:
    if key_type == "string":
        return str
    return Annotated[int, Field(ge=-(2**63), le=2**63 - 1, json_schema_extra={"format": "int64"})]


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


def openapi(catalogue: Catalogue, models: RequestModels, limits: Limits) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service over `catalogue`."""
    schemas: dict[str, Any] = {}

    def schema(*parts: type[BaseModel]) -> dict[str, Any]:
        for part in parts:
            whole = part.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas.update(whole.pop("$defs", {}))
            schemas[part.__name__] = whole
        names = [{"$ref": f"#/components/schemas/{part.__name__}"} for part in parts]
        return names[0] if len(names) == 1 else {"oneOf": names}

    key = _json_key(catalogue.key_type)
    k = _parameter("k", {"type": "integer", "minimum": 1, "maximum": limits.max_k, "default": 10}, "how many items")
    recommend = [
        _parameter("items", {"type": "array", "items": key}, "session items, oldest first: items=a&items=b"),
        k,
        _parameter("exclude_seen", {"type": "boolean", "default": True}, "leave out the items of the session"),
    ]
    if catalogue.user_type is not None:
        recommend.insert(1, _parameter("user", _json_key(catalogue.user_type), "the user of the session"))
    one_item: Key = 1 if catalogue.key_type == "int64" else "a"
    get, post = _operation(schema, "get"), _operation(schema, "post")
    paths = {
        "/v1/similar": {
            "get": get("items similar to one item", Answer, [_parameter("key", key, "the item", required=True), k]),
            "post": post("the same, one or many", models.similar, {"keys": [one_item]}, Answer, SimilarBatch),
        },
        "/v1/search": {
            "post": _with_arrow(
                post("items nearest to vectors", models.search, {"vector": [0.0] * catalogue.dim}, Answer, SearchBatch),
                catalogue,
                k,
            ),
        },
        "/v1/recommend": {
            "get": get("what next for one session", Recommendation, recommend),
            "post": post(
                "the same, one or many", models.recommend, {"session": [one_item]}, Recommendation, RecommendationBatch
            ),
        },
        "/v1/version": {"get": get("what is served", Version, [])},
        "/v1/health": {"get": get("200 while the service answers", Health, [])},
    }
    info = {
        "title": "lexshard",
        "version": catalogue.version,
        "description": f"Similar items and recommendations over {catalogue.num_items} items. Errors are JSON: "
        '{"error": {"code", "message"}}.',
    }
    servers = [{"url": "."}]
    return {"openapi": "3.1.0", "info": info, "servers": servers, "paths": paths, "components": {"schemas": schemas}}


def _with_arrow(operation: dict[str, Any], catalogue: Catalogue, k: dict[str, Any]) -> dict[str, Any]:
    """The operation on JSON, and on Arrow streams as well."""
    key = "int64" if catalogue.key_type == "int64" else "string"
    asked = f"an uncompressed stream with one column `vector`, fixed_size_list<float32>[{catalogue.dim}]: many queries"
    answered = f"a row per query: `keys` list<{key}>, `scores` list<float32>; the schema's metadata has `version`"
    for content, text in (
        (operation["requestBody"]["content"], asked),
        (operation["responses"]["200"]["content"], answered),
    ):
        content[ARROW_TYPE] = {"schema": {"type": "string", "format": "binary", "description": text}}
    about = "In bulk, Arrow IPC streams spare the time that JSON takes; a stream is answered with a stream."
    only = {**k, "description": "how many items, for an Arrow stream; JSON has it in the body"}
    return {**operation, "description": about, "parameters": [only]}


def _json_key(key_type: KeyType) -> dict[str, Any]:
    return {"type": "string"} if key_type == "string" else {"type": "integer", "format": "int64"}


def _parameter(name: str, schema: dict[str, Any], description: str, *, required: bool = False) -> dict[str, Any]:
    return {"name": name, "in": "query", "required": required, "description": description, "schema": schema}


def _operation(schema: Callable[..., dict[str, Any]], method: str) -> Callable[..., dict[str, Any]]:
    """What makes the OpenAPI operation objects of one method."""

    def responses(models: tuple[type[BaseModel], ...], errors: Mapping[str, str]) -> dict[str, Any]:
        ok = {"description": "OK", "content": {"application/json": {"schema": schema(*models)}}}
        failed = {"application/json": {"schema": schema(Error)}}
        return {"200": ok} | {code: {"description": text, "content": failed} for code, text in errors.items()}

    def get(summary: str, answer: type[BaseModel], parameters: list[dict[str, Any]]) -> dict[str, Any]:
        errors = {"400": "a parameter is wrong"} if parameters else {}
        if any(parameter["name"] == "key" for parameter in parameters):
            errors["404"] = "the key is not in the vocabulary"
        return {"summary": summary, "parameters": parameters, "responses": responses((answer,), errors)}

    def post(summary: str, pair: _Pair, example: Any, *answers: type[BaseModel]) -> dict[str, Any]:
        errors = {"400": "the body is wrong", "413": "the body or the batch is larger than the limit"}
        if "keys" in pair.plurals:
            errors["404"] = "the one `key` is not in the vocabulary"
        content = {"application/json": {"schema": schema(pair.single, pair.batch), "example": example}}
        return {
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": responses(answers, errors),
        }

    return get if method == "get" else post
