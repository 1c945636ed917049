# make demo   install into .venv and run the benchmark on real feature maps
# make test   install into .venv and run the whole test suite
# make lint   ruff and clang-format        make format   apply them
# make emulate K=pooling, K=newton_schulz or nothing
#             the CUDA kernels of that name on the CPU (tests/emulation/README.md)
#
# PYTHON  the interpreter to start from; if it has a torch, that torch is used
# TORCH   what to install where it has none

PYTHON ?= python3
TORCH ?= torch==2.13.0

BIN := .venv/bin
# The second command of an install names torch again: without it pip might replace what the first one chose.
PIN = $(shell $(BIN)/python -c "import torch; print('torch==' + torch.__version__)")
SOURCES := $(shell git ls-files 'csrc/*' 'isqrt_cov/*' 'san_model/*' setup.py pyproject.toml 2>/dev/null)
CXX_FILES := $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' 2>/dev/null)

.PHONY: demo test emulate lint format clean

demo: .venv/san
	$(BIN)/python -P -m isqrt_cov
	mkdir -p out
	$(BIN)/python benchmarks/bench_soca.py --quick --plot out/bench_soca.png --json out/bench_soca.json

test: .venv/test
	$(BIN)/pytest

# The kernels are compiled as they lie here. The tests also import the package, any version of it: it need not be built.
emulate: $(if $(wildcard .venv/test),,.venv/test)
	$(BIN)/pytest tests/test_emulation.py $(if $(K),-k "$(K)")

.venv/torch:
	if $(PYTHON) -c "import torch" 2>/dev/null; then $(PYTHON) -m venv --system-site-packages .venv; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install $(TORCH); fi
	touch $@

# .venv/san and .venv/test: the package with that extra.
.venv/%: .venv/torch $(SOURCES)
	$(BIN)/pip install "$(PIN)" ".[$*]"
	touch $@

.venv/lint: .venv/torch
	$(BIN)/pip install ruff==0.17.6 clang-format==23.1.5
	touch $@

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: .venv/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf .venv build out *.egg-info isqrt_cov/_C.so
