# make demo   set everything up and run the main job on the default model
# make test   set everything up and pass the tests
# make lint   style, types and import rules
# make bench  the benchmarks that run on this machine; rows go to benchmarks/results

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
DEMO := build/demo

.PHONY: demo test lint bench clean

# A stamp per set of extras: an environment is made once, and again when the project's requirements change.
$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[weights,dev]'
	touch $@

# Resumable: after an interruption, make demo goes on where it stopped. The budget shows that the image never sits in memory.
demo: $(VENV)/.demo
	mkdir -p $(DEMO)
	$(BIN)/engine render --size 4096x3072 --seed 7 --memory 3GiB --resume --out $(DEMO)/picos.zarr --report $(DEMO)/picos.json
	$(BIN)/engine export $(DEMO)/picos.zarr $(DEMO)/picos.tif --overwrite
	$(BIN)/engine export $(DEMO)/picos.zarr $(DEMO)/picos.png --max-size 2048 --overwrite
	@echo "store, TIFF, preview and run report: $(DEMO)/picos.zarr picos.tif picos.png picos.json"

# As the command line does: threads that wait for long take the cores of a shared machine.
test: $(VENV)/.dev
	GOMP_SPINCOUNT=3000 $(BIN)/python -m pytest --quiet

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.dev
	for script in bench_overhead bench_exact bench_bands bench_memory bench_seams bench_margin bench_checkerboard kill_test bench_training bench_kernels bench_networks; do $(BIN)/python benchmarks/$$script.py || exit 1; done
	$(BIN)/python benchmarks/bench_memory.py bands

clean:
	rm -rf build dist *.egg-info
