# Each target does all its own set-up: a virtual environment in the checkout, pinned packages, the compiled extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
# One process a core; a process without tests left takes some of another's. ARGS="-n 0" runs all tests in one process.
PYTEST := -m pytest -n auto --maxprocesses 8 --dist worksteal
SOURCES := setup.py pyproject.toml consequentialism/version.py $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard $(addprefix csrc/,*.cpp *.h */*.cpp */*.h */*.cu */*.cuh) $(addprefix tools/*/*.,cpp h cu))

# A second environment with torch's CUDA build, which needs no GPU to compile, link and import the CUDA kernels.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
CUDA_PYTHON := $(CURDIR)/$(CUDA_BIN)/python
CUDA_BUILD_ARCHITECTURES := 8.0;9.0+PTX# those of csrc/cuda/resources.txt; setup.py's own list is longer
CUDA_PIP := $(CUDA_BIN)/pip --disable-pip-version-check install --quiet --constraint constraints-cuda.txt

# A third one with the packages that the examples train with. The index's torchvision is built for CUDA, and would bring
# another torch: it and timm, which wants it, are installed without what they depend on.
ECO_VENV := .venv-ecosystem
ECO_BIN := $(ECO_VENV)/bin
ECO_PIP := $(ECO_BIN)/pip --disable-pip-version-check install --quiet --constraint constraints-ecosystem.txt

DOCS_VENV := .venv-docs

.PHONY: docs demo test test-ecosystem lint format bench bench-train report check wheel wheel-cuda kernels triton triton-compile cuda-build gpu gpu-pack clean

demo: $(VENV)/.demo
	$(BIN)/python -m consequentialism demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python $(PYTEST) $(ARGS)

# Every example, and the trainers' options. The log of a run stands in docs/ecosystem.txt.
test-ecosystem: $(ECO_VENV)/.built
	$(ECO_BIN)/pip list --format freeze | grep -E "^(torch|transformers|accelerate|lightning|onnx|onnxscript|timm|peft|consequentialism)="
	$(ECO_BIN)/python -m pytest -v --no-header --disable-warnings -n 0 -m "" tests/test_examples.py tests/test_ecosystem.py $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m consequentialism bench --out out/bench/step_cost.csv --plot out/bench $(if $(filter 1,$(QUICK)),--quick) $(ARGS)

# The same optimizers, networks and data on every machine; QUICK=1 for a small version.
bench-train: $(VENV)/.test
	$(BIN)/python -m consequentialism bench-train $(if $(filter 1,$(QUICK)),--quick) $(ARGS)

# docs/benchmarks.md, its pictures and README's figures, from the CSV files in bench/results.
report: $(VENV)/.test
	$(BIN)/python -m bench.report $(ARGS)

# The site in out/site, from docs/ and the docstrings, which are read and not imported: neither torch nor a build is needed.
docs: $(DOCS_VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --quiet $(ARGS)

check: $(VENV)/.built
	$(BIN)/python -m consequentialism info
	$(BIN)/python -m consequentialism check

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

# Registers, spills and shared memory of every CUDA kernel, held to csrc/cuda/resources.txt, and modelled cycles of the
# factor's pieces, held to csrc/cuda/cycles.txt; `make cuda-build` does both too.
kernels:
	$(PYTHON) tools/cuda_resources.py $(ARGS)
	$(PYTHON) tools/cuda_cycles.py $(ARGS)

# Every case of the Triton backend in Triton's interpreter, and its self-test; `make test` runs a part of them.
triton: $(VENV)/.test
	TRITON_INTERPRET=1 $(BIN)/python -m consequentialism check
	TRITON_INTERPRET=1 $(BIN)/python $(PYTEST) -m "triton or interpreter" $(ARGS)

# Every configuration of a Triton kernel that the tuner may pick, compiled for chips that need not be here.
triton-compile: $(VENV)/.test
	$(BIN)/python $(PYTEST) -q -m slow $(ARGS)

# torch 2.11 is also the oldest that is supported: what depends on torch's version is tested too.
# Run in another folder: in the checkout Python would import the checkout.
cuda-build: $(CUDA_VENV)/.built
	$(CUDA_PYTHON) tools/cuda_resources.py --built build/cuda
	$(CUDA_PYTHON) tools/cuda_cycles.py
	cd build/cuda && $(CUDA_PYTHON) -c "from consequentialism import ops; assert 'cuda' in ops.device_types, ops.missing_reason"
	cd build/cuda && $(CUDA_PYTHON) -m consequentialism info
	cd build/cuda && $(CUDA_PYTHON) -m consequentialism check
	cd build/cuda && $(CUDA_PYTHON) $(PYTEST) -q --rootdir $(CURDIR) $(addprefix $(CURDIR)/tests/,test_cuda_build.py test_ops.py test_compile.py test_autograd.py)

# On a machine with a GPU, with its own python3 and no network: two calls of under ten minutes, or one, CALL=first.
gpu:
	for call in $(or $(CALL),first bench); do tools/gpu.sh $$call || code=$$?; done; exit $${code:-0}

# The extension for a GPU machine's Python and torch, built here and put into the checkout, so that nothing is compiled
# there: GPU_PYTHON with the pinned torch, GPU_ARCHITECTURES.
GPU_PYTHON ?= python3.12
GPU_ARCHITECTURES ?= 9.0
gpu-pack:
	test -x build/gpu-env/bin/python || $(GPU_PYTHON) -m venv build/gpu-env
	build/gpu-env/bin/pip --disable-pip-version-check install --quiet --constraint constraints-cuda.txt torch setuptools ninja pybind11 numpy
	PATH="$(CURDIR)/build/gpu-env/bin:$$PATH" FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST="$(GPU_ARCHITECTURES)" \
	  build/gpu-env/bin/python setup.py -q build_ext --inplace --build-temp build/gpu
	ls -l consequentialism/_C.*.so

# A wheel for the CPU, and where there is nvcc one for CUDA, for every architecture of setup.py: WHEEL_ARCHITECTURES else.
WHEEL_ARCHITECTURES ?=
wheel: $(VENV)/.built $(if $(shell command -v nvcc),wheel-cuda)
	rm -rf build/lib*
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

wheel-cuda: $(CUDA_VENV)/.torch
	rm -rf build/wheel-cuda/lib*
	PATH="$(CURDIR)/$(CUDA_BIN):$$PATH" FORCE_CUDA=1 $(if $(WHEEL_ARCHITECTURES),TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCHITECTURES)") \
	  NVCC_APPEND_FLAGS=--threads=2 $(CUDA_BIN)/python setup.py -q build --build-base build/wheel-cuda \
	  bdist_wheel --skip-build --bdist-dir build/wheel-cuda/wheel --dist-dir dist

clean:
	rm -rf $(VENV) $(CUDA_VENV) $(ECO_VENV) $(DOCS_VENV) build dist out *.egg-info consequentialism/*.so consequentialism/_C_*.txt

# torch alone first: whatever asks for it later finds it there.
$(VENV)/.torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools ninja pybind11 wheel
	touch $@

$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.built
	$(PIP) "consequentialism[demo]"
	touch $@

$(VENV)/.test: $(VENV)/.built
	$(PIP) "consequentialism[bench,demo,mnist1d,mnist5k,test]"
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(PIP) "consequentialism[lint]"
	touch $@

$(ECO_VENV)/.torch: constraints-ecosystem.txt
	test -x $(ECO_BIN)/python || $(PYTHON) -m venv $(ECO_VENV)
	$(ECO_PIP) torch
	$(ECO_PIP) setuptools wheel ninja pybind11 numpy pytest pytest-timeout pytest-xdist hypothesis
	$(ECO_PIP) accelerate lightning onnx onnxscript peft transformers pillow
	$(ECO_PIP) --no-deps timm torchvision
	cp tools/torchvision_cpu.py $$($(ECO_BIN)/python -c "import site; print(site.getsitepackages()[0])")
	echo "import torchvision_cpu" > $$($(ECO_BIN)/python -c "import site; print(site.getsitepackages()[0])")/torchvision_cpu.pth
	touch $@

$(ECO_VENV)/.built: $(ECO_VENV)/.torch $(SOURCES)
	PATH="$(CURDIR)/$(ECO_BIN):$$PATH" $(ECO_PIP) --no-build-isolation --no-deps --editable .
	touch $@

$(DOCS_VENV)/.installed: constraints-docs.txt
	test -x $(DOCS_VENV)/bin/python || $(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/pip --disable-pip-version-check install --quiet --constraint constraints-docs.txt \
	  mkdocs-material "mkdocstrings[python]" ruff
	touch $@

$(CUDA_VENV)/.torch: constraints-cuda.txt
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_PIP) torch
	$(CUDA_PIP) setuptools wheel ninja pybind11 numpy pytest pytest-timeout pytest-xdist hypothesis
	touch $@

# Built apart from the CPU's objects, and installed as a wheel: the checkout keeps its own extension.
# nvcc compiles for the architectures side by side: fused_weight_grad.cu takes as long as all other sources, and ends last.
$(CUDA_VENV)/.built: $(CUDA_VENV)/.torch $(SOURCES) $(wildcard consequentialism/*.py consequentialism/*/*.py bench/*.py bench/*/*.py)
	rm -rf build/cuda/dist build/cuda/lib*  # else a file that is gone stays in the wheel
	PATH="$(CURDIR)/$(CUDA_BIN):$$PATH" FORCE_CUDA=1 CONSEQUENTIALISM_WERROR=1 TORCH_CUDA_ARCH_LIST="$(CUDA_BUILD_ARCHITECTURES)" NVCC_APPEND_FLAGS=--threads=2 PYTORCH_NVCC="$(CUDA_PYTHON) $(CURDIR)/tools/cuda_resources.py --nvcc" \
	  $(CUDA_BIN)/python setup.py -q build --build-base build/cuda \
	  bdist_wheel --skip-build --bdist-dir build/cuda/wheel --dist-dir build/cuda/dist
	$(CUDA_PIP) --no-deps --force-reinstall build/cuda/dist/*.whl
	touch $@
