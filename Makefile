# One word a job, each complete on a fresh machine: the first run makes .venv, later runs reuse it until
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/.stamps
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint constraints.txt --build-constraint constraints.txt
# Tests run in two processes; one thread each keeps them from fighting over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all trial fuzz check format results bench profile docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/run ## do the whole job on an embedded pair of scans, into demo/
	$(BIN)/atlassegfm demo -o demo

test: $(STAMPS)/test ## run the tests that take seconds
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(STAMPS)/test ## run all tests, the slow ones too (real scans in ../shared or $$ATLASSEGFM_DATA)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

trial: $(STAMPS)/test ## walk a newcomer's first day through the command line, and show it
	$(ONE_THREAD) $(BIN)/python -m pytest -q -s tests/test_trial.py

fuzz: $(STAMPS)/test ## put 300 damaged files through check, segment and evaluate, in minutes
	$(ONE_THREAD) $(BIN)/python tests/fuzz.py

check: $(STAMPS)/lint ## lint, format, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMPS)/lint ## format the code and apply safe lint fixes
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

results: $(STAMPS)/run ## measure all of docs/results.md (about an hour on 2 cores; goes on where it stopped)
	$(BIN)/python benchmarks/results.py

bench: $(STAMPS)/test ## time the scores against surface-distance, in one run
	$(BIN)/python benchmarks/metrics_speed.py --rounds 3

profile: $(STAMPS)/test ## profile one registration, and time its inner loop before and after
	$(BIN)/python benchmarks/registration_profile.py

docs: $(STAMPS)/docs ## build the documentation into site/
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

clean: ## delete what the other jobs made, .venv included
	rm -rf .venv .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .cache build demo dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --upgrade pip
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/venv pyproject.toml constraints.txt
	$(INSTALL) --editable '.[report]'
	@touch $@

$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/run
	$(INSTALL) --group $*
	@touch $@
