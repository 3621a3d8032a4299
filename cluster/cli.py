"""lexshard: the front door. The only file that may look at every layer; each command imports what it needs itself."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster import sizing
from cluster.arguments import build_parser
from cluster.errors import ArtifactError, LexshardError, SettingError

Arguments = argparse.Namespace
_CANARY_SHARE = 0.1  # of the callers


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0, 1 (the answer is no), 2 (an error of the user's), 130 (Ctrl-C)."""
    chosen = build_parser().parse_args(arguments)
    try:
        return _COMMANDS[chosen.command](chosen)
    except LexshardError as error:
        if os.environ.get("LEXSHARD_DEBUG") == "1":
            raise
        sys.stderr.write(f"lexshard: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("lexshard: interrupted\n")
        return 130
    except BrokenPipeError:  # `lexshard ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:  # a path that cannot be written, a full disk
        if os.environ.get("LEXSHARD_DEBUG") == "1":
            raise
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"lexshard: error: {where}{error.strerror or _first_line(error)}\n")
        return 2


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# ---------------------------------------------------------------- commands


def _doctor(args: Arguments) -> int:
    from cluster.console import table
    from cluster.doctor import diagnose, gather, is_healthy, to_json

    findings = diagnose(gather())
    healthy = is_healthy(findings)
    if args.json:
        print(to_json(findings))
        return 0 if healthy else 1
    print(table(("", "what", "finding"), [(f.level, f.subject, f.detail) for f in findings]))
    fixes = [finding for finding in findings if finding.fix]
    if fixes:
        print("\nwhat mends it, in this order:")
        for finding in fixes:
            print(f"  {finding.subject}: {finding.fix}")
    print("\neverything fits together" if healthy else "\nthis installation is broken")
    return 0 if healthy else 1


def _config(args: Arguments) -> int:
    from cluster.config import load_config, to_toml

    print(to_toml(load_config(args.config, args.set)), end="")
    return 0


def _sessions(args: Arguments) -> int:
    from trainers.event_log import sessionize

    summary = sessionize(
        args.source,
        args.output,
        item=args.item,
        time=args.time,
        session=args.session,
        user=args.user,
        gap_seconds=args.gap_seconds,
        min_length=args.min_length,
        bad_events=args.bad_events,
        memory_limit=args.memory_limit,
    )
    print(f"{summary.events:,} events -> {summary.sessions:,} sessions in {args.output}")
    print(f"mean length {summary.mean_length:.1f}, longest {summary.max_length:,}")
    if summary.dropped_events:
        print(f"left out: {summary.dropped_events:,} events without an item, an id or a time")
    if summary.dropped_sessions:
        print(f"left out: {summary.dropped_sessions:,} sessions of fewer than {summary.min_length} events")
    return 0


def _train(args: Arguments) -> int:
    from cluster.config import load_config
    from cluster.console import duration, watching

    overrides = list(args.set)
    if args.workers is not None:
        overrides.append(f"cluster.workers={args.workers}")
    config = load_config(args.config, overrides)
    from trainers.loop import train  # heavy: a mistake in the config shows before

    with watching(every_seconds=config.train.report_seconds) as listener:
        result = train(config, fresh=args.fresh, on_event=listener)
    if args.json:
        print(json.dumps(result))
        return 0
    print(f"trained {result['epochs']} epochs in {duration(result['seconds'])}: {result['run']}")
    for metric, value in result["best"].items():
        print(f"best {metric} {value:.4f}, after epoch {result['best_epoch']}")
    if result["bad_rows"]:
        print(f"left out: {result['bad_rows']:,} bad rows")
    print(f"next: lexshard export {result['run']}")
    return 0


def _tune(args: Arguments) -> int:
    from cluster.config import load_config
    from cluster.console import duration, table, watching

    config = load_config(args.config, args.set)
    output = args.output or str(Path(args.config).with_suffix(".tuned.toml"))
    from trainers.tune import tune

    with watching(every_seconds=config.train.report_seconds) as listener:
        found = tune(
            config,
            output,
            minutes=args.minutes,
            sample=args.sample,
            vary=args.vary,
            max_trials=args.trials,
            force=args.force,
            fresh=args.fresh,
            keep=args.keep,
            on_event=listener,
        )
    status = 130 if found.ended == "interrupted" else 0
    if args.json:
        print(json.dumps(found.to_dict()))
        return status
    names = list(found.best.settings)
    rows = [
        [
            str(trial.number),
            *[str(trial.settings[name]) for name in names],
            str(trial.epochs),
            "" if trial.value is None else f"{trial.value:.4f}",
            f"{trial.seconds:.0f}",
            "best" if trial.number == found.best.number else "" if trial.state == "complete" else trial.state,
        ]
        for trial in found.trials
    ]
    print(table(("trial", *[name.split(".")[-1] for name in names], "epochs run", found.metric, "seconds", ""), rows))
    ends = {
        "budget": "the time is up",
        "trials": "enough trials",
        "space": "all was tried",
        "interrupted": "interrupted",
    }
    print(f"\n{ends[found.ended]}: {len(found.trials)} trials on {found.sample:.3g} of the sessions", end=", ")
    print(f"{duration(found.seconds)}; best {found.metric} {found.best.value:.4f}")
    if found.best.number == 0:
        print(f"no trial did better than {args.config} as it is")
    print(output)
    print(f"next: lexshard train {output}", file=sys.stderr)
    return status


