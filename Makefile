# `make demo` and `make test` set up all they need: a virtual environment in .venv, pinned by
# constraints.txt, with subbyte installed from this tree (Python 3.11+, a C++ compiler, make).

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := CMakeLists.txt $(wildcard src/subbyte/kernels/csrc/* native/CMakeLists.txt native/include/* native/runtime/*)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# SUBBYTE_ISA=avx2 (avx512vnni, neon, portable) forces an instruction set in anything below.
.PHONY: demo test test-all test-tiers test-san test-fuzz chaos fuzz test-old test-avx512 test-neon wheel check format bench bench-peers mutants pages reproduce clean
.DEFAULT_GOAL := demo

$(STAMP): pyproject.toml constraints.txt $(NATIVE)
	$(PYTHON) -c 'import sys; sys.exit("the pinned versions need Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[data,dev]'
	touch $@

demo: $(STAMP)  ## Train, pack, reload and compare on embedded data (seconds)
	$(BIN)/subbyte demo

test: $(STAMP)  ## The test suite (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-all: $(STAMP)  ## Everything, also what needs ../shared/data or takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "slow or not slow"

# Of what depends on the instruction set; `make test` runs it on the best one.
TIER_TESTS := $(addprefix tests/test_,kernels.py misuse.py fuse.py modules.py bench.py)
test-tiers: $(STAMP)  ## The kernels' tests on each other instruction set that this machine has
	for tier in $$($(BIN)/python -c 'from subbyte import _native; print(*_native.tiers()[1:])'); do \
	  echo "SUBBYTE_ISA=$$tier"; \
	  SUBBYTE_ISA=$$tier OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(TIER_TESTS) || exit 1; \
	done

test-san:  ## The C++ core under the address and undefined-behaviour sanitizers
	tests/native/run.sh san

test-fuzz:  ## The runtime on damaged files, under the same (FUZZ_SECONDS=3600 for an hour)
	tests/native/run.sh fuzz $(or $(FUZZ_SECONDS),60)

chaos: $(STAMP)  ## Kill trainings, saves, quantizations and workers (MINUTES=5)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/chaos.py --minutes $(or $(MINUTES),5)

fuzz: $(STAMP)  ## The Python readers on damaged files (MINUTES=5)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/fuzz.py --minutes $(or $(MINUTES),5)

test-old:  ## The same as on CPUs without AVX2, and with no more than it (skipped without qemu-user)
	tests/native/run.sh old

test-avx512:  ## Its AVX-512 kernels, emulated (skipped without libsimde-dev)
	tests/native/run.sh avx512

test-neon:  ## Its ARM kernels, emulated (skipped without g++-aarch64-linux-gnu and qemu-user)
	tests/native/run.sh neon

wheel: $(STAMP)  ## A wheel in dist/, tried on every instruction set of this machine
	rm -rf dist
	$(BIN)/pip wheel -q --no-deps -c constraints.txt -w dist .
	$(BIN)/python tests/wheel.py dist/*.whl

check: $(STAMP)  ## Format, lint and types, Python and C++
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(wildcard src/subbyte/kernels/csrc/*.[chi]?? native/*/*.[ch]pp native/*/*.h) tests/native/*.cpp

format: $(STAMP)  ## Put everything into the project's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(wildcard src/subbyte/kernels/csrc/*.[chi]?? native/*/*.[ch]pp native/*/*.h) tests/native/*.cpp

bench: $(STAMP)  ## Measure what the documents claim; JSON lines go to benchmarks/results/
	$(BIN)/python benchmarks/train_step.py
	$(BIN)/python benchmarks/file_size.py

bench-peers: $(STAMP)  ## Products beside ONNX Runtime, OpenVINO and PyTorch (half an hour)
	$(BIN)/python -m pip install -q -c constraints.txt -r benchmarks/requirements-peers.txt
	$(BIN)/python benchmarks/kernels.py

mutants: $(STAMP)  ## Plant the bugs of tests/mutants.toml one by one: the tests must catch each
	$(BIN)/python tests/mutants.py

PAPERS := lowres sgm cora open
pages: $(STAMP)  ## Make the pages, tables and the chart of docs/ from the lines
	for paper in $(PAPERS); do $(BIN)/subbyte experiment page $$paper || exit 1; done
	$(BIN)/python benchmarks/tables.py
	$(BIN)/python benchmarks/charts.py

reproduce: $(STAMP)  ## Run what experiments/$(or $(PAPER),lowres)/ lacks (hours to days); PAPER=sgm for another
	for name in $(basename $(notdir $(wildcard experiments/$(or $(PAPER),lowres)/*.toml))); do \
	  $(BIN)/subbyte experiment run $(or $(PAPER),lowres)/$$name --resume || exit 1; \
	done

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache .hypothesis
