# Every target sets up what it needs, in .venv, from nothing but Python and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PYTEST_ARGS ?=

# Keeps the repository root off sys.path: our folder `kernels` would shadow a library of that name.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test bench lint types wheel clean
.NOTPARALLEL:
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-7s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.runtime  ## sample 64 images with the bundled model into samples.png
	@$(BIN)/stepfusion sample fashion-mnist --guidance 1.5 --out samples.png

test: $(VENV)/.dev  ## run the tests; PYTEST_ARGS="-k philox" picks some, WORKERS=8 spreads them
	@$(BIN)/python -m pytest -n $(WORKERS) --benchmark-disable $(PYTEST_ARGS)

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

wheel: $(VENV)/.dev  ## build the source archive, and from it the wheel, into dist/
	@rm -rf build/lib build/bdist.* dist
	@log=$$($(BIN)/python -m build --no-isolation --outdir dist . 2>&1) || { echo "$$log"; exit 1; }
	@ls dist/*

clean:  ## remove everything that the targets made
	rm -rf $(VENV) build dist samples.png *.egg-info .pytest_cache .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.runtime: EXTRAS :=
$(VENV)/.dev: EXTRAS := [dev]
$(VENV)/.runtime $(VENV)/.dev: pyproject.toml constraints.txt
	@echo "installing stepfusion$(EXTRAS) into $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -qq -c constraints.txt -e ".$(EXTRAS)"
	@touch $@
