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

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cluster.config import Config, TableSettings, config_from_dict, config_to_dict
from cluster.errors import CheckpointError, SettingError
from cluster.storage import checksum, publish_folder, remove_folder, write_json
from trainers.checkpoint_tensors import load_tensors, save_tensors
from trainers.models import Model

FORMAT = 1

# Settings that may change between a run's sessions: the rest would make it another run. Training data may move: they
# are known by their fingerprint.
_FREE = (
    "run", "cluster.", "serve.", "export.", "data.train", "data.test", "data.mask_seen", "train.epochs",
    "train.threads", "train.matmul", "train.validate_every", "train.patience", "train.metric",
    "train.checkpoint_seconds", "train.report_seconds", "train.keep_checkpoints",
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
        written = save_tensors(model, temporary)
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, written)
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
        load_tensors(model, self.folder / name)
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


def _describe(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "checksum": checksum(file)}
