# Needs make and Python 3.11 or newer with pip and venv. Everything else goes into .venv, which is made on first use and
# again when pyproject.toml or constraints.txt change.
#
#   make drill                              train under injected faults, report in drill-report/
#   make test ARGS="tests/unit -k ring"     pytest, with any of its arguments
#   make check                              lint, types and contracts
#
# constraints.txt pins torch. To use the torch that is already installed instead, say one built for your GPU:
#
#   make distclean && make drill VENV_FLAGS=--system-site-packages CONSTRAINTS=

PYTHON      ?= python3
VENV        ?= .venv
VENV_FLAGS  ?=
CONSTRAINTS ?= constraints.txt
ARGS        ?=

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
PIP   := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(addprefix -c ,$(CONSTRAINTS))

.DEFAULT_GOAL := help
.PHONY: help setup drill test lint types contracts check clean distclean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##  *\(.*\)/\1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 12

$(STAMP): pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.exit(f"tolaria needs Python 3.11 or newer, this is {sys.version.split()[0]}: use make PYTHON=..." if sys.version_info < (3, 11) else 0)'
	@echo "Making $(VENV): once, and a few minutes, since torch is large."
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(PIP) 'pip>=25.1'  # the first one that knows --group
	$(PIP) --editable '.[demo,tensorboard,sb3,torchrl,lightning,transformers,accelerate,data]' --group dev
	@touch $@

setup: $(STAMP)  ## make or refresh .venv

drill: $(STAMP)  ## train under injected faults, report in drill-report/
	$(BIN)/tolaria drill --out drill-report $(ARGS)

# All of them in as many processes as there are cores, a file in one process; with ARGS in this process alone.
test: $(STAMP)  ## run the tests
	$(if $(ARGS),,OMP_NUM_THREADS=1 )$(BIN)/python -m pytest $(if $(ARGS),$(ARGS),-n auto --maxprocesses 8 --dist loadfile)

lint: $(STAMP)  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## pyrefly on src and tests
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

contracts: $(STAMP)  ## import-linter: who may import whom
	$(BIN)/lint-imports --no-logo --no-cache

check: lint types contracts  ## all three of the above

clean:  ## remove reports, caches and built packages
	rm -rf drill-report build dist .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -type d -name __pycache__ -prune -exec rm -rf {} +

distclean: clean  ## the same, and .venv
	rm -rf $(VENV)
