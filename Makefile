# What each target does: `make`.
.DEFAULT_GOAL := help
SHELL := /bin/sh

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Each worker has its own server; a debugger wants `make test PYTEST="-n 0 --pdb"`.
WORKERS := -n auto --maxprocesses 4 --dist worksteal

.PHONY: help
help: ## Print this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  %-18s %s\n", $$1, $$2}' Makefile

$(READY): pyproject.toml constraints.txt scripts/setup.py
	@python3 scripts/setup.py $(VENV)

.PHONY: setup
setup: $(READY) ## Make .venv with everything in it

.PHONY: demo
demo: $(READY) ## Run the main job on an embedded PostgreSQL and print a summary
	@$(BIN)/kitrocket demo

.PHONY: up
up: $(READY) ## The same, then keep serving with the Studio open to look at
	@$(BIN)/kitrocket demo --serve

.PHONY: test
test: $(READY) ## Run the tests (under 10 minutes)
	@$(BIN)/python -m pytest $(WORKERS) -m "not storm and not faults and not scale and not node" $(PYTEST)

.PHONY: lint
lint: $(READY) ## Check format, style, types and floors
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache --no-logo 2>/dev/null || $(BIN)/lint-imports --no-cache

.PHONY: format
format: $(READY) ## Format the code and fix what can be fixed by itself
	@$(BIN)/ruff check --fix-only --quiet .
	@$(BIN)/ruff format .

.PHONY: check
check: lint test ## Lint and test: what every commit has passed

.PHONY: test-storm
test-storm: $(READY) ## Run the long concurrent storms
	@$(BIN)/python -m pytest -m storm --timeout 1800 $(PYTEST)

.PHONY: test-faults
test-faults: $(READY) ## Kill processes and cut connections, hundreds of times
	@$(BIN)/python -m pytest -m faults --timeout 1800 $(PYTEST)

.PHONY: test-scale
test-scale: $(READY) ## Run on millions of rows
	@$(BIN)/python -m pytest -m scale --timeout 3600 $(PYTEST)

.PHONY: test-better-auth
test-better-auth: $(READY) ## Run Better Auth's and Drizzle's own packages against kitrocket (needs node 20 and npm)
	@if command -v npm >/dev/null; then \
	  cd examples/better-auth && npm install --no-audit --no-fund --no-package-lock --loglevel=error; fi
	@$(BIN)/python -m pytest -m node -rs $(PYTEST)

.PHONY: test-postgres15
test-postgres15: $(READY) ## Run the tests on Debian's PostgreSQL 15 (apt-get install postgresql-15)
	@$(BIN)/python scripts/with_postgres.py -- $(BIN)/python -m pytest $(WORKERS) -m "not storm and not faults and not scale and not browser and not node" $(PYTEST)

.PHONY: test-pooler
test-pooler: $(READY) ## Run the integration tests through PgBouncer in transaction mode (apt-get install pgbouncer)
	@$(BIN)/python scripts/with_postgres.py --pooler -- $(BIN)/python -m pytest $(WORKERS) -m "not storm and not faults and not scale and not browser and not node" tests/integration $(PYTEST)

.PHONY: bench
bench: $(READY) ## Measure against the raw driver and peers, in ratios
	@missed=0; for script in benchmarks/*.py; do echo "== $$script"; $(BIN)/python "$$script" || missed=1; done; exit $$missed

.PHONY: constraints
constraints: ## Lock the newest versions of every dependency into constraints.txt
	@python3 scripts/setup.py --lock constraints.txt

.PHONY: clean
clean: ## Stop the embedded server and remove .venv and what tools left
	@if [ -x $(BIN)/kitrocket ]; then $(BIN)/kitrocket db stop || true; fi
	@rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis dist build
