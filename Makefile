# Two commands on a fresh machine: `make quickstart` and `make test`. Only Python 3.11 and make are assumed.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# PyTorch's CPU builds; asked only if the ordinary index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Hub names are never needed here, and a machine without a network should not wait for one.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart install install-gpu test test-fast lint format benchmark clean

quickstart: .venv/.installed build/smollm2/config.json  ## align a real 135M chat model with SSAPO on this machine
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/train_ssapo.sh --config examples/configs/quickstart.yaml $(FLAGS)

install: .venv/.installed

.venv/.installed: requirements/cpu.txt setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), "the locked stack is for Python 3.11: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
	@echo "Installing the locked CPU stack (about 3 GB, some minutes) ..."
	$(BIN)/pip install -q --no-deps -r requirements/cpu.txt || \
		$(BIN)/pip install -q --no-deps --extra-index-url $(TORCH_INDEX) -r requirements/cpu.txt
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

install-gpu: .venv/.gpu  ## what a machine with NVIDIA GPUs needs; nothing is compiled, so that CUDA's nvcc is not needed

.venv/.gpu: setup.py
	$(PYTHON) -m venv .venv
	@echo "Installing the GPU stack (about 8 GB, some minutes) ..."
	$(BIN)/pip install -q -e .[gpu,eval]
	$(BIN)/pip install -q --no-deps openrlhf==0.11.2
	touch $@

.venv/.dev: .venv/.installed requirements/dev.txt
	$(BIN)/pip install -q --no-deps -r requirements/dev.txt
	touch $@

build/smollm2/config.json: examples/quickstart/prepare_model.py | .venv/.installed
	$(BIN)/python examples/quickstart/prepare_model.py build/smollm2

# Two processes of one thread each are faster on two cores than one process of two. Tests that are not compiled anew save seconds.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 2 --dist worksteal

test: .venv/.dev build/smollm2/config.json  ## everything, engines and launchers included
	$(PYTEST)

test-fast: .venv/.dev  ## without engines and launchers
	$(PYTEST) -m "not slow"

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: .venv/.dev build/peers/trl build/smollm2/config.json  ## the follower three ways; steps and scoring beside OpenRLHF and TRL
	$(BIN)/python measurements/worst_case.py
	$(BIN)/python measurements/steps.py

# Beside the locked stack, which has all that it needs.
build/peers/trl: | .venv/.installed
	$(BIN)/pip install -q --no-deps --target build/peers trl==1.16.0

clean:
	rm -rf .venv build runs