def _export(args: Arguments) -> int:
    if args.to:
        return _interchange(args)
    if args.vectors:
        raise SettingError("--vectors", "is for --to; a published version has all vectors")
    from cluster.console import watching

    run = _run_folder(args.run)
    from trainers.export import export_run

    overrides = list(args.set)
    overrides += [f"export.precision={args.precision}"] if args.precision else []
    overrides += [f"export.index={args.index}"] if args.index else []
    asked = {"out": args.out, "which": args.which or "best", "overrides": overrides, "current": not args.keep_current}
    if args.json:
        path = export_run(run, **asked, on_event=lambda event: print(json.dumps(event), flush=True))
        print(json.dumps({"kind": "published", "version": path.name, "path": str(path)}))
        return 0
    with watching(every_seconds=0.0) as listener:
        path = export_run(run, **asked, on_event=listener)
    print(path)
    print(f"next: lexshard serve {args.out or args.run}", file=sys.stderr)
    return 0


def _interchange(args: Arguments) -> int:
    if not args.out:
        raise SettingError("--out", f"is needed with --to {args.to}: the file to write")
    for name in ("which", "precision", "index", "set", "keep-current", "json"):
        if getattr(args, name.replace("-", "_")):
            raise SettingError(f"--{name}", f"has no effect with --to {args.to}, which converts what is published")
    folder = _artifact_folder(args.run)
    from embedding_service.artifact import Artifact
    from embedding_service.interchange import write_parquet, write_word2vec

    artifact = Artifact.open(folder)
    name = args.vectors or "item"
    vectors = artifact.vectors_by_id(name)
    keys = artifact.keys(artifact.manifest["vectors"][name]["keys"])
    if args.to == "parquet":
        write_parquet(args.out, keys, vectors)
    else:
        write_word2vec(args.out, keys, vectors, binary=args.to == "word2vec-binary")
    print(args.out)
    return 0


def _evaluate(args: Arguments) -> int:
    if args.word_pairs or args.analogies:
        return _evaluate_words(args)
    from cluster.console import table
    from trainers.evaluate import evaluate

    report = evaluate(args.path, cases=args.cases, ks=args.k or (10, 20), which=args.which, overrides=args.set)
    if args.json:
        print(json.dumps(report))
        return 0
    results = report["results"]
    names = [name for name in results[0] if name not in ("what", "search", "by_frequency")]
    rows = [[r["what"], r["search"], *[f"{r[name]:.4f}" for name in names]] for r in results]
    print(f"{report['num_cases']:,} cases of {report['cases']}")
    print(table(("", "search", *names), rows))
    recalls = [name for name in names if name.startswith("recall@")]
    rows = [
        [r["what"], r["search"], seen, f"{part['items']:,}", *[f"{part[name]:.4f}" for name in recalls]]
        for r in results
        for seen, part in r["by_frequency"].items()
    ]
    print("\nby the training interactions of the items that should be found")
    print(table(("", "search", "interactions", "items", *recalls), rows))
    return 0


def _evaluate_words(args: Arguments) -> int:
    for name in ("cases", "k", "set"):
        if getattr(args, name):
            raise SettingError(f"--{name}", "has no effect with --word-pairs or --analogies")
    from cluster.console import table
    from trainers.words import evaluate_words

    report = evaluate_words(args.path, pairs=args.word_pairs, analogies=args.analogies, which=args.which)
    if args.json:
        print(json.dumps(report))
        return 0
    rows = [
        [row["what"], "" if row["score"] is None else f"{row['score']:.4f}", f"{row['used']:,} of {row['given']:,}"]
        for row in report
    ]
    print(table(("", "score", "known"), rows))
    return 0


