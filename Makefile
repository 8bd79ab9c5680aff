# Everything a fresh machine needs: `make demo` makes videos, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test lint wheel in-place kernels plugins bench-gpu clean

demo: $(STAMP)
	$(BIN)/python -m examples.moving_shapes.demo --output demo

# Two processes, a file of tests in each at a time; one thread in each, so that they leave each other a core.
TEST_PROCESSES ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

lint: $(STAMP) in-place
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(IN_PLACE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

# The package as a wheel has it, of links into the checkout: mypy checks that, and it runs where nothing is installed.
IN_PLACE := build/in_place
in-place:
	rm -rf $(IN_PLACE)
	mkdir -p $(IN_PLACE)/stg_trt
	ln -s $(addprefix $(CURDIR)/,$(wildcard stg_trt/*) build_engines runtime benchmarks) $(IN_PLACE)/stg_trt/
	ln -s $(CURDIR)/tests $(CURDIR)/examples $(IN_PLACE)/

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first: asked for alone, the pinned version resolves to the CPU build where one is offered.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@

kernels: $(STAMP)
	cmake -S . -B build/kernels -DCMAKE_BUILD_TYPE=Release
	cmake --build build/kernels --parallel
	ctest --test-dir build/kernels --output-on-failure
	cmake --install build/kernels --prefix .

# Kernels of ours inside TensorRT engines: make plugins TENSORRT_ROOT=<folder with include/NvInfer.h>
plugins: $(STAMP)
	cmake -S . -B build/plugins -DCMAKE_BUILD_TYPE=Release -DBUILD_TESTING=OFF -DSTG_TRT_BUILD_KERNELS=OFF \
		-DSTG_TRT_BUILD_TENSORRT_PLUGINS=ON -DTENSORRT_ROOT=$(TENSORRT_ROOT)
	cmake --build build/plugins --parallel
	cmake --install build/plugins --prefix .

# In the environment that is there, without a network: torch for CUDA, and this checkout installed in it.
# ONLY=cogvideox,wan runs the parts with these words in their names.
OUTPUT ?= benchmarks/results
MINUTES ?= 9
bench-gpu:
	$(PYTHON) -m benchmarks gpu --output $(OUTPUT) --minutes $(MINUTES) $(if $(ONLY),--only $(ONLY))

clean:
	rm -rf $(VENV) dist demo build
