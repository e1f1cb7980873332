# make demo | test | test-all | test-mutants | coverage | check | format | bench | bench-gpu | clean
# Everything lives in .venv.
PYTHON ?= python3
# The release that CI runs; any torch that pyproject.toml allows works: make test TORCH='torch==2.14.1'
TORCH ?= torch==2.13.0
# Beside a torch that brings no Triton (the CPU's): interprets, compiles and emulates the GPU kernels
TRITON ?= triton==3.8.0
VENV ?= .venv
RUN ?= runs/quickstart
# Processes that share the tests
TEST_PROCESSES ?= 2

BIN := $(VENV)/bin
NATIVE := CMakeLists.txt $(wildcard kernels/native/* kernels/simmim_kernels/*/*.cpp)
INSTALLED := $(VENV)/.installed
SHELL := /bin/bash
# each process begins with its own part of the list, so that fixtures of a file are mostly made once
SHARED := -n $(TEST_PROCESSES) --dist worksteal

.PHONY: demo test test-all test-mutants coverage check format bench bench-gpu native-test clean

demo: $(INSTALLED)
	@$(BIN)/python examples/skimage_photos.py $(RUN)-photos
	$(BIN)/simmim pretrain quickstart --data.path=$(RUN)-photos --output=$(RUN)
	@echo
	@echo "Pictures (original | masked | reconstruction): $(RUN)/pictures/"
	@echo "Your own photos: $(BIN)/simmim pretrain quickstart --data.path=FOLDER --output=runs/mine"

test: $(INSTALLED)
	$(BIN)/python -m pytest -m "not slow" $(SHARED)
	@$(MAKE) --no-print-directory native-test

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(SHARED)
	@$(MAKE) --no-print-directory native-test

# Minutes to an hour; it goes on where it was stopped
test-mutants: $(INSTALLED)
	$(BIN)/python tests/mutants/run.py --jobs $(TEST_PROCESSES) --write

# What only CUDA takes part in, over a stand-in for its libraries: no GPU is needed. torch's build
# for CUDA is large, and gets an environment of its own
test-cuda-host:
	@$(MAKE) --no-print-directory VENV=.venv-cuda TORCH='torch==2.14.1' .venv-cuda/.installed
	.venv-cuda/bin/python tests/gpu_sim/cuda_host/stand_in.py -m pytest tests/gpu_sim/test_host_run.py $(SHARED)

# Lines and branches of engine/ that the tests of every commit run, in all of their processes;
# those of the kernels have no part in it
coverage: $(INSTALLED)
	@rm -rf build/coverage && mkdir -p build/coverage
	$(BIN)/python -m pytest -m "not slow" --ignore=tests/kernels --ignore=tests/gpu_sim --cov --cov-report= $(SHARED)
	@$(BIN)/python -m coverage report
	@$(BIN)/python -m coverage json --quiet -o build/coverage/coverage.json
	@$(BIN)/python tests/coverage_floors.py build/coverage/coverage.json

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files '*.c' '*.cpp' '*.h')

format: $(INSTALLED)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $$(git ls-files '*.c' '*.cpp' '*.h')

bench: $(INSTALLED)
	$(BIN)/python -m pytest bench/ops.py -c pyproject.toml --rootdir=. --benchmark-enable --benchmark-only --benchmark-columns=median,iqr,rounds

bench-gpu: $(INSTALLED)
	$(BIN)/python bench/gpu.py

native-test: $(INSTALLED)
	@$(BIN)/cmake -S . -B build/native-test -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DSIMMIM_BUILD_TESTS=ON > build/native-test.log 2>&1 || { cat build/native-test.log; exit 1; }
	@$(BIN)/cmake --build build/native-test >> build/native-test.log 2>&1 || { cat build/native-test.log; exit 1; }
	@$(BIN)/ctest --test-dir build/native-test --output-on-failure

# One environment for everything. The package is installed editable: Python edits need nothing,
# changed C++ or packaging reinstalls it.
$(INSTALLED): pyproject.toml Makefile $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "simmim needs Python 3.11 or newer, $(PYTHON) is $$($(PYTHON) --version); say make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { echo "python3 -m venv failed; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing into $(VENV) (torch is the large part) …"
	@$(BIN)/python -c 'import torch' 2> /dev/null || $(BIN)/pip install --quiet --disable-pip-version-check '$(TORCH)'
	@$(BIN)/python -c 'import triton' 2> /dev/null || $(BIN)/pip install --quiet --disable-pip-version-check '$(TRITON)' || echo 'note: no Triton here; tests of the GPU kernels will be skipped'
	@$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[quickstart,test,check,bench]' cmake ninja
	@$(BIN)/python -c 'from simmim_kernels.native import missing_reason as m; print(f"note: {m}") if m else None'
	@touch $@

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
