# make train                       train on the embedded data set, in a few minutes on two cores
# make train ARGS="--data mnist"   the same command with options
# make test                        the tests
# make check                       lint, format, types
PYTHON ?= python3
ARGS ?=

.PHONY: train test check
train: .venv/.stamp
	.venv/bin/capsnet train $(ARGS)

test: .venv/.dev-stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto $(ARGS)

check: .venv/.dev-stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev-stamp: .venv/.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@
