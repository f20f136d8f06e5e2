# Every target sets up what it needs in .venv the first time, and costs nothing the next.
#   make PYTHON=python3.12 test     another Python to make .venv from
#   make train ARGS="section.key=value"   make test ARGS="-k masks"   make bench ARGS="-k gather"

PYTHON ?= python3
JOBS ?= $(shell nproc)
ARGS ?=

comma := ,
BIN := .venv/bin
# A stamp says that its extras are installed. It is touched last, so an interrupted set-up is taken up again.
TRAIN := .venv/.train.stamp
DEV := .venv/.dev.stamp
DOCS := .venv/.docs.stamp

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup train test bench lint docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) ## Make .venv with everything for working on fastjepa

train: $(TRAIN) ## Train on Fashion-MNIST, embedded; ARGS="section.key=value" changes the config
	$(BIN)/python fastjepa/train.py --config configs/fashion_mnist.yaml $(ARGS)

test: $(DEV) ## Run the tests, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -p no:benchmark $(ARGS)

# Its files are bench/bench_*.py. Set up nothing while there are none.
ifneq ($(wildcard bench/bench_*.py),)
bench: $(DEV)
	$(BIN)/python -m pytest bench --benchmark-only $(ARGS)
else
bench:
	@echo "bench/ holds no bench_*.py yet, so nothing was measured."
endif
bench: ## Run the microbenchmarks

lint: $(DEV) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(DOCS) ## Build the site into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove build outputs and caches; never .venv or runs/
	rm -rf build dist site *.egg-info .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . \( -path ./.venv -o -path ./runs \) -prune -o -name __pycache__ -prune -exec rm -rf {} +
	rm -f kernels/fastjepa_kernels/_C*.so

# Installing the extras $(1). Half an environment, left by an interrupted set-up, is completed.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "fastjepa needs Python 3.11 or newer; name one: make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make virtual environments: install its venv module (Debian, Ubuntu: apt install python3-venv)" >&2; exit 1; }
	@echo "Setting up .venv: torch and friends, about five minutes the first time"
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$(1)]' --constraint constraints.txt
	@touch $@
endef

$(TRAIN): setup.py pyproject.toml constraints.txt
	$(call install,train)

# These extras include those of a run, so `make train` after `make test` has nothing to do.
$(DEV): setup.py pyproject.toml constraints.txt
	$(call install,train$(comma)bench$(comma)dev)
	@touch $(TRAIN)

$(DOCS): setup.py pyproject.toml constraints.txt
	$(call install,docs)
