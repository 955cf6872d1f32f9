# `make demo`, `make test` and `make docs` need Python >= 3.10 (docs: 3.11) and nothing else. Each makes
# .venv the first time, and installs nothing after that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo
NEWEST := .venv-newest
NEWEST_TESTS := tests/hipa_deploy/models tests/train tests/export tests/test_prompt_encoding.py
RAY := .venv-ray
RAY_TESTS := tests/hipa_deploy/bulk tests/hipa_deploy/serve/cluster \
	'tests/hipa_deploy/test_extras.py::test_nothing_is_missing_here[ray]'

# Container images often set it. Then each of the many processes that the tests start would compile
# torch and what lies on it anew: 8.5 s an import in place of 4.1.
unexport PYTHONDONTWRITEBYTECODE

FUZZ_CASES := 300
TESTS := not gpu and not thorough

.PHONY: demo test tests test-all test-newest test-ray fuzz lint types docs wheels-for-gpu clean

demo: $(VENV)/installed
	$(BIN)/hipa-demo --out $(DEMO)

# Types beside the tests: alone, mypy would leave a core idle for a minute.
test: lint
	$(MAKE) --no-print-directory --jobs=2 types tests

tests: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "$(TESTS)"

# Also the tests marked 'thorough', which take as long again: further models and combinations of what
# `make test` covers, the longer examples, and the costs in the recipes' headers. Run it before a
# release, and after a change of the export or of what predicts a training's cost.
test-all: lint
	$(MAKE) --no-print-directory --jobs=2 types tests TESTS="not gpu"

# The newest diffusers, transformers and huggingface-hub, with the pinned torch, in an environment of
# their own. To try newer ones, remove .venv-newest first.
test-newest: $(NEWEST)/installed
	$(NEWEST)/bin/python -m pytest -m "$(TESTS)" $(NEWEST_TESTS)

# The tests on a local Ray cluster, which `make test` skips: Ray is large, and no part of the extra dev.
test-ray: $(RAY)/installed
	$(RAY)/bin/python -m pytest -m "$(TESTS)" $(RAY_TESTS)

# Hostile files, FUZZ_CASES of each format; what fails is shrunk and printed (tests/hostile).
fuzz: $(VENV)/installed
	HIPA_FUZZ_CASES=$(FUZZ_CASES) $(BIN)/python -m pytest -n 2 tests/hostile

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The built tree, because a type checker cannot see through setuptools' package-dir map.
types: $(VENV)/installed
	rm -rf build/typecheck build/lib
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/typecheck .
	$(BIN)/mypy build/typecheck/hipa_deploy

# The documentation site, into site/. A broken link is an error.
docs: $(VENV)/installed
	$(BIN)/zensical build --clean --strict

# Wheels for a GPU machine without a network, into wheels/ (docs/how-to/measure-on-a-gpu.md). Another
# Python or TensorRT: make wheels-for-gpu WHEELS="--python 3.12 --with rtx"
wheels-for-gpu: $(VENV)/installed
	$(BIN)/python benchmarks/gpu/wheels.py --out wheels $(WHEELS)

# pip would compile all 17,500 files. Python compiles those that it imports, the first time.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("hipa-deploy needs Python >= 3.10" if sys.version_info < (3, 10) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -c constraints.txt -e '.[dev]'
	touch $@

# Without the extra optimum, which keeps transformers 4.
$(NEWEST)/installed: pyproject.toml
	test -x $(NEWEST)/bin/python || $(PYTHON) -m venv $(NEWEST)
	grep '^torch==' constraints.txt > $(NEWEST)/torch.txt
	$(NEWEST)/bin/python -m pip install --quiet --no-compile --upgrade --upgrade-strategy eager \
		-c $(NEWEST)/torch.txt -e '.[train,export,captions,openvino,publish,serve,sign,c2pa]' \
		filelock hypothesis packaging pytest setuptools
	touch $@

# No torch: what is served and made in shards runs without it.
$(RAY)/installed: pyproject.toml constraints.txt
	test -x $(RAY)/bin/python || $(PYTHON) -m venv $(RAY)
	$(RAY)/bin/python -m pip install --quiet --no-compile -c constraints.txt -e '.[ray]' \
		filelock h11 httpx hypothesis packaging pytest setuptools
	touch $@

clean:
	rm -rf build dist site .cache *.egg-info
