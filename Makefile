# Everything a newcomer needs. The first use of any target makes .venv and installs the project into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint grid bench

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable '.[plots]' --group dev
	touch $@

demo: $(VENV)/.ready ## prune the embedded model with several methods and print a table
	$(BIN)/secateur demo

test: lint ## lint, types and the CI part of the tests
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

grid: $(VENV)/.ready ## the full test grid; writes docs/grid.md
	$(BIN)/python tests/run_grid.py

bench: $(VENV)/.ready ## every benchmark, one after the other
	for file in benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done
