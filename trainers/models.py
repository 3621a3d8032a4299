"""What a model is to the loop, and the one place where a config becomes one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cluster.config import Config, ModelSettings
from cluster.errors import SettingError
from embedding_service.keys import Vocabulary
from embedding_service.mapped_tables import MappedTables
from embedding_service.ragged import Ragged
from embedding_service.sharding import MakeTables, ShardedTables
from embedding_service.towers import Given, Tower
from trainers.contrast import TEMPERATURES, ContrastSpec
from trainers.item2vec import Item2Vec
from trainers.mining import MiningSpec
from trainers.model_tables import ModelTables, check_tables, model_tables
from trainers.prepare import Prepared, Sessions, check_feature_names
from trainers.row_runs import RowRuns
from trainers.two_tower import TwoTower


class Plan(Protocol):
    """One window as a fixed sequence of `size` units (examples, or sessions), cut into steps.

    `num_trainable` of them can teach something: a session of one item has no context.
    """

    size: int
    num_trainable: int

    def stop_after(self, offset: int, num_workers: int) -> int: ...
    def batch(self, start: int, stop: int, rank: int = 0, num_workers: int = 1) -> Any: ...


class Step(Protocol):
    """A share of a step, ready to be run by its worker."""

    @property
    def num_examples(self) -> int: ...


class Model(Protocol):
    """`Item2Vec` and `TwoTower`: what `loop`, `checkpoint`, `evaluate` and `export` call."""

    tables: MappedTables
    dense: nn.ModuleDict
    dense_optimizer: torch.optim.Optimizer | None
    query_tower: Tower
    num_items: int
    counts: RowRuns  # int64 by item row, how often training sees each
    similar_set: str

    def plan(self, sessions: Sessions, numbers: tuple[int, ...]) -> Plan: ...
    def prepare(self, batch: Any, seed: int) -> Step: ...
    def step(self, prepared: Any, rate: float) -> tuple[float, int]: ...
    def encode_queries(self, history: Ragged, single: Mapping[str, Given]) -> Tensor: ...
    def encode_items(self, start: int, stop: int) -> Tensor: ...
    def vectors(self, name: str, start: int, stop: int) -> Tensor: ...
    def vector_sets(self) -> dict[str, str]: ...
    def table_rows(self, name: str) -> int: ...
    def table_of(self, name: str) -> str | None: ...


def item_counts(items: Vocabulary) -> RowRuns:
    """How often every row occurs in training, the unknown row included: int64 by row."""
    runs = RowRuns.of(np.asarray(items.counts))
    if items.unknown == "skip":
        return runs
    return RowRuns(np.append(runs.starts, len(runs)), np.append(runs.values, items.dropped), len(runs) + 1)


def check_model(config: Config) -> None:
    """What can be said of the model's settings before any data are read. Raises SettingError."""
    model = config.model
    if model.dim % 4:
        raise SettingError("model.dim", f"must be divisible by 4, which the table kernels ask for; got {model.dim}")
    check_tables(config)
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
    _check_history(model)
    _check_contrast(model)
    if model.id_dropout and not config.data.item_features:
        raise SettingError("model.id_dropout", "leaves nothing of an item without data.item_features; name them")
    if model.id_dropout >= 1.0:
        raise SettingError("model.id_dropout", "must be less than 1: no id would ever be learned")


def check_device(config: Config, device: torch.device) -> None:
    """What a worker's device must be able to do. Raises SettingError."""
    if config.train.matmul == "bf16" and not has_bf16(device):
        raise SettingError(
            "train.matmul", f"is bf16, for which this machine's {device.type} has no instructions: leave it out"
        )


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 by itself: AVX-512 BF16, AMX, ARM's BF16, CUDA from Ampere on."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _check_history(model: ModelSettings) -> None:
    encoder = model.history_encoder
    if encoder == "recency":
        return
    if "history" not in model.query:
        raise SettingError("model.history_encoder", "encodes the history, but model.query does not name it")
    if encoder in ("attention", "gru") and model.history_length < 1:
        raise SettingError(
            "model.history_length", f"0, the whole history, is not for history_encoder = {encoder}: name a length"
        )
    decay = ModelSettings.history_decay
    if encoder != "attention" and model.history_decay != decay:
        raise SettingError(
            "model.history_decay", f"is for recency and attention; model.history_encoder is {encoder}: leave it out"
        )


