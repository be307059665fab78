# Needs Python 3.11+ and make, nothing else; all that it installs goes to .venv.
.PHONY: up test checks lint faults model holes lock audit bench dashboards clean

# 3.11 is what Sluice is developed with; vLLM has CPU builds for it.
PYTHON ?= $(firstword $(shell command -v python3.11) python3)
BIN := .venv/bin
# Without an engine to load here, `up` needs no vLLM.
UP_NEEDS := $(if $(filter sim http://% https://%,$(SLUICE_MODEL)),core,cpu)

up: .venv/installed-$(UP_NEEDS)  ## runs everything on this machine, until Ctrl-C
	@exec $(BIN)/sluice up

test: .venv/installed-test lint  ## everything that a change has to pass
	-$(MAKE) audit
	$(MAKE) --jobs 2 --keep-going checks model SEED=1; checked=$$?; \
	$(MAKE) faults OUTAGE_S=10 && exit $$checked

checks: .venv/installed-test
	$(BIN)/pytest --ignore tests/faults --ignore tests/model -n 3 --dist loadgroup

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

# Where PyTorch's CPU builds are found; the rest comes from where uv looks.
TORCH_SOURCE ?= --torch-backend cpu
NOT_LOCKED := $(foreach package,torch torchvision torchaudio torchcodec triton,\
	--no-emit-package $(package))
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --generate-hashes --no-annotate --no-header \
	--no-emit-index-url

lock: .venv/installed-test  ## pins all that is installed to what is newest now, with hashes
	$(COMPILE) --universal --extra cpu --extra postgres --extra test $(TORCH_SOURCE) $(NOT_LOCKED) \
	--override deploy/cpu-overrides.txt --output-file deploy/lock.txt pyproject.toml
	echo uv | $(COMPILE) --output-file deploy/uv.txt -

audit: .venv/installed-test  ## looks the pinned packages up among known vulnerabilities
	@$(BIN)/python deploy/audit.py

bench: .venv/installed-test  ## Sluice against vLLM's own server, on this machine
	$(BIN)/python -m bench

dashboards: .venv/installed-test  ## Grafana's dashboards, from deploy/dashboards to deploy/grafana
	$(BIN)/python -m deploy.dashboards

clean:  ## removes what the other targets made here; data stays in SLUICE_HOME
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/installed-%: pyproject.toml deploy/install.py deploy/cpu-overrides.txt \
		deploy/lock.txt deploy/uv.txt
	@$(PYTHON) deploy/install.py $*
	@touch $@
