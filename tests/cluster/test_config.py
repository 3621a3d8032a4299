from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cluster.config import Config, config_from_dict, config_to_dict, describe, load_config, to_toml
from cluster.errors import SettingError


def test_defaults_without_a_file() -> None:
    assert load_config(None) == Config()


def test_file_and_overrides(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('run = "runs/x"\n[model]\nkind = "two_tower"\ndim = 32\n')
    config = load_config(file, ["model.dim=16", "data.train=a b.parquet", "model.query=['user']", "train.epochs = 3"])
    assert (config.run, config.model.kind, config.model.dim) == ("runs/x", "two_tower", 16)
    assert (config.data.train, config.model.query, config.train.epochs) == ("a b.parquet", ("user",), 3)


def test_round_trips() -> None:
    config = load_config(
        None, ["model.hidden=[64, 32]", "data.query_features=['device']", "model.logq=0", 'run=a"b\\c']
    )
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


def test_every_setting_is_documented() -> None:
    rows = list(describe(Config()))
    assert len(rows) > 40
    assert all(len(doc) > 5 for _, _, _, doc in rows)
    text = to_toml(Config())
    assert all(f"# {doc}\n{path.split('.')[-1]} = " in text for path, _, _, doc in rows)


@pytest.mark.parametrize(
    ("override", "path", "problem"),
    [
        ("train.epoch=3", "train.epoch", "did you mean `epochs`?"),
        ("trian.epochs=3", "trian", "did you mean `train`?"),
        ("model.kind=bert", "model.kind", "must be one of item2vec, two_tower; got 'bert'"),
        ("model.dim=wide", "model.dim", "must be a whole number; got 'wide'"),
        ("model.dim=1.5", "model.dim", "must be a whole number; got 1.5"),
        ("model.dim=true", "model.dim", "must be a whole number; got True"),
        ("model.dim=2", "model.dim", "must be in [4, 4096]; got 2"),
        ("train.epochs=0", "train.epochs", "must be at least 1; got 0"),
        ("train.learning_rate=nan", "train.learning_rate", "must be a number; got nan"),
        ("train.learning_rate='fast'", "train.learning_rate", "must be a number; got 'fast'"),
        ("model.normalize=1", "model.normalize", "must be true or false; got 1"),
        ("model.hidden=[8, 'x']", "model.hidden[1]", "must be a whole number; got 'x'"),
        ("model.hidden=8", "model.hidden", "must be a list; got 8"),
        ("train=3", "train", "is a section, not a value (3)"),
        ("run.epochs=3", "run", "must be text"),
    ],
)
def test_a_bad_setting_is_named(override: str, path: str, problem: str) -> None:
    with pytest.raises(SettingError) as caught:
        load_config(None, [override])
    assert caught.value.path == path
    assert problem in caught.value.problem


def test_an_override_must_have_a_value() -> None:
    with pytest.raises(SettingError, match=r"train\.epochs: an override is written section\.name=value"):
        load_config(None, ["train.epochs"])


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("train = 3\n")
    with pytest.raises(SettingError, match="`train` is not a section"):
        load_config(file, ["train.epochs=3"])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"none\.toml: there is no such config file"):
        load_config(tmp_path / "none.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("[train\n")
    with pytest.raises(SettingError, match=r"broken\.toml: is not a readable TOML file"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe")
    with pytest.raises(SettingError, match="is not a readable TOML file"):
        load_config(broken)
    with pytest.raises(SettingError, match="is not a readable TOML file"):
        load_config(tmp_path)
