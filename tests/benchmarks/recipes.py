"""What the recipe benchmarks share: a recipe trained from raw Parquet through `lexshard`, in a process of its own."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any

from cluster.storage import write_json

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


class Kept:
    """What was measured with the recipes of deploy/recipes/, in `folder` if there is one, until the recipe changes.

    Threads may measure side by side.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._file = None if folder is None else folder / f"{name}.json"
        self._changing = Lock()
        self._found: dict[str, Any] = {}
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._found = json.loads(self._file.read_text()) if self._file.exists() else {}

    def get(self, recipe: str, name: str, measure: Callable[[], Any], *, deadline: float | None = None) -> Any:
        """What `measure` gave for `name`, now or in an earlier call. `name` says all that differs from the recipe.
        After `deadline`, in `time.monotonic()`'s seconds, nothing is measured any more: None.
        """
        key = self._key(recipe, name)
        if key not in self._found and (deadline is None or time.monotonic() < deadline):
            found = measure()
            with self._changing:
                self._found[key] = found
                if self._file is not None:
                    write_json(self._file, self._found)
            progress(f"{recipe} {name}: {json.dumps(found)}")
        return self.find(recipe, name)

    def find(self, recipe: str, name: str) -> Any:
        return self._found.get(self._key(recipe, name))

    def _key(self, recipe: str, name: str) -> str:
        text = (RECIPES / f"{recipe}.toml").read_bytes()
        return f"{recipe} {hashlib.sha256(text).hexdigest()[:8]} {name}"


def lexshard(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def progress(text: str) -> None:
    """A line for the person watching; standard output is for the JSON."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
