"""The commands that size a run before it is trained, `profile` and `plan`: their words and what they print.

A part of the front door (see `cluster.cli`): each command imports what it needs itself.
"""

from __future__ import annotations

import argparse
import json
import os
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

    sub = add("plan", "tell before training what the tables take on any machines, and what makes them fit")
    sub.add_argument("config", metavar="CONFIG", help="a TOML file (see `lexshard config`)")
    sub.add_argument("--workers", type=_number, metavar="N", help="short for --set cluster.workers=N")
    sub.add_argument("--device", choices=("cpu", "cuda"), help="short for --set cluster.device=")
    sub.add_argument(
        "--workers-per-machine", type=_number, metavar="N", help="default: 8 for cuda; for cpu all on one machine"
    )
    sub.add_argument("--hbm", default="", metavar="SIZE", help="memory of a GPU, like 80GiB (default: this machine's)")
    sub.add_argument(
        "--host-memory", default="", metavar="SIZE", help="memory of a machine, like 1TiB (default: this machine's)"
    )
    sub.add_argument("--items", type=_number, metavar="N", help="plan for so many items; short for --keys item=N")
    sub.add_argument("--users", type=_number, metavar="N", help="short for --keys user=N")
    sub.add_argument(
        "--keys",
        action="append",
        default=[],
        metavar="NAME=N",
        help="plan for so many keys of query_COLUMN or item_COLUMN; may be repeated",
    )
    sub.add_argument(
        "--profile",
        default="",
        metavar="FILE",
        help="of `lexshard profile`: how many keys there are, and how often each is asked for (default: as the run has "
        "prepared them)",
    )
    sub.add_argument("--json", action="store_true", help="for programs")
    add_set(sub)


def _number(text: str) -> int:
    if (_whole(text) or 0) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0; got {text!r}")
    return int(text)


def _whole(text: str) -> int | None:
    """The number that `text` is, like 5_000; None if it is none."""
    try:
        return int(text) if text.replace("_", "").isdecimal() else None
    except ValueError:  # 1__0, 1_
        return None


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


def plan(args: Arguments) -> int:
    """`lexshard plan`: 0 if the tables fit, 1 if not."""
    from cluster.config import load_config

    chosen = {"workers": args.workers, "device": args.device}
    overrides = [f"cluster.{name}={value}" for name, value in chosen.items() if value is not None]
    config = load_config(args.config, [*args.set, *overrides])
    told = _told(args)
    machines = _machines(args, config)
    from trainers.plan import make_plan
    from trainers.plan_keys import keys_of, read_profile
    from trainers.plan_offers import offers

    keys = keys_of(config, told, read_profile(args.profile) if args.profile else None)
    found = make_plan(config, keys, machines)
    changes = [] if found.fits else offers(config, keys, machines)
    if args.json:
        print(json.dumps({**found.to_dict(), "offers": [one.to_dict() for one in changes]}))
    else:
        print(_plan_text(found.to_dict(), [one.to_dict() for one in changes]))
    return 0 if found.fits else 1


def _told(args: Arguments) -> dict[str, int]:
    """Key map -> how many keys, as the options say. Raises SettingError."""
    from cluster.errors import SettingError

    told = {name: number for name, number in (("item", args.items), ("user", args.users)) if number is not None}
    for text in args.keys:
        name, _, number = text.partition("=")
        if (found := _whole(number)) is None:
            raise SettingError("--keys", f"is written NAME=N, like query_city=5000; got {text!r}")
        told[name] = found
    return told


def _machines(args: Arguments, config: Any) -> Any:
    """The machines that the options describe; what they leave out is as on this one. Raises SettingError."""
    import torch

    from cluster.errors import SettingError
    from cluster.sizes import parse_bytes
    from embedding_service.shard_plan import Machines

    device, here = config.cluster.device, torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if here or args.hbm else "cpu"
    if args.hbm and device == "cpu":
        raise SettingError("--hbm", "is of GPUs, but the device is cpu: leave it out, or add --device cuda")
    if device == "cuda" and not args.hbm and not here:
        raise SettingError("--hbm", "is needed, as this machine has no GPU to go by: say how much memory one has")
    hbm = 0
    if device == "cuda":
        hbm = parse_bytes(args.hbm, "--hbm") if args.hbm else torch.cuda.get_device_properties(0).total_memory
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if args.host_memory:
        host = parse_bytes(args.host_memory, "--host-memory")
    workers = config.cluster.workers
    return Machines(workers, args.workers_per_machine or (8 if device == "cuda" else workers), device, hbm, host)


