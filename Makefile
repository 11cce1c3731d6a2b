# `make quickstart` and `make test` need no setup: each installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: on models this small, waiting threads burn more CPU time than they save.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_TELEMETRY ?= 1
export WANDB_SILENT ?= true

.PHONY: quickstart pipeline test check format bench demo soak clean

quickstart: $(VENV)/installed
	$(BIN)/tuner train configs/quickstart_sft.py
	@echo
	@echo "The model has learned to add. What to type next:"
	@echo "  $(BIN)/tuner chat runs/quickstart_sft                        chat with it"
	@echo "  $(BIN)/tuner data configs/quickstart_sft.py                  see the tokens it was trained on"
	@echo "  $(BIN)/tuner show configs/internlm2_7b_qlora.py              read a config for a real model"
	@echo "  $(BIN)/tuner check configs/internlm2_7b_qlora.py --tiny      try it without the weights"

# SFT, reward model, PPO: a finished run is not trained again, an interrupted one resumes.
pipeline: $(VENV)/installed
	$(BIN)/tuner train configs/quickstart_sft.py
	$(BIN)/tuner train configs/quickstart_reward.py
	$(BIN)/tuner train configs/quickstart_ppo.py
	@echo
	@echo "What to type next:"
	@echo "  $(BIN)/tuner eval runs/quickstart_ppo --against runs/quickstart_sft --trust"
	@echo "  $(BIN)/tuner chat runs/quickstart_ppo"

test: check
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# What takes an hour: 100 random kills over all stages, memory over 200 steps, and tests/soak/longer.txt.
soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m soak -rP tests

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: $(VENV)/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-dev
	for bench in benchmarks/*.py; do $(BIN)/python $$bench || exit 1; done

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist
