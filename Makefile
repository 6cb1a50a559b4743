# Two commands are enough: `make demo` and `make test`. Both set up .venv by themselves, and set it
# up again when the pins have changed. Needed beforehand: Python 3.11 or newer with its venv module.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip
STAMP  := $(VENV)/.pins-installed
ARGS   ?=
# Processes that share the tests; 0 is none beside pytest itself, for ARGS=-s or a debugger.
WORKERS ?= 2
REPO   ?=

# Where CPU builds of PyTorch lie; asked first on a machine without an NVIDIA driver, and only once.
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_RANGE     := $(shell sed -n 's/^torch\([<>=]\)/torch\1/p' requirements.txt)

# Scripts that `make results` runs after the notebooks. Each writes into results/ by itself.
# Add a line: RESULT_SCRIPTS += path/to/script.py
RESULT_SCRIPTS := tools/measure_comparison.py tools/measure_safety.py tools/measure_chat.py \
                  tools/measure_faults.py tools/measure_leaving.py tools/measure_style.py

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export HF_HUB_DISABLE_TELEMETRY := 1
export GRADIO_ANALYTICS_ENABLED := False
export TOKENIZERS_PARALLELISM := false
export PYTHONUNBUFFERED := 1

# What must not wait for a network says so.
demo test: export HF_HUB_OFFLINE := 1

.PHONY: help setup demo run chat test lint drift colab results publish
.DEFAULT_GOAL := help

help:
	@echo "make demo     run the five notebooks on the embedded tiny model, then show its answers"
	@echo "make run      the same with the profile of the GPU found, model and data from the Hub"
	@echo "make chat     open the chat page"
	@echo "make test     run every test"
	@echo "make lint     ruff and codespell"
	@echo "make drift    what the newest published libraries would break; nothing is installed"
	@echo "make colab    each notebook alone in an empty folder, Colab rehearsed; a few minutes"
	@echo "make results  run what is too long for a page; writes results/"
	@echo "make publish REPO=you/name   write your repository's address into badges and links"
	@echo "Constants:    make demo ARGS='MAX_STEPS=20 SEED=1'"

setup: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "Python's venv module is missing; on Debian or Ubuntu: apt-get install python3-venv"; \
	  exit 1; }
	@echo "Installing the pins into $(VENV) (a few minutes the first time) ..."
	@$(PIP) install -qq --upgrade pip
	@command -v nvidia-smi >/dev/null 2>&1 || $(PIP) show --quiet torch 2>/dev/null || \
	  $(PIP) install -qq --no-deps --retries 0 --timeout 5 \
	    --index-url $(TORCH_CPU_INDEX) "$(TORCH_RANGE)" 2>/dev/null || \
	  $(PIP) install -qq torch==2.13.0 || $(PIP) install -qq "$(TORCH_RANGE)"
	@$(PIP) install -qq -r requirements-dev.txt
	@touch $@

demo: $(STAMP)
	@$(BIN)/python tools/run_series.py PROFILE=cpu $(ARGS)

run: $(STAMP)
	@$(BIN)/python tools/run_series.py PROFILE=auto $(ARGS)

chat: $(STAMP)
	@$(BIN)/python notebooks/py/05_gradio_chat.py SERVE=True $(ARGS)

test: $(STAMP)
	@$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check . && $(BIN)/codespell

drift: $(STAMP)
	@$(BIN)/python tools/drift.py --newest

colab: $(STAMP)
	@$(BIN)/python tools/colab_check.py $(ARGS)
	@$(BIN)/python tools/series.py update

results: $(STAMP)
	@$(BIN)/python tools/run_series.py --results PROFILE=auto $(ARGS)
	@for script in $(RESULT_SCRIPTS); do echo "== $$script"; $(BIN)/python $$script || exit 1; done
	@$(BIN)/python tools/series.py update

publish: $(STAMP)
	@test -n "$(REPO)" || { echo "Say which repository: make publish REPO=you/name"; exit 1; }
	@$(BIN)/python tools/series.py publish "$(REPO)"
