# make demo | make test | make check: each builds .venv on first use; nothing else is needed but python3 and make.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= dev
# make CONSTRAINTS= installs without pins (another torch, another Python)
CONSTRAINTS ?= constraints.txt
USE_UV ?= 1
WORKDIR ?= runs/demo
# Options for pytest, e.g. make test PYTEST="--golden=../golden -k solvers"
PYTEST ?=
# Processes that share the tests; each has a torch of its own
WORKERS ?= 2
# uv reads no PIP_FIND_LINKS: hand it on where it is set
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
export UV_PYTHON_DOWNLOADS = never
# pip compiles .pyc at install, uv only when told: without it every start pays seconds for torch
export UV_COMPILE_BYTECODE = 1
export MPLBACKEND ?= Agg
# threads that wait asleep: with spinning ones a busy machine trains ten times slower
export OMP_WAIT_POLICY ?= passive
BIN := $(VENV)/bin
C := $(if $(CONSTRAINTS),-c $(CONSTRAINTS))

.PHONY: demo test slow check lint types layers notebooks lock clean
$(VENV)/.done: setup.py pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	if [ "$(USE_UV)" = 1 ] && { test -x $(BIN)/uv || $(BIN)/python -m pip install -q uv; }; then \
	  $(BIN)/uv pip install -q --python $(BIN)/python $(C) -e '.[$(EXTRAS)]'; \
	else $(BIN)/python -m pip install -q $(C) -e '.[$(EXTRAS)]'; fi
	touch $@

demo: $(VENV)/.done
	$(BIN)/python -m scoresde demo --workdir=$(WORKDIR)
test: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(PYTEST)
slow: $(VENV)/.done
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m slow $(PYTEST)
lint: $(VENV)/.done
	$(BIN)/ruff check .
types: $(VENV)/.done
	$(BIN)/mypy
layers: $(VENV)/.done
	PYTHONPATH=. $(BIN)/lint-imports
notebooks: $(VENV)/.done   # from their .py source, executed and stored with outputs
	$(BIN)/python notebooks/store.py
check: lint types layers test
lock: $(VENV)/.done   # names and versions only: no index addresses, no local version suffix
	$(BIN)/uv pip compile -q setup.py --all-extras --python-version 3.11 --no-header --no-annotate \
	  --no-emit-index-url --no-emit-find-links -c .ci/torch.txt | sed 's/+cpu//' > constraints.txt
clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
