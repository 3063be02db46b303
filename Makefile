# make train                       train on the embedded data set, in two minutes on two cores: capsnet train --preset fast
# make train ARGS="--data mnist"   capsnet train with these options instead
# make test                        the tests
# make check                       lint, format, types
# make bench                       speed, memory and exactness on this machine
# make bench ARGS="step --compare routing_kernel=plain,fused"
# make docs                        the site, into build/site; docs-serve shows it while it is written
# make tables                      the tables of README and docs from the records; ARGS=--check compares only
PYTHON ?= python3
ARGS ?=

.PHONY: train test check bench tables docs docs-serve
train: .venv/.stamp
	.venv/bin/capsnet train $(or $(ARGS),--preset fast)

test: .venv/.dev-stamp
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n auto $(ARGS)

check: .venv/.dev-stamp
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

bench: .venv/.stamp
	.venv/bin/python -m benchmarks $(ARGS)

tables: .venv/.stamp
	.venv/bin/python -m tools.tables $(ARGS)

docs: .venv/.docs-stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build $(ARGS)

docs-serve: .venv/.docs-stamp
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve $(ARGS)

.venv/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/.dev-stamp: .venv/.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

.venv/.docs-stamp: .venv/.stamp
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@
