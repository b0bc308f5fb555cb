# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` do everything from a bare Linux machine with Python 3.11 or newer and a C compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
# Test processes: one per usable core, at most 8 (each holds jax and torch, 1 to 2 GB).
WORKERS ?= $(shell n=$$(nproc); echo $$(( n > 8 ? 8 : n )))
# Each process takes a run of neighbouring tests, which share fixtures and compiled programs; an idle one steals.
PARALLEL := -n $(WORKERS) --dist worksteal
TESTS ?= tests
SPEC := pyproject.toml constraints.txt

.PHONY: help demo test typed slow conformance resume lint format bench wheel clean

help:  ## this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 10

demo: $(VENV)/.demo  ## fine-tune a real 22.7M encoder on Python's own docstrings, then classify a sentence
	$(BIN)/jpeft demo

test: $(VENV)/.test  ## the fast tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow" --durations=15 $(TESTS)

typed: $(VENV)/.test  ## the fast tests with every annotation and array shape of jpeft checked
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not untyped" --jaxtyping-packages=jpeft,numeric_tower.checked $(TESTS)

slow: $(VENV)/.test  ## the slow tests: contracts on every model, training, several processes, the built wheel in an empty environment
	$(BIN)/python -m pytest $(PARALLEL) -m slow --durations=30 $(TESTS)

conformance: $(VENV)/.test  ## every method on every family against PEFT, both ways; writes docs/conformance.md
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests $(BIN)/python tests/conformance.py

resume: $(VENV)/.test  ## kills runs at random moments, resumes and compares them; writes docs/results/resume.md
	PYTHONPATH=$(CURDIR) $(BIN)/python tests/resume_lane.py

lint: $(VENV)/.dev  ## ruff and pyright over the whole tree
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(VENV)/.dev  ## rewrites the tree in ruff's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## side by side with transformers + peft: rates, memory, compile time
	$(BIN)/python benchmarks/step.py

wheel: $(VENV)/.dev  ## dist/jpeft-*.whl
	$(BIN)/python -m build --wheel --outdir dist .

clean:  ## removes what builds and runs made; keeps .venv
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/.made:
	@test -n "$(PYTHON)" || { echo "no python3 found: set PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jpeft needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch comes first, alone and by its exact version: the encoder's package (and peft) ask for any torch, and so
# whichever build this machine's pip configuration names is kept.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/.demo: $(VENV)/.torch $(SPEC)
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,demo]'
	touch $@

$(VENV)/.test: $(VENV)/.torch $(SPEC)
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,demo,test]'
	touch $@

$(VENV)/.dev: $(VENV)/.test
	$(BIN)/python -m pip install -c constraints.txt -e '.[train,demo,test,dev]'
	touch $@
