"""Item2Vec beside gensim on the same sessions, with the same tuning budget: quality on test and seconds of training.

    python -m tests.benchmarks.item2vec_quality [--dataset gowalla|diginetica] [--trials 4] [--folder DIR] [--quick]

Both sides try the same settings on the same validation cases: the recipe's of deploy/recipes/, word2vec's own, and
random ones (`Settings.drawn`). The best of each is trained on all of train and scored once on test. gensim has two
threads, as ours; where sessions are baskets, its corpus has every epoch's own shuffle, as ours has. Its vectors are
queried in two ways, each with settings of its own choice:

    usual       cosine of input vectors with the mean of the history's unit vectors: gensim's `most_similar`
    our_query   output vectors by inner product with the (recency-weighted) mean of the history's input vectors

    gowalla_recall20, diginetica_p20    ours, on test (Diginetica: %)
    <data set>  {"ours" | "gensim_usual" | "gensim_our_query": {metrics on test, "seconds" of training, "settings",
                "validation"}}

With `--folder` trials are kept there, and a further call goes on behind them. Test data are read for the settings that
validation chose, and for no others. The last line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cluster.config import Config, load_config
from embedding_service.exact import unit_length
from embedding_service.ragged import Ragged
from embedding_service.towers import recency_weights
from tests.benchmarks.recipes import RECIPES, Kept, data_folder, run_recipe, train_recipe
from trainers.cases import Cases, load_cases, load_validation
from trainers.metrics import mean_metrics
from trainers.prepare import Prepared, holdout_of, load_prepared, open_reader, prepare

Json = dict[str, Any]
Array = npt.NDArray[np.float32]

METRICS = {"gowalla": ("recall@20", "ndcg@20"), "diginetica": ("hit_rate@20", "mrr@20")}
HOLDOUTS = {"gowalla": "items", "diginetica": "last_sessions"}
USES = ("usual", "our_query")


@dataclass(frozen=True)
class Settings:
    """What both sides know by the same name."""

    window: int
    negatives: int
    negative_exponent: float
    history_decay: float
    learning_rate: float
    epochs: int

    @classmethod
    def of_recipe(cls, dataset: str) -> Settings:
        recipe = tomllib.loads((RECIPES / f"{dataset}_item2vec.toml").read_text())
        values = {**recipe["model"], **recipe["train"]}
        return cls(**{name: values[name] for name in cls.__dataclass_fields__})

    @classmethod
    def of_word2vec(cls, dataset: str) -> Settings:
        """Mikolov et al. 2013 and word2vec.c, for as many epochs as the recipe's."""
        return cls(5, 5, 0.75, 1.0, 0.025, cls.of_recipe(dataset).epochs)

    @classmethod
    def drawn(cls, dataset: str, number: int) -> Settings:
        """A draw from what Caselles-Dupré et al. (RecSys 2018) find to matter, the same for both sides."""
        random, recipe = np.random.default_rng(number), cls.of_recipe(dataset)
        return cls(
            int(random.choice([3, 5, 10, 20])),
            int(random.choice([5, 10, 20])),
            float(random.choice([-0.5, 0.0, 0.25, 0.5, 0.75])),
            float(random.choice([0.6, 0.8, 1.0])) if recipe.history_decay < 1 else 1.0,  # baskets have no order
            float(random.choice([0.025, 0.05, 0.075])),
            max(1, int(recipe.epochs * random.choice([0.5, 1.0]))),
        )

    @classmethod
    def trials(cls, dataset: str, num: int) -> list[Settings]:
        first = [cls.of_recipe(dataset), cls.of_word2vec(dataset)]
        return [*first, *(cls.drawn(dataset, number) for number in range(2, num))][:num]

    def flags(self) -> list[str]:
        return [f"{'train' if key in TRAIN else 'model'}.{key}={value}" for key, value in asdict(self).items()]