def _plan_text(found: dict[str, Any], offers: list[dict[str, Any]]) -> str:
    from cluster.sizes import format_bytes as size

    machines = found["machines"]
    lines = [f"{machines['workers']} workers ({machines['device']}) on {machines['num_machines']} machine(s)", ""]
    lines += [*_table_lines(found), "", *_rank_lines(found)]
    if any(one["collisions"] for one in found["tables"]):
        lines += ["", *_collision_lines(found)]
    lines += [f"warning: {text}" for text in found["warnings"]]
    if found["fits"]:
        return "\n".join([*lines, "", "it fits"])
    missing = found["missing_bytes_per_rank"]
    lines += ["", f"it does not fit: a rank lacks {size(missing)}" if missing else "it does not fit: see the warning"]
    if not offers:
        return "\n".join([*lines, "no single change makes it fit: take larger machines, or combine changes"])
    return "\n".join([*lines, "each of these makes it fit:", _offer_table(offers, machines["workers"])])


def _table_lines(found: dict[str, Any]) -> list[str]:
    from cluster.console import table
    from cluster.sizes import format_bytes as size

    place = {"fused": "HBM" if found["machines"]["device"] == "cuda" else "host memory", "disk": "mapped into memory"}
    rows = [
        [
            one["name"],
            "weights of hashes" if one["map"] is None else one["map"]["kind"],
            _ids(one),
            f"{one['rows']:,}",
            f"{one['dim']} {one['precision']}",
            size(one["weight_bytes"]),
            size(one["optimizer_bytes"]),
            f"{one['sharding']}, {one['kernel']} ({place.get(one['kernel'], 'host, cached in HBM')})",
            f"{max(one['rows_per_rank']):,}",
            f"{one['rows_per_step']:,}",
            size(one["all_to_all_bytes_per_rank_and_step"]),
        ]
        for one in found["tables"]
    ]
    header = ["table", "map", "keys", "rows", "dim", "weights", "optimiser", "sharding and kernel"]
    header += ["rows/rank", "rows/step", "sent/step"]
    return [table(header, rows), "(rows/step, sent/step: expected, of a rank in a step)"]


def _rank_lines(found: dict[str, Any]) -> list[str]:
    from cluster.console import table
    from cluster.sizes import format_bytes as size

    rows = []
    for first, last in _alike(found["ranks"]):
        one = found["ranks"][first]
        parts = [size(one[name]) for name in ("weight_bytes", "optimizer_bytes", "buffer_bytes", "table_bytes")]
        rows.append([f"{first}" if first == last else f"{first} to {last}", *parts])
    limit, process = found["table_limit_bytes_per_rank"], size(found["process_bytes_per_rank"])
    lines = [table(("rank", "weights", "optimiser", "buffers", "together"), rows)]
    if found["machines"]["device"] == "cuda":
        lines.append(f"limit: {size(limit)} of a GPU's {size(found['machines']['hbm_bytes'])}")
        lines.append(f"expected host memory per rank, for libraries, key maps and sessions: {process}")
        if found["uvm_bytes_per_rank"]:
            lines.append(f"and for tables with a cache on the GPU: {size(found['uvm_bytes_per_rank'])}")
    else:
        lines.append(f"limit: {size(max(0, limit))} beside {process} for libraries, key maps and sessions")
        lines.append(f"expected resident memory per rank: {size(found['resident_bytes_per_rank'])}")
        if found["disk_bytes_per_rank"]:
            lines.append(f"on local disk per rank, not counted above: {size(found['disk_bytes_per_rank'])}")
    return lines


def _collision_lines(found: dict[str, Any]) -> list[str]:
    from cluster.console import table

    rows = [
        [
            one["name"],
            _ids(one),
            f"{one['rows']:,}",
            f"{one['collisions']['all_shared']:,.0f}",
            f"{one['collisions']['same_rows']:,.0f}",
            f"{one['collisions']['lookups']:.1%}",
            one["distribution"],
        ]
        for one in found["tables"]
        if one["collisions"]
    ]
    header = ("table", "keys", "rows", "no row of their own", "same vector", "of the lookups", "frequencies")
    return [
        "expected collisions: keys without a row of their own, keys with another's vector, lookups of keys that share",
        table(header, rows),
    ]


def _offer_table(offers: list[dict[str, Any]], workers: int) -> str:
    from cluster.console import table
    from cluster.sizes import format_bytes as size

    rows = []
    for one in offers:
        options = []
        if one["workers"] != workers:
            options = [f"--workers {one['workers']} --workers-per-machine {one['workers_per_machine']}"]
        options += [f"--set {setting}" for setting in one["settings"]]
        room = f"{size(one['table_bytes_per_rank'])} of {size(one['table_limit_bytes_per_rank'])}"
        rows.append([one["change"], room, " ".join(options)])
    return table(("change", "per rank then", "options"), rows)


def _ids(one: dict[str, Any]) -> str:
    return "" if one["map"] is None else "any" if one["map"]["ids"] >= 2**62 else f"{one['map']['ids']:,}"


def _alike(ranks: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(first, last) of neighbouring ranks with the same figures."""
    groups: list[tuple[int, int]] = []
    for one in ranks:
        if groups and {**ranks[groups[-1][0]], "rank": one["rank"]} == one:
            groups[-1] = (groups[-1][0], one["rank"])
        else:
            groups.append((one["rank"], one["rank"]))
    return groups
