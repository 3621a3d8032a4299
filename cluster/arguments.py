"""The words of the command line: every command, argument and option with its help. Imports nothing of weight."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cluster.sizing import add_sizing


def build_parser() -> argparse.ArgumentParser:
    """The parser of every command; the parsed `command` is the command's name."""
    parser = argparse.ArgumentParser(
        prog="lexshard", description="Click sessions to sharded embeddings to a measured, served index."
    )
    parser.add_argument("--version", action="version", version="lexshard 0.1.0")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")

    _add_preparing(add)
    add_sizing(add, _add_set)
    _add_training(add)
    _add_serving(add)
    return parser


Add = Callable[[str, str], argparse.ArgumentParser]


def _add_preparing(add: Add) -> None:
    sub = add("doctor", "check that the installed packages fit together, and print what mends them")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = add("config", "print every setting with its meaning and the value in force, as TOML")
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="a TOML file; without one the defaults are shown")
    _add_set(sub)

    sub = add("sessions", "turn an event log (one row per event) into sessions")
    sub.add_argument("source", metavar="EVENTS", help="Parquet or Arrow: a file, folder, glob or s3:// gs:// URL")
    sub.add_argument("output", metavar="SESSIONS", help="the Parquet file to write")
    sub.add_argument("--item", required=True, metavar="COLUMN", help="the item of an event")
    sub.add_argument("--time", default="", metavar="COLUMN", help="when it was: a timestamp, a date or seconds")
    sub.add_argument(
        "--session", default="", metavar="COLUMN", help="session id; without one users' events are cut by time"
    )
    sub.add_argument("--user", default="", metavar="COLUMN", help="user id")
    sub.add_argument(
        "--gap-seconds",
        type=float,
        default=1800,
        metavar="N",
        help="a longer pause begins a new session (default 1800)",
    )
    sub.add_argument(
        "--min-length", type=int, default=1, metavar="N", help="leave out sessions of fewer events (default 1)"
    )
    sub.add_argument(
        "--bad-events",
        choices=("error", "skip"),
        default="error",
        help="stop at an event without an item, id or time, or leave it out",
    )
    sub.add_argument(
        "--memory-limit", default="2GB", metavar="SIZE", help="of sorting; beyond it spills to disk (default 2GB)"
    )


def _add_training(add: Add) -> None:
    sub = add("train", "train a run, or go on with it where it stopped")
    sub.add_argument("config", metavar="CONFIG", help="a TOML file (see `lexshard config`)")
    sub.add_argument("--workers", type=int, metavar="N", help="short for --set cluster.workers=N")
    sub.add_argument("--fresh", action="store_true", help="remove the run's folder first")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_set(sub)

    sub = add("tune", "search for better settings within a time budget, by validation data, and write them as a config")
    sub.add_argument("config", metavar="CONFIG", help="a TOML file; its own settings are the first trial")
    sub.add_argument("--minutes", type=float, default=30.0, metavar="N", help="time for all trials (default 30)")
    sub.add_argument(
        "--sample",
        type=float,
        metavar="SHARE",
        help="of the training sessions, such as 0.2 (default: at most 100,000 sessions)",
    )
    sub.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUES",
        help="what to vary, LOW:HIGH or A,B,C, instead of the usual few; may be repeated. CONFIG's own value is added",
    )
    sub.add_argument("--trials", type=int, default=100, metavar="N", help="most trials (default 100)")
    sub.add_argument("--output", default="", metavar="FILE", help="the config to write (default: CONFIG.tuned.toml)")
    sub.add_argument("--force", action="store_true", help="replace that file if it exists")
    sub.add_argument("--fresh", action="store_true", help="forget the trials of a former search in the run's folder")
    sub.add_argument("--keep", action="store_true", help="keep the trials' folders, RUN/tune/NUMBER")
    sub.add_argument("--json", action="store_true", help="print the result as JSON")
    _add_set(sub)

    sub = add("export", "publish a run as an immutable, measured artifact, or write its vectors to a file")
    sub.add_argument("run", metavar="RUN", help="the run's folder (with --to: or an artifact's)")
    sub.add_argument(
        "--out", default="", metavar="PATH", help="folder of versions (default RUN/artifacts); with --to: the file"
    )
    sub.add_argument("--which", choices=("best", "last"), help="checkpoint to publish (default best)")
    sub.add_argument(
        "--precision", choices=("fp32", "fp16", "int8"), help="of the vectors; short for --set export.precision="
    )
    sub.add_argument("--index", metavar="FACTORY", help="FAISS factory string or auto; short for --set export.index=")
    sub.add_argument(
        "--to",
        choices=("word2vec", "word2vec-binary", "parquet"),
        help="write the published vectors to one file instead",
    )
    sub.add_argument("--vectors", metavar="NAME", help="with --to: the vector set (default item)")
    sub.add_argument(
        "--keep-current", action="store_true", help="publish the version beside the current one, which stays that"
    )
    sub.add_argument("--json", action="store_true", help="for programs: progress and result, a JSON object per line")
    _add_set(sub)

    sub = add("evaluate", "measure a run's checkpoint and artifact over the whole catalogue")
    sub.add_argument("path", metavar="RUN_OR_ARTIFACT")
    sub.add_argument(
        "--cases",
        default="",
        metavar="FILE",
        help="test cases; `valid` for the run's validation cases (default: data.test)",
    )
    sub.add_argument("--k", type=_numbers, metavar="N,N", help="cut-offs (default 10,20)")
    sub.add_argument(
        "--word-pairs",
        action="append",
        default=[],
        metavar="FILE",
        help="lines `word word score`: Spearman's correlation of the vectors' cosines with them; may be repeated",
    )
    sub.add_argument(
        "--analogies",
        action="append",
        default=[],
        metavar="FILE",
        help="lines `a b c d` in sections `: name`: how often d is found; may be repeated",
    )
    sub.add_argument("--which", choices=("best", "last"), default="best", help="checkpoint to measure")
    sub.add_argument("--json", action="store_true", help="for programs")
    _add_set(sub)

    sub = add("submit", "run another lexshard command as a job of a Ray cluster and follow its log")
    sub.add_argument("--address", required=True, metavar="URL", help="the cluster's job server, http://HOST:8265")
    sub.add_argument("--working-dir", default=".", metavar="FOLDER", help="packed up and sent along (default .)")
    sub.add_argument(
        "--python", default="python", metavar="PATH", help="the interpreter on the cluster (default python)"
    )
    sub.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="for instance: -- train run.toml --workers 8"
    )


