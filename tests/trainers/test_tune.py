from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster import cli
from cluster.config import Config, load_config, to_toml
from cluster.errors import CheckpointError, DataError, LexshardError, SettingError
from tests.trainers.runs import small_config, write_sessions
from trainers.holdout import Holdout
from trainers.loop import ask_to_stop, train
from trainers.prepare import open_reader
from trainers.search_space import Space, with_settings
from trainers.session_sample import draw_sample
from trainers.sessions import SessionBatch
from trainers.tune import Tuning, tune

RATES = ["train.learning_rate=0.000001,0.3"]  # groups of ten items are learned with the second only


class Clock:
    """A clock that goes on by a second whenever it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def config(tmp_path: Path) -> Config:
    source = write_sessions(tmp_path / "sessions.parquet")
    return small_config(tmp_path / "run", source, train={"learning_rate": 1e-6, "metric": "recall@10", "epochs": 8})


def search(config: Config, **options: Any) -> Tuning:
    output = Path(config.run).parent / "tuned.toml"
    return tune(config, output, **{"minutes": 60.0, "vary": RATES, "clock": Clock(), "force": True, **options})


def test_the_setting_that_wins_is_found_written_and_trains(config: Config, tmp_path: Path) -> None:
    found = search(config)
    assert found.ended == "space"
    first, second = found.trials
    assert (first.settings, second.settings) == ({"train.learning_rate": 1e-6}, {"train.learning_rate": 0.3})
    assert (first.state, second.state) == ("complete", "complete")
    assert first.value is not None
    assert second.value is not None
    assert second.value > first.value + 0.2
    assert found.best is second
    tuned = load_config(tmp_path / "tuned.toml")
    assert tuned == with_settings(config, {"train.learning_rate": 0.3, "run": f"{config.run}-tuned"})
    result = train(tuned, on_event=lambda event: None)  # all of the sessions, the same seed: the very same run
    assert result["best"] == {"recall@10": second.value}
    assert sorted(path.name for path in (tmp_path / "run" / "tune").iterdir()) == ["trials.json"]


def test_what_falls_behind_is_stopped(config: Config, tmp_path: Path) -> None:
    good = with_settings(config, {"train.learning_rate": 0.3})
    found = search(good, keep=True)
    first, second = found.trials
    assert first.state == "complete"
    assert first.epochs == 8
    assert second.state == "pruned"
    assert second.epochs == len(second.validations) < 8
    assert found.best is first
    assert json.loads((tmp_path / "run/tune/001/result.json").read_text())["stopped_early"]
    assert load_config(tmp_path / "tuned.toml").train.learning_rate == 0.3


def test_the_budget_is_kept_and_the_best_so_far_written(config: Config, tmp_path: Path) -> None:
    clock = Clock()
    listened: list[Any] = []
    found = search(config, vary=[], minutes=2.0, clock=clock, on_event=listened.append)
    assert found.ended == "budget"
    assert clock.now < 120 + 20  # the looks after the deadline, of one trial that ends
    assert found.seconds == pytest.approx(sum(trial.seconds for trial in found.trials), abs=40)
    assert load_config(tmp_path / "tuned.toml").model.dim == config.model.dim
    assert [event for event in listened if event["kind"] == "progress"]


def test_a_budget_within_the_first_trial_takes_what_it_has_reached(config: Config) -> None:
    clock = Clock()
    with pytest.raises(LexshardError, match=r"no trial came as far as a validation in 0\.02 minutes"):
        search(config, minutes=0.02, clock=clock)
    found = search(config, minutes=0.5)
    assert [trial.state for trial in found.trials] == ["stopped"]
    assert 0 < found.trials[0].epochs < 8
    again = search(config)  # the trial that was cut short is done again
    assert [trial.state for trial in again.trials] == ["complete", "complete"]


def test_ctrl_c_ends_the_search_with_the_best_so_far(config: Config, tmp_path: Path) -> None:
    assert search(config, on_event=interrupting("trial 1:")).ended == "interrupted"
    assert load_config(tmp_path / "tuned.toml").train.learning_rate == 1e-6
    with pytest.raises(KeyboardInterrupt):  # there is nothing to write
        search(config, fresh=True, on_event=interrupting("trial 0:"))


def interrupting(text: str) -> Callable[[dict[str, Any]], None]:
    """A listener during whose first sign of progress after the note `text` Ctrl-C is pressed."""
    is_near = False

    def listen(event: dict[str, Any]) -> None:
        nonlocal is_near
        is_near = is_near or str(event.get("text", "")).startswith(text)
        if is_near and event["kind"] == "progress":
            raise KeyboardInterrupt

    return listen


def test_a_search_goes_on_behind_its_trials(config: Config, tmp_path: Path) -> None:
    assert search(config, max_trials=1).ended == "trials"
    (before,) = json.loads((tmp_path / "run/tune/trials.json").read_text())["trials"]
    found = search(config)
    assert found.trials[0].seconds == before["seconds"]
    assert [trial.number for trial in found.trials] == [0, 1]
    assert found.best.number == 1
    with pytest.raises(CheckpointError, match="holds trials of another config, sample or choice of settings"):
        search(config, vary=["train.learning_rate=0.000001,0.2"])
    assert len(search(config, vary=["train.learning_rate=0.000001,0.2"], fresh=True).trials) == 2


def test_a_trial_that_fails_is_told_and_passed_over(config: Config) -> None:
    found = search(config, vary=["train.learning_rate=0.000001,1e30,0.3", "model.dim=8,10"])
    failed = [trial for trial in found.trials if trial.state == "failed"]
    assert {trial.settings["model.dim"] for trial in failed} == {8, 10}
    assert any("the loss is not a finite number" in trial.problem for trial in failed)
    assert any("must be divisible by 4" in trial.problem for trial in failed)
    assert all(trial.value is None for trial in failed)
    assert found.best.settings == {"train.learning_rate": 0.3, "model.dim": 8}


def test_what_no_trial_can_mend_is_raised(config: Config) -> None:
    with pytest.raises(DataError, match=r"data\.holdout = 'items' finds nothing to hold out"):
        search(with_settings(config, {"data.holdout_fraction": 0.0}))


@pytest.mark.parametrize("kind", ["item2vec", "two_tower"])
def test_the_usual_space_has_few_settings_and_trains(kind: str, tmp_path: Path) -> None:
    source = write_sessions(tmp_path / "sessions.parquet", num_sessions=200)
    config = small_config(tmp_path / "run", source, model={"kind": kind}, train={"epochs": 2})
    space = Space.usual(config)
    assert 5 <= len(space.distributions) <= 7
    found = search(config, vary=[], max_trials=4, sample=0.5)
    assert [trial.state for trial in found.trials if trial.state == "failed"] == []
    assert found.trials[0].settings == space.own
    assert len({json.dumps(trial.settings) for trial in found.trials}) == 4


@pytest.mark.parametrize("objective", ["info_nce", "nt_xent", "ccl", "triplet"])
def test_the_usual_space_is_of_what_the_objective_uses(objective: str, tmp_path: Path) -> None:
    source = write_sessions(tmp_path / "sessions.parquet", num_sessions=20)
    config = small_config(tmp_path / "run", source, model={"kind": "two_tower", "objective": objective})
    paths = set(Space.usual(config).distributions)
    assert ("model.temperature" in paths) == (objective in ("info_nce", "nt_xent"))
    assert ("model.margin" in paths) == (objective in ("ccl", "triplet"))
    assert len(paths) <= 7


def test_a_range_holds_the_own_value_and_is_searched_by_its_logarithm(config: Config) -> None:
    space = Space.parse(["train.learning_rate=0.01:1", "model.negatives=5:8", "model.subsample=0,1e-3"], config)
    rate, negatives, subsample = (space.to_dict()[path]["attributes"] for path in space.distributions)
    assert (rate["low"], rate["high"], rate["log"]) == (1e-6, 1.0, True)
    assert (negatives["low"], negatives["high"], negatives["log"]) == (3, 8, False)
    assert subsample["choices"] == [0.0, 1e-3]
    assert space.rounded({"train.learning_rate": 0.123456})["train.learning_rate"] == 0.123


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"minutes": 0.0}, "--minutes: must be a number above 0"),
        ({"minutes": float("nan")}, "--minutes: must be a number above 0"),
        ({"sample": 1.5}, "--sample: is a share of the sessions"),
        ({"max_trials": 0}, "--trials: must be at least 1"),
        ({"vary": ["train.epochs"]}, "--vary: is written section.name=low:high"),
        ({"vary": ["train.epoch=1,2"]}, "train.epoch: there is no such setting; did you mean `epochs`?"),
        ({"vary": ["train=1,2"]}, "train: is a section"),
        ({"vary": ["train.seed=1,2"]}, "train.seed: is the same for all trials"),
        ({"vary": ["data.train=a,b"]}, "data.train: is the same for all trials"),
        ({"vary": ["train.epochs=1,2", "train.epochs=3,4"]}, "train.epochs: is varied twice"),
        ({"vary": ["train.epochs=1.5:3"]}, "train.epochs: must be a whole number"),
        ({"vary": ["train.epochs=5:3"]}, "train.epochs: a range is written low:high"),
        ({"vary": ["train.decay=a:b"]}, "train.decay: is no number"),
        ({"vary": ["train.decay=linear,none"]}, "train.decay: must be one of linear, cosine"),
        ({"vary": ["model.temperature=0.05:0.5"]}, "model.temperature: belongs to two_tower"),
        ({"force": False}, r"--output: .*tuned.toml exists; name another file or add --force"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(
    config: Config, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "tuned.toml").write_text("hers")
    with pytest.raises(SettingError, match=message):
        search(config, **options)
    assert (tmp_path / "tuned.toml").read_text() == "hers"
    assert not Path(config.run).exists()


def test_there_must_be_something_to_compare_by(config: Config) -> None:
    for path, value in (("data.holdout", "none"), ("train.validate_every", 0)):
        with pytest.raises(SettingError, match=path):
            search(with_settings(config, {path: value}))


def test_a_list_is_not_varied(tmp_path: Path) -> None:
    source = write_sessions(tmp_path / "sessions.parquet", num_sessions=20)
    config = small_config(tmp_path / "run", source, model={"kind": "two_tower"})
    with pytest.raises(SettingError, match=r"model\.hidden: is a list"):
        Space.parse(["model.hidden=32,64"], config)


@pytest.mark.parametrize("holdout", ["items", "sessions", "last_sessions"])
def test_a_sample_has_less_to_train_on_and_all_of_the_cases(config: Config, tmp_path: Path, holdout: str) -> None:
    config = with_settings(config, {"data.holdout": holdout})
    reader = open_reader(config)
    whole = Holdout(holdout, 0.1, 0, 600)  # type: ignore[arg-type]
    batch = SessionBatch.concat(list(reader.stream()))
    training, cases = whole.training(batch).items.to_lists(), whole.cases(batch)
    sampled = draw_sample(config, tmp_path / "sample", 0.3)
    assert sampled.data.holdout == "none"
    lists = pq.read_table(sampled.data.train).column("items").to_pylist()
    assert 0.2 * len(training) < len(lists) < 0.4 * len(training)
    place = iter(training)
    assert all(any(session == other for other in place) for session in lists)  # some of them, in their order
    table = pq.read_table(sampled.data.valid)
    assert table.column("items").to_pylist() == cases.items.to_lists()
    assert cases.history is not None
    assert table.column("history").to_pylist() == cases.history.to_lists()


@pytest.mark.parametrize("valid", [False, True])
def test_a_sample_of_users_has_all_their_sessions_and_cases(tmp_path: Path, valid: bool) -> None:
    users = [f"u{i % 40}" for i in range(400)]
    items = pa.array([[i % 7, 7 + i % 5, 12 + i % 3] for i in range(400)], pa.list_(pa.int64()))
    pq.write_table(pa.table({"who": users, "what": items}), tmp_path / "sessions.parquet")
    pq.write_table(pa.table({"who": [f"u{i}" for i in range(40)], "what": items[:40]}), tmp_path / "valid.parquet")
    data = {"items": "what", "user": "who"}
    if valid:
        data |= {"valid": str(tmp_path / "valid.parquet"), "history": "", "holdout": "none"}
    config = small_config(tmp_path / "run", tmp_path / "sessions.parquet", data=data, train={"epochs": 1})
    sampled = draw_sample(config, tmp_path / "sample", 0.5)
    sessions, cases = pq.read_table(sampled.data.train), pq.read_table(sampled.data.valid)
    drawn = set(sessions.column("user").to_pylist())
    assert 10 < len(drawn) < 30
    assert sessions.num_rows == 10 * len(drawn)
    assert set(cases.column("user").to_pylist()) <= drawn
    if valid:
        assert cases.num_rows == len(drawn)
    assert train(sampled, on_event=lambda event: None)["validations"]


def test_a_sample_of_nothing_is_an_error(config: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the sample holds no session; take a larger --sample"):
        draw_sample(config, tmp_path / "sample", 1e-9)


def test_training_stops_when_asked_and_goes_on_later(config: Config) -> None:
    def listen(event: dict[str, Any]) -> None:
        if event["kind"] == "validation" and event["epoch"] == 3:
            ask_to_stop(config.run)

    stopped = train(config, on_event=listen)
    assert stopped["stopped_early"]
    assert stopped["epochs"] == 3
    whole = train(config, on_event=lambda event: None)
    assert not whole["stopped_early"]
    assert whole["epochs"] == 8


def test_the_command_prints_a_table_or_json(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text(to_toml(config))
    command = ["tune", str(tmp_path / "mine.toml"), "--vary", RATES[0], "--minutes", "60"]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    output = tmp_path / "mine.tuned.toml"
    assert printed.splitlines()[0].split() == ["trial", "learning_rate", "epochs", "run", "recall@10", "seconds"]
    assert printed.splitlines()[2].endswith("best")
    assert printed.splitlines()[-1] == str(output)
    assert cli.main(command) == 2
    assert "mine.tuned.toml exists; name another file or add --force" in capsys.readouterr().err
    assert cli.main([*command, "--json", "--force"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["settings"] == {"train.learning_rate": 0.3}
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"]
    assert load_config(output).train.learning_rate == 0.3
