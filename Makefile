# Sets up the project's own virtual environment and runs its main jobs.
# `make help` lists them; variables: PYTHON (used to create the environment), VENV (where it stands), PORT (make serve),
# WORKERS (make test, make coverage; 0 is one process without any), DATASET and JOBS (make experiments).

PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
DATASET ?=
JOBS ?= 2
WORKERS ?= 2
COVERAGE ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Kernels started by papermill, nbval and Jupyter Book belong to this environment, whatever kernels the user has registered.
export PATH := $(abspath $(BIN)):$(PATH)
export JUPYTER_PREFER_ENV_PATH := 1
unexport JUPYTER_PATH
unexport PYTHONHOME

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup train test test-faults experiments figures notebooks book check-site serve coverage hooks lint

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(STAMP) ## create the virtual environment and install the project into it

# The stamp is written last, so an interrupted installation is taken up again by the next call.
$(STAMP): pyproject.toml
	@command -v "$(PYTHON)" >/dev/null 2>&1 || { \
	  echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: '$(PYTHON)' is $$("$(PYTHON)" --version 2>&1), but Python 3.11 or newer is needed." >&2; \
	  echo "Name a newer one: make PYTHON=python3.11" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv $(VENV) || { \
	  echo "error: '$(PYTHON)' could not create $(VENV). On Debian and Ubuntu, install the package python3-venv." >&2; exit 1; }
	@echo "Installing into $(VENV): some minutes the first time ..."
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e ".[dev]"
	@touch $@

train: $(STAMP) ## train a tokenizer: the notebook's executed copy goes to runs/train_tokenizer.ipynb
	@mkdir -p runs
	$(BIN)/papermill book/train_tokenizer.ipynb runs/train_tokenizer.ipynb -p tokens 64

# All tests of a file run on one worker, in order, for they share what the file has prepared.
PYTEST = $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

# Both halves run even if the first fails; runs start from an empty directory, so training really happens.
test: $(STAMP) ## run all tests: pytest, then the notebooks against their stored outputs
	@runs=$$(mktemp -d) && trap 'rm -rf "$$runs"' EXIT && \
	export SOFTVQ_RUNS="$$runs" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 && failed=0; \
	$(PYTEST) $(if $(COVERAGE),--cov --cov-report=) || failed=1; \
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout=900 book || failed=1; \
	exit $$failed

test-faults: $(STAMP) ## kill 400 training runs and compare how they end: some minutes
	$(BIN)/python -m pytest -m slow tests

coverage: $(STAMP) ## run the library's tests and say which lines they reach; lines are shown in _build/coverage
	$(PYTEST) --cov --cov-report=term --cov-report=html

hooks: $(STAMP) ## have git check each commit: style, clean notebooks, no large files
	$(BIN)/pre-commit install

lint: $(STAMP) ## check style: ruff's linter and formatter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Without DATASET, the parameter files' own: data/tiny-imagenet/*.parquet.
experiments: $(STAMP) ## run what is missing of the study: hours. DATASET=folder of Tiny-ImageNet, JOBS=2 at a time
	@test -n "$(DATASET)" || ls data/tiny-imagenet/*.parquet >/dev/null 2>&1 || { \
	  echo "error: the study needs Tiny-ImageNet, which is not part of this repository: data/tiny-imagenet/*.parquet is missing." >&2; \
	  echo "Name its folder of parquet files: make experiments DATASET=path/to/tiny-imagenet. book/experiments.ipynb says how to get it." >&2; exit 1; }
	$(BIN)/python book/run_sweeps.py sweeps/mini --jobs $(JOBS) $(if $(DATASET),--dataset "$(DATASET)")

figures: $(STAMP) ## draw every table and figure of the study from recorded rows into _build/figures; trains nothing
	$(BIN)/python book/draw_figures.py

notebooks: $(STAMP) ## run the notebooks at their defaults and store the outputs that the tests compare with
	$(BIN)/python book/store_outputs.py book/*.ipynb book/paper/*.ipynb

book: $(STAMP) ## build the site into _build/html
	$(BIN)/jupyter-book build book -n -W --keep-going

check-site: $(STAMP) ## check the built site: links, sizes, nothing from outside; after make book
	$(BIN)/python -m pytest -m site tests/test_site.py

serve: $(STAMP) ## show the site at http://127.0.0.1:8000 (PORT=... for another port); builds it if it is not there
	@test -f _build/html/index.html || $(MAKE) book
	$(BIN)/python -m http.server $(PORT) --bind 127.0.0.1 --directory _build/html
