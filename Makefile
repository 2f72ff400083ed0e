# Each target does all its own set-up: a virtual environment in the checkout, pinned packages, the compiled extension.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check install --quiet --constraint constraints.txt
SOURCES := setup.py pyproject.toml consequentialism/version.py $(wildcard csrc/*.* csrc/*/*.*)
CPP := $(wildcard csrc/*.cpp csrc/*.h csrc/*/*.cpp csrc/*/*.h)

.PHONY: demo test lint format bench check wheel clean

demo: $(VENV)/.demo
	$(BIN)/python -m consequentialism demo $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest $(ARGS)

bench: $(VENV)/.test
	$(BIN)/python -m consequentialism bench --out out/bench/step_cost.csv $(ARGS)

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

wheel: $(VENV)/.built
	$(BIN)/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist out *.egg-info consequentialism/*.so consequentialism/_C_missing.txt

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
	$(PIP) "consequentialism[demo,mnist5k,test]"
	touch $@

$(VENV)/.lint: $(VENV)/.built
	$(PIP) "consequentialism[lint]"
	touch $@
