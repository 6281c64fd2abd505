# Quick checks in the current environment, which needs the package and its "dev" extra.
PYTHON ?= python

.PHONY: check lint types quick all docs
check: lint types quick

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

types:
	$(PYTHON) -m mypy

quick:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto tests/unit

all: lint types
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto

docs:
	$(PYTHON) -m moe_interp.cli support --markdown > docs/support.md
