"""The one configuration tree: what every setting is called, what it means, and its default.

A run is described by one TOML file whose tables are the sections below; `--set section.name=value` overrides a single
setting; `${NAME}` in a text is the environment variable NAME. `lexshard config` prints this file's documentation
with the values in force. Below the command line nothing sees this tree whole: builders take plain
arguments.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.errors import SettingError

Kind = Literal["item2vec", "two_tower"]


def setting(
    default: Any, doc: str, *, low: float | None = None, high: float | None = None, kind: Kind | None = None
) -> Any:
    """A field with its documentation, for numbers (and lists of them) the closed range they must lie in, and the kind
    of model that it belongs to if it does not concern both.
    """
    metadata = {"doc": doc if kind is None else f"{kind}: {doc}", "low": low, "high": high, "kind": kind}
    if isinstance(default, (dict, list)):
        raise TypeError("defaults are immutable: use a tuple")
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class DataSettings:
    """Where sessions come from and which columns hold what."""

    train: str = setting("", "training sessions: a Parquet / Arrow IPC file, a folder, a glob or an s3:// gs:// URL")
    valid: str = setting("", "validation cases (history + ground truth); empty: held out of train, see holdout")
    test: str = setting("", "test cases, read by `lexshard evaluate` only")
    items: str = setting("items", "column of item keys: list or large_list of int64, string or dictionary")
    text: bool = setting(False, "the column that `items` names holds text in `train`: keys are its words (white space)")
    user: str = setting("", "column of the user key; empty: sessions have no user")
    history: str = setting(
        "history",
        "column of validation / test rows with the items the model may see; empty: the user's training sessions",
    )
    mask_seen: bool = setting(True, "evaluation leaves out what the history holds, as `exclude_seen` does when serving")
    query_features: tuple[str, ...] = setting(
        (),
        "columns of a session for the query tower: integers and strings are categories, lists of these are pooled, "
        "with weights where they are maps to floats, floats are standardised numbers, fixed_size_lists of floats are "
        "vectors",
        kind="two_tower",
    )
    item_features: str = setting(
        "",
        "Parquet side table of items: column `item` plus feature columns, as in query_features (vectors also as lists "
        "of one length). Items that no session has are candidates too",
        kind="two_tower",
    )
    holdout: Literal["none", "items", "last_item", "sessions", "last_sessions"] = setting(
        "none",
        "what validation hides when `valid` is empty: a share of every session's items, each session's last item, "
        "a random share of whole sessions, or the last sessions of the data set",
    )
    holdout_fraction: float = setting(0.05, "share of items or sessions held out", low=0.0, high=0.9)
    bad_rows: Literal["error", "skip"] = setting("error", "a bad row stops the run, or is skipped and counted")
    shuffle_sessions: int = setting(
        131_072, "sessions shuffled together; at most three such windows are in memory", low=1
    )


@dataclass(frozen=True)
class KeySettings:
    """How keys become table rows."""

    min_count: int = setting(1, "keys seen less often than this are unknown", low=1)
    unknown: Literal["skip", "row"] = setting("skip", "unknown keys are left out, or share one trained row")
    budget: str = setting(
        "",
        "memory for all tables and their optimiser state, over all workers, like 2GiB: tables whose map is auto then "
        "share rows where that is not enough; empty: no limit",
    )


@dataclass(frozen=True)
class TableSettings:
    """How the keys of one table find their vectors; a section each, by the table's name."""

    map: Literal["auto", "exact", "hashed", "head_tail", "quotient_remainder", "dynamic"] = setting(
        "auto",
        "exact: every key has its row; hashed: every key is a sum of `hashes` rows that it shares; head_tail: the most "
        "frequent keys have their rows, the others are hashed; quotient_remainder: every key is made of a pair of rows "
        "that only it has; dynamic: keys get rows as they turn up and lose them to others, for user and query features "
        "with `rows`; auto: exact, or head_tail where keys.budget asks for it",
    )
    rows: int = setting(
        0, "rows of the table, of which a dynamic one keeps one for keys without their own; 0: by compression", low=0
    )
    compression: float = setting(0.0, "how many times fewer bytes than exact; 0: by rows", low=0.0)
    head: float = setting(0.5, "head_tail: share of the rows that frequent keys have to themselves", low=0.0, high=1.0)
    hashes: int = setting(2, "hashed, head_tail: rows that a key is the sum of", low=1, high=8)
    learned_weights: bool = setting(False, "hashed, head_tail: every key learns how much of each of its rows it takes")
    combine: Literal["product", "sum"] = setting(
        "product",
        "quotient_remainder: what a key makes of its two rows r and q, r * (1 + q) or r + q; the sum diverges easily, "
        "as very many keys share a q",
    )
    vocabulary: bool = setting(
        True,
        "false: keys are not listed anywhere but hashed as they come, which takes no memory however many there are; "
        "for map = hashed of user and query features, with `rows`",
    )
    admission: int = setting(
        2, "dynamic: how often a key must have been seen, lately, before it may have a row", low=1, high=255
    )
    eviction: Literal["lfu", "lru", "distance_lfu"] = setting(
        "distance_lfu",
        "dynamic: who makes room in a full table, the keys seen least often (lfu), those not seen for the longest time "
        "(lru), or both: times seen by the windows of sessions since (distance_lfu)",
    )
    dim: int = setting(0, "dimension of the table, for towers with hidden layers; 0: model.dim", low=0, high=4096)
    precision: Literal["", "fp32", "fp16"] = setting("", "precision of the table; empty: model.precision")
    disk: str = setting(
        "",
        "folder on a local disk where the table lies, mapped into memory, for one larger than memory on CPU; every "
        "worker needs it; empty: in memory",
    )
    vectors: str = setting(
        "",
        "file of vectors to start from, word2vec's text or binary format (gensim's, too) or Parquet with columns `key` "
        "and `vector`; keys that it does not have start as always",
    )
    frozen: bool = setting(False, "the vectors are not trained: those of `vectors`, or of the run named by train.grow")

    @property
    def lists_keys(self) -> bool:
        """Whether all keys are listed, in a vocabulary, and not hashed as they come."""
        return self.vocabulary and self.map != "dynamic"


