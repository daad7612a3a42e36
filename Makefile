# make demo   tunes a real language model on this machine and shows that it answers better
# make quick  runs the tests that find most faults a second (3 minutes), before each commit
# make test   runs the whole test suite (20 minutes), before work is handed on
# make slow   runs the tests that take minutes: random rows and texts through everything that reads them
# make matrix runs every cell of the support table and rewrites it in README.md, then every layout and server (90 minutes)
# All set up .venv first; what is done already is skipped.

PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TWO := -n 2 --dist loadfile  # processes of pytest, a file at a time: most of the suite waits for one processor

.PHONY: help install demo quick test slow matrix lint clean

help:
	@sed -n 's/^# //p' Makefile | head -6

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

# What breaks first, and tells most exactly what is broken: the rules of the house; arguments, rows and texts of all
# kinds; every family's logits in training and in every engine; weights in and out of files; one learning run of each
# method. Left out: what starts Paddle in processes of its own, servers, launches, and what needs the embedded model.
QUICK := structure errors arguments arguments_checks argument_files packing data_rows data_encode data_keys template \
	tokenizers families_text families_config families adapters adapters_files checkpoints_load checkpoints_files \
	kernels kernels_linear model_weights places inference_sampling inference_generator inference_cached \
	inference_scheduler parallel_layout training_steps finetune_learning merge compare_versions

quick: $(INSTALLED)
	@echo "==> quick tests"
	$(BIN)/python -m pytest $(TWO) $(QUICK:%=tests/test_%.py)

test: $(INSTALLED)
	@echo "==> tests"
	$(BIN)/python -m pytest $(TWO)

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
