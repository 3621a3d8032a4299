"""A checkpoint's tensors in files: torch's distributed checkpoint, its metadata as JSON, every file with a checksum."""

from __future__ import annotations

import hashlib
import io
import json
import os
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from cluster.errors import CheckpointError
from cluster.storage import write_json
from trainers.models import Model

_PIECE_BYTES = 64 * 2**20  # of a tensor that are written, and read, at a time


def save_tensors(model: Model, folder: Path) -> dict[str, dict[str, Any]]:
    """Write the tensors, and with rank 0 what lies where: a collective call.

    Returns the name of every file that this rank has written -> its bytes and checksum.
    """
    writer = _JsonWriter(folder)
    save(_tensors(model), storage_writer=writer, planner=_PieceSavePlanner())
    return writer.files


def load_tensors(model: Model, folder: Path) -> None:
    """Read the tensors in place: a collective call. Raises CheckpointError if they do not fit the model."""
    try:
        load(
            _tensors(model),
            storage_reader=_JsonReader(folder),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        )
    except (CheckpointException, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit the model: {_reason(error)}") from None


def load_dense(model: Model, folder: Path) -> None:
    """Read what the checkpoint in `folder` has besides tables: the towers' weights, and which ids have rows of dynamic
    tables. No process group is needed.

    Raises CheckpointError if they do not fit the model.
    """
    weights = {f"dense.{name}": value for name, value in model.dense.state_dict().items()}
    weights |= {f"tables.{name}": value for name, value in model.tables.slots().items()}
    try:
        if weights:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is asked for
                load(weights, storage_reader=_JsonReader(folder), no_dist=True)
    except (CheckpointException, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint {folder} does not fit the model: {_reason(error)}") from None


def _tensors(model: Model) -> dict[str, Any]:
    """Every tensor of the training state by a flat name: sharded tables, towers, Adam's moments."""
    state = {f"tables.{name}": value for name, value in model.tables.state_dict().items()}
    for name, value in model.dense.state_dict().items():
        state[f"dense.{name}"] = value
    optimizer = model.dense_optimizer
    if optimizer is not None:
        for i, weight in enumerate(model.dense.parameters()):
            slots = optimizer.state[weight]
            for slot, like in (("exp_avg", weight), ("exp_avg_sq", weight), ("step", torch.zeros(()))):
                if slot not in slots:
                    slots[slot] = torch.zeros_like(like.detach())
                state[f"adam.{i}.{slot}"] = slots[slot]
    return state


def _reason(error: BaseException) -> str:
    """What went wrong in a line, without torch's tracebacks: of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class _PieceSavePlanner(DefaultSavePlanner):
    """torch's planner, with every tensor cut into pieces of whole rows, which are written, and read, one at a time.

    torch copies what it writes, and reads what was written together as a whole: without pieces a shard would need its
    own size once more.
    """

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: dict[MetadataIndex, torch.Tensor] = {}

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        self.plan = replace(plan, items=[piece for item in plan.items for piece in self._cut(item)])
        return self.plan

    def _cut(self, item: WriteItem) -> Iterator[WriteItem]:
        tensor, data = super().lookup_object(item.index), item.tensor_data
        assert data is not None
        step = max(1, _PIECE_BYTES * len(tensor) // max(1, tensor.nbytes)) if tensor.dim() else 1
        if not tensor.dim() or len(tensor) <= step:
            yield item
            return
        first, *others = data.chunk.offsets
        for start in range(0, len(tensor), step):
            part = tensor[start : start + step]
            chunk = ChunkStorageMetadata(torch.Size([first + start, *others]), part.size())
            index = MetadataIndex(item.index.fqn, chunk.offsets)
            self._pieces[index] = part
            yield replace(item, index=index, type=WriteItemType.SHARD, tensor_data=replace(data, chunk=chunk))

    def lookup_object(self, index: MetadataIndex) -> Any:
        piece = self._pieces.get(index)
        return super().lookup_object(index) if piece is None else piece


class _JsonWriter(FileSystemWriter):
    """torch's file writer, with the metadata as JSON: the original pickles them, and a pickle can run code.

    files: name -> bytes and checksum of every file that this rank has written.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.fs = _HashingFiles()
        self.files: dict[str, dict[str, Any]] = self.fs.files

    def finish(self, metadata: Metadata, results: list[list[Any]]) -> None:
        storage = {result.index: result.storage_data for part in results for result in part}
        write_json(Path(self.path) / "tensors.json", _metadata_to_json(metadata, storage))


class _HashingFiles(FileSystem):
    """Files whose checksums are taken while they are written: a checkpoint may be larger than what stays cached."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[Any, None, None]:
        assert mode == "wb"
        with open(path, mode) as file:
            stream = _HashingStream(file)
            yield stream
        self.files[Path(path).name] = {"bytes": stream.num_bytes, "checksum": f"sha256:{stream.digest.hexdigest()}"}


class _HashingStream(io.RawIOBase):
    """Passes bytes on to `file` and hashes them."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.num_bytes = 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        self.num_bytes += (size := memoryview(data).nbytes)
        self._file.write(data)
        return size

    def tell(self) -> int:
        return self.num_bytes

    def fileno(self) -> int:
        return self._file.fileno()

    def flush(self) -> None:
        if not self._file.closed:
            self._file.flush()


class _JsonReader(FileSystemReader):
    """The reader for `_JsonWriter`; tensors are read by torch.load(weights_only=True)."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        path = Path(self.path) / "tensors.json"
        try:
            return _metadata_from_json(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged ({error})") from None


def _metadata_to_json(metadata: Metadata, storage: Mapping[MetadataIndex, _StorageInfo]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for name, tensor in metadata.state_dict_metadata.items():
        assert isinstance(tensor, TensorStorageMetadata), f"{name} is not a tensor"
        tensors[name] = {
            "dtype": str(tensor.properties.dtype).removeprefix("torch."),
            "size": list(tensor.size),
            "chunks": [[list(chunk.offsets), list(chunk.sizes)] for chunk in tensor.chunks],
        }
    places = [
        {
            "tensor": index.fqn,
            "chunk_offset": None if index.offset is None else list(index.offset),
            "chunk": index.index,
            "file": info.relative_path,
            "offset": info.offset,
            "length": info.length,
        }
        for index, info in storage.items()
    ]
    return {"tensors": tensors, "places": places}


def _metadata_from_json(value: Mapping[str, Any]) -> Metadata:
    tensors = {
        name: TensorStorageMetadata(
            properties=TensorProperties(dtype=_dtype(entry["dtype"])),
            size=torch.Size(entry["size"]),
            chunks=[
                ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
                for offsets, sizes in entry["chunks"]
            ],
        )
        for name, entry in value["tensors"].items()
    }
    places = {}
    for entry in value["places"]:
        offset = None if entry["chunk_offset"] is None else torch.Size(entry["chunk_offset"])
        file = entry["file"]
        if Path(file).name != file:
            raise ValueError(f"{file!r} is not a file of the checkpoint")
        index = MetadataIndex(entry["tensor"], offset, entry["chunk"])
        places[index] = _StorageInfo(file, entry["offset"], entry["length"])
    return Metadata(state_dict_metadata=dict(tensors), planner_data=None, storage_data=places)


def _dtype(name: str) -> torch.dtype:
    kind = getattr(torch, name)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"{name!r} is not a dtype")
    return kind
