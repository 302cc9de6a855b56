# One word a job, each complete on a fresh machine: the first run makes .venv, later runs reuse it until
# pyproject.toml or constraints.txt change.

PYTHON ?= python3
BIN := .venv/bin
STAMPS := .venv/.stamps
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check \
	--constraint constraints.txt --build-constraint constraints.txt
# napari and Qt stay out of .venv; the packages that are there are seen from here.
NAPARI := .venv-napari
# Tests run in two processes; one thread each keeps them from fighting over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS=1

ifeq ($(MAKECMDGOALS)$(EXTRAS),extras)
$(error say which, as in: make extras EXTRAS=dicom,greedy; docs/how-to/install.md lists them)
endif

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo extras test test-all test-install test-lowest test-napari dist trial fuzz check format results bench \
	gpu-check profile docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(STAMPS)/run ## do the whole job on an embedded pair of scans, into demo/
	$(BIN)/atlassegfm demo -o demo

extras: $(STAMPS)/run ## install optional parts of the program, as make extras EXTRAS=dicom,greedy
	$(INSTALL) --editable '.[$(EXTRAS)]'

test: $(STAMPS)/test ## run the tests that take seconds
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(STAMPS)/test ## run all tests, the slow ones too (real scans in ../shared or $$ATLASSEGFM_DATA)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

trial: $(STAMPS)/test ## walk a newcomer's first day through the command line, and show it
	$(ONE_THREAD) $(BIN)/python -m pytest -q -s tests/test_trial.py

test-install: $(STAMPS)/test ## install the wheel into an empty environment, then an extra as its error message says
	$(BIN)/python -m pytest -s tests/test_install.py

test-lowest: $(STAMPS)/venv ## run the fast tests with the lowest versions that pyproject.toml allows (8 GB, in build/lowest)
	$(BIN)/python -m venv --clear build/lowest
	build/lowest/bin/python -m pip install --disable-pip-version-check uv
	build/lowest/bin/uv pip install --python build/lowest/bin/python --resolution lowest-direct \
		--editable '.[all]' --group test
	$(ONE_THREAD) build/lowest/bin/python -m pytest -n 2 -m "not slow" -o filterwarnings=default

dist: $(STAMPS)/test ## check what the wheel and the source archive hold, and build both into dist/
	$(BIN)/python -m pytest -q -m "not slow" tests/test_install.py
	$(BIN)/python -m hatchling build --clean

test-napari: $(STAMPS)/test ## open results in napari itself, which gets an environment of its own
	$(BIN)/python -m venv $(NAPARI)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')')" \
		> $$($(NAPARI)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/packages-of-the-tests.pth
	$(NAPARI)/bin/python -m pip install --disable-pip-version-check --constraint constraints.txt 'napari[pyqt6]>=0.6'
	$(ONE_THREAD) $(if $(shell command -v xvfb-run),xvfb-run -a) $(NAPARI)/bin/python -m pytest -W ignore tests/test_napari.py

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

bench: $(STAMPS)/test ## time scores against surface-distance, and inner loops of the registration against PyTorch
	$(BIN)/python benchmarks/metrics_speed.py --rounds 3
	$(BIN)/python benchmarks/registration_profile.py

gpu-check: $(STAMPS)/test ## run the tests that need a CUDA GPU, and time two jobs on it; says so without one
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/gpu_check.py $(if $(wildcard ../shared/data/Dataset001_AbdMR),--dataset ../shared/data/Dataset001_AbdMR)

profile: $(STAMPS)/test ## profile one registration, and time its inner loop before and after
	$(BIN)/python benchmarks/registration_profile.py

docs: $(STAMPS)/docs ## build the documentation into site/
	$(BIN)/python docs/generate.py
	$(BIN)/zensical build --clean --strict

clean: ## delete what the other jobs made, .venv included
	rm -rf .venv .venv-napari .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache .cache build demo dist site
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMPS)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; set PYTHON=...")'
	@echo "Making .venv (once); packages of 1 to 3 GB are downloaded, which takes some minutes"
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt --upgrade pip
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/run: $(STAMPS)/venv pyproject.toml constraints.txt
	@echo "Installing the program with the extras 'itk' and 'report' into .venv; PyTorch is the largest part"
	$(INSTALL) --editable '.[itk,report]'
	@touch $@

# Of MONAI Label the tests use the client, which needs none of what its server does.
$(STAMPS)/test $(STAMPS)/lint $(STAMPS)/docs: $(STAMPS)/%: $(STAMPS)/run
	@echo "Installing what 'make $*' needs into .venv; some minutes, once"
	$(INSTALL) --group $*
	$(if $(filter test,$*),$(INSTALL) --no-deps monailabel)
	@touch $@
