PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
SANITIZE_VENV := .venv-sanitize
SANITIZE_INSTALLED := $(SANITIZE_VENV)/.installed
# A pyenv shim may be there without the version that it names, so try each.
PYTHON312 ?= $(shell for python in python3.12 $(HOME)/.pyenv/versions/3.12*/bin/python; do \
	"$$python" -c "import ensurepip, venv" 2>/dev/null && echo "$$python" && break; done)

.PHONY: demo test test-all lint bench performance training-step audit audit-quick gpu-check sanitize clean

demo: $(INSTALLED)  ## redraw the demo photos in the demo styles, into demo/out/
	$(BIN)/python demo/run.py

test: $(INSTALLED)  ## the tests that a change must pass, on several processors at once
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" --numprocesses=auto --maxprocesses=4 --dist=worksteal

test-all: $(INSTALLED)  ## every test, one after another, each on all processors
	$(BIN)/python -m pytest

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(INSTALLED)
	$(BIN)/python -m pytest benchmarks

performance: $(INSTALLED)  ## time and memory against size, into docs/performance.md (half an hour)
	$(BIN)/python benchmarks/end_to_end.py

training-step: $(INSTALLED)  ## a step of training beside the published arrangement: time, memory, losses (three minutes)
	$(BIN)/python benchmarks/training_step.py --rounds 3

audit: $(INSTALLED)  ## compile every GPU kernel for every target, model its time, write docs/gpu-audit.md
	$(BIN)/python -m benchmarks.audit

audit-quick: $(INSTALLED)  ## a part of it, which `make test` runs too
	$(BIN)/python -m benchmarks.audit --quick

gpu-check: $(INSTALLED)  ## tests, benchmarks and memory on a GPU, in one file to send
	$(BIN)/python benchmarks/gpu_check.py

sanitize: $(SANITIZE_INSTALLED)  ## the kernel tests on Triton's IR: accesses out of bounds, races, memory nobody wrote
	$(SANITIZE_VENV)/bin/python -m ttsem.sanitize pytest tests/a2k_kernels/test_triton.py \
		tests/a2k_kernels/test_triton_registration.py

clean:
	rm -rf $(VENV) $(SANITIZE_VENV) build dist *.egg-info demo/out

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	touch $@

$(SANITIZE_INSTALLED): setup.py  ## 3 GB to download: PyPI's torch is the build for CUDA
	@test -n "$(PYTHON312)" || { echo "make sanitize needs Python 3.12: install it (pyenv install 3.12)" \
		"or name it (make sanitize PYTHON312=/path/to/python3.12)"; exit 1; }
	$(PYTHON312) -m venv $(SANITIZE_VENV)
	$(SANITIZE_VENV)/bin/pip install --quiet --disable-pip-version-check --editable . "ttsem[triton]==0.1.0"
	touch $@
