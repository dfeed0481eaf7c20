# One command each; `make help` lists them.  All that is presumed is a Python (3.11) with its venv module.

PYTHON ?= python3
TARGET ?= 16384
STEPS ?= 32
ARGS ?=
PYTEST_ARGS ?=

# Unit tests beside those that start several processes: tests/conftest.py says which go together.
SIDE_BY_SIDE := -n 3 --dist loadscope

VENV ?= .venv
PY := $(VENV)/bin/python
# Of the Python in it, or of the one that will make it.
VERSION := $(shell for python in $(PY) $(PYTHON); do $$python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null && break; done)
CONSTRAINTS := $(firstword $(wildcard constraints-$(VERSION).txt) constraints.txt)
PIP := $(PY) -m pip --disable-pip-version-check
INSTALL = $(PIP) install --quiet --constraint $(CONSTRAINTS) --requirement

.DEFAULT_GOAL := help
.PHONY: help demo demo-control test test-all lint gpu gpu-kit clean
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

help: ## Show this list
	@echo "make COMMAND [KNOB=value ...]"
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-14s %s\n", $$1, $$2}' Makefile
	@echo "Knobs: TARGET=$(TARGET) STEPS=$(STEPS) (the demo's new window and training steps), ARGS=\"...\" (see"
	@echo "tools/demo.py --help), PYTEST_ARGS=\"...\", PYTHON=$(PYTHON) (which Python makes .venv), VENV=$(VENV)"

demo: $(VENV)/.installed ## Extend SmolLM2-135M on this machine: convert, train, export, evaluate, report
	@$(PY) tools/demo.py --target $(TARGET) --steps $(STEPS) $(ARGS)

demo-control: $(VENV)/.installed ## The same training without a terminal prompt, side by side with the demo
	@$(PY) tools/demo.py --control --target $(TARGET) --steps $(STEPS) $(ARGS)

test: $(VENV)/.installed-dev ## Run the tests (installs Slurm and Chromium where it can; GPU tests are skipped without one)
	@tests/install.sh
	@OMP_NUM_THREADS=1 $(PY) -m pytest $(SIDE_BY_SIDE) -p no:cacheprovider --durations=15 $(PYTEST_ARGS)

test-all: $(VENV)/.installed-dev ## Run the exhaustive tests too: full products of layouts and methods, many random kills
	@tests/install.sh
	@OMP_NUM_THREADS=1 $(PY) -m pytest --all $(SIDE_BY_SIDE) -p no:cacheprovider --durations=15 $(PYTEST_ARGS)

lint: $(VENV)/.installed-dev ## Check style, the rings of imports, and shell scripts
	@failed=0; \
	$(PY) -m ruff check --no-cache . || failed=1; \
	$(PY) -m ruff format --no-cache --check . || failed=1; \
	$(VENV)/bin/lint-imports --no-cache --no-logo || failed=1; \
	$(VENV)/bin/shellcheck --external-sources .ci/run $(wildcard slurm/*.sh tools/*.sh tests/*.sh tests/*/*.sh) || failed=1; \
	if [ "$$failed" != 0 ]; then echo "make lint: the checks above failed" >&2; exit 1; fi; \
	echo "lint: clean"

# On a machine with GPUs the Python that has its torch; without one, .venv's for a rehearsal.
gpu: ## Run what waits for a GPU: tests/gpu and the training step's benchmark (ARGS: benchmarks/gpu.py --help)
	@python=$(PYTHON); $$python -c 'import torch' 2>/dev/null || [ ! -x $(PY) ] || python=$(PY); $$python benchmarks/gpu.py $(ARGS)

gpu-kit: ## Pack what a GPU machine without a network lacks for make gpu (ARGS: benchmarks/gpu_kit.py --help)
	@$(PYTHON) benchmarks/gpu_kit.py $(ARGS)

clean: ## Remove .venv, the demo's files and caches (not runs/)
	rm -rf $(VENV) .gpu demo build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# The stamp is written last: an interrupted installation is done again, and a changed requirement is installed.
$(VENV)/.installed: requirements.txt $(CONSTRAINTS)
	@$(MAKE) --no-print-directory install-into-venv FILE=requirements.txt STAMP=$@

$(VENV)/.installed-dev: requirements.txt requirements-dev.txt $(CONSTRAINTS)
	@$(MAKE) --no-print-directory install-into-venv FILE=requirements-dev.txt STAMP=$@

.PHONY: install-into-venv
install-into-venv:
	@rm -f $(STAMP)
	@if ! $(PY) -m pip --version >/dev/null 2>&1; then \
		echo "Making $(VENV) with $(PYTHON)"; \
		$(PYTHON) -m venv --clear $(VENV) || { \
			echo "make: '$(PYTHON) -m venv' failed: install Python's venv module (Debian: python3-venv)," \
				"or name another Python with PYTHON=..." >&2; exit 1; }; \
	fi
	@echo "Installing $(FILE) into $(VENV) (the first time about 1.5 GB on disk and a few minutes)"
	@$(INSTALL) $(FILE) || { \
		echo "make: the installation of $(FILE) failed (see above); run the same command again to go on" >&2; exit 1; }
	@touch $(STAMP)
