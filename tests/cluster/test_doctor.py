from __future__ import annotations

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from cluster import doctor
from cluster.doctor import FAISS, FAISS_PIN, FBGEMM, FBGEMM_PIN, PINS, Facts, Finding, diagnose, is_healthy, to_json

ROOT = Path(__file__).parents[2]
GOOD = {**PINS, "torch": "2.13.0+cpu", "fbgemm-gpu-cpu": "1.8.0", "faiss-cpu": "1.15.1"}
GPU = {**PINS, "fbgemm-gpu": "1.8.0", "faiss-gpu": "1.15.1"}


def _facts(versions: dict[str, str | None] | None = None, **changes: Any) -> Facts:
    """A healthy CPU installation with changes; a version of None means not installed."""
    merged = {**GOOD, **(versions or {})}
    return Facts(python=changes.pop("python", (3, 11, 7)), versions={k: v for k, v in merged.items() if v}, **changes)


def _problems(facts: Facts) -> list[Finding]:
    return [finding for finding in diagnose(facts) if finding.level == "problem"]


def _the_problem(facts: Facts) -> Finding:
    (problem,) = _problems(facts)
    return problem


def test_healthy_installations() -> None:
    assert is_healthy(diagnose(_facts()))
    assert is_healthy(diagnose(Facts((3, 11, 0), GPU, gpus=8, torch_cuda="13.0")))
    assert {"torch", "torchrec", "fbgemm-gpu-cpu", "faiss-cpu", "ray"} <= {f.subject for f in diagnose(_facts())}


def test_both_fbgemm_packages() -> None:
    problem = _the_problem(_facts({"fbgemm-gpu": "1.8.0"}))
    assert "both installed" in problem.detail
    assert problem.fix == (
        "python -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu && python -m pip install fbgemm-gpu-cpu==1.8.0"
    )
    with_gpus = _problems(_facts({"fbgemm-gpu": "1.8.0"}, gpus=2, torch_cuda="13.0"))[0]
    assert with_gpus.fix.endswith(" && python -m pip install fbgemm-gpu==1.8.0")


def test_both_faiss_packages() -> None:
    problem = _the_problem(_facts({"faiss-gpu": "1.15.1"}))
    assert (problem.subject, problem.fix[-17:]) == ("faiss", "faiss-cpu==1.15.1")


@pytest.mark.parametrize(
    ("name", "version", "fix"),
    [
        ("torch", "2.12.1+cpu", "python -m pip install torch==2.13.0"),
        ("torchrec", "1.7.0", "python -m pip install --no-deps torchrec==1.8.0"),
        ("fbgemm-gpu-cpu", "1.7.0", "python -m pip install fbgemm-gpu-cpu==1.8.0"),
        ("ray", "2.40.0", "python -m pip install ray==2.58.0"),
        ("faiss-cpu", "1.8.0", "python -m pip install faiss-cpu==1.15.1"),
    ],
)
def test_a_wrong_version(name: str, version: str, fix: str) -> None:
    problem = _the_problem(_facts({name: version}))
    assert problem.subject == name
    assert problem.detail.startswith(f"is {version}, not ")
    assert ("go together" in problem.detail) == (name in ("torch", "torchrec", "fbgemm-gpu-cpu"))
    assert problem.fix == fix


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("torch", "torch"),
        ("torchrec", "torchrec"),
        ("fbgemm-gpu-cpu", "fbgemm_gpu"),
        ("faiss-cpu", "faiss"),
        ("numba",) * 2,
    ],
)
def test_a_missing_package_is_named_once(name: str, module: str) -> None:
    """Not again for its failed import, nor for what needs it."""
    errors = {module: f"No module named '{module}'", "torchrec": f"No module named '{module}'"}
    if module in ("faiss", "numba"):
        del errors["torchrec"]
    problem = _the_problem(_facts({name: None}, errors=errors))
    assert problem.detail == "is not installed"
    assert problem.fix.split()[-1].startswith(f"{name}==")


def test_an_undefined_symbol_is_blamed_on_its_package_once() -> None:
    text = "fbgemm_gpu_config.so: undefined symbol: _ZN3c105ErrorC2E"
    problem = _the_problem(_facts(errors={"fbgemm_gpu": text, "torchrec": text}))
    assert problem.subject == "fbgemm-gpu-cpu"
    assert "built for another torch" in problem.detail
    assert problem.fix == "python -m pip install --force-reinstall --no-deps fbgemm-gpu-cpu==1.8.0"


