# These set everything up by themselves in $(VENV):
#   make demo        the kernel ablation on the embedded videos
#   make ablations   every ablation on the embedded videos, then the report; under 45 minutes on 2 CPU cores
#   make report      the report on what has been run
#   make test        linters, type checker and test suite
#   make faults      every fault that the tests can inject into a sweep, and the matrix of what it cost; 20 minutes
# OUTPUT is the folder of trials and tables, SEEDS the trials per arm; a finished trial is never run again.
# PYTHON chooses the interpreter (3.11 or newer), VENV the environment.

PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
OUTPUT ?= runs
SEEDS ?= 2
EXPERIMENTS = $(sort $(wildcard experiments/*.py))

.PHONY: demo ablations report test faults ui clean

demo: $(VENV)/.installed
	$(BIN)/python experiments/ablate_kernel.py

# One script after another; one that fails does not keep the others or the report, but make says so at the end.
ablations: $(VENV)/.installed
	@began=$$(date +%s); number=0; failed=""; \
	for script in $(EXPERIMENTS); do \
		number=$$((number + 1)); minutes=$$((($$(date +%s) - began) / 60)); \
		printf '\n=== %d/%d  %s  (%d min so far)\n\n' $$number $(words $(EXPERIMENTS)) $$script $$minutes; \
		$(BIN)/python $$script --recipe embedded --num-gpus 0 --seeds $(SEEDS) --output $(OUTPUT) || \
			{ code=$$?; [ $$code -ne 130 ] || exit 130; failed="$$failed $$script"; }; \
	done; \
	printf '\n=== report  (%d min so far)\n\n' $$((($$(date +%s) - began) / 60)); \
	$(BIN)/stadapter report --output $(OUTPUT) || failed="$$failed report"; \
	[ -z "$$failed" ] || { echo "error: not complete:$$failed"; exit 1; }

report: $(VENV)/.installed
	$(BIN)/stadapter report --output $(OUTPUT)

test: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

faults: $(VENV)/.installed-dev
	$(BIN)/python -m pytest tests/faults --all-faults

ui: $(VENV)/.installed
	$(BIN)/stadapter ui

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; choose another: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/.installed-dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@ $(VENV)/.installed

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