@dataclass(frozen=True)
class ModelSettings:
    """What is learned."""

    kind: Literal["item2vec", "two_tower"] = setting("item2vec", "the model")
    dim: int = setting(64, "dimension of the embeddings", low=4, high=4096)
    precision: Literal["fp32", "fp16"] = setting("fp32", "precision of the embedding tables while training")
    history_decay: float = setting(
        0.8, "weight of a history item falls by this factor per step into the past (1: plain mean)", low=0.0, high=1.0
    )
    history_length: int = setting(20, "most recent history items that the query sees; 0: all", low=0)
    architecture: Literal["skipgram", "cbow"] = setting(
        "skipgram", "each context predicts the target, or their mean does (faster)", kind="item2vec"
    )
    window: int = setting(0, "context window in items to each side; 0: the whole session", low=0, kind="item2vec")
    ordered: bool = setting(
        True, "sessions have an order; false: baskets, shuffled anew in every epoch", kind="item2vec"
    )
    negatives: int = setting(10, "negatives per target", low=1, kind="item2vec")
    negative_exponent: float = setting(0.5, "negatives are drawn by count ** this", low=-1.0, high=1.0, kind="item2vec")
    subsample: float = setting(
        0.0, "keys above this share of all events are thinned out; 0: never", low=0.0, kind="item2vec"
    )
    query: tuple[str, ...] = setting(
        ("history",), "what the query tower sees, of user, history, last_item", kind="two_tower"
    )
    history_encoder: Literal["recency", "mean", "last", "attention", "gru"] = setting(
        "recency",
        "how the history becomes one vector: mean weighted by history_decay, plain mean, last item, attention (which "
        "begins as the weighted mean), GRU",
        kind="two_tower",
    )
    list_pooling: Literal["mean", "sum"] = setting(
        "mean", "how the embeddings of a list feature become one", kind="two_tower"
    )
    id_dropout: float = setting(
        0.0,
        "share of the examples whose item is seen by its features alone, so that new items are placed by theirs",
        low=0.0,
        high=1.0,
        kind="two_tower",
    )
    share_items: bool = setting(True, "history and candidates share one item table", kind="two_tower")
    hidden: tuple[int, ...] = setting(
        (), "widths of hidden layers of both towers; empty: no MLP", low=1, kind="two_tower"
    )
    examples: Literal["every_item", "next_item", "last_item"] = setting(
        "next_item",
        "every item of a basket given the others, every item given those before it, or only the last",
        kind="two_tower",
    )
    objective: Literal["info_nce", "nt_xent", "ccl", "triplet"] = setting(
        "info_nce",
        "the loss: softmax of the positive among the candidates, the same in both directions (items look for their "
        "queries too), SimpleX's cosine contrastive loss, or one negative per example at a margin",
        kind="two_tower",
    )
    temperature: float = setting(
        0.1,
        "what similarities are divided by (info_nce, nt_xent, triplet with margin 0)",
        low=1e-3,
        high=10.0,
        kind="two_tower",
    )
    learn_temperature: bool = setting(
        False, "the temperature is learned, from this value on and within [.01, 10]", kind="two_tower"
    )
    in_batch: bool = setting(
        True,
        "the positives of the batch's other examples are candidates; false: only sampled and mined ones",
        kind="two_tower",
    )
    gather: bool = setting(
        False,
        "in-batch candidates are the positives of all workers' batches, not only the worker's own",
        kind="two_tower",
    )
    sampled_negatives: int = setting(
        0, "candidates drawn in every step for all its examples, besides in-batch ones", low=0, kind="two_tower"
    )
    sampled_exponent: float = setting(
        0.0, "they are drawn by count ** this; 0: uniformly", low=-1.0, high=1.0, kind="two_tower"
    )
    mined_negatives: int = setting(
        0,
        "hard candidates drawn in every step from what an index of the items ranks high for the batch's queries; "
        "they come in after one and a half times mined_every steps. Every worker and checkpoint holds two copies of "
        "all item vectors for it",
        low=0,
        kind="two_tower",
    )
    mined_every: int = setting(
        500,
        "steps between two indexes, each built in the background from the current item vectors",
        low=2,
        kind="two_tower",
    )
    mined_skip: int = setting(
        10, "so many of the highest ranks are passed over, as they are full of false negatives", low=0, kind="two_tower"
    )
    mined_take: int = setting(50, "hard candidates are drawn from so many ranks after them", low=1, kind="two_tower")
    mined_margin: float = setting(
        2.0,
        "no hard candidate is more similar to the query than the positive by more than this; negative: it must stay "
        "that far below. Cosines differ by at most 2, so 2 excludes none; without normalize choose a larger one",
        kind="two_tower",
    )
    margin: float = setting(
        0.2,
        "ccl: similarity up to which a negative costs nothing. triplet: by which the positive must be more "
        "similar than the negative; 0: the soft margin log(1 + exp(difference / temperature))",
        low=0.0,
        kind="two_tower",
    )
    triplet_negative: Literal["random", "semi_hard", "hard"] = setting(
        "semi_hard",
        "triplet's negative: any candidate, the most similar that is less similar than the positive, or the most "
        "similar of all",
        kind="two_tower",
    )
    negative_weight: float = setting(
        100.0, "ccl: weight of the negatives' mean against the positive", low=0.0, kind="two_tower"
    )
    mask: Literal["item", "session"] = setting(
        "session",
        "not taken as negatives: the positive item itself, or all items of its session",
        kind="two_tower",
    )
    logq: float = setting(
        1.0,
        "info_nce, nt_xent: strength of the correction of every candidate by the log of how often all sources "
        "together are expected to bring it",
        low=0.0,
        high=1.0,
        kind="two_tower",
    )
    logq_positive: bool = setting(
        False,
        "the positive is corrected as any other candidate (Yi et al. 2019); false: it is not, since it always is one, "
        "so that the loss estimates the softmax over the catalogue",
        kind="two_tower",
    )
    frequency_slots: int = setting(
        0,
        "the correction takes in-batch frequencies from so many hashed counters that follow the training data, "
        "instead of counts; 0: the counts of the items, which are their shares as positives with examples = "
        "every_item and close to them with long sessions",
        low=0,
        kind="two_tower",
    )
    normalize: bool = setting(True, "vectors have unit length", kind="two_tower")


