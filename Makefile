# Two commands for a newcomer: `make run` and `make test`. `make help` lists the rest.
DEV_TORCH := 2.15.0
OLDEST_TORCH := 2.11.0

TORCH ?= $(DEV_TORCH)
PYTHON ?= python3
ARCHS ?= 80;86;89;90a;100;120+PTX
WORKERS ?= 2
PYTEST_ARGS ?=
MINUTES ?= 8
GPU_CHECK_ARGS ?=
# A fixed sample for two architectures; `make proof` compiles everything for all.
TRITON_GATES ?= --archs "80;90"
export ARCHS

ifeq ($(TORCH),$(DEV_TORCH))
  VENV := .venv
  REQUIREMENTS := requirements/dev.txt
  NEEDS := requirements/dev.txt requirements/dev-constraints.txt requirements/cuda.txt
else ifeq ($(TORCH),$(OLDEST_TORCH))
  VENV := .venv-$(OLDEST_TORCH)
  REQUIREMENTS := requirements/oldest.txt
  NEEDS := requirements/oldest.txt requirements/oldest-constraints.txt
else
  $(error TORCH: $(TORCH) is not set up here; give TORCH=$(DEV_TORCH) or TORCH=$(OLDEST_TORCH))
endif

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
DEV := .venv/bin
# Several test processes share the cores: who waits for a thread must not spin on one.
PYTEST := OMP_WAIT_POLICY=passive $(VENV)/bin/pytest -n $(WORKERS) $(PYTEST_ARGS)

# Stamps carry a hash of what they were made from, so a change of content, and nothing else, redoes them.
hash = $(shell cat $(1) 2>/dev/null | cksum | cut -d' ' -f1)
CSRC := $(sort $(shell find csrc -type f)) CMakeLists.txt setup.py tools/toolchain.py
PACKAGE := $(sort $(shell find resnet_fused -type f -name '*.py' -o -type f -name '*.html' -o -type f -name '*.toml'))
ARCHS_HASH := $(shell printf '%s' '$(ARCHS) $(RESNET_FUSED_NO_CUDA)' | cksum | cut -d' ' -f1)
ENV_STAMP := $(VENV)/.stamp-env-$(call hash,$(NEEDS))
WHEELS := build/wheel
ifeq ($(TORCH),$(DEV_TORCH))
  EXT_STAMP := $(VENV)/.stamp-ext-$(call hash,$(CSRC) pyproject.toml)-$(ARCHS_HASH)
else
  EXT_STAMP := $(VENV)/.stamp-ext-$(call hash,$(CSRC) $(PACKAGE) pyproject.toml)-$(ARCHS_HASH)
endif

.DEFAULT_GOAL := help
.PHONY: help setup run test quick lint unit interpreter emulated conformance op-matrix wheel gates proof bench gpu-check gpu-record clean

help: ## this list
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1|/' | awk -F'|' '{printf "  make %-11s %s\n", $$1, $$2}'
	@echo "Variables: TORCH=$(DEV_TORCH)|$(OLDEST_TORCH)  ARCHS='80;90a' (GPU architectures)  PYTHON=python3.12  WORKERS=2 (pytest -n; 0: no processes beside it)"

