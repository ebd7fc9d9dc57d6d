# make demo, make test, make lint, make bench: each does its own set-up in .venv, with the versions of
# constraints.txt, and a second run does only what has changed.
PYTHON ?= python3
VENV := .venv
DEMO_OPTIONS ?=
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP_FILES = $(shell find csrc tests/cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint bench setup

demo: setup
	$(BIN)/glance-ext demo --output demo-report --overwrite $(DEMO_OPTIONS)

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --cov=glance_ext --cov-fail-under=90 --durations=10

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

bench: setup
	$(BIN)/glance-ext bench ops

setup: $(VENV)/.built

# torch comes first: the extension is built against the torch that it will run with.
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt is for Python 3.11 or newer; give one with PYTHON=... (the package itself takes 3.10)")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt setuptools ninja torch
	touch $@

$(VENV)/.built: $(VENV)/.torch pyproject.toml setup.py $(shell find csrc -type f)
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[teacher,test,lint]'
	touch $@
