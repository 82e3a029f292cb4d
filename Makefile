# Slipstream's commands. `make help` lists them. Everything is installed into .venv in this folder (and
# .venv-light); the only other places written to are the user's cache and state folders.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

ifeq ($(wildcard requirements/install.sh),)
# `make -f elsewhere/Makefile`: go there first, since every path below is relative to this folder.
GOALS := $(or $(MAKECMDGOALS),help)
.PHONY: $(GOALS)
$(GOALS):
	@exec $(MAKE) -C "$(dir $(abspath $(lastword $(MAKEFILE_LIST))))" $@
else

PYTHON ?= $(or $(shell command -v python3.11),python3)
# Passed on to the command: make up ARGS="--prefill 2"
ARGS ?=
# Where the CPU build of torch is found when pip has no place configured (PIP_FIND_LINKS, pip.conf). This page
# lists torch alone, so nothing else can come from there.
export TORCH_WHEELS ?= https://download.pytorch.org/whl/cpu/torch/

BIN := .venv/bin
LIGHT_BIN := .venv-light/bin
INSTALLER := requirements/install.sh requirements/installer.lock pyproject.toml

# An environment is ready when its mark names this checkout (scripts and the editable install hold its
# path) and its interpreter runs; if not, FORCE makes it anew whatever the timestamps say.
ready = $(shell [ "$$(cat $(1)/.ready 2>/dev/null)" = "$(CURDIR)" ] && $(1)/bin/python -c "" 2>/dev/null && echo yes)

.PHONY: FORCE
.venv/.ready: $(INSTALLER) requirements/full.lock $(if $(call ready,.venv),,FORCE)
	@requirements/install.sh $(PYTHON) .venv full
.venv-light/.ready: $(INSTALLER) requirements/light.lock $(if $(call ready,.venv-light),,FORCE)
	@requirements/install.sh $(PYTHON) .venv-light light

##@ Use
.PHONY: up demo install install-light model
up: install $(if $(findstring --model,$(ARGS))$(SLIPSTREAM_MODEL),,model)  ## Start a cluster on this machine; Ctrl-C stops it. Options in ARGS="--prefill 2"
	@exec $(BIN)/slipstream up $(ARGS)

demo: install $(if $(findstring --model,$(ARGS))$(SLIPSTREAM_MODEL),,model)  ## Start a cluster, ask it one question, show what happened, stop
	@exec $(BIN)/slipstream demo $(ARGS)

install: .venv/.ready  ## Install everything, the CPU engine too, into .venv
	@:

install-light: .venv-light/.ready  ## Install frontend, planner and client only (no torch) into .venv-light
	@:

model: .venv/.ready  ## Fetch and convert the default model, once, into the user's cache folder
	@[ -t 2 ] || export TQDM_DISABLE=1; exec $(BIN)/python -m engine.default_model

##@ Check
.PHONY: test static lint types imports test-unit test-e2e test-light
test: install model  ## Everything: style, types, import rules, all tests
	@$(MAKE) -j 2 --output-sync=target static test-light
	@echo "==> Tests of the other parts"
	@$(BIN)/python -m pytest $(AT_ONCE) tests/unit $(addprefix --ignore=,$(LIGHT_TESTS) tests/unit/kv_transfer) $(ARGS)
	@$(MAKE) -j 2 --output-sync=target test-clusters test-transfer test-faults

static:  ## What is checked without running anything: style, types, import rules
	@$(MAKE) lint
	@$(MAKE) types
	@$(MAKE) imports

lint: install  ## Style: ruff check and ruff format --check
	@echo "==> Style"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: install  ## Types: mypy, strict, over every package
	@echo "==> Types"
	@$(BIN)/mypy

imports: install  ## Layering: who may import whom
	@echo "==> Import rules"
	@$(BIN)/lint-imports

test-unit: install  ## The fast tests
	@$(BIN)/python -m pytest tests/unit $(ARGS)

# Those of transfers, of whole clusters and of faults, each one at a time: they mostly wait, too.
.PHONY: test-transfer test-clusters test-faults
test-transfer: install model
	@echo "==> Tests of transfers, and of parts together"
	@$(BIN)/python -m pytest tests/unit/kv_transfer tests/integration $(ARGS)
	@echo "==> Tests of NIXL, which needs a process without ucxx"
	@$(BIN)/python -m pytest -m nixl tests/unit/kv_transfer

test-clusters: install model
	@echo "==> Tests of whole clusters"
	@$(BIN)/python -m pytest tests/e2e $(ARGS)

test-faults: install model
	@echo "==> Tests of faults"
	@$(BIN)/python -m pytest tests/faults $(ARGS)

