# Everything a user starts with. `make` lists the targets.

VENV ?= .venv
PYTHON ?= $(shell python3.11 -c 'import sys; print(sys.executable)' 2>/dev/null || echo python3)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := torch==2.13.0

# One thread per process: tests and quickstart start several processes themselves.
export OMP_NUM_THREADS ?= 1

# Processes that run tests, each with 1-2 GiB and at times eight ranks of its own.
WORKERS ?= 2
# Not reordered by the number of tests in a file: tests/conftest.py puts the long ones first.
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help install quickstart test-fast test test-all check format clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

install: $(STAMP) ## virtual environment with everything, in .venv (VENV= and PYTHON= override)

$(STAMP): setup.py pyproject.toml megatron_ponder/installation.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, $(PYTHON) is older: make install PYTHON=..." >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@touch $@

quickstart: $(STAMP) ## pretrain and compare two small models (7 minutes on 2 cores after installation, no GPU); METHODS=all: five
	$(BIN)/python examples/quickstart/run.py $(if $(METHODS),--methods $(METHODS))

test-fast: $(STAMP) ## unit tests without ranks, for the work in between (90 seconds on 2 cores)
	$(PYTEST) -m "not slow and not thorough" tests/rules tests/unit

test: $(STAMP) ## the tests that need no GPU (10 minutes on 2 cores; WORKERS=2)
	$(PYTEST) -m "not slow"

test-all: $(STAMP) ## all tests
	$(PYTEST)

check: $(STAMP) ## lint, types, rules of the house
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/rules

format: $(STAMP) ## lint and format what can be done automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the environment, caches and build products; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
