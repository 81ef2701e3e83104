# Canter's targets. Nothing is assumed but Python 3.11 or newer and make; pip finds packages as this machine's
# pip settings (PIP_*, pip.conf) say. A CPU-only build of torch is taken where those settings offer one.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Where packages come from is the machine's to say; where they go is not: settings that would send them elsewhere are put aside.
PIP    := env -u PIP_TARGET -u PIP_PREFIX -u PIP_ROOT -u PIP_REQUIRE_HASHES -u PIP_NO_DEPS PIP_USER=0 \
          PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: setup demo test oldest wheel-test lint docs bench paper paper-gpu clean

setup: $(STAMP)

# torch first and by its pin: one that is there already stays, and nothing later can ask for another build.
# No build isolation: the build tools come from the constraints too, not from an environment pip makes on the side.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "canter needs Python 3.11 or newer; try: make setup PYTHON=python3.11")'
	@test -x $(BIN)/python || { echo "creating $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch"
	@$(PIP) "$$(grep '^torch==' constraints.txt)" setuptools hatchling hatch-fancy-pypi-readme editables
	@echo "installing canter and what its tests run with"
	@$(PIP) --no-build-isolation --editable '.[dev]'
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores; without it a start takes ten seconds
	@touch $@

# QUICK=1: the same path in 90 s, without the accuracy
demo: setup
	@$(BIN)/canter demo $(if $(QUICK),--quick)

# One thread for each of two processes: more of them would wait for each other. In another order of files and tests:
# make test PYTEST_ARGS="--shuffle 1"
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(PYTEST_ARGS)

# the planner's tests with the oldest packages that pyproject.toml allows, without torch; takes Python 3.11. (matplotlib 3.8 warns
# of pyparsing 3.2, and warnings are errors.)
OLDEST  := build/oldest/bin/python
PLANNER := tests/planning tests/corpus tests/text $(addprefix tests/cli/test_,index_and_inspect.py plan_and_compare.py tokenizer.py)
oldest:
	@test -x $(OLDEST) || $(PYTHON) -m venv build/oldest
	@env -u PIP_CONSTRAINT $(OLDEST) -m pip install --quiet --requirement oldest.txt 'pyparsing<3.2' 'pytest>=8' 'hypothesis>=6.100'
	@PYTHONPATH=src $(OLDEST) -m pytest -p no:cacheprovider $(PLANNER)

# the wheel in environments of its own: the planner alone, then with the packages of canter[all]
wheel-test: setup
	@CANTER_WHEEL_TEST=1 $(BIN)/python -m pytest tests/test_packaging.py

lint: setup
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/pyright

# the documentation site, in build/site; a broken link or a page that is not in the navigation is an error
docs: $(VENV)/.docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet
	@echo "build/site/index.html"

$(VENV)/.docs: $(STAMP)
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

# every benchmark that needs no GPU, at a small size; some of them: make bench BENCH="index models"
bench: setup
	@$(BIN)/python benchmarks $(BENCH)

# the paper's claims (docs/paper.md), an evening on two cores; it continues where it stopped.
# Some parts: make paper PAPER="padding depth". At toy size: make paper PAPER=--quick
paper: setup
	@$(BIN)/python benchmarks/paper.py $(PAPER)

# The paper's claims on one GPU, in under nine minutes; a second call continues. No setup, which may install a torch without CUDA:
# where there is no .venv, PYTHON runs it with its own packages. On a CPU: make paper-gpu PAPER=--smoke
paper-gpu:
	@PYTHONPATH=src $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/paper_gpu.py $(PAPER)

clean:
	rm -rf $(VENV) build dist demo .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
