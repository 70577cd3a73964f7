# Needs Python 3.11 or newer and make, nothing else. `make` alone lists the targets.

PYTHON ?= python3
PORT ?= 8000

VENV := .venv
TEST_VENV := .venv-test
SCALE_VENV := .venv-scale
LOCK_VENV := .venv-lock

# A worker for each core and one for what waits, one thread each: more than four would mostly repeat
# the fixtures. Which files a worker takes, and the order, is in tests/conftest.py.
CORES := $(shell nproc 2>/dev/null || echo 3)
PARALLEL := --numprocesses $$(($(CORES) + 1)) --maxprocesses 4 --no-loadscope-reorder

# What must be covered to 90 %: the detection maths, the imaging path, the batching.
DETECTION := model_export/retinanet/anchors.py,model_export/retinanet/box_coding.py,model_export/retinanet/matching.py,model_export/retinanet/losses.py,service/runtime/detector.py,service/engine/postprocessing.py
IMAGING := service/imaging/decode.py,service/imaging/exif.py,service/imaging/canvas.py,service/imaging/limits.py
BATCHING := service/engine/batch_queue.py,service/engine/inference.py,service/engine/admission.py,service/engine/cost.py,service/engine/prediction.py,service/engine/workers.py,service/http/middleware.py
SCALE_TESTS := tests/reliability/test_ray.py tests/reliability/test_bulk_ray.py
COVERED_90 = $(TEST_VENV)/bin/python -m coverage report --fail-under=90 --include=

.DEFAULT_GOAL := help
.PHONY: help serve test test-scale gpu-check lint format proto lock notices clean

help:
	@echo 'make serve   install the service and run the bundled model on http://localhost:$(PORT) (PORT=)'
	@echo 'make test    install what the tests need and run them with coverage'
	@echo 'make test-slow    run the slow tests that make test leaves out'
	@echo 'make test-scale   install Ray and run the tests that need it, on a cluster of their own'
	@echo 'make gpu-check   on a GPU: the tests that need one, and both engines measured (10 minutes)'
	@echo 'make lint    ruff, mypy and the direction of imports'
	@echo 'make format  let ruff rewrite the sources'
	@echo 'make proto   compile the messages of the gRPC dialect'
	@echo 'make lock    renew the lock files of the container images'
	@echo 'make notices renew the licences in docs/third-party.md'
	@echo 'make clean   remove environments and caches'

serve: $(VENV)/installed
	$(VENV)/bin/retinaserve serve --port $(PORT)

PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(TEST_VENV)/bin/python -m pytest

test: started := $(shell date +%s)
test: $(TEST_VENV)/installed
	$(PYTEST) --cov --cov-report=term $(PARALLEL)
	$(COVERED_90)$(DETECTION)
	$(COVERED_90)$(IMAGING)
	$(COVERED_90)$(BATCHING)
	@echo "make test took $$(($$(date +%s) - $(started))) s"

test-slow: $(TEST_VENV)/installed
	$(PYTEST) -m slow $(PARALLEL)

# No torch: what serves and what scales needs none.
test-scale: $(SCALE_VENV)/installed
	$(SCALE_VENV)/bin/python -m pytest -m ray $(SCALE_TESTS)

# On a machine with an NVIDIA GPU. The extra `gpu` brings CUDA and cuDNN.
gpu-check:
	@nvidia-smi --list-gpus >/dev/null 2>&1 || { \
		echo 'make gpu-check needs an NVIDIA GPU: nvidia-smi does not list one' >&2; exit 1; }
	$(MAKE) $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m pip install --quiet --editable '.[gpu]'
	$(TEST_VENV)/bin/python -m pytest -m gpu tests/unit
	$(TEST_VENV)/bin/python benchmarks/gpu_engine.py

