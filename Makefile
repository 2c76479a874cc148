# `make test` and `make demo` need only Python 3.11+, make and the package index; they keep everything in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup test lint fast demo docs bench clean

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# By two workers: one has what starts servers and engines, the other all the rest (tests/conftest.py).
fast: setup
	$(BIN)/pytest --numprocesses 2 --dist loadgroup tests/unit tests/store tests/sim

test: setup lint
	$(BIN)/pytest --numprocesses 2 --dist loadgroup

# Not by way of setup: whoever only wants to see it run needs neither linters nor web frameworks.
demo: $(VENV)/.demo
	$(BIN)/python -m examples.search_index.demo

$(VENV)/.demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[demo]'
	touch $@

docs: setup
	$(BIN)/sphinx-build --fail-on-warning --quiet --builder html docs docs/_build
	@echo "docs/_build/index.html"

bench: setup
	$(BIN)/python -m benchmarks all $(ARGS)

clean:
	rm -rf $(VENV) docs/_build .mypy_cache .pytest_cache .ruff_cache .hypothesis
