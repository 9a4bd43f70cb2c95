# Both commands need Python >= 3.11 and nothing else; the first run installs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= runs/demo

.PHONY: demo test clean
demo: $(VENV)/installed-report
	$(BIN)/cacherl demo --config configs/demo.py --out $(OUT)

test: $(VENV)/installed-test
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/pytest

$(VENV)/installed-%: setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed, this is " + sys.version.split()[0] + "; use make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) runs .jax_cache build *.egg-info
