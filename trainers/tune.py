"""The budgeted tuner: trials of a few settings on a sample, the poor ones stopped early, by validation data alone.

Trials follow one another, each a whole run of `trainers.loop.train` in a folder of its own. Optuna proposes settings
(Bergstra et al., "Algorithms for hyper-parameter optimization", NeurIPS 2011) and tells which trials to stop
(successive halving: Li et al., "A system for massively parallel hyperparameter tuning", MLSys 2020).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import optuna
import torch

from cluster.config import Config, config_to_dict, to_toml
from cluster.errors import CheckpointError, LexshardError, SettingError
from cluster.launch import Listener
from cluster.storage import remove_folder, write_atomic, write_json
from trainers.loop import ask_to_stop, train
from trainers.metrics import parse_metric
from trainers.prepare import open_reader
from trainers.search_space import Space, with_settings
from trainers.session_sample import draw_sample

State = Literal["complete", "pruned", "stopped", "failed"]
Ended = Literal["budget", "trials", "space", "interrupted"]

_SHARES = 8  # trials are compared after 1/8, 1/4, 1/2 and all of their training
_SAMPLE_SESSIONS = 100_000  # of the default sample
_REPEATS = 50  # proposals in a row that were tried already: the space is taken to be used up


@dataclass
class Trial:
    """One trial: its settings, how far it came, and the best value of the metric on its way.

    `validations`: [epoch from 1, value] pairs. `state`: `stopped` by the end of the budget or by Ctrl-C. `problem` is
    the message of a failed one.
    """

    number: int
    settings: dict[str, Any]
    state: State = "complete"
    epochs: int = 0
    value: float | None = None
    seconds: float = 0.0
    validations: list[list[float]] = field(default_factory=list)
    problem: str = ""


@dataclass(frozen=True)
class Tuning:
    """What `tune` has found. `best` is the trial whose config `output` holds; trial 0 has the config's own settings."""

    output: str
    run: str
    metric: str
    sample: float
    best: Trial
    trials: list[Trial]
    seconds: float
    ended: Ended

    def to_dict(self) -> dict[str, Any]:
        """The same of JSON types."""
        return asdict(self)


