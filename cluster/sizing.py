"""The commands that size a run before it is trained, `profile` and `plan`: their words and what they print.

A part of the front door (see `cluster.cli`): each command imports what it needs itself.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any

Arguments = argparse.Namespace
Add = Callable[[str, str], argparse.ArgumentParser]


def add_sizing(add: Add, add_set: Callable[[argparse.ArgumentParser], None]) -> None:
    """The commands' arguments and options."""
    sub = add("profile", "tell what sessions hold before training: keys, skew, coverage, lengths; one bounded pass")
    sub.add_argument(
        "sessions",
        metavar="SESSIONS",
        help="a config (.toml), or the sessions as data.train names them: a file, folder, glob or URL (columns as in "
        "`lexshard train`: --set data.items=NAME, data.user=NAME, data.query_features=...)",
    )
    sub.add_argument("--workers", type=int, metavar="N", help="Ray tasks that read a part each (default 1, no Ray)")
    sub.add_argument("--output", default="", metavar="FILE", help="write the profile as JSON, for `lexshard plan`")
    sub.add_argument("--json", action="store_true", help="print it as JSON")
    add_set(sub)


def profile(args: Arguments) -> int:
    """`lexshard profile`."""
    from cluster.config import load_config
    from cluster.console import watching

    overrides = list(args.set)
    if args.workers is not None:
        overrides.append(f"cluster.workers={args.workers}")
    if args.sessions.endswith(".toml"):
        config = load_config(args.sessions, overrides)
    else:  # features are the two-tower model's
        config = load_config(None, [f"data.train={json.dumps(args.sessions)}", "model.kind=two_tower", *overrides])
    from trainers.profile import profile as profile_sessions

    with watching(every_seconds=0.0) as listener:
        found = profile_sessions(config, on_event=listener)
    if args.output:
        from cluster.storage import write_json

        write_json(args.output, found)
    print(json.dumps(found) if args.json else _profile_text(found))
    if args.output:
        print(f"next: lexshard plan CONFIG --profile {args.output}", file=sys.stderr)
    return 0


def _profile_text(found: dict[str, Any]) -> str:
    from cluster.console import table

    lengths, columns = found["lengths"], found["columns"]
    left_out = f", {found['bad_rows']:,} bad rows left out" if found["bad_rows"] else ""
    lines = [f"{found['sessions']:,} sessions of {found['source']}{left_out}", ""]
    rows = [
        [
            name,
            f"{one['occurrences']:,}",
            f"{one['distinct']['value']:,.0f}",
            _bounds(one["distinct"], "{:,.0f}"),
            f"{one['zipf']['exponent']:.2f}",
            f"{one['zipf']['misfit']:.1%}",
            f"{one['per_session']:.2f}",
        ]
        for name, one in columns.items()
    ]
    header = ("keys", "occurrences", "distinct", "within", "Zipf exponent", "misfit", "per session")
    lines += [table(header, rows), ""]
    rows = [
        [name, str(one["min_count"]), f"{one['value']:,.0f}", _bounds(one, "{:,.0f}")]
        for name, column in columns.items()
        for one in column["min_count"][1:]
        if one["value"]
    ]
    lines += ["keys left if those seen less often are unknown (keys.min_count)"]
    lines += [table(("keys", "min_count", "distinct", "within"), rows), ""]
    rows = [
        [name, f"{one['top']:,}", f"{one['value']:.1%}", _bounds(one, "{:.1%}")]
        for name, column in columns.items()
        for one in column["coverage"][:-1]
        if str(one["top"]).startswith("1")
    ]
    lines += ["share of the traffic that the most frequent keys cover"]
    lines += [table(("keys", "top", "share", "within"), rows), ""]
    rows = [
        [name, str(one["key"]), f"{one['low'] / column['occurrences']:.3%}", _bounds(one, "{:,}")]
        for name, column in columns.items()
        for one in column["frequent"][:5]
    ]
    lines += ["most frequent", table(("keys", "key", "share", "count within"), rows), ""]
    quantiles = "  ".join(f"{float(rank):.0%} {value}" for rank, value in lengths["quantiles"].items())
    lines += [f"session lengths: mean {lengths['mean']:.1f}, longest {lengths['max']:,}; {quantiles}"]
    lines += [f"  (each to {lengths['rank_error']:.1%} of the sessions)"]
    lines += [
        "bounds hold with 95 % probability; misfit: largest difference between the coverage and that of a Zipf law",
        f"{found['keys_per_second']:,.0f} keys/s",
    ]
    return "\n".join(lines)


def _bounds(one: dict[str, Any], form: str) -> str:
    low, high = form.format(one["low"]), form.format(one["high"])
    return "exact" if low == high else f"{low} .. {high}"