@dataclass(frozen=True)
class TrainSettings:
    """How it is learned."""

    grow: str = setting(
        "",
        "run whose last checkpoint this one begins with: keys that both know keep their vectors, new ones start as "
        "always; empty: none",
    )
    epochs: int = setting(10, "passes over the training sessions", low=1)
    batch_size: int = setting(
        2048, "two_tower: examples per worker and step; item2vec: items per worker and step", low=1
    )
    history_length: int = setting(
        0,
        "most history items an example sees in training (of a basket: that many at random); 0: as served",
        low=0,
        kind="two_tower",
    )
    optimizer: Literal["rowwise_adagrad", "adagrad", "sgd"] = setting(
        "rowwise_adagrad",
        "optimiser of the tables; FBGEMM has no Adam for CPU, so there is none (item2vec always is SGD, as published)",
        kind="two_tower",
    )
    chunk_size: int = setting(
        0,
        "so many examples go through towers and loss at once, for batches larger than memory, to the same gradient; "
        "0: the whole batch",
        low=0,
        kind="two_tower",
    )
    matmul: Literal["fp32", "bf16"] = setting(
        "fp32",
        "numbers in the loss's matrix products; bf16: bfloat16, faster where CPU or GPU has it",
        kind="two_tower",
    )
    learning_rate: float = setting(0.05, "peak learning rate of the tables", low=0.0)
    dense_learning_rate: float = setting(
        1e-3, "peak learning rate of the towers' weights (Adam)", low=0.0, kind="two_tower"
    )
    warmup: float = setting(0.0, "share of the training over which the rate rises to its peak", low=0.0, high=1.0)
    decay: Literal["linear", "cosine"] = setting("linear", "how the rate falls from its peak to its end")
    final_rate: float = setting(0.0, "share of the peak rate at the end of the decay; 1: constant", low=0.0, high=1.0)
    init_scale: float = setting(
        0.0, "tables start uniform in +-this; 0: 1/(2 dim) for item2vec, 1/sqrt(dim) for two_tower"
    )
    seed: int = setting(0, "every random choice follows from this", low=0)
    threads: int = setting(
        0,
        "threads per worker; 0: all cores divided by workers. Item2vec's result depends on their number, and is the "
        "same bit by bit for one number",
        low=0,
    )
    validate_every: int = setting(1, "epochs between validations; 0: never", low=0)
    validate_cases: int = setting(10_000, "at most this many validation cases are scored", low=1)
    metric: str = setting("recall@20", "validation metric that picks the best checkpoint")
    patience: int = setting(0, "stop after this many validations without improvement; 0: never", low=0)
    checkpoint_seconds: float = setting(
        120.0, "time between checkpoints; one is always written at an epoch's end", low=0.0
    )
    report_seconds: float = setting(10.0, "time between lines of progress where there is no terminal", low=0.0)
    keep_checkpoints: int = setting(2, "checkpoints kept besides the best", low=1)


