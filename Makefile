# Every target sets up what it needs in .venv and can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin
# A Python that has what is needed already: `make gpu PY=python3` makes no .venv
PY ?= $(BIN)/python
SETUP := $(if $(filter $(BIN)/python,$(PY)),.venv/installed)
# TRL's own environment; another Python that has TRL: TRL_PY=python3
TRL_PY ?= .venv-trl/bin/python
TRL_SETUP := $(if $(filter .venv-trl/bin/python,$(TRL_PY)),.venv-trl/installed)
export TRL_PY
RUN := env -u TRITON_INTERPRET $(PY) -m
BOX := timeout -s INT -k 15
# DeepSpeed guesses, with a warning, where it is not told
DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export DS_ACCELERATOR

.PHONY: demo test test-slow lint bench bench-kernels bench-reward bench-algorithms headline kernel-table gpu gpu-kernels gpu-train gpu-peers has-gpu cuda-here clean

demo: .venv/installed  ## reinforcement learning on the embedded model: the reward rises, pictures before and after
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed ddpo_fast/train.py

test: .venv/installed  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile --benchmark-disable

test-slow: .venv/installed  ## the tests that `test` leaves out: 20 minutes on a quiet machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(SETUP) $(TRL_SETUP)  ## this machine's speed beside TRL's and the textbook loop's, what each technique is worth, how cost grows: 15 minutes
	$(RUN) bench.peers
	$(RUN) bench.waterfall
	$(RUN) bench.throughput --scaling
	$(RUN) bench.throughput
	$(RUN) bench.compare || true

bench-kernels: $(SETUP)  ## every fused operation by itself: a minute
	$(RUN) bench.kernels

bench-reward: $(SETUP) $(TRL_SETUP)  ## reward per device-hour, ours against TRL: 5 seeds, half an hour; interrupted, it continues
	$(RUN) bench.reward

bench-algorithms: $(SETUP)  ## the paper's comparison in small, two runs at a time: hours; interrupted, it continues
	OMP_NUM_THREADS=1 $(RUN) bench.algorithms --jobs 2

headline: $(SETUP)  ## the tables and pictures of results in README.md and docs, anew from bench/results
	$(RUN) bench.headline

kernel-table: $(SETUP)  ## compiles every kernel for four GPUs and rewrites bench/results/kernel_resources.csv
	$(RUN) bench.kernel_resources

gpu:  ## all three parts, 25 minutes at most, on a CUDA machine that needs no network; one that fails does not stop the next
	@status=0; for part in gpu-kernels gpu-train gpu-peers; do $(MAKE) $$part || status=$$?; done; exit $$status

gpu-kernels: cuda-here  ## the kernels' tests and benchmarks, 9 minutes at most
	@unset TRITON_INTERPRET; status=0; set -x; \
	$(BOX) 220 $(PY) -m pytest tests/test_kernels.py tests/test_blocks.py tests/test_noise.py || status=$$?; \
	$(BOX) 200 $(PY) -m bench.kernels || status=$$?; exit $$status

gpu-train: cuda-here  ## SD 1.5 and SDXL at full size by stages; what each technique is worth; 9 minutes at most
	@unset TRITON_INTERPRET; status=0; set -x; \
	$(BOX) 230 $(PY) -m bench.throughput --models sd15 sdxl || status=$$?; \
	$(BOX) 300 $(PY) -m bench.waterfall --model sd15_wide --rounds 3 || status=$$?; exit $$status

gpu-peers: cuda-here $(TRL_SETUP)  ## SD 1.5 beside TRL and the textbook loop, 9 minutes at most
	@unset TRITON_INTERPRET; status=0; set -x; \
	$(BOX) 330 $(PY) -m bench.peers --model sd15 --peers textbook trl --rounds 3 --no-limits || status=$$?; \
	$(BOX) 200 $(PY) -m bench.peers --model sd15_wide --peers textbook trl --rounds 3 || status=$$?; exit $$status

has-gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu: no CUDA machine, there is no nvidia-smi here"; exit 1; }

cuda-here: has-gpu $(SETUP)
	@$(PY) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("make gpu: this torch finds no CUDA device")'
	$(PY) -c 'import ddpo_fast.kernels' 2>/dev/null || $(PY) -m pip install --quiet --no-deps --no-build-isolation --editable .

clean:
	rm -rf .venv .venv-trl build *.egg-info

.venv/installed: requirements.txt setup.py
	@$(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	@echo "setting up .venv (torch and friends: a few minutes and about 2 GB the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

# the same packages as .venv, and TRL with what it needs on top
.venv-trl/installed: .venv/installed
	@echo "setting up .venv-trl for TRL 0.23.1"
	$(PYTHON) -m venv .venv-trl
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$(.venv-trl/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared_with_venv.pth"
	.venv-trl/bin/pip install --quiet trl==0.23.1
	@touch $@
