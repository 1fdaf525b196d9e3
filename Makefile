# Every target sets up what it needs in .venv and can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin
# DeepSpeed guesses, with a warning, where it is not told
DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export DS_ACCELERATOR

.PHONY: demo test lint clean

demo: .venv/installed  ## reinforcement learning on the embedded model: the reward rises, pictures before and after
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed ddpo_fast/train.py

test: .venv/installed  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv build *.egg-info

.venv/installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (torch and friends: a few minutes and about 2 GB the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@
