"""The training loop. `train` is what the command line calls; `train_worker` is what every worker runs."""

from __future__ import annotations

import itertools
import json
import math
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from cluster.config import Config, config_from_dict, config_to_dict, to_toml
from cluster.errors import ArtifactError, CheckpointError, DataError, SettingError
from cluster.launch import Listener, launch, report
from cluster.rank import Rank, current_rank
from cluster.storage import remove_folder, write_atomic, write_json
from trainers.cases import Cases, load_validation
from trainers.catalogue import evaluate_model
from trainers.checkpoint import CheckpointStore, Position, Progress, check_same_run
from trainers.evictions import EvictionLog
from trainers.growth import check_grow, grow
from trainers.metrics import parse_metric
from trainers.model_tables import check_disks, table_warnings
from trainers.models import Model, Step, build_model, check_device, check_model, tables_of
from trainers.objectives import schedule
from trainers.prepare import Prepared, holdout_of, load_prepared, open_reader, prepare
from trainers.session_batch import SessionBatch
from trainers.sessions import SessionReader, read_ahead
from trainers.start import start_from_files
from trainers.table_report import lines_of, table_report

_STEPS_BETWEEN_QUESTIONS = 16  # whether a checkpoint is due, whether to stop
_STOP = "stop"  # a file of this name in a run's folder stops its training


def train(config: Config, *, fresh: bool = False, on_event: Listener | None = None) -> dict[str, Any]:
    """Train the run that `config` describes, from its last checkpoint if it has one. Returns the run's result.

    fresh: forget the run's checkpoints and key maps first; what it has published stays. on_event: gets every event of
    the worker (see `train_worker`).
    Raises LexshardError for everything that is the user's to mend.
    """
    parse_metric(config.train.metric)
    check_model(config)
    store = CheckpointStore(config.run)
    if fresh or not store.names():  # a run that has begun has no need of the old one
        check_grow(config)
    if not config.cluster.address:
        check_disks(config)
    open_reader(config)  # a mistake in the data is told before anything is removed or started
    run = Path(config.run)
    if run.exists() and not run.is_dir():
        raise SettingError("run", f"{run} is a file; name a folder")
    if fresh:
        for name in ("checkpoints", "prepared", "tensorboard"):
            remove_folder(run / name)
        for name in ("metrics.jsonl", "evicted.jsonl", "result.json", "start.json"):
            (run / name).unlink(missing_ok=True)
    elif (before := store.newest_config()) is not None:
        check_same_run(before, config, store.folder)
    run.mkdir(parents=True, exist_ok=True)
    (run / _STOP).unlink(missing_ok=True)
    result: dict[str, Any] = launch(
        train_worker,
        config_to_dict(config),
        workers=config.cluster.workers,
        engine=config.cluster.engine,
        device=config.cluster.device,
        address=config.cluster.address,
        max_failures=config.cluster.max_failures,
        storage=str(run),
        threads=config.train.threads,
        on_event=on_event,
    )
    return result


def ask_to_stop(run: str | Path) -> None:
    """Ask the training of `run` to stop, from any thread or process that sees its folder.

    It looks when it reports progress or has validated, writes a checkpoint, and returns a result with `stopped_early`.
    """
    (Path(run) / _STOP).touch()


def train_worker(settings: dict[str, Any]) -> dict[str, Any]:
    """One worker's part of a run. Returns its result (rank 0's is the run's).

    Rank 0 reports events: {"kind": "note", "text"}, {"kind": "progress", "epoch", "share", "loss",
    "examples_per_second", "seconds_left", "peak_rss_bytes"}, {"kind": "validation", "epoch", <metrics>}.
    """
    config = config_from_dict(settings)
    place = current_rank(config.cluster.device)
    check_disks(config)  # of a worker, which may be on another machine than the driver
    check_device(config, place.device)
    torch.set_flush_denormal(True)  # a softmax of cosines is full of numbers too small to matter, and slow to multiply
    reader = open_reader(config)
    store = CheckpointStore(config.run, keep=config.train.keep_checkpoints)
    if place.is_first:
        _prepare(config, reader, store)
    dist.barrier()
    prepared = load_prepared(config.run, reader.fingerprint)
    model = build_model(config, prepared, device=place.device, threads=torch.get_num_threads())
    progress, warnings = store.resume(model, config)
    if not progress.step:
        _start_tables(config, prepared, model, place)
    cases = load_validation(config, prepared)
    if progress.metric != config.train.metric:  # another one now chooses the best
        progress.metric, progress.best_value, progress.best_epoch, progress.bad_validations = (
            config.train.metric, None, -1, 0,
        )  # fmt: skip
    tables = None
    if place.is_first:
        write_atomic(Path(config.run) / "config.toml", to_toml(config).encode())
        _announce(config, prepared, model, progress, warnings)
        tables = _announce_tables(config, prepared)
    run = _Run(config, place, reader, prepared, model, store, progress, cases, tables)
    try:
        run.train()
    finally:
        run.close()
    return run.result()


