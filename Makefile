PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test seams judges clean
demo: $(STAMP)  ## install, then every guard before and after on the bundled models
	$(BIN)/safelight demo --out demo

test: $(STAMP)  ## lint, types, import contracts, tests
	$(BIN)/ruff check src tests recipes examples benchmarks
	$(BIN)/ruff format --check src tests recipes examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses auto --dist loadfile

seams: $(STAMP)  ## the conformance tests against the oldest supported diffusers
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints.txt --upgrade pip torch
	.venv-oldest/bin/pip install -q -e '.[dev]' 'torch==2.13.0' 'diffusers==0.40.0'
	.venv-oldest/bin/pytest tests/test_attach.py tests/test_backbones.py tests/methods

judges: $(STAMP)  ## the judges' tests with NudeNet (AGPL-3.0, brings OpenCV), which `make test` skips
	$(BIN)/pip install -q -c constraints.txt -e '.[nudenet]'
	$(BIN)/pytest tests/evaluation/judges

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .venv-oldest demo
