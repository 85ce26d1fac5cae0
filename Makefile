PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test test-all lint bench performance audit audit-quick gpu-check clean

demo: $(INSTALLED)  ## redraw the demo photos in the demo styles, into demo/out/
	$(BIN)/python demo/run.py

test: $(INSTALLED)  ## the tests that a change must pass
	$(BIN)/python -m pytest -m "not slow"

test-all: $(INSTALLED)  ## every test
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks

performance: $(INSTALLED)  ## time and memory against size, into docs/performance.md (half an hour)
	$(BIN)/python benchmarks/end_to_end.py

audit: $(INSTALLED)  ## compile every GPU kernel for every target, model its time, write docs/gpu-audit.md
	$(BIN)/python -m benchmarks.audit

audit-quick: $(INSTALLED)  ## a part of it, which `make test` runs too
	$(BIN)/python -m benchmarks.audit --quick

gpu-check: $(INSTALLED)  ## tests, benchmarks and memory on a GPU, in one file to send
	$(BIN)/python benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) build dist *.egg-info demo/out

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@
