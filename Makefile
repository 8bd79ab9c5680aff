# Everything a fresh machine needs: `make demo` makes videos, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.demo-installed

.PHONY: demo test quick browser clients mistakes test-torch lint lint-proof wheel in-place kernels plugins bench-gpu clean

demo: $(DEMO_STAMP)
	$(BIN)/python -m examples.moving_shapes.demo --output demo

# Two processes, a file of tests in each at a time; one thread in each, so that they leave each other a core.
TEST_PROCESSES ?= 2
test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

# Without the tests that are marked slow: the goldens of LTX-Video alone, and nothing that a compiler makes for a GPU.
quick: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
		-m "not slow"

# For the tests of the server's page, which are skipped without; Debian's Chromium, as root.
browser: $(STAMP)
	$(BIN)/python -m pip install --quiet "playwright>=1.50,<2"
	command -v chromium || (apt-get update --quiet && apt-get install --yes --quiet --no-install-recommends chromium)

# Other programs that speak to the server, for the tests that are skipped without; they want packages of their own.
clients:
	$(PYTHON) -m venv .clients
	.clients/bin/python -m pip install --quiet "litellm>=1.80,<2" "aiperf>=0.13,<1"

# Plants mistakes in a copy of the checkout and runs the tests that must notice them; ONLY=guidance chooses some.
mistakes: $(STAMP)
	$(BIN)/python -m tests.planted_mistakes --processes $(TEST_PROCESSES) $(if $(ONLY),--only $(ONLY))

# The tests of what compiles and of what measures under another torch, such as that of a host with a GPU. PyPI's build
# for CUDA runs on a CPU too, and takes 5 GB: make test-torch TORCH=2.11.0 PYTHON=python3.12
TORCH ?= 2.11.0
TORCH_VENV := build/torch-$(TORCH)
TORCH_TESTS ?= tests/engines tests/build_engines tests/benchmarks
test-torch: $(TORCH_VENV)/.installed
	OMP_NUM_THREADS=1 $(TORCH_VENV)/bin/python -m pytest --numprocesses $(TEST_PROCESSES) --dist loadfile \
		--no-loadscope-reorder $(TORCH_TESTS)

# The other versions are those that the project is tested with.
$(TORCH_VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TORCH_VENV)
	grep -v '^torch==' constraints.txt > $(TORCH_VENV)/constraints.txt
	$(TORCH_VENV)/bin/python -m pip install --quiet --upgrade pip
	$(TORCH_VENV)/bin/python -m pip install --quiet -c $(TORCH_VENV)/constraints.txt torch==$(TORCH) \
		--editable '.[benchmarks,lora]' pytest pytest-xdist
	touch $@

lint: $(STAMP) in-place
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(IN_PLACE) && $(abspath $(BIN))/mypy --config-file $(CURDIR)/pyproject.toml

# Mistakes at the borders between folders, each of which mypy must report.
lint-proof: lint
	$(BIN)/python .ci/lint_proof.py

wheel: $(STAMP)
	$(BIN)/python -m build --wheel --outdir dist .

# The package as a wheel has it, of links into the checkout: mypy checks that, and it runs where nothing is installed.
IN_PLACE := build/in_place
in-place:
	rm -rf $(IN_PLACE)
	mkdir -p $(IN_PLACE)/stg_trt
	ln -s $(addprefix $(CURDIR)/,$(wildcard stg_trt/*) build_engines runtime benchmarks) $(IN_PLACE)/stg_trt/
	ln -s $(CURDIR)/tests $(CURDIR)/examples $(IN_PLACE)/

# The demo needs the package alone; everything else also the tools for development.
$(DEMO_STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	# torch first: asked for alone, the pinned version resolves to the CPU build where one is offered.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable .
	touch $@

$(STAMP): $(DEMO_STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --editable '.[dev]'
	touch $@

# For one GPU alone: make kernels CUDA_ARCHITECTURES=90-real
kernels: $(STAMP)
	cmake -S . -B build/kernels -DCMAKE_BUILD_TYPE=Release \
		$(addprefix -DCMAKE_CUDA_ARCHITECTURES=,$(CUDA_ARCHITECTURES))
	cmake --build build/kernels --parallel
	ctest --test-dir build/kernels --output-on-failure
	cmake --install build/kernels --prefix .

# Kernels of ours inside TensorRT engines: make plugins TENSORRT_ROOT=<folder with include/NvInfer.h>
plugins: $(STAMP)
	cmake -S . -B build/plugins -DCMAKE_BUILD_TYPE=Release -DBUILD_TESTING=OFF -DSTG_TRT_BUILD_KERNELS=OFF \
		-DSTG_TRT_BUILD_TENSORRT_PLUGINS=ON -DTENSORRT_ROOT=$(TENSORRT_ROOT)
	cmake --build build/plugins --parallel
	cmake --install build/plugins --prefix .

# In the environment that is there, without a network or an install. ONLY=cogvideox,wan runs the parts with these
# words in their names; DEVICE=cpu rehearses all parts with small models.
DEVICE ?= cuda
OUTPUT ?= $(if $(filter cpu,$(DEVICE)),build/rehearsal,benchmarks/results)
MINUTES ?= 9
bench-gpu: in-place
	PYTHONSAFEPATH=1 PYTHONPATH=$(abspath $(IN_PLACE))$(addprefix :,$(PYTHONPATH)) $(PYTHON) -m stg_trt.benchmarks gpu \
		--device $(DEVICE) --output $(OUTPUT) --minutes $(MINUTES) \
		$(if $(BACKEND),--backend $(BACKEND)) $(if $(ONLY),--only "$(ONLY)")

clean:
	rm -rf $(VENV) dist demo build
