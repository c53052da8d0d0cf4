# make demo   sets up .venv, pre-trains a small model with merging on, leaves runs/demo/
# make test   sets up .venv, then lint, types, import layers, docs and tests: the whole of CI
# make test-all   the same with the long tests, whole matrices of which make test runs a part
# PYTHON=python3.12 make test   uses another interpreter (3.11 or newer: constraints.txt is one set of exact versions)
# make gpu    measures everything that needs a CUDA device, with the interpreter that has torch for it (docs/gpu.md)

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check --constraint constraints.txt
JOBS   ?= 2

SHELL       := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

.PHONY: help demo test test-all lint types layers docs pytest mutations gpu gpu-wheels format constraints clean

help:
	@sed -n 's/^# \(make\|PYTHON\)/\1/p' Makefile

demo: $(VENV)/installed-demo
	$(BIN)/pretrain-merge demo

test: lint types layers docs pytest

test-all: SELECTED = -m ""
test-all: test

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

layers: $(VENV)/installed-dev
	$(BIN)/lint-imports

docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pytest: $(VENV)/installed-dev
	$(BIN)/python -m pytest --numprocesses $(JOBS) $(SELECTED)

# Breaks the package in one place at a time; a test must notice each.
mutations: $(VENV)/installed-dev
	$(BIN)/python -m tests.mutations

# On a CUDA machine, without a virtual environment: torch is what is there. GPU_OPTIONS="--forecast", "--rehearse" ...
gpu:
	$(PYTHON) -m benchmarks.gpu --json benchmarks/reports/gpu-$$(date +%F).json $(GPU_OPTIONS)

# Where there is a network: what such a machine may lack. One of them is built from source, in pure Python.
gpu-wheels: $(VENV)/bin/python
	$(PIP:install=wheel) --no-deps --wheel-dir wheels --requirement benchmarks/gpu/wheels.txt

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The stamps are newer than what they were installed from, so a second run installs nothing.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "constraints.txt needs Python 3.11 or newer; name one: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the package and its development tools into $(VENV) (minutes, once) ..."
	$(PIP) --editable '.[dev]'
	@touch $(VENV)/installed-demo $@

$(VENV)/installed-demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "Installing the package and the demo's libraries into $(VENV) (minutes, once) ..."
	$(PIP) --editable '.[demo]'
	@touch $@

# Exact versions of everything in a clean environment of the newest allowed releases; torch stays without its build's suffix.
constraints: pyproject.toml
	rm -rf $(VENV)-constraints
	$(PYTHON) -m venv $(VENV)-constraints
	$(VENV)-constraints/bin/python -m pip install --quiet --editable '.[dev]' 'torch==2.13.0' 'triton==3.7.1'
	{ sed -n '/^#/p' constraints.txt; $(VENV)-constraints/bin/python -m pip freeze --exclude-editable | sed 's/+cpu$$//'; } > constraints.new
	mv constraints.new constraints.txt
	rm -rf $(VENV)-constraints

clean:
	rm -rf $(VENV) site dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
