"""`args` of a Serve config file: the settings of the service, checked, and the version that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cluster.errors import SettingError
from embedding_service.artifact import MANIFEST, Artifact
from embedding_service.gates import Gates
from embedding_service.haproxy_refusals import MAX_ONGOING
from embedding_service.http_access import CHANGE_VARIABLE, Access, find_access
from embedding_service.http_artifact import check_servable
from embedding_service.http_schema import Limits
from embedding_service.index_plan import MAX_SHARDS
from embedding_service.index_shards import shards_of
from embedding_service.service_logs import LogFormat, LogLevel
from embedding_service.versions import VersionStore


class _Args(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class GateArgs(_Args):
    """`embedding_service.gates.Gates`, whose defaults these are."""

    min_ann_recall: float = Field(default=Gates.min_ann_recall, ge=0.0, le=1.0)
    min_recall_ratio: float = Field(default=Gates.min_recall_ratio, ge=0.0)
    min_coverage: float = Field(default=Gates.min_coverage, ge=0.0, le=1.0)
    min_alignment: float = Field(default=Gates.min_alignment, ge=0.0, le=1.0)
    min_overlap: float = Field(default=Gates.min_overlap, ge=0.0, le=1.0)
    cases: str = Gates.cases
    recall_k: int = Field(default=Gates.recall_k, ge=1, le=1000)
    overlap_k: int = Field(default=Gates.overlap_k, ge=1, le=1000)
    sample: int = Field(default=Gates.sample, ge=1, le=100_000)
    max_cases: int = Field(default=Gates.max_cases, ge=1)

    def gates(self) -> Gates:
        return Gates(**self.model_dump())


class ServiceArgs(_Args):
    """`args` of a Serve config file; only `artifact` is required."""

    artifact: str = Field(min_length=1, description="folder of a version, or the root with CURRENT, on every node")
    replicas: int = Field(1, ge=1, description="processes that answer; the least number where max_replicas is set")
    max_replicas: int = Field(0, ge=0, description="Serve adds replicas under load, up to this many; 0: never")
    target_ongoing_requests: float = Field(32.0, gt=0.0, le=MAX_ONGOING / 2, description="per replica, that it aims at")
    shards: int = Field(0, ge=0, le=MAX_SHARDS, description="processes that hold a part of each index; 0: replicas do")
    on_lost_shard: Literal["error", "partial"] = Field("error", description="503, or what the others have, marked")
    shard_timeout_seconds: float = Field(5.0, gt=0.0, description="within which a shard answers; else it is lost")
    threads: int = Field(1, ge=1, description="threads, and CPUs reserved, per replica or shard; batches use them all")
    gpus: float = Field(0.0, ge=0.0, description="GPUs reserved per replica, or shard, for a FAISS index on the GPU")
    verify: bool = Field(True, description="compare all files with the manifest's checksums when a replica starts")
    max_k: int = Field(Limits.max_k, ge=1)
    max_batch: int = Field(Limits.max_batch, ge=1)
    max_body_bytes: int = Field(Limits.max_body_bytes, ge=1024)
    max_session: int = Field(Limits.max_session, ge=1)
    max_results: int = Field(Limits.max_results, ge=1)
    max_waiting: int = Field(Limits.max_waiting, ge=1)
    timeout_seconds: float = Field(Limits.timeout_seconds, gt=0.0)
    token_file: str = Field("", description="one line, on every node; else the environment variable LEXSHARD_TOKEN")
    read_token_file: str = Field("", description="the same for reading; else LEXSHARD_READ_TOKEN, else reading is open")
    feedback_token_file: str = Field("", description="for feedback; else LEXSHARD_FEEDBACK_TOKEN, else as for reading")
    runs: str = Field("", description="folder, on every node, whose runs POST /v1/exports may name; empty: none")
    admit_seconds: float = Field(1800.0, gt=0.0, description="within which a version must be checked and judged")
    gates: GateArgs = GateArgs()
    probe_seconds: float = Field(60.0, ge=0.0, description="between two looks at the live indexes' recall; 0: none")
    probe_margin: float = Field(0.05, ge=0.0, le=1.0, description="warn where it is so far below the export's figure")
    log_format: LogFormat = Field("text", description="of a line in the log: for people, or json")
    log_level: LogLevel = Field("info", description="of the least that is written: info has the events, too")
    log_file: str = Field("", description="on every node, where replicas append to; empty: stderr, in Ray's log folder")
    access_log: bool = Field(False, description="a line for each request")
    start: str = Field("", description="the version served where none was ever activated; found at deployment")

    @property
    def most_processes(self) -> int:
        """Replicas and shards."""
        return max(self.replicas, self.max_replicas) + self.shards

    def access(self) -> Access:
        """Raises SettingError."""
        return find_access(self.token_file, self.read_token_file, self.feedback_token_file)

    def limits(self) -> Limits:
        return Limits(**{name: getattr(self, name) for name in asdict(Limits())})


def checked_args(args: Mapping[str, Any], where: str = "args") -> ServiceArgs:
    """Raises SettingError, which names it as `where`.NAME, for an argument that is unknown or wrong."""
    try:
        settings = ServiceArgs.model_validate(dict(args))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join([where, *map(str, first["loc"])])
        known = f"; known are {', '.join(ServiceArgs.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise SettingError(path, f"{first['msg']}{known}; got {first['input']!r}") from None
    if settings.access_log and settings.log_level != "info":
        message = f"{where}.log_level = {settings.log_level} leaves its lines out: set info"
        raise SettingError(f"{where}.access_log", message)
    if 0 < settings.max_replicas < settings.replicas:
        raise SettingError(
            f"{where}.max_replicas",
            f"{settings.max_replicas} is less than replicas = {settings.replicas}, the least number: raise it, or set "
            "0 to have always as many",
        )
    return settings


def store_of(artifact: str) -> VersionStore | None:
    """The versions below the root `artifact`; None if it is the folder of one version, which is fixed then."""
    return None if (Path(artifact) / MANIFEST).exists() else VersionStore(artifact)


def begin_with(settings: ServiceArgs) -> ServiceArgs:
    """The settings with an absolute path and with `start`, so that all replicas begin with the same version.

    Raises ArtifactError if the version that will be live is not there or cannot be served, SettingError (serve.runs).
    """
    path = Path(settings.artifact).absolute()
    artifact = Artifact.open(path, verify=False)
    store = store_of(settings.artifact)
    state = store.serving() if store is not None else None
    if store is not None and state is not None:
        artifact = Artifact.open(store.folder(state.live), verify=False)
    check_servable(artifact)
    if settings.runs:
        _check_runs(settings, store)
    if settings.shards:
        for name in artifact.manifest["indexes"]:
            shards_of(artifact, name, 0, settings.shards)
    runs = {"runs": str(Path(settings.runs).absolute())} if settings.runs else {}
    return settings.model_copy(update={"artifact": str(path), "start": artifact.path.name} | runs)


def _check_runs(settings: ServiceArgs, store: VersionStore | None) -> None:
    """Raise SettingError where no run could be exported."""
    if not Path(settings.runs).is_dir():
        raise SettingError("serve.runs", f"{settings.runs}: there is no such folder; name the one that runs lie below")
    if store is None:
        message = f"{settings.artifact} is the folder of one version, beside which nothing is exported: serve the root"
        raise SettingError("serve.runs", f"{message} that it lies in, or leave serve.runs out")
    if settings.access().change is None:
        message = f"exports need the token for changes: set serve.token_file or {CHANGE_VARIABLE}"
        raise SettingError("serve.runs", f"{message}, or leave serve.runs out")
