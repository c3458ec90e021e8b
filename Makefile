# Every target first brings .venv/ up to date. PYTHON= chooses the interpreter, ARGS= adds arguments to pytest or the demo.
PYTHON ?= python3
ARGS ?=
BIN := .venv/bin

.PHONY: help environment demo test test-all lint format docs clean
.DEFAULT_GOAL := help

help:
	@echo "make demo       draw with a small trained model, and train it on, into out/demo"
	@echo "make test       run the tests, without the slow ones"
	@echo "make test-all   run all tests"
	@echo "make lint       ruff and mypy"
	@echo "make format     let ruff rewrite the sources"
	@echo "make docs       build the manual into site/"
	@echo "make clean      remove .venv, caches and build outputs (out/ stays)"
	@echo "PYTHON=/path/to/python3.12 chooses the interpreter (3.11 or newer); ARGS='-k mask' adds arguments"

environment:
	@command -v "$(PYTHON)" >/dev/null || { \
	  echo "loom_jax: no interpreter '$(PYTHON)'; choose one with PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" .ci/environment.py

demo: environment
	$(BIN)/loom demo --out out/demo $(ARGS)

test: environment
	$(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: environment
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: environment
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: environment
	$(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf site .venv .jax_cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
