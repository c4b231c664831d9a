PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
# What is installed: the package with its command, what its tests need, what its benchmarks compare with.
PACKAGE := $(VENV)/.package
TESTS := $(VENV)/.tests
PEERS := $(VENV)/.peers
DOCS := $(VENV)/.docs
BENCH := $(BIN)/python -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,min,rounds --benchmark-sort=name

.PHONY: demo test lint sanitize docs links bench bench-gpu report quality clean

demo: $(PACKAGE)
	$(BIN)/compressm train digits --out runs/digits

# A file of tests runs in one process, of which there is one per core, with one thread each.
test: $(TESTS)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

lint: $(TESTS)
	$(BIN)/ruff check .
	$(BIN)/mypy

# The C++ kernels under the address and the undefined behaviour sanitizer, as far as tests of the CPU reach.
SANITIZED := -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=undefined
sanitize: $(TESTS)
	LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	COMPRESSM_CXXFLAGS="$(SANITIZED)" $(BIN)/python -m pytest tests/kernels tests/layers -k "not triton" -q $(ARGS)

# Every warning is an error; tests/docs runs the pages' code.
docs: $(DOCS)
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs docs/_build/html
	@echo "the site: docs/_build/html/index.html"

# Whether what the site links to elsewhere is there; needs the network.
links: $(DOCS)
	$(BIN)/python -m sphinx -b linkcheck -q docs docs/_build/links

# ARGS chooses a part or changes a run: make bench ARGS="-k selective_scan", ARGS="--bench-resume", ARGS="--bench-seconds 5"
bench: $(PEERS)
	$(BENCH) $(ARGS)
	$(MAKE) report

bench-gpu: $(PEERS)
	$(BENCH) --bench-device cuda $(ARGS)
	$(MAKE) report

report: $(PACKAGE)
	$(BIN)/python -m benchmarks.reporting.report benchmarks/results/*.json $(addprefix --modelled ,$(wildcard benchmarks/modelled.json)) --out benchmarks/REPORT.md

# The tables of quality in README.md, docs/ and benchmarks/quality/, of the results there.
quality: $(PACKAGE)
	$(BIN)/python -m benchmarks.reporting.quality

$(DOCS): $(TESTS)
	$(INSTALL) -e '.[docs]'
	touch $@

$(PEERS): $(TESTS)
	$(INSTALL) -e '.[test,peers]'
	touch $@

$(TESTS): $(PACKAGE)
	$(INSTALL) -e '.[test]'
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE $(INSTALL) --no-build-isolation --no-deps mamba-ssm  # its Python part
	touch $@

$(PACKAGE): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("compressm needs Python 3.11 or newer, this is " + sys.version.split()[0] + "; set PYTHON=/path/to/python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) -e '.[train]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist docs/_build .pytest_cache .ruff_cache .mypy_cache
