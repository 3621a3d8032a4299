"""The map of a catalogue: where each item lies on a plane, and what it is coloured by; one file of an artifact."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cluster.errors import ArtifactError
from cluster.storage import write_atomic
from embedding_service.exact import Float32, Vectors
from embedding_service.keys import Vocabulary
from embedding_service.projection import clusters, neighbour_plane, principal_plane, project

MAX_ROWS = 2**20  # the most frequent items; more points than a browser draws are not worth their bytes
NUM_CLUSTERS = 12
NUM_VALUES = 11  # of an attribute that have a colour; the others share the last one
CLUSTER = "k-means"  # no feature can have this name
MAX_ATTRIBUTES = 31
Layout = Literal["pca", "umap"]
Codes = npt.NDArray[np.uint8]
_MAX_LABEL = 200


@dataclass(frozen=True)
class CatalogueMap:
    """Row i of every array is row i of the catalogue, which may have more rows than the map.

    layouts  name ("pca", "umap") -> float32 [rows, 2]
    colours  name ("k-means", or an attribute) -> uint8 [rows]
    labels   name of an attribute -> what code i stands for
    """

    layouts: Mapping[str, Float32]
    colours: Mapping[str, Codes]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        return len(next(iter(self.layouts.values())))

    def head(self, rows: int) -> CatalogueMap:
        """The first `rows` rows, the most frequent items."""
        layouts = {name: placed[:rows] for name, placed in self.layouts.items()}
        return CatalogueMap(layouts, {name: codes[:rows] for name, codes in self.colours.items()}, self.labels)

    def to_bytes(self, about: Mapping[str, Any]) -> bytes:
        """A safetensors document: tensors `layout.NAME`, `colour.NAME`; metadata `labels` and `about`, as JSON."""
        tensors: dict[str, npt.NDArray[Any]] = {f"layout.{name}": placed for name, placed in self.layouts.items()}
        tensors |= {f"colour.{name}": codes for name, codes in self.colours.items()}
        metadata = {"labels": json.dumps({name: list(labels) for name, labels in self.labels.items()})}
        metadata["about"] = json.dumps(about)
        return save({name: np.ascontiguousarray(array) for name, array in tensors.items()}, metadata)

    def save(self, file: Path) -> None:
        write_atomic(file, self.to_bytes({}))

    @classmethod
    def load(cls, file: Path, *, rows: int, layouts: Sequence[str], colours: Sequence[str]) -> CatalogueMap:
        """Raises ArtifactError if the file does not hold exactly these, with finite places and labels for all codes."""
        try:
            with safe_open(file, framework="numpy") as opened:
                expected = {f"layout.{name}": [rows, 2] for name in layouts} | {f"colour.{n}": [rows] for n in colours}
                found = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
                if found != expected:
                    raise ValueError(f"holds {found}, not {expected}")
                labels = json.loads((opened.metadata() or {}).get("labels", "{}"))
                arrays = {name: opened.get_tensor(name) for name in expected}
        except (OSError, ValueError, SafetensorError) as error:
            raise ArtifactError(f"{file}: is not the map that the manifest tells of ({error})") from None
        loaded = cls(
            {name: arrays[f"layout.{name}"] for name in layouts}, {n: arrays[f"colour.{n}"] for n in colours}, labels
        )
        loaded._check(file)
        return loaded

    def _check(self, file: Path) -> None:
        for name, placed in self.layouts.items():
            if placed.dtype != np.float32 or not np.isfinite(placed).all():
                raise ArtifactError(f"{file}: {name} holds {placed.dtype} that are not all finite float32")
        if not isinstance(self.labels, dict) or set(self.labels) != set(self.colours) - {CLUSTER}:
            raise ArtifactError(f"{file}: its labels are not those of its attributes")
        for name, codes in self.colours.items():
            labels = self.labels.get(name, [""] * NUM_CLUSTERS)
            if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
                raise ArtifactError(f"{file}: the labels of {name} are not a list of strings")
            if codes.dtype != np.uint8 or codes.max(initial=0) >= len(labels):
                raise ArtifactError(f"{file}: {name} holds codes that are not uint8 below {len(labels)}")


def draw_map(
    vectors: Vectors,
    *,
    layout: Layout = "pca",
    attributes: Mapping[str, tuple[Codes, Sequence[str]]] | None = None,
    seed: int = 0,
) -> CatalogueMap:
    """The map of all rows of `vectors` (at most MAX_ROWS): PCA always, UMAP besides where `layout` asks for it.

    Raises SettingError where UMAP is asked for and not installed.
    """
    if vectors.rows > MAX_ROWS:
        raise ValueError(f"{vectors.rows} rows; a map has at most {MAX_ROWS}")
    layouts = {"pca": project(vectors, principal_plane(vectors, seed=seed))}
    if layout == "umap":
        layouts["umap"] = neighbour_plane(vectors, layouts["pca"], seed=seed)
    attributes = attributes or {}
    colours = {CLUSTER: clusters(vectors, NUM_CLUSTERS, seed=seed)}
    colours |= {name: codes for name, (codes, _) in attributes.items()}
    return CatalogueMap(layouts, colours, {name: list(labels) for name, (_, labels) in attributes.items()})


def attribute(values: npt.NDArray[np.int64], keys: Vocabulary) -> tuple[Codes, list[str]]:
    """Codes and labels of an attribute whose value i, int64 [rows], is a row of `keys`, or below 0 where it has none.

    The most frequent values have a code each.
    """
    labels = [str(key)[:_MAX_LABEL] for key in keys.keys[:NUM_VALUES].to_pylist()]
    known = (values >= 0) & (values < len(labels))
    return np.where(known, values, len(labels)).astype(np.uint8), [*labels, "other or none"]
