"""The page for people who look at a version, and the data that only it asks for.

    GET  /page, /page/*                    the page itself: files of the package, built from `page/src` by `make page`
    GET  /v1/figures                       what the manifest says of the version: indexes, recall, bytes, validation
    GET  /v1/map?points=                   the map of the most frequent items, a safetensors document
    GET  /v1/keys?prefix= | row= | key=    keys that begin so, keys of rows, rows of keys

The page asks nobody else: its Content-Security-Policy allows this service alone, and no code or style that is written
into the page. It can be had without a token, as there is nothing in it; it asks for the token that data needs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import orjson

from embedding_service.artifact import Artifact
from embedding_service.catalogue_map import CatalogueMap
from embedding_service.completion import Completion
from embedding_service.http_messages import Response
from embedding_service.http_schema import Key, Problem
from embedding_service.keys import Vocabulary

Parameters = Sequence[tuple[str, str]]

MAX_KEYS = 100  # completions, or rows, or keys, in one answer
MAX_TYPED = 200
DEFAULT_POINTS = 250_000
_BUILT = Path(__file__).with_name("page") / "built"
_TYPES = {
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".txt": b"text/plain; charset=utf-8",
}
_POLICY = (
    b"default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    b"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_PAGE_HEADERS = (
    (b"content-security-policy", _POLICY),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-cache"),
)


class Page:
    """The page's files, `files`, and the data of one version, `routes`: path -> what answers the parameters of a GET.

    Routes may take a tenth of a second, and the first completion a second for a million keys: they belong in a thread,
    and any number of threads may ask. They raise Problem.
    """

    def __init__(self, artifact: Artifact, keys: Vocabulary, drawn: CatalogueMap | None) -> None:
        """`keys`: the key map of the items; `drawn`: the artifact's map, if it has one."""
        self._version, self._keys, self._map = artifact.version, keys, drawn
        self._figures = _figures(artifact)
        self._completion: Completion | None = None
        self._completing = threading.Lock()
        self._packed: tuple[int, bytes] = (0, b"")
        self.files = page_files()
        self.routes: Mapping[str, Callable[[Parameters], Response]] = {
            "/v1/figures": self._get_figures,
            "/v1/map": self._get_map,
            "/v1/keys": self._get_keys,
        }

    def _get_figures(self, parameters: Parameters) -> Response:
        _only(parameters, ())
        return Response(200, self._figures)

    def _get_map(self, parameters: Parameters) -> Response:
        points = DEFAULT_POINTS
        for _, value in _only(parameters, ("points",)):
            points = _whole_number("points", value)
            if points < 1:
                raise Problem(400, "invalid_request", "`points` must be at least 1")
        if self._map is None:
            raise Problem(404, "no_map", f"version {self._version} was exported without a map: export the run again")
        points = min(points, self._map.rows)
        size, packed = self._packed
        if size != points:
            about = {"version": self._version, "num_items": len(self._keys.keys)}
            packed = self._map.head(points).to_bytes(about)
            self._packed = points, packed
        return Response(200, packed, b"application/octet-stream")

    def _get_keys(self, parameters: Parameters) -> Response:
        asked = _only(parameters, ("prefix", "row", "key", "limit"))
        kinds = {name for name, _ in asked} - {"limit"}
        if len(kinds) != 1:
            raise Problem(400, "invalid_request", "give one of `prefix`, `row` and `key`")
        if len(asked) > MAX_KEYS + 1:
            raise Problem(400, "invalid_request", f"more than {MAX_KEYS} at a time")
        limit = 10
        for name, value in asked:
            if name == "limit":
                limit = _whole_number("limit", value)
                if not 1 <= limit <= MAX_KEYS:
                    raise Problem(400, "invalid_request", f"`limit` must be in 1..{MAX_KEYS}")
        kind = kinds.pop()
        values = [value for name, value in asked if name == kind]
        if kind == "prefix":
            return self._found(self._completions(values[-1], limit))
        if kind == "row":
            rows = [_whole_number("row", value) for value in values]
            return self._found([row for row in rows if row < len(self._keys.keys)])
        rows = [self._keys.row(self._typed(value)) for value in values]
        return self._found([row for row in dict.fromkeys(rows) if 0 <= row < len(self._keys.keys)])

    def _completions(self, typed: str, limit: int) -> Sequence[int]:
        if len(typed) > MAX_TYPED:
            raise Problem(400, "invalid_request", f"`prefix` is longer than {MAX_TYPED} characters")
        with self._completing:
            if self._completion is None:
                self._completion = Completion(self._keys.keys)
        return self._completion.rows(typed, limit)

    def _found(self, rows: Sequence[int]) -> Response:
        keys = self._keys.keys_of(rows).to_pylist()
        items = [
            {"key": key, "row": row, "count": int(self._keys.counts[row])} for key, row in zip(keys, rows, strict=True)
        ]
        return Response(200, orjson.dumps({"version": self._version, "items": items}))

    def _typed(self, text: str) -> Key:
        if self._keys.key_type == "string":
            return text
        try:
            return int(text[:20])
        except ValueError:
            raise Problem(400, "invalid_request", f"`key`: {text[:100]!r} is not an integer") from None


def page_files() -> dict[str, Response]:
    """Path -> answer of the files of the page, which are the same for every version."""
    files = {
        f"/page/{file.name}": Response(200, file.read_bytes(), _TYPES[file.suffix], _PAGE_HEADERS)
        for file in sorted(_BUILT.iterdir())
    }
    return {"/page": files.pop("/page/index.html"), **files}


def _figures(artifact: Artifact) -> bytes:
    """Nothing of the lineage but the model's kind: its config names the paths of the data."""
    manifest = artifact.manifest
    shown = ("factory", "metric", "parameters", "recall", "rows", "dim", "bytes", "build_seconds", "curve")
    indexes = {
        name: {field: index[field] for field in shown if field in index} for name, index in manifest["indexes"].items()
    }
    vectors = {name: {f: entry[f] for f in ("rows", "dim", "precision")} for name, entry in manifest["vectors"].items()}
    drawn = manifest["map"]
    return orjson.dumps(
        {
            "version": artifact.version,
            "name": manifest["name"],
            "created": manifest["created"],
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
            "indexes": indexes,
            "vectors": vectors,
            "map": None if drawn is None else {field: drawn[field] for field in ("rows", "layouts", "colours")},
            "figures": manifest["figures"],
        }
    )


def _only(parameters: Parameters, known: Sequence[str]) -> Parameters:
    for name, _ in parameters:
        if name not in known:
            told = f"known here: {', '.join(known)}" if known else "there is none here"
            raise Problem(400, "unknown_parameter", f"there is no parameter `{name[:100]}`; {told}")
    return parameters


def _whole_number(name: str, text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise Problem(400, "invalid_request", f"`{name}` must be a whole number, not {text[:100]!r}")
    return int(text)
