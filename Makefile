PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test seams clean
demo: $(STAMP)  ## install, then every guard before and after on the bundled models
	$(BIN)/safelight demo --out demo

test: $(STAMP)  ## lint, types, import contracts, tests
	$(BIN)/ruff check src tests recipes examples benchmarks
	$(BIN)/ruff format --check src tests recipes examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

seams: $(STAMP)  ## the conformance tests against the oldest supported diffusers
	$(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/pip install -q -c constraints.txt --upgrade pip torch
	.venv-oldest/bin/pip install -q -e '.[dev]' 'torch==2.13.0' 'diffusers==0.40.0'
	.venv-oldest/bin/pytest tests/test_attach.py tests/test_backbones.py tests/methods

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

clean:
	rm -rf .venv .venv-oldest demo
