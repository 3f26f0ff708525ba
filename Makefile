# Each target works on a machine that has only python3 (>= 3.11) and make: it makes .venv and installs what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
TEST_EXTRAS ?= test,crosscheck
FAST_EXTRAS ?= test

.PHONY: bench test fast lint format docs clean

bench: $(VENV)/.bench  ## the main job on 8 fake CPU devices: table, rows and pictures in results/bench
	$(BIN)/toruslab bench $(ARGS)

test: $(VENV)/.test  ## all tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

fast: $(VENV)/.fast  ## the tests without those marked slow
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: $(VENV)/.dev  ## ruff and pyright
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.bench  ## the commands' help and the generated tables of README and docs are up to date
	$(BIN)/python -m benchmarks.docs.generate --check README.md docs/tpu_compiler.md docs/loops.md docs/training.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable . && touch $@

$(VENV)/.fast: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(FAST_EXTRAS)]' && touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(TEST_EXTRAS)]' && touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev]' && touch $@

clean:
	rm -rf $(VENV) build *.egg-info
