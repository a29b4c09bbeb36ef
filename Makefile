# make install · make demo · make test. Each makes the environment .venv if it is not there.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

.PHONY: install demo test lint types clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml scripts/constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("umtrain needs Python 3.11 or newer: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint scripts/constraints.txt --editable '.[cuda,dev]'
	@touch $@

demo: install
	@bash scripts/demo.sh $(BIN)/umtrain $(DEMO)

test: install
	$(BIN)/ruff format --check umtrain tests scripts
	$(BIN)/ruff check umtrain tests scripts
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

clean:
	rm -rf $(VENV) $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
