# Everything here needs only python3 (3.11 or newer), pip and make. The virtual environment is made on first use.
PYTHON ?= python3
VENV   ?= .venv
LOWEST ?= .venv-lowest
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready

.PHONY: fields quickstart test test-slow test-all test-lowest check lint format types setup bench docs clean help postgres-test torture audit

help:           ## show this list
	@grep -hE '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

setup: $(READY) ## make the virtual environment

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("vitnas needs Python 3.11 or newer; this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev,data]'
	touch $@

quickstart: $(READY) ## the main job: handwritten digits in, a searched, trained and exported model out
	$(BIN)/vitnas run tour folder=runs/tour

test: $(READY)  ## the default tests (under 5 minutes on two cores)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-slow: $(READY) ## what takes longer: kills in each stage, several processes, each mixer's default export
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[openvino,executorch]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist load -m "slow and not gpu" -o timeout=900

test-lowest: $(READY) ## the default tests on the lowest supported versions, in a virtual environment of their own
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(BIN)/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct -e '.[test]'
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu"

test-all: $(READY) ## all tests that this machine can run
	$(BIN)/python -m pytest -q -o timeout=900

fields: $(READY) ## what `vitnas run --help` shows of the fields of a run, written anew
	$(BIN)/python -c 'from vitnas.cli.commands import field_text; print(field_text(), end="")' > vitnas/cli/fields.txt

docs: $(READY)  ## the documentation as a site, in site/
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

postgres-test: $(READY) ## the tests of a shared search on a private PostgreSQL server (where there is initdb)
	$(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[postgres]'
	OMP_NUM_THREADS=1 $(BIN)/python tests/searching/postgres_server.py $(BIN)/python -m pytest -q tests/searching/test_postgres.py

torture: $(READY) ## kills, signals, odd words, damaged files, hostile images, dying workers: half an hour on two cores
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/torture.py

audit: $(READY) ## known advisories against what is installed, and a bill of materials in build/
	$(BIN)/uv pip install --quiet --python $(BIN)/python pip-audit cyclonedx-bom
	$(BIN)/python .ci/audit

check: lint types test ## what CI runs

lint: $(READY)  ## formatting and lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: $(READY) ## put the formatting right
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: $(READY) ## type checks
	$(BIN)/mypy

bench: $(READY) ## the speed table, as ratios measured side by side
	$(BIN)/python benchmarks/spine.py

clean:          ## remove the virtual environment and caches (not runs/)
	rm -rf $(VENV) $(LOWEST) .pytest_cache .mypy_cache .ruff_cache build *.egg-info
