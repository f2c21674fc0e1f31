# The few verbs of this repository. Each installs .venv first if it is missing or older than what it was built from.

# Asked for torch's CPU build only where pip, as it is configured, does not find it.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

BIN := .venv/bin
INSTALLED := .venv/.installed

.DEFAULT_GOAL := help
.PHONY: help quickstart test drills check bench clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(INSTALLED) ## train a small model on the whole stack, in minutes on two CPU cores
	@$(BIN)/r2vpo train configs/quickstart.yaml --next-free

test: $(INSTALLED) ## run the tests that need no GPU
	@$(BIN)/python -m pytest -m "not gpu and not slow"

drills: $(INSTALLED) ## kill and stop every process of a run in every phase, and what else may break: hours on two cores
	@$(BIN)/python -m pytest tests/faults -m faults
	@$(BIN)/python -m benchmarks.faults drills pressure repeated

check: $(INSTALLED) ## ruff, formatting, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@# The wrapper would otherwise ask the network for a newer pyright.
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright
	$(BIN)/lint-imports --no-cache

bench: $(INSTALLED) ## run one benchmark: make bench NAME=quickstart [QUICK=1]
	@$(BIN)/python -m benchmarks.$(or $(NAME),$(error make bench needs NAME=, such as NAME=quickstart))

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './runs/*' -prune -exec rm -rf {} +

$(INSTALLED): requirements/cpu.txt requirements/dev.txt pyproject.toml tools/install.sh
	@bash tools/install.sh $(TORCH_CPU_INDEX)
