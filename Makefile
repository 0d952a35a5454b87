# `make demo` and `make test` set everything up by themselves: Python 3.10+, pip and a C++ compiler are enough.

PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(BIN)/rlhf demo --seed $(SEED) --output_dir runs/demo --resume

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and alone: the build and the other packages must find this one rather than choose their own.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet setuptools wheel cmake ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[train,test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_kernels/*.so