$(ENV_STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; give PYTHON=python3.11 or newer" >&2; exit 2; }
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet -r $(REQUIREMENTS)
ifeq ($(TORCH),$(DEV_TORCH))
	@if [ "$$(uname -s)" = Linux ] && [ -z "$$RESNET_FUSED_NO_CUDA" ] && ! $(PY) tools/toolchain.py >/dev/null; then \
	  echo "no nvcc on this machine: installing the pinned one from PyPI"; $(PIP) install --quiet -r requirements/cuda.txt; fi
endif
	@rm -f $(VENV)/.stamp-env-*
	@touch $@

$(EXT_STAMP): $(ENV_STAMP)
	@rm -f $(VENV)/.stamp-ext-*
ifeq ($(TORCH),$(DEV_TORCH))
	$(PIP) install --quiet --no-build-isolation --no-deps -e .
else
	@# The oldest torch runs the very binary that was built against the newest.
	$(MAKE) --no-print-directory wheel TORCH=$(DEV_TORCH)
	$(PIP) install --quiet --no-deps --force-reinstall $(WHEELS)/*.whl
endif
	@$(PY) tools/extension_line.py
	@touch $@

# A stamp without its binary (make clean, git clean) is no stamp.
ifeq ($(TORCH),$(DEV_TORCH))
ifeq ($(wildcard resnet_fused/_C*.so),)
.PHONY: $(EXT_STAMP)
endif
endif

setup: $(EXT_STAMP) ## environment and extension

run: setup ## fuse ResNet-50, check it layer by layer, time it; report in build/run
	$(PY) -m resnet_fused verify resnet50 --time --output build/run

test: setup lint unit ## lint, then every test but the interpreter's and the emulator's

unit: setup # the tests alone
	$(PYTEST) -m "not emulated"

quick: setup lint ## lint and the fast tests, under three minutes
	$(PYTEST) -x -m "not slow and not emulated"

# Triton decides once in a process whether its kernels are interpreted.
interpreter: setup ## the Triton kernels, run on the CPU by Triton's interpreter
	TRITON_INTERPRET=1 $(VENV)/bin/pytest -n 2 $(PYTEST_ARGS) -m interpreter

emulated: setup ## the CUDA kernels, run on the CPU by the project's emulator
	$(PY) tools/emulated.py --sample
	RESNET_FUSED_EMULATED=1 $(VENV)/bin/pytest -n 2 $(PYTEST_ARGS) -m emulated

conformance: setup ## each PTX instruction: manual against emulator, and the GPU where there is one
	$(PY) tools/conformance.py

op-matrix: setup ## op x implementation x case alone, e.g. with TORCH=2.11.0
	$(PYTEST) -m "op_matrix and not emulated"

ifeq ($(TORCH),$(DEV_TORCH))
lint: $(ENV_STAMP) ## ruff, clang-format, types
	$(DEV)/ruff check .
	$(DEV)/ruff format --check .
	$(DEV)/clang-format --dry-run --Werror $$(find csrc tests/emulator -type f)
	$(DEV)/pyrefly check
else
lint:
	@echo "lint: done with the development environment, not with torch $(TORCH)"
endif

wheel: $(ENV_STAMP) ## one abi3 wheel in build/wheel, and what its platform tag is
	@rm -rf build/lib build/lib.* build/bdist.* $(WHEELS)
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir $(WHEELS) .
	@PATH="$(CURDIR)/$(DEV):$$PATH" $(PY) tools/tag_wheel.py $(WHEELS)

gates: setup ## registers, spills, local memory, wide accesses of every kernel and architecture
	$(PY) tools/gates.py --archs "$(ARCHS)"
	$(PY) tools/triton_gates.py $(TRITON_GATES)

proof: setup ## the long proofs: all architectures, every test with more examples
	$(MAKE) --no-print-directory gates ARCHS='80;86;89;90a;100;120+PTX' \
	  TRITON_GATES='--all --archs "80;86;90;100;120"'
	HYPOTHESIS_PROFILE=proof $(PYTEST) -m "not emulated" --timeout=600
	HYPOTHESIS_PROFILE=proof TRITON_INTERPRET=1 $(VENV)/bin/pytest -n 2 $(PYTEST_ARGS) \
	  -m interpreter --timeout=600
	$(PY) tools/emulated.py --all
	HYPOTHESIS_PROFILE=proof RESNET_FUSED_EMULATED=1 $(VENV)/bin/pytest -n 2 $(PYTEST_ARGS) \
	  -m emulated --timeout=600

# What tells most comes first, and no row begins when the budget is over. The compiler's other modes
# compile long; `resnet-fused bench --level ...` runs them too.
BENCH_OUT ?= build/bench
BENCH_BUDGET_MIN ?= 8.5
bench: setup ## this CPU beside eager, torch.compile, ONNX Runtime, OpenVINO; report in build/bench
	$(PY) -m resnet_fused bench resnet50 --level model,block,kernel --batch 1,8 --rounds 9 \
	  --only model/,layer1.1/,layer3.1/,3x3_64_64_at56/,1x1_64_256_at56_add/ \
	  --peers onnxruntime,openvino,inductor,onednn,eager_nchw --budget-min $(BENCH_BUDGET_MIN) \
	  --output $(BENCH_OUT)/bench.json --html $(BENCH_OUT)/bench.html --png-dir $(BENCH_OUT)

# A build for this GPU alone: the long default of ARCHS is for wheels.
gpu-check: ## are the kernels right on this machine's GPU, and how fast? MINUTES=8 OUT=folder BUILD=1
	@$(if $(filter file,$(origin ARCHS)),env -u ARCHS) $(PYTHON) benchmarks/gpu_check.py \
	  --minutes $(MINUTES) $(if $(OUT),--output $(OUT)) $(if $(filter 1,$(BUILD)),--build) $(GPU_CHECK_ARGS)

# Checks, sanitizers, tuning and the benchmark, in one archive: for a GPU that is lent for minutes.
BUDGET_MIN ?= 8
GPU_RECORD_ARGS ?=
gpu-record: ## everything about this machine's GPU in one archive; BUDGET_MIN=8 OUT=folder BUILD=1
	@$(if $(filter file,$(origin ARCHS)),env -u ARCHS) $(PYTHON) benchmarks/gpu_record.py \
	  --budget-min $(BUDGET_MIN) $(if $(OUT),--output $(OUT)) $(if $(filter 1,$(BUILD)),--build) \
	  $(GPU_RECORD_ARGS)

clean: ## remove what was built; the environments stay
	rm -rf build dist *.egg-info resnet_fused/_C*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
