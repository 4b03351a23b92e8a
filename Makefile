# Everything starts here: `make` lists the targets. The environment is made on first use (tools/setup_env.py);
# ASYPPO_PYTHON=/path/to/python uses that interpreter instead and sets nothing up.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

SETUP := python3 tools/setup_env.py
ifdef ASYPPO_PYTHON
BEST_PYTHON = command -v "$(ASYPPO_PYTHON)" || { echo "ASYPPO_PYTHON=$(ASYPPO_PYTHON): no such program" >&2; exit 1; }
OTHER_PYTHON = true
NO_OTHER = ASYPPO_PYTHON is set, so only that Python was tested
else
BEST_PYTHON = $(SETUP) --lane best --print-python
OTHER_PYTHON = $(SETUP) --lane other --print-python
NO_OTHER = it cannot be set up on this machine ($(SETUP) --lane other says why)
endif

export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# The part of the suite that also runs in the other lane: units and parity.
CORE_TESTS := $(wildcard tests/unit tests/distributed/test_parity*.py)
BENCHMARKS ?= $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))

# Runs every check, whatever the earlier ones said, then sums up and fails when any failed.
# $(1): marker expression of this lane's tests. $(2): options and tests of the other lane.
define run_checks
summary=$$(mktemp); trap 'rm -f "$$summary"' EXIT; failed=0
check() { local what=$$1; shift; echo; echo "== $$what"; "$$@" || { failed=1; echo "FAILED: $$what" >> "$$summary"; }; }
py=$$($(BEST_PYTHON))
check "lint (ruff)" "$$py" -m ruff check .
check "types (mypy)" "$$py" -m mypy
check "tests, $$py" env ASYPPO_TEST_SUMMARY="$$summary" "$$py" -m pytest -m $(1)
if ! other=$$($(OTHER_PYTHON)); then
	failed=1; echo "FAILED: set-up of the other lane" >> "$$summary"
elif [ -n "$$other" ]; then
	check "tests of the other lane, $$other" env ASYPPO_TEST_SUMMARY="$$summary" "$$other" -m pytest $(2)
else
	echo "other lane: not tested, $(NO_OTHER)" >> "$$summary"
fi
echo; echo "== summary"; cat "$$summary"
[ $$failed = 0 ] && echo "all checks passed" || { echo "some checks FAILED (above)"; exit 1; }
endef

.PHONY: help setup demo test test-full test-gpu lint types clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

setup:  ## make the environment (the best Python found; safe to repeat)
	@$(SETUP)

demo:  ## set up, then train the demo task with AsyPPO (minutes, CPU)
	@py=$$($(BEST_PYTHON))
	"$$py" -m asyppo_megatron demo

test:  ## set up, lint, types, the suite without slow and GPU tests, then the core tests in the other lane
	@$(call run_checks,"not slow and not gpu",-m "not slow and not gpu" $(CORE_TESTS))

test-full:  ## the same with the slow tests: everything in both lanes
	@$(call run_checks,"not gpu",-m "not gpu")

test-gpu:  ## GPU tests, then the benchmarks (BENCHMARKS=... chooses)
	@py=$$($(BEST_PYTHON)); failed=0
	"$$py" -m pytest -m gpu || failed=1
	for benchmark in $(BENCHMARKS); do echo; echo "== $$benchmark"; "$$py" "$$benchmark" || failed=1; done
	exit $$failed

lint:  ## ruff
	@py=$$($(BEST_PYTHON))
	"$$py" -m ruff check .

types:  ## mypy
	@py=$$($(BEST_PYTHON))
	"$$py" -m mypy

clean:  ## remove caches and build products (keeps .venv and runs)
	@rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
