"""lexshard doctor: do the installed packages work together, and if not, which is wrong and what mends it?

`gather` looks at the machine; `diagnose` judges what it found and touches nothing, so that any broken installation can
be described to it in a test.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

PYTHON = (3, 11)
PINS = {  # as in pyproject.toml; a test holds them together
    "torch": "2.13.0",
    "torchrec": "1.8.0",
    "ray": "2.58.0",
    "numpy": "2.4.6",
    "pyarrow": "26.0.1",
    "numba": "0.68.1",
    "duckdb": "2.0.0",
}
FBGEMM = {"cpu": "fbgemm-gpu-cpu", "gpu": "fbgemm-gpu"}
FBGEMM_PIN = "1.8.0"
FAISS = {"cpu": "faiss-cpu", "gpu": "faiss-gpu"}
FAISS_PIN = "1.15.1"

# module -> what must work in it beyond the import: fbgemm's import alone does not notice a library that failed to load
PROBES = {
    "numpy": "",
    "torch": "",
    "fbgemm_gpu": "import torch; torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))",
    "torchrec": "import torchrec.distributed",
    "faiss": "",
    "ray": "",
    "pyarrow": "import pyarrow.parquet",
    "numba": "",
    "duckdb": "",
}
_MIN_SHM_BYTES = 64 * 2**20
_MIN_OPEN_FILES = 4096
_PIP = "python -m pip install"


@dataclass(frozen=True)
class Facts:
    """What `gather` saw."""

    python: tuple[int, int, int]
    versions: dict[str, str]  # distribution -> version, of those that are installed; local parts (+cpu) included
    errors: dict[str, str] = field(default_factory=dict)  # module -> why its probe failed
    gpus: int = 0  # devices that the NVIDIA driver shows
    torch_cuda: str = ""  # CUDA version torch was built for; empty: a CPU build
    shm_bytes: int = 2**30
    open_files: int = 2**20


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis."""

    level: Literal["ok", "warning", "problem"]
    subject: str
    detail: str
    fix: str = ""  # the command that mends it