TRAIN = ("learning_rate", "epochs")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.item2vec_quality", description=__doc__)
    parser.add_argument("--dataset", choices=sorted(METRICS), action="append", help="default: all")
    parser.add_argument("--trials", type=int, default=4, help="settings that each side tries on validation data")
    parser.add_argument("--folder", type=Path, help="where trials are kept from call to call")
    parser.add_argument("--quick", action="store_true", help="one trial of one epoch")
    arguments = parser.parse_args()
    began = time.monotonic()
    result: Json = {"trials": 1 if arguments.quick else arguments.trials}
    for dataset in arguments.dataset or sorted(METRICS):
        with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
            side_by_side = SideBySide(
                dataset, Path(folder), Kept(arguments.folder, "item2vec_quality"), quick=arguments.quick
            )
            result[dataset] = side_by_side.compare(result["trials"])
    ours = {dataset: result[dataset]["ours"][metrics[0]] for dataset, metrics in METRICS.items() if dataset in result}
    bars = {
        "gowalla_recall20": round(ours["gowalla"], 4) if "gowalla" in ours else None,
        "diginetica_p20": round(100 * ours["diginetica"], 2) if "diginetica" in ours else None,
    }
    print(json.dumps(bars | result | {"wall_seconds": round(time.monotonic() - began)}))


class SideBySide:
    """Both sides on one data set, in an empty `folder`."""

    def __init__(self, dataset: str, folder: Path, kept: Kept, *, quick: bool) -> None:
        self.dataset, self.recipe, self.folder, self.quick = dataset, f"{dataset}_item2vec", folder, quick
        self.kept = kept
        data_folder()  # ends here, in words, where there are no data
        self.metrics = METRICS[dataset]

    def compare(self, num_trials: int) -> Json:
        trials = Settings.trials(self.dataset, num_trials)
        if self.quick:
            trials = [Settings(**{**asdict(one), "epochs": 1}) for one in trials]
        ours, gensim = {}, {}
        for one in trials:
            ours[one] = self._kept(f"ours {one}", lambda one=one: self._our_validation(one))
            gensim[one] = self._kept(f"gensim {one}", lambda one=one: self._gensim(one, is_test=False))
        best = max(trials, key=lambda one: float(ours[one]))
        found = {"ours": self._figures(best, ours[best], self._kept(f"test ours {best}", lambda: self._ours(best)))}
        for use in USES:
            best = max(trials, key=lambda one, use=use: float(gensim[one][use][self.metrics[0]]))
            test = self._kept(f"test gensim {best}", lambda best=best: self._gensim(best, is_test=True))
            row = {**test[use], "seconds": test["seconds"]}
            found[f"gensim_{use}"] = self._figures(best, gensim[best][use][self.metrics[0]], row)
        return found

    def _kept(self, name: str, measure: Callable[[], Any]) -> Any:
        return self.kept.get(self.recipe, name, measure)

    def _figures(self, settings: Settings, validation: float, test: Json) -> Json:
        return {**test, "validation": round(validation, 4), "settings": asdict(settings)}

    def _our_validation(self, settings: Settings) -> float:
        run = train_recipe(self.recipe, *settings.flags(), f"train.validate_every={settings.epochs}", *self._holdout())
        return float(run["validations"][-1][self.metrics[0]])

    def _ours(self, settings: Settings) -> Json:
        run = run_recipe(self.recipe, "20", *settings.flags(), "train.checkpoint_seconds=3600")
        return {name: round(run["metrics"][name], 4) for name in self.metrics} | {"seconds": run["seconds"]}

    def _holdout(self) -> list[str]:
        metric = f"train.metric={self.metrics[0]}"
        return [f"data.holdout={HOLDOUTS[self.dataset]}", metric, "train.checkpoint_seconds=3600"]

    def _gensim(self, settings: Settings, *, is_test: bool) -> Json:
        """{"usual" | "our_query": metrics, "seconds" of training without the vocabulary's}."""
        config, prepared, cases = self._prepared(is_test=is_test)
        corpus = self.folder / "corpus.txt"
        copies = 1 if config.model.ordered else settings.epochs
        num_sessions = _write_corpus(config, prepared, corpus, copies)
        inputs, outputs, seconds = _train_gensim(
            corpus, settings, 1 if copies > 1 else settings.epochs, num_sessions, dim=config.model.dim
        )
        history, weights = cases.history, recency_weights(cases.history.offsets, settings.history_decay)
        unit = unit_length(inputs)
        queries = {
            "usual": (_weighted_means(unit, history, recency_weights(history.offsets, 1.0)), unit),
            "our_query": (_weighted_means(inputs, history, weights), outputs),
        }
        found: Json = {}
        for use, (query, candidates) in queries.items():
            ranked = _ranked(query, candidates, 20, history if config.data.mask_seen else None)
            values = mean_metrics(ranked, cases.truth, self.metrics)
            found[use] = {name: round(value, 4) for name, value in values.items()}
        return found | {"seconds": round(seconds, 1)}

    def _prepared(self, *, is_test: bool) -> tuple[Config, Prepared, Cases]:
        """The recipe's sessions and cases, as `lexshard train` reads them: of validation, or of test with all of
        train."""
        run = self.folder / ("all" if is_test else "validation")
        settings = [f"run={run}", *([] if is_test else self._holdout())]
        config = load_config(RECIPES / f"{self.dataset}_item2vec.toml", settings)
        prepare(config, open_reader(config), is_begun=False)
        prepared = load_prepared(run)
        if is_test:
            return config, prepared, load_cases(config, prepared.key_maps, {}, config.data.test)
        cases = load_validation(config, prepared)
        assert cases is not None
        return config, prepared, cases


