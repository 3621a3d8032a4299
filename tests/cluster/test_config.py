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
    overrides = ["model.kind=two_tower", "model.hidden=[64, 32]", "data.query_features=['device']", "model.logq=0"]
    config = load_config(None, overrides)
    assert config_from_dict(config_to_dict(config)) == config
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


@pytest.mark.parametrize("text", ['a"b\\c', "\U0001f600 ünï", "two\nlines\ttab", "'\x00\x1f\x7f\x85\u2028'", "\\u0041"])
def test_any_text_round_trips(text: str) -> None:
    config = config_from_dict({"run": text, "data": {"train": text}})
    assert config_from_dict(tomllib.loads(to_toml(config))) == config


def test_a_file_is_utf_8(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_bytes('run = "läufe/\U0001f600"'.encode())
    assert load_config(tmp_path / "run.toml").run == "läufe/\U0001f600"


@pytest.mark.parametrize(
    ("kind", "override"),
    [
        ("item2vec", "window=3"),
        ("item2vec", "ordered=false"),
        ("item2vec", "negatives=3"),
        ("item2vec", "negative_exponent=0.1"),
        ("item2vec", "subsample=0.1"),
        ("two_tower", "query=['user']"),
        ("two_tower", "history_encoder=gru"),
        ("two_tower", "list_pooling=sum"),
        ("two_tower", "id_dropout=0.1"),
        ("two_tower", "share_items=false"),
        ("two_tower", "hidden=[8]"),
        ("two_tower", "examples=last_item"),
        ("two_tower", "temperature=0.2"),
        ("two_tower", "mask=item"),
        ("two_tower", "logq=0.5"),
        ("two_tower", "normalize=false"),
        ("two_tower", "train.optimizer=sgd"),
        ("two_tower", "train.dense_learning_rate=0.1"),
        ("two_tower", "train.history_length=3"),
        ("two_tower", "data.item_features=a.parquet"),
        ("two_tower", "data.query_features=['a']"),
    ],
)
def test_a_setting_of_the_other_kind_is_refused(kind: str, override: str) -> None:
    path = override.split("=")[0]
    override, path = (override, path) if "." in path else (f"model.{override}", f"model.{path}")
    load_config(None, [f"model.kind={kind}", override])
    other = "two_tower" if kind == "item2vec" else "item2vec"
    with pytest.raises(SettingError, match=f"belongs to {kind}, but model.kind is {other}") as caught:
        load_config(None, [f"model.kind={other}", override])
    assert caught.value.path == path


def test_settings_say_which_kind_they_belong_to() -> None:
    docs = {path: doc for path, _, _, doc in describe(Config())}
    assert docs["model.window"].startswith("item2vec: ")
    assert docs["train.optimizer"].startswith("two_tower: ")
    assert not docs["model.dim"].startswith(("item2vec", "two_tower"))


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
        ("train.learning_rate=nan", "train.learning_rate", "must be a finite number; got nan"),
        ("train.learning_rate=inf", "train.learning_rate", "must be a finite number; got inf"),
        ("train.init_scale=-inf", "train.init_scale", "must be a finite number; got -inf"),
        ("model.hidden=[8, 0]", "model.hidden[1]", "must be at least 1; got 0"),
        ("run=s3://bucket/run", "run", "must be a local or mounted folder"),
        ("data.time=when", "data.time", "there is no such setting"),
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