def _serve(args: Arguments) -> int:
    from cluster.config import load_config

    chosen = {name: getattr(args, name) for name in ("host", "port", "replicas")}
    overrides = [f"serve.{name}={value}" for name, value in chosen.items() if value is not None]
    folder = _artifact_folder(args.path)
    run_config = Path(args.path) / "config.toml"
    settings = load_config(run_config if run_config.exists() else None, [*args.set, *overrides]).serve
    import dataclasses

    from embedding_service.app import serve_artifact
    from embedding_service.http_schema import Limits

    limits = Limits(max_k=settings.max_k, max_batch=settings.max_batch, max_body_bytes=settings.max_body_bytes)
    gates = dataclasses.asdict(settings.gates)
    gates["cases"] = str(Path(gates["cases"]).absolute()) if gates["cases"] else ""
    service = serve_artifact(
        folder,
        host=settings.host,
        port=settings.port,
        replicas=settings.replicas,
        max_replicas=settings.max_replicas,
        target_ongoing_requests=settings.target_ongoing_requests,
        shards=settings.shards,
        on_lost_shard=settings.on_lost_shard,
        shard_timeout_seconds=settings.shard_timeout_seconds,
        limits=limits,
        token_file=settings.token_file,
        read_token_file=settings.read_token_file,
        feedback_token_file=settings.feedback_token_file,
        gates=gates,
        runs=settings.runs,
        metrics_port=settings.metrics_port,
        grpc_port=settings.grpc_port,
        probe_seconds=settings.probe_seconds,
        probe_margin=settings.probe_margin,
        log_format=settings.log_format,
        log_level=settings.log_level,
        log_file=str(Path(settings.log_file).absolute()) if settings.log_file else "",
        access_log=settings.access_log,
    )
    with service:
        print(
            f"serving {args.path} at {service.address} (documentation: {service.address}/docs); Ctrl-C stops",
            *([f"gRPC (lexshard.v1.Retrieval) at {service.grpc_address}"] if service.grpc_address else []),
            f"metrics for Prometheus at {', '.join(service.metrics_addresses)}",
            sep="\n",
            flush=True,
        )
        service.wait()
    return 0


def _versions(args: Arguments) -> int:
    from cluster.console import watching
    from embedding_service.versions_client import change, export, listing, publish

    ends_canary = args.action == "canary" and args.share == 0
    needs_name = args.action not in ("list", "rollback") and not ends_canary
    if needs_name and not args.name:
        name = "RUN" if args.action == "export" else "VERSION"
        raise SettingError(name, f"is needed: lexshard versions {args.where} {args.action} ...")
    for option, given, meant in (
        ("--activate", args.activate, ("export",)),
        ("--which", args.which is not None, ("export",)),
        ("--force", args.force, ("activate", "canary")),
        ("--share", args.share is not None, ("canary",)),
    ):
        if given and args.action not in meant:
            raise SettingError(option, f"is for {' or '.join(meant)}, not for {args.action}")
    if args.action == "list":
        told, lines = listing(args.where, token_file=args.token_file)
    elif args.action == "publish":
        told, lines = publish(args.where, args.name, token_file=args.token_file)
    elif args.action == "export":
        with watching(every_seconds=0.0) as listener:
            told, lines = export(
                args.where,
                args.name,
                activate=args.activate,
                which=args.which or "best",
                token_file=args.token_file,
                on_event=listener,
            )
    else:
        share = None if args.action != "canary" else _CANARY_SHARE if args.share is None else args.share
        told, lines = change(
            args.where, args.action, args.name, share=share, force=args.force, token_file=args.token_file
        )
    print(json.dumps(told) if args.json else "\n".join(lines))
    return 0


def _query(args: Arguments) -> int:
    remote = args.where.startswith(("http://", "https://"))
    answer = _ask_service(args) if remote else _ask_artifact(args)
    if args.json:
        print(json.dumps(answer))
        return 0
    if answer.get("cold_start"):
        print("nothing here is known: the most frequent items", file=sys.stderr)
    for rank, item in enumerate(answer["items"], start=1):
        print(f"{rank:4}  {item['score']:9.4f}  {item['key']}")
    return 0


def _ask_service(args: Arguments) -> dict[str, Any]:
    from urllib.parse import urlencode

    from embedding_service.http_client import ask

    question = {"similar": [("key", key) for key in args.keys], "recommend": [("items", key) for key in args.keys]}
    user = [("user", args.user)] if args.user else []
    query = urlencode([*question[args.kind], ("k", str(args.k)), *user])
    answer = ask(args.where, "GET", f"/v1/{args.kind}?{query}")
    if not isinstance(answer.get("items"), list):
        raise LexshardError(f"{args.where} does not answer as a lexshard service: its answer has no items")
    return answer


