# Every target sets up what it needs in .venv and can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin
# A Python that has what is needed already: `make gpu PY=python3` makes no .venv
PY ?= $(BIN)/python
SETUP := $(if $(filter $(BIN)/python,$(PY)),.venv/installed)
# DeepSpeed guesses, with a warning, where it is not told
DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export DS_ACCELERATOR

.PHONY: demo test lint bench kernel-table gpu has-gpu clean

demo: .venv/installed  ## reinforcement learning on the embedded model: the reward rises, pictures before and after
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed ddpo_fast/train.py

test: .venv/installed  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(SETUP)  ## speed of every operation on this machine; rows go to bench/results
	env -u TRITON_INTERPRET $(PY) -m bench.kernels

kernel-table: $(SETUP)  ## compiles every kernel for four GPUs and rewrites bench/results/kernel_resources.csv
	env -u TRITON_INTERPRET $(PY) -m bench.kernel_resources

gpu: has-gpu $(SETUP)  ## on a CUDA machine, in 8 minutes at most and without a network: the kernels' tests, then `bench`
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: this torch finds no CUDA device")'
	$(PY) -c 'import ddpo_fast.kernels' 2>/dev/null || $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .
	@unset TRITON_INTERPRET; status=0; set -x; \
	timeout -s INT -k 10 240 $(PY) -m pytest tests/test_kernels.py tests/test_blocks.py tests/test_noise.py || status=$$?; \
	timeout -s INT -k 10 220 $(PY) -m bench.kernels || status=$$?; exit $$status

has-gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu: no CUDA machine, there is no nvidia-smi here"; exit 1; }

clean:
	rm -rf .venv build *.egg-info

.venv/installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (torch and friends: a few minutes and about 2 GB the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@
