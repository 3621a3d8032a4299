"""What `lexshard versions` does: asks a running service, and puts what it answers into words."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

from cluster.console import Event, table
from cluster.errors import ArtifactError, LexshardError
from embedding_service.http_client import ask
from embedding_service.versions import VersionStore

_ENDED = {"failed": "has failed", "interrupted": "was interrupted"}
_LOOK_SECONDS = 1.0  # between two looks at an export
_WAIT_SECONDS = 30.0  # per request; then it is asked again how it goes

Told = tuple[dict[str, Any], list[str]]


def listing(service: str, *, token_file: str = "") -> Told:
    """The document of GET /v1/versions and a table of it."""
    told = ask(service, "GET", "/v1/versions", token_file=token_file)
    rows = []
    for one in told["versions"]:
        marks = {told["live"]: "live", told["canary"]: f"canary, {told['share']:.0%}"}
        traffic = one["traffic"]
        ctr = (
            ""
            if traffic["ctr"] is None
            else f"{traffic['ctr']:.4f} ({traffic['ctr_low']:.4f}-{traffic['ctr_high']:.4f})"
        )
        failed = [figure["gate"] for figure in one.get("gates") or [] if not figure["passed"]]
        gates = "" if not one.get("gates") else "failed: " + ", ".join(failed) if failed else "passed"
        slow = "" if traffic["p99_ms"] is None else f"{traffic['p50_ms']:.2f} / {traffic['p99_ms']:.2f}"
        name = one["version"]
        items = one.get("problem") or f"{one.get('num_items') or 0:,}"
        rows.append((name, marks.get(name, ""), items, gates, f"{traffic['requests']:,}", slow, ctr))
    heads = ("version", "", "items", "gates", "requests", "ms p50 / p99", "clicks per answer (95 %)")
    lines = table(heads, rows).splitlines()
    if told["here"]["problem"]:
        lines.append(f"problem: {told['here']['problem']}")
    for lost in told["here"].get("lost_shards", []):
        of = f"shard {lost['shard']} of {told['here']['num_shards']}"
        lines.append(f"problem: {of}, version {lost['version']}, {lost['reason']}; it is started again by itself")
    return told, lines


def publish(where: str, source: str, *, token_file: str = "") -> Told:
    """Take a version in: of a service, from a folder below its root; of a root folder, a copy of a folder anywhere."""
    if "://" in where:
        told = ask(where, "POST", "/v1/versions", {"source": source}, token_file=token_file)
    else:
        told = {"version": VersionStore(where).publish_copy(source)}
    return told, [told["version"]]


def export(
    service: str,
    run: str,
    *,
    activate: bool,
    which: Literal["best", "last"] = "best",
    token_file: str = "",
    on_event: Callable[[Event], None],
) -> Told:
    """Have a run below the service's serve.runs exported, and wait for it; with `activate` it is to go live then.

    which: of the run's checkpoints. on_event: told of progress, as `trainers.export.export_run` tells.
    Interrupted, the export goes on without its listener. Raises LexshardError with the reason where it fails or is
    refused.
    """
    asked = {"run": run, "which": which, "activate": activate}
    told = ask(service, "POST", "/v1/exports", asked, token_file=token_file)
    said = None
    while told["state"] == "running" or (told["activation"] or {}).get("state") == "checking":
        activating = told["state"] != "running"
        text = f"{told['message']}{'; the gates judge it' if activating else ''}"
        if (told["share"], text) != said:
            said = told["share"], text
            on_event(_event(told, text))
        time.sleep(_LOOK_SECONDS)
        told = ask(service, "GET", f"/v1/exports/{told['id']}", token_file=token_file)
    if told["state"] != "published":
        raise LexshardError(f"the export of {run} {_ENDED[told['state']]}: {told['message']}")
    activation = told["activation"] or {"state": "", "reason": ""}
    if activation["state"] not in ("", "live"):
        how = f"{activation['state']}: {activation['reason'] or 'GET /v1/versions tells more'}"
        raise ArtifactError(f"version {told['version']} was published, and its activation is {how}")
    return told, [told["version"]]


def _event(record: dict[str, Any], text: str) -> Event:
    if record["share"] is None:
        return {"kind": "note", "text": text}
    shards = f"shard {record['shards_done']} of {record['num_shards']}: " if record["num_shards"] else ""
    return {"kind": "progress", "share": record["share"], "text": shards + text}


def change(service: str, action: str, version: str, *, share: float | None, force: bool, token_file: str = "") -> Told:
    """Activate, canary, rollback or remove, and wait until it is decided. Raises LexshardError with the reason of a
    refusal: gate, figure and limit.
    """
    body: dict[str, Any] = {}
    if action == "rollback":
        body["live"] = ask(service, "GET", "/v1/versions", token_file=token_file)["live"]
    else:
        body["version"] = version
    if action in ("activate", "canary"):
        body |= {"force": force, "wait_seconds": _WAIT_SECONDS}
    if share is not None:
        body["share"] = share
    told = ask(service, "POST", f"/v1/versions/{action}", body, token_file=token_file)
    while told.get("state") in ("checking", "flipping") and not told.get("reason"):
        told = _still(service, version, token_file)
    if told.get("state") == "flipping":
        here = f"{told['flipped']} of {told['replicas']} replicas"
        raise LexshardError(f"version {version} is to be {told['ends']}, and is so on {here}: {told['reason']}")
    if told.get("state") in ("refused", "interrupted"):
        raise ArtifactError(f"version {version} was {told['state']}: {told.get('reason', 'its replica has ended')}")
    lines = [f"{told.get('state', 'live' if action == 'rollback' else action)}: {told.get('live', version)}"]
    for figure in told.get("figures", []):
        value = "not measured" if figure["value"] is None else f"{figure['value']:.4f}"
        mark = "passed" if figure["passed"] else "forced"
        lines.append(f"  {figure['gate']}: {value}, limit {figure['limit']:g}, {mark}  {figure['note']}".rstrip())
    return told, lines


def _still(service: str, version: str, token_file: str) -> dict[str, Any]:
    """How the activation of `version` goes, after a moment."""
    time.sleep(1.0)
    told: dict[str, Any] = ask(service, "GET", "/v1/versions", token_file=token_file)["admission"] or {}
    if told.get("version") != version:
        raise LexshardError(f"{service} has begun to activate another version meanwhile: {told.get('version')}")
    return told
