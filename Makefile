# Every target sets up what it needs, in .venv, from nothing but Python and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PREBUILT ?=
PYTEST_ARGS ?=

# Keeps the repository root off sys.path: our folder `kernels` would shadow a library of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Workers, and the hundreds of processes that tests start, read bytecode that one of them has written.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help demo test test-oldest test-newest soak sanitize partition server bench lint types docs wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.runtime  ## sample 64 images with the bundled model into samples.png
	@$(BIN)/stepfusion sample fashion-mnist --guidance 1.5 --out samples.png

test: $(VENV)/.dev  ## run the tests; PYTEST_ARGS="-k philox" picks some, WORKERS=8 spreads them
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_ARGS)

test-oldest: $(VENV)-oldest/.dev  ## the tests with the oldest versions that pyproject.toml admits
test-newest: $(VENV)-newest/.dev  ## the tests with the newest versions
test-oldest test-newest:
	@$(VENV)$(@:test%=%)/bin/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_ARGS)

soak: $(VENV)/.dev  ## the tests that take minutes
	@$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_ARGS) -m soak

# Python itself is not instrumented, so that the address sanitizer's library has to be loaded before it, and C++'s own
# for exceptions; PyTorch's allocations then have guards, and what a kernel reads or writes beside a tensor ends the run.
SANITIZERS := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all

sanitize: $(VENV)/.dev  ## the C++ kernels' tests under the address and undefined-behaviour sanitizers
	@STEPFUSION_CXXFLAGS="$(SANITIZERS)" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -n 0 --benchmark-disable -k "not triton and not NEON" $(PYTEST_ARGS) \
		tests/kernels/cpu/test_sampling.py tests/kernels/test_equivalence.py \
		$(addprefix tests/kernels/cpu/test_,group_norm.py winograd.py convolution.py resnet.py attention.py)

# Packages that stay out of .venv, for they ask for PyTorch's CUDA build and for a web stack: without what they depend
# on, in a folder of their own. Where they cannot be installed their tests are skipped. Torch-tensorrt's own libraries
# link PyTorch's CUDA build; without them the package imports, and partitions.
PARTITIONER := torch-tensorrt-rtx==2.13.0 dllist==2.0.0 psutil==7.2.2
SERVER := nvidia-pytriton==0.7.0

partition: $(VENV)/.dev  ## torch-tensorrt's partitioner over every network, no GPU needed
	@$(call aside,build/partitioner,$(PARTITIONER))
	@find build/partitioner/torch_tensorrt -name '*.so' -delete 2>/dev/null || true
	@PYTHONPATH=$(CURDIR)/build/partitioner $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --benchmark-disable $(PYTEST_ARGS) \
		tests/export/test_to_torch_tensorrt.py

server: $(VENV)/.dev  ## an exported model repository in a Triton Inference Server
	@$(call aside,build/server,$(SERVER))
	@STEPFUSION_PYTRITON=$(CURDIR)/build/server $(BIN)/python -m pytest -n 0 --benchmark-disable $(PYTEST_ARGS) \
		tests/export/test_in_triton_server.py

define aside
test -d $(1) || { rm -rf $(1).part && $(BIN)/pip install -qq --no-deps --target $(1).part $(2) && mv $(1).part $(1); } \
	|| echo "make $@: pip cannot install $(2) into $(1): the tests that need it are skipped"
endef

bench: $(VENV)/.dev  ## time kernels and network blocks; `stepfusion bench` measures the rest, beside peers
	@$(BIN)/python -m pytest -n 0 --benchmark-only $(PYTEST_ARGS) tests/bench

lint: $(VENV)/.dev  ## ruff: rules and formatting
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .

# mypy does not see through an editable install, so it reads a plain one: what ships, py.typed included.
types: $(VENV)/.dev  ## strict mypy over the package as it installs
	@rm -rf build/lib build/bdist.* build/types
	@$(BIN)/pip install -qq --no-deps --no-build-isolation --target build/types .
	@MYPYPATH=build/types $(BIN)/mypy --no-error-summary -p stepfusion

docs: $(VENV)/.dev  ## build the documentation site into build/site, warnings are errors
	@log=$$(NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict 2>&1) || { echo "$$log"; exit 1; }
	@echo "build/site/index.html; with the search box: $(BIN)/python -m http.server -d build/site"

wheel: $(VENV)/.dev  ## the source archive, and from it the wheel, into dist/; PREBUILT=1 for this platform, C++ compiled
	@rm -rf build/lib build/bdist.* dist
	@log=$$(STEPFUSION_PREBUILT=$(PREBUILT) $(BIN)/python -m build --no-isolation --outdir dist . 2>&1) || { echo "$$log"; exit 1; }
	@ls dist/*

clean:  ## remove everything that the targets made
	rm -rf $(VENV) $(VENV)-oldest $(VENV)-newest build dist samples.png *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.runtime: EXTRAS :=
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.runtime $(VENV)/.dev: pyproject.toml constraints.txt
	@echo "installing stepfusion$(EXTRAS) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq -c constraints.txt -e ".$(EXTRAS)"
	@touch $@

$(VENV)-%/.dev: pyproject.toml constraints-%.txt
	@echo "installing stepfusion[test] and its $* dependencies into $(VENV)-$*"
	@$(PYTHON) -m venv $(VENV)-$*
	@$(VENV)-$*/bin/pip install -qq -c constraints-$*.txt -e ".[test]"
	@touch $@
