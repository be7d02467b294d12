# make demo         set everything up and render the default model at 4096x3072
# make test         set everything up and run the fast tests
# make test-slow    run the slow tests
# make test-long    run the tests that take hours: every signal at many times, an error at every change, open and read of
#                    a file, and at every large allocation of memory
# make fuzz         mutate models and pictures until Ctrl-C, or for MINUTES=60
# make lock         write the lock files from pyproject.toml and constraints.txt; needs uv
# make viewer       build the page of engine view; needs node
# make lint         check style, types and import rules
# make docs         write docs/cli.md from the parser, docs/api.md from docstrings, docs/results.md and
#                   the tables of docs/reliability.md from the committed rows
# make bench-quick  measure the main figures again in about five minutes; writes no rows
# make bench        run every benchmark that this machine can run; appends rows to benchmarks/results

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

# A lock holds the hashes of all packages except PyTorch, whose build is the user's choice: docs/decisions/0026-pins.md.
# The second command finds them installed, and adds PyTorch where it is missing.
LOCKED := $(BIN)/pip install --quiet --require-hashes --no-deps --requirement
PROJECT := $(BIN)/pip install --quiet --constraint constraints.txt --no-build-isolation --editable

VIEWER := $(wildcard viewer/src/*) viewer/build.mjs viewer/package-lock.json

.PHONY: viewer demo test test-slow test-long fuzz lock lint docs bench-quick bench clean

# Idle OpenMP threads sleep early, as the command line sets it: spinning ones take the cores of a shared machine.
export GOMP_SPINCOUNT ?= 3000

# Every test runs on one thread, so one process for each core; the tests of a file stay together.
PARALLEL := --numprocesses=auto --dist=loadfile

FAULTS := allocations bits container cost damage descriptors disk fuzz kills opens races reads signals streams

# One stamp per set of extras: the environment is installed again when the project's requirements change.
$(VENV)/.demo: pyproject.toml constraints.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements.lock
	$(PROJECT) .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt requirements-dev.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(LOCKED) requirements-dev.lock
	$(PROJECT) '.[weights,dev]'
	touch $@

# Resumable: after an interruption, make demo continues with the missing shards.
demo: $(VENV)/.demo
	mkdir -p $(DEMO)
	$(BIN)/engine render --size 4096x3072 --seed 7 --memory 3GiB --resume --out $(DEMO)/picos.zarr --report $(DEMO)/picos.json
	$(BIN)/engine export $(DEMO)/picos.zarr $(DEMO)/picos.tif --overwrite
	$(BIN)/engine export $(DEMO)/picos.zarr $(DEMO)/picos.png --max-size 2048 --overwrite
	@echo "store, TIFF, preview and run report: $(DEMO)/picos.zarr picos.tif picos.png picos.json"

viewer: engine/view/static/app.js

engine/view/static/app.js: $(VIEWER)
	cd viewer && npm ci --ignore-scripts --no-audit --no-fund && npm run build

test: $(VENV)/.dev
	$(BIN)/python -m pytest --quiet -m "not slow and not long" --durations=15 $(PARALLEL)

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest --quiet -m "slow and not long" --durations=25 $(PARALLEL)

test-long: $(VENV)/.dev
	$(BIN)/python -m pytest --quiet -m long --durations=25 $(PARALLEL)

fuzz: $(VENV)/.dev
	$(BIN)/python tests/fuzz.py $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED))

# Libraries that the CUDA build of PyTorch brings, at versions that it states itself.
CUDA := cuda-bindings cuda-toolkit nvidia-cudnn-cu13 nvidia-cusparselt-cu13 nvidia-nccl-cu13 nvidia-nvshmem-cu13
LOCK := printf '%s\n' $(CUDA) | uv pip compile --quiet pyproject.toml --group build --universal --python-version 3.11 \
	--constraint constraints.txt --generate-hashes --no-annotate --custom-compile-command 'make lock' \
	--excludes /dev/stdin --no-emit-package torch

lock:
	$(LOCK) --no-emit-package triton --output-file requirements.lock
	$(LOCK) --extra weights --extra dev --output-file requirements-dev.lock

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.dev
	$(BIN)/python -m engine.cli.reference > docs/cli.md
	$(BIN)/python docs/api.py > docs/api.md
	$(BIN)/python benchmarks/results_page.py
	$(BIN)/python benchmarks/reliability_page.py

bench-quick: $(VENV)/.dev
	$(BIN)/python benchmarks/bench_quick.py

bench: $(VENV)/.dev
	for script in bench_overhead bench_exact bench_bands bench_memory bench_seams bench_margin bench_checkerboard \
	    bench_training bench_kernels bench_forecast; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/bench_memory.py bands
	for part in threads sizes; do $(BIN)/python benchmarks/bench_rounding.py $$part || exit 1; done
	for part in $(FAULTS); do $(BIN)/python benchmarks/faults.py $$part || exit 1; done
	$(BIN)/python benchmarks/results_page.py
	$(BIN)/python benchmarks/reliability_page.py

clean:
	rm -rf build dist *.egg-info