def gather() -> Facts:
    """Look at this interpreter and machine. Imports happen in another process, which may crash."""
    names = [*PINS, *FBGEMM.values(), *FAISS.values()]
    versions = {name: version for name in names if (version := _version(name))}
    errors, torch_cuda = _probe(list(PROBES))
    return Facts(
        python=sys.version_info[:3],
        versions=versions,
        errors=errors,
        gpus=_count_gpus(),
        torch_cuda=torch_cuda,
        shm_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else 0,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def diagnose(facts: Facts) -> list[Finding]:
    """Every check's verdict, in the order in which they are best mended."""
    findings = [*_check_python(facts), *_check_fbgemm(facts), *_check_faiss(facts), *_check_pins(facts)]
    blamed = {finding.subject for finding in findings if finding.level == "problem"}
    return [*findings, *_check_imports(facts, blamed), *_check_machine(facts)]


def to_json(findings: list[Finding]) -> str:
    """The diagnosis for programs: `ok` and the findings."""
    rows = [{"level": f.level, "subject": f.subject, "detail": f.detail, "fix": f.fix} for f in findings]
    return json.dumps({"ok": is_healthy(findings), "findings": rows}, indent=2)


def is_healthy(findings: list[Finding]) -> bool:
    """Whether no finding is a problem; warnings do not count."""
    return all(finding.level != "problem" for finding in findings)


# ---------------------------------------------------------------- judging


def _flavour(facts: Facts) -> Literal["cpu", "gpu"]:
    """Which of the two installations this is, or should be where the packages contradict each other."""
    installed = [flavour for flavour, name in FBGEMM.items() if name in facts.versions]
    if installed == ["cpu"]:
        return "cpu"
    return "gpu" if installed == ["gpu"] or facts.gpus > 0 else "cpu"


def _check_python(facts: Facts) -> Iterator[Finding]:
    version = ".".join(map(str, facts.python))
    if facts.python[:2] == PYTHON:
        yield Finding("ok", "python", version)
    else:
        wanted = ".".join(map(str, PYTHON))
        yield Finding("problem", "python", f"is {version}; the pinned packages are built for {wanted}",
                      f"make clean setup PYTHON=python{wanted}")  # fmt: skip


def _check_fbgemm(facts: Facts) -> Iterator[Finding]:
    flavour = _flavour(facts)
    right = FBGEMM[flavour]
    installed = [name for name in FBGEMM.values() if name in facts.versions]
    if len(installed) == 2:
        yield Finding(
            "problem",
            "fbgemm",
            "fbgemm-gpu and fbgemm-gpu-cpu are both installed: they share one import name and overwrite each other",
            f"python -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && {_PIP} {right}=={FBGEMM_PIN}",
        )
    elif not installed:
        yield Finding("problem", "fbgemm", "is not installed", f"{_PIP} {right}=={FBGEMM_PIN}")
    elif flavour == "gpu" and "torch" in facts.versions and not facts.torch_cuda and "torch" not in facts.errors:
        yield Finding(
            "problem",
            right,
            "is the CUDA build, and torch is a CPU build",
            f"python -m pip uninstall -y fbgemm-gpu && {_PIP} fbgemm-gpu-cpu=={FBGEMM_PIN}",
        )
    else:
        yield from _check_version(right, facts.versions[right], FBGEMM_PIN)
        if flavour == "cpu" and facts.gpus:
            yield Finding("warning", right, f"is the CPU build: tables will not use the {facts.gpus} GPUs here")


def _check_faiss(facts: Facts) -> Iterator[Finding]:
    right = FAISS[_flavour(facts)]
    installed = [name for name in FAISS.values() if name in facts.versions]
    if len(installed) == 2:
        yield Finding(
            "problem",
            "faiss",
            "faiss-cpu and faiss-gpu are both installed: they share one import name and overwrite each other",
            f"python -m pip uninstall -y faiss-cpu faiss-gpu && {_PIP} {right}=={FAISS_PIN}",
        )
    elif not installed:
        yield Finding("problem", "faiss", "is not installed", f"{_PIP} {right}=={FAISS_PIN}")
    else:
        yield from _check_version(installed[0], facts.versions[installed[0]], FAISS_PIN)


def _check_pins(facts: Facts) -> Iterator[Finding]:
    for name, pin in PINS.items():
        if name not in facts.versions:
            yield Finding("problem", name, "is not installed", _install(name, pin))
        else:
            yield from _check_version(name, facts.versions[name], pin)


def _check_version(name: str, version: str, pin: str) -> Iterator[Finding]:
    public = version.split("+")[0]
    if public == pin:
        yield Finding("ok", name, version)
        return
    lockstep = name in ("torch", "torchrec", *FBGEMM.values())
    why = " (torch 2.13, torchrec 1.8 and fbgemm 1.8 go together and with no other)" if lockstep else ""
    yield Finding("problem", name, f"is {version}, not {pin}{why}", _install(name, pin))


def _install(name: str, pin: str) -> str:
    # torchrec's metadata asks for fbgemm-gpu, the CUDA build, whatever is there
    return f"{_PIP} {'--no-deps ' if name == 'torchrec' else ''}{name}=={pin}"


def _check_imports(facts: Facts, blamed: set[str]) -> Iterator[Finding]:
    """Failed probes, the cause only: torch takes fbgemm down, and fbgemm torchrec; so does what is `blamed` already."""
    fbgemm, faiss = FBGEMM[_flavour(facts)], FAISS[_flavour(facts)]
    chain_is_blamed = bool(blamed & {"torch", "torchrec", "fbgemm", *FBGEMM.values()})
    for module, error in facts.errors.items():
        name = {"fbgemm_gpu": fbgemm, "faiss": faiss}.get(module, module)
        in_chain = module in ("torch", "fbgemm_gpu", "torchrec")
        if name in blamed or (in_chain and chain_is_blamed) or (module == "faiss" and "faiss" in blamed):
            continue
        chain_is_blamed |= in_chain
        yield _judge_import(name, error, facts)


def _judge_import(name: str, error: str, facts: Facts) -> Finding:
    pin = {**PINS, **dict.fromkeys(FBGEMM.values(), FBGEMM_PIN), **dict.fromkeys(FAISS.values(), FAISS_PIN)}[name]
    reinstall = f"{_PIP} --force-reinstall --no-deps {name}=={pin}"
    library = re.search(r"lib(?:cu|nv|nccl)[\w.-]*\.so[\w.]*", error)
    if library and facts.gpus == 0:
        detail = f"needs the CUDA library {library[0]}, and this machine has no GPU: it is the CUDA build"
        return Finding("problem", name, detail, _to_cpu(name, pin))
    if library:  # torch's wheel brings the CUDA libraries, faiss-gpu's its own
        owner = name if name in FAISS.values() else "torch"
        detail = f"does not find the CUDA library {library[0]}"
        return Finding(
            "problem", name, detail, f"{_PIP} --force-reinstall {owner}=={pin if owner == name else PINS[owner]}"
        )
    if "undefined symbol" in error:
        return Finding("problem", name, f"was built for another torch ({error})", reinstall)
    return Finding("problem", name, f"does not import: {error}", reinstall)


def _to_cpu(name: str, pin: str) -> str:
    """The command that replaces a CUDA build by the CPU build."""
    cpu = {FBGEMM["gpu"]: FBGEMM["cpu"], FAISS["gpu"]: FAISS["cpu"]}.get(name)
    if cpu is None:
        return f"{_PIP} --force-reinstall {name}=={pin}"
    return f"python -m pip uninstall -y {name} && {_PIP} {cpu}=={pin}"


def _check_machine(facts: Facts) -> Iterator[Finding]:
    if facts.shm_bytes < _MIN_SHM_BYTES:
        detail = f"has {facts.shm_bytes >> 20} MiB; Ray falls back to slow files below {_MIN_SHM_BYTES >> 20} MiB"
        yield Finding("warning", "/dev/shm", detail, "docker run --shm-size=1g ... (in a container)")
    else:
        yield Finding("ok", "/dev/shm", f"{facts.shm_bytes >> 20} MiB")
    if facts.open_files < _MIN_OPEN_FILES:
        detail = f"at most {facts.open_files}; Ray and its HTTP proxy want {_MIN_OPEN_FILES}"
        yield Finding("warning", "open files", detail, f"ulimit -n {_MIN_OPEN_FILES}")
    else:
        yield Finding("ok", "open files", f"at most {facts.open_files}")
    yield Finding("ok", "GPUs", str(facts.gpus) if facts.gpus else "none: everything runs on CPU")


# ---------------------------------------------------------------- looking


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _probe(modules: list[str]) -> tuple[dict[str, str], str]:
    """Errors by module, and torch's CUDA version. One process imports all, and is started again after a crash."""
    errors: dict[str, str] = {}
    torch_cuda = ""
    while modules:
        run = subprocess.run(
            [sys.executable, "-P", "-c", _PROBE_SCRIPT, json.dumps({name: PROBES[name] for name in modules}), _MARK],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONWARNINGS": "ignore"},
        )
        answers = [json.loads(line.removeprefix(_MARK)) for line in run.stdout.splitlines() if line.startswith(_MARK)]
        for answer in answers:
            if answer["error"]:
                errors[answer["module"]] = answer["error"]
            torch_cuda = answer.get("cuda") or torch_cuda
        modules = modules[len(answers) :]
        if modules:  # the next one took the process down
            errors[modules.pop(0)] = f"the interpreter crashed with status {run.returncode}"
    return errors, torch_cuda


_MARK = "lexshard-probe:"  # other lines are the libraries' own
_PROBE_SCRIPT = """
import importlib, json, sys
for name, more in json.loads(sys.argv[1]).items():
    answer = {"module": name, "error": ""}
    try:
        module = importlib.import_module(name)
        exec(more)
        if name == "torch":
            answer["cuda"] = module.version.cuda
    except Exception as error:
        answer["error"] = (str(error).strip().splitlines() or [type(error).__name__])[0]
    print(sys.argv[2] + json.dumps(answer), flush=True)
"""


def _count_gpus() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    run = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return len(run.stdout.splitlines()) if run.returncode == 0 else 0