def _write_corpus(config: Config, prepared: Prepared, file: Path, copies: int) -> int:
    """Training sessions as gensim's `corpus_file`, words being rows; `copies` of all, each shuffled anew inside the
    sessions if there are several. Returns the number of lines."""
    reader, random, num = open_reader(config), np.random.default_rng(config.train.seed), 0
    holdout = holdout_of(config, reader.num_sessions)
    sessions = Ragged.concat([prepared.rows(holdout.training(batch)).items for batch in reader.stream()])
    with file.open("w") as out:
        for _ in range(copies):
            values, owners = np.asarray(sessions.values), sessions.owners()
            if copies > 1:
                values = values[np.lexsort((random.random(len(values)), owners))]
            for start, stop in zip(sessions.offsets[:-1], sessions.offsets[1:], strict=True):
                if stop > start + 1:
                    out.write(" ".join(map(str, values[start:stop])) + "\n")
                    num += 1
    return num


def _train_gensim(
    corpus: Path, settings: Settings, epochs: int, num_sessions: int, *, dim: int
) -> tuple[Array, Array, float]:
    """Input and output vectors by row, float32 [rows, dim], and seconds of training."""
    from gensim.models import Word2Vec

    model = Word2Vec(
        vector_size=dim, window=settings.window, negative=settings.negatives, ns_exponent=settings.negative_exponent,
        alpha=settings.learning_rate, epochs=epochs, sg=1, sample=0, min_count=1, workers=2, seed=0,
    )  # fmt: skip
    model.build_vocab(corpus_file=str(corpus))
    started = time.perf_counter()
    model.train(
        corpus_file=str(corpus), total_examples=num_sessions, total_words=model.corpus_total_words, epochs=epochs
    )
    seconds = time.perf_counter() - started
    rows = np.array([int(word) for word in model.wv.index_to_key])
    inputs, outputs = (np.zeros((rows.max() + 1, dim), np.float32) for _ in range(2))
    inputs[rows], outputs[rows] = model.wv.vectors, model.syn1neg
    return inputs, outputs, seconds


def _weighted_means(vectors: Array, history: Ragged, weights: npt.NDArray[np.floating]) -> Array:
    """float32 [n, dim]: sum of weights x vectors over every history; unknown items are left out."""
    rows = np.asarray(history.values)
    known = (rows >= 0) & (rows < len(vectors))
    means = np.zeros((len(history), vectors.shape[1]), np.float32)
    for first in range(0, len(rows), 1_000_000):
        part = slice(first, first + 1_000_000)
        chosen, owners = known[part], history.owners()[part]
        values = vectors[rows[part][chosen]] * weights[part][chosen, None].astype(np.float32)
        np.add.at(means, owners[chosen], values)
    return means


def _ranked(queries: Array, candidates: Array, k: int, seen: Ragged | None) -> npt.NDArray[np.int64]:
    """The k best rows of each query by inner product, best first: int64 [n, k]; seen ones last."""
    ranked = np.empty((len(queries), k), np.int64)
    for first in range(0, len(queries), 1024):
        scores = queries[first : first + 1024] @ candidates.T
        if seen is not None:
            part = seen.slice(first, first + len(scores))
            rows = np.asarray(part.values)
            known = (rows >= 0) & (rows < len(candidates))
            scores[part.owners()[known], rows[known]] = -np.inf
        top = np.argpartition(-scores, k, axis=1)[:, :k]
        order = np.argsort(-np.take_along_axis(scores, top, 1), axis=1, kind="stable")
        ranked[first : first + len(scores)] = np.take_along_axis(top, order, 1)
    return ranked


if __name__ == "__main__":
    main()