@dataclass(frozen=True)
class ClusterSettings:
    """Where it is learned."""

    workers: int = setting(1, "workers; 1 runs inline without Ray unless `engine` says otherwise", low=1)
    engine: Literal["auto", "inline", "ray"] = setting("auto", "auto: inline for one worker, Ray Train for more")
    device: Literal["auto", "cpu", "cuda"] = setting("auto", "auto: cuda where there is one")
    uvm_caching: bool = setting(
        False,
        "cuda: tables lie in the machine's memory, and the GPU holds a cache of a fifth of their rows (FBGEMM's UVM "
        "caching): larger tables, slower steps",
    )
    address: str = setting("", "Ray cluster to join (`auto`, or host:port); empty: a local one is started")
    max_failures: int = setting(
        3, "restarts after a worker's death before the run gives up; -1: no limit. Errors are not retried", low=-1
    )


@dataclass(frozen=True)
class ExportSettings:
    """What is published."""

    precision: Literal["fp32", "fp16", "int8"] = setting("fp16", "precision of the exported vectors")
    index: str = setting(
        "auto", "FAISS factory string (`HNSW32`, `IVF4096,PQ32x4fs`, `Flat`...); auto: by size and memory_gib"
    )
    memory_gib: float = setting(
        0.0, "GiB that building an index may take: auto keeps within it, others are refused; 0: no limit", low=0.0
    )
    index_shards: int = setting(
        1,
        "parts of each index, built one after the other within memory_gib each, for serve.shards to hold; 1: one piece",
        low=1,
        high=1024,
    )
    index_device: Literal["auto", "cpu", "gpu"] = setting(
        "auto", "where an index is built; auto: the GPU where there is one and FAISS has this kind for it"
    )
    recall_target: float = setting(
        0.95,
        "search parameters are set to the fastest that reach this recall of exact search, on validation sessions",
        low=0.0,
        high=1.0,
    )
    recall_k: int = setting(20, "k of that recall", low=1)
    threads: int = setting(
        0, "threads that export shards and build indexes where there is no Ray cluster; 0: one per core", low=0
    )
    map: Literal["pca", "umap"] = setting(
        "pca", "how the page draws the catalogue; umap: needs umap-learn, and minutes"
    )
    attributes: str = setting(
        "",
        "Parquet side table to filter answers by: `item`, and columns of strings, whole numbers or true / false",
    )
    cases: str = setting("", "Parquet of held-out sessions, `history` and `items`, published along for serve.gates")


