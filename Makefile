# make demo   the main job on the embedded digits: about four minutes on two cores after the installation
# make test   all tests           make check   format, lint, types, import rules
# Each creates its own environment in .venv. Another interpreter: make test PYTHON=python3.12; JOBS=4 tests at once

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
JOBS ?= 2
export OMP_NUM_THREADS ?= 2

.PHONY: demo test check format clean

demo: $(VENV)/.core
	$(BIN)/fewstep demo --out demo-run

test: $(VENV)/.dev $(VENV)/fidelity/.done
	OMP_NUM_THREADS=1 FEWSTEP_FIDELITY=$(abspath $(VENV)/fidelity) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(VENV)/.dev
	$(BIN)/ruff format --check src tests bench scripts examples
	$(BIN)/ruff check src tests bench scripts examples
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff format src tests bench scripts examples
	$(BIN)/ruff check --fix src tests bench scripts examples

$(VENV)/.core: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) --editable '.[dev]'
	touch $@

# torch-fidelity is the judge of the Inception path. It needs torchvision, which has no build for the CPU's torch and
# would break transformers: both live in a folder of their own, which tests/fidelity alone puts on its path.
$(VENV)/fidelity/.done: $(VENV)/.dev constraints.txt
	rm -rf $(VENV)/fidelity
	$(PIP) --no-deps --target $(VENV)/fidelity torch-fidelity torchvision tqdm
	touch $@

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis src/*.egg-info
