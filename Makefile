# Each target works on a machine that has only python3 (>= 3.11) and make: it makes .venv and installs what is missing.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check
ARGS ?=
TEST_EXTRAS ?= test,crosscheck
FAST_EXTRAS ?= test
DOCS_EXTRAS ?= docs

.PHONY: bench test fast lint format docs wheel oldest clean

bench: $(VENV)/.bench  ## the main job on 8 fake CPU devices: table, rows and pictures in results/bench
	$(BIN)/toruslab bench $(ARGS)

test: $(VENV)/.test  ## all tests
	$(BIN)/python -m pytest -q -n 2 --dist worksteal $(ARGS)

fast: $(VENV)/.fast  ## the tests without those marked slow
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

lint: $(VENV)/.dev  ## format, style, types, and the one direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(VENV)/.docs  ## the documentation in build/docs: generated parts checked, tutorials executed, no warning
	$(BIN)/python -m benchmarks.docs.generate --check
	$(BIN)/python -m benchmarks.docs.picture --check
	$(BIN)/python -m sphinx -W --keep-going -q -j 2 -b html docs build/docs

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.bench: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable . && touch $@

$(VENV)/.fast: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(FAST_EXTRAS)]' && touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(TEST_EXTRAS)]' && touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[$(DOCS_EXTRAS)]' && touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[dev]' && touch $@

wheel: $(VENV)/.dev  ## the wheel, installed into an empty environment and tried there
	rm -rf build/lib build/empty dist && $(BIN)/python -m build --wheel --outdir dist . >build.log 2>&1 || (cat build.log; exit 1)
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install --quiet --disable-pip-version-check dist/*.whl
	cd build && empty/bin/python ../tests/installed.py

oldest:  ## the fast tests on the oldest supported version of every dependency
	$(PYTHON) -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
	  print(*(d.replace('>=', '==') for d in p['dependencies'] + p['optional-dependencies']['test']), sep='\n')" >oldest.txt
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -r oldest.txt --editable . && rm oldest.txt
	.venv-oldest/bin/python -m pytest -q -n 2 --dist worksteal -m "not slow" $(ARGS)

clean:
	rm -rf $(VENV) .jax_cache build dist *.egg-info
