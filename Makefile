# Needs make and Python 3.11 or newer; everything else is set up in .venv on the first call.
#
#   make test       the unit tests, the doctests and the code blocks of README.md and docs/
#   make demo       examples/demo.py
#   make lint       ruff;  make format rewrites the files
#   make types      pyright
#   make docs-test  the doctests and the code blocks only
#   make bench      benchmarks/run.py: curvature matrices, against the libraries that `make rivals` installed
#   make bench-core benchmarks/core.py: what types and charts cost
#   make rivals     other libraries, in an environment of their own
#   make venv       the set-up only
#   make clean      remove .venv and everything built
#
# Variables: WORKERS=2 (test processes), ARGS="-k maps" (more arguments for pytest, the demo or a benchmark),
# VENV=.venv, RIVALS=.venv/rivals, PYTHON3=/path/to/python (instead of looking for one).

.DEFAULT_GOAL := test
.PHONY: venv test demo lint format types docs-test bench bench-core rivals clean

VENV ?= .venv
WORKERS ?= 2
ARGS ?=
PYTHON3 ?=

PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check --no-input
STAMP := $(VENV)/.set-up
RIVALS ?= $(VENV)/rivals

venv: $(STAMP)

$(STAMP): pyproject.toml requirements/torch.txt requirements/dev.txt
	@set -e; \
	right='import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))'; \
	if ! "$(PYTHON)" -c "$$right" > /dev/null 2>&1; then \
	    found=; \
	    for name in $(or $(PYTHON3),python3.11 python3.12 python3.13 python3.14 python3 python); do \
	        if "$$name" -c "$$right" > /dev/null 2>&1; then found=$$name; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "geoad needs Python 3.11 or newer with the venv module (on Debian and Ubuntu: python3 and python3-venv)." >&2; \
	        echo "None was found. Install one, or name it: make PYTHON3=/path/to/python3.11" >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating $(VENV) with $$("$$found" --version)"; \
	    "$$found" -m venv --clear "$(VENV)"; \
	fi
	$(PIP) install --quiet -r requirements/torch.txt
	$(PIP) install --quiet -r requirements/dev.txt
	$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test: $(STAMP)
	$(PYTHON) -m pytest -n $(WORKERS) --doctest-modules geoad tests $(ARGS)

docs-test: $(STAMP)
	$(PYTHON) -m pytest --doctest-modules geoad tests/test_readme.py $(ARGS)

demo: $(STAMP)
	$(PYTHON) examples/demo.py $(ARGS)

lint: $(STAMP)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

format: $(STAMP)
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

types: $(STAMP)
	$(PYTHON) -m pyright --project pyproject.toml

bench: $(STAMP)
	$(or $(wildcard $(RIVALS)/bin/python),$(PYTHON)) benchmarks/run.py $(ARGS)

bench-core: $(STAMP)
	$(PYTHON) benchmarks/core.py $(ARGS)

rivals: $(STAMP)
	$(PYTHON) -m venv --clear $(RIVALS)
	$(RIVALS)/bin/pip install --quiet --no-input -r requirements/torch.txt
	$(RIVALS)/bin/pip install --quiet --no-input -r requirements/dev.txt
	$(RIVALS)/bin/pip install --quiet --no-input --no-deps -r benchmarks/rivals.txt
	$(RIVALS)/bin/pip install --quiet --no-input --no-deps --no-build-isolation --editable .

clean:
	rm -rf $(VENV) build dist demo_out demo*.png .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
