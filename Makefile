# Each target sets up what it needs, with the exact pins of environment.yml's pip section.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXPERIMENT ?= digits
FAULTS ?= .faults
PARALLEL ?= --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

.PHONY: demo test faults scale full-size rehearsals benchmarks lab dashboard lint setup

demo: setup  ## The whole pipeline on the embedded data set and base model
	$(BIN)/sdlab run digits

test: setup $(VENV)/reference/.done  ## Unit and property tests, and every notebook at smoke depth
	$(BIN)/python -m pytest $(PARALLEL)

faults: setup $(VENV)/reference/.done  ## Kills, refusing disks, damage, rubbish, many times over: hours; a second call continues
	SDLAB_DAMAGED_FILES=240 SDLAB_FUZZ=2500 $(BIN)/python -m pytest $(PARALLEL) tests/faults
	$(BIN)/python tests/faults/refusals.py --folder $(FAULTS)
	$(BIN)/python tests/faults/kills.py --folder $(FAULTS) --kills 115 --soak 30

scale: setup  ## Several workers and hosts (root, iproute2, faketime), killed drivers, and how much faster: five hours
	$(BIN)/python -m pytest -m scale -s tests/scale
	$(BIN)/python tests/faults/kills.py --folder $(FAULTS)/workers --kills 0 --runs 4 --kills-a-run 7 --workers 2
	for experiment in digits retinamnist-tiny; do for work in sets cells search; do \
		$(BIN)/python scripts/measure_workers.py measure $$experiment $$work || exit 1; done; done
	$(BIN)/python scripts/measure_workers.py scheduler
	$(BIN)/python scripts/measure_workers.py report

full-size: setup  ## Stable Diffusion 2.0 at its true size on the CPU: minutes, 20 GiB of memory, 35 GB of disk below TMPDIR
	$(BIN)/python -m pytest -m slow -s tests/test_full_size.py

rehearsals: setup  ## Two of the paper's experiments, 00 to 07, at Stable Diffusion 2.0's true size on the CPU: an hour, 20 GiB, 35 GB
	$(BIN)/python scripts/rehearse.py cifar10
	$(BIN)/python scripts/rehearse.py retinamnist

benchmarks: setup $(VENV)/reference/.done  ## Each part and the usual way to do the same, timed: minutes on a quiet machine
	$(BIN)/python benchmarks/run.py cpu

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir . --LabApp.default_url=/lab/tree/notebooks

dashboard: setup  ## optuna-dashboard over the searches of EXPERIMENT, on 127.0.0.1
	$(BIN)/sdlab dashboard $(EXPERIMENT)

lint: setup  ## ruff and nbstripout, as pre-commit runs them
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/nbstripout --verify --keep-id --extra-keys "metadata.papermill cell.metadata.papermill" notebooks/*.ipynb benchmarks/*.ipynb

setup: $(VENV)/.done

$(VENV)/.done: environment.yml pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "sdlab needs Python 3.11 or newer, and $(PYTHON) is `$(PYTHON) --version`: try make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	sed -n '/- pip:/,$$ { s/ *#.*//; s/^ *- \(.*==.*\)/\1/p; }' environment.yml > $(VENV)/pins.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==0.13.9
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --requirement $(VENV)/pins.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	$(BIN)/python -m ipykernel install --sys-prefix --name sdlab --display-name sdlab > /dev/null
	touch $@

$(VENV)/reference/.done: $(VENV)/.done tests/requirements-reference.txt
	$(BIN)/uv pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --target $(VENV)/reference --requirement tests/requirements-reference.txt
	touch $@
