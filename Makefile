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
# In build/, so that `make clean`, which removes the extension, has it built again.
EXT := build/.ext.stamp
NVCC ?= nvcc
SANITIZER ?= compute-sanitizer
# Whether csrc/ has what it needs: a C++ compiler with OpenMP, and Python's headers.
CAN_COMPILE = printf '\043include <Python.h>\n\043include <omp.h>\n' | $${CXX:-c++} -fopenmp -fsyntax-only -x c++ \
	-I"$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')" - >/dev/null 2>&1

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help setup train test test-slow faults test-gpu sanitize bench bench-gpu bench-throughput bench-breakdown bench-accuracy bench-checkpoint bench-watch bench-probe bench-loader performance scale-model aot ext ext-cuda lint docs clean

help: ## List these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV) ## Make .venv with everything for working on fastjepa

train: $(TRAIN) ## Train on Fashion-MNIST, embedded; ARGS="section.key=value" changes the config
	$(BIN)/python fastjepa/train.py --config configs/fashion_mnist.yaml $(ARGS)

test: $(DEV) ## Run the tests, one process per core
	@if $(CAN_COMPILE); then $(MAKE) --no-print-directory $(EXT); \
		else echo "No C++ compiler with OpenMP, or no headers of Python: the ops are tested without fastjepa_kernels._C"; fi
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile -p no:benchmark $(ARGS)

test-slow: $(DEV) ## Run what takes long: pages in a browser, the tutorial, memory of real runs, whole benchmarks
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not slow_fault" -n $(JOBS) --dist loadfile -p no:benchmark $(ARGS)

# The quick ones run in `make test` too. One more at a time than there are cores, since many wait for their runs.
faults: $(DEV) ## Do to runs whatever they must survive, and write build/faults.md; on two cores in 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/faults tests/engine -m "fault or slow_fault" -n $$(($(JOBS) + 1)) --dist loadfile -p no:benchmark $(ARGS)

test-gpu: $(DEV) ## Run the tests that need a GPU
	$(BIN)/python -m pytest tests/gpu -p no:benchmark $(ARGS)

# Without torch's cache every tensor is an allocation of its own, so that a byte past its end is seen.
sanitize: ## Run the GPU tests of results and bounds under compute-sanitizer
	@command -v $(SANITIZER) >/dev/null || { echo "make sanitize needs compute-sanitizer, of the CUDA toolkit, and finds none; name one: make sanitize SANITIZER=/usr/local/cuda/bin/compute-sanitizer" >&2; exit 1; }
	@$(MAKE) --no-print-directory $(DEV)
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(SANITIZER) --tool memcheck --error-exitcode 9 \
		$(BIN)/python -m pytest tests/gpu -p no:benchmark -k "bounds or errors" $(ARGS)
	$(SANITIZER) --tool racecheck --error-exitcode 9 \
		$(BIN)/python -m pytest tests/gpu -p no:benchmark -k "errors" $(ARGS)

# Set up nothing while there are no benchmarks.
ifneq ($(wildcard bench/kernels/bench_*.py),)
bench: $(DEV)
	@if $(CAN_COMPILE); then $(MAKE) --no-print-directory $(EXT); \
		else echo "No C++ compiler with OpenMP, or no headers of Python: measured without fastjepa_kernels._C"; fi
	$(BIN)/python -m pytest bench/kernels --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)
else
bench:
	@echo "bench/kernels/ holds no bench_*.py, so nothing was measured."
endif
bench: ## Run the microbenchmarks on the CPU; ARGS=--write-table writes what to choose

bench-gpu: $(DEV) ## Check and measure everything on a GPU, in under ten minutes
	$(BIN)/python -m bench.gpu $(ARGS)

bench-throughput: $(DEV) ## Time whole training steps beside published MAE and I-JEPA; on a CPU in under ten minutes
	$(BIN)/python -m bench.throughput $(ARGS)

bench-breakdown: $(DEV) ## Show where the time of a training step goes, beside a roofline
	$(BIN)/python -m bench.breakdown $(ARGS)

bench-accuracy: $(DEV) ## Measure accuracy against time and FLOPs, I-JEPA beside MAE
	$(BIN)/python -m bench.accuracy $(ARGS)

bench-checkpoint: $(DEV) ## Time how long saves stop training, and checkpoints beside the disk; needs 10 GB on it
	OMP_NUM_THREADS=$(JOBS) $(BIN)/python -m bench.checkpoint $(ARGS)

bench-watch: $(DEV) ## Time what the watch over up to 1,023 other ranks costs rank 0; two quiet cores
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.watch $(ARGS)

bench-loader: $(DEV) ## Time decoding, cropping and packing beside a plain DataLoader and webdataset
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore::DeprecationWarning -m bench.loader $(ARGS)

bench-probe: $(DEV) ## Time a sweep of linear heads beside one head, with the features they share
	$(BIN)/python -m bench.probe $(ARGS)

performance: $(DEV) ## Write docs/performance.md and the README's table from bench/results
	$(BIN)/python -m bench.performance_page $(ARGS)

scale-model: $(DEV) ## Predict steps and memory on 8 to 4,096 GPUs, from what was measured on one
	$(BIN)/python -m bench.scale_model $(ARGS)

aot: $(DEV) ## Compile the Triton kernels for every GPU and gate what they take; ARGS=--write writes the table
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.aot --jobs $(JOBS) $(ARGS)

ext: $(EXT) ## Build fastjepa_kernels._C from csrc/, with CUDA where nvcc is

# Again where a source changed, or torch, whose version the extension is bound to.
$(EXT): setup.py $(wildcard csrc/*.cpp csrc/*.h csrc/cuda/*) $(wildcard .venv/lib/python*/site-packages/torch/version.py) | $(DEV)
	@mkdir -p $(@D)
	@echo "Building fastjepa_kernels._C, about a minute the first time"
	@FASTJEPA_BUILD_EXT=1 MAX_JOBS=$(JOBS) PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python setup.py build_ext --inplace --force \
		>$(@D)/ext.log 2>&1 || { cat $(@D)/ext.log >&2; exit 1; }
	@touch $@

ext-cuda: ## Compile the CUDA sources for sm_80, sm_90, sm_100, and list registers; needs nvcc, no GPU
	@command -v $(NVCC) >/dev/null || { echo "make ext-cuda needs nvcc, of CUDA 12.8 or newer, and finds none; name one: make ext-cuda NVCC=/usr/local/cuda/bin/nvcc" >&2; exit 1; }
	@mkdir -p build
	@$(NVCC) -std=c++17 -O3 $(foreach sm,80 90 100,-gencode arch=compute_$(sm)$(comma)code=sm_$(sm)) --resource-usage \
		-c csrc/cuda/ema_update.cu -o build/ema_update.o >build/nvcc.log 2>&1 || { cat build/nvcc.log >&2; exit 1; }
	@c++filt <build/nvcc.log | awk -f csrc/cuda/resources.awk

lint: $(DEV) ## Check style, formatting and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

docs: $(DOCS) ## Build the site into site/
	$(BIN)/python -m mkdocs build --strict

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
	$(call install,train$(comma)docs)
	@touch $(TRAIN)
