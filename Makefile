# Needs Python 3.11+ and make, nothing else; all that it installs goes to .venv.
.PHONY: up test checks lint faults model holes bench dashboards clean

# 3.11 is what Sluice is developed with; vLLM has CPU builds for it.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
BIN := .venv/bin
# Without an engine to load here, `up` needs no vLLM.
UP_NEEDS := $(if $(filter sim http://% https://%,$(SLUICE_MODEL)),core,cpu)

up: .venv/installed-$(UP_NEEDS)  ## runs everything on this machine, until Ctrl-C
	@exec $(BIN)/sluice up

test: .venv/installed-test lint  ## everything that a change has to pass
	$(MAKE) --jobs 2 checks model SEED=1
	$(MAKE) faults OUTAGE_S=10

checks: .venv/installed-test
	$(BIN)/pytest --ignore tests/faults --ignore tests/model

lint: .venv/installed-test  ## style, types and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker-compose.yml

REPEAT ?= 1
OUTAGE_S ?= 60

faults: .venv/installed-test  ## kills every part in every way; REPEAT=20 does it more often
	$(BIN)/pytest tests/faults -n 2 --dist loadfile --repeat $(REPEAT) --outage-s $(OUTAGE_S)

STEPS ?= 100000
# Any other one each time, if it is not given: `make test` takes the same steps everywhere.
SEED ?=

model: .venv/installed-test  ## drives the queue's scripts at random against a model of them
	nice -n 19 $(BIN)/pytest tests/model/test_model.py --steps $(STEPS) $(SEED:%=--hypothesis-seed=%)

holes: .venv/installed-test  ## breaks the queue's code a line at a time, and sees the model find it
	$(BIN)/pytest tests/model/test_seeded_holes.py

bench: .venv/installed-test  ## Sluice against vLLM's own server, on this machine
	$(BIN)/python -m bench

dashboards: .venv/installed-test  ## Grafana's dashboards, from deploy/dashboards to deploy/grafana
	$(BIN)/python -m deploy.dashboards

clean:  ## removes what the other targets made here; data stays in SLUICE_HOME
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed-%: pyproject.toml deploy/install.py deploy/cpu-overrides.txt
	@$(PYTHON) deploy/install.py $*
	@touch $@
