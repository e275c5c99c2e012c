# EdgeMIN: every target does the set-up it needs. VENV=<dir> uses another environment than .venv.

VENV ?= .venv
PYTHON ?= python3
BIN = $(VENV)/bin
INSTALLED = $(VENV)/.edgemin-installed
# Test processes: one per core, at most eight (each loads torch).
TEST_PROCESSES ?= auto

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow lint tables clean clean-store

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' Makefile

setup: $(INSTALLED) ## make the environment (.venv, or VENV=<dir>) and install EdgeMIN with the tested versions

$(INSTALLED): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; \
	  sys.exit(0 if sys.version_info >= (3, 11) else \
	  "EdgeMIN needs Python 3.11 or newer, PYTHON=$(PYTHON) is %d.%d: say PYTHON=<another>" % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(INSTALLED) ## a tiny teacher, a smaller student, all three stages, two prune ratios: minutes on a CPU, no network
	@printf '%s\n' \
	  'To try afterwards, in the environment that ". $(BIN)/activate" enters:' \
	  '  python -m edgemin.train -m experiment=demo prune.ratio=0.1,0.3,0.5   # the trained stages are reused' \
	  '  python -m edgemin.train plan=true                                    # what the paper'"'"'s set-up on SST-2 would run' \
	  '  python -m edgemin.train --help                                       # every group and key' ''
	$(BIN)/python -m edgemin.train -m experiment=demo

test: $(INSTALLED) ## the tests, but for those marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_PROCESSES) --maxprocesses 8 --dist loadfile

test-slow: $(INSTALLED) ## the tests marked slow
	$(BIN)/python -m pytest -m slow

lint: $(INSTALLED) ## ruff (rules and format) and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

tables: $(INSTALLED) ## rebuild every table and figure under experiments/ and outputs/, and the tables in their pages
	$(BIN)/python -m edgemin.report.studies folder=experiments
	$(BIN)/python -m edgemin.report.studies folder=outputs

clean: ## remove caches, builds and outputs; what was trained (outputs/store) stays
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache *.egg-info
	find edgemin tests -type d -name __pycache__ -prune -exec rm -rf {} +
	find outputs -mindepth 1 -maxdepth 1 ! -name store ! -name .gitkeep -exec rm -rf {} +

clean-store: ## remove what was trained (outputs/store)
	rm -rf outputs/store
