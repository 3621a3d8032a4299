"""Settings of models that no data are needed to refuse."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from cluster.config import config_from_dict
from cluster.errors import SettingError
from trainers.models import check_device, check_model


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


@pytest.mark.parametrize(("matmul", "instructions", "is_refused"), [
    ("bf16", [], True), ("bf16", ["avx512_f"], True), ("bf16", ["avx512_bf16"], False), ("bf16", ["bf16"], False),
    ("fp32", [], False),
])  # fmt: skip
def test_bfloat16_is_refused_where_the_cpu_has_none(
    matmul: str, instructions: list[str], is_refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    config = config_from_dict({"model": {"kind": "two_tower"}, "train": {"matmul": matmul}})
    with pytest.raises(SettingError, match=r"train\.matmul: is bf16, for") if is_refused else nullcontext():
        check_device(config, torch.device("cpu"))
