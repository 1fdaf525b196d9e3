# Every target sets up what it needs in .venv and can be run again at any time.
PYTHON ?= python3
BIN := .venv/bin
# A Python that has what is needed already: `make gpu PY=python3` makes no .venv
PY ?= $(BIN)/python
SETUP := $(if $(filter $(BIN)/python,$(PY)),.venv/installed)
# TRL's own environment, or that other Python
TRL_PY ?= $(if $(SETUP),.venv-trl/bin/python,$(PY))
TRL_SETUP := $(if $(filter .venv-trl/bin/python,$(TRL_PY)),.venv-trl/installed)
export TRL_PY
RUN := env -u TRITON_INTERPRET $(PY) -m
# Seconds of `make gpu`, and when it began
BUDGET ?= 480
START := $(shell date +%s)
GPU_SETUP := $(if $(SETUP),has-gpu $(SETUP)) $(TRL_SETUP)
SUITE := pytest -m "not slow" -n 2 --dist loadfile --benchmark-disable
HAS_PYTHON := $(PYTHON) -c 'import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("Python 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
# DeepSpeed guesses, with a warning, where it is not told
DS_ACCELERATOR ?= $(shell command -v nvidia-smi >/dev/null 2>&1 && echo cuda || echo cpu)
export DS_ACCELERATOR

.PHONY: demo test test-oldest test-newest test-slow test-cpus same lint bench bench-kernels bench-reward bench-algorithms headline kernel-table gpu wheels has-gpu clean

demo: .venv/installed  ## reinforcement learning on the embedded model: the reward rises, pictures before and after
	PATH="$(CURDIR)/$(BIN):$$PATH" deepspeed ddpo_fast/train.py

test: .venv/installed  ## the test suite
	OMP_NUM_THREADS=1 $(BIN)/python -m $(SUITE)

test-oldest test-newest: test-%: .venv-%/installed  ## the test suite on the oldest versions that setup.py allows; on the newest that there are
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m $(SUITE)

test-slow: .venv/installed  ## the tests that `test` leaves out: 20 minutes on a quiet machine
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

test-cpus: .venv/installed  ## the tests that compare rounded numbers, under each instruction set of this CPU: 15 minutes
	$(BIN)/python tests/cpus.py

same: .venv/installed  ## ten short runs here and at the commit REF, compared bit for bit: make same REF=main
	$(BIN)/python tests/same.py "$(REF)"

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

gpu: $(GPU_SETUP)  ## what a CUDA machine is asked, 8 minutes at most, no network needed; again, it goes on; OUT=folder PART="kernels stages peers ops ..."
	$(if $(SETUP),,$(PY) -m bench.wheels --install)
	$(RUN) bench.gpu $(PART) --out "$(or $(OUT),bench/results)" --seconds $$(($(START) + $(BUDGET) - $$(date +%s)))

wheels: .venv/installed  ## .whl/: what a GPU machine without a network lacks, for `make gpu PY=python3` there
	$(BIN)/python -m bench.wheels

has-gpu:
	@command -v nvidia-smi >/dev/null || { echo "make gpu: no CUDA machine, there is no nvidia-smi here"; exit 1; }

clean:
	rm -rf .venv .venv-oldest .venv-newest .venv-trl build *.egg-info

.venv/installed: requirements.txt setup.py
	@$(HAS_PYTHON)
	@echo "setting up .venv (torch and friends: a few minutes and about 2 GB the first time)"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

# with what setup.py asks for: its bounds have to admit the set
.venv-oldest/installed .venv-newest/installed: .venv-%/installed: requirements-%.txt setup.py
	@$(HAS_PYTHON)
	@echo "setting up .venv-$* (torch and friends: a few minutes and about 5 GB the first time)"
	$(PYTHON) -m venv .venv-$*
	.venv-$*/bin/pip install --quiet --requirement requirements-$*.txt --editable .
	@touch $@

# the same packages as .venv, and TRL with what it needs on top
.venv-trl/installed: .venv/installed
	@echo "setting up .venv-trl for TRL 0.23.1"
	$(PYTHON) -m venv .venv-trl
	$(BIN)/python -c 'import site; print(f"import site; site.addsitedir({site.getsitepackages()[0]!r})")' \
		> "$$(.venv-trl/bin/python -c 'import site; print(site.getsitepackages()[0])')/shared_with_venv.pth"
	.venv-trl/bin/pip install --quiet "$$($(BIN)/python -c 'from bench.wheels import TRL; print(TRL)')"
	@touch $@