@dataclass(frozen=True)
class GateSettings:
    """What a version must show before it goes live while the service runs; a limit of 0 lets everything pass."""

    min_ann_recall: float = setting(0.9, "least recall of its indexes against exact search", low=0.0, high=1.0)
    min_recall_ratio: float = setting(0.95, "least catalogue recall on `cases`, as a share of the live one's", low=0.0)
    min_coverage: float = setting(0.8, "least share of the live version's keys that it has", low=0.0, high=1.0)
    min_alignment: float = setting(
        0.0, "least mean cosine of shared items with the live version after orthogonal alignment", low=0.0, high=1.0
    )
    min_overlap: float = setting(0.02, "least share of neighbours that shared items keep", low=0.0, high=1.0)
    cases: str = setting("", "Parquet of held-out sessions, `history` and `items`; empty: the version's cases.parquet")
    recall_k: int = setting(20, "recall@k of min_recall_ratio", low=1, high=1000)
    overlap_k: int = setting(10, "neighbours of min_overlap", low=1, high=1000)
    sample: int = setting(1000, "shared items that alignment and overlap are measured on", low=1, high=100_000)
    max_cases: int = setting(5000, "held-out sessions that are asked at most, evenly spread", low=1)


@dataclass(frozen=True)
class ServeSettings:
    """How it is asked."""

    host: str = setting("127.0.0.1", "address to bind")
    port: int = setting(8000, "port to bind", low=1, high=65535)
    grpc_port: int = setting(
        0, "port of the gRPC service (retrieval.proto) on the same address; 0: none", low=0, high=65535
    )
    replicas: int = setting(
        1, "replicas of the retrieval deployment; the least number where max_replicas is set", low=1
    )
    max_replicas: int = setting(0, "Serve adds replicas under load, up to this many; 0: always `replicas`", low=0)
    target_ongoing_requests: float = setting(
        32.0,
        "requests at a time per replica that Serve aims at with max_replicas: at most half of what HAProxy passes on, "
        "as Serve does not see those that wait there",
        low=0.01,
        high=32.0,
    )
    shards: int = setting(
        0, "processes that hold a part of each index (see export.index_shards); 0: every replica holds all", low=0
    )
    on_lost_shard: Literal["error", "partial"] = setting(
        "error", "while a shard does not answer: 503, or what the others have, marked as partial"
    )
    shard_timeout_seconds: float = setting(5.0, "within which a shard answers; else it is lost", low=0.001)
    max_k: int = setting(1000, "largest k a request may ask for", low=1)
    max_batch: int = setting(10_000, "most queries in one request", low=1)
    max_body_bytes: int = setting(32 * 2**20, "largest request body", low=1024)
    token_file: str = setting("", "file with the token that changes ask for; empty: the environment's LEXSHARD_TOKEN")
    read_token_file: str = setting(
        "", "file with the token that questions ask for; empty: LEXSHARD_READ_TOKEN, and without it they are open"
    )
    feedback_token_file: str = setting(
        "", "file with the token that clicks are told with; empty: LEXSHARD_FEEDBACK_TOKEN, and without it as questions"
    )
    runs: str = setting("", "folder whose runs the service exports when it is asked to; empty: it exports none")
    metrics_port: int = setting(
        0, "where Prometheus asks for metrics, on 127.0.0.1; 0: any free port, told at start", low=0, high=65535
    )
    probe_seconds: float = setting(
        60.0, "seconds between two measurements of the live indexes' recall on real queries; 0: none", low=0.0
    )
    probe_margin: float = setting(
        0.05, "warn when that recall is this far below what export has measured", low=0.0, high=1.0
    )
    log_format: Literal["text", "json"] = setting("text", "lines of the log: for people, or JSON objects for programs")
    log_level: Literal["info", "warning"] = setting("info", "least level of a line; warning: no events but these")
    log_file: str = setting("", "file that events, warnings and errors are appended to; empty: stderr")
    access_log: bool = setting(False, "write a line for each request, which costs throughput")
    gates: GateSettings = GateSettings()


