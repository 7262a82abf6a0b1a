# make demo    the DeepRec pipeline on the embedded world, a few minutes on two CPU cores
# make test    the default test suite (no torch needed)
# make lint    ruff          make bench    what only a measurement shows      make notebook    the notebooks in colab/
#
# Each makes .venv first, with the versions of constraints.txt. PYTHON=python3.12 chooses the interpreter; a .venv made
# by another Python version is made anew.

MINIMUM := 3.11
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then echo $$p; exit; fi; done)
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# A stamp per Python version and extra: a second run finds it and installs nothing.
VERSION := $(if $(PYTHON),$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null))
STAMP := $(VENV)/.installed-$(VERSION)
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-compile -c constraints.txt

.PHONY: demo test lint bench notebook install clean python-check
.DEFAULT_GOAL := demo

demo: $(STAMP)
	$(BIN)/jaxrec demo

test: $(STAMP)-test
	$(BIN)/python -m pytest -n $(WORKERS)

lint: $(STAMP)-test
	$(BIN)/python -m ruff check .

bench: $(STAMP)-bench
	@set -e; for script in $(or $(filter-out %/gpu.py,$(wildcard tests/bench/*.py)),$(error there is nothing in tests/bench yet)); do \
		echo "== $$script"; $(BIN)/python $$script; done

notebook: $(STAMP)-test
	$(BIN)/jupyter-execute $(or $(wildcard colab/*.ipynb),$(error there is no colab/*.ipynb yet))

# make install-parity: the environment with an extra of pyproject.toml, running nothing
install: $(STAMP)
install-%: $(STAMP)-% ;

python-check:
	@if [ -z "$(VERSION)" ]; then \
		echo "jaxrec needs Python $(MINIMUM) or newer and found $(if $(PYTHON),'$(PYTHON)' not working,none on the PATH)." \
			"Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; fi
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "jaxrec needs Python $(MINIMUM) or newer; $(PYTHON) is $(VERSION). Name another:" \
			"make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 1; }

$(STAMP): pyproject.toml constraints.txt | python-check
	@echo "Making $(VENV) with Python $(VERSION) and the versions of constraints.txt (once, some minutes) ..."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) setuptools
	$(INSTALL) -e .
	@touch $@

$(STAMP)-%: $(STAMP)
	$(INSTALL) -e ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache
