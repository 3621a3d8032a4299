"""Settings of models that no data are needed to refuse."""

from __future__ import annotations

from typing import Any

import pytest

from cluster.config import config_from_dict
from cluster.errors import SettingError
from trainers.models import check_model


def check(**model: Any) -> None:
    data = {"item_features": "items.parquet"} if model.pop("side_table", False) else {}
    check_model(config_from_dict({"model": {"kind": "two_tower", **model}, "data": data}))


@pytest.mark.parametrize("encoder", ["recency", "mean", "last", "attention", "gru"])
def test_every_history_encoder_may_be_asked_for(encoder: str) -> None:
    check(history_encoder=encoder)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"history_encoder": "gru", "query": ["last_item"]}, r"model\.history_encoder: encodes the history, but"),
        ({"history_encoder": "gru", "history_length": 0}, r"model\.history_length: 0, the whole history, is not for"),
        ({"history_encoder": "attention", "history_length": 0}, r"model\.history_length: .*name a length"),
        ({"history_encoder": "mean", "history_decay": 0.5}, r"model\.history_decay: is for recency and attention"),
        ({"history_encoder": "gru", "history_decay": 0.5}, r"model\.history_decay: is for recency and attention"),
        ({"id_dropout": 0.5}, r"model\.id_dropout: leaves nothing of an item without data\.item_features"),
        ({"id_dropout": 1.0, "side_table": True}, r"model\.id_dropout: must be less than 1"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(model: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        check(**model)


def test_settings_that_fit_are_not() -> None:
    check(history_encoder="attention", history_decay=0.5, id_dropout=0.3, side_table=True)
    check(history_encoder="mean", history_length=0)
