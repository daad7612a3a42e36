# make demo   tunes a real language model on this machine and shows that it answers better
# make test   runs the whole test suite
# make slow   runs the tests that take minutes: random rows and texts through everything that reads them
# make matrix runs every cell of the support table and rewrites it in README.md, then every layout and server (90 minutes)
# All set up .venv first; what is done already is skipped.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test slow matrix lint clean

help:
	@sed -n 's/^# //p' Makefile | head -5

install: $(INSTALLED)

$(INSTALLED): requirements.txt requirements-nodeps.txt constraints.txt tools/fetch_vocabularies.py
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; set PYTHON=/path/to/it"; exit 2; }
	@echo "==> setting up $(VENV) with $$($(PYTHON) --version) (about 1.5 GB of packages on a new machine)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-nodeps.txt
	@$(BIN)/python tools/fetch_vocabularies.py
	@touch $@

demo: $(INSTALLED)
	@echo "==> demo: LoRA on the embedded model, before and after"
	$(BIN)/python examples/demo.py

test: $(INSTALLED)
	@echo "==> tests"
	$(BIN)/python -m pytest

slow: $(INSTALLED)
	@echo "==> slow tests"
	$(BIN)/python -m pytest -m slow

matrix: $(INSTALLED)
	@echo "==> matrix: every family and method with the real scripts on tiny models"
	$(BIN)/python tools/matrix.py
	@echo "==> matrix: every family in every parallel layout"
	$(BIN)/python tools/layouts.py
	@echo "==> matrix: checkpoints across layouts, ranks that fail, and every family through the server"
	$(BIN)/python -m pytest -m matrix

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