def tune(
    config: Config,
    output: str | Path,
    *,
    minutes: float,
    sample: float | None = None,
    vary: Sequence[str] = (),
    max_trials: int = 100,
    force: bool = False,
    fresh: bool = False,
    keep: bool = False,
    on_event: Listener | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Tuning:
    """Search settings for `config` that do better on its validation data, and write the best config to `output`.

    The first trial has the settings of `config` itself, so that on the sample the result is never worse than it; all
    have the same seed and see the same sessions and cases. Trials are kept in `<run>/tune/trials.json`, and a further
    call for the same goes on behind them.

    minutes: of this call; the trial in progress at their end is stopped, and takes part with what it has reached.
    sample: share of the training sessions in (0, 1]; None: so many that it is 100,000, at most all (see
        `draw_sample`). An epoch of a sample has fewer steps: the smaller it is, the higher a rate and the more epochs
        win on it than on all sessions; vary neither where that matters.
    vary: what to vary instead of the usual (see `Space.parse`). fresh: forget former trials.
    keep: leave the trials' folders, `<run>/tune/<number>`. on_event: gets the trials' progress, and notes.
    clock: seconds that pass.

    Ctrl-C ends the search as the budget does; KeyboardInterrupt is raised only where there is nothing yet to write.
    Raises SettingError for what cannot be tuned, CheckpointError where the folder holds trials of another search,
    what `train` raises in the first trial, LexshardError if no trial came as far as a validation.
    """
    deadline = clock() + 60.0 * minutes
    _check(config, minutes, sample, max_trials)
    if Path(output).exists() and not force:
        raise SettingError("--output", f"{output} exists; name another file or add --force")
    if not Path(output).parent.is_dir():
        raise SettingError("--output", f"{output}: there is no folder {Path(output).parent}")
    space = Space.parse(vary, config) if vary else Space.usual(config)
    share = _share(config, sample)
    folder = Path(config.run) / "tune"
    if fresh:
        remove_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    search = _Search(config, space, share, folder, keep=keep, on_event=on_event or (lambda event: None), clock=clock)
    started = clock()
    ended = search.run(deadline, max_trials)
    best = search.best()
    if best is None:
        if ended == "interrupted":
            raise KeyboardInterrupt
        raise LexshardError(
            f"no trial came as far as a validation in {minutes:g} minutes: give more --minutes, or a smaller --sample"
        )
    found = Tuning(str(output), str(folder), config.train.metric, share, best, search.trials, clock() - started, ended)
    write_atomic(output, _tuned_toml(config, found).encode())
    return found


def _check(config: Config, minutes: float, sample: float | None, max_trials: int) -> None:
    if not 0.0 < minutes < float("inf"):
        raise SettingError("--minutes", f"must be a number above 0; got {minutes:g}")
    if sample is not None and not 0.0 < sample <= 1.0:
        raise SettingError("--sample", f"is a share of the sessions, above 0 and at most 1; got {sample:g}")
    if max_trials < 1:
        raise SettingError("--trials", f"must be at least 1; got {max_trials}")
    parse_metric(config.train.metric)
    if not config.data.valid and config.data.holdout == "none":
        raise SettingError(
            "data.holdout", "is none, and data.valid is empty: trials are compared on validation data; set one of them"
        )
    if not config.train.validate_every:
        raise SettingError("train.validate_every", "is 0: trials are compared by validations; set it to 1 or more")


def _share(config: Config, sample: float | None) -> float:
    num_sessions = open_reader(config).num_sessions
    return sample if sample is not None else min(1.0, _SAMPLE_SESSIONS / num_sessions)


def _tuned_toml(config: Config, found: Tuning) -> str:
    """The best config, with a run of its own: the checkpoints of `config.run` belong to other settings."""
    best = found.best
    tuned = with_settings(config, {**best.settings, "run": f"{config.run.rstrip('/')}-tuned"})
    lines = [
        f"# Trial {best.number} of `lexshard tune`, the best of {len(found.trials)}: {found.metric} {best.value:.4f}",
        f"# on validation cases, trained on {found.sample:.3g} of the sessions. What was varied:",
        *(f"#   {path} = {json.dumps(value)}" for path, value in best.settings.items()),
    ]
    return "\n".join(lines) + "\n" + to_toml(tuned)


class _Search:
    """The trials so far and what proposes the next."""

    def __init__(
        self,
        config: Config,
        space: Space,
        share: float,
        folder: Path,
        *,
        keep: bool,
        on_event: Listener,
        clock: Callable[[], float],
    ) -> None:
        self.config, self.space, self.share, self.folder = config, space, share, folder
        self.keep, self.on_event, self.clock = keep, on_event, clock
        self.trials: list[Trial] = []
        self._again: list[dict[str, Any]] = []  # settings of a trial that the end of a former budget has cut short
        self._load()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        # another seed when going on, or the first proposals would be those of the former call
        sampler = optuna.samplers.TPESampler(seed=config.train.seed + len(self.trials), n_startup_trials=8)
        pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
        self._study = optuna.create_study(direction="maximize", sampler=sampler, pruner=pruner)
        for trial in self.trials:
            self._replay(trial)

    def best(self) -> Trial | None:
        """The trial with the highest value, the earliest of several; None if none has one."""
        valued = [trial for trial in self.trials if trial.value is not None]
        return max(valued, key=lambda trial: trial.value or 0.0, default=None)

    def run(self, deadline: float, max_trials: int) -> Ended:
        """Trials until the deadline (by the clock), until there are `max_trials`, or until the space is used up."""
        sampled, prepared = self.folder / "sample", self.folder / "prepared"
        remove_folder(sampled)
        remove_folder(prepared)
        try:
            base = self.config if self.share == 1.0 else draw_sample(self.config, sampled, self.share)
            while len(self.trials) < max_trials:
                if self.clock() >= deadline:
                    return "budget"
                proposed = self._propose()
                if proposed is None:
                    return "space"
                self._try(base, *proposed, deadline)
        except KeyboardInterrupt:
            return "interrupted"
        finally:
            if not self.keep:
                remove_folder(sampled)
            remove_folder(prepared)
        return "trials"

    def _propose(self) -> tuple[optuna.trial.Trial, dict[str, Any]] | None:
        """The next trial's settings; None if the proposals only repeat what was tried."""
        tried = [trial.settings for trial in self.trials]
        if self.space.own not in tried:
            self._again.insert(0, self.space.own)
        for _ in range(_REPEATS):
            if self._again:
                self._study.enqueue_trial(self._again.pop(0))
            asked = self._study.ask(self.space.distributions)
            settings = self.space.rounded(asked.params)
            if settings not in tried:
                return asked, settings
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        return None

    def _try(self, base: Config, asked: optuna.trial.Trial, settings: dict[str, Any], deadline: float) -> None:
        """Train one trial and write down what came of it. Raises what ends the whole search."""
        trial = Trial(number=len(self.trials), settings=settings)
        run = self.folder / f"{trial.number:03}"
        remove_folder(run)
        shown = ", ".join(f"{path}={value}" for path, value in settings.items())
        self.on_event({"kind": "note", "text": f"trial {trial.number}: {shown}"})
        began, is_interrupted = self.clock(), False
        try:
            self._train(base, trial, asked, run, deadline)
        except KeyboardInterrupt:
            trial.state, is_interrupted = "stopped", True
        except (LexshardError, MemoryError, torch.OutOfMemoryError) as error:
            if not self.trials and not (isinstance(error, SettingError) and error.path in settings):
                raise  # nothing that another trial would do better
            trial.state, trial.value, trial.problem = "failed", None, str(error) or type(error).__name__
        finally:
            if not self.keep:
                remove_folder(run)
        trial.seconds = self.clock() - began
        if trial.value is not None or trial.problem:
            self._finish(asked, trial)
        if is_interrupted:
            raise KeyboardInterrupt

    def _train(self, base: Config, trial: Trial, asked: optuna.trial.Trial, run: Path, deadline: float) -> None:
        fixed = {"run": str(run), "train.checkpoint_seconds": 1e9, "train.keep_checkpoints": 1}
        config = with_settings(base, {**trial.settings, **fixed})
        prepared = self.folder / "prepared"  # of the first trial; settings that ask for another make their own
        if prepared.exists():
            shutil.copytree(prepared, run / "prepared")
        watch = _Watch(trial, asked, config)

        def listen(event: dict[str, Any]) -> None:
            if event["kind"] == "progress" or (event["kind"] == "note" and trial.number == 0):
                self.on_event(event)
            if event["kind"] == "validation" and watch.is_hopeless(event):
                trial.state = "pruned"
                ask_to_stop(run)
            elif self.clock() >= deadline:
                trial.state = "stopped"
                ask_to_stop(run)

        result = train(config, on_event=listen)
        if result["epochs"] >= config.train.epochs:
            trial.state = "complete"  # the word came after its last step
        if not prepared.exists():
            shutil.copytree(run / "prepared", prepared)

    def _finish(self, asked: optuna.trial.Trial, trial: Trial) -> None:
        self._tell(asked, trial)
        self.trials.append(trial)
        header = {"search": self._identity(), "trials": [asdict(one) for one in self.trials]}
        write_json(self.folder / "trials.json", header)
        how = {"complete": "", "pruned": ", pruned", "stopped": ", stopped", "failed": f"failed ({trial.problem})"}
        figure = "" if trial.value is None else f"{self.config.train.metric} {trial.value:.4f}, {trial.epochs} epochs"
        text = f"trial {trial.number}: {figure}{how[trial.state]}, {trial.seconds:.0f} s"
        self.on_event({"kind": "note", "text": text})

    def _tell(self, asked: optuna.trial.Trial, trial: Trial) -> None:
        if trial.state == "complete":
            self._study.tell(asked, trial.value)
        else:
            is_failed = trial.state == "failed"
            state = optuna.trial.TrialState.FAIL if is_failed else optuna.trial.TrialState.PRUNED
            self._study.tell(asked, state=state)

    def _identity(self) -> dict[str, Any]:
        """What trials must have in common to be compared."""
        tree = config_to_dict(self.config)
        for name in ("cluster", "export", "serve"):
            del tree[name]
        return {"config": tree, "space": self.space.to_dict(), "sample": self.share}

    def _load(self) -> None:
        """The trials of a former call, those that were cut short to be done again."""
        path = self.folder / "trials.json"
        if not path.exists():
            return
        try:
            content = json.loads(path.read_text())
            search, former = content["search"], [Trial(**trial) for trial in content["trials"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); start over with --fresh") from None
        if search != json.loads(json.dumps(self._identity())):
            raise CheckpointError(
                f"{self.folder} holds trials of another config, sample or choice of settings; start over with --fresh, "
                "or name another folder with `--set run=...`"
            )
        self._again = [trial.settings for trial in former if trial.state == "stopped"]
        self.trials = [trial for trial in former if trial.state != "stopped"]
        for number, trial in enumerate(self.trials):
            trial.number = number
        text = f"going on behind {len(self.trials)} trials in {path}"
        self.on_event({"kind": "note", "text": text})

    def _replay(self, trial: Trial) -> None:
        """Let the study know a former trial, validation by validation, as when it ran."""
        self._study.enqueue_trial(trial.settings)
        asked = self._study.ask(self.space.distributions)
        watch = _Watch(trial, asked, with_settings(self.config, trial.settings))
        for epoch, value in list(trial.validations):
            watch.judge(int(epoch), value)
        self._tell(asked, trial)


class _Watch:
    """What the pruner hears of a trial: its best value so far at every eighth of its training.

    The rate decays over a trial's own number of epochs, so that trials are compared at the same share of theirs.
    """

    def __init__(self, trial: Trial, asked: optuna.trial.Trial, config: Config) -> None:
        self._trial, self._asked = trial, asked
        self._epochs, self._metric = config.train.epochs, config.train.metric
        self._best, self._share = float("-inf"), 0

    def is_hopeless(self, event: Mapping[str, Any]) -> bool:
        """Take note of a validation; whether the trial should be stopped."""
        epoch, value = int(event["epoch"]), float(event[self._metric])
        trial = self._trial
        trial.epochs = epoch
        trial.validations.append([epoch, value])
        trial.value = value if trial.value is None else max(trial.value, value)
        return self.judge(epoch, value) and epoch < self._epochs

    def judge(self, epoch: int, value: float) -> bool:
        """Report a validation to the pruner if a further eighth is done; its word."""
        self._best = max(self._best, value)
        share = _SHARES * epoch // self._epochs
        if share <= self._share:
            return False
        self._share = share
        self._asked.report(self._best, share)
        return self._asked.should_prune()