def _check_contrast(model: ModelSettings) -> None:
    if not model.in_batch and not model.sampled_negatives:
        raise SettingError(
            "model.in_batch", "is false, and there are no other negatives: set model.sampled_negatives as well"
        )
    if not model.in_batch and model.gather:
        raise SettingError("model.gather", "is about in-batch negatives, but model.in_batch is false")
    if not model.in_batch and model.objective == "nt_xent":
        raise SettingError("model.objective", "nt_xent compares items with the batch's queries: set model.in_batch")
    if model.frequency_slots and not (model.in_batch and model.objective in ("info_nce", "nt_xent")):
        raise SettingError(
            "model.frequency_slots", "estimates how often in-batch negatives occur, for model.logq: nothing here asks"
        )
    if model.objective == "ccl" and not model.normalize:
        raise SettingError("model.objective", "ccl compares cosines: set model.normalize")
    if model.learn_temperature and (model.objective == "ccl" or (model.objective == "triplet" and model.margin > 0.0)):
        raise SettingError("model.learn_temperature", f"{model.objective} with a margin has no temperature to learn")
    softmax = model.objective in ("info_nce", "nt_xent")
    idle = {
        "logq": not softmax,
        "logq_positive": not softmax,
        "margin": softmax,
        "negative_weight": model.objective != "ccl",
        "triplet_negative": model.objective != "triplet",
        "sampled_exponent": not model.sampled_negatives,
        **{f"mined_{name}": not model.mined_negatives for name in ("every", "skip", "take", "margin")},
    }
    for name, without_effect in idle.items():
        if without_effect and getattr(model, name) != getattr(ModelSettings, name):
            raise SettingError(f"model.{name}", "has no effect with the other settings of the model: leave it out")
    low, high = TEMPERATURES
    if model.learn_temperature and not low <= model.temperature <= high:
        raise SettingError(
            "model.temperature", f"must be in [{low}, {high}] where it is learned; got {model.temperature}"
        )


def _contrast_spec(config: Config) -> ContrastSpec:
    model = config.model
    return ContrastSpec(
        objective=model.objective,
        in_batch=model.in_batch,
        gather=model.gather,
        sampled_negatives=model.sampled_negatives,
        sampled_exponent=model.sampled_exponent,
        mining=MiningSpec(
            num=model.mined_negatives,
            every=model.mined_every,
            skip=model.mined_skip,
            take=model.mined_take,
            margin=model.mined_margin,
        )
        if model.mined_negatives
        else None,
        temperature=model.temperature,
        learn_temperature=model.learn_temperature,
        logq=model.logq,
        logq_positive=model.logq_positive,
        frequency_slots=model.frequency_slots,
        margin=model.margin,
        negative_weight=model.negative_weight,
        triplet_negative=model.triplet_negative,
        matmul=config.train.matmul,
    )


def tables_of(config: Config, prepared: Prepared) -> ModelTables:
    """The tables of the run's model. Raises SettingError."""
    return model_tables(config, {name: key_map.num_rows for name, key_map in prepared.key_maps.items()})


def build_model(
    config: Config,
    prepared: Prepared,
    *,
    device: torch.device,
    threads: int,
    make_tables: MakeTables = ShardedTables,
    tables: ModelTables | None = None,
) -> Model:
    """The model that `config` describes, with new tables. A collective call. Raises SettingError.

    make_tables: `ShardedTables`, or what else looks rows up, which takes the same arguments. tables: those of the model
    where they lie elsewhere than `config` says; None: as it says.
    """
    check_model(config)
    model, train = config.model, config.train
    counts = item_counts(prepared.keys["item"])
    tables = tables or tables_of(config, prepared)
    if model.kind == "item2vec":
        return Item2Vec(
            counts,
            tables=tables.specs,
            maps=tables.maps,
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
            make_tables=make_tables,
        )
    return TwoTower(
        counts,
        tables=tables.specs,
        maps=tables.maps,
        item_features=prepared.item_features,
        item_values=prepared.item_values,
        query=model.query,
        query_features=prepared.query_features,
        list_pooling=model.list_pooling,
        share_items=model.share_items,
        id_dropout=model.id_dropout,
        history_encoder=model.history_encoder,
        hidden=model.hidden,
        dim=model.dim,
        examples=model.examples,
        mask=model.mask,
        history_decay=model.history_decay,
        history_length=model.history_length,
        training_history_length=train.history_length or model.history_length,
        contrast=_contrast_spec(config),
        normalize=model.normalize,
        batch_size=train.batch_size,
        chunk_size=train.chunk_size,
        optimizer=train.optimizer,
        learning_rate=train.learning_rate,
        dense_learning_rate=train.dense_learning_rate,
        seed=train.seed,
        device=device,
        unknown_row=len(prepared.keys["item"].keys) if prepared.keys["item"].unknown == "row" else -1,
        make_tables=make_tables,
    )