lint: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m ruff check .
	$(TEST_VENV)/bin/python -m ruff format --check .
	$(TEST_VENV)/bin/python -m mypy
	MYPYPATH=benchmarks $(TEST_VENV)/bin/python -m mypy benchmarks/*.py
	$(TEST_VENV)/bin/lint-imports

format: $(TEST_VENV)/installed
	$(TEST_VENV)/bin/python -m ruff check --fix-only .
	$(TEST_VENV)/bin/python -m ruff format .

proto: $(TEST_VENV)/installed
	cd service/http/oip && ../../../$(TEST_VENV)/bin/python -m grpc_tools.protoc \
		--proto_path=. --descriptor_set_out=messages.binpb open_inference.proto health.proto

# The stamp is newer than pyproject.toml once everything is installed, so a second run starts at once.
$(VENV)/installed: pyproject.toml
	$(call make_venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --editable .
	@touch $@

# torch first and alone: its pin, not a dependant's open range, decides which build is taken. Most
# modules are never imported; those that are, are compiled then.
$(TEST_VENV)/installed: pyproject.toml
	$(call make_venv,$(TEST_VENV))
	$(TEST_VENV)/bin/python -m pip install --quiet --no-compile torch==2.13.0
	$(TEST_VENV)/bin/python -m pip install --quiet --no-compile --editable '.[train,dev]'
	@touch $@

# tritonclient's protobuf is older than what the newest grpcio-reflection, which Ray brings, is made
# for. Without this line pip tries one release after the other, for minutes.
$(SCALE_VENV)/installed: pyproject.toml
	$(call make_venv,$(SCALE_VENV))
	$(SCALE_VENV)/bin/python -m pip install --quiet --editable '.[scale,dev]' 'grpcio-reflection<1.82'
	@touch $@

define make_venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	echo '$(PYTHON) is missing or older than Python 3.11: name another with make PYTHON=python3.11' >&2; exit 1; }
@echo 'Installing into $(1): only on the first run, or after a change of pyproject.toml.'
@$(PYTHON) -m venv $(1) || { \
	echo '$(PYTHON) cannot make a virtual environment; on Debian and Ubuntu install python3-venv' >&2; exit 1; }
endef

# Locks are resolved on the oldest supported Python: what its markers add is harmless on newer ones.
lock:
	$(call make_venv,$(LOCK_VENV))
	$(LOCK_VENV)/bin/python -m pip install --quiet 'pip-tools>=7.5,<8'
	$(LOCK_VENV)/bin/python -c "$$CPU_REQUIREMENTS" | $(PIP_COMPILE) --output-file requirements-cpu.lock -
	$(PIP_COMPILE) --extra gpu --extra grpc --output-file requirements-gpu.lock pyproject.toml

PIP_COMPILE = CUSTOM_COMPILE_COMMAND='make lock' $(LOCK_VENV)/bin/pip-compile --quiet --upgrade \
	--generate-hashes --strip-extras --no-annotate --no-emit-index-url --no-emit-find-links \
	--no-emit-trusted-host

# What the images install, by hash: some 1.6 GB, most of it CUDA's libraries.
notices:
	$(call make_venv,$(LOCK_VENV))
	$(LOCK_VENV)/bin/python -m pip install --quiet 'packaging>=26,<27'
	$(foreach variant,cpu gpu,$(LOCK_VENV)/bin/python -m pip download --quiet --no-deps --require-hashes \
		--only-binary :all: --dest $(LOCK_VENV)/wheels --requirement requirements-$(variant).lock &&) \
	$(LOCK_VENV)/bin/python docs/third_party.py $(LOCK_VENV)/wheels

# The base dependencies and those of gRPC, with the plain onnxruntime in place of onnxruntime-gpu.
define CPU_REQUIREMENTS
import tomllib
with open('pyproject.toml', 'rb') as file:
    project = tomllib.load(file)['project']
for line in project['dependencies'] + project['optional-dependencies']['grpc']:
    if line.startswith('onnxruntime>'):
        line = line.partition(';')[0]
    if not line.startswith('onnxruntime-gpu'):
        print(line)
endef
export CPU_REQUIREMENTS

clean:
	rm -rf $(VENV) $(TEST_VENV) $(SCALE_VENV) $(LOCK_VENV) .coverage .coverage.* dist \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache
