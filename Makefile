# make demo   install into .venv, run the benchmark on real feature maps, enlarge a photograph
# make test   install into .venv and run the whole test suite
# make fuzz   10,000 random cases against the reference, other ones each time
# make lint   ruff and clang-format        make format   apply them
# make emulate K=pooling, K=newton_schulz or nothing
#             the CUDA kernels of that name on the CPU (tests/emulation/README.md)
# make types  mypy over the packages, and over a user's code with them
# make docs   the pages and the API reference into build/docs; any warning is an error
# make dist   source archive and wheel into dist, checked against each other and against what an index asks for
# make kernels            compile the CUDA kernels and compare them with benchmarks/results/kernels.md; needs nvcc
# make torches            test the wheel of `make dist` in other torches than built it, and build its archive with them
# make check-cuda-torch   build for a CUDA torch, load it there and test it without a GPU; needs nvcc
# make gpu                everything that needs a GPU, into one folder; `benchmarks/gpu.py --help` tells what it takes
#
# PYTHON      the interpreter to start from; if it has a torch, that torch is used
# TORCH       what to install where it has none
# TORCHES     the versions that make torches installs
# CUDA_TORCH  what check-cuda-torch installs, for a CUDA of nvcc's major version
# WRITE=1     make kernels writes the page anew

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCHES ?= 2.10.0 2.15.0
CUDA_TORCH ?= torch==2.15.0
WRITE ?=
OUT ?= out/gpu
WHEEL ?=
STEPS ?=
BUDGET ?=
DRY_RUN ?=
# The build with the CUDA kernels: a wheel, and the same installed beside .venv, for PYTHONPATH.
CUDA := build/cuda
ARCHITECTURES := 8.0 9.0a 10.0

BIN := .venv/bin
# Where an interpreter's packages are. Those of a virtual environment are not among the system's: .venv is told of them.
SITE := "import sysconfig; print(sysconfig.get_path('purelib'))"
# The second command of an install names torch again: without it pip might replace what the first one chose.
PIN = $(shell $(BIN)/python -c "import torch; print('torch==' + torch.__version__)")
SOURCES := $(shell git ls-files 'csrc/*' 'isqrt_cov/*' 'san_model/*' setup.py pyproject.toml 2>/dev/null)
CXX_FILES := $(shell git ls-files '*.h' '*.cuh' '*.cpp' '*.cu' 2>/dev/null)

.PHONY: demo test emulate lint format kernels torches check-cuda-torch gpu fuzz types docs dist clean

demo: .venv/san
	$(BIN)/python -P -m isqrt_cov
	mkdir -p out
	$(BIN)/python benchmarks/bench_soca.py --quick --plot out/bench_soca.png --json out/bench_soca.json
	mkdir -p out/photo
	cp "$$($(BIN)/python -c 'import skimage.data; print(skimage.data.__path__[0])')/coffee.png" out/photo
	$(BIN)/python -P -m san_model upscale out/photo/coffee.png --output out
	$(BIN)/python -P -m san_model compare --hr out/photo --scale 2 --methods bicubic light --table out/compare.md \
		--figure out/compare.png

# Two files at a time, in their order. Threads that wait for each other do not keep a core from the other file.
test: .venv/test
	OMP_WAIT_POLICY=passive $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: .venv/test
	FUZZ_CASES=10000 $(BIN)/pytest tests/test_fuzz.py

# The kernels are compiled as they lie here. The tests also import the package, any version of it: it need not be built.
emulate: $(if $(wildcard .venv/test),,.venv/test)
	$(BIN)/pytest -p no:hypothesispytest tests/test_emulation.py tests/test_emulation_checks.py $(if $(K),-k "($(K)) and not sanitizers")

.venv/torch:
	if $(PYTHON) -c "import torch" 2>/dev/null; then \
		$(PYTHON) -m venv --system-site-packages .venv; \
		$(BIN)/python -c "import torch" 2>/dev/null || $(PYTHON) -c $(SITE) > "$$($(BIN)/python -c $(SITE))/outer.pth"; \
	else $(PYTHON) -m venv .venv && $(BIN)/pip install $(TORCH); fi
	$(BIN)/python -c "import torch"
	touch $@

