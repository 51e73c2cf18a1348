# Two commands on a fresh machine: `make quickstart` and `make test`. Only make and Python 3.10 to 3.13, or uv, are assumed.
# PYTHON=/path/to/python uses that Python.
export PYTHON
BIN := .venv/bin
START := $(shell date +%s)
# OpenRLHF is pure Python, but its wheels are tagged for 3.10 to 3.12: every Python takes the last of them.
OPENRLHF = $(BIN)/pip install -q --no-deps --only-binary :all: --python-version 3.12 --upgrade --target \
	$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') openrlhf==0.11.2
# PyTorch's CPU builds; asked only if the ordinary index has none.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Hub names are never needed here, and a machine without a network should not wait for one.
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart install install-gpu test test-fast test-gpu lint format docs benchmark clean

quickstart: .venv/.installed build/smollm2/config.json  ## align a real 135M chat model with SSAPO on this machine
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/train_ssapo.sh --config examples/configs/quickstart.yaml $(FLAGS)
	@echo "From make to the table: $$((($$(date +%s) - $(START)) / 60)) min $$((($$(date +%s) - $(START)) % 60)) s."

install: .venv/.installed

.venv/.installed: requirements/cpu.txt setup.py
	@sh requirements/venv.sh .venv
	@echo "Installing the locked CPU stack (about 3 GB, some minutes) ..."
	$(BIN)/pip install -q --no-deps -r requirements/cpu.txt || \
		$(BIN)/pip install -q --no-deps --extra-index-url $(TORCH_INDEX) -r requirements/cpu.txt
	$(OPENRLHF)
	$(BIN)/pip install -q --no-deps --no-build-isolation -e .
	touch $@

install-gpu: .venv/.gpu  ## what a machine with NVIDIA GPUs needs; nothing is compiled, so that CUDA's nvcc is not needed

.venv/.gpu: setup.py
	@sh requirements/venv.sh .venv
	@echo "Installing the GPU stack (about 8 GB, some minutes) ..."
	$(BIN)/pip install -q -e .[gpu,eval]
	$(OPENRLHF)
	touch $@

.venv/.dev: .venv/.installed requirements/dev.txt
	$(BIN)/pip install -q --no-deps -r requirements/dev.txt
	touch $@

build/smollm2/config.json: examples/quickstart/prepare_model.py | .venv/.installed
	$(BIN)/python examples/quickstart/prepare_model.py build/smollm2

# Two processes of one thread each are faster on two cores than one process of two. Tests that are not compiled anew save seconds.
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest --dist worksteal

test: .venv/.dev build/smollm2/config.json  ## everything, engines and launchers included: these are often waited for
	$(PYTEST) -n 3

test-fast: .venv/.dev  ## without engines and launchers
	$(PYTEST) -n 2 -m "not slow"

# With what `make install-gpu` installed, one process after the other on one GPU.
test-gpu: .venv/.gpu  ## under ten minutes on a GPU: everything that only a GPU reaches, with a table of speed and memory
	$(BIN)/pip install -q pytest pytest-timeout
	env PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -m gpu tests/gpu

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: .venv/.docs  ## the documentation site, in build/docs/site; a link that leads nowhere is an error
	$(BIN)/python docs/build_site.py build/docs

.venv/.docs: .venv/.dev requirements/docs.txt
	$(BIN)/pip install -q --no-deps -r requirements/docs.txt
	touch $@

benchmark: .venv/.dev build/peers/trl build/smollm2/config.json  ## the follower three ways; steps and scoring beside OpenRLHF and TRL; a round beside vLLM and TRL
	$(BIN)/python measurements/worst_case.py
	$(BIN)/python measurements/steps.py
	$(BIN)/python measurements/rounds.py

# Beside the locked stack, which has all that it needs.
build/peers/trl: | .venv/.installed
	$(BIN)/pip install -q --no-deps --target build/peers trl==1.16.0

clean:
	rm -rf .venv build runs