@dataclass(frozen=True)
class Config:
    """One run."""

    run: str = setting("runs/default", "folder of the run, local or mounted: checkpoints, metrics, artifacts")
    data: DataSettings = DataSettings()
    keys: KeySettings = KeySettings()
    tables: dict[str, TableSettings] = field(default_factory=dict)  # item, user, query_<feature>, item_<feature>
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    cluster: ClusterSettings = ClusterSettings()
    export: ExportSettings = ExportSettings()
    serve: ServeSettings = ServeSettings()


def load_config(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The config of a TOML `file` (None: all defaults) with `section.name=value` overrides applied, checked.

    Raises SettingError naming the path of the first setting that is unknown, mistyped or out of range.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            tree = tomllib.loads(Path(file).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingError(str(file), "there is no such config file") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise SettingError(str(file), f"is not a readable TOML file: {error}") from None
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals:
            raise SettingError(override, "an override is written section.name=value")
        _put(tree, path.strip(), _parse_value(text.strip()))
    return config_from_dict(_expand(tree, ""))


def config_from_dict(tree: Mapping[str, Any]) -> Config:
    """The checked config of a nested mapping (as TOML or JSON gives it). Raises SettingError."""
    config = typing.cast(Config, _build(Config, tree, ""))
    if "://" in config.run:
        raise SettingError(
            "run", f"must be a local or mounted folder, which checkpoints need; got {config.run} (sessions may be URLs)"
        )
    for path, spec, value in _leaves(config, ""):
        kind = spec.metadata["kind"]
        if kind not in (None, config.model.kind) and value != spec.default:
            raise SettingError(path, f"belongs to {kind}, but model.kind is {config.model.kind}; leave it out")
    return config


def config_to_dict(config: Config) -> dict[str, Any]:
    """The nested mapping of `config`, of JSON types only; `config_from_dict` is its inverse."""
    return typing.cast(dict[str, Any], json.loads(json.dumps(dataclasses.asdict(config))))


def describe(config: Config) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, value, default, documentation) of every setting, in the order of the tree."""
    for path, spec, value in _leaves(config, ""):
        yield path, value, spec.default, spec.metadata["doc"]


def to_toml(config: Config) -> str:
    """`config` as a TOML file with every setting's documentation as a comment."""
    lines: list[str] = []
    section = ""
    for path, value, _, doc in describe(config):
        parents, _, name = path.rpartition(".")
        if parents != section:
            section = parents
            lines += ["", f"[{section}]"]
        lines += [f"# {doc}", f"{name} = {_toml_value(value)}"]
    if not config.tables:
        lines += ["", "# a table of its own kind: item (history, too), user, query_<feature> or item_<feature>"]
        lines.append("# [tables.item]")
        for spec in dataclasses.fields(TableSettings):
            lines += [f"# # {spec.metadata['doc']}", f"# {spec.name} = {_toml_value(spec.default)}"]
    return "\n".join(lines).lstrip() + "\n"


def _toml_value(value: Any) -> str:
    """JSON is TOML, but for characters beyond 16 bits, which JSON escapes in halves, and DEL, which it does not."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _expand(value: Any, path: str) -> Any:
    """`value` with `${NAME}` in its texts replaced by environment variables. Raises SettingError for an unset one."""
    if isinstance(value, Mapping):
        return {name: _expand(part, f"{path}.{name}".lstrip(".")) for name, part in value.items()}
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise SettingError(path, f"names the environment variable {match[1]}, which is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", variable, value)


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    for spec in dataclasses.fields(node):
        value = getattr(node, spec.name)
        path = f"{prefix}{spec.name}"
        if dataclasses.is_dataclass(value):
            yield from _leaves(value, f"{path}.")
        elif isinstance(value, dict):
            for name, part in value.items():
                yield from _leaves(part, f"{path}.{name}.")
        else:
            yield path, spec, value


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *parents, name = path.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise SettingError(path, f"`{parent}` is not a section")
    node[name] = value


def _parse_value(text: str) -> Any:
    """A TOML value; a bare word is a string, so that quotes are not needed on a command line."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _build(cls: type, tree: Any, prefix: str) -> Any:
    if not isinstance(tree, Mapping):
        raise SettingError(prefix.rstrip("."), f"is a section, not a value ({tree!r})")
    specs = {spec.name: spec for spec in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    values = {}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if name not in specs:
            raise SettingError(path, _unknown(name, list(specs)))
        if dataclasses.is_dataclass(hints[name]):
            values[name] = _build(typing.cast(type, hints[name]), value, f"{path}.")
        elif typing.get_origin(hints[name]) is dict:  # sections that the user names
            if not isinstance(value, Mapping):
                raise SettingError(path, f"holds sections, not a value ({value!r})")
            part = typing.get_args(hints[name])[1]
            for one in value:
                if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", one):
                    raise SettingError(f"{path}.{one}", "is no section's name: letters, digits and _")
            values[name] = {one: _build(part, value[one], f"{path}.{one}.") for one in sorted(value)}
        else:
            values[name] = _check(path, value, hints[name], specs[name].metadata)
    return cls(**values)


def _unknown(name: str, known: list[str]) -> str:
    import difflib

    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean `{close[0]}`?" if close else f"known here: {', '.join(known)}"
    return f"there is no such setting; {hint}"


def _check(path: str, value: Any, hint: Any, metadata: Mapping[str, Any]) -> Any:
    """`value` converted to the type `hint` and held against the field's range. Raises SettingError."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise SettingError(path, f"must be one of {', '.join(map(str, choices))}; got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, (list, tuple)):
            raise SettingError(path, f"must be a list; got {value!r}")
        return tuple(_check(f"{path}[{i}]", item, typing.get_args(hint)[0], metadata) for i, item in enumerate(value))
    if origin is types.UnionType:
        raise TypeError(f"{path}: unions are not used in the config tree")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if hint is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise SettingError(path, f"must be {_TYPE_NAMES[hint]}; got {value!r}")
    low, high = metadata.get("low"), metadata.get("high")
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(path, f"must be a finite number; got {value}")
    if (low is not None and value < low) or (high is not None and value > high):
        bounds = f"at least {low}" if high is None else f"at most {high}" if low is None else f"in [{low}, {high}]"
        raise SettingError(path, f"must be {bounds}; got {value!r}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
