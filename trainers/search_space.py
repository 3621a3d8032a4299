"""What a tuner varies: a few settings of a config with the values that they may take, usual ones or the user's."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from cluster.config import Config, config_from_dict, config_to_dict, describe
from cluster.errors import SettingError

_LOG_RATIO = 10.0  # a range that spans at least this factor is searched by its logarithm
_FIXED = {  # what trials must have in common, or what changes nothing of what is learned
    "model.kind", "train.seed", "train.metric", "train.validate_every", "train.validate_cases", "train.threads",
    "train.report_seconds", "train.checkpoint_seconds", "train.keep_checkpoints",
}  # fmt: skip


@dataclass(frozen=True)
class Space:
    """Settings (`section.name`) with their distributions, each of which holds the config's `own` value."""

    distributions: dict[str, BaseDistribution]
    own: dict[str, Any]

    @classmethod
    def usual(cls, config: Config) -> Space:
        """At most seven settings that matter for the config's kind of model, around its own values.

        item2vec: those that Caselles-Dupré et al. ("Word2vec applied to recommendation: hyperparameters matter", RecSys
        2018) find to matter (negative_exponent, epochs, subsample, window), with rate, negatives and the query's decay.
        two_tower: rate, temperature and the negatives (batch size, sampled ones, logQ, mask), after Yi et al.
        (RecSys 2019) and Wu et al. ("On the effectiveness of sampled softmax loss", TOIS 2024); what the objective
        does not use is left out.
        """
        paths = _usual_item2vec(config) if config.model.kind == "item2vec" else _usual_two_tower(config)
        return cls.parse([f"{path}={values}" for path, values in paths.items()], config)

    @classmethod
    def parse(cls, texts: Sequence[str], config: Config) -> Space:
        """The space of `section.name=low:high` and `section.name=a,b,c`; the config's own value is added to each.

        Ranges are of numbers, those over a factor of ten or more searched by their logarithm. Raises SettingError.
        """
        values = {path: value for path, value, _, _ in describe(config)}
        distributions: dict[str, BaseDistribution] = {}
        for text in texts:
            path, equals, choice = (part.strip() for part in text.partition("="))
            if not equals or not choice:
                raise SettingError("--vary", f"is written section.name=low:high or section.name=a,b,c; got {text!r}")
            if path not in values:
                with_settings(config, {path: 0})  # says what there is instead
                raise SettingError(path, "is a section; name one of its settings")
            if not path.startswith(("model.", "keys.", "train.")) or path in _FIXED:
                raise SettingError(path, "is the same for all trials, or changes nothing of what is learned")
            if isinstance(values[path], tuple):
                raise SettingError(path, "is a list; only single values can be varied")
            if path in distributions:
                raise SettingError(path, "is varied twice; name it once")
            distributions[path] = _distribution(path, choice, values[path], config)
        own = {path: values[path] for path in distributions}
        return cls(distributions, own)

    def rounded(self, proposed: Mapping[str, Any]) -> dict[str, Any]:
        """`proposed` settings with at most three significant digits, which is more than they matter; own ones as is."""
        return {path: self._rounded(path, value) for path, value in proposed.items()}

    def _rounded(self, path: str, value: Any) -> Any:
        distribution = self.distributions[path]
        if not isinstance(distribution, FloatDistribution) or value == self.own[path]:
            return value
        return min(max(float(f"{value:.3g}"), distribution.low), distribution.high)

    def to_dict(self) -> dict[str, Any]:
        """The space as JSON types."""
        return {
            path: json.loads(optuna.distributions.distribution_to_json(one)) for path, one in self.distributions.items()
        }


def with_settings(config: Config, settings: Mapping[str, Any]) -> Config:
    """`config` with the settings at these paths replaced, checked. Raises SettingError."""
    tree = config_to_dict(config)
    for path, value in settings.items():
        section, dot, name = path.partition(".")
        if dot:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return config_from_dict(tree)


def _distribution(path: str, text: str, own: Any, config: Config) -> BaseDistribution:
    """What `text` allows for the setting, with its `own` value. Raises SettingError."""
    low_text, colon, high_text = text.partition(":")
    if not colon:
        choices = [_checked(path, _parse(part), config) for part in text.split(",")]
        return CategoricalDistribution(list(dict.fromkeys([own, *choices])))
    if isinstance(own, (bool, str)):
        raise SettingError(path, f"is no number: list its values as {path}=a,b; got {text!r}")
    low, high = (_checked(path, _parse(part), config) for part in (low_text, high_text))
    if not low < high:
        raise SettingError(path, f"a range is written low:high; got {text!r}")
    low, high = min(low, own), max(high, own)
    log = low > 0 and high / low >= _LOG_RATIO
    return IntDistribution(low, high, log=log) if isinstance(own, int) else FloatDistribution(low, high, log=log)


def _checked(path: str, value: Any, config: Config) -> Any:
    """`value` as the setting has it. Raises SettingError if it is out of the setting's range, or of another type."""
    changed = with_settings(config, {path: value})
    return next(found for name, found, _, _ in describe(changed) if name == path)


def _parse(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        return text.strip()


def _usual_item2vec(config: Config) -> dict[str, str]:
    train = config.train
    return {
        "train.learning_rate": _around(train.learning_rate),
        "model.window": "0,3,5,10",
        "model.negatives": "5,10,20",
        "model.negative_exponent": "-1:1",
        "model.subsample": "0,1e-5,1e-4,1e-3",
        "model.history_decay": "0.4:1",
        "train.epochs": f"{max(1, train.epochs // 2)},{train.epochs},{2 * train.epochs}",
    }


def _usual_two_tower(config: Config) -> dict[str, str]:
    model, train = config.model, config.train
    found = {"train.learning_rate": _around(train.learning_rate)}
    is_softmax = model.objective in ("info_nce", "nt_xent")
    if is_softmax:
        found |= {"model.temperature": "0.03:0.3", "model.logq": "0:1"}
    elif model.objective == "ccl":
        found |= {"model.margin": "0:0.9", "model.negative_weight": "10:1000"}
    else:
        found |= {"model.margin": "0.05:0.8", "model.triplet_negative": "random,semi_hard,hard"}
    if model.in_batch:
        found["train.batch_size"] = f"{max(1, train.batch_size // 2)},{train.batch_size},{2 * train.batch_size}"
        found["model.mask"] = "item,session"
    found["model.sampled_negatives"] = "0,256,1024" if model.in_batch else "256,1024,4096"
    if "history" in model.query and model.history_encoder in ("recency", "attention"):
        found["model.history_decay"] = "0.4:1"
    return found


def _around(rate: float) -> str:
    """A factor of five to both sides."""
    return f"{rate / 5:.3g}:{rate * 5:.3g}"
