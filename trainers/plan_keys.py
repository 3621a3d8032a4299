"""How many keys a plan is for: as told, as profiled, or as a run has prepared them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cluster.config import Config
from cluster.errors import DataError, SettingError
from embedding_service.hashed_keys import NUM_IDS
from trainers.key_distribution import KeyDistribution
from trainers.plan import Keys
from trainers.prepare import load_prepared
from trainers.profile import FORMAT

_EXPONENT = 1.0  # of Zipf's law, where nothing is known of the keys


def keys_of(config: Config, told: Mapping[str, int], profile: Mapping[str, Any] | None) -> Keys:
    """The keys of every key map that the model has: the number from `told` (key map -> keys), or else from `profile`
    (see `read_profile`), or else from the run's prepared key maps. How often each is asked for comes from the profile
    or the run, or is assumed.

    Raises SettingError for a key map of which nothing is known, and for one that the model has not.
    """
    columns: Mapping[str, Any] = profile["columns"] if profile is not None else {}
    prepared = None
    if profile is None and (Path(config.run) / "prepared" / "prepared.json").exists():
        prepared = load_prepared(config.run)
    wanted = _wanted(config)
    side = [name for name in (*told, *(prepared.key_maps if prepared else ())) if name.startswith("item_")]
    for name in told:
        if name not in wanted and not (name.startswith("item_") and config.data.item_features):
            raise SettingError(f"--keys {name}", f"this model has no such keys; it has: {', '.join(wanted)}")
    if config.data.item_features and not side and prepared is None:
        raise SettingError(
            "--keys",
            "the columns of data.item_features are not known to a plan: say how many keys each has, item_COLUMN=N "
            "(0 for one without keys)",
        )
    num_ids: dict[str, int] = {}
    distributions: dict[str, KeyDistribution] = {}
    for name in dict.fromkeys([*wanted, *side]):
        chosen = config.tables.get(name)
        found: KeyDistribution | None = None
        if name in told:
            ids = told[name]
        elif name in columns:
            ids = _at_least(columns[name], config.keys.min_count if name == "item" else 1)
        elif prepared is not None:
            if name not in prepared.key_maps:
                continue  # a feature of numbers
            ids = prepared.key_maps[name].num_rows
            if name in prepared.keys:
                found = KeyDistribution.of_counts(np.append(prepared.keys[name].counts, 0)[:ids])
        elif profile is not None and name in profile.get("numbers", ()):
            continue  # a column of numbers has no keys
        elif chosen is not None and not chosen.lists_keys:
            ids = NUM_IDS
        else:
            option = {"item": "--items N", "user": "--users N"}.get(name, f"--keys {name}=N")
            missing = " (the profile has no such column)" if profile is not None else ""
            numbers = ", N = 0 for a column of numbers" if name.startswith("query_") else ""
            raise SettingError(
                option,
                f"how many keys {name} has is not known{missing}: say so{numbers}, or name a profile (`lexshard "
                "profile SESSIONS --output FILE`, then --profile FILE)",
            )
        if ids == 0:
            continue
        if prepared is None and name == "item" and config.keys.unknown == "row":
            ids += 1
        if found is None and name in columns and ids < NUM_IDS:
            found = KeyDistribution.of_profile(columns[name], ids)
        distributions[name] = found or KeyDistribution.zipf(ids, _EXPONENT)
        num_ids[name] = NUM_IDS if chosen is not None and not chosen.lists_keys else ids
    items = profile["lengths"]["mean"] if profile is not None else Keys.session_items
    per_session = {name: column["per_session"] for name, column in columns.items()}
    return Keys(num_ids, distributions, items, per_session)


def read_profile(path: str) -> dict[str, Any]:
    """What `lexshard profile --output` wrote. Raises DataError."""
    try:
        found = json.loads(Path(path).read_text())
        if found["format"] != FORMAT or found["version"] != 1:
            raise ValueError(f"format {found['format']!r}, version {found['version']!r}")
        for column in found["columns"].values():
            if not (column["coverage"] and column["min_count"]):
                raise ValueError("a column has no keys")
        if not all(isinstance(name, str) for name in found.get("numbers", [])):  # which older profiles do not have
            raise ValueError("numbers are not names of columns")
        return {**found, "lengths": {"mean": float(found["lengths"]["mean"])}}
    except FileNotFoundError:
        raise DataError(
            "there is no such profile; `lexshard profile SESSIONS --output FILE` writes one", file=path
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"is not a profile of `lexshard profile`: {error}", file=path) from None


def _wanted(config: Config) -> list[str]:
    """The key maps that the model has for certain."""
    if config.model.kind == "item2vec":
        return ["item"]
    user = ["user"] * ("user" in config.model.query)
    return ["item", *user, *(f"query_{name}" for name in config.data.query_features)]


def _at_least(column: Mapping[str, Any], min_count: int) -> int:
    """Keys that occur so often; of the column's next lower threshold where it has not this one."""
    known = [one for one in column["min_count"] if one["min_count"] <= min_count]
    return max(1, round(float(known[-1]["value"])))
