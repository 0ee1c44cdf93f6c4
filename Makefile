# make train                                  the quickstart: fine-tune a real model on real text, then see `make help`
# make train CONFIG=configs/eli5.yaml         another recipe
# make train ARGS="--max_steps 50"            any flag of train.py

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
ARGS   ?=
RUNS   ?= runs
BIN    := .venv/bin
UV     := $(shell command -v uv)
PIP    := $(if $(UV),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet --disable-pip-version-check)
# Many tests wait for processes that they start. A file's tests stay together, since they share what they prepare.
PARALLEL := -n logical --maxprocesses 4 --dist loadfile
# A recipe that names a file of the quickstart gets it made first.
PREPARED = $(shell grep -soE 'quickstart/(smollm2|text\.jsonl)' $(CONFIG) | sort -u)

.PHONY: all help install train tensorboard test test-all torture bench bench-gpu docs lint clean
.DELETE_ON_ERROR:

all: install help

help:
	@echo 'make train                             the quickstart (about 3 minutes on 2 CPU cores)'
	@echo 'make train CONFIG=configs/notes.yaml   on your own text, in the directory notes'
	@echo 'make train CONFIG=configs/eli5.yaml    another recipe, see configs/'
	@echo 'make train ARGS="--max_steps 50"       any flag of train.py, see $(BIN)/python train.py --help'
	@echo 'make tensorboard                       the curves of all runs, on http://localhost:6006'
	@echo 'make test, make lint                   the tests and the linter'
	@echo 'make docs                              docs/flags.md, from the dataclasses of the scripts'
	@echo 'make test-all                          the slow tests as well: adapters on every architecture'
	@echo 'make torture                           kills, lost ranks, damage, full disks, signals: the long tests, as a table'
	@echo 'make bench                             speed and memory beside the peers, 3 minutes; ARGS=--full takes 30'
	@echo 'make bench-gpu                         the same on one GPU'

install: .venv/installed

# --resume: a run that was interrupted goes on, a finished one says so; on an empty directory it changes nothing.
train: .venv/installed $(PREPARED)
	@$(BIN)/python train.py --config $(CONFIG) --resume $(ARGS)

tensorboard: .venv/installed
	$(BIN)/python -m tensorboard.main --host localhost --logdir $(RUNS) $(ARGS)

test: .venv/installed-dev
	$(BIN)/python -m pytest $(PARALLEL)

test-all: .venv/installed-dev
	$(BIN)/python -m pytest -m '' $(PARALLEL)

torture: .venv/installed-dev
	$(BIN)/python tests/torture/torture.py $(ARGS)

bench: .venv/installed-dev quickstart/smollm2 quickstart/text.jsonl
	$(BIN)/python -m benchmarks.bench $(ARGS)

bench-gpu: .venv/installed-dev
	$(BIN)/python -m benchmarks.gpu $(ARGS)

docs: .venv/installed-dev
	$(BIN)/python docs/flags.py > docs/flags.md.new && mv docs/flags.md.new docs/flags.md

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo 'Python 3.10 or newer is needed; name one with PYTHON=python3.11' >&2; exit 2; }
	$(if $(UV),uv venv --quiet --seed --allow-existing --python $(PYTHON) .venv,$(PYTHON) -m venv .venv)
	$(PIP) -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-lora.txt requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	@touch $@

.venv/installed-quickstart: .venv/installed quickstart/requirements.txt
	$(PIP) -r quickstart/requirements.txt
	@touch $@

# A directory's time changes with its content, so what is made once is ordered after its tools, not dated by them.
quickstart/smollm2: | .venv/installed-quickstart
	$(BIN)/python quickstart/prepare_model.py $@

quickstart/text.jsonl: | .venv/installed
	$(BIN)/python quickstart/prepare_text.py $@
