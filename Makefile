SHELL := bash
BIN := .venv/bin

# The newest interpreter that runs and can make a virtual environment: a name on the
# path alone is no proof, as version managers put shims there.
CHECK := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3; do \
	$$name -c "$(CHECK)" >/dev/null 2>&1 && echo $$name && break; done)

INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
PROCESSES := auto
TESTS :=
PYTEST = --numprocesses $(PROCESSES) --dist loadfile --no-loadscope-reorder

export NO_MKDOCS_2_WARNING := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo test test-slow docs clean

help:
	@echo "make demo    train the main job on data that ships with the project"
	@echo "make test    check everything, and test all but what takes minutes"
	@echo "make test-slow    the tests that take minutes; TESTS=tests/layers for a part"
	@echo "make docs    build the documentation in site/"
	@echo "make clean   remove .venv and what was built"

demo: $(BIN)/.run
	$(BIN)/python run.py train earth_digits --workdir runs/earth_digits

# In the last line: tests/conftest.py puts the files that take longest first.
test: $(BIN)/.test
	tools/ensure_browser.sh
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports
	$(BIN)/mkdocs build --strict
	$(BIN)/pytest -m "not slow" $(PYTEST)

test-slow: $(BIN)/.test
	$(BIN)/pytest -m slow $(PYTEST) $(TESTS)

docs: $(BIN)/.test
	$(BIN)/mkdocs build --strict

clean:
	rm -rf .venv site build dist

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Install Python 3.11 or later, with venv (Debian: apt-get install python3-venv)." >&2; exit 1; }
	$(PYTHON) -m venv .venv

$(BIN)/.run: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv; this takes a minute or two the first time."
	$(INSTALL) --editable .
	@touch $@

$(BIN)/.test: pyproject.toml | $(BIN)/python
	@echo "Installing into .venv; this takes a minute or two the first time."
	$(INSTALL) --editable '.[test]'
	@touch $@
