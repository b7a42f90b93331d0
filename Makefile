# Start with `make quickstart` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow test-long test-all test-demo peers lint onnx gcs docs pages compilers results-cpu results-gpu
.PHONY: test-compile test-slices gpu gpu-pack clean

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade pip
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

quickstart: $(VENV)/installed
	$(RUN) main.py --config=configs/digits.py --workdir=runs/digits
	$(RUN) main.py --mode=eval --workdir=runs/digits
	$(RUN) main.py --mode=predict --workdir=runs/digits --images=runs/digits/examples --topk=3
	$(RUN) main.py --mode=visualize --workdir=runs/digits

test: $(VENV)/installed
	$(RUN) -m pytest

# Slow tests, such as comparisons with PyTorch, transformers and ONNX.
test-slow: peers onnx gcs
	$(RUN) -m pytest -m 'slow and not long'

# Tests that take too long for CI. Run them before a release.
test-long: peers onnx gcs
	$(RUN) -m pytest -m long

test-all: test test-slow test-long test-demo

peers: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-peers.txt

# All tests of the page of --mode=serve and of the notebook, including long ones. The page is tested
# in the system's Chromium.
test-demo: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-demo.txt
	$(RUN) -m pytest -n 0 -m '' tests/inference/test_page.py tests/inference/test_serve.py tests/test_notebook.py

# Packages for --format=onnx. Without them, the tests of this format are skipped.
onnx: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-deps --requirement requirements-onnx.txt

# Packages for buckets (gs://). Without them, the tests of buckets are skipped.
gcs: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-gcs.txt

# Builds the documentation site in site/. Fails at a broken link or an unresolved name.
docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-docs.txt
	$(VENV)/bin/zensical build --clean --strict

# Generates two pages: docs/config.md (config keys) and docs/cli.md (flags of each mode).
pages: $(VENV)/installed
	$(RUN) -m vit_jax.cli.pages docs

# Installs compilers for an H200, which need no GPU, in a separate environment: 200 MB of wheels.
COMPILER_PYTHON ?= python3.12
CUDA := 0.12.0.1
compilers: .compilers/installed
.compilers/installed: requirements.txt
	$(COMPILER_PYTHON) -m venv .compilers
	.compilers/bin/pip install --quiet --requirement requirements.txt jax==$(CUDA) jaxlib==$(CUDA)
	.compilers/bin/pip install --quiet --no-deps jax-cuda12-plugin==$(CUDA) jax-cuda12-pjrt==$(CUDA)
	touch $@

# Compiles two training steps for an H200, and compares them with results/compiled.json.
test-compile: compilers
	JAX_PLATFORMS=cpu .compilers/bin/python -m benchmarks.compile --check

# Runs every slice of `make gpu` at toy size, on a CPU.
test-slices: peers
	$(RUN) -m benchmarks.gpu --toy --results="$$(mktemp -d)"

lint: $(VENV)/installed
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

# Trains all recipes for CPUs or GPUs, e.g. make results-gpu DATA=folder:cifar10. DATA is the data
# source of CIFAR-10. To resume after an interruption, repeat the command.
results-cpu results-gpu: results-%: $(VENV)/installed
	@test -n "$(DATA)" || (echo "DATA is missing: make $@ DATA=folder:path/to/cifar10, or DATA=tfds:cifar10"; exit 2)
	$(RUN) -m benchmarks.recipes $* $(DATA)

# Runs all measurements that need a GPU. Needs no network. Uses the Python in .venv, or PYTHON if
# there is no .venv. This Python must have JAX for the GPU.
MINUTES ?= 30
GPU_PYTHON ?= $(or $(wildcard $(RUN)),$(PYTHON))
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu_pack --unpack
	PYTHONPATH=$(CURDIR)/runs/gpu/site:$$PYTHONPATH $(GPU_PYTHON) -m benchmarks.gpu --minutes=$(MINUTES)

# Fills gpu/ for a machine without a network, e.g. make gpu-pack DATA=cifar10. PACK_FOR is the Python
# version of that machine.
PACK_FOR ?= 3.12
gpu-pack: $(VENV)/installed
	@test -n "$(DATA)" || (echo "DATA is missing: make $@ DATA=path/to/cifar10, a folder with train/ and test/"; exit 2)
	$(RUN) -m benchmarks.gpu_pack $(DATA) --python=$(PACK_FOR)

clean:
	rm -rf $(VENV) site
