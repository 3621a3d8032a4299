# Every target prepares what it needs; the only things expected of the machine are Python 3.11 with pip, and make.
#
#   make demo | test | lint | bench | setup
#   make proto   generates the gRPC messages anew: for those who change embedding_service/retrieval.proto
#   make page    builds the page that the service serves anew: for those who change embedding_service/page/src; needs npm
#
# PYTHON    the interpreter that .venv is made from (default: python3.11, else python3)
# PIP_ARGS  added to every pip command, for instance to point it at PyTorch's index of CPU builds: on Linux the default
#           wheel of torch brings the CUDA libraries along (harmless, and 2 GB)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=
BENCHMARKS ?= two_tower_speed serve_http gowalla diginetica

VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS := deploy/constraints-cpu.txt
INSTALLED := $(VENV)/.installed
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
TORCHREC := $(shell sed -n 's/^ *"\(torchrec==[^"]*\)".*/\1/p' pyproject.toml)

.DEFAULT_GOAL := setup
.PHONY: setup demo test lint bench page proto clean

setup: $(INSTALLED)

# The stamp is made last: an interrupted installation is taken up again by the next `make`.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "lexshard needs Python 3.11; say where it is: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "installing into $(VENV) (a few minutes, once)"
	@$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || $(PYTHON) -m venv --without-pip $(VENV)
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m pip --quiet --python $(BIN)/python install pip $(PIP_ARGS)
	@$(PIP) install --constraint $(CONSTRAINTS) $(PIP_ARGS) --editable '.[cpu,dev]'
	@$(PIP) install --no-deps $(PIP_ARGS) $(TORCHREC)
	@touch $@

demo: setup
	@$(BIN)/lexshard demo

test: setup
	@$(BIN)/python -m pytest -q --durations=10

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

# Each prints one JSON object as its last line. gowalla and diginetica need LEXSHARD_DATA, the folder with the data sets.
bench: setup
	@for name in $(BENCHMARKS); do echo "== $$name"; $(BIN)/python -m tests.benchmarks.$$name || exit 1; done

page:
	cd embedding_service/page && npm ci --ignore-scripts --no-audit --no-fund && npm run build

proto: setup
	@$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. embedding_service/retrieval.proto

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
