"""The OpenAPI 3.1 document of a service, made of the models that check its requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from embedding_service.http_schema import (
    ARROW_TYPE,
    Answer,
    Catalogue,
    Error,
    Health,
    Key,
    KeyType,
    Limits,
    Pair,
    Recommendation,
    RecommendationBatch,
    RequestModels,
    SearchBatch,
    SimilarBatch,
    Vectors,
    Version,
)


@dataclass(frozen=True)
class Operation:
    """An endpoint of the service that does not depend on the version: its body's model, and what it answers."""

    method: str
    path: str
    summary: str
    body: type[BaseModel] | None = None
    token: bool = False
    status: int = 200
    answer: str = "OK"
    later: bool = False  # it may be answered with 202 before it is done
    errors: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)  # of parts of the path, and the patterns they match


def openapi(catalogue: Catalogue, models: RequestModels, limits: Limits, *, has_page: bool = False) -> dict[str, Any]:
    """The OpenAPI 3.1 document of a service over `catalogue`, and of what its page is drawn from."""
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
    wished: list[dict[str, Any]] = []
    if models.wished is not None:
        schema(models.wished)
        wished = _wished(schemas.pop("Wished")["properties"])
    recommend = [
        _parameter("items", {"type": "array", "items": key}, "session items, oldest first: items=a&items=b"),
        k,
        _parameter("exclude_seen", {"type": "boolean", "default": True}, "leave out the items of the session"),
        *wished,
    ]
    if catalogue.user_type is not None:
        recommend.insert(1, _parameter("user", _json_key(catalogue.user_type), "the user of the session"))
    one_item: Key = 1 if catalogue.key_type == "int64" else "a"
    get, post = _operation(schema, "get"), _operation(schema, "post")
    paths = {
        "/v1/similar": {
            "get": get(
                "items similar to one item", Answer, [_parameter("key", key, "the item", required=True), k, *wished]
            ),
            "post": post("the same, one or many", models.similar, {"keys": [one_item]}, Answer, SimilarBatch),
        },
        "/v1/search": {
            "post": _with_arrow(
                post("items nearest to vectors", models.search, {"vector": [0.0] * catalogue.dim}, Answer, SearchBatch),
                catalogue,
                [k, *wished],
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
    if models.embed is not None:
        paths["/v1/embed"] = {"post": post("vectors of items or sessions", models.embed, {"keys": [one_item]}, Vectors)}
    if has_page:
        paths |= _page_paths(key, schema(Error))
    info = {
        "title": "lexshard",
        "version": catalogue.version,
        "description": f"Similar items and recommendations over {catalogue.num_items} items. Errors are JSON: "
        '{"error": {"code", "message"}}.',
    }
    servers = [{"url": "."}]
    return {"openapi": "3.1.0", "info": info, "servers": servers, "paths": paths, "components": {"schemas": schemas}}


def _page_paths(key: dict[str, Any], error: dict[str, Any]) -> dict[str, Any]:
    """The data of the page, see `http_page`."""
    row: dict[str, Any] = {"type": "integer", "minimum": 0, "maximum": 10**18 - 1}
    several = "; one of `prefix`, `row` and `key` is asked for"
    asked = [
        _parameter("prefix", {"type": "string", "maxLength": 200}, f"keys that begin so, frequent ones first{several}"),
        _parameter("row", {"type": "array", "items": row, "maxItems": 100}, f"keys of these rows{several}"),
        _parameter("key", {"type": "array", "items": key, "maxItems": 100}, f"rows of these keys{several}"),
        _parameter("limit", {"type": "integer", "minimum": 1, "maximum": 100, "default": 10}, "how many, of `prefix`"),
    ]
    points = _parameter("points", {**row, "minimum": 1}, "of the most frequent items")

    def described(
        summary: str, parameters: list[dict[str, Any]], kind: str, shape: dict[str, Any], **errors: str
    ) -> dict[str, Any]:
        failed = {"application/json": {"schema": error}}
        wrong = {code[1:]: {"description": text, "content": failed} for code, text in errors.items()}
        responses = {"200": {"description": "OK", "content": {kind: {"schema": shape}}}, **wrong}
        return {"get": {"summary": summary, "parameters": parameters, "responses": responses}}

    json, bytes_, bad = "application/json", {"type": "string", "format": "binary"}, "a parameter is wrong"
    return {
        "/v1/figures": described("what the manifest says of the version", [], json, {"type": "object"}),
        "/v1/map": described(
            "the map of the catalogue, safetensors", [points], "application/octet-stream", bytes_, _400=bad,
            _404="the version has no map",
        ),
        "/v1/keys": described("keys and their rows", asked, json, {"type": "object"}, _400=bad),
    }  # fmt: skip


def _wished(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The parameters `filter` and `diversity` of what has no JSON body."""
    filter_ = _parameter("filter", {}, f"{fields['filter']['description']}: the JSON object of a body's `filter`")
    del filter_["schema"]
    filter_["content"] = {"application/json": {"schema": {"$ref": "#/components/schemas/Filter"}}}
    number = {name: fields["diversity"][name] for name in ("type", "minimum", "maximum", "default")}
    return [filter_, _parameter("diversity", number, fields["diversity"]["description"])]


def _with_arrow(operation: dict[str, Any], catalogue: Catalogue, parameters: list[dict[str, Any]]) -> dict[str, Any]:
    """The operation on JSON, and on Arrow streams as well."""
    key = "int64" if catalogue.key_type == "int64" else "string"
    asked = f"an uncompressed stream with one column `vector`, fixed_size_list<float32>[{catalogue.dim}]: many queries"
    answered = f"a row per query: `keys` list<{key}>, `scores` list<float32>; the schema's metadata has `version`"
    answered += ", and `partial`, JSON, where parts of the index did not answer"
    for content, text in (
        (operation["requestBody"]["content"], asked),
        (operation["responses"]["200"]["content"], answered),
    ):
        content[ARROW_TYPE] = {"schema": {"type": "string", "format": "binary", "description": text}}
    about = "In bulk, Arrow IPC streams spare the time that JSON takes; a stream is answered with a stream."
    only = [
        {**one, "description": f"of an Arrow stream, JSON has it in the body: {one['description']}"}
        for one in parameters
    ]
    return {**operation, "description": about, "parameters": only}


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

    def post(summary: str, pair: Pair, example: Any, *answers: type[BaseModel]) -> dict[str, Any]:
        errors = {
            "400": "the body is wrong",
            "408": "the body did not come in time",
            "413": "the body or the batch is larger than the limit",
        }
        if "keys" in pair.plurals and "key" in pair.single.model_fields:
            errors["404"] = "the one `key` is not in the vocabulary"
        content = {"application/json": {"schema": schema(pair.single, pair.batch), "example": example}}
        return {
            "summary": summary,
            "requestBody": {"required": True, "content": content},
            "responses": responses(answers, errors),
        }

    return get if method == "get" else post


def with_management(document: Mapping[str, Any], operations: Sequence[Operation]) -> dict[str, Any]:
    """The document of one version's API with the endpoints of the service around it."""
    components = dict(document["components"]["schemas"])
    paths = dict(document["paths"])
    for one in operations:
        answered = {"application/json": {"schema": {"type": "object"}}}
        responses: dict[str, Any] = {str(one.status): {"description": one.answer, "content": answered}}
        if one.later:
            responses["202"] = responses["200"]
        failed = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}
        responses |= {code: {"description": text, "content": failed} for code, text in one.errors.items()}
        described: dict[str, Any] = {"summary": one.summary, "responses": responses}
        if one.names:
            described["parameters"] = [
                {"name": name, "in": "path", "required": True, "schema": {"type": "string", "pattern": f"^{pattern}$"}}
                for name, pattern in one.names.items()
            ]
        if one.body is not None:
            whole = one.body.model_json_schema(ref_template="#/components/schemas/{model}")
            components.update(whole.pop("$defs", {}))
            components[one.body.__name__] = whole
            content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{one.body.__name__}"}}}
            described["requestBody"] = {"required": True, "content": content}
        if one.token:
            described["security"] = [{"token": []}]
        paths[one.path] = {**paths.get(one.path, {}), one.method.lower(): described}
    security = {"token": {"type": "http", "scheme": "bearer"}}
    return {**document, "paths": paths, "components": {"schemas": components, "securitySchemes": security}}
