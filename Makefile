# Every target sets up what it needs: a virtual environment with the pinned, tested versions.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# Hydra overrides, e.g. make compare OVERRIDES="training.steps=200"
OVERRIDES ?=
# Where results go.
OUTPUTS ?= outputs
# Arguments for the fuzzer, e.g. make fuzz FUZZ="--kind adapter --only 123"
FUZZ ?= 10000
# Arguments for pytest, e.g. make test PYTEST="-k pissa"
PYTEST ?=

# Torch's threads spin while they wait; beside any other busy process that costs ten times the work.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: help compare benchmark gpu papers check test test-all test-papers fuzz lint format
.PHONY: docs readme notebooks recording wheel check-lowest clean

help:
	@echo "make compare   eight initializations on a real pretrained model, then the report"
	@echo "make benchmark lora_init compared with PEFT and torch.linalg, then docs/performance.md"
	@echo "make gpu       checks and measurements on a GPU, eight minutes; installs nothing"
	@echo "make papers    published claims measured again, then docs/papers and docs/family"
	@echo "make check     the most important tests, in under 90 seconds"
	@echo "make test      the tests, in about eleven minutes on two cores"
	@echo "make test-all  the same, with long runs and every member of their products"
	@echo "make test-papers  the page of docs/papers, measured again and held against it"
	@echo "make fuzz      10,000 damaged adapters, caches, calibrations, checkpoints and runs"
	@echo "make lint      ruff, the order of imports, and types"
	@echo "make format    ruff format, on all files"
	@echo "make docs      the documentation, in docs/_build/html; warnings are errors"
	@echo "make readme    the table of methods and the recommendation in README.md, docs/which-start.md"
	@echo "make notebooks the notebooks of examples/, executed again"
	@echo "make recording the recording of lora-init compare in docs/guides/command.md, made again"
	@echo "make wheel     build the package and check it in a clean environment"
	@echo "make check-lowest  make check with the lowest supported torch and transformers"
	@echo "make clean     remove the virtual environment (results in outputs/ stay)"

compare: $(STAMP)
	$(BIN)/python -m experiments.train --config-name sweep_compare paths.outputs=$(OUTPUTS) training.validate_every=25 $(OVERRIDES)
	$(BIN)/python -m experiments.report $(OUTPUTS)/sweeps/compare

benchmark: $(STAMP)
	$(BIN)/python -m experiments.benchmark outputs=$(OUTPUTS) page=docs/performance.md $(OVERRIDES)

# In the Python that is there (PYTHON=...): a machine with a GPU has its own torch.
gpu:
	$(PYTHON) -m experiments.gpu $(OVERRIDES)

papers: $(STAMP)
	$(BIN)/python -m experiments.papers output=$(OUTPUTS)/papers page=docs/papers $(OVERRIDES)
	$(BIN)/python -m experiments.papers --config-name family output=$(OUTPUTS)/papers page=docs/family $(OVERRIDES)

# The contract of each method on one module type, one reference test per method, the README's code and
# the docstrings' examples (tests/conftest.py has the selection).
CHECK := tests/test_contract.py tests/initializers

check: $(STAMP)
	$(BIN)/python -m pytest --check-only -m "not fast_form" -n logical --maxprocesses 8 \
	  $(CHECK) tests/docs/test_pages.py tests/docs/test_docstrings.py $(PYTEST)

test: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal $(PYTEST)

# Long runs too, and every member of every product of methods and settings (tests/support/products.py).
test-all: $(STAMP)
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal -m "not fast_form" $(PYTEST)

# Each reproduction in its fast form, as `make papers` runs it: half an hour on two cores.
test-papers: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m fast_form tests/experiments/papers $(PYTEST)

# Ends after ten minutes, whatever it finds; a part of it is in `make test`.
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 PYTHONPATH=.:tests/support:tests/experiments $(BIN)/python tests/fuzz/campaign.py $(FUZZ)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python -m sphinx -W --keep-going -q docs docs/_build/html
	@echo "docs/_build/html/index.html"

readme: $(STAMP)
	$(BIN)/python docs/registry_pages.py
	$(BIN)/python -m experiments.report.decisions

notebooks: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/run_notebooks.py

recording: $(STAMP)
	HF_HUB_OFFLINE=1 $(BIN)/python docs/record_comparison.py

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python tests/wheel/clean_install.py dist

# The lower bounds of pyproject.toml, in an environment of their own.
LOWEST := .venv-lowest
check-lowest:
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet --editable '.[experiments,dev]' \
	  $$($(PYTHON) tests/wheel/lower_bounds.py torch transformers)
	$(LOWEST)/bin/python -m pip install --quiet --no-deps --requirement requirements-assets.txt
	$(LOWEST)/bin/python -m pytest --check-only -m "not fast_form" -n logical --maxprocesses 8 $(CHECK)

clean:
	rm -rf $(VENV) $(LOWEST) docs/_build docs/methods docs/notebooks

# The stamp is written last: an interrupted installation is done again.
$(STAMP): pyproject.toml constraints.txt requirements-assets.txt requirements-launchers.txt requirements-trainers.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "lora_init needs Python 3.11 or newer; $(PYTHON) is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[experiments,launchers,dev,docs]'
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-assets.txt --requirement requirements-launchers.txt --requirement requirements-trainers.txt
	@touch $@