def _ask_artifact(args: Arguments) -> dict[str, Any]:
    folder = _artifact_folder(args.where)
    from embedding_service.artifact import Artifact
    from embedding_service.retrieval import Retriever

    artifact = Artifact.open(folder)
    retriever = Retriever(artifact)
    keys = [_typed(key, artifact.keys("item").key_type) for key in args.keys]
    if args.kind == "similar":
        results = retriever.similar(keys, args.k)
    else:
        users = [_typed(args.user, _user_keys(artifact).key_type)] if args.user else None
        results = retriever.recommend([keys], args.k, users=users)
    scores = results.scores[0].tolist()
    items = [{"key": key, "score": score} for key, score in zip(results.keys[0], scores, strict=False)]
    return {"version": artifact.version, "items": items, "cold_start": results.cold_start[0]}


def _user_keys(artifact: Any) -> Any:
    """The users that the artifact's query tower sees. Raises LexshardError."""
    if all(block.source != "user" for block in artifact.query_tower().spec.inputs):
        raise LexshardError("--user: the model of this artifact sees no users; leave it out")
    return artifact.key_map("user")


def _typed(key: str, key_type: str) -> int | str:
    """A key as the command line gives it, as the vocabulary has it."""
    if key_type != "int64":
        return key
    try:
        return int(key)
    except ValueError:
        raise LexshardError(f"key {key!r}: the keys of this artifact are whole numbers") from None


def _submit(args: Arguments) -> int:
    from cluster.submit import submit

    command = args.arguments[1:] if args.arguments[:1] == ["--"] else args.arguments
    if not command:
        raise LexshardError("nothing to submit: lexshard submit --address http://HOST:8265 -- train CONFIG")
    build_parser().parse_args(command)  # a typing error shows here, not on the cluster
    status = submit(
        command,
        address=args.address,
        working_dir=args.working_dir,
        python=args.python,
        on_log=lambda text: print(text, end="", flush=True),
    )
    print(f"job {status}")
    return 0 if status == "SUCCEEDED" else 1


def _demo(args: Arguments) -> int:
    from cluster.config import load_config
    from cluster.console import table, watching

    asked = [] if args.port is None else [f"serve.port={args.port}"]
    wanted = load_config(None, asked).serve.port
    from embedding_service.app import serve_artifact
    from embedding_service.http_client import ask
    from trainers.demo import METRICS, run_demo

    with watching(every_seconds=10.0) as listener:
        demo = run_demo(args.folder, site_packages=args.site_packages, on_event=listener)
    print("\nnext calls of functions that training has not seen, ranked among all calls:\n")
    print(table(("model", "search", *METRICS, "seconds to train"), demo.table))
    print()
    for question, answers in demo.examples:
        print(f"{question}:\n    {', '.join(answers)}")
    port = wanted if asked else _free_port(wanted)
    print(f"\nserving {demo.served}", flush=True)
    with serve_artifact(demo.served, port=port, log_level="warning") as service:
        print(f"try: curl '{service.address}{demo.question}'")
        answer = ask(service.address, "GET", demo.question)
        print(f"     {', '.join(item['key'] for item in answer['items'])}")
        if sys.stdout.isatty():
            print(f"documentation: {service.address}/docs; Ctrl-C stops", flush=True)
            service.wait()
            return 0
    print(json.dumps({**demo.figures, "asked": demo.question, "answered": [item["key"] for item in answer["items"]]}))
    return 0


def _free_port(wanted: int) -> int:
    """`wanted` if nothing listens there, else a port that is free."""
    import socket

    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise LexshardError("this machine has no free port")


# ---------------------------------------------------------------- folders


def _run_folder(path: str) -> str:
    """`path` if it is a run. Raises ArtifactError."""
    if not Path(path).is_dir():
        raise ArtifactError(f"{path}: there is no such folder")
    if not (Path(path) / "config.toml").exists():
        raise ArtifactError(f"{path}: is not a run (it has no config.toml); `lexshard train` makes one")
    return path


def _artifact_folder(path: str) -> str:
    """The artifact that `path` means: itself, or what the run there has published. Raises ArtifactError."""
    folder = Path(path)
    if not folder.is_dir():
        raise ArtifactError(f"{path}: there is no such folder")
    if (folder / "manifest.json").exists() or (folder / "CURRENT").exists():
        return path
    if (folder / "artifacts" / "CURRENT").exists():
        return str(folder / "artifacts")
    if (folder / "config.toml").exists():
        raise ArtifactError(f"{path}: nothing was published from this run yet; run `lexshard export {path}`")
    raise ArtifactError(f"{path}: is neither a run nor an artifact (no config.toml, CURRENT or manifest.json)")


_COMMANDS: dict[str, Callable[[Arguments], int]] = {
    "doctor": _doctor,
    "config": _config,
    "sessions": _sessions,
    "profile": sizing.profile,
    "plan": sizing.plan,
    "train": _train,
    "tune": _tune,
    "export": _export,
    "evaluate": _evaluate,
    "submit": _submit,
    "serve": _serve,
    "query": _query,
    "versions": _versions,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
