# Two commands do everything: `make quickstart` and `make test`. `make help` lists the rest.
SHELL := /bin/bash
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
# Models, converted bundles, keys and certificates of the quickstart; the tests share its bundles.
WORKSPACE ?= .nearfar
# One pinned version: pip finds a CPU build of it. GPU users: docs/how-to/install.md.
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu

# For each fuzz target.
SECONDS ?= 60

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --retries 2
PACKAGES := nearfar sdk edge_runtime cloud_runtime converters benchmarks

export PYTHONUNBUFFERED := 1
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help quickstart test lint types imports unit vectors simulate fuzz autobahn bench clean distclean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(VENV)/.ready-convert ## Everything: environment, models, conversion, cloud runtime, requests, report
	@$(BIN)/nearfar quickstart --workspace $(WORKSPACE)

test: lint types imports unit ## Everything: environment, checks, the whole test suite

lint: $(VENV)/.ready-dev ## ruff: style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(VENV)/.ready-dev ## mypy --strict on all packages
	@$(BIN)/mypy $(PACKAGES)

imports: $(VENV)/.ready-dev ## import-linter: imports run downwards only
	@$(BIN)/lint-imports

unit: $(VENV)/.ready-dev ## pytest, real models included
	@$(BIN)/python -m pytest

vectors: $(VENV)/.ready-dev ## Write the test vectors of wire and secure channel anew
	@$(BIN)/python -m tests.vectors.generate

simulate: $(VENV)/.ready-dev ## Both ends over a bad network: make simulate SEEDS=10000
	@NEARFAR_SIMULATOR_SEEDS=$(or $(SEEDS),10000) $(BIN)/python -m pytest -q tests/simulator

# Not in `dev`: there are no wheels for every platform.
fuzz: $(VENV)/.ready-dev $(VENV)/.ready-fuzz ## Fuzz every parser: SECONDS=60 each, stops at the first crash
	@$(BIN)/python -m fuzz --seconds $(SECONDS)

autobahn: $(VENV)/.ready-dev $(VENV)/.ready-autobahn ## The Autobahn websocket cases; expected outcomes in tests/autobahn
	@$(BIN)/python -m tests.autobahn

bench: $(VENV)/.ready-dev ## The performance bars, on this machine
	@$(BIN)/nearfar bench overhead --models $(WORKSPACE)/models --check

clean: ## Remove caches and build output; keeps the environment and the models
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean ## Remove the environment, the models and every converted bundle too
	@rm -rf $(VENV) $(WORKSPACE) quickstart-report.html

# The environment. A stamp per extra, redone when the dependencies change.
$(VENV)/.ready-%: setup.cfg pyproject.toml | $(VENV)/.torch
	@echo "environment: installing nearfar[$*] into $(VENV)"
	@$(PIP) -e '.[$*]'
	@touch $@

# The CPU build first, by the name that only it has; then from PyTorch's own index; else whatever
# the index offers (on x86-64 PyPI that is the CUDA build: larger, and it runs on the CPU as well).
$(VENV)/.torch: | $(VENV)/bin/python
	@echo "environment: installing torch $(TORCH_VERSION) (CPU build where there is one)"
	@$(PIP) 'torch==$(TORCH_VERSION)+cpu' 2>/dev/null \
	  || $(PIP) 'torch==$(TORCH_VERSION)+cpu' --index-url $(TORCH_CPU_INDEX) 2>/dev/null \
	  || $(PIP) 'torch==$(TORCH_VERSION)'
	@touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found. Install Python 3.10 to 3.13, or say which one: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "error: $$($(PYTHON) --version) is not supported. Use Python 3.10 to 3.13: make PYTHON=python3.12"; exit 2; }
	@echo "environment: $(VENV) with $$($(PYTHON) --version)"
	@# Debian and Ubuntu split `ensurepip` off into python3-venv; without it pip is fetched.
	@if $(PYTHON) -c 'import ensurepip' 2>/dev/null; then $(PYTHON) -m venv $(VENV); \
	else $(PYTHON) -m venv --without-pip $(VENV) && $(VENV)/bin/python scripts/bootstrap_pip.py \
	  || { rm -rf $(VENV); exit 1; }; fi