def _add_serving(add: Add) -> None:
    sub = add("serve", "serve a run's artifact over HTTP until Ctrl-C")
    sub.add_argument("path", metavar="RUN_OR_ARTIFACT")
    sub.add_argument("--host", help="address to bind (default 127.0.0.1)")
    sub.add_argument("--port", type=int, help="port to bind (default 8000)")
    sub.add_argument("--replicas", type=int, help="processes that answer (default 1)")
    _add_set(sub)

    sub = add("query", "ask a running service or an artifact on disk")
    sub.add_argument(
        "where", metavar="URL_OR_PATH", help="http://127.0.0.1:8000, or the folder of a run or an artifact"
    )
    sub.add_argument("kind", choices=("similar", "recommend"), help="neighbours of one item, or what follows a session")
    sub.add_argument("keys", nargs="+", metavar="KEY", help="the item, or the session's items, oldest first")
    sub.add_argument("--k", type=int, default=10, metavar="N", help="how many (default 10)")
    sub.add_argument("--user", default="", metavar="KEY", help="recommend: whose session it is")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = add("versions", "list, publish, export, activate or roll back the versions of a running service")
    sub.add_argument(
        "where", metavar="URL_OR_ROOT", help="http://127.0.0.1:8000; publish also takes a folder of versions"
    )
    sub.add_argument(
        "action",
        choices=("list", "publish", "export", "activate", "canary", "rollback", "remove"),
        help="default list",
        nargs="?",
        default="list",
    )
    about = "the version; publish: its folder; export: a run below serve.runs"
    sub.add_argument("name", metavar="VERSION", nargs="?", default="", help=about)
    sub.add_argument("--share", type=float, metavar="N", help="canary: of the callers; 0 ends it (default 0.1)")
    sub.add_argument("--force", action="store_true", help="activate, canary: although the gates say no")
    sub.add_argument("--which", choices=("best", "last"), help="export: the run's checkpoint (default best)")
    sub.add_argument("--activate", action="store_true", help="export: make the version live then, if the gates say so")
    sub.add_argument("--token-file", default="", metavar="FILE", help="the service's token (default: $LEXSHARD_TOKEN)")
    sub.add_argument("--json", action="store_true", help="for programs")

    sub = add("demo", "the whole path on this machine's Python library: train, evaluate, publish, serve, ask")
    sub.add_argument("--site-packages", action="store_true", help="take all installed packages: a larger vocabulary")
    sub.add_argument("--folder", default="runs/demo", help="where runs are kept (default runs/demo)")
    sub.add_argument("--port", type=int, help="port of the service (default 8000, or a free one)")


def _add_set(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--set", action="append", default=[], metavar="SECTION.NAME=VALUE", help="override a setting; may be repeated"
    )


def _numbers(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"must be whole numbers above 0 like 10,20; got {text!r}")
    return numbers