def test_an_undefined_symbol_after_a_wrong_version_is_not_a_second_problem() -> None:
    problem = _the_problem(_facts({"torch": "2.12.0"}, errors={"fbgemm_gpu": "undefined symbol: x"}))
    assert problem.subject == "torch"


def test_a_cuda_library_without_a_gpu_means_the_wrong_build() -> None:
    error = "libcudart.so.13: cannot open shared object file: No such file or directory"
    versions = {"fbgemm-gpu-cpu": None, "fbgemm-gpu": "1.8.0"}
    facts = dataclasses.replace(_facts(versions, errors={"fbgemm_gpu": error}), torch_cuda="13.0")
    problem = _the_problem(facts)
    assert "libcudart.so.13" in problem.detail
    assert problem.fix == "python -m pip uninstall -y fbgemm-gpu && python -m pip install fbgemm-gpu-cpu==1.8.0"


def test_a_missing_cuda_library_on_a_gpu_machine() -> None:
    error = "libcublas.so.12: cannot open shared object file: No such file or directory"
    facts = Facts((3, 11, 0), GPU, errors={"faiss": error}, gpus=1, torch_cuda="13.0")
    problem = _the_problem(facts)
    assert (problem.subject, problem.fix) == ("faiss-gpu", "python -m pip install --force-reinstall faiss-gpu==1.15.1")
    assert "libcublas.so.12" in problem.detail


def test_cuda_fbgemm_beside_a_cpu_torch() -> None:
    versions = {**GPU, "torch": "2.13.0+cpu"}
    problem = _the_problem(Facts((3, 11, 0), versions, gpus=1))
    assert (problem.subject, problem.detail) == ("fbgemm-gpu", "is the CUDA build, and torch is a CPU build")


def test_another_python() -> None:
    assert _the_problem(_facts(python=(3, 12, 1))).subject == "python"


def test_small_machines_get_warnings_only() -> None:
    findings = diagnose(_facts(shm_bytes=2**20, open_files=256, gpus=2))
    warnings = [finding.subject for finding in findings if finding.level == "warning"]
    assert warnings == ["fbgemm-gpu-cpu", "/dev/shm", "open files"]
    assert is_healthy(findings)


def test_json() -> None:
    answer = json.loads(to_json(diagnose(_facts({"ray": None}))))
    assert answer["ok"] is False
    assert {
        "level": "problem",
        "subject": "ray",
        "detail": "is not installed",
        "fix": "python -m pip install ray==2.58.0",
    } in (answer["findings"])


def test_probing_survives_errors_and_crashes(monkeypatch: pytest.MonkeyPatch) -> None:
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    probes = {"json": "", "no_such_module_here": "", "csv": crash, "math": "math.no_such_function()", "zlib": ""}
    monkeypatch.setattr(doctor, "PROBES", probes)
    errors, _ = doctor._probe(list(probes))
    assert set(errors) == {"no_such_module_here", "csv", "math"}
    assert errors["no_such_module_here"] == "No module named 'no_such_module_here'"
    assert "crashed" in errors["csv"]


def test_pins_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    listed = [*project["dependencies"], *extras["cpu"], *extras["gpu"]]
    versions = {name.split("[")[0]: version for name, version in (line.split("==") for line in listed)}
    assert {name: versions[name] for name in PINS} == PINS
    assert {versions[name] for name in FBGEMM.values()} == {FBGEMM_PIN}
    assert {versions[name] for name in FAISS.values()} == {FAISS_PIN}


def test_every_direct_dependency_is_in_the_constraints() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    constraints = {
        line.strip().lower().replace("_", "-")
        for line in (ROOT / "deploy/constraints-cpu.txt").read_text().splitlines()
        if not line.startswith("#")
    }
    assert all("==" in line for line in constraints)
    direct = [*project["dependencies"], *extras["cpu"], *extras["dev"], f"torchrec=={PINS['torchrec']}"]
    names = [line.lower().replace("[train,serve]", "") for line in direct]
    assert sorted(set(names) - constraints) == []


def test_this_installation_is_healthy() -> None:
    problems = _problems(doctor.gather())
    assert [f for f in problems if f.subject != "python" or sys.version_info[:2] == doctor.PYTHON] == []
