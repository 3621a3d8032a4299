"""Checkpoints: torch's distributed checkpoint for tensors, JSON for the rest, and a pointer that flips last.

    <run>/checkpoints/
        pointer.json                    {"last": name, "best": name or null}: written new, renamed into place
        step-000000001200-epoch-0003/   complete from the moment it has this name; a killed writer leaves none
            checkpoint.json             position, progress, config, and every file's size and sha256
            tensors.json                torch's checkpoint metadata: which rows of which tensor lie where
            __<rank>_<n>.distcp         tables, optimiser state and towers, as every rank wrote them
            prepared/                   the key maps, item features and validation cases

Everything random follows from (seed, position), so the position is also the state of all random numbers.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import warnings
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
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

from cluster.config import Config, TableSettings, config_from_dict, config_to_dict
from cluster.errors import CheckpointError, SettingError
from cluster.storage import checksum, publish_folder, remove_folder, write_json
from trainers.models import Model

FORMAT = 1

_PIECE_BYTES = 64 * 2**20  # of a tensor that are written, and read, at a time

# Settings that may change between a run's sessions: the rest would make it another run. Training data may move: they
# are known by their fingerprint.
_FREE = (
    "run", "cluster.", "serve.", "export.", "data.train", "data.test", "data.mask_seen", "train.epochs",
    "train.threads", "train.validate_every", "train.patience", "train.metric", "train.checkpoint_seconds",
    "train.report_seconds", "train.keep_checkpoints",
)  # fmt: skip


@dataclass(frozen=True)
class Position:
    """Where in the data training stands: everything before `offset` of `window` of `epoch` has been trained on."""

    epoch: int = 0
    window: int = 0
    offset: int = 0


@dataclass
class Progress:
    """What a run knows besides its tensors."""

    position: Position = Position()
    step: int = 0
    best_value: float | None = None
    best_epoch: int = -1
    bad_validations: int = 0
    validations: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0
    metric: str = ""  # that chose the best
    bad_rows: int = 0

    @property
    def name(self) -> str:
        """The name of a checkpoint of this moment; sorts by time."""
        return f"step-{self.step:012d}-epoch-{self.position.epoch:04d}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Progress:
        return cls(**{**value, "position": Position(**value["position"])})


def step_of(name: str) -> int:
    """The step of the checkpoint `name`."""
    return int(name.split("-")[1])


class CheckpointStore:
    """The checkpoints of one run. `save` and `resume` are collective calls."""

    def __init__(self, run: str | Path, *, keep: int = 2) -> None:
        self.run = Path(run)
        self.folder = self.run / "checkpoints"
        self.keep = keep

    def save(self, model: Model, progress: Progress, config: Config, *, best: bool = False) -> None:
        """Write a checkpoint beside the others, flip the pointer to it, then remove those no longer kept."""
        name = progress.name
        temporary = self.folder / f".{name}.tmp"
        first = dist.get_rank() == 0
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        dist.barrier()
        writer = _JsonWriter(temporary)
        save(_tensors(model), storage_writer=writer, planner=_PieceSavePlanner())
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, writer.files)
        if first:
            files = {path: entry for part in gathered for path, entry in part.items()}
            self._finish(temporary, name, files, progress, config, best)
        dist.barrier()

    def _finish(
        self, temporary: Path, name: str, files: dict[str, Any], progress: Progress, config: Config, best: bool
    ) -> None:
        shutil.copytree(self.run / "prepared", temporary / "prepared")
        for part in sorted((temporary / "prepared").iterdir()):
            files[f"prepared/{part.name}"] = _describe(part)
        files["tensors.json"] = _describe(temporary / "tensors.json")
        write_json(
            temporary / "checkpoint.json",
            {"format": FORMAT, "progress": progress.to_dict(), "config": config_to_dict(config), "files": files},
        )
        remove_folder(self.folder / name)  # one of the same name was damaged, and passed over when this run resumed
        publish_folder(temporary, self.folder / name)
        pointer = self.pointer()
        pointer["last"] = name
        if best:
            pointer["best"] = name
        write_json(self.folder / "pointer.json", pointer)
        for old in [other for other in self.names() if other != pointer["best"]][: -self.keep]:
            remove_folder(self.folder / old)
        for leftover in self.folder.glob(".*"):  # of writers that were killed
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()

    def pointer(self) -> dict[str, str | None]:
        """{"last": name, "best": name}, None where there is none (or the pointer was lost). `last` is for people."""
        try:
            pointer = json.loads((self.folder / "pointer.json").read_text())
            return {"last": pointer["last"], "best": pointer["best"]}
        except (OSError, ValueError, KeyError, TypeError):
            return {"last": None, "best": None}

    def names(self) -> list[str]:
        """Complete checkpoints, oldest first."""
        return sorted(path.parent.name for path in self.folder.glob("step-*/checkpoint.json"))

    def choose(self, which: str = "last") -> tuple[str, dict[str, Any], list[str]] | None:
        """(name, description, why newer ones were passed over) of the newest sound checkpoint; None if there are none.

        which: `last`, or `best` (the last where no validation has chosen one). Raises CheckpointError if there are
        checkpoints and all are damaged.
        """
        names = self.names()[::-1]
        best = self.pointer()["best"]
        if which == "best" and best in names:
            names.sort(key=lambda name: name != best)
        refused: list[str] = []
        for name in names:
            try:
                return name, verify(self.folder / name), refused
            except CheckpointError as error:
                refused.append(str(error))
        if refused:
            raise CheckpointError(f"no checkpoint of {self.run} can be used: {'; '.join(refused)}")
        return None

    def newest_config(self) -> Mapping[str, Any] | None:
        """The config of the newest checkpoint that has a readable description, sound or not; None if there is none."""
        for name in self.names()[::-1]:
            try:
                config: Mapping[str, Any] = json.loads((self.folder / name / "checkpoint.json").read_text())["config"]
                return config
            except (OSError, ValueError, KeyError, TypeError):
                continue
        return None

    def restore_prepared(self) -> bool:
        """Bring `<run>/prepared` back from the newest sound checkpoint; whether there was one."""
        chosen = self.choose()
        if chosen is None:
            return False
        temporary = self.run / ".prepared.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.folder / chosen[0] / "prepared", temporary)
        remove_folder(self.run / "prepared")
        publish_folder(temporary, self.run / "prepared")
        return True

    def resume(self, model: Model, config: Config, *, which: str = "last") -> tuple[Progress, list[str]]:
        """Load the newest sound checkpoint into `model`; (its progress, warnings). New Progress if there is none.

        which: see `choose`. Raises CheckpointError if the checkpoint is of a run with other settings.
        """
        chosen: list[Any] = [None]
        if dist.get_rank() == 0:
            try:
                chosen = [self.choose(which)]
            except CheckpointError as error:
                chosen = [str(error)]
        dist.broadcast_object_list(chosen)
        if isinstance(chosen[0], str):
            raise CheckpointError(chosen[0])
        if chosen[0] is None:
            return Progress(), []
        name, description, refused = chosen[0]
        check_same_run(description["config"], config, self.folder / name)
        _load(model, self.folder / name)
        return Progress.from_dict(description["progress"]), [f"{reason}; using {name} instead" for reason in refused]


def verify(folder: Path) -> dict[str, Any]:
    """The description of the checkpoint in `folder`, all of whose files are as they were written.

    Raises CheckpointError that names the file and what is wrong with it.
    """
    try:
        description: dict[str, Any] = json.loads((folder / "checkpoint.json").read_text())
        version, files = description["format"], description["files"]
        Progress.from_dict(description["progress"])
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder}: checkpoint.json is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {folder}: checkpoint.json is damaged ({error})") from None
    if version != FORMAT:
        raise CheckpointError(f"checkpoint {folder}: has format {version}; this version reads format {FORMAT}")
    for path, expected in files.items():
        file = folder / path
        if not file.is_file():
            raise CheckpointError(f"checkpoint {folder}: file {path} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {folder}: file {path} has {file.stat().st_size} bytes instead of {expected['bytes']}"
            )
        if checksum(file) != expected["checksum"]:
            raise CheckpointError(f"checkpoint {folder}: file {path} is damaged (its checksum differs)")
    return description


def check_same_run(before: Mapping[str, Any], config: Config, where: Path) -> None:
    """Raises CheckpointError naming the settings in which a checkpoint's config differs from the run's."""
    try:
        # a setting that is younger than the checkpoint has its default
        known = config_to_dict(config_from_dict(before))
    except SettingError as error:
        raise CheckpointError(f"checkpoint {where} has a config that this version cannot read: {error}") from None
    old, new = dict(_leaves(known, "")), dict(_leaves(config_to_dict(config), ""))
    before_after = {path: (old.get(path, _default(path)), new.get(path, _default(path))) for path in {*old, *new}}
    changed = [
        f"{path} was {was!r} and is now {now!r}"
        for path, (was, now) in sorted(before_after.items())
        if was != now and not _is_free(path) and not _is_moved(path, was, now, config)
    ]
    if changed:
        raise CheckpointError(
            f"checkpoint {where} belongs to a run with other settings: {'; '.join(changed)}. Name another folder with "
            "`--set run=...`, put the settings back, or start over with `--fresh`"
        )


def _is_free(path: str) -> bool:
    return path.startswith(_FREE)


def _is_moved(path: str, was: Any, now: Any, config: Config) -> bool:
    """Whether only a table's place changes: with `keys.budget`, which counts memory, a move to or from disk changes
    what the other tables share.
    """
    is_place = path.startswith("tables.") and path.endswith(".disk")
    return is_place and (not config.keys.budget or bool(was) == bool(now))


def _default(path: str) -> Any:
    """What a setting of a table is where the config has no section for the table."""
    return getattr(TableSettings(), path.rpartition(".")[2]) if path.startswith("tables.") else None


def _leaves(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


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


def _load(model: Model, folder: Path) -> None:
    """Read the tensors in place. Raises CheckpointError if they do not fit the model."""
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


def _reason(error: BaseException) -> str:
    """What went wrong in a line, without torch's tracebacks: of the first rank that failed."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (error, _) = min(error.failures.items(), key=lambda failure: failure[0])
        return f"rank {rank}: {_first_line(error)}"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "checksum": checksum(file)}


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
