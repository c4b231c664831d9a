PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

PEERS := $(VENV)/.peers
BENCH := $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name

.PHONY: demo test lint bench bench-gpu clean

demo: $(STAMP)
	$(BIN)/compressm train digits --out runs/digits

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .

# ARGS chooses a part or changes a run: make bench ARGS="-k selective_scan", ARGS="--bench-resume", ARGS="--bench-seconds 5"
bench: $(PEERS)
	$(BENCH) $(ARGS)

bench-gpu: $(PEERS)
	$(BENCH) --bench-device cuda $(ARGS)

$(PEERS): $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,peers]'
	touch $@

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("compressm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt --no-build-isolation --no-deps mamba-ssm  # its Python part, for the tests of the integration
	touch $@

clean:
	rm -rf $(VENV) runs build dist .pytest_cache .ruff_cache
