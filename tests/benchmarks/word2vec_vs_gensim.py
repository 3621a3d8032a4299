"""Word vectors: speed and quality beside gensim and fastText, on the same text with the same settings.

    python -m tests.benchmarks.word2vec_vs_gensim [--quick] [--only words,cbow,merge,fasttext]

Text, vocabulary (min_count 5), dim 100, window 5, 5 negatives, subsampling 1e-3 and epochs are the same; each has its
own learning rate: gensim and fastText their defaults, ours the recipe's. Words per second count all words of the text,
per epoch, over the seconds of training, without the vocabulary's. gensim reads `corpus_file`, which is its fastest way;
fastText (`pip install '.[bench]'`) has its default subwords and its time includes its vocabulary. Ours is `lexshard
train` on the recipe word2vec.toml: reading, sharded tables, checkpoints and all.

    words_ratio, words_ratio_2_workers  words/s of one worker with two threads, and of two with one / gensim's
    cbow_ratio                          the same for CBOW, one worker with two threads
    score_delta_min, _mean              scores less gensim's: WordSim, SimLex, MEN, syntactic and family analogies
    score_drop_8_workers, _32_workers   mean of the scores of one worker less that of 8 and 32, same epochs. Workers are
                                        simulated by threads of one process, which merge as workers do

Speeds are medians of runs that alternate with gensim's, scores their means: each run has a seed of its own. The last
line on standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tests.benchmarks.recipes import RECIPES, data_folder, lexshard, progress
from trainers.words import score_words

DIM, WINDOW, NEGATIVES, SUBSAMPLE, MIN_COUNT = 100, 5, 5, 1e-3, 5
PAIRS = {"wordsim": "wordsim353.tsv", "simlex": "simlex999.txt", "men": "men3000.txt"}
ANALOGIES = "questions-words.txt"
MERGE_BLOCK = 16_384  # items per simulated worker and step

Run = dict[str, Any]  # "words_per_second", "scores"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.word2vec_vs_gensim", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one epoch, one run of each")
    parser.add_argument("--only", default="words,cbow,merge,fasttext", help="parts to run")
    arguments = parser.parse_args()
    epochs, repeats = (1, 1) if arguments.quick else (3, 2)
    parts = arguments.only.split(",")
    if "fasttext" in parts and importlib.util.find_spec("fasttext") is None:
        parser.error("fastText is not installed: pip install '.[bench]', or leave it out: --only words,cbow,merge")
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        bench = Bench(Path(folder), epochs)
        result: dict[str, Any] = {"epochs": epochs, "words": bench.num_words, "cores": os.cpu_count()}
        if "words" in parts:
            result |= compare_words(bench, repeats)
        if "cbow" in parts:
            result |= compare_cbow(bench, repeats)
        if "merge" in parts:
            result |= compare_merges(bench)
        if "fasttext" in parts:
            run = bench.fasttext()
            result |= {"fasttext_words_per_second": run["words_per_second"], "fasttext_scores": run["scores"]}
    print(json.dumps(result | {"wall_seconds": round(time.monotonic() - started, 1)}))


def compare_words(bench: Bench, repeats: int) -> dict[str, Any]:
    runs: dict[str, list[Run]] = {"gensim": [], "1_worker_2_threads": [], "2_workers": []}
    for seed in range(repeats):
        runs["gensim"].append(bench.gensim(cbow=False, seed=seed))
        runs["1_worker_2_threads"].append(bench.ours("train.threads=2", f"train.seed={seed}"))
        runs["2_workers"].append(bench.ours("train.threads=1", "cluster.workers=2", f"train.seed={seed}"))
    speed, scores = {name: median_speed(found) for name, found in runs.items()}, mean_scores(runs)
    deltas = {name: scores["1_worker_2_threads"][name] - scores["gensim"][name] for name in scores["gensim"]}
    return {
        "words_ratio": round(speed["1_worker_2_threads"] / speed["gensim"], 3),
        "words_ratio_2_workers": round(speed["2_workers"] / speed["gensim"], 3),
        "score_delta_min": round(min(deltas.values()), 4),
        "score_delta_mean": round(statistics.mean(deltas.values()), 4),
        "words_per_second": speed,
        "scores": scores,
    }


def compare_cbow(bench: Bench, repeats: int) -> dict[str, Any]:
    settings = ("model.architecture=cbow", "train.learning_rate=0.05", "train.threads=2")
    runs: dict[str, list[Run]] = {"gensim": [], "ours": []}
    for seed in range(repeats):
        runs["gensim"].append(bench.gensim(cbow=True, seed=seed))
        runs["ours"].append(bench.ours(*settings, f"train.seed={seed}"))
    speed, scores = {name: median_speed(found) for name, found in runs.items()}, mean_scores(runs)
    deltas = {name: scores["ours"][name] - scores["gensim"][name] for name in scores["gensim"]}
    return {
        "cbow_ratio": round(speed["ours"] / speed["gensim"], 3),
        "cbow_score_delta_min": round(min(deltas.values()), 4),
        "cbow_score_delta_mean": round(statistics.mean(deltas.values()), 4),
        "cbow_words_per_second": speed,
        "cbow_scores": scores,
    }


def compare_merges(bench: Bench) -> dict[str, Any]:
    scores = {
        num: bench.ours(f"train.threads={num}", f"train.batch_size={num * MERGE_BLOCK}")["scores"] for num in (1, 8, 32)
    }
    mean = {num: statistics.mean(found.values()) for num, found in scores.items()}
    return {
        "score_drop_8_workers": round(mean[1] - mean[8], 4),
        "score_drop_32_workers": round(mean[1] - mean[32], 4),
        "merge_scores": scores,
        "merge_items_per_worker": MERGE_BLOCK,
    }


class Bench:
    """The text as each of the three wants it, and a run of each."""

    def __init__(self, folder: Path, epochs: int) -> None:
        self.data = data_folder() / "text"
        self.folder, self.epochs = folder, epochs
        self.text = folder / "text.txt"
        lines = pq.read_table(self.data / "gutenberg.parquet")["text"].to_pylist()
        self.text.write_text("".join(f"{line}\n" for line in lines))
        self.num_words = sum(len(line.split()) for line in lines)
        warm = folder / "warm.parquet"
        pq.write_table(pa.table({"text": lines[:3000]}), warm)
        for architecture in ("skipgram", "cbow"):  # compiled once, and kept by numba
            self._train(f"data.train={warm}", f"model.architecture={architecture}", "train.epochs=1")

    def ours(self, *settings: str) -> Run:
        trained = self._train(*settings)
        files = [part for name in PAIRS.values() for part in ("--word-pairs", str(self.data / name))]
        analogies = ("--analogies", str(self.data / ANALOGIES))
        report = lexshard(
            ["evaluate", trained["run"], "--which", "last", "--json", *files, *analogies], dict(os.environ)
        )
        return self._run("lexshard " + " ".join(settings), trained["seconds"], report)

    def _train(self, *settings: str) -> dict[str, Any]:
        chosen = [f"run={self.folder}/run", f"train.epochs={self.epochs}", "train.validate_every=0", *settings]
        flags = [part for setting in chosen for part in ("--set", setting)]
        command = ["train", str(RECIPES / "word2vec.toml"), "--fresh", "--json", *flags]
        return lexshard(command, {**os.environ, "LEXSHARD_DATA": str(data_folder())})

    def gensim(self, *, cbow: bool, seed: int) -> Run:
        from gensim.models import Word2Vec

        model = Word2Vec(
            vector_size=DIM, window=WINDOW, negative=NEGATIVES, sample=SUBSAMPLE, min_count=MIN_COUNT,
            sg=int(not cbow), workers=2, epochs=self.epochs, alpha=0.05 if cbow else 0.025, seed=seed + 1,
        )  # fmt: skip
        model.build_vocab(corpus_file=str(self.text))
        started = time.perf_counter()
        model.train(
            corpus_file=str(self.text),
            total_examples=model.corpus_count,
            total_words=model.corpus_total_words,
            epochs=self.epochs,
        )
        seconds = time.perf_counter() - started
        name = "gensim, CBOW" if cbow else "gensim"
        return self._run(name, seconds, self._report(model.wv.index_to_key, model.wv.vectors))

    def fasttext(self) -> Run:
        import fasttext

        started = time.perf_counter()
        model = fasttext.train_unsupervised(
            str(self.text), model="skipgram", dim=DIM, ws=WINDOW, neg=NEGATIVES, t=SUBSAMPLE, minCount=MIN_COUNT,
            epoch=self.epochs, thread=2, verbose=0,
        )  # fmt: skip
        seconds = time.perf_counter() - started
        words = [word for word in model.words if word != "</s>"]
        vectors = np.stack([model.get_word_vector(word) for word in words])
        return self._run("fastText", seconds, self._report(words, vectors))

    def _report(self, words: list[str], vectors: np.ndarray) -> list[dict[str, Any]]:
        """As `lexshard evaluate` scores ours; words: most frequent first."""
        files = [str(self.data / name) for name in PAIRS.values()]
        return score_words(words, vectors, pairs=files, analogies=[str(self.data / ANALOGIES)])

    def _run(self, name: str, seconds: float, report: list[dict[str, Any]]) -> Run:
        rows = {row["what"]: row for row in report}
        scores = {key: rows[str(self.data / file)]["score"] for key, file in PAIRS.items()}
        sections = [row for what, row in rows.items() if is_scored(what) and row["used"]]
        scores["analogies"] = sum(row["score"] * row["used"] for row in sections) / sum(row["used"] for row in sections)
        run = {
            "words_per_second": round(self.num_words * self.epochs / seconds),
            "scores": {key: round(value, 4) for key, value in scores.items()},
        }
        progress(f"{name}: {json.dumps(run)}")
        return run


def is_scored(section: str) -> bool:
    """Whether a section of the analogies counts: the others' names are rare in this text."""
    return section.startswith("gram") or section == "family"


def median_speed(runs: list[Run]) -> int:
    return round(statistics.median(run["words_per_second"] for run in runs))


def mean_scores(runs: dict[str, list[Run]]) -> dict[str, dict[str, float]]:
    return {
        name: {key: round(statistics.mean(run["scores"][key] for run in found), 4) for key in found[0]["scores"]}
        for name, found in runs.items()
    }


if __name__ == "__main__":
    main()
