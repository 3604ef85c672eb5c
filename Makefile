# Needs Python 3.11 or newer (with venv and pip) and make. Everything goes into .venv, in the versions of constraints.txt.
PYTHON ?= python3 python3.12 python3.11
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help quickstart test lint format clean

help: ## show this list
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1 - \2/p' Makefile

quickstart: $(VENV)/quickstart.stamp ## train, fine-tune, align, export and sample a small model under runs/quickstart
	$(BIN)/python tools/quickstart.py

test: lint ## lint, then run all tests: a file at a time on every core, one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.stamp ## check style, types and layers
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/test.stamp ## repair style where ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and built files, keep .venv and runs
	rm -rf build dist .coverage .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

# .venv/NAME.stamp stands for "the extra NAME is installed"; a second extra only adds to the first.
$(VENV)/%.stamp: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$*]'
	touch $@

# pip is the last thing that venv writes: where it is missing, the environment is not whole.
$(BIN)/pip:
	@for python in $(PYTHON); do \
	    "$$python" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || continue; \
	    exec "$$python" -m venv $(VENV); \
	done; \
	echo "error: no Python 3.11 or newer with venv among: $(PYTHON); install one, or name it: make PYTHON=/path/to/python" >&2; \
	exit 1