test-e2e: install model  ## The tests that start real workers
	@$(BIN)/python -m pytest tests/integration tests/e2e tests/faults $(ARGS)

# Tests of single parts mostly wait, so three fit on two cores; a file's tests stay together.
AT_ONCE := -n 3 --dist loadfile --max-worker-restart=0
LIGHT_TESTS := $(wildcard $(addprefix tests/unit/,slipstream frontend planner deploy))
test-light: install-light  ## Tests of frontend, planner and client where torch is not installed
	@echo "==> Tests of the light install"
	@! $(LIGHT_BIN)/python -c "import torch" 2>/dev/null || { echo "error: torch is in .venv-light" >&2; exit 1; }
	@$(LIGHT_BIN)/python -m pytest $(AT_ONCE) $(LIGHT_TESTS) $(ARGS)

.PHONY: coverage audit hooks
# Only what the unit tests reach: whole clusters run in processes of their own, unmeasured. Not part of `make test`: it
# costs those tests a third more time.
coverage: install  ## Which share of each package's lines and branches the unit tests reach
	@rm -f .coverage .coverage.*
	@$(BIN)/python -m pytest $(AT_ONCE) --cov --cov-report= tests/unit $(ARGS)
	@$(BIN)/python -m pytest -m nixl --cov --cov-append --cov-report= tests/unit/kv_transfer
	@$(BIN)/python -m tests.coverage_by_package

audit: install  ## Known vulnerabilities and licences of what is locked; ADVISORIES=all.zip needs no network
	@$(BIN)/python -m tests.supply_chain $(if $(ADVISORIES),--advisories $(ADVISORIES))

hooks: install  ## Have git check each commit (.pre-commit-config.yaml)
	@$(BIN)/pre-commit install

.PHONY: chaos
chaos: install  ## Faults under load by a seed; ARGS="--seed 7 --minutes 60", "--minutes 10 --engine vllm"
	@exec $(BIN)/python -m tests.faults.chaos $(ARGS)

.PHONY: fuzz-bytes
fuzz-bytes: install  ## Fuzzers of all that reads others' bytes; ARGS="--target events --runs 100000 --seed 7"
	@exec $(BIN)/python -m tests.fuzz $(ARGS)

.PHONY: fuzz
fuzz: install  ## Random faults in a real cluster; ARGS="--cases 1000 --seed 7"
	@exec $(BIN)/python -m tests.faults.fuzz $(ARGS)

.PHONY: faults
faults: install  ## Break a cluster in every way of docs/faults.md, and write that page; ARGS="--only rolling-restart"
	@exec $(BIN)/python -m tests.faults.table $(ARGS)

.PHONY: soak overload trust
soak: install model  ## An hour at 80% of capacity: memory, latencies, leaks; ARGS="--minutes 10 --engine vllm"
	@exec $(BIN)/python -m benchmarks.soak $(ARGS)

overload: install model  ## Up to three times the capacity: goodput, SLOs, Retry-After; ARGS="--no-real"
	@exec $(BIN)/python -m benchmarks.overload $(ARGS)

trust: install model  ## Load, faults, chaos, bad input and fuzzers in one report; ARGS="--json --long"
	@exec $(BIN)/python -m benchmarks.trust $(ARGS)

##@ Develop
.PHONY: format proto lock bench docs clean help
format: install  ## Put the code into the house format
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

proto: install  ## Regenerate the stubs in slipstream/v1 from proto/
	@$(BIN)/python -m slipstream.regenerate_stubs

docs: install  ## Rewrite docs/configuration.md from the settings
	@$(BIN)/python -m slipstream.describe_settings

lock: install-light  ## Resolve pyproject.toml into requirements/*.lock (newest versions: ARGS=--upgrade)
	@find_links="$${UV_FIND_LINKS:-$${PIP_FIND_LINKS:-$$TORCH_WHEELS}}"; \
	requirements/lock.sh "$$PWD/$(LIGHT_BIN)/uv" "$${find_links// /,}" $(ARGS)

bench: install model  ## Measure first light: the cluster beside one aggregated engine
	@exec $(BIN)/python -m benchmarks.first_light $(ARGS)

clean:  ## Remove both environments and every tool's cache (not the model)
	@rm -rf .venv .venv-light .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## This list
	@awk 'BEGIN {FS = ":.*  ## "} \
	/^##@ / {printf "\n\033[1m%s\033[0m\n", substr($$0, 5)} \
	/^[a-z0-9-]+:.*  ## / {printf "  \033[36m%-14s\033[0m %s\n", $$1, $$2}' Makefile

endif
