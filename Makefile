# Every target sets itself up: a machine needs Python 3.11, which the lock is solved for, make and a compiler.
PYTHON ?= python3
VENV := .venv
RETORT := $(VENV)/bin/retort
RUN ?= runs/local
# PyPI's torch for Linux is built for CUDA; the build for CPU has an index of its own.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# glibc's defaults make a training step on CPU several times slower (see pipeline/base/runtime.py).
export MALLOC_MMAP_THRESHOLD_ := 4294967296
export MALLOC_TRIM_THRESHOLD_ := 8589934592
export MALLOC_TOP_PAD_ := 268435456

.PHONY: help setup local ui test test-slow gpu-check tables lint format lock clean

help:  ## say what each target does
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(VENV)/.installed  ## install everything into .venv, from the lock

$(VENV)/.installed: requirements-cpu.lock pyproject.toml
	@version=$$($(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || echo missing); [ $$version = 3.11 ] || \
	  { echo "Retort's lock needs Python 3.11, and $(PYTHON) is $$version: make setup PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --no-deps --retries 1 $(INDEX) "$$(grep '^torch==' $<)"
	$(VENV)/bin/pip install --quiet --no-deps --requirement $<
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

local: setup  ## the whole job on this machine, from comments to report, and a small search
	$(RETORT) demo --out runs/demo
	$(RETORT) run --config pipeline/demo/run.yaml --out runs/local
	$(RETORT) tune --config pipeline/demo/run.yaml --out runs/local --set train.workers=1 --set train.epochs=8

ui: setup  ## open MLflow on the runs of RUN (runs/local), at http://127.0.0.1:5000
	@echo "Open http://127.0.0.1:5000/#/experiments?workflowType=machine_learning. A search's trials unfold below it: tick some and choose Compare."
	$(VENV)/bin/mlflow server --backend-store-uri sqlite:///$(abspath $(RUN))/mlflow.db --host 127.0.0.1 --port 5000

test: setup  ## the tests, some minutes
	$(VENV)/bin/python -m pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: setup  ## the longer proofs
	$(VENV)/bin/python -m pytest -m slow --numprocesses 2 --dist loadfile

gpu-check:  ## where there is a GPU and .venv is installed from requirements-gpu.lock: proves what a CPU cannot
	@$(VENV)/bin/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'PyTorch sees no GPU here: see Install in README.md for the lock of GPU builds')"
	$(VENV)/bin/pip install --quiet --no-deps $$(grep -E '^(pytest|pytest-xdist|execnet|hypothesis|iniconfig|pluggy|sortedcontainers)==' requirements-cpu.lock)
	$(VENV)/bin/python -m pytest tests/test_device.py --verbose
	$(VENV)/bin/python -m benchmarks.training --synthetic --precision bf16 --sequence choices

tables: setup  ## put the figures of benchmarks/results into README and docs
	$(VENV)/bin/python -m benchmarks.tables

lint: setup  ## ruff and mypy
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

format: setup  ## put the code in ruff's form
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

COMPILE = $(VENV)/bin/uv pip compile pyproject.toml --quiet --python-version 3.11 --override $(VENV)/overrides.txt \
  --extra student --extra serve --extra onnx --no-annotate --custom-compile-command "make lock"

# Machines with and without a GPU work together, so the second lock has the first one's versions where it can.
lock: setup  ## solve pyproject.toml anew into requirements-cpu.lock and requirements-gpu.lock
	$(VENV)/bin/pip install --quiet uv
	echo "torch==2.13.0+cpu" > $(VENV)/overrides.txt
	$(COMPILE) --extra teacher-cpu --extra cloud --extra dev $(INDEX) \
	  $(addprefix --no-emit-package ,torchvision torchaudio torchcodec triton) --output-file requirements-cpu.lock
	echo "torch===2.13.0" > $(VENV)/overrides.txt
	cp requirements-cpu.lock requirements-gpu.lock  # uv keeps what versions it can
	$(COMPILE) --extra teacher-gpu --output-file requirements-gpu.lock

clean:  ## remove what runs and tests leave, not .venv
	rm -rf runs .pytest_cache .hypothesis .mypy_cache .ruff_cache build *.egg-info
