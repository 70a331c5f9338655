# Every verb here is a step of CI, and CI has no other steps.
#
#   make demo      set up .venv, embed real text unpatched and patched, compare   (TEXTS=300, TEXTS=all)
#   make test      everything that needs no GPU: lint, tests, interpreter, builds for GPUs, oldest stack
#   make ray-test  the tests of `--engine ray`; installs Ray into .venv (240 MB), so not in `make test`
#   make cuda      compile the optional CUDA extension, report on its machine code
#   make cpu-smoke pre-train a small NeoBERT on a CPU, both stages, in minutes      (RUN=folder)
#   make gpu-test  every check that needs a GPU; gpu-bench measures, gpu-profile says where the time of a
#                  forward goes, gpu-tune proposes launch choices; gpu-all is all four, each with a share
#                  (NOINSTALL=1 PYTHON=python3: with the machine's own packages; OUT=folder,
#                  WHEELS=folder of peers, DEADLINE=seconds)

PYTHON ?= python3
VENV   ?= .venv
COMPAT ?= .venv-compat
TEXTS  ?= 3000
OUT    ?=
WHEELS ?=
DEADLINE  ?= 510
NOINSTALL ?=
RUN    ?= runs/cpu_smoke
BENCH  ?=
JOBS   ?= $(shell cores=$$(nproc 2>/dev/null || echo 2); echo $$((cores > 8 ? 8 : cores)))

# A machine with an NVIDIA GPU gets the CUDA build that pip prefers; CI's version elsewhere.
TORCH ?= $(if $(shell nvidia-smi -L 2>/dev/null),torch,torch==2.13.0)
# The oldest versions that pyproject.toml allows; Triton 3.6's interpreter needs numpy before 2.4.
OLDEST := triton==3.6.0 transformers==5.10.1 'numpy<2.4'

# The interpreter is slow: of the models' tests those of the forward, for every family. With the oldest Triton
# a forward and all gradients of each, and not again what is PyTorch's, which is the same there: graphs, schemas,
# and torch.compile but for two models.
INTERPRETED := $(addprefix tests/patch/test_,patch.py autocast.py invariant.py direct.py \
	direct_changes.py)
OLDEST_INTERPRETED := -k 'not (compile or registration)' $(addprefix tests/patch/test_, \
	patch.py::test_padded_batch_equals_the_unpatched_model patch.py::test_every_gradient_of_a_base_model \
	direct.py::test_equals_the_patched_model)
