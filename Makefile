# make demo    the main job on the demo model and the shipped tasks (sets everything up first)
# make test    all tests (sets everything up first)
# make check   lint, format, types
# make clean   remove the environment and the demo's results

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait without spinning: much faster where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check clean

demo: $(VENV)/.demo
	$(BIN)/dart-eval run --tasks smoke_questions,smoke_stories,smoke_summary,smoke_drift \
		--method dense,griffin,dart --sparsity 0.5,0.7 --limit 10 --output demo-output
	@echo "The same tables again: $(BIN)/dart-eval tables demo-output --format md"

test: $(VENV)/.dev
	$(BIN)/python -m pytest

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing dart-eval and the demo model into $(VENV) (a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing dart-eval and what its tests need into $(VENV) (a few minutes) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(VENV)/.demo $@

clean:
	rm -rf $(VENV) demo-output
