# make demo | test | lint need nothing before them: each makes .venv first where it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := .cache/smollm2-135m
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup demo test test-fast test-faults lint format clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 14

setup: $(VENV)/.ready  ## make .venv with exact versions

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

model: $(MODEL)/config.json

$(MODEL)/config.json: tools/make_smollm2.py | $(VENV)/.ready
	$(BIN)/python tools/make_smollm2.py $(MODEL)

demo: $(VENV)/.ready $(MODEL)/config.json  ## a real 135M model from checkpoint to first training steps (about 5 minutes)
	$(BIN)/python tools/demo.py $(MODEL)

test: $(VENV)/.ready $(MODEL)/config.json  ## all tests, the real model included
	STREAMDA_TEST_MODEL=$(MODEL) $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not faults"

test-fast: $(VENV)/.ready  ## tests without the real model
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not faults"

test-faults: $(VENV)/.ready  ## the long sweeps: kills, failing system calls, crashes, damage, hostile files
	$(BIN)/python -m pytest -q -n 2 --dist worksteal -m faults

lint: $(VENV)/.ready  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove everything that make made, downloads included
	rm -rf $(VENV) .cache demo-output build *.egg-info
