PYTHON ?= python3
COMMA := ,
VENV ?= .venv
BIN := $(VENV)/bin
# TensorRT-RTX has wheels for Linux and Windows; engines are built in the tests where it is there.
EXTRAS := onnx,onnxruntime,report,train,test$(if $(filter Linux,$(shell uname -s)),$(COMMA)tensorrt-rtx)
# On Linux the default index may give torch's CUDA build, several GB. To take the CPU build instead:
#   make install TORCH_INDEX=<address of PyTorch's index of CPU wheels>
TORCH_INDEX ?=
# Files with few tests are the long ones here: not last, when one process would be left with them.
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo install lint test test-fast test-long gpu teacher clean

help: ## what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  %-14s %s\n", $$1, $$2}'

demo: install ## compress the embedded teacher, recipe to report
	$(BIN)/ppclc compress recipes/two_digits.yaml

install: $(VENV)/.installed ## make the environment in .venv

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else "ppclc needs Python 3.11 or newer; $(PYTHON) is %d.%d. Name another: make PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRAS)]'
	@touch $@

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

test: lint ## the whole proof: lint, types, every test
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreted
	$(BIN)/python -m pytest -p tests.emulated.plugin -n 2 tests/emulated
	$(BIN)/python -m pytest $(PYTEST_ARGS)

test-fast: install ## the tests that take next to nothing: a minute
	$(BIN)/python -m pytest -m 'not slow' $(PYTEST_ARGS)

test-long: install ## what the tests leave out: every back end over every family and edit, more kills (half an hour)
	PPCLC_LONG=1 $(BIN)/python -m pytest -m long -n 2 --dist worksteal $(LONG_ARGS)
	PPCLC_LONG=1 $(BIN)/python -m pytest -p tests.emulated.plugin -m long -n 2 --dist worksteal $(LONG_ARGS) tests/emulated

# Not after `install`, which would bring its own torch: on a machine whose Python has a CUDA build and what ppclc needs, BIN names its folder, as in
#   make gpu BIN=/usr/bin GPU_ARGS="--parts ladder"
gpu: ## kernels, whole models, analysis and engines on one GPU (under ten minutes; docs/gpu.md)
	$(firstword $(wildcard $(BIN)/python $(BIN)/python3) $(BIN)/python) -m benchmarks.gpu $(GPU_ARGS)

teacher: install ## train the embedded teacher and its judge again (hours)
	$(BIN)/python -m ppclc.scenes.train --steps 11000 --stop-after 6000 --out build/teacher
	$(BIN)/python -m ppclc.scenes.train --keep-judge --start-from build/teacher --steps 2500 --learning-rate 7e-4 --seed 1

clean: ## remove the environment, caches and builds; out/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
