# Two commands: `make quickstart` and `make test`. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow test-long test-all test-demo peers lint onnx gcs docs pages compilers results-cpu results-gpu
.PHONY: test-hardware gpu gpu-pack clean

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

# Long proofs, and comparisons with PyTorch, transformers and ONNX.
test-slow: peers onnx gcs
	$(RUN) -m pytest -m 'slow and not long'

# As test-slow, but too long for CI. Run it before a release.
test-long: peers onnx gcs
	$(RUN) -m pytest -m long

test-all: test test-slow test-long test-demo

peers: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-peers.txt

# The page of --mode=serve, in the system's Chromium, and the notebook (all tests, also long ones).
test-demo: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-demo.txt
	$(RUN) -m pytest -n 0 -m '' tests/inference/test_serve.py tests/test_notebook.py

# Packages for --format=onnx; its tests are skipped without them.
onnx: $(VENV)/installed
	$(RUN) -m pip install --quiet --no-deps --requirement requirements-onnx.txt

# Packages for buckets (gs://); their tests are skipped without them.
gcs: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-gcs.txt

# The documentation site, in site/. A broken link or an unresolved name fails.
docs: $(VENV)/installed
	$(RUN) -m pip install --quiet --requirement requirements-docs.txt
	$(VENV)/bin/zensical build --clean --strict

# The pages that are generated: the config keys and the flags of each mode.
pages: $(VENV)/installed
	$(RUN) -m vit_jax.cli.pages docs

# Compilers for an H200 that is not there, in an environment of their own: 200 MB of wheels.
COMPILER_PYTHON ?= python3.12
CUDA := 0.12.0.1
compilers: .compilers/installed
.compilers/installed: requirements.txt
	$(COMPILER_PYTHON) -m venv .compilers
	.compilers/bin/pip install --quiet --requirement requirements.txt jax==$(CUDA) jaxlib==$(CUDA)
	.compilers/bin/pip install --quiet --no-deps jax-cuda12-plugin==$(CUDA) jax-cuda12-pjrt==$(CUDA)
	touch $@

# Two training steps, compiled again for an H200, and every slice of `make gpu` at toy size.
test-hardware: compilers peers
	JAX_PLATFORMS=cpu .compilers/bin/python -m benchmarks.compile --check
	$(RUN) -m benchmarks.gpu --toy --results="$$(mktemp -d)"

lint: $(VENV)/installed
	$(RUN) -m ruff check .

# CIFAR-10 as an image folder, e.g. make results-gpu DATA=folder:cifar10. Resumes where it stopped.
results-cpu results-gpu: results-%: $(VENV)/installed
	@test -n "$(DATA)" || (echo "make $@ DATA=folder:path/to/cifar10, or DATA=tfds:cifar10"; exit 2)
	$(RUN) -m benchmarks.recipes $* $(DATA)

# Everything that needs a GPU, without a network, with .venv or else the Python that has JAX for it.
MINUTES ?= 30
GPU_PYTHON ?= $(or $(wildcard $(RUN)),$(PYTHON))
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu_pack --unpack
	PYTHONPATH=$(CURDIR)/runs/gpu/site:$$PYTHONPATH $(GPU_PYTHON) -m benchmarks.gpu --minutes=$(MINUTES)

# Fills gpu/ for a machine without a network, e.g. make gpu-pack DATA=cifar10. PACK_FOR is its Python.
PACK_FOR ?= 3.12
gpu-pack: $(VENV)/installed
	@test -n "$(DATA)" || (echo "make $@ DATA=path/to/cifar10, with train/ and test/"; exit 2)
	$(RUN) -m benchmarks.gpu_pack $(DATA) --python=$(PACK_FOR)

clean:
	rm -rf $(VENV) site
