# One command for people and for CI. Everything runs in .venv, which is made on first use and remade when
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
RUN := runs/demo-$(shell date +%Y%m%d-%H%M%S)

BIN := .venv/bin
INSTALLED := .venv/installed
PEERS := .venv-peers/installed

# The pins hold for what is installed and for the isolated environment in which pip builds: there, pip before 25.3
# reads the first variable, and later ones the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test check format build bench bench-quality bench-scaling bench-solvers clean

help:  ## say what can be made
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED)  ## make .venv with the tested versions (PYTHON=python3.12 chooses the interpreter)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "make: '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo 'not there'), and Python 3.11 or newer is needed: name one, as in 'make install PYTHON=python3.12'" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -e ".[dev]"
	@touch $@

demo: $(INSTALLED)  ## train on digits, sample, evaluate and draw the figures, in a fresh directory under runs/
	$(BIN)/ancestral train digits --to $(RUN)
	$(BIN)/ancestral sample $(RUN) --gif
	$(BIN)/ancestral evaluate $(RUN)
	$(BIN)/ancestral figures $(RUN)
	@echo "The demo is in $(RUN):"
	@find $(RUN) -maxdepth 2 | sort

# Two workers of one thread each: on two cores, more threads would only wait for each other.
test: $(INSTALLED)  ## run every test and every example in a docstring
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal -q -rs

check: $(INSTALLED)  ## lint, formatting, types, and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)  ## rewrite the code as `make check` wants it
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(INSTALLED)  ## build the wheel into dist/
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .
	@ls dist/*.whl

# The peers have an environment of their own, with the same torch. benchmarks/peers.txt lists all of it.
$(PEERS): benchmarks/peers.txt constraints.txt
	test -x .venv-peers/bin/python || $(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch
	.venv-peers/bin/pip install --quiet --no-deps -r benchmarks/peers.txt
	@touch $@

bench: $(INSTALLED) $(PEERS)  ## training and sampling beside the peers, in 25 minutes of a quiet machine
	$(BIN)/python benchmarks/bench.py

bench-quality: $(INSTALLED) $(PEERS)  ## held-out loss against time beside the peers' networks, in an hour and a half
	PYTHONPATH=src .venv-peers/bin/python benchmarks/quality.py

bench-scaling: $(INSTALLED)  ## time and memory against side, batch, size of the data and processes, in 3 minutes
	$(BIN)/python benchmarks/scaling.py

bench-solvers: $(INSTALLED) $(PEERS)  ## error against evaluations beside the peers' solvers, and the time of a step, in about 55 minutes
	PYTHONPATH=src .venv-peers/bin/python benchmarks/solvers.py

clean:  ## remove dist/ and caches; runs/ and the environments stay
	rm -rf dist build .hypothesis .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
