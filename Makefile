# make demo    the whole path on real images: shard, train two towers, report
# make test    lint, types and tests (about 7 minutes after installation on 2 cores)
# make help    every target

PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python
DEMO   ?= demo
BENCH  ?= data/bench
FASHION ?= /usr/share/datasets/fashion-mnist
export PYTHONUNBUFFERED := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-kills test-isa test-mutations test-gpu bench-gpu lint docs audit bench clean lock licences

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

setup: $(VENV)/.installed  ## create .venv and install everything (about 2 minutes, 7 GB)

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("twotower needs Python 3.11 or newer, and $(PYTHON) is "+sys.version.split()[0]+"; try: make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	@$(PYTHON) -c 'import sys; sys.exit("twotower runs on Linux only, as DALI does, and this is "+sys.platform) if sys.platform != "linux" else None'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check --editable '.[dev]' --constraint constraints.txt
	@touch $@

demo: setup  ## shard the digits, train two towers on them, write the report
	$(PY) -m pipeline prepare --source digits --resize 32 --shard-size 128 --workers 2 --output $(DEMO)/digits
	$(PY) -m pipeline verify $(DEMO)/digits
	$(PY) -m trainer train --config configs/digits.toml --data $(DEMO)/digits --run $(DEMO)/run --processes 2 --overwrite --yes
	$(PY) -m trainer evaluate --run $(DEMO)/run --data $(DEMO)/digits
	@$(PY) -m trainer report --run $(DEMO)/run --data $(DEMO)/digits

lint: setup  ## ruff and mypy
	$(PY) -m ruff check pipeline trainer cluster twotower tests benchmarks
	$(PY) -m ruff format --check pipeline trainer cluster twotower tests benchmarks
	$(PY) -m mypy

test: lint  ## lint and the fast tests
	$(PY) -m pytest -m "not slow and not gpu"

test-slow: setup  ## fault tests with real kills, and long tests
	$(PY) -m pytest -m "slow and not gpu"

test-kills: setup  ## every fault at every stage of a run, with one process and two (about 10 minutes on 2 cores)
	$(PY) -m pytest tests/trainer/training/test_kill_matrix.py --all-cells

test-isa: setup  ## the numeric tests with other instructions, threads and kernels (about 20 minutes on 2 cores)
	$(PY) -m tests.isa

test-mutations: setup  ## make one constant or operator wrong at a time: a fast test must notice (about 27 minutes on 2 busy cores)
	$(PY) -m tests.mutations --jobs 2

test-gpu: setup  ## the tests that need a GPU, on one card (about 3 minutes: an estimate)
	$(PY) -m pytest tests/gpu -m gpu

bench-gpu: setup  ## measure everything about this GPU (6 minutes)
	$(PY) benchmarks/gpu.py

docs: setup  ## write docs/config.md from the code
	$(PY) -m trainer config --markdown > docs/config.md.new && mv docs/config.md.new docs/config.md

audit: setup  ## licences of all packages, and their known vulnerabilities (needs PyPI's service; says so without it)
	@test -x $(VENV)-audit/bin/pip-audit || { $(PYTHON) -m venv $(VENV)-audit && $(VENV)-audit/bin/pip install --quiet --disable-pip-version-check pip-audit; } || true
	@$(PY) -m tests.audit --pip-audit $(VENV)-audit/bin/pip-audit

licences: setup  ## list the licences of what the images hold (of Debian's packages: /usr/share/doc/*/copyright in the image)
	@$(PY) -m tests.audit --list requirements.lock

lock: setup  ## write requirements.lock and requirements-dev.lock: constraints.txt with hashes (about 8 minutes)
	$(PY) -m tests.lock

bench: setup  ## measure everything on this machine and print the table (about 2 hours, 7 GB under $(BENCH))
	$(PY) benchmarks/prepare_speed.py --work $(BENCH)/prepare
	$(PY) benchmarks/loader_speed.py --work $(BENCH)/loader
	$(PY) benchmarks/step_speed.py
	$(PY) benchmarks/overlap.py
	$(PY) benchmarks/end_to_end.py --work $(BENCH)/end_to_end
	$(PY) benchmarks/job_overhead.py --work $(BENCH)/job
	$(PY) benchmarks/scale.py
	$(PY) benchmarks/large_set.py --work $(BENCH)/large
	@if [ -d $(FASHION) ]; then $(PY) benchmarks/fashion_mnist.py --work $(BENCH)/fashion --input $(FASHION); else echo "no Fashion-MNIST in FASHION=$(FASHION) (Debian: dataset-fashion-mnist): left out"; fi
	@$(PY) benchmarks/summary_table.py

clean:  ## remove what demo and tests made (not .venv)
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache *.egg-info