OLDEST_COMPILED := -k 'not compile or (compiled_base_model and (neobert or modernbert))'
PROMISES := tests/kernels/test_aot.py::test_every_kernel_keeps_its_promises
PIP    := -m pip --disable-pip-version-check install --quiet --no-compile
BIN    := $(VENV)/bin
# $(call pytest,VENV): tests side by side, each on one thread
pytest  = OMP_NUM_THREADS=1 $(1)/bin/python -m pytest -n $(JOBS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help venv install test ready lint format test-cpu ray-test support interpret aot cuda compat demo cpu-smoke \
	bench bench-quick smoke report gpu-test gpu-bench gpu-profile gpu-tune gpu-all gpu-compare gpu-wheels clean

help:
	@sed -n 's/^#   //p' Makefile

# Stamps: a verb that finds its environment newer than pyproject.toml goes straight to work.
$(VENV)/.demo: pyproject.toml
	@$(call create,$(VENV))
	$(BIN)/python $(PIP) --editable '.[demo]'
	@$(call compile,$(VENV))
	@touch $@

$(VENV)/.dev: pyproject.toml
	@$(call create,$(VENV))
	$(BIN)/python $(PIP) --editable '.[demo,dev]'
	@$(call compile,$(VENV))
	@touch $@ $(VENV)/.demo

$(COMPAT)/.dev: pyproject.toml
	@$(call create,$(COMPAT))
	$(COMPAT)/bin/python $(PIP) $(OLDEST) --editable '.[demo,dev]'
	@$(call compile,$(COMPAT))
	@touch $@

define create
echo "installing into $(1)"
test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
$(1)/bin/python $(PIP) '$(TORCH)'
endef

# What pip would do file by file, on all cores; some packages have templates that are not Python.
compile = $(1)/bin/python -m compileall -qq -j 0 $(1)/lib || true

venv: $(VENV)/.demo
install: $(VENV)/.dev

test: ready test-cpu interpret aot cuda compat

# Side by side, because each keeps one core busy.
ready: $(VENV)/.dev
	@$(MAKE) -j 2 lint $(COMPAT)/.dev

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test-cpu: $(VENV)/.dev
	$(call pytest,$(VENV)) -m 'not aot' --check-support-table=docs/support.md

ray-test: $(VENV)/.dev
	$(BIN)/python $(PIP) --editable '.[ray]'
	$(BIN)/python -c 'import ray.data'  # without it the tests are skipped
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/sharded/test_engines.py -k ray

support: $(VENV)/.dev
	$(call pytest,$(VENV)) tests/patch --support-table=docs/support.md

interpret: $(VENV)/.dev
	TRITON_INTERPRET=1 $(call pytest,$(VENV)) tests/pretrain/test_convergence.py tests/kernels $(INTERPRETED)

# The report fails as the test of every kernel does, which would only compile them again.
aot: $(VENV)/.dev
	$(BIN)/neobert aot
	$(call pytest,$(VENV)) tests/kernels -m aot --deselect=$(PROMISES)

# The CUDA extension for sm_80, sm_90 and sm_100, and what its machine code is like. nvcc comes from
# pip where the machine has none; without a C++ compiler there is nothing to compile with.
cuda: $(VENV)/.dev
	@if ! command -v c++ >/dev/null; then echo "cuda: no C++ compiler, not compiled"; else \
		command -v nvcc >/dev/null || $(BIN)/python $(PIP) --editable '.[cuda]' || exit; \
		XDG_CACHE_HOME=$(CURDIR)/build/cache $(BIN)/neobert aot --extension; fi

# The oldest stack that pyproject.toml promises: kernels, their builds, the model and the patch.
compat: $(COMPAT)/.dev
	TRITON_INTERPRET=1 $(call pytest,$(COMPAT)) tests/kernels $(OLDEST_INTERPRETED)
	$(COMPAT)/bin/neobert aot
	$(call pytest,$(COMPAT)) tests/kernels -m aot --deselect=$(PROMISES)
	$(call pytest,$(COMPAT)) tests/model tests/encode tests/patch $(OLDEST_COMPILED)

demo: $(VENV)/.demo
	$(BIN)/neobert demo --texts $(TEXTS)

cpu-smoke: $(VENV)/.dev
	$(BIN)/python recipes/cpu_smoke/run.py --run $(RUN)

# Goes on where it ended; BENCH='--suite models --deadline-s 900' runs a part of it.
bench: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks --benchmark-only --results benchmarks/results --resume $(BENCH)
	$(BIN)/python benchmarks/report.py

# The whole suite at tiny sizes, and a report of it: shows that both work.
bench-quick: $(VENV)/.dev
	rm -rf build/quick
	$(BIN)/python -m pytest benchmarks --benchmark-only --quick --results build/quick
	$(BIN)/neobert bench --report build/quick

# Side by side: neither keeps all cores busy, and none of their times is kept.
smoke: $(VENV)/.dev
	@$(MAKE) -j 2 --output-sync=target demo bench-quick

report: $(VENV)/.dev
	$(BIN)/python benchmarks/report.py --readme
	$(BIN)/neobert bench --report

# Each ends by its deadline, most important first, and goes on where it ended when it is run again.
SITE       := build/wheels
GPU_PYTHON  = $(if $(NOINSTALL),$(PYTHON),$(BIN)/python)
GPU_RUN     = PYTHONPATH=$(CURDIR):$(CURDIR)/$(SITE) $(GPU_PYTHON)

define need_gpu
$(GPU_RUN) -c 'import sys, torch; \
	sys.exit(None if torch.cuda.is_available() else "gpu: expected one that torch can use, got none")'
endef

gpu-wheels: $(if $(NOINSTALL),,$(VENV)/.dev)
	$(if $(WHEELS),rm -rf $(SITE) && $(GPU_PYTHON) $(PIP) --no-index --no-deps --target $(SITE) $(WHEELS)/*.whl)

gpu-test: gpu-wheels
	$(GPU_RUN) benchmarks/gpu_test.py --output $(or $(OUT),build/gpu) --deadline-s $(DEADLINE)

gpu-bench: gpu-wheels
	@$(call need_gpu)
	$(GPU_RUN) -m pytest benchmarks --benchmark-only -p no:cacheprovider --resume \
		--results $(or $(OUT),benchmarks/results) --deadline-s $(DEADLINE)

gpu-tune: gpu-wheels
	$(GPU_RUN) benchmarks/gpu_tune.py --output $(or $(OUT),build/gpu) --deadline-s $(DEADLINE)

gpu-profile: gpu-wheels
	@$(call need_gpu)
	$(GPU_RUN) benchmarks/gpu_profile.py --output $(or $(OUT),build/gpu) --deadline-s $(DEADLINE)

# For a GPU that is there for minutes: all of them within DEADLINE, each with its share (per cent).
gpu-all:
	@failed=0; for part in test:40 bench:30 profile:10 tune:20; do \
		$(MAKE) gpu-$${part%:*} DEADLINE=$$(($(DEADLINE) * $${part#*:} / 100)) || failed=1; \
	done; exit $$failed

# The commit BASE and this one in turns; fails where this one is over 5 % slower than the spread.
gpu-compare: gpu-wheels
	@$(call need_gpu)
	$(GPU_RUN) benchmarks/compare_commits.py --output $(or $(OUT),build/gpu) --deadline-s $(DEADLINE)

clean:
	rm -rf $(VENV) $(COMPAT) build *.egg-info .*_cache .hypothesis .benchmarks
