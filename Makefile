# make quickstart | test | check | docs | fix
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check docs fix

quickstart: .venv/run
	$(BIN)/tandem train recipes/runs/quickstart.yaml --fresh

test: .venv/dev
	$(BIN)/pytest

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages that are made from the code.
docs: .venv/dev
	$(BIN)/python -c "import tandem.config as c; print(c.document(), end='')" > docs/config.md
	$(BIN)/python -c "import tandem.journal as j; print(j.document_metrics(), end='')" > docs/metrics.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first, at the pinned version, so that no other package draws in another build.
.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/dev: .venv/run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@