def _start_tables(config: Config, prepared: Prepared, model: Model, place: Rank) -> None:
    """Where a new run begins other than at random; what came of it is told, and kept in `<run>/start.json`."""
    starts = start_from_files(config, prepared, model)
    if config.train.grow:
        starts += grow(config, prepared, model, place)
    if starts and place.is_first:
        for start in starts:
            report({"kind": "note", "text": start.text()})
            if start.new and model.tables.specs[start.table].frozen:
                text = f"table {start.table} is frozen, and {start.new:,} of its keys stay as random as they begin"
                report({"kind": "note", "text": f"warning: {text}"})
        write_json(Path(config.run) / "start.json", [asdict(start) for start in starts])


def _prepare(config: Config, reader: SessionReader, store: CheckpointStore) -> None:
    """Key maps and cases: built, or found; of a run that has begun they are brought back where they are damaged."""
    is_begun = bool(store.names())
    try:
        prepare(config, reader, is_begun=is_begun)
    except (CheckpointError, ArtifactError):
        if not is_begun or not store.restore_prepared():
            raise
        prepare(config, reader, is_begun=True)


class _Run:
    """What the loop works with, in one worker."""

    def __init__(
        self,
        config: Config,
        place: Rank,
        reader: SessionReader,
        prepared: Prepared,
        model: Model,
        store: CheckpointStore,
        progress: Progress,
        cases: Cases | None,
        tables: list[dict[str, Any]] | None,
    ) -> None:
        self.tables = tables
        self.config, self.place, self.reader, self.prepared = config, place, reader, prepared
        self.model, self.store, self.progress, self.cases = model, store, progress, cases
        self.holdout = holdout_of(config, reader.num_sessions)
        self.log = _MetricsLog(Path(config.run), progress.step) if place.is_first else None
        self.evictions: EvictionLog | None = None
        if place.is_first and model.tables.dynamic:
            self.evictions = EvictionLog(Path(config.run), progress.step)
        self.saved_at = self.reported_at = self.resumed_at = time.monotonic()
        self.started = self.resumed_at - progress.seconds
        self.loss, self.pairs, self.examples, self.num_trainable = 0.0, 0, 0, 0
        self.bad_rows_before = progress.bad_rows
        self.share_at_start = self._share(progress.position, 0)
        self.is_asked_to_stop = self.is_stopped = False

    def train(self) -> None:
        """Train what is left of the run, from one reading of its data."""
        place, epochs = self.progress.position, self.config.train.epochs
        windows = self.reader.windows(
            place.epoch, place.window, num_epochs=epochs - place.epoch, to_rows=self.prepared.item_numbers
        )
        with closing(windows):
            self._train(windows)

    def _train(self, windows: Iterator[tuple[int, SessionBatch]]) -> None:
        """Epochs of steps; a checkpoint now and then, a validation at an epoch's end."""
        for epoch in range(self.progress.position.epoch, self.config.train.epochs):
            if self._stopped_early():
                break
            for position, share, step in self._steps(epoch, windows):
                rate = self._rate(share)
                loss, pairs = self.model.step(step, rate)
                self.progress.position = position
                self.progress.step += 1
                evicted = self.model.tables.evicted()
                if self.evictions is not None:
                    self.evictions.write(self.progress.step, evicted)
                if not math.isfinite(loss):
                    raise SettingError(
                        "train.learning_rate",
                        f"the loss is not a finite number at step {self.progress.step}: lower it, raise train.warmup, "
                        "or both, and start over with `--fresh`",
                    )
                self._count(loss, pairs, step.num_examples, share, rate)
                is_due, self.is_stopped = self._questions()
                if is_due or self.is_stopped:
                    self._save()
                if self.is_stopped:
                    return
            if not self.num_trainable and self.share_at_start == 0.0:  # one that resumed may have only the rest to see
                raise DataError(
                    "there is nothing to train on: no session has two known items, or what model.query asks for",
                    file=self.config.data.train,
                )
            self.progress.position = Position(epoch + 1)
            self._save(best=self._validate(epoch))

    def close(self) -> None:
        """Close the run's log, whatever has ended the training."""
        if self.log is not None:
            self.log.close()
        if self.evictions is not None:
            self.evictions.close()

    def _steps(self, epoch: int, windows: Iterator[tuple[int, SessionBatch]]) -> Iterator[tuple[Position, float, Step]]:
        """(position after the step, share of the training before it, the prepared step), read and prepared ahead."""
        return read_ahead(self._prepared_steps(epoch, windows))

    def _prepared_steps(
        self, epoch: int, windows: Iterator[tuple[int, SessionBatch]]
    ) -> Iterator[tuple[Position, float, Step]]:
        seed, world = self.config.train.seed, self.place.world_size
        offset, first = self.progress.position.offset, self.progress.position.window
        for window, batch in itertools.islice(windows, self.reader.num_windows() - first):
            sessions = self.prepared.rows(self.holdout.training(batch))
            plan = self.model.plan(sessions, (seed, epoch, window))
            self.num_trainable += plan.num_trainable
            while offset < plan.size:
                stop = plan.stop_after(offset, world)
                step_seed = _mix(seed, epoch, window, offset, self.place.rank)
                step = self.model.prepare(plan.batch(offset, stop, self.place.rank, world), step_seed)
                share = self._share(Position(epoch, window, offset), plan.size)
                yield Position(epoch, window, stop), share, step
                offset = stop
            offset = 0

    def _share(self, position: Position, window_size: int) -> float:
        """Share of the whole training before `position`: a pure function of the data, whatever the workers."""
        inside = position.offset / window_size if window_size else 0.0
        done = position.epoch + (position.window + inside) / self.reader.num_windows()
        return min(1.0, done / self.config.train.epochs)

    def _rate(self, share: float) -> float:
        train = self.config.train
        return schedule(share, warmup=train.warmup, decay=train.decay, final_rate=train.final_rate)

    def _count(self, loss: float, pairs: int, examples: int, share: float, rate: float) -> None:
        self.loss, self.pairs, self.examples = self.loss + loss, self.pairs + pairs, self.examples + examples
        now = time.monotonic()
        if self.log is None or now - self.reported_at < min(1.0, self.config.train.report_seconds):
            return
        seconds = now - self.started
        gained = share - self.share_at_start
        event = {
            "kind": "progress",
            "step": self.progress.step,
            "epoch": self.progress.position.epoch,
            "share": share,
            "loss": self.loss / max(1, self.pairs),
            "rate": rate,
            "examples_per_second": self.examples * self.place.world_size / (now - self.reported_at),
            "seconds": seconds,
            "seconds_left": (now - self.resumed_at) * (1.0 - share) / gained if gained > 0 else None,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        self._tell(event)
        self.reported_at, self.loss, self.pairs, self.examples = now, 0.0, 0, 0

    def _tell(self, event: dict[str, Any]) -> None:
        assert self.log is not None
        self.log.write(event)
        report(event)
        self.is_asked_to_stop = (Path(self.config.run) / _STOP).exists()

    def _questions(self) -> tuple[bool, bool]:
        """Whether a checkpoint is due and whether to stop, by rank 0's clock and folder.

        Workers are asked now and then, since asking costs an exchange.
        """
        due = time.monotonic() - self.saved_at >= self.config.train.checkpoint_seconds
        if self.place.world_size == 1:
            return due, self.is_asked_to_stop
        if self.progress.step % _STEPS_BETWEEN_QUESTIONS:
            return False, False
        flags = torch.tensor([due, self.is_asked_to_stop], dtype=torch.int32)
        dist.broadcast(flags, 0)
        due, stop = flags.tolist()
        return bool(due), bool(stop)

    def _save(self, *, best: bool = False) -> None:
        self.progress.seconds = time.monotonic() - self.started
        self.progress.bad_rows = max(self.bad_rows_before, self.reader.num_bad)
        self.store.save(self.model, self.progress, self.config, best=best)
        self.saved_at = time.monotonic()

    def _validate(self, epoch: int) -> bool:
        """Score the validation cases if this epoch is one for it; whether it is the best so far."""
        every = self.config.train.validate_every
        last = epoch + 1 == self.config.train.epochs
        if self.cases is None or not every or ((epoch + 1) % every and not last):
            return False
        metric = self.config.train.metric
        _, k = parse_metric(metric)
        figures = evaluate_model(
            self.model,
            self.cases,
            ks=(k,),
            place=self.place,
            mask_seen=self.config.data.mask_seen,
            num_candidates=len(self.prepared.keys["item"].keys),
        ).figures()
        value = figures[metric]
        progress = self.progress
        best = progress.best_value is None or value > progress.best_value
        progress.bad_validations = 0 if best else progress.bad_validations + 1
        if best:
            progress.best_value, progress.best_epoch = value, epoch
        progress.validations.append({"epoch": epoch + 1, **figures})
        if self.log is not None:
            event = {"kind": "validation", "step": progress.step, "epoch": epoch + 1, **figures, "best": best}
            self._tell(event)
        return best

    def _stopped_early(self) -> bool:
        patience = self.config.train.patience
        return bool(patience) and self.progress.bad_validations >= patience

    def result(self) -> dict[str, Any]:
        """The run's figures; rank 0 also leaves them in `<run>/result.json`."""
        progress, occupancy = self.progress, self.model.tables.occupancy()
        is_done = progress.position.epoch >= self.config.train.epochs
        result = {
            "run": self.config.run,
            "epochs": progress.position.epoch,
            "steps": progress.step,
            "stopped_early": self.is_stopped or (self._stopped_early() and not is_done),
            "seconds": progress.seconds,
            "workers": self.place.world_size,
            "items": self.model.num_items,
            "tables": [one | occupancy.get(one["table"], {}) for one in self.tables or ()],
            "bad_rows": max(progress.bad_rows, self.reader.num_bad),
            "best_epoch": progress.best_epoch + 1 if progress.best_epoch >= 0 else None,
            "best": {self.config.train.metric: progress.best_value} if progress.best_value is not None else {},
            "validations": progress.validations,
            "peak_rss_bytes": peak_rss_bytes(),
        }
        if self.place.is_first:
            for table, one in occupancy.items():
                rows = f"{one['occupied']:,} of {self.model.tables.specs[table].rows - 1:,} rows have a key"
                text = f"table {table}: {rows}; {one['admitted']:,} keys got one so far, {one['evicted']:,} lost it"
                report({"kind": "note", "text": text})
            write_json(Path(self.config.run) / "result.json", result)
        return result


class _MetricsLog:
    """`<run>/metrics.jsonl` and TensorBoard events, numbers only; a resumed run goes on behind its checkpoint."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = run / "metrics.jsonl"
        kept = []
        if path.exists():  # steps after the checkpoint are trained, and written, once more
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        write_atomic(path, "".join(f"{line}\n" for line in kept).encode())
        self._lines = open(path, "a")  # noqa: SIM115 - closed by close()
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, event: dict[str, Any]) -> None:
        self._lines.write(json.dumps(event) + "\n")
        self._lines.flush()
        for name, value in event.items():
            if isinstance(value, float):
                self._board.add_scalar(f"{event['kind']}/{name}", value, event["step"])

    def close(self) -> None:
        self._lines.close()
        self._board.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut off


def _announce(config: Config, prepared: Prepared, model: Model, progress: Progress, warnings: list[str]) -> None:
    for warning in warnings:
        report({"kind": "note", "text": f"warning: {warning}"})
    if config.model.kind == "item2vec" and config.cluster.workers > 2:
        text = (
            "item2vec merges what its workers have learned, and how well that goes with more than two is not measured"
        )
        report({"kind": "note", "text": f"warning: {text} yet; a smaller train.batch_size brings them closer"})
    tables = sum(spec.num_bytes(model.tables.optimizer) for spec in model.tables.specs.values())
    text = (
        f"{config.model.kind}: {prepared.num_sessions:,} sessions, {model.num_items:,} items, "
        f"{len(model.tables.specs)} tables of {tables / 2**20:,.1f} MiB with optimiser state"
    )
    report({"kind": "note", "text": text})
    position = progress.position
    if progress.step:
        where = f"epoch {position.epoch + 1}, window {position.window}, offset {position.offset}"
        done = position.epoch >= config.train.epochs
        text = "nothing left to do; raise train.epochs to go on" if done else f"going on at {where}"
        report({"kind": "note", "text": f"checkpoint of step {progress.step} loaded: {text}"})


def _announce_tables(config: Config, prepared: Prepared) -> list[dict[str, Any]]:
    """Tell of tables whose keys share rows; the report of all tables."""
    tables = tables_of(config, prepared)
    found = table_report(tables)
    for line in lines_of(found):
        report({"kind": "note", "text": line})
    for warning in table_warnings(tables):
        report({"kind": "note", "text": f"warning: {warning}"})
    return found


def _mix(*numbers: int) -> int:
    """One 48-bit seed from several integers."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 0x9E3779B97F4A7C15 + number + 1) % 2**64
        mixed ^= mixed >> 29
    return mixed >> 16


def peak_rss_bytes() -> int:
    """Peak resident memory of this process so far.

    Linux's VmHWM begins with the program; getrusage's figure also holds the peak of the process that started it.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
