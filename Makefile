# `make demo` and `make test` do all their own set-up.

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help install demo test lint format bench bench-core bench-data bench-write test-s3 test-k8s test-gpu clean

help:
	@echo "make demo      the whole way on handwritten digits, on this machine alone"
	@echo "make test      lint, type check, all tests (they start their own servers)"
	@echo "make lint      lint and type check"
	@echo "make format    rewrite the sources as the linter wants them"
	@echo "make bench     speed, as ratios to a named peer or limit"
	@echo "make bench-core  ddpm_core against diffusers: training steps, sampling, share of the peak"
	@echo "make bench-data  reading images against webdataset, Ray Data and decoding alone, from disk and S3"
	@echo "make bench-write  writing images into shards against webdataset's ShardWriter; prepare by 1 and 2 workers"
	@echo "make test-s3   the S3 tests against Ceph's gateway (radosgw ceph-mon ceph-osd ceph-mgr)"
	@echo "make test-k8s  the manifests against KubeRay's CRDs (kubectl; KUBERAY_CRDS=FOLDER)"
	@echo "make test-gpu  what must hold on a GPU as on a CPU (a GPU that torch can use)"
	@echo "make clean     stop the local stack and remove what was made here"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@sh infra/local/make_venv.sh $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: install
	@$(BIN)/ddpm demo

test: lint
	@$(BIN)/python -m pytest -m "not k8s and not s3 and not gpu"

lint: install
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy

format: install
	@$(BIN)/ruff check --fix
	@$(BIN)/ruff format

bench: install
	@$(BIN)/python -m tests.bench

bench-core: install
	@$(BIN)/python -m tests.bench.bench_core

test-s3: install
	@$(BIN)/python -m pytest -m s3

bench-data: install
	@$(BIN)/python -m tests.bench.bench_data

bench-write: install
	@$(BIN)/python -m tests.bench.bench_write
	@$(BIN)/python -m tests.bench.bench_write --prepare

test-k8s: install
	@$(BIN)/python -m pytest -m k8s

test-gpu: install
	@$(BIN)/python -m pytest -m gpu

clean:
	@if [ -x $(BIN)/ddpm ]; then $(BIN)/ddpm down --discard; fi
	rm -rf $(VENV) .ddpm demo-results build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
