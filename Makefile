# Every target first makes .venv and installs what it needs there; only Python 3.11 or newer has to be present.
#   make demo ARGS="--seed 1"       arguments for the demo
#   make test ARGS="tests/docs -x"  arguments for pytest
#   make test JOBS=1                how many processes run the tests
#   make demo PYTHON=/opt/python3   which Python .venv is made with

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && command -v $$python && break; done)
INSTALL = $(BIN)/python -m pip install -qq --constraint constraints.txt --editable

.DELETE_ON_ERROR:
.PHONY: demo test test-slow lint docs bench results clean

demo: $(VENV)/installed
	$(BIN)/moadapt demo $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) $(ARGS)

test-slow: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m "slow and not gpu and not network" $(ARGS)

lint: $(VENV)/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy moadapt routers tasks
	$(BIN)/codespell

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/installed
	$(BIN)/python tests/bench/routing.py $(ARGS)

results: $(VENV)/installed  # an hour or two; the same command goes on where it stopped
	$(BIN)/python -m tests.bench.router_quality run $(ARGS)
	$(BIN)/python -m tests.bench.composition run

clean:
	rm -rf $(VENV) build dist site *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "moadapt needs Python 3.11 or newer; neither python3.11 nor python3 is one." \
		"Install it, or say where it is: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Installing moadapt into $(VENV) with $(PYTHON); the first time takes some minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(INSTALL) .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	@echo "Installing the development tools into $(VENV)"
	@$(INSTALL) ".[dev]"
	@touch $@
