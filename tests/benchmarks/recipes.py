"""What the recipe benchmarks share: a recipe trained from raw Parquet through `lexshard`, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).parents[2] / "deploy" / "recipes"


def data_folder() -> Path:
    """The folder of the public data sets, which LEXSHARD_DATA names; without it the benchmark ends here."""
    named = os.environ.get("LEXSHARD_DATA")
    if not named:
        sys.exit("LEXSHARD_DATA is not set: name the folder that holds the public data sets (see README.md)")
    folder = Path(named)
    if not folder.is_dir():
        sys.exit(f"LEXSHARD_DATA names {folder}, and there is no such folder")
    return folder.resolve()


def run_recipe(name: str, ks: str, *settings: str) -> dict[str, Any]:
    """Train the recipe and evaluate its last checkpoint on test, as a user would: two commands in processes of their
    own.

    The recipe's epochs were chosen on validation data; its training uses all of train. Returns {"seconds" of training,
    "wall_seconds" of both, "peak_rss_bytes", "epochs", "tables", "num_cases", "metrics"}.
    """
    environment = {**os.environ, "LEXSHARD_DATA": str(data_folder())}
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        overrides = [f"run={folder}/run", *settings]
        flags = [part for setting in overrides for part in ("--set", setting)]
        started = time.monotonic()
        trained = lexshard(["train", str(RECIPES / f"{name}.toml"), "--json", *flags], environment)
        report = lexshard(["evaluate", f"{folder}/run", "--which", "last", "--json", "--k", ks], environment)
        return {
            "seconds": round(trained["seconds"], 1),
            "wall_seconds": round(time.monotonic() - started, 1),
            "peak_rss_bytes": trained["peak_rss_bytes"],
            "epochs": trained["epochs"],
            "tables": trained["tables"],
            "num_cases": report["num_cases"],
            "metrics": {key: value for key, value in report["results"][0].items() if isinstance(value, float)},
        }


def train_recipe(name: str, *settings: str) -> dict[str, Any]:
    """Train the recipe and give its result, with the figures of the validation data that the settings hold out."""
    environment = {**os.environ, "LEXSHARD_DATA": str(data_folder())}
    with tempfile.TemporaryDirectory(prefix="lexshard-") as folder:
        flags = [part for setting in (f"run={folder}/run", *settings) for part in ("--set", setting)]
        return lexshard(["train", str(RECIPES / f"{name}.toml"), "--json", *flags], environment)


def lexshard(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def progress(text: str) -> None:
    """A line for the person watching; standard output is for the JSON."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
