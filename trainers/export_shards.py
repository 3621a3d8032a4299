"""A checkpoint's vector sets as pieces: ranges of rows, each computed, quantised and kept on its own.

    <work>/<set>-<first row>.npy            codes [n, dim] of the piece, and for int8 ...scale.npy [n]
    <work>/<set>-<first row>.json           {"sha256": {file: ...}}: written last; with it the piece is done

A piece is a function of the checkpoint and the settings, so that it may be made again, by another process, anywhere
that reaches the run's folder. Who makes one holds CHUNK_ROWS rows of it (and of each table of item features their
distinct ones) in memory at a time; tables are mapped from the checkpoint, never loaded.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.lib import format as npy

from cluster.config import config_from_dict
from cluster.storage import checksum, write_json
from embedding_service.exact import Float32
from embedding_service.quantize import DTYPES, Precision
from embedding_service.vectors import SCALE_DTYPE, VectorSink, encoded_rows
from trainers.checkpoint_tensors import load_dense
from trainers.models import Model, build_model
from trainers.prepare import load_prepared
from trainers.stored_tables import StoredTables

PIECE_ROWS = 1_048_576  # what is lost by a kill, at most, for each thread
CHUNK_ROWS = 65_536
_LOADING = threading.Lock()


@dataclass(frozen=True)
class Piece:
    """Rows start..stop - 1 of a vector set, as float [stop - start, dim] of its precision.

    table: the table of which these are the rows as they lie, shared by ids; empty: the model's vectors of ids.
    """

    vectors: str
    start: int
    stop: int
    dim: int
    precision: Precision
    normalized: bool = False
    table: str = ""

    def files(self, work: Path) -> list[Path]:
        stem = f"{self.vectors}-{self.start:012d}"
        return [work / f"{stem}.npy"] + [work / f"{stem}.scale.npy"] * (self.precision == "int8")

    def mark(self, work: Path) -> Path:
        return work / f"{self.vectors}-{self.start:012d}.json"


def stored_model(settings: dict[str, Any]) -> Model:
    """The model of a checkpoint over its mapped tables: it encodes, and cannot train.

    settings: {"config", "checkpoint": its folder}. Raises CheckpointError.
    """
    config = config_from_dict(settings["config"])
    folder = Path(settings["checkpoint"])

    def stored(specs: Any, **options: Any) -> Any:
        return StoredTables(folder, specs)

    model = build_model(
        config,
        load_prepared(config.run),
        device=torch.device("cpu"),
        threads=torch.get_num_threads(),
        make_tables=stored,
    )
    load_dense(model, folder)
    model.dense.eval()
    return model


@functools.lru_cache(maxsize=1)
def _model(settings: str) -> Model:
    """One for all threads of a process."""
    return stored_model(json.loads(settings))


def cut(whole: Piece, piece_rows: int) -> list[Piece]:
    """The pieces of a whole vector set."""
    return [
        replace(whole, start=start, stop=min(whole.stop, start + piece_rows))
        for start in range(0, whole.stop, piece_rows)
    ]


def is_done(piece: Piece, work: Path) -> bool:
    """Whether the piece was made, and its files are still what was written."""
    try:
        sums = json.loads(piece.mark(work).read_text())["sha256"]
        return all(checksum(file) == sums[file.name] for file in piece.files(work))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def make_piece(settings: dict[str, Any], task: dict[str, Any]) -> None:
    """Make the piece `task` (a Piece's fields) in the folder settings["work"]; see `stored_model` for the others.

    Raises ArtifactError for vectors that cannot be stored.
    """
    piece, work = Piece(**task), Path(settings["work"])
    with _LOADING:
        model = _model(json.dumps({"config": settings["config"], "checkpoint": settings["checkpoint"]}, sort_keys=True))
    files = piece.files(work)
    num = piece.stop - piece.start
    codes = npy.open_memmap(files[0], mode="w+", dtype=DTYPES[piece.precision], shape=(num, piece.dim))
    scales = npy.open_memmap(files[1], mode="w+", dtype=SCALE_DTYPE, shape=(num,)) if len(files) > 1 else None
    for at in _chunks(num):
        start = piece.start + at.start
        rows = _rows(model, piece, start, piece.start + at.stop)
        encoded, scale = encoded_rows(piece.vectors, start, rows, piece.precision, normalized=piece.normalized)
        codes[at] = encoded
        if scales is not None:
            scales[at] = scale
    codes.flush()
    if scales is not None:
        scales.flush()
    write_json(piece.mark(work), {"sha256": {file.name: checksum(file) for file in files}})


def _rows(model: Model, piece: Piece, start: int, stop: int) -> Float32:
    """What is stored in rows start..stop - 1: float32 [stop - start, dim]."""
    if piece.table:
        found: Float32 = model.tables.physical.lookup({piece.table: torch.arange(start, stop)})[piece.table].numpy()
        return found
    encoded: Float32 = model.vectors(piece.vectors, start, stop).numpy()
    return encoded


def copy_piece(piece: Piece, work: Path, sink: VectorSink) -> None:
    """Into the artifact, a chunk at a time."""
    arrays = [cast(np.ndarray, np.load(file, mmap_mode="r")) for file in piece.files(work)]
    for at in _chunks(piece.stop - piece.start):
        sink.write_codes(piece.start + at.start, arrays[0][at], arrays[1][at] if len(arrays) > 1 else None)


def _chunks(num: int) -> Iterator[slice]:
    for start in range(0, num, CHUNK_ROWS):
        yield slice(start, min(num, start + CHUNK_ROWS))