.venv/package: .venv/torch $(SOURCES)
	$(BIN)/pip install "$(PIN)" .
	touch $@

# .venv/san, .venv/test and .venv/docs: what that extra of the package asks for.
.venv/%: .venv/package
	$(BIN)/pip install "$(PIN)" "isqrt_cov[$*]"
	touch $@

.venv/lint: .venv/torch
	$(BIN)/pip install ruff==0.17.6 clang-format==23.1.5
	touch $@

lint: .venv/lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

.venv/mypy: .venv/test
	$(BIN)/pip install mypy==2.4.1
	touch $@

types: .venv/mypy
	$(BIN)/mypy
	cd tests/typing && ../../$(BIN)/mypy --config-file= --strict public_api.py

docs: .venv/docs
	$(BIN)/sphinx-build --fail-on-warning --keep-going --quiet docs build/docs

.venv/publish: .venv/test
	$(BIN)/pip install twine==7.0.0 cffconvert==2.0.0
	touch $@

dist: .venv/publish
	rm -rf dist && mkdir dist
	$(BIN)/pip wheel --no-deps --wheel-dir dist .
	$(BIN)/python -c "import setuptools.build_meta as b; b.build_sdist('dist')"
	$(BIN)/twine check --strict dist/*
	$(BIN)/cffconvert --validate -i CITATION.cff
	$(BIN)/pip install --dry-run --quiet "$(PIN)" "$$(echo dist/*.whl)[san]"
	$(BIN)/pytest -m build

# What depends on torch's version: how the operators are registered, traced and differentiated, not what they compute; and
# whether they compile.
torches: $(if $(wildcard dist/*.whl),,dist)
	for version in $(TORCHES); do \
		rm -rf .venv-torch && $(PYTHON) -m venv .venv-torch && \
		.venv-torch/bin/pip install --no-compile torch==$$version "$$(echo dist/*.whl)[test]" && \
		OMP_WAIT_POLICY=passive .venv-torch/bin/pytest -n 2 --dist loadfile tests/test_build.py tests/test_functional.py \
			tests/test_ops.py tests/test_transforms.py tests/test_compile.py tests/test_mpncov.py && \
		FORCE_CUDA=0 .venv-torch/bin/pip install --no-deps --force-reinstall dist/*.tar.gz && \
		.venv-torch/bin/pytest tests/test_build.py tests/test_functional.py || exit; \
	done

format: .venv/lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CXX_FILES)

.venv/cuobjdump: .venv/torch
	$(BIN)/pip install nvidia-cuda-cuobjdump==13.5.37 nvidia-cuda-nvdisasm==13.5.37
	touch $@

$(CUDA)/installed: .venv/torch $(SOURCES)
	rm -rf $(CUDA)
	FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(ARCHITECTURES)" $(BIN)/pip wheel --no-deps -w $(CUDA) .
	$(BIN)/pip install --no-deps --target $(CUDA)/site $(CUDA)/*.whl
	touch $@

kernels: .venv/cuobjdump $(CUDA)/installed
	$(BIN)/python benchmarks/kernels.py $(if $(WRITE),--write,--check) --library $(CUDA)/site/isqrt_cov/_C.so

check-cuda-torch:
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/pip install $(CUDA_TORCH) pytest numpy
	TORCH_CUDA_ARCH_LIST="$(ARCHITECTURES)" .venv-cuda/bin/pip install --no-deps --force-reinstall .
	.venv-cuda/bin/python -P -m isqrt_cov | tee /dev/stderr | grep -q "compiled for"
	.venv-cuda/bin/python -P -m pytest tests/test_build.py tests/test_functional.py

gpu:
	$(PYTHON) benchmarks/gpu.py --out $(OUT) --commit "$$(git describe --always --dirty --abbrev=40 2>/dev/null)" \
	  $(if $(WHEEL),--wheel $(WHEEL)) $(if $(STEPS),--steps $(STEPS)) $(if $(BUDGET),--seconds $(BUDGET)) \
	  $(if $(DRY_RUN),--dry-run)

clean:
	rm -rf .venv .venv-torch .venv-cuda build dist out *.egg-info isqrt_cov/_C.so
