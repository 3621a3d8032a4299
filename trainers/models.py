"""What a model is to the loop, and the one place where a config becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cluster.config import Config
from cluster.errors import SettingError
from embedding_service.keys import Vocabulary
from embedding_service.ragged import Ragged
from embedding_service.sharding import ShardedTables
from embedding_service.towers import Tower
from trainers.item2vec import Item2Vec
from trainers.prepare import Prepared, Sessions, check_feature_names
from trainers.two_tower import TwoTower


class Plan(Protocol):
    """One window as a fixed sequence of `size` units (examples, or sessions), cut into steps.

    `num_trainable` of them can teach something: a session of one item has no context.
    """

    size: int
    num_trainable: int

    def stop_after(self, offset: int, num_workers: int) -> int: ...
    def share(self, start: int, stop: int, rank: int, num_workers: int) -> tuple[int, int]: ...
    def batch(self, start: int, stop: int) -> Any: ...


class Step(Protocol):
    """A share of a step, ready to be run by its worker."""

    @property
    def num_examples(self) -> int: ...


class Model(Protocol):
    """`Item2Vec` and `TwoTower`: what `loop`, `checkpoint`, `evaluate` and `export` call."""

    tables: ShardedTables
    dense: nn.ModuleDict
    dense_optimizer: torch.optim.Optimizer | None
    query_tower: Tower
    num_items: int
    similar_set: str

    def plan(self, sessions: Sessions, numbers: tuple[int, ...]) -> Plan: ...
    def prepare(self, batch: Any, seed: int) -> Step: ...
    def step(self, prepared: Any, rate: float) -> tuple[float, int]: ...
    def encode_queries(self, history: Ragged, single: Mapping[str, np.ndarray]) -> Tensor: ...
    def encode_items(self, start: int, stop: int) -> Tensor: ...
    def vectors(self, name: str, start: int, stop: int) -> Tensor: ...
    def vector_sets(self) -> dict[str, str]: ...
    def table_rows(self, name: str) -> int: ...


def item_counts(items: Vocabulary) -> np.ndarray:
    """How often every row occurs in training, the unknown row included: int64 [rows]."""
    counts = np.asarray(items.counts)
    return counts if items.unknown == "skip" else np.append(counts, items.dropped)


def check_model(config: Config) -> None:
    """What can be said of the model's settings before any data are read. Raises SettingError."""
    model = config.model
    if model.dim % 4:
        raise SettingError("model.dim", f"must be divisible by 4, which the table kernels ask for; got {model.dim}")
    if model.kind == "item2vec":
        return
    known = ("user", "history", "last_item")
    if not model.query and not config.data.query_features:
        raise SettingError("model.query", f"is empty, and so is data.query_features; name some of {', '.join(known)}")
    for source in model.query:
        if source not in known:
            raise SettingError("model.query", f"`{source}` is none of {', '.join(known)}")
    if len(set(model.query)) != len(model.query):
        raise SettingError("model.query", f"names something twice: {', '.join(model.query)}")
    if "user" in model.query and not config.data.user:
        raise SettingError("model.query", "asks for the user, but data.user names no column")
    check_feature_names("data.query_features", config.data.query_features)


def build_model(config: Config, prepared: Prepared, *, device: torch.device, threads: int) -> Model:
    """The model that `config` describes, with new tables. A collective call. Raises SettingError."""
    check_model(config)
    model, train = config.model, config.train
    counts = item_counts(prepared.keys["item"])
    if model.kind == "item2vec":
        return Item2Vec(
            counts,
            dim=model.dim,
            precision=model.precision,
            init_scale=train.init_scale,
            cbow=model.architecture == "cbow",
            window=model.window,
            ordered=model.ordered,
            num_negatives=model.negatives,
            negative_exponent=model.negative_exponent,
            subsample=model.subsample,
            history_decay=model.history_decay,
            history_length=model.history_length,
            block_items=train.batch_size,
            learning_rate=train.learning_rate,
            seed=train.seed,
            threads=threads,
            device=device,
        )
    return TwoTower(
        counts,
        rows={name: vocabulary.num_rows for name, vocabulary in prepared.keys.items()},
        item_features=prepared.item_features,
        query=model.query,
        query_features=config.data.query_features,
        share_items=model.share_items,
        hidden=model.hidden,
        dim=model.dim,
        precision=model.precision,
        init_scale=train.init_scale,
        examples=model.examples,
        mask=model.mask,
        history_decay=model.history_decay,
        history_length=model.history_length,
        training_history_length=train.history_length or model.history_length,
        temperature=model.temperature,
        logq=model.logq,
        normalize=model.normalize,
        batch_size=train.batch_size,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        dense_learning_rate=train.dense_learning_rate,
        seed=train.seed,
        device=device,
    )
